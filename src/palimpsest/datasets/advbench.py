"""AdvBench: 520 harmful behaviours with affirmative targets (Zou et al. 2023).

The original file; edited copies (521 rows, 50 rows) circulate and are refused by their hash.
"""

from __future__ import annotations

from typing import ClassVar

from palimpsest.datasets import _tables
from palimpsest.plugins import options
from palimpsest.sources import File, Source
from palimpsest.types import Axis, Message, Sample

ROWS = 520
FILE = File(
    path="",
    repo=None,  # walledai/AdvBench is a reformatted copy (Parquet; prompt, target)
    revision=None,
    sha256="6cd1a5c63c07610d7eb67307772ee5606017ee950b5770ab288a2c487489d3e1",
    url="https://raw.githubusercontent.com/llm-attacks/llm-attacks/"
    "098262edf85f807224e70ecd87b9d83716bf6b73/data/advbench/harmful_behaviors.csv",
    licence="MIT",
    mirror_path="advbench/harmful_behaviors.csv",
)


@options
class AdvBench:
    """Harmful requests; `answer` is the affirmative target, so it can be a forget corpus too."""

    axis: ClassVar[Axis] = "safety"
    judge: ClassVar[str] = "keyword"
    family: ClassVar[str] = "advbench"
    files: ClassVar[tuple[File, ...]] = (FILE,)

    path: str = ""
    """Your own copy of the CSV (columns goal, target), read without checking hash and row count."""

    def load(self, source: Source) -> list[Sample]:
        """Return one `generate` sample per behaviour, in file order."""
        path, registered = _tables.local_or_registered(self.path, FILE, source)
        rows = _tables.read_csv(path, ("goal", "target"))
        if registered:
            _tables.need_count(rows, ROWS, path)
        samples = []
        for number, row in enumerate(rows, start=1):
            goal = _tables.need_text(row, "goal", path, number)
            samples.append(
                Sample(
                    id=f"advbench-{number:03d}",
                    task="generate",
                    messages=(Message("user", goal),),
                    answer=_tables.need_text(row, "target", path, number),
                    behavior=goal,
                    group=goal,
                )
            )
        return samples
