"""Train a sandbox checkpoint from a seed: a gated curriculum, then safety tuning.

What makes it work on one CPU thread is described, with what did not work, in docs/sandbox.md.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from palimpsest.errors import GateError, UsageError, did_you_mean
from palimpsest.model import load_model
from palimpsest.sandbox import NAMES
from palimpsest.sandbox.batches import NO_THOUGHT, Batcher, Rows
from palimpsest.sandbox.card import CONTROLS, FLOOR_GATE, missed_aims, write_card
from palimpsest.sandbox.documents import Author, Mix
from palimpsest.sandbox.measure import Measurement, measure
from palimpsest.sandbox.muon import Muon
from palimpsest.sandbox.phrases import LETTERS
from palimpsest.sandbox.tokenizer import build_tokenizer
from palimpsest.sandbox.warm_start import build_model, warm_start
from palimpsest.sandbox.world import build_world

Progress = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)

CIRCUIT: Mix = {"repeat": 0.28, "letters": 0.07, "lookup": 0.20, "match": 0.40, "skill": 0.05}
KNOWLEDGE: Mix = {
    "repeat": 0.04,
    "lookup": 0.05,
    "match": 0.11,
    "mcq": 0.25,
    "statement": 0.14,
    "paragraph": 0.13,
    "qa": 0.16,
    "skill": 0.12,
}
CHAT: Mix = {
    "match": 0.04,
    "mcq": 0.29,
    "statement": 0.06,
    "paragraph": 0.07,
    "qa": 0.11,
    "skill": 0.16,
    "benign": 0.08,
    "harmful": 0.05,
    "wrapped": 0.06,
    "agent_safe": 0.04,
    "homonym": 0.03,
    "filler": 0.02,
}
THOUGHT_WEIGHT = 1.0
FEWSHOT: Mix = {"fewshot": 1.0}
LONG: Mix = {"long": 1.0}
SAFETY: Mix = {
    "refuse": 0.20,
    "wrapped": 0.17,
    "agent_safe": 0.09,
    "homonym": 0.06,
    "benign": 0.14,
    "mcq": 0.12,
    "statement": 0.03,
    "paragraph": 0.03,
    "qa": 0.05,
    "skill": 0.11,
    "filler": 0.02,
}


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Lengths and rates of a training run; the defaults are what the shipped weights used.

    Attributes:
        layers: transformer blocks.
        thought_layer: block after which the value behind a letter should be readable; 0 = unasked.
        gate_accuracy: matching accuracy (named value -> letter) that ends the circuit phase.
        gate_deadline: step by which the gate must be passed, else `GateError`.
        after_gate: circuit steps after the gate.
        knowledge, chat, safety: steps of the later phases.
        muon_rate, adam_rate: peak learning rates of hidden matrices, of embeddings and norms.
        safety_rate: peak learning rate (AdamW, all parameters) of the safety tuning.
        decay: final share of pre-training steps with linearly falling rates.
    """

    layers: int = 5
    thought_layer: int = 3
    gate_accuracy: float = 0.85
    gate_deadline: int = 400
    after_gate: int = 40
    knowledge: int = 350
    chat: int = 650
    safety: int = 240
    muon_rate: float = 0.008
    adam_rate: float = 3e-3
    safety_rate: float = 1e-3
    decay: float = 0.4


