"""Fine-tuning a copy of a model, looked at while it goes on; shared by the training attacks in this folder.

Training happens when a view is applied: a view that nobody applies costs nothing, so an audit that was
killed trains again only what it has not scored, and gets the same weights bit for bit (same machine,
versions, threads).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from palimpsest.adapters import ADAPTER
from palimpsest.attacks.whitebox._noise import require_plain, with_noise
from palimpsest.batches import Batch, Corpora, Corpus
from palimpsest.chat import Encoded, encode_example, text_ids
from palimpsest.errors import DataError, UsageError
from palimpsest.forward import forward_logits, memory_errors
from palimpsest.losses import cross_entropy_sum
from palimpsest.model import LM
from palimpsest.parts import plain_model
from palimpsest.plugins import options
from palimpsest.scope import linear_names, open_scope
from palimpsest.seeds import derive_seed
from palimpsest.train import FitOptions, Rate, Term, fit_steps
from palimpsest.types import RunContext, Sample, TrainScope
from palimpsest.views import PLACEBO_DRAWS, View

if TYPE_CHECKING:
    from palimpsest.train import FitLog

Scope = Literal["lora", "all"]
Change = Literal["trained", "noise"]
RANK, ALPHA = 128, 16.0


@options
class TuneOptions(FitOptions):
    """How an attack trains. Defaults: Łucki et al. 2409.18025, appendix on fine-tuning (AdamW, LoRA)."""

    epochs: Annotated[Annotated[float, Field(gt=0)] | None, Field(validate_default=True)] = 3.0
    """Passes over the drawn documents."""
    lr: Rate = 2e-4
    """Peak learning rate."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Documents per forward pass."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the learning rate rises linearly from 0; 0 = none."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled decay, of matrices only; 0 = none."""
    max_length: Annotated[int, Field(ge=2)] | None = 1024
    """Texts are cut off after so many tokens, and after the model's context where that is shorter; a
    question that is longer is an error. None given = the context."""
    scope: tuple[Scope, ...] = ("lora",)
    """`lora` on all linear layers, `all` = full fine-tuning; each is a run of its own."""
    rank: Annotated[int, Field(ge=1)] = RANK
    """LoRA rank; that of a smaller model is bounded by its narrowest layer, at the same alpha / rank."""
    alpha: Annotated[float, Field(gt=0)] = ALPHA
    """LoRA scale: the adapter's product counts alpha / rank times."""
    lrs: tuple[Rate, ...] = ()
    """Several peak learning rates, each a run of its own, instead of `lr`; empty = `lr` alone."""
    views_at: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Steps at which the model is looked at, all in one run; empty = at the end."""

    def __post_init__(self) -> None:
        """Refuse what has no effect."""
        if not self.scope:
            raise UsageError("fit.scope is empty; give lora, all or both")
        if "lora" not in self.scope and (self.rank, self.alpha) != (RANK, ALPHA):
            raise UsageError("fit.rank and fit.alpha have no effect without scope lora")
        if self.lrs and self.lr != type(self).lr:
            raise UsageError("fit.lr has no effect beside fit.lrs; remove one of them")

    @property
    def rates(self) -> tuple[float, ...]:
        """Return the peak learning rates."""
        return self.lrs or (self.lr,)

    def views_of(self, num_documents: int, what: str) -> list[int]:
        """Return the steps at which a run is looked at.

        Raises:
            UsageError: a step is beyond the run's end, or the run has none.
        """
        total = self.num_steps(num_documents)
        if total < 1:
            raise UsageError(f"{what}: fit.steps = 0 trains nothing; give at least 1")
        late = [step for step in self.views_at if step > total]
        if late:
            raise UsageError(
                f"{what}: fit.views_at = {late[0]} is beyond its end, step {total}; give fit.steps = "
                f"{max(late)}, or look earlier"
            )
        return sorted(set(self.views_at)) or [total]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Training runs on the same documents: one per scope and learning rate.

    Attributes:
        documents: samples with targets (`encode_example`); more of them than one means random order.
        fit: how to train. seed: of order and adapters.
        setting, repeat, fold: of the views; scope, lr and step join the setting.
        facts: what is recorded of the data.
        change: `noise` shows, instead of the trained model, the arm's own with noise of the norm of
            training's change in every weight, `draws` times.
        progress: called as progress(done, total, text).
    """

    documents: tuple[Sample, ...]
    fit: TuneOptions
    seed: int
    setting: Mapping[str, Any]
    repeat: int = 0
    fold: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    change: Change = "trained"
    draws: int = 1
    progress: Callable[[int, int, str], None] = lambda done, total, text: None

    @property
    def steps(self) -> list[int]:
        """Return the steps at which views are made; UsageError as in `TuneOptions.views_of`."""
        named = ", ".join(f"{k} = {v}" for k, v in self.setting.items())
        return self.fit.views_of(
            len(self.documents), f"training ({named})" if named else "training"
        )

    def views(self, target: LM) -> Iterator[View]:
        """Yield the views of all runs on copies of a model; they are applied in order, or not at all."""
        for scope in self.fit.scope:
            for lr in self.fit.rates:
                run = _Run(self, target, scope, lr)
                with closing(run):
                    for step, draw in product(self.steps, range(self.draws)):
                        facts = {**self.facts}
                        yield View(
                            setting={**self.setting, "scope": scope, "lr": lr, "step": step},
                            repeat=self.repeat * self.draws + draw,
                            apply=partial(run.apply, step, draw, facts),
                            fold=self.fold,
                            facts=facts,
                        )


