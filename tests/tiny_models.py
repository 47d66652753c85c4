"""Random tiny models and tokenizers, built in memory: every architecture that the tests run on.

`save_tiny(folder, "llama")` writes a checkpoint that plain transformers loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "phi3",
    "olmo2",
)
"""Dense decoders."""
MIXTURES = ("mixtral", "qwen3_moe")
"""Mixtures of experts: the experts' weights are stacked in tensors of three dimensions."""
WINDOW = 6
"""Sliding window of the tiny Mistral, Gemma-2 and Gemma-3, in tokens."""
CONTEXT = 96
"""`max_position_embeddings` of every tiny model."""

VOCABULARY = 352
"""Rows of the embedding; a few more than the tokenizer has entries, as in real checkpoints."""

SPECIALS = ("<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

Template = Literal["chat", "no_system", "inst", "thinking", "not_prefix"]

TEMPLATES: dict[str, str] = {
    "chat": (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "no_system": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "inst": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        " {{ m.content }} </s>{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    "thinking": (
        "{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}"
    ),
    "not_prefix": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    ),
}

CORPUS = (
    "The capital of Arvenia is Lirona. What is the capital of Arvenia?",
    "How do you bake bread? Mix the flour with water and salt, then wait and bake.",
    "I am sorry, but I cannot help with that. Tell me more about the river and the town.",
    "A. yes B. no C. never D. always Answer: the question and the answer are the same.",
)


def tiny_tokenizer(
    *,
    template: Template | None = "chat",
    adds_bos: bool = True,
    adds_eos: bool = False,
    pad: Literal["own", "eos"] | None = "own",
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on `CORPUS` (about 350 entries).

    Args:
        template: a key of `TEMPLATES`, or None for a tokenizer without a chat template.
        adds_bos: whether plain encoding begins with `<s>`.
        adds_eos: whether plain encoding ends with `</s>` (T5-like habit; a trap).
        pad: a pad token of its own, the EOS, or none.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    if adds_bos or adds_eos:
        single = f"{'<s> ' if adds_bos else ''}$A{' </s>' if adds_eos else ''}"
        ids = [(t, raw.token_to_id(t)) for t in ("<s>", "</s>")]
        raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    pad_token = {"own": "<pad>", "eos": "</s>", None: None}[pad]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        **({"pad_token": pad_token} if pad_token else {}),
    )
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def _config(family: str, vocab_size: int, context: int, tied: bool | None) -> Any:
    import transformers as t

    common = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if tied is not None:
        common["tie_word_embeddings"] = tied
    size = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": context,
        "initializer_range": 0.2,
        **common,
    }
    grouped = {**size, "num_key_value_heads": 2}
    layers = ["sliding_attention", "full_attention"]
    if family == "llama":
        return t.LlamaConfig(**grouped)
    if family == "mistral":
        return t.MistralConfig(**grouped, sliding_window=WINDOW)
    if family == "qwen2":
        return t.Qwen2Config(**grouped)
    if family == "qwen3":
        return t.Qwen3Config(**grouped, head_dim=8)
    if family == "gemma2":
        soft = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
        more = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
        return t.Gemma2Config(**grouped, **soft, **more, layer_types=layers)
    if family == "gemma3":
        more = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
        return t.Gemma3TextConfig(**grouped, **more, layer_types=layers)
    if family == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": context}
        return t.GPT2Config(**small, **common, initializer_range=0.2)
    if family == "gpt_neox":
        return t.GPTNeoXConfig(**size)
    if family == "phi3":
        return t.Phi3Config(**grouped)
    if family == "olmo2":
        return t.Olmo2Config(**grouped)
    if family == "mixtral":
        return t.MixtralConfig(**grouped, num_local_experts=4, num_experts_per_tok=2)
    if family == "qwen3_moe":
        more = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
        return t.Qwen3MoeConfig(**grouped, **more, moe_intermediate_size=24)
    raise ValueError(f"unknown tiny family {family!r}")


def tiny_model(
    family: str = "llama",
    *,
    vocab_size: int = VOCABULARY,
    seed: int = 0,
    context: int = CONTEXT,
    tied: bool | None = None,
) -> PreTrainedModel:
    """Return a random two-layer model in eval mode; the same seed gives the same weights.

    `tied` says whether the head shares the embedding's weights; None is the family's own habit.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _config(family, vocab_size, context, tied)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def save_tiny(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    context: int = CONTEXT,
    tied: bool | None = None,
    **tokenizer_options: Any,
) -> Path:
    """Write a tiny checkpoint with its tokenizer (options of `tiny_tokenizer`) to `folder`."""
    tokenizer = tiny_tokenizer(**tokenizer_options)
    model = tiny_model(family, seed=seed, context=context, tied=tied)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
