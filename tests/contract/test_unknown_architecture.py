"""An architecture that nobody has heard of: what needs only logits works, the rest says why not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from palimpsest.errors import UnsupportedArchitectureError
from palimpsest.generate import generate_batch
from palimpsest.methods.grad_ascent import GradAscent
from palimpsest.methods.npo import NPO
from palimpsest.methods.rmu import RMU
from palimpsest.model import LM, load_model, weights_sha256
from palimpsest.parts import parts_of
from palimpsest.scoring import Query, score_batch, score_text_batch
from palimpsest.types import ForgetRetain, Message, RunContext, Sample, TrainScope
from tiny_models import VOCABULARY, tiny_tokenizer


class MeanConfig(PreTrainedConfig):
    model_type = "palimpsest_mean"
    vocab_size: int = VOCABULARY
    hidden_size: int = 16
    tie_word_embeddings: bool = False


class MeanForCausalLM(PreTrainedModel):
    """The next token from this one and the mean of all so far: no blocks, positions or cache."""

    config_class = MeanConfig
    base_model_prefix = "trunk"

    def __init__(self, config: MeanConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Any) -> CausalLMOutput:
        return self.predict(input_ids, attention_mask)

    def predict(self, input_ids: Tensor, attention_mask: Tensor) -> CausalLMOutput:
        mask_BT1 = attention_mask[:, :, None].float()
        h_BTD = self.table(input_ids) * mask_BT1
        mean_BTD = h_BTD.cumsum(1) / mask_BT1.cumsum(1).clamp(min=1)
        return CausalLMOutput(logits=self.out(torch.tanh(h_BTD + mean_BTD)))


class BareForCausalLM(MeanForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> CausalLMOutput:
        return self.predict(input_ids, attention_mask)


class MasklessForCausalLM(MeanForCausalLM):
    def forward(self, input_ids: Tensor, **others: Any) -> CausalLMOutput:
        return self.predict(input_ids, torch.ones_like(input_ids))


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    AutoConfig.register(MeanConfig.model_type, MeanConfig)
    AutoModelForCausalLM.register(MeanConfig, MeanForCausalLM)
    yield
    CONFIG_MAPPING._extra_content.pop(MeanConfig.model_type)
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(MeanConfig)


@pytest.fixture(scope="module")
def folder(_registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mean")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MeanForCausalLM(MeanConfig()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def lm(folder: Path) -> LM:
    return load_model(str(folder), device="cpu")


def samples(kind: str) -> tuple[Sample, ...]:
    return tuple(
        Sample(
            id=f"{kind}{i}",
            task="generate",
            messages=(Message("user", f"Which {kind} {i}?"),),
            answer="A river.",
        )
        for i in range(3)
    )


DATA = ForgetRetain(forget=samples("town"), retain=samples("bread"))
QUERIES = [Query((5, 9, 20), ((7, 8, 9), (11,))), Query((6,), ((12, 13), (5, 6, 7, 8)))]


@torch.no_grad()
def logprobs(model: Any, ids: tuple[int, ...]) -> Tensor:
    ids_1T = torch.tensor([ids])
    return torch.log_softmax(model.predict(ids_1T, torch.ones_like(ids_1T)).logits[0].double(), -1)


def plain(model: Any, prefix: tuple[int, ...], rest: tuple[int, ...]) -> float:
    logprobs_TV = logprobs(model, prefix + rest)
    return sum(logprobs_TV[len(prefix) - 1 + i, t].item() for i, t in enumerate(rest))


def with_forward(lm: LM, cls: type[MeanForCausalLM]) -> LM:
    model = cls(lm.model.config).eval()
    model.load_state_dict(lm.model.state_dict())
    return LM(model, lm.tokenizer)


@pytest.mark.parametrize("cls", [MeanForCausalLM, BareForCausalLM])
def test_it_is_scored(lm: LM, cls: type[MeanForCausalLM]) -> None:
    lm = with_forward(lm, cls)
    got = [s for row in score_batch(lm, QUERIES, width=9) for s in row]
    want = [plain(lm.model, q.prefix, c) for q in QUERIES for c in q.continuations]
    assert got == pytest.approx(want, abs=1e-5)
    texts = score_text_batch(lm, [(5, 9, 20, 7), (8, 9)], width=6)
    assert [s for s, _ in texts] == pytest.approx(
        [plain(lm.model, (5,), (9, 20, 7)), plain(lm.model, (8,), (9,))], abs=1e-5
    )


@pytest.mark.parametrize("cls", [MeanForCausalLM, BareForCausalLM])
def test_it_writes(lm: LM, cls: type[MeanForCausalLM]) -> None:
    lm = with_forward(lm, cls)
    prompts = [(5, 9, 20), (6,)]
    got = generate_batch(lm, prompts, width=4, max_new_tokens=6, stop_ids=frozenset())
    for generation, prompt in zip(got, prompts, strict=True):
        ids = prompt
        for _ in range(6):
            ids = (*ids, int(logprobs(lm.model, ids)[-1].argmax()))
        assert generation.ids == ids[len(prompt) :]


@pytest.mark.parametrize(
    "method",
    [
        GradAscent(fit=GradAscent.Fit(steps=1, lr=1e-2)),
        NPO(fit=NPO.Fit(steps=1, lr=1e-2)),
    ],
    ids=["grad_ascent", "npo"],
)
def test_it_is_trained_whole(lm: LM, method: Any) -> None:
    before = weights_sha256(lm.model)
    after = method.unlearn(lm, DATA, RunContext(seed=0))
    assert weights_sha256(after.model) != before


def test_what_needs_its_parts_names_the_class_and_what_is_missing(lm: LM) -> None:
    names_it = r"MeanForCausalLM: .*a base model under `base_model_prefix`.*parts\.py"
    with pytest.raises(UnsupportedArchitectureError, match=names_it):
        parts_of(lm)
    with pytest.raises(UnsupportedArchitectureError, match=names_it):
        RMU(layer=0).unlearn(lm, DATA, RunContext(seed=0))
    scope = TrainScope(kind="lora", rank=2, alpha=4.0)
    with pytest.raises(UnsupportedArchitectureError, match=names_it):
        GradAscent().unlearn(lm, DATA, RunContext(seed=0, scope=scope))
    assert all(p.requires_grad for p in lm.model.parameters())


def test_a_model_that_cannot_mask_padding_is_refused(lm: LM) -> None:
    maskless = with_forward(lm, MasklessForCausalLM)
    assert "attention_mask" not in inspect.signature(maskless.model.forward).parameters
    with pytest.raises(UnsupportedArchitectureError, match=r"Maskless.*attention_mask"):
        score_batch(maskless, QUERIES, width=9)


def test_a_state_space_model_is_scored_and_writes() -> None:
    """Mamba has neither attention nor a key-value cache; padding on the left leaves its state."""
    from transformers import MambaConfig, MambaForCausalLM

    small = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": VOCABULARY}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MambaForCausalLM(MambaConfig(**small, initializer_range=0.3)).eval()

    @torch.no_grad()
    def last(ids: tuple[int, ...]) -> Tensor:
        logits_TV = model(torch.tensor([ids]), use_cache=False).logits[0]
        return torch.log_softmax(logits_TV[-1].double(), -1)

    got = [s for row in score_batch(model, QUERIES, width=9) for s in row]
    want = [
        sum(last(q.prefix + c[:i])[token].item() for i, token in enumerate(c))
        for q in QUERIES
        for c in q.continuations
    ]
    assert got == pytest.approx(want, abs=1e-5)
    prompts = [(5, 9, 20), (6,)]
    lm = LM(model, tiny_tokenizer())
    written = generate_batch(lm, prompts, width=4, max_new_tokens=4, stop_ids=frozenset())
    for generation, prompt in zip(written, prompts, strict=True):
        ids = prompt
        for _ in range(4):
            ids = (*ids, int(last(ids).argmax()))
        assert generation.ids == ids[len(prompt) :]
