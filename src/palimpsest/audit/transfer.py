"""The transfer matrix: prompts that were fitted on one unlearned model, put before all the others.

Rows are methods that prompts were fitted on, cells the models that are asked. Every row's setting is chosen
on attack-dev by its own method, per channel; nothing is chosen by a column. Method A's training seeds are
crossed with all of B's; a method with itself has two cells: each network under its own prompt, and under
those of the method's other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from palimpsest.audit.crossed import CrossedDraws, Pairs, interval
from palimpsest.audit.floors import floor_without_control
from palimpsest.audit.jobs import stored_views
from palimpsest.audit.planning import Planned
from palimpsest.audit.rates import rate_of
from palimpsest.audit.recipe import NOTHING
from palimpsest.audit.record import Interval, Rate, TransferCell, TransferMatrix, TransferRow
from palimpsest.audit.recovery import MIN_CEILING, Answers
from palimpsest.audit.rows import Attacked, candidates_of
from palimpsest.audit.tables import PLACEBO, TARGET, Candidate, averaged, chosen
from palimpsest.stats import clustered_rate, paired_difference
from palimpsest.store import RunFolder
from palimpsest.views import FittedPrompt

Kind = Literal["own", "other seeds", "other method", "original", "control"]
Table = Sequence[Sequence[Answers | None]]
"""Answers of each network asked (column) under each prompt (row); None = no such pair."""


def transfer_matrices(
    plan: Planned, folder: RunFolder, attacked: Mapping[str, Mapping[str, Attacked]]
) -> list[TransferMatrix]:
    """Return a matrix per attack that fits a prompt, and channel; none unless the recipe asks for it.

    Args:
        plan: the audit's.
        folder: where its finished jobs are.
        attacked: label -> attack -> what is stored of it.
    """
    if not plan.recipe.audit.transfer_matrix:
        return []
    made = []
    for name, attack in plan.attacks.items():
        if isinstance(attack, FittedPrompt) and name not in plan.skipped:
            maker = _Maker(plan, folder, attacked, name)
            made += [maker.matrix(channel) for channel in plan.conditions.channels]
    return [matrix for matrix in made if any(row.cells for row in matrix.rows)]


@dataclass(frozen=True)
class _Maker:
    """Makes the matrices of one attack."""

    plan: Planned
    folder: RunFolder
    attacked: Mapping[str, Mapping[str, Attacked]]
    name: str

    @cached_property
    def seeds(self) -> dict[str, list[str]]:
        """Label -> the names of its networks."""
        return {k: [m.name for m in v] for k, v in self.plan.recipe.targets.items()}

    @cached_property
    def floor(self) -> str:
        """Name of the arm by whose distance the rows' settings are chosen."""
        controls = self.plan.recipe.controls
        return controls[0].name if controls else floor_without_control(self.plan.questions)

    @cached_property
    def stored(self) -> dict[str, list[dict[str, Any]]]:
        """Network that the prompts were fitted on -> all their views, whatever network was asked."""
        return {
            job.built_on: stored_views(self.folder, job)
            for job in self.plan.jobs
            if job.attack == self.name and job.role == "attack"
        }

    def candidates(self, label: str, attack: str) -> list[Candidate]:
        """Return an attack's settings and channels on one method and the fixed arms."""
        return candidates_of(self.attacked[label][attack].views, self.plan.questions, self.floor)

    def matrix(self, channel: str) -> TransferMatrix:
        """Return the matrix of one channel."""
        rows = [self._row(label, channel) for label in self.seeds]
        return TransferMatrix(attack=self.name, channel=channel, rows=rows)

    def _row(self, label: str, channel: str) -> TransferRow:
        seeds = self.seeds[label]
        facts: dict[str, Any] = {"fitted_on": label, "seeds": len(seeds)}
        failed = self.attacked[label][self.name].failed
        found = [] if failed else self.candidates(label, self.name)
        here = [c for c in found if c.channel == channel]
        if not here:
            why = failed or "no view that all arms have in this channel"
            return TransferRow(**facts, setting={}, is_chosen=False, cells=[], reason=why)
        pick = chosen(here, floor=self.floor)
        recipe = self.plan.recipe
        own = _Prompts(self, label, pick)
        cells = [own.cell(label, seeds, "own")]
        if len(seeds) > 1:
            cells.append(own.cell(label, seeds, "other seeds"))
        cells += [own.cell(k, v, "other method") for k, v in self.seeds.items() if k != label]
        cells.append(own.cell("original", [recipe.original.name], "original"))
        cells += [own.cell(m.name, [m.name], "control") for m in recipe.controls]
        return TransferRow(
            **facts,
            setting=dict(pick.setting),
            is_chosen=chosen(found, floor=self.floor) is pick,
            cells=cells,
            reason="",
        )


