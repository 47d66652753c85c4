"""How much of what was forgotten an attack brings back: R0, R and gain, with intervals.

    R0 = (U0 - F0) / (O0 - F0)      residual: no attack on any arm
    R  = (U - F) / (O - F)          the same under the attack
    gain = R - max(R0, 0)

U, O and F are the accuracies of the unlearned model, the original (ceiling) and the control (floor) on the
same questions. Without a control, F is the accuracy of the unlearned model itself, under the same attack,
on invented facts: what the attack makes it guess. A model that answers below the floor is counted as at the
floor in the gain: going from "worse than guessing" to guessing recovers nothing.

Intervals draw groups of questions, and training seeds of the unlearned model where there are several; all
arms share a draw, since they answer the same questions (`two_level`). Invented facts are other questions in
other groups, drawn independently, but of the same models: they share the draw of seeds.

Legend: D draws, S seeds, G groups, N questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.errors import DataError
from palimpsest.stats import Floats, clustered_rate, effective_n, wilson
from palimpsest.two_level import group_draws, stretch_of

CONFIDENCE = 0.95
MIN_CEILING = 0.10
"""The original must beat the floor by so much, at the interval's lower end, else nothing can be said."""
DRAWS = 10_000

Answers = Sequence[float | None]
"""Of each question the share of repetitions that were right; None = unscored."""


@dataclass(frozen=True, kw_only=True)
class ArmAnswers:
    """What the arms answered in one condition (with one view, in one channel), question by question.

    Attributes:
        target: the unlearned model: a list per training seed.
        original: the ceiling. floor: the control; empty where `invented` is the floor.
        placebo: the unlearned model under the attack's placebo, by seed; empty without one.
        placebo_floor: the control under that placebo; None without either.
        invented: the unlearned model on invented facts, by seed: the floor without a control.
        placebo_invented: the same under the placebo.
    """

    target: tuple[Answers, ...]
    original: Answers
    floor: Answers = ()
    placebo: tuple[Answers, ...] = ()
    placebo_floor: Answers | None = None
    invented: tuple[Answers, ...] = ()
    placebo_invented: tuple[Answers, ...] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What an attack recovered.

    Attributes:
        residual: R0. recovered: R. gain: R - max(R0, 0). All None where uninformative.
        ceiling: original minus floor under the attack: what could be recovered.
        above_floor, above_original: unlearned minus floor, and minus original, under the attack.
        above_placebo: unlearned under the attack minus under its placebo; None without one.
        placebo_above_floor: unlearned minus floor, both under the placebo; None without either.
        n, groups, unscored: questions that all arms answered, their groups, and the others.
        informative: whether the ceiling's lower end is at least `MIN_CEILING`.
        least: draws of min(R, gain), sorted: what a verdict tests; empty where uninformative.
        smallest: the same at Wilson's lower limit of the unlearned model's rate.
        upper: upper end of R's 90 % interval: what a test of equivalence compares.
    """

    residual: Estimate | None
    recovered: Estimate | None
    gain: Estimate | None
    ceiling: Estimate
    above_floor: Estimate
    above_original: Estimate
    above_placebo: Estimate | None
    placebo_above_floor: Estimate | None
    n: int
    groups: int
    unscored: int
    informative: bool
    least: Floats
    smallest: float
    upper: float | None

    def p_value(self, delta: float) -> float:
        """Return the bootstrap's one-sided p of "R or the gain is at most delta"; 1 if uninformative."""
        if not self.informative:
            return 1.0
        return float((1 + np.count_nonzero(self.least <= delta)) / (1 + len(self.least)))

    def lower(self, alpha: float) -> float | None:
        """Return the lower limit of min(R, gain) at one-sided level alpha; None if uninformative.

        It is never above what Wilson's limit of the unlearned model's rate alone would give, since
        bootstrap intervals collapse where every answer is right.
        """
        if not self.informative:
            return None
        return min(float(np.quantile(self.least, alpha)), self.smallest)


