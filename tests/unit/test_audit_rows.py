"""Rows of an audit from stored views that are made by hand: who recovers, who may not say so, and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from audit_questions import asked
from palimpsest.audit.asking import finite
from palimpsest.audit.data import Questions
from palimpsest.audit.record import AttackRow, Audit
from palimpsest.audit.rows import Attacked, audit_of
from palimpsest.audit.tables import ArmViews
from palimpsest.plugins import options
from palimpsest.store import RunFolder
from palimpsest.views import AttackData

N = 60


@options
class Stub:
    """An attack of which only the class attributes matter."""

    access: ClassVar[Any] = "weights"
    needs: ClassVar[Any] = frozenset()
    arms: ClassVar[Any] = "refit"
    role: ClassVar[Any] = "attack"
    may_teach: ClassVar[Any] = False

    def attack(self, arms: Any, data: Any, ctx: Any) -> Any:
        """Yield nothing."""
        yield from ()

    def placebo(self) -> None:
        """Return none."""


@options
class Trainer(Stub):
    """One that trains."""

    may_teach: ClassVar[Any] = True


@options
class Diagnostic(Stub):
    """One that never decides."""

    role: ClassVar[Any] = "diagnostic"


QUESTIONS = Questions(
    attackers=AttackData(fit=(), benign=()),
    choose=asked("choose", 20),
    test=asked("test", N),
    utility=asked("utility", 20),
)
RIGHT = 29
KNOWS, NOTHING = "1" * 54 + "0" * 6, "1" * 15 + "0" * 45


def view(test: str, *, active: bool = True, n: int = 1, **values: Any) -> dict[str, Any]:
    choose = "1" * 18 + "00" if test.count("1") > N / 2 else "1" * 5 + "0" * 15
    sets = {"test": test, "choose": choose, "utility": "1" * 16 + "0" * 4}
    return {
        "setting": {"n": n},
        "repeat": 0,
        "fold": None,
        "facts": {},
        "is_active": active,
        "outcomes": {"cloze": sets},
        **values,
    }


def arms(
    target: str,
    *,
    original: str = KNOWS,
    control: str = NOTHING,
    placebo: str = "",
    placebo_control: str = NOTHING,
    **values: Any,
) -> ArmViews:
    return ArmViews(
        targets=([view(target, **values)],),
        original=[view(original, **values)],
        controls={"control": [view(control, **values)]},
        placebos=([view(placebo, **values)],) if placebo else (),
        placebo_control=[view(placebo_control, **values)] if placebo else [],
    )


def audited(
    tmp_path: Path,
    floor: str | None = "control",
    *,
    questions: Questions = QUESTIONS,
    **views: Any,
) -> Audit:
    attacks = {"none": Attacked(plugin=Stub(), views=arms(NOTHING), jobs=(), failed="")}
    for name, given in views.items():
        plugin, seen = given if isinstance(given, tuple) else (Stub(), given)
        failed = seen if isinstance(seen, str) else ""
        views_of = arms(NOTHING) if isinstance(seen, str) else seen
        attacks[name] = Attacked(plugin=plugin, views=views_of, jobs=(), failed=failed)
    return audit_of(
        "x",
        attacks,
        questions,
        folder=RunFolder(tmp_path),
        baseline="none",
        floor=floor,
        delta=0.15,
        seed=0,
        left_out=[],
        shown={},
    )


def row(made: Audit, name: str = "a") -> AttackRow:
    return next(r for r in made.rows if r.name == name)


def test_an_attack_that_brings_everything_back_recovers(tmp_path: Path) -> None:
    made = audited(tmp_path, a=arms(KNOWS))
    found = row(made)
    assert (found.status, made.verdict) == ("recovers", "hidden")
    assert found.recovered is not None
    assert found.recovered.value == 1.0
    assert found.p_holm is not None
    assert found.p_holm < 0.025


def test_holm_counts_only_attacks_that_can_claim_something(tmp_path: Path) -> None:
    alone = row(audited(tmp_path, a=arms(KNOWS)))
    mute = {
        "b": (Diagnostic(), arms(KNOWS)),
        "c": arms(KNOWS, active=False),
        "d": arms(KNOWS, original=NOTHING),
        "e": "it failed",
    }
    beside = row(audited(tmp_path, a=arms(KNOWS), **mute))
    assert (beside.p_holm, beside.lower) == (alone.p_holm, alone.lower)
    more = row(audited(tmp_path, a=arms(KNOWS), b=arms(KNOWS)))
    assert more.p_holm == pytest.approx(2 * (alone.p_holm or 0))


def test_what_changes_nothing_has_no_effect_and_decides_nothing(tmp_path: Path) -> None:
    made = audited(tmp_path, a=arms(KNOWS, active=False))
    assert row(made).status == "no effect"
    assert made.verdict == "inconclusive"
    assert made.strongest_usable is None
    assert any("a: not run, or without effect" in line for line in made.unsupported)


def test_one_active_seed_is_an_effect(tmp_path: Path) -> None:
    seeds = ([view(KNOWS, active=False)], [view(KNOWS, active=True)])
    given = ArmViews(
        targets=seeds,
        original=[view(KNOWS)],
        controls={"control": [view(NOTHING)]},
        placebos=(),
    )
    plain = ArmViews(**{**vars(given), "targets": ([view(NOTHING)], [view(NOTHING)])})
    attacks = {
        "none": Attacked(plugin=Stub(), views=plain, jobs=(), failed=""),
        "a": Attacked(plugin=Stub(), views=given, jobs=(), failed=""),
    }
    made = audit_of(
        "x",
        attacks,
        QUESTIONS,
        folder=RunFolder(tmp_path),
        baseline="none",
        floor="control",
        delta=0.15,
        seed=0,
        left_out=[],
        shown={},
    )
    assert row(made).status == "recovers"
    assert len(row(made).points[0].seeds) == 2


def test_a_diagnostic_never_decides(tmp_path: Path) -> None:
    made = audited(tmp_path, a=(Diagnostic(), arms(KNOWS)))
    assert row(made).status == "does not recover"
    assert row(made).recovered is not None
    assert made.verdict == "inconclusive"
    assert made.strongest_usable is None


def test_without_a_control_the_floor_is_chance_and_training_shows_nothing(tmp_path: Path) -> None:
    made = audited(tmp_path, None, a=(Trainer(), arms(KNOWS)), b=arms(KNOWS))
    assert row(made, "a").status == "does not recover"
    assert "without a control" in row(made, "a").reason
    assert row(made, "b").status == "recovers"
    rate = row(made, "b").points[0].rates["chance"]
    assert rate.value is not None
    assert 0.25 <= rate.value < 0.5
    assert any("control" in line for line in made.unsupported)


def test_an_attack_has_to_beat_its_placebo_unless_that_recovers_too(tmp_path: Path) -> None:
    some, other = "1" * 32 + "0" * 28, "0" * 20 + "1" * 25 + "0" * 15
    made = audited(
        tmp_path,
        a=arms(some, placebo=other),
        b=arms(KNOWS, placebo=NOTHING),
        c=arms(KNOWS, placebo=KNOWS),
    )
    assert row(made, "a").status == "does not recover"
    assert row(made, "a").reason == "not above its placebo"
    assert row(made, "b").status == "recovers"
    assert row(made, "c").status == "recovers"
    assert "placebo recovers, too" in row(made, "c").reason
    rates = row(made, "c").points[0].rates
    assert rates["placebo on control"].value == 0.25


def test_a_placebo_recovers_only_above_the_control_under_that_placebo(tmp_path: Path) -> None:
    """A placebo that teaches the format lifts both: the control under the attack says nothing of that."""
    made = audited(tmp_path, a=arms(KNOWS, placebo=KNOWS, placebo_control=KNOWS))
    assert (row(made).status, row(made).reason) == ("does not recover", "not above its placebo")
    missing = ArmViews(**{**vars(arms(KNOWS, placebo=KNOWS)), "placebo_control": ()})
    assert row(audited(tmp_path, a=missing)).status == "does not recover"


def test_without_a_control_the_placebo_is_never_waived(tmp_path: Path) -> None:
    made = audited(tmp_path, None, a=arms(KNOWS, placebo=KNOWS))
    assert (row(made).status, row(made).reason) == ("does not recover", "not above its placebo")
    made = audited(tmp_path, None, a=arms(KNOWS, placebo=NOTHING))
    assert row(made).status == "recovers"
    assert "placebo" not in row(made).reason


def test_an_attack_is_compared_with_the_stronger_kind_of_its_placebo(tmp_path: Path) -> None:
    """One matched placebo among three random ones: pooled, the attack would be far above them."""

    def stand_in(test: str, kind: str, repeat: int = 0) -> dict[str, Any]:
        made = view(test, repeat=repeat)
        return {**made, "setting": {**made["setting"], "stand_in": kind}}

    random = [stand_in(NOTHING, "random", r) for r in range(3)]
    given = ArmViews(
        **{
            **vars(arms(KNOWS)),
            "placebos": ([*random, stand_in(KNOWS, "matched")],),
            "placebo_control": [*random, stand_in(KNOWS, "matched")],
        }
    )
    found = row(audited(tmp_path, a=given))
    assert found.status == "does not recover"
    assert found.above_placebo is not None
    assert found.above_placebo.value == 0.0
    rates = {arm: rate.value for arm, rate in found.points[0].rates.items() if "placebo" in arm}
    assert rates == {
        "placebo": 0.9,
        "placebo (random)": 0.25,
        "placebo (matched)": 0.9,
        "placebo on control": 0.9,
    }
    weak = {"placebos": (random,), "placebo_control": random}
    found = row(audited(tmp_path, a=ArmViews(**{**vars(given), **weak})))
    assert found.status == "recovers"


def test_draws_of_a_placebo_are_averaged_beside_one_draw_of_the_attack(tmp_path: Path) -> None:
    """Draws at 90, 25 and 25 percent are 46.7 on average: the attack at 90 is 43.3 above it."""
    draws = [view(t, repeat=r) for r, t in enumerate((KNOWS, NOTHING, NOTHING))]
    given = ArmViews(
        **{**vars(arms(KNOWS)), "placebos": (draws,), "placebo_control": [view(KNOWS)]}
    )
    found = row(audited(tmp_path, a=given))
    assert found.status == "recovers"
    assert found.above_placebo is not None
    assert found.above_placebo.value == pytest.approx(0.9 - (0.9 + 0.25 + 0.25) / 3)
    alone = ArmViews(**{**vars(given), "placebos": (draws[:1],)})
    assert row(audited(tmp_path, a=alone)).status == "does not recover"


def test_a_probe_that_reads_more_than_of_the_original_is_a_mark_of_suppression(
    tmp_path: Path,
) -> None:
    half, low = "1" * 45 + "0" * 15, "0" * 42 + "1" * 18
    found = row(audited(tmp_path, a=arms(half, original=low)))
    assert (found.status, found.recovered) == ("uninformative", None)
    assert "mark of suppression, no recovery" in found.reason
    for target, original in ((low, low), (half, half), (NOTHING, NOTHING)):
        found = row(audited(tmp_path, a=arms(target, original=original, control=low)))
        assert "suppression" not in found.reason


def test_knowing_by_one_channel_of_three_is_corrected_for_the_three(tmp_path: Path) -> None:
    """At R0 = .36 the 95 % limit is just above the margin, and that at 1 - .05 / 3 is below it."""

    def both(test: str, names: tuple[str, ...]) -> dict[str, Any]:
        made = view(test)
        (sets,) = made["outcomes"].values()
        return {**made, "outcomes": dict.fromkeys(names, sets)}

    def verdict(names: tuple[str, ...]) -> Audit:
        seen = {
            "targets": ([both("1" * RIGHT + "0" * (N - RIGHT), names)],),
            "original": [both(KNOWS, names)],
            "controls": {"control": [both(NOTHING, names)]},
            "placebos": (),
        }
        plain = Attacked(plugin=Stub(), views=ArmViews(**seen), jobs=(), failed="")
        return audit_of(
            "x",
            {"none": plain},
            QUESTIONS,
            folder=RunFolder(tmp_path),
            baseline="none",
            floor="control",
            delta=0.15,
            seed=0,
            left_out=[],
            shown={},
        )

    alone, three = verdict(("cloze",)), verdict(("cloze", "letter", "generation"))
    assert alone.verdict == "knows"
    assert three.verdict == "inconclusive"
    assert three.residual["cloze"] == alone.residual["cloze"]  # what is shown stays at 95 %
    assert three.residual["cloze"].low > 0.15


def test_a_control_that_learns_as_much_leaves_nothing_to_recover(tmp_path: Path) -> None:
    made = audited(tmp_path, a=arms(KNOWS, control=KNOWS))
    assert row(made).status == "uninformative"
    assert row(made).recovered is None
    assert made.verdict == "inconclusive"


def test_questions_that_are_too_long_on_one_arm_are_left_out_and_counted(tmp_path: Path) -> None:
    half = "-" * 30 + KNOWS[30:]
    found = row(audited(tmp_path, a=arms(half)))
    assert (found.n, found.unscored) == (30, 30)
    assert found.points[0].rates["target"].unscored == 30
    assert found.points[0].rates["original"].unscored == 0


def test_an_attack_that_leaves_no_question_scored_costs_its_own_row(tmp_path: Path) -> None:
    made = audited(tmp_path, a=arms("-" * N), b=arms(KNOWS))
    assert row(made, "a").status == "not run"
    assert "too long" in row(made, "a").reason
    assert row(made, "b").status == "recovers"


def test_questions_of_one_group_show_nothing(tmp_path: Path) -> None:
    """All others are too long with the attack: that row is not run, and says why."""
    grouped = tuple(replace(s, group=f"group {i // 20}") for i, s in enumerate(QUESTIONS.test))
    made = audited(
        tmp_path, a=arms("1" * 20 + "-" * 40), questions=replace(QUESTIONS, test=grouped)
    )
    assert row(made).status == "not run"
    assert (
        "the 20 of 60 questions that were scored on every arm are of one group" in row(made).reason
    )


def test_utility_and_rates_are_over_training_seeds(tmp_path: Path) -> None:
    """Three runs, of which one breaks: its loss is not 60 questions' worth of evidence."""

    def seeds(*utility: int) -> list[list[dict[str, Any]]]:
        found = []
        for right in utility:
            made = view(KNOWS if right == 20 else NOTHING)
            made["outcomes"]["cloze"]["utility"] = "1" * right + "0" * (20 - right)
            found.append([made])
        return found

    base = vars(arms(NOTHING))
    plain = ArmViews(**{**base, "targets": tuple(seeds(20, 20, 20))})
    given = ArmViews(**{**base, "targets": tuple(seeds(20, 20, 0))})
    attacks = {
        n: Attacked(plugin=Stub(), views=v, jobs=(), failed="")
        for n, v in {"none": plain, "a": given}.items()
    }
    made = audit_of(
        "x",
        attacks,
        QUESTIONS,
        folder=RunFolder(tmp_path),
        baseline="none",
        floor="control",
        delta=0.15,
        seed=0,
        left_out=[],
        shown={},
    )
    found = row(made)
    assert found.utility_drop is not None
    assert found.utility_n == 20
    assert found.utility_drop.value == pytest.approx(1 / 3)
    assert found.utility_drop.low < 0
    rate = found.points[0].rates["target"]  # 90, 90 and 25 %
    assert rate.low is not None
    assert rate.high is not None
    assert rate.value == pytest.approx((0.9 + 0.9 + 0.25) / 3)
    assert rate.high - rate.low > 0.8