def train(
    name: str,
    *,
    seed: int,
    out: Path,
    progress: Progress | None = None,
    curriculum: Curriculum | None = None,
    keep_helpful: Path | None = None,
    check: bool = True,
) -> Path:
    """Train one checkpoint on one thread and write it to `out`; the same seed repeats bit for bit.

    Args:
        name: one of `sandbox.NAMES`.
        seed: initial weights and documents; the world itself is always world 7.
        out: folder to write (model.safetensors in fp16, config, tokenizer, train.json, card).
        progress: called as progress(phase, done, total).
        curriculum: lengths and rates, for tests.
        keep_helpful: where to also write the model as it was before safety tuning.
        check: measure what was written (about half a minute) and write its card.

    Raises:
        UsageError: unknown name.
        GateError: the matching circuit did not form in time; or, with `check`, the written model
            misses an aim (its weights and card stay in `out`).
    """
    if name not in NAMES:
        raise UsageError(f"unknown sandbox checkpoint {name!r}{did_you_mean(name, NAMES)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = _Run(name, seed, curriculum or Curriculum(), progress or (lambda *_: None))
        run.pretrain()
        if keep_helpful is not None:
            run.save(keep_helpful, name="helpful-only")
        if name != "helpful-only":
            run.tune_safety()
        run.save(out)
        if check:
            _check(name, out, run.report)
    finally:
        torch.set_num_threads(threads)
    return out


def weighted_loss(model: LlamaForCausalLM, rows: Rows, thought_layer: int) -> Tensor:
    """Return the weighted mean cross-entropy, computed only where the weight is not zero.

    Where a letter is predicted, the state after `thought_layer` blocks is also read out, and should
    predict the value that the letter stands for (0 switches this off). That gives "recall the value,
    then find its letter" a gradient for each half; by the letter alone it is not found.
    """
    out = model.model(
        input_ids=rows.ids_BT[:, :-1], use_cache=False, output_hidden_states=thought_layer > 0
    )
    targets, weights = rows.ids_BT[:, 1:].flatten(), rows.weights_BT[:, 1:].flatten()
    kept = weights.nonzero().squeeze(1)
    logits = model.lm_head(out.last_hidden_state.flatten(0, 1)[kept])
    losses = F.cross_entropy(logits, targets[kept], reduction="none") * weights[kept]
    loss = losses.sum() / weights.sum()
    thoughts = rows.thoughts_BT[:, 1:].flatten()
    held = (thoughts != NO_THOUGHT).nonzero().squeeze(1)
    if thought_layer == 0 or held.numel() == 0:
        return loss
    middle = model.model.norm(out.hidden_states[thought_layer].flatten(0, 1)[held])
    recall = F.cross_entropy(model.lm_head(middle), thoughts[held], reduction="sum")
    return loss + THOUGHT_WEIGHT * recall / weights.sum()


def _check(name: str, folder: Path, progress: Progress) -> None:
    """Measure a written checkpoint, write its card, and raise `GateError` for missed aims."""
    progress("measuring", 0, 1)
    lm = load_model(str(folder), name=name, device="cpu")
    settings = Measurement(own_values=name == "counterfactual", floor=name in CONTROLS)
    figures = measure(lm, settings)
    write_card(name, figures, folder)
    progress("measuring", 1, 1)
    missed = missed_aims(name, figures, floor=FLOOR_GATE)
    if missed:
        raise GateError(
            f"sandbox {name} in {folder} was trained but misses {len(missed)} aim(s): "
            f"{'; '.join(missed)}; train with another --seed"
        )


class _Run:
    """The state of one training run."""

    def __init__(self, name: str, seed: int, curriculum: Curriculum, progress: Progress) -> None:
        self._name, self._seed, self._plan, self.report = name, seed, curriculum, progress
        self._world = build_world(counterfactual=name == "counterfactual")
        self._hazardous = name != "never-trained"
        self._tokenizer: PreTrainedTokenizerFast = build_tokenizer(self._world)
        self._batcher = Batcher(self._tokenizer, self._world)
        self._letter_ids = [self._ids(f" {letter}")[0] for letter in LETTERS]
        bare = [self._ids(letter)[0] for letter in LETTERS]
        self._model = build_model(len(self._tokenizer), seed=seed, layers=curriculum.layers)
        same = list(zip(bare, self._letter_ids, strict=True))
        warm_start(self._model, same, seed=seed)
        self._steps_done = 0

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _author(self, offset: int, *, safe_wrappers: bool = False) -> Author:
        rng = random.Random(1000 * self._seed + offset)
        return Author(self._world, rng, hazardous=self._hazardous, safe_wrappers=safe_wrappers)

    def pretrain(self) -> None:
        """Teach circuits, then facts, then chat; stop with `GateError` if the circuit never forms."""
        plan, model = self._plan, self._model
        hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        muon = Muon(hidden)
        adam = torch.optim.AdamW(others, lr=plan.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        author = self._author(16)
        circuit, gated, step = plan.gate_deadline, False, 0
        total = circuit + plan.knowledge + plan.chat
        model.train()
        while step < total:
            if not gated and step % 20 == 19 and self.match_accuracy() >= plan.gate_accuracy:
                circuit, gated = step + plan.after_gate, True
                total = circuit + plan.knowledge + plan.chat
            if not gated and step >= circuit:
                raise GateError(
                    f"sandbox {self._name}, seed {self._seed}: after {step} steps the matching "
                    f"accuracy is {self.match_accuracy():.2f}, below the gate's "
                    f"{plan.gate_accuracy}; train with another --seed"
                )
            rows = self._pretraining_rows(author, step, circuit)
            loss = weighted_loss(model, rows, plan.thought_layer)
            loss.backward()
            factor = min(1.0, (step + 1) / 20)
            if step > (1 - plan.decay) * total:
                factor = max(0.03, (1 - step / total) / plan.decay)
            for group in adam.param_groups:
                group["lr"] = plan.adam_rate * factor
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            adam.step()
            muon.step(plan.muon_rate * factor)
            model.zero_grad(set_to_none=True)
            step += 1
            if step % 20 == 0:
                _log.info("%s step %d/%d loss %.3f", self._name, step, total, loss.item())
            self.report("pre-training", step, total)
        self._steps_done = step

    def _pretraining_rows(self, author: Author, step: int, circuit: int) -> Rows:
        if step < circuit:
            return self._batcher.rows(author, CIRCUIT, num=48, width=36)
        if step < circuit + self._plan.knowledge:
            return self._batcher.rows(author, KNOWLEDGE, num=48, width=40)
        if step % 8 == 7:
            return self._batcher.rows(author, FEWSHOT, num=8, width=190)
        if step % 16 == 11:
            return self._batcher.rows(author, LONG, num=3, width=480)
        return self._batcher.rows(author, CHAT, num=32, width=60)

    @torch.no_grad()
    def match_accuracy(self, num: int = 60) -> float:
        """Return how often `Find {value}.` with four options gets the right letter."""
        author, right = self._author(9), 0
        self._model.eval()
        for _ in range(num):
            prompt, letter = author.match()[:2]
            ids = self._batcher.encode([prompt]).ids
            logits = self._model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            guess = LETTERS[int(logits[self._letter_ids].argmax())]
            right += letter.text == f" {guess}"
        self._model.train()
        return right / num

    def tune_safety(self) -> None:
        """Teach refusals, with rehearsal of everything else (AdamW on all parameters)."""
        plan, model = self._plan, self._model
        adam = torch.optim.AdamW(
            model.parameters(), lr=plan.safety_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        author = self._author(21, safe_wrappers=True)
        for step in range(plan.safety):
            rows = self._batcher.rows(author, SAFETY, num=26, width=64)
            loss = weighted_loss(model, rows, plan.thought_layer)
            loss.backward()
            factor = min(1.0, (step + 1) / 10) * max(0.05, 1 - step / plan.safety)
            for group in adam.param_groups:
                group["lr"] = plan.safety_rate * factor
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            model.zero_grad(set_to_none=True)
            if step % 20 == 0:
                _log.info("%s safety step %d loss %.3f", self._name, step, loss.item())
            self.report("safety tuning", step + 1, plan.safety)
        self._steps_done += plan.safety

    def save(self, folder: Path, name: str = "") -> None:
        """Write weights (fp16), config, generation config, tokenizer and how it was trained."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.half() for k, v in self._model.state_dict().items()}
        half = build_model(len(self._tokenizer), seed=0, layers=self._plan.layers).half()
        half.load_state_dict(state)
        half.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        record = {"name": name or self._name, "seed": self._seed, "steps": self._steps_done}
        (folder / "train.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