def noise_draws(change: Change, repeats: int) -> int:
    """Return how often noise is drawn per training, so that a placebo has 3 draws or more in all."""
    return math.ceil(PLACEBO_DRAWS / repeats) if change == "noise" else 1


def all_views(tunings: Sequence[Tuning], target: LM, *, what: str) -> Iterator[View]:
    """Yield the views of all tunings; whatever can be wrong with one is raised before the first trains.

    Raises:
        DataError: a question does not fit the context.
        UsageError: a step to look at is beyond its run's end, or noise is asked for on quantised weights.
    """
    for tuning in tunings:
        _ = tuning.steps
        if tuning.change == "noise":
            require_plain(target, f"{what}'s placebo")
        encoded(target, tuning.documents, max_length=tuning.fit.max_length)
    for tuning in tunings:
        yield from tuning.views(target)


def encoded(lm: LM, documents: Sequence[Sample], *, max_length: int | None) -> tuple[Corpus, int]:
    """Return documents tokenised, and how many texts were cut off.

    Raises:
        DataError: no documents, one without a target, or a prompt with an answer that is too long.
    """
    if not documents:
        raise DataError("there is nothing to train on: the data is empty")
    limits = [n for n in (max_length, lm.max_length) if n]
    limit = min(limits) if limits else None
    ids, masks, num_cut = [], [], 0
    for sample in documents:
        is_text = sample.task == "perplexity"
        made = _example(lm, sample, None if is_text else limit)
        num_cut += limit is not None and len(made.ids) > limit
        ids.append(made.ids[:limit])
        masks.append(made.mask[:limit])
    digest = hashlib.sha256(repr((ids, masks)).encode()).hexdigest()
    return Corpus("forget", tuple(ids), tuple(masks), digest), num_cut


