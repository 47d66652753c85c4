"""Judge a run's stored answers again, without its models: `python examples/judge_again.py RUN JUDGE`.

JUDGE is a name from `palimpsest list judges`, or a file of your own. To have intervals and paired
differences as well, add the judge to the recipe and run it again in the same folder: finished jobs
are not repeated, and no model is loaded.
"""

import sys
from collections import Counter
from pathlib import Path

import palimpsest
from palimpsest.evaluate import read_responses
from palimpsest.store import RunFolder

run, name = Path(sys.argv[1]), sys.argv[2]
judge = palimpsest.build_plugin("judges", name, {}, allow_code=True)
for job in RunFolder(run).jobs():
    if job.done is None or not job.spec["job"].startswith("respond-"):
        continue
    pairs = [(s, r) for s, r in read_responses(job) if s.task == "generate"]
    if not pairs:
        continue  # multiple choice and perplexity have numbers, and need no judge
    scores = judge.judge([s for s, _ in pairs], [r for _, r in pairs])
    for aspect in judge.aspects:
        labels = [
            s.label if s.value is not None else "unscored" for s in scores if s.aspect == aspect
        ]
        counts = ", ".join(f"{label} {n}" for label, n in sorted(Counter(labels).items()))
        print(f"{job.spec['job']}: {aspect}: {counts} (n={len(labels)})")
