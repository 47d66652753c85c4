"""Unlearn with NPO and see what it did, in Python: `python examples/quickstart.py OUT`."""

import sys
from pathlib import Path

import palimpsest

out = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart-out")
recipe = palimpsest.make_recipe(
    {
        "run": {"name": "quickstart", "seed": 0, "limit": 50},
        "numerics": {"device": "cpu", "threads": 1},
        "models": [{"name": "original", "source": "sandbox/original", "role": "original"}],
        "training": {
            "forget": {"dataset": "sandbox_forget"},
            "retain": {"dataset": "sandbox_retain"},
        },
        "methods": [{"name": "npo", "fit": {"steps": 20, "lr": 1e-3, "accumulate": 1}}],
        "evaluate": [
            {"dataset": "sandbox_harmful", "judges": ["sandbox_oracle"], "max_new_tokens": 48},
            {"dataset": "sandbox_facts", "channels": ["letter", "cloze"]},
        ],
    }
)
result = palimpsest.run(recipe, out)
for row in result.summary.rows:
    if row.metric in {"valid_safety", "accuracy"} and row.low is not None:
        paired = row.paired
        change = f", {paired.difference:+.2f} against {paired.against}" if paired else ""
        print(
            f"{row.model:<12} {row.evaluation}/{row.channel} {row.metric}: {row.value:.2f} "
            f"[{row.low:.2f}, {row.high:.2f}] n={row.n}{change}"
        )
print(f"report: {out / 'report.html'}")
