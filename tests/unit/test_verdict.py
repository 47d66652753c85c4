"""The four verdicts, from rows that are made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from palimpsest.audit.record import AttackCost, AttackRow, Interval, Spent
from palimpsest.audit.verdict import cheapest, find, strongest_usable, unsupported

LOW = {"letter": Interval(value=0.02, low=-0.05, high=0.09)}


def row(name: str, said: str, **values: Any) -> AttackRow:
    facts: dict[str, Any] = {
        "name": name,
        "attack": name,
        "options": {},
        "role": "attack",
        "access": "weights",
        "needs": [],
        "arms": "refit",
        "reason": "lower limit 50% (Holm)",
        "is_shown": True,
        "recovered": Interval(value=0.6, low=0.5, high=0.7),
        "upper": 0.69,
    }
    return AttackRow(**{**facts, "status": said, **values})


def quiet(name: str, **values: Any) -> AttackRow:
    small = {"recovered": Interval(value=0.0, low=-0.1, high=0.1), "upper": 0.09}
    return row(name, "does not recover", **{**small, **values})


def verdict(rows: list[AttackRow], residual: Any = LOW, *, with_original: bool = False) -> str:
    return find(residual, rows, delta=0.15, with_original=with_original).verdict


def test_knows_comes_before_everything() -> None:
    known = {"letter": Interval(value=0.5, low=0.2, high=0.8)}
    assert verdict([row("relearning", "recovers")], known) == "knows"
    edge = {"letter": Interval(value=0.3, low=0.15, high=0.45)}
    assert verdict([quiet("lens")], edge) != "knows"


def test_hidden_needs_one_attack_and_no_diagnostic() -> None:
    assert verdict([quiet("lens"), row("relearning", "recovers")]) == "hidden"
    diagnostic = row("interpolation", "recovers", role="diagnostic")
    assert verdict([quiet("lens"), diagnostic]) == "erased at this budget"


def test_attacks_with_the_original_are_another_verdict() -> None:
    rows = [quiet("lens"), row("enhanced_gcg", "recovers", needs=["original"])]
    assert verdict(rows) == "erased at this budget"
    assert verdict(rows, with_original=True) == "hidden"


def test_erased_needs_every_upper_limit_and_an_attack_with_power() -> None:
    assert verdict([quiet("lens"), quiet("relearning", upper=0.2)]) == "inconclusive"
    assert verdict([quiet("lens", is_shown=False)]) == "inconclusive"
    assert verdict([quiet("lens"), quiet("filler", is_shown=False)]) == "erased at this budget"


@pytest.mark.parametrize("rows", [[], [quiet("lens")]])
def test_nothing_run_is_inconclusive(rows: list[AttackRow]) -> None:
    made = find(
        LOW,
        [r.model_copy(update={"status": "not run"}) for r in rows],
        delta=0.15,
        with_original=False,
    )
    assert made.verdict == "inconclusive"
    assert made.reasons == ["no attack that counts was run"]


def test_uninformative_attacks_do_not_erase() -> None:
    silent = row("noise", "uninformative", recovered=None, upper=None)
    assert verdict([silent]) == "inconclusive"


def test_cheapest_and_strongest_within_the_utility_budget() -> None:
    def cost(flops: float, asking: float = 1e9) -> AttackCost:
        spent = Spent(seconds=1, queries=1, tokens=1, flops=flops)
        asked = Spent(seconds=1, queries=1, tokens=1, flops=asking)
        return AttackCost(
            make=spent, ask=asked, total_seconds=1, peak_bytes=None, device_bytes=None
        )

    strong = row(
        "relearning",
        "recovers",
        recovered=Interval(value=0.9, low=0.8, high=1.0),
        utility_drop=Interval(value=0.3, low=0.2, high=0.4),
        cost=cost(1e12),
    )
    kept = Interval(value=0.02, low=0.0, high=0.04)
    cheap = row("lens", "recovers", utility_drop=kept, cost=cost(0.0))
    unknown = row("probe", "recovers", recovered=strong.recovered, utility_drop=None)
    assert cheapest([strong, cheap]) is cheap
    by_question = row("embedding_attack", "recovers", utility_drop=kept, cost=cost(0.0, 1e13))
    assert cheapest([by_question, strong]) is strong
    assert strongest_usable([strong, cheap, unknown]) is cheap


def test_claims_that_are_not_supported_are_named() -> None:
    lines = unsupported(
        [row("noise", "uninformative", recovered=None)],
        verdict="erased at this budget",
        caveats=["That training recovers knowledge: no control."],
        num_seeds=1,
        left_out=["enhanced_gcg"],
    )
    text = " ".join(lines)
    for word in ("gone", "enhanced_gcg", "control", "1 training seed", "noise"):
        assert word in text


def test_erased_needs_a_small_residual_and_no_avoided_answers() -> None:
    wide = {"letter": Interval(value=0.1, low=0.0, high=0.3)}
    assert verdict([quiet("lens")], wide) == "inconclusive"
    made = find(wide, [quiet("lens")], delta=0.15, with_original=False, upper={"letter": 0.14})
    assert made.verdict == "erased at this budget"
    assert verdict([quiet("lens")], {}) == "inconclusive"
    avoids = {"recovered": Interval(value=-0.6, low=-0.8, high=-0.4), "upper": -0.4}
    assert verdict([quiet("lens", **avoids)]) == "inconclusive"
    below = {"letter": Interval(value=-0.3, low=-0.4, high=-0.2)}
    assert verdict([quiet("lens")], below) == "inconclusive"
