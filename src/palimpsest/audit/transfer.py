"""The transfer matrix: prompts that were fitted on one unlearned model, put before all the others.

Rows are methods that prompts were fitted on, cells the models that are asked. Every row's setting is chosen
on attack-dev by its own method, per channel; nothing is chosen by a column. Method A's training seeds are
crossed with all of B's; a method with itself has two cells: each network under its own prompt, and under
those of the method's other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from palimpsest.audit.crossed import CONFIDENCE, Arm, CrossedDraws, Ratio, paired, spread
from palimpsest.audit.floors import floor_without_control
from palimpsest.audit.jobs import stored_views
from palimpsest.audit.planning import Planned
from palimpsest.audit.rates import interval_of
from palimpsest.audit.recipe import NOTHING
from palimpsest.audit.record import Interval, Rate, TransferCell, TransferMatrix, TransferRow
from palimpsest.audit.recovery import MIN_CEILING, MIN_GROUPS, Answers
from palimpsest.audit.rows import Attacked, candidates_of
from palimpsest.audit.tables import PLACEBO, TARGET, Candidate, averaged, chosen
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
    made: dict[tuple[str, str], list[Candidate]] = field(default_factory=dict)

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
        if (label, attack) not in self.made:
            views = self.attacked[label][attack].views
            self.made[label, attack] = candidates_of(views, self.plan.questions, self.floor)
        return self.made[label, attack]

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
    drawn: dict[tuple[int, ...], CrossedDraws] = field(default_factory=dict)

    def rate(self, table: Table) -> Rate:
        """Return the mean over pairs; its interval draws groups and both margins of seeds."""
        kept = self._kept(self.under, self.before)
        unscored = len(self.plan.questions.test) - len(kept)
        if not kept:
            return Rate(value=None, low=None, high=None, n=0, unscored=unscored)
        arm = self._arm(table, kept)
        found = spread(arm.value, arm.drawn.at(), *arm.limits(CONFIDENCE))
        return Rate(
            value=found.value, low=found.low, high=found.high, n=len(kept), unscored=unscored
        )

    def difference(self, other: Table) -> Interval | None:
        """Return the cell minus another table of the same networks, question by question."""
        kept = self._kept(self.under, other)
        if not self._is_enough(kept):
            return None
        beside = _matched(other, self.under)
        return interval_of(paired(self._arm(self.under, kept), self._arm(beside, kept)))

    def recovered(self, ceiling: Table, floor: Table) -> Interval | None:
        """Return (cell - floor) / (ceiling - floor), all under the same prompts."""
        kept = self._kept(self.under, ceiling, floor)
        if not self._is_enough(kept):
            return None
        u, o, f = (self._arm(table, kept) for table in (self.under, ceiling, floor))
        return interval_of(Ratio(u, o, f).estimate()) if paired(o, f).low >= MIN_CEILING else None

    def _arm(self, table: Table, kept: Sequence[int]) -> Arm:
        return self._draws(tuple(kept)).arm(
            [
                [None if one is None else [float(one[i] or 0.0) for i in kept] for one in row]
                for row in table
            ]
        )

    def _is_enough(self, kept: Sequence[int]) -> bool:
        return len({self.plan.questions.test[i].group for i in kept}) >= MIN_GROUPS

    def _draws(self, kept: tuple[int, ...]) -> CrossedDraws:
        if kept not in self.drawn:
            self.drawn[kept] = CrossedDraws(
                [self.plan.questions.test[i].group for i in kept],
                num_fitted=self.num_fitted,
                num_asked=self.num_asked,
                seed=self.plan.recipe.audit.seed,
            )
        return self.drawn[kept]

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
