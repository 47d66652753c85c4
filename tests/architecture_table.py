"""The table in docs/architectures.md: tests compare their outcome with its cells, or write them.

`PALIMPSEST_WRITE_DOCS=1 python -m pytest tests/contract/test_architectures.py
tests/maths/test_lm_eval_parity.py` writes every cell anew (in one process: no `-n`). Without that
variable a test fails when its outcome is not what the document says.
"""

from __future__ import annotations

import os
from pathlib import Path

from tiny_models import FAMILIES, MIXTURES

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"
BEGIN, END = "<!-- table: made by the tests -->\n", "<!-- end of table -->"
NAMES = {
    "llama": "Llama",
    "mistral": "Mistral (sliding window)",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma-2 (soft-caps, sliding window)",
    "gemma3": "Gemma-3 (sliding window)",
    "gpt2": "GPT-2 (fused, transposed)",
    "gpt_neox": "GPT-NeoX (fused)",
    "phi3": "Phi-3 (fused)",
    "olmo2": "OLMo-2 (norms after the layers)",
    "mixtral": "Mixtral (experts)",
    "qwen3_moe": "Qwen3-MoE (experts)",
}
ROWS = tuple(NAMES[family] for family in (*FAMILIES, *MIXTURES))
COLUMNS = ("score", "decode", "train", "NPO", "RMU", "LoRA", "hooks", "readout", "lm-eval")


def check_cell(family: str, column: str, outcome: str) -> None:
    """Compare a test's outcome with the document, or write it there."""
    table = read_table()
    if os.environ.get("PALIMPSEST_WRITE_DOCS"):
        table.setdefault(NAMES[family], {})[column] = outcome
        _write_table(table)
        return
    said = table.get(NAMES[family], {}).get(column)
    assert said == outcome, (
        f"docs/architectures.md says {said!r} for {NAMES[family]}, {column}; the test found "
        f"{outcome!r}. If that is right, write the table anew with PALIMPSEST_WRITE_DOCS=1"
    )


def read_table() -> dict[str, dict[str, str]]:
    """Return row -> column -> cell as the document has them."""
    inside = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    lines = [[c.strip() for c in line.strip("| ").split("|")] for line in inside.splitlines()]
    if not lines:
        return {}
    header, _, *rows = lines
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def _write_table(table: dict[str, dict[str, str]]) -> None:
    lines = [("architecture", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
    lines += [(row, *(table.get(row, {}).get(c, "?") for c in COLUMNS)) for row in ROWS]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")