def recovery(
    attacked: ArmAnswers,
    plain: ArmAnswers,
    groups: Sequence[str],
    *,
    invented_groups: Sequence[str] = (),
    seed: int = 0,
    draws: int = DRAWS,
) -> Recovery:
    """Return R0, R, gain and what goes with them.

    Args:
        attacked: answers under the attack.
        plain: answers without it, in the channel to compare with.
        groups: of each question.
        invented_groups: of each invented fact, where those are the floor.
        seed: of the resampling.
        draws: number of resamples.

    Raises:
        DataError: no question was scored on every arm, or arms have different numbers of questions.
    """
    kept = _scored_by_all(attacked, plain, groups)
    table = _Table.drawn([groups[i] for i in kept], kept, len(attacked.target), seed, draws)
    u, o = table.of(attacked.target), table.of([attacked.original])
    u0, o0 = table.of(plain.target), table.of([plain.original])
    floor, floor0, under = _floors(attacked, plain, table, invented_groups, seed)
    ceiling = floor.below(o)
    placebo = table.of(attacked.placebo) if attacked.placebo else None
    informative = ceiling.low >= MIN_CEILING and o0[0] > floor0.limits(CONFIDENCE)[1]
    facts: dict[str, Any] = {
        "ceiling": ceiling,
        "above_floor": floor.below(u),
        "above_original": _difference(u, o),
        "above_placebo": _difference(u, placebo) if placebo else None,
        "placebo_above_floor": under.below(placebo) if placebo and under else None,
        "n": len(kept),
        "groups": len(table.counts_G),
        "unscored": len(groups) - len(kept),
        "informative": informative,
    }
    if not informative:
        facts |= dict.fromkeys(("residual", "recovered", "gain"))
        return Recovery(**facts, least=np.empty(0), smallest=float("-inf"), upper=None)
    ratio, ratio0 = _ratio(u, o, floor.drawn), _ratio(u0, o0, floor0.drawn)
    gain = (ratio[0] - max(ratio0[0], 0.0), ratio[1] - np.maximum(ratio0[1], 0.0))
    least = np.sort(np.minimum(ratio[1], gain[1]))
    asked = [groups[i] for i in kept]
    low, high = _edges(attacked.target, kept, asked, u, o, floor, CONFIDENCE)
    low0, high0 = _edges(plain.target, kept, asked, u0, o0, floor0, CONFIDENCE)
    top = _edges(attacked.target, kept, asked, u, o, floor, 0.90)[1]
    return Recovery(
        residual=_widened(ratio0, low0, high0),
        recovered=_widened(ratio, low, high),
        gain=_widened(gain, gain[0], gain[0]),
        **facts,
        least=least,
        smallest=min(low, low - max(ratio0[0], 0.0)),
        upper=max(float(np.quantile(ratio[1], 0.95)), top),
    )


def residual_lower(
    plain: ArmAnswers,
    groups: Sequence[str],
    alpha: float,
    *,
    invented_groups: Sequence[str] = (),
    seed: int = 0,
    draws: int = DRAWS,
) -> float:
    """Return R0's lower limit at one-sided level alpha: at .025, that of the interval of `recovery`.

    Arguments and errors are those of `recovery`; the original's rate has to be above the floor's.
    """
    kept = _scored_by_all(plain, plain, groups)
    asked, confidence = [groups[i] for i in kept], 1 - 2 * alpha
    table = _Table.drawn(asked, kept, len(plain.target), seed, draws)
    table.confidence = confidence
    u, o = table.of(plain.target), table.of([plain.original])
    floor = _floors(plain, plain, table, invented_groups, seed)[0]
    edge = _edges(plain.target, kept, asked, u, o, floor, confidence)[0]
    return min(float(np.quantile(_ratio(u, o, floor.drawn)[1], alpha)), edge)