@dataclass(frozen=True)
class _Prompts:
    """The prompts of one method, one per training seed, at the setting that attack-dev chose."""

    maker: _Maker
    label: str
    pick: Candidate

    def cell(self, column: str, asked: Sequence[str], kind: Kind) -> TransferCell:
        """Return what the prompts do to some networks."""
        fitted = self.maker.seeds[self.label]
        plain = self._without(column, kind, len(asked))
        placebo = self._placebo(column, kind)
        if kind == "own":  # a network and its prompt are drawn together: one margin of seeds
            under: Table = [[self._answers(name, name)] for name in fitted]
            before: Table = [[answers] for answers in plain]
            beside: Table = [[answers] for answers in placebo]
        else:
            left_out = kind == "other seeds"
            under = [
                [None if left_out and a == b else self._answers(a, b) for b in asked]
                for a in fitted
            ]
            before, beside = [plain], [placebo] if placebo else []
        scope = _Scope(self.maker.plan, under, before, len(fitted), len(asked))
        return TransferCell(
            column=column,
            kind=kind,
            pairs=sum(one is not None for row in under for one in row),
            rate=scope.rate(under),
            plain=scope.rate(_matched(before, under)),
            change=scope.difference(before),
            above_placebo=scope.difference(beside) if beside else None,
            recovered=self._recovered(scope)
            if kind in ("own", "other seeds", "other method")
            else None,
        )

    def _answers(self, fitted_on: str, asked: str) -> Answers:
        """Return a network's answers under one prompt, averaged over the attack's repetitions."""
        channel = self.pick.channel
        return averaged(
            [
                view["outcomes"][channel]["test"]
                for view in self.maker.stored[fitted_on]
                if view["model"] == asked
                and view["setting"] == self.pick.setting
                and channel in view["outcomes"]
            ]
        )

    def _without(self, column: str, kind: Kind, count: int) -> Sequence[Answers]:
        """Return a column's answers without any attack, of each of its `count` networks."""
        label = column if column in self.maker.seeds else self.label
        arm = column if kind in ("original", "control") else TARGET
        (plain,) = (
            c for c in self.maker.candidates(label, NOTHING) if c.channel == self.pick.channel
        )
        answers = plain.answers[arm]["test"]
        assert len(answers) == count
        return answers

    def _placebo(self, column: str, kind: Kind) -> Sequence[Answers]:
        """Return a method's answers under its own placebo of this setting; none where there is none."""
        if kind in ("original", "control") or self.maker.attacked[column][self.maker.name].failed:
            return ()
        for one in self.maker.candidates(column, self.maker.name):
            if one.channel == self.pick.channel and one.setting == self.pick.setting:
                return one.answers.get(PLACEBO, {}).get("test", ())
        return ()

    def _recovered(self, scope: _Scope) -> Interval | None:
        """Return R by the original and the floor under the same prompts; None where uninformative.

        Without a control there is no R: nothing says what the prompts teach.
        """
        recipe = self.maker.plan.recipe
        if not recipe.controls:
            return None
        ceiling, low = (
            [[self._answers(name, arm)] for name in self.maker.seeds[self.label]]
            for arm in (recipe.original.name, recipe.controls[0].name)
        )
        return scope.recovered(ceiling, low)


