"""`summary.json`: the published, versioned outcome of a run, as pydantic models.

The JSON schema of `Summary` is what scripts may rely on; `docs/summary.schema.json` is made from it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from palimpsest.types import Better

SCHEMA_VERSION = 1


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Paired(_Model):
    """A paired comparison of one row with the same items of another model.

    `gained` items are 1 here and 0 there, `lost` the other way round. `mcnemar_p` is the exact two-sided
    McNemar p-value over items; `p` is that of the exact sign-flip test over groups, which equals it where
    every item is a group of its own, and is the one to quote where items come in groups. `difference` is
    here minus there with a 95 % interval.
    """

    against: str
    n: int
    gained: int
    lost: int
    p: float
    mcnemar_p: float
    difference: float
    low: float
    high: float


class Row(_Model):
    """One metric of one model on one evaluation. `value` is None when nothing could be scored.

    `subset` is "" for all items, else a tag and its value (`in_forget_corpus=no`). `n` counts scored
    items, `unscored` the rest; `groups` the clusters. `note` carries what a reader has to know
    ("not understood", "below the floor").
    """

    model: str
    axis: str
    evaluation: str
    dataset: str
    transform: str
    channel: str
    split: str
    subset: str
    judge: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    unscored: int
    groups: int
    better: Better
    interval: str
    note: str = ""
    paired: Paired | None = None


class ModelInfo(_Model):
    """A model of the run. `role` is original, unlearned, control or other.

    For an unlearned model `steps` of `planned_steps` optimiser steps were done, and `stopped` says why
    training ended early, if it did.
    """

    name: str
    role: Literal["original", "unlearned", "control", "other"]
    source: str
    method: str | None = None
    options: dict[str, Any] = {}
    seed: int | None = None
    fingerprint: str = ""
    weights_sha256: str = ""
    chat_template: str = ""
    first_prompt: str = ""
    steps: int | None = None
    planned_steps: int | None = None
    stopped: str | None = None


class SampleRow(_Model):
    """One prompt and what every model answered: text, form and harm by the first judge."""

    evaluation: str
    dataset: str
    transform: str
    sample_id: str
    prompt: str
    answers: dict[str, dict[str, str]]


class LossCurve(_Model):
    """The named loss terms of a training job, by optimiser step; None where a step has no such term."""

    model: str
    steps: list[int]
    terms: dict[str, list[float | None]]


class JudgeAgreement(_Model):
    """Two judges on the same responses: Cohen's kappa with a bootstrap interval, and the 2x2 table."""

    judge: str
    reference: str
    aspect: str
    evaluation: str
    n: int
    kappa: float | None
    low: float | None
    high: float | None
    confusion: dict[str, int]


class Summary(_Model):
    """A run's outcome. `sandbox` true: shows the tool, is no evidence about real models.

    `judges` says in a sentence what each judge is.
    """

    schema_version: Literal[1] = 1
    palimpsest_version: str
    name: str
    sandbox: bool
    seed: int
    limit: int | None
    recipe: dict[str, Any]
    recipe_sha256: str
    versions: dict[str, str]
    models: list[ModelInfo]
    rows: list[Row]
    samples: list[SampleRow] = []
    losses: list[LossCurve] = []
    agreement: list[JudgeAgreement] = []
    judges: dict[str, str] = {}
    warnings: list[str] = []
