"""MMLU: four-option questions on 57 subjects (Hendrycks et al. 2021).

Read from per-subject CSV files (`mmlu/test/anatomy_test.csv`, no header) in a local mirror.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from palimpsest.datasets import _tables
from palimpsest.datasets._mmlu_files import REGISTERED, SUBJECTS
from palimpsest.errors import DataError, UsageError, did_you_mean
from palimpsest.plugins import options
from palimpsest.sources import File, Source
from palimpsest.types import Axis, Message, Sample

COLUMNS = ("question", "A", "B", "C", "D", "answer")
LETTERS = "ABCD"


def file_of(subject: str, part: str) -> File:
    """Return the file of one subject; it has a hash where one is registered."""
    name = f"mmlu/{part}/{subject}_{part}.csv"
    sha256 = REGISTERED[name][0] if name in REGISTERED else None
    # The hub's cais/mmlu holds Parquet of the same questions, not these files.
    return File(
        path="",
        repo=None,
        revision=None,
        sha256=sha256,
        url=None,
        licence="MIT",
        mirror_path=name,
    )


@options
class MMLU:
    """Utility: multiple-choice accuracy on school and university subjects."""

    axis: ClassVar[Axis] = "utility"
    judge: ClassVar[str] = "exact"
    family: ClassVar[str] = "mmlu"
    files: ClassVar[tuple[File, ...]] = tuple(
        file_of(subject, part) for part in ("test", "dev") for subject in SUBJECTS
    )

    subjects: tuple[str, ...] = ()
    """Subjects by file name (`college_biology`); empty = every subject found in the mirror."""
    part: Literal["test", "dev"] = "test"
    """`test` (14,042 questions in all) or `dev` (5 per subject, the usual few-shot examples)."""

    def load(self, source: Source) -> list[Sample]:
        """Return one `choose` sample per question: subjects in order, then file order."""
        for subject in self.subjects:
            if subject not in SUBJECTS:
                raise UsageError(
                    f"MMLU has no subject {subject!r}{did_you_mean(subject, SUBJECTS)}"
                )
        if len(set(self.subjects)) < len(self.subjects):
            raise UsageError(f"MMLU subjects are named twice: {', '.join(self.subjects)}")
        found = [s for s in SUBJECTS if source.has(file_of(s, self.part))]
        chosen = self.subjects or tuple(found) or SUBJECTS[:1]  # none found: open() says where
        return [sample for subject in chosen for sample in self._subject(subject, source)]

    def _subject(self, subject: str, source: Source) -> list[Sample]:
        file = file_of(subject, self.part)
        path = source.open(file)
        rows = _tables.read_csv(path, COLUMNS, header=False)
        if file.mirror_path in REGISTERED:
            _tables.need_count(rows, REGISTERED[file.mirror_path][1], path)
        topic = subject.replace("_", " ")
        samples = []
        for number, row in enumerate(rows, start=1):
            question = _tables.need_text(row, "question", path, number)
            letter = row["answer"].strip()
            if letter not in tuple(LETTERS):
                raise DataError(f"{path}, row {number}: answer {letter!r} is not one of A B C D")
            samples.append(
                Sample(
                    id=f"mmlu-{subject}-{self.part}-{number:04d}",
                    task="choose",
                    messages=(Message("user", question),),
                    options=tuple(row[column] for column in LETTERS),
                    answer=LETTERS.index(letter),
                    preamble=(
                        "The following are multiple choice questions (with answers) about "
                        f"{topic}.\n\n"
                    ),
                    behavior=question,
                    group=_tables.text_key(question),
                    tags={"subject": subject},
                )
            )
        return samples
