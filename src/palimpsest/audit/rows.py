"""From answers to an audit's rows and verdict: recoveries, Holm, placebo, utility, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from palimpsest.audit.claims import CHANCE, Found, Limit, holm_limits, judged, mute
from palimpsest.audit.data import Questions
from palimpsest.audit.floors import (
    INVENTED,
    ORIGINAL_INVENTED,
    floor_caveats,
    floor_text,
    floor_without_control,
    guessed,
    with_floor,
)
from palimpsest.audit.jobs import AttackJob, done_facts, stored_views
from palimpsest.audit.metering import Cost
from palimpsest.audit.rates import chance_floor, drop_of, interval_of, rate_of
from palimpsest.audit.recipe import ARMS
from palimpsest.audit.record import (
    AttackCost,
    AttackRow,
    Audit,
    Interval,
    Point,
    Rate,
    Spent,
)
from palimpsest.audit.recovery import Answers, ArmAnswers, Recovery, recovery
from palimpsest.audit.tables import (
    PLACEBO,
    PLACEBO_CONTROL,
    TARGET,
    ArmViews,
    Candidate,
    candidates,
    choice_value,
    chosen,
    mean_of,
)
from palimpsest.audit.verdict import ALPHA, Finding, cheapest, find, strongest_usable, unsupported
from palimpsest.errors import DataError
from palimpsest.plugins import option_values
from palimpsest.store import RunFolder
from palimpsest.types import Sample
from palimpsest.views import KnowledgeAttack


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """An attack of an audit and what is stored of it.

    `jobs` are those on the unlearned models. `failed` says why it could not be run; then there are no
    views.
    """

    plugin: KnowledgeAttack
    views: ArmViews
    jobs: tuple[AttackJob, ...]
    failed: str


def audit_of(
    label: str,
    attacks: Mapping[str, Attacked],
    questions: Questions,
    *,
    folder: RunFolder,
    baseline: str,
    floor: str | None,
    delta: float,
    seed: int,
    left_out: Sequence[str],
    shown: Mapping[str, Sequence[str]],
) -> Audit:
    """Return the verdict over an unlearned model's attacks.

    Args:
        label: the method.
        attacks: by name, with the baseline.
        questions: what was asked.
        folder: where the jobs are.
        baseline: name of the attack that is none.
        floor: name of the control model that is the floor; None = invented facts or, without those, chance.
        delta: margin.
        seed: of the resampling.
        left_out: attacks of the largest tier that did not run.
        shown: attack plugin -> hiding families that it recovered in calibration.
    """
    table = _Table(questions, floor or floor_without_control(questions), seed)
    plain = {c.channel: c for c in table.candidates(attacks[baseline].views)}
    without = table.without_attack(plain)
    residual = {c: interval_of(r.residual) for c, r in without.items() if r.residual is not None}
    tried = {n: table.found(a, plain, residual) for n, a in attacks.items() if n != baseline}
    found = {name: made for name, made in tried.items() if isinstance(made, Found)}
    limits = holm_limits(found, {n: a.plugin for n, a in attacks.items()}, table.floor, delta)
    rows = [
        _row(name, attacks[name], made, limits.get(name), plain, table, folder, delta, shown)
        for name, made in tried.items()
    ]
    finding, other = _verdicts(residual, rows, delta, without)
    caveats = floor_caveats(table.floor, questions, list(plain.values()))
    num_seeds = len(attacks[baseline].views.targets)
    best, cheap = strongest_usable(rows), cheapest(rows)
    return Audit(
        label=label,
        verdict=finding.verdict,
        with_original=other.verdict,
        reasons=finding.reasons,
        cheapest=cheap.name if cheap else None,
        strongest_usable=best.name if best else None,
        unsupported=unsupported(
            rows, verdict=finding.verdict, caveats=caveats, num_seeds=num_seeds, left_out=left_out
        ),
        floor=floor_text(table.floor, questions),
        residual=residual,
        plain=[table.point(c, is_chosen=False) for c in plain.values()],
        rows=rows,
        left_out=list(left_out),
        shown=[r.name for r in rows if r.is_shown],
    )


def _verdicts(
    residual: Mapping[str, Interval],
    rows: Sequence[AttackRow],
    delta: float,
    plain: Mapping[str, Recovery],
) -> tuple[Finding, Finding]:
    """Return the verdict against an attacker without, and one with, the original model.

    R0's lower limits are taken at a level that is divided by the number of channels.
    """
    limits = {c: plain[c].residual_lower(ALPHA / len(residual)) for c in residual}
    lower = {c: limit for c, limit in limits.items() if limit is not None}
    upper = {c: r.upper for c, r in plain.items() if r.upper is not None}
    without, with_it = (
        find(residual, rows, delta=delta, with_original=flag, upper=upper, lower=lower)
        for flag in (False, True)
    )
    return without, with_it


def candidates_of(views: ArmViews, questions: Questions, floor: str) -> list[Candidate]:
    """Return an attack's candidates, with the floor among their arms."""
    return with_floor(candidates(views), questions, floor)