Drawn = tuple[float, Floats]
"""A number, and the same in each draw (D)."""


@dataclass
class _Table:
    """Turns answers into rates under common draws of groups and seeds."""

    kept: list[int]
    codes: Any
    counts_G: Floats
    weights: list[Floats]
    times_DS: Any
    confidence: float = CONFIDENCE

    @classmethod
    def drawn(
        cls, groups: Sequence[str], kept: list[int], num_seeds: int, seed: int, draws: int
    ) -> _Table:
        """Draw groups of the kept questions, then training seeds."""
        rng = np.random.default_rng(seed)
        codes, counts_G = _coded(groups)
        weights = list(group_draws(len(counts_G), draws, rng))
        chances = np.full(num_seeds, 1 / num_seeds)
        times_DS = rng.multinomial(num_seeds, chances, size=draws)
        return cls(kept, codes, counts_G, weights, times_DS)

    def beside(self, groups: Sequence[str], kept: list[int], seed: int) -> _Table:
        """Return the table of other questions to the same models: other groups, the same seeds."""
        rng = np.random.default_rng([seed, 1])
        codes, counts_G = _coded(groups)
        weights = list(group_draws(len(counts_G), len(self.times_DS), rng))
        return _Table(kept, codes, counts_G, weights, self.times_DS, self.confidence)

    def of(self, answers: Sequence[Answers]) -> Drawn:
        """Return the mean rate over seeds, and its draws; one list stands for no seeds at all."""
        sums_SG = np.array(
            [
                np.bincount(
                    self.codes,
                    weights=np.array([float(a[i] or 0.0) for i in self.kept]),
                    minlength=len(self.counts_G),
                )
                for a in answers
            ]
        )
        rates_S = sums_SG.sum(axis=1) / self.counts_G.sum()
        rates_DS = np.concatenate(
            [(w @ sums_SG.T) / (w @ self.counts_G)[:, None] for w in self.weights]
        )
        num_seeds = self.times_DS.shape[1]
        if len(answers) == 1:
            return float(rates_S[0]), rates_DS[:, 0]
        if len(answers) != num_seeds:
            raise DataError(f"{len(answers)} seeds of answers beside {num_seeds}")
        shift_S = (stretch_of(num_seeds, self.confidence) - 1.0) * (rates_S - rates_S.mean())
        means_D = ((rates_DS + shift_S) * self.times_DS).sum(axis=1) / num_seeds
        return float(rates_S.mean()), means_D


@dataclass
class _Floor:
    """The floor in one condition: its draws and, of invented facts, the answers that they come from."""

    drawn: Drawn
    invented: Sequence[Answers] = ()
    kept: Sequence[int] = ()
    groups: Sequence[str] = ()

    def limits(self, confidence: float) -> tuple[float, float]:
        """Return the rate at Wilson's limits, mean over seeds; a control is held at its estimate.

        The bootstrap of a few facts that all get the same mark has no width.
        """
        if not self.invented:
            return self.drawn[0], self.drawn[0]
        found = []
        for answers in self.invented:
            values = [float(answers[i] or 0.0) for i in self.kept]
            size = effective_n(values, self.groups, confidence)
            found.append(wilson(float(np.mean(values)) * size, size, confidence))
        return float(np.mean([low for low, _ in found])), float(
            np.mean([high for _, high in found])
        )

    def below(self, rate: Drawn) -> Estimate:
        """Return how far a rate is above this floor."""
        made, (low, high) = _difference(rate, self.drawn), self.limits(CONFIDENCE)
        return Estimate(made.value, min(made.low, rate[0] - high), max(made.high, rate[0] - low))