def _example(lm: LM, sample: Sample, limit: int | None) -> Encoded:
    """Return a sample as tokens and targets.

    Those of a raw document are what the scorer scores: all tokens behind the prompt's own, also that of
    the space before the answer where it is one of its own.
    """
    if not sample.is_raw or sample.task != "generate":
        return encode_example(lm.tokenizer, sample, max_length=limit)
    prompt = "\n\n".join(m.content for m in sample.messages)
    ids = text_ids(lm.tokenizer, f"{prompt} {sample.answer}")
    before = text_ids(lm.tokenizer, prompt)
    start = next(
        (i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(before)
    )
    if limit is not None and len(ids) > limit:
        raise DataError(
            f"question {sample.id!r} has {len(ids)} tokens with its answer, the limit is {limit}; leave it "
            "out, or raise fit.max_length if the model's context allows it"
        )
    return Encoded(tuple(ids), tuple(i >= start for i in range(len(ids))))


def adapter_scope(lm: LM, fit: TuneOptions, kind: Scope) -> TrainScope:
    """Return what trains; a LoRA rank is bounded by the narrowest layer, alpha / rank stays."""
    if kind == "all":
        return TrainScope(kind="all")
    model = plain_model(lm.model)
    layers: list[Any] = [model.get_submodule(name) for name in linear_names(model)]
    sizes = [
        (m.nx, m.nf) if type(m).__name__ == "Conv1D" else (m.in_features, m.out_features)
        for m in layers
    ]
    rank = min([fit.rank, *map(min, sizes)])
    return TrainScope(kind="lora", rank=rank, alpha=fit.alpha * rank / fit.rank)


class _Run:
    """One training run on a copy of a model, done as far as the views so far needed it."""

    def __init__(self, tuning: Tuning, target: LM, kind: Scope, lr: float) -> None:
        self.tuning, self.target = tuning, target
        self.kind: Scope = kind
        self.settings = replace(tuning.fit, lr=lr, lrs=())
        self.lm: LM | None = None
        self.log: FitLog | None = None
        self.num_cut = 0
        self.training = self._train()

    def close(self) -> None:
        """Let go of the copy."""
        self.training.close()
        self.lm = None

    @contextmanager
    def apply(self, step: int, draw: int, facts: dict[str, Any], lm: LM) -> Iterator[LM]:
        """Train up to a step, and give the model as it is there, or a draw of noise of that size."""
        if lm.model is not self.target.model:
            raise UsageError("this view belongs to the model that the attack was run on")
        while self.log is None or self.log.steps < step:
            self.log = next(self.training)
        assert self.lm is not None
        assert self.log.steps == step
        facts["loss"] = self.log.terms["answer"]
        norms = change_norms(self.lm, self.target)
        if not self.target.quantization:
            facts["relative_change"] = math.hypot(*norms.values()) / _norm(self.target)
        if self.num_cut:
            facts["cut_texts"] = self.num_cut
        if self.tuning.change == "trained":
            yield self.lm
            return
        seed = derive_seed(self.tuning.seed, "placebo", self.kind, self.settings.lr, step, draw)
        with with_noise(lm, norms, {}, seed=seed) as noisy:
            yield noisy

    def _train(self) -> Generator[FitLog, None, None]:
        target, tuning = self.target, self.tuning
        corpus, self.num_cut = encoded(
            target, tuning.documents, max_length=self.settings.max_length
        )
        scope = adapter_scope(target, self.settings, self.kind)
        ctx = RunContext(seed=tuning.seed, scope=scope, progress=tuning.progress)
        with memory_errors("copying the model"):
            copied = target.copy()
        with open_scope(copied, ctx) as trained:
            self.lm = LM(trained.model, target.tokenizer, name=target.name)

            def loss(batch: Batch) -> dict[str, Term]:
                part = batch.forget
                logits_NV = forward_logits(trained.model, part)
                total = cross_entropy_sum(logits_NV, part.ids_BT, part.targets_BT)
                return {"answer": Term(total, "forget.targets")}

            yield from fit_steps(
                trained,
                loss,
                Corpora(corpus, None),
                self.settings,
                ctx,
                fingerprint="",  # nothing is stored
                pauses=tuning.steps,
            )


@torch.no_grad()
def change_norms(tuned: LM, start: LM) -> dict[str, float]:
    """Return the Frobenius norm of what training changed in each weight of the start model, by name."""
    if tuned.model is not plain_model(tuned.model):
        return {
            name.removeprefix("base_model.model.") + ".weight": float(
                module.get_delta_weight(ADAPTER).float().norm()
            )
            for name, module in tuned.model.named_modules()
            if hasattr(module, "get_delta_weight")
        }
    before = _floats(start)
    return {
        name: float((parameter.float() - before[name].float()).norm())
        for name, parameter in _floats(tuned).items()
    }


@torch.no_grad()
def _norm(lm: LM) -> float:
    return math.hypot(*(float(p.float().norm()) for p in _floats(lm).values()))


def _floats(lm: LM) -> dict[str, torch.Tensor]:
    named = plain_model(lm.model).named_parameters()
    return {name: p for name, p in named if p.is_floating_point()}