@dataclass(frozen=True)
class _Table:
    """The questions of an audit and how its answers become numbers."""

    questions: Questions
    floor: str
    seed: int

    def candidates(self, views: ArmViews) -> list[Candidate]:
        """Return an attack's candidates, with the floor among their arms."""
        return candidates_of(views, self.questions, self.floor)

    def found(
        self,
        attacked: Attacked,
        plain: Mapping[str, Candidate],
        residual: Mapping[str, Interval],
    ) -> Found | str:
        """Return what an attack recovers at its chosen view; or why there is nothing to say.

        It is compared with the same channel without any attack; where that one says nothing (a probe has
        none, or the original fails in it), with the channel of the largest R0.
        """
        if attacked.failed:
            return attacked.failed
        every = self.candidates(attacked.views)
        if not every:
            return "no view that all arms have, in the channels of this audit"
        pick = chosen(every, floor=self.floor)
        largest = max(residual, key=lambda c: residual[c].value, default=next(iter(plain)))
        like = plain[pick.channel if pick.channel in residual else largest]
        try:
            return Found(all=every, pick=pick, recovered=self.recovery(pick, like))
        except DataError as error:  # every question is too long with it, say
            return str(error)

    def recovery(self, attacked: Candidate, plain: Candidate) -> Recovery:
        """Return what a candidate recovers, compared with the baseline."""
        return recovery(
            self._arms(attacked),
            self._arms(plain),
            [s.group for s in self.questions.test],
            invented_groups=[s.group for s in self.questions.invented],
            seed=self.seed,
        )

    def without_attack(self, plain: Mapping[str, Candidate]) -> dict[str, Recovery]:
        """Return what the models do by themselves; channels with too few answers are left out.

        Raises:
            DataError: there is no other.
        """
        found: dict[str, Recovery] = {}
        why = "there is no channel"
        for channel, candidate in plain.items():
            try:
                found[channel] = self.recovery(candidate, candidate)
            except DataError as error:
                why = f"{channel}: {error}"
        if not found:
            raise DataError(f"without any attack no channel can be compared: {why}")
        return found

    @cached_property
    def best_rule(self) -> float:
        """What the best rule without a model gets of the scored questions."""
        return chance_floor(self.questions.test)[0] or 0.0

    def _arms(self, candidate: Candidate) -> ArmAnswers:
        def of(arm: str, asked: str = "test") -> tuple[Answers, ...]:
            return candidate.answers.get(arm, {}).get(asked, ())

        targets = of(TARGET)
        placebo = of(PLACEBO) if len(of(PLACEBO)) == len(targets) else ()
        if self.floor == INVENTED:
            return ArmAnswers(
                target=targets,
                original=of("original")[0],
                placebo=placebo,
                invented=of(INVENTED),
                placebo_invented=of(PLACEBO, "invented") if placebo else (),
                guessed=guessed(candidate, TARGET, self.best_rule, self.questions),
                placebo_guessed=guessed(candidate, PLACEBO, self.best_rule, self.questions)
                if placebo
                else (),
            )
        # what is no control model has not met the placebo: then the floor under the attack stands for it
        under = of(self.floor) if self.floor in ARMS else of(PLACEBO_CONTROL)
        return ArmAnswers(
            target=targets,
            original=of("original")[0],
            floor=of(self.floor)[0],
            is_floor_known=self.floor == CHANCE,
            placebo=placebo,
            placebo_floor=under[0] if under and placebo else None,
        )

    def point(self, candidate: Candidate, *, is_chosen: bool) -> Point:
        """Return a candidate for the record."""
        others = dict.fromkeys((INVENTED, ORIGINAL_INVENTED), self.questions.invented)

        def rates(name: str, samples: Sequence[Sample]) -> dict[str, Rate]:
            return {
                arm: rate_of(sets[name], others.get(arm, samples), seed=self.seed)
                for arm, sets in candidate.answers.items()
                if name in sets
            }

        return Point(
            setting=dict(candidate.setting),
            channel=candidate.channel,
            repeats=candidate.repeats,
            rates=rates("test", self.questions.test),
            seeds=[mean_of(a) for a in candidate.answers[TARGET]["test"]],
            utility=rates("utility", self.questions.utility),
            coverage=rates("coverage", self.questions.test),
            choose=choice_value(candidate, floor=self.floor),
            is_chosen=is_chosen,
            facts=dict(candidate.facts),
        )

    def utility_drop(
        self, found: Found, plain: Mapping[str, Candidate]
    ) -> tuple[Interval | None, int]:
        """Return the target's accuracy on utility questions without the attack minus with it, and n."""
        pick = next(
            (
                c
                for c in (found.pick, *found.all)
                if c.setting == found.pick.setting and "utility" in c.answers[TARGET]
            ),
            None,
        )
        if pick is None or pick.channel not in plain:
            return None, 0
        return drop_of(
            plain[pick.channel].answers[TARGET]["utility"],
            pick.answers[TARGET]["utility"],
            self.questions.utility,
            seed=self.seed,
        )