def _floors(
    attacked: ArmAnswers,
    plain: ArmAnswers,
    table: _Table,
    invented_groups: Sequence[str],
    seed: int,
) -> tuple[_Floor, _Floor, _Floor | None]:
    """Return the floor under the attack, without it and, where that is known, under the placebo."""
    if not attacked.invented:
        answers = attacked.placebo_floor
        under = None if answers is None else _Floor(table.of([answers]))
        return _Floor(table.of([attacked.floor])), _Floor(table.of([plain.floor])), under
    lists = [*attacked.invented, *plain.invented, *attacked.placebo_invented]
    kept = _scored_in_all(lists, invented_groups, "invented facts")
    groups = [invented_groups[i] for i in kept]
    other = table.beside(groups, kept, seed)
    floor, floor0, *placebo = (
        _Floor(other.of(answers), answers, kept, groups)
        for answers in (attacked.invented, plain.invented, attacked.placebo_invented)
        if answers
    )
    return floor, floor0, placebo[0] if placebo else None


def _coded(groups: Sequence[str]) -> tuple[Any, Floats]:
    """Return the number of each question's group, and the groups' sizes."""
    codes = np.unique(groups, return_inverse=True)[1]
    return codes, np.bincount(codes).astype(np.float64)


def _difference(a: Drawn, b: Drawn) -> Estimate:
    low, high = np.quantile(a[1] - b[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(a[0] - b[0], float(low), float(high))


def _ratio(u: Drawn, o: Drawn, f: Drawn) -> Drawn:
    value = (u[0] - f[0]) / (o[0] - f[0])
    spans_D = o[1] - f[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        found_D = np.where(spans_D > 0, (u[1] - f[1]) / spans_D, value)
    return value, found_D


def _edges(
    target: Sequence[Answers],
    kept: Sequence[int],
    groups: Sequence[str],
    u: Drawn,
    o: Drawn,
    floor: _Floor,
    confidence: float,
) -> tuple[float, float]:
    """Return R at Wilson's limits of the seeds' rates, or of an invented floor: the wider ones.

    The other arms are held at their estimates meanwhile.
    """
    f = floor.drawn[0]
    ends = [_wilson_rate(answers, kept, groups, confidence) for answers in target]
    lows, highs = ([(end[k] - f) / (o[0] - f) for end in ends] for k in (0, 1))
    at_floor = [(u[0] - x) / (o[0] - x) for x in floor.limits(confidence) if x < o[0]]
    found = [float(np.mean(lows)), float(np.mean(highs)), *at_floor]
    return min(found), max(found)


def _wilson_rate(
    answers: Answers, kept: Sequence[int], groups: Sequence[str], confidence: float
) -> tuple[float, float]:
    right = [int(float(answers[i] or 0.0) >= 0.5) for i in kept]
    _, low, high = clustered_rate(right, groups, confidence)
    rate = float(np.mean([float(answers[i] or 0.0) for i in kept]))
    return min(low, rate), max(high, rate)


def _widened(drawn: Drawn, low: float, high: float) -> Estimate:
    least, most = np.quantile(drawn[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(drawn[0], min(float(least), low), max(float(most), high))


def _scored_by_all(attacked: ArmAnswers, plain: ArmAnswers, groups: Sequence[str]) -> list[int]:
    lists: list[Answers] = []
    for arms in (attacked, plain):
        lists += [*arms.target, arms.original, *arms.placebo]
        lists += [] if arms.invented else [arms.floor]
        lists += [] if arms.placebo_floor is None else [arms.placebo_floor]
    return _scored_in_all(lists, groups, "questions")


def _scored_in_all(lists: Sequence[Answers], groups: Sequence[str], what: str) -> list[int]:
    lengths = {len(answers) for answers in lists} | {len(groups)}
    if len(lengths) != 1:
        raise DataError(f"the arms answered {sorted(lengths)} {what}: they must be the same ones")
    kept = [i for i in range(len(groups)) if all(a[i] is not None for a in lists)]
    if not kept:
        raise DataError(
            f"none of {len(groups)} {what} was scored on every arm: they are too long with this attack"
        )
    return kept