@dataclass(frozen=True)
class _Scope:
    """The questions of a cell and how its tables become numbers."""

    plan: Planned
    under: Table
    before: Table
    num_fitted: int
    num_asked: int

    def rate(self, table: Table) -> Rate:
        """Return the mean over pairs, with Wilson's interval at the groups' effective size."""
        kept = set(self._kept(self.under, self.before))
        lists = [
            [a if i in kept else None for i, a in enumerate(answers)] for answers in _all(table)
        ]
        return rate_of(lists, self.plan.questions.test)

    def difference(self, other: Table) -> Interval | None:
        """Return the cell minus another table of the same networks, question by question."""
        kept = self._kept(self.under, other)
        groups = self._groups(kept)
        if len(set(groups)) < 2:
            return None
        pairs = list(zip(_all(self.under), _all(_matched(other, self.under)), strict=True))
        changes: Pairs = [
            [
                None if one is None else _minus(one, _at(other, i, j), kept)
                for j, one in enumerate(row)
            ]
            for i, row in enumerate(self.under)
        ]
        found = interval(*self._draws(groups).mean(changes))
        limits = [paired_difference(_right(a, kept), _right(b, kept), groups) for a, b in pairs]
        least, most = (fmean(one[k] for one in limits) for k in (1, 2))
        return Interval(
            value=found.value,
            low=max(-1.0, min(found.low, least, found.value)),
            high=min(1.0, max(found.high, most, found.value)),
        )

    def recovered(self, ceiling: Table, floor: Table) -> Interval | None:
        """Return (cell - floor) / (ceiling - floor), all under the same prompts."""
        kept = self._kept(self.under, ceiling, floor)
        groups = self._groups(kept)
        if len(set(groups)) < 2:
            return None
        draws = self._draws(groups)
        u, o, f = (draws.mean(_values(t, kept)) for t in (self.under, ceiling, floor))
        if interval(o[0] - f[0], o[1] - f[1]).low < MIN_CEILING:
            return None
        value = (u[0] - f[0]) / (o[0] - f[0])
        spans_D = o[1] - f[1]
        ratios_D = (u[1] - f[1])[spans_D > 0] / spans_D[spans_D > 0]
        found = interval(
            value, ratios_D
        )  # widened, or it would collapse where all answers are right
        limits = [clustered_rate(_right(a, kept), groups) for a in _all(self.under)]
        edges = [fmean(one[k] for one in limits) for k in (1, 2)]
        low, high = ((x - f[0]) / (o[0] - f[0]) for x in edges)
        return Interval(
            value=value, low=min(found.low, low, value), high=max(found.high, high, value)
        )

    def _draws(self, groups: Sequence[str]) -> CrossedDraws:
        return CrossedDraws(
            groups,
            num_fitted=self.num_fitted,
            num_asked=self.num_asked,
            seed=self.plan.recipe.audit.seed,
        )

    def _groups(self, kept: Sequence[int]) -> list[str]:
        return [self.plan.questions.test[i].group for i in kept]

    def _kept(self, *tables: Table) -> list[int]:
        """Return the questions that every pair of every table answered."""
        lists = [answers for table in tables for answers in _all(table)]
        number = len(self.plan.questions.test)
        return [i for i in range(number) if all(a[i] is not None for a in lists)]


def _all(table: Table) -> list[Answers]:
    return [one for row in table for one in row if one is not None]


def _at(table: Table, row: int, column: int) -> Answers:
    """Return an entry; a table of one row or column says the same in all of them."""
    entries = table[row if len(table) > 1 else 0]
    found = entries[column if len(entries) > 1 else 0]
    assert found is not None
    return found


def _matched(table: Table, under: Table) -> list[list[Answers | None]]:
    """Return a table's entries at every pair of another."""
    return [
        [None if one is None else _at(table, i, j) for j, one in enumerate(row)]
        for i, row in enumerate(under)
    ]


def _values(table: Table, kept: Sequence[int]) -> Pairs:
    return [
        [None if one is None else [float(one[i] or 0.0) for i in kept] for one in row]
        for row in table
    ]


def _minus(a: Answers, b: Answers, kept: Sequence[int]) -> list[float]:
    return [float(a[i] or 0.0) - float(b[i] or 0.0) for i in kept]


def _right(answers: Answers, kept: Sequence[int]) -> list[int]:
    return [int(float(answers[i] or 0.0) >= 0.5) for i in kept]