def _row(
    name: str,
    attacked: Attacked,
    found: Found | str,
    limit: Limit | None,
    plain: Mapping[str, Candidate],
    table: _Table,
    folder: RunFolder,
    delta: float,
    shown: Mapping[str, Sequence[str]],
) -> AttackRow:
    plugin = attacked.plugin
    use = type(plugin).__module__.rsplit(".", 1)[-1]
    facts: dict[str, Any] = {
        "name": name,
        "attack": use,
        "options": option_values(plugin),
        "role": plugin.role,
        "access": plugin.access,
        "needs": sorted(plugin.needs),
        "arms": plugin.arms,
        "is_shown": bool(shown.get(use)),
    }
    if isinstance(found, str):
        return AttackRow(**facts, status="not run", reason=found)
    made = found.recovered
    drop, utility_n = table.utility_drop(found, plain)
    status, reason = mute(plugin, found, table.floor) or judged(
        made, limit, delta, has_control=table.floor not in ARMS
    )
    return AttackRow(
        **facts,
        status=status,
        reason=reason,
        channel=found.pick.channel,
        setting=dict(found.pick.setting),
        n=made.n,
        groups=made.groups,
        unscored=made.unscored,
        residual=interval_of(made.residual),
        recovered=interval_of(made.recovered),
        gain=interval_of(made.gain),
        lower=limit.lower if limit else None,
        upper=made.upper,
        p_holm=limit.p if limit else None,
        ceiling=interval_of(made.ceiling),
        above_floor=interval_of(made.above_floor),
        above_placebo=interval_of(made.above_placebo),
        placebo_above_floor=interval_of(made.placebo_above_floor),
        is_below_floor=made.above_floor.high < 0,
        utility_drop=drop,
        utility_n=utility_n,
        cost=_cost(attacked.jobs, found.pick, folder),
        points=[table.point(c, is_chosen=c is found.pick) for c in found.all],
    )


def _cost(jobs: Sequence[AttackJob], pick: Candidate, folder: RunFolder) -> AttackCost | None:
    """Return the cost on the first unlearned model: of the chosen view (of its first repeat, or fold)."""
    if not jobs:
        return None
    views = [v for v in stored_views(folder, jobs[0]) if v["model"] == jobs[0].built_on]
    until = next(
        i
        for i, v in enumerate(views)
        if v["setting"] == pick.setting and pick.channel in v["asked"]
    )
    made = sum((Cost(**v["cost"]) for v in views[: until + 1]), Cost())
    done = done_facts(folder, jobs[0])
    return AttackCost(
        make=Spent(**asdict(made)),
        ask=Spent(**views[until]["asked"][pick.channel]),
        total_seconds=sum(v["cost"]["seconds"] + v["scoring"]["seconds"] for v in views),
        peak_bytes=done.get("process_bytes"),
        device_bytes=done.get("device_bytes"),
    )
