"""`audit.json`: the published, versioned outcome of an audit, as pydantic models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Verdict = Literal["knows", "hidden", "erased at this budget", "inconclusive"]
Status = Literal["recovers", "does not recover", "uninformative", "no effect", "not run"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Interval(_Model):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def percent(interval: Interval | None) -> str:
    """Return a share and its interval in percent; `-` for none."""
    if interval is None:
        return "-"
    return f"{100 * interval.value:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


class Rate(_Model):
    """Accuracy of one arm: mean over training seeds and repetitions; the interval counts groups.

    `n` questions were scored, `unscored` were not (too long for the context).
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int


class Point(_Model):
    """One view of an attack in one channel: accuracy of every arm on the scored questions.

    `rates`: arm -> rate; the arms are `target`, `original`, the controls by name, `placebo` (of several
    kinds the strongest; each under its name) and `placebo on control`; without
    a control `chance`, or `invented facts` (the target on them) and `original on invented facts`.
    `seeds`: accuracy of the target of each training seed. `utility`: arm -> accuracy on utility questions;
    `coverage`: arm -> share of answers that are one of the letters (generation alone).
    `choose`: the target above the floor on attack-dev; `is_chosen`: whether that is the attack's largest.
    """

    setting: dict[str, str | int | float | bool]
    channel: str
    repeats: int
    rates: dict[str, Rate]
    seeds: list[float | None]
    utility: dict[str, Rate]
    coverage: dict[str, Rate]
    choose: float | None
    is_chosen: bool
    facts: dict[str, str | int | float | bool]


class Spent(_Model):
    """Wall-clock seconds, rows of forward passes, their tokens (with padding), FLOPs (estimated).

    `is_partial`: what a kill left of them could not be read whole; they are a lower bound.
    """

    seconds: float
    queries: int
    tokens: int
    flops: float
    is_partial: bool = False


class AttackCost(_Model):
    """What an attack cost on one target.

    `make`: all its own work from its start to its chosen view, that for earlier settings included; what a
    kill made it do again counts. `ask`: asking the scored questions once under that view, in the chosen
    channel; of an attack in folds, one fold's. `total_seconds` is that of all its views, all questions and
    channels. `peak_bytes`: most memory of the process that finished the job, libraries included;
    `device_bytes`: most that was allocated on the accelerator. None where there is none, or it is unknown.
    """

    make: Spent
    ask: Spent
    total_seconds: float
    peak_bytes: int | None
    device_bytes: int | None


class AttackRow(_Model):
    """An attack, at the setting and in the channel that attack-dev chose.

    `residual` R0, `recovered` R and `gain` are None where the attack is uninformative; then `above_floor`
    says all there is. `p_holm` is the p of "min(R, gain) is at most delta", adjusted by Holm; `lower` the
    lower limit at the level that Holm's procedure leaves to this attack (alpha over the number of attacks
    whose p is not smaller): it decides, and is no simultaneous bound over all attacks. `upper` is
    the upper end of R's 90 % interval, which "erased" compares with delta. `placebo_above_floor`
    is the target minus the control, both under the placebo; without a control, minus the floor.
    `utility_drop` is the target's accuracy on utility questions without the attack minus that with it,
    over `utility_n` questions.
    """

    name: str
    attack: str
    options: dict[str, Any]
    role: Literal["attack", "diagnostic"]
    access: Literal["prompts", "weights"]
    needs: list[str]
    arms: Literal["refit", "transfer"]
    status: Status
    reason: str
    channel: str = ""
    setting: dict[str, str | int | float | bool] = {}
    n: int = 0
    groups: int = 0
    unscored: int = 0
    residual: Interval | None = None
    recovered: Interval | None = None
    gain: Interval | None = None
    lower: float | None = None
    upper: float | None = None
    p_holm: float | None = None
    ceiling: Interval | None = None
    above_floor: Interval | None = None
    above_placebo: Interval | None = None
    placebo_above_floor: Interval | None = None
    is_below_floor: bool = False
    utility_drop: Interval | None = None
    utility_n: int = 0
    is_shown: bool
    cost: AttackCost | None = None
    points: list[Point] = []


class AuditedModel(_Model):
    """A model of the audit; the hash is that of the weights that were attacked and scored."""

    name: str
    role: Literal["target", "original", "control"]
    source: str
    revision: str | None
    weights_sha256: str


class NetworkVerdict(_Model):
    """The verdict on one training seed's network alone, and the attacks that recover it.

    It draws groups of questions and no seeds: it says something of this network, and nothing of what the
    method makes of another seed.
    """

    name: str
    verdict: Verdict
    recovering: list[str]


class Audit(_Model):
    """One verdict: an unlearned model (or its training seeds) against the original and the control.

    `cheapest`: the recovering attack of fewest FLOPs, made and asked. `strongest_usable`: the attack with
    the largest R among those that cost less than 10 points of utility. `unsupported`: claims that this
    evidence does not carry. `floor`: what it was, in words. `plain`: the arms without any attack.
    `left_out`: attacks that the tier leaves out. `shown`: attacks of this audit that `audit calibrate`
    showed to recover hiders by construction. `networks`: where there are several training seeds, each by
    itself.
    """

    label: str
    verdict: Verdict
    with_original: Verdict
    reasons: list[str]
    cheapest: str | None
    strongest_usable: str | None
    unsupported: list[str]
    floor: str = ""
    residual: dict[str, Interval]
    plain: list[Point]
    rows: list[AttackRow]
    left_out: list[str]
    shown: list[str]
    networks: list[NetworkVerdict] = []


class TransferCell(_Model):
    """Models asked with prompts that were fitted on another (or the same) unlearned model.

    `column`: a method, the original or a control. `kind`: `own` = each network with its own prompt;
    `other seeds` = each network with those of the method's other training seeds. `pairs` = how many
    (prompt, network) were averaged. `rate`: accuracy on the scored questions that all pairs answered;
    `plain`: the same networks and questions without any attack; `change` = rate - plain, in pairs.
    `above_placebo`: rate minus that under the networks' own placebo of the attack, where it has one.
    `recovered`: R, by the original and the control under the same prompts; None where uninformative,
    without a control, and for the original and the controls.
    """

    column: str
    kind: Literal["own", "other seeds", "other method", "original", "control"]
    pairs: int
    rate: Rate
    plain: Rate
    change: Interval | None
    above_placebo: Interval | None
    recovered: Interval | None


class TransferRow(_Model):
    """What prompts that were fitted on one method do to every model.

    `setting`: chosen on attack-dev, by the method that they were fitted on, among those of this channel;
    `is_chosen`: whether attack-dev chose this channel for the verdict, too. `reason`: why there is none.
    """

    fitted_on: str
    seeds: int
    setting: dict[str, str | int | float | bool]
    is_chosen: bool
    cells: list[TransferCell]
    reason: str


class TransferMatrix(_Model):
    """Of one attack in one channel: fitted on (rows) by asked (cells). It has no part in any verdict."""

    attack: str
    channel: str
    rows: list[TransferRow]


class AuditReport(_Model):
    """All verdicts of one command; `transfer` is empty without `audit.transfer_matrix`."""

    schema_version: Literal[1] = 1
    name: str
    is_sandbox: bool
    tier: str
    delta: float
    seed: int
    models: list[AuditedModel]
    questions: dict[str, int]
    question_set: str
    utility_set: str
    audits: list[Audit]
    transfer: list[TransferMatrix] = []
    recipe: dict[str, Any]
    versions: dict[str, str]
    failed: dict[str, str]