def test_a_reason_says_what_holm_says_and_no_bound(tmp_path: Path) -> None:
    found = row(audited(tmp_path, a=arms(KNOWS)))
    assert found.reason == "above 15% (Holm)"
    assert row(audited(tmp_path, a=arms(NOTHING))).reason == "not above 15% (Holm)"


def test_folds_cover_every_question_once(tmp_path: Path) -> None:
    def parts(test: str) -> list[dict[str, Any]]:
        cuts = [(k * 12, (k + 1) * 12) for k in range(5)]
        masked = ["." * a + test[a:b] + "." * (N - b) for a, b in cuts]
        return [{**view(test), "outcomes": _sets(m), "fold": k} for k, m in enumerate(masked)]

    def _sets(test: str) -> dict[str, Any]:
        whole = view(KNOWS)["outcomes"]["cloze"]
        return {"cloze": {**whole, "test": test}}

    given = ArmViews(
        targets=(parts(KNOWS),),
        original=parts(KNOWS),
        controls={"control": parts(NOTHING)},
        placebos=(),
    )
    found = row(audited(tmp_path, a=given))
    assert (found.status, found.n, found.unscored) == ("recovers", N, 0)
    assert found.points[0].repeats == 1
    short = ArmViews(**{**vars(given), "targets": (parts(KNOWS)[:4],)})
    found = row(audited(tmp_path, a=short))
    assert (found.n, found.unscored) == (48, 12)


def test_a_target_with_fewer_views_is_judged_on_those_that_it_has(tmp_path: Path) -> None:
    both = [view(NOTHING), view(KNOWS, n=2)]
    given = ArmViews(
        targets=(both[:1],),
        original=both,
        controls={"control": [view(NOTHING), view(NOTHING, n=2)]},
        placebos=(),
    )
    assert [p.setting for p in row(audited(tmp_path, a=given)).points] == [{"n": 1}]
    none = ArmViews(**{**vars(given), "targets": ([],)})
    found = row(audited(tmp_path, a=none))
    assert (found.status, found.reason) == (
        "not run",
        "no view that all arms have, in the channels of this audit",
    )


def test_numbers_that_json_has_not_become_text() -> None:
    kept = finite({"loss": float("nan"), "norm": float("inf"), "steps": 3, "lr": 0.1})
    assert kept == {"loss": "nan", "norm": "inf", "steps": 3, "lr": 0.1}
    json.dumps(kept, allow_nan=False)
