"""Build the sandbox model with attention heads that already look at useful places.

Heads of the first layer look one, two and three tokens back and write what they read into subspaces
of their own. Later layers get two heads that attend to the place after an earlier occurrence of the
token that the residual stream names: one copies the token found there (induction), one what stood
three places before it: in `B. value` that is the option's letter. It holds no knowledge of the
world; without it the circuit "value -> letter" needs several times the training or never forms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

CONTEXT = 4096
_CONSTANT = 0.35  # embedding channel 0 is the same for every token: position heads attend with it
_EMBEDDING_STD = 0.06
_POSITION_PAIRS = 6  # fastest rotary pairs: they tell neighbouring positions apart
_POSITION_SCORE = (
    7.0  # score per pair at the right offset; a neighbour's is .69 lower in all, times this
)
_WRITE_GAIN = 2.0  # a looked-up token must stand out from the token's own embedding
_SLOW_PAIR = 5  # rotary pairs from here on hardly turn within a row, so contents can be compared
_MATCH_GAIN = 2.2
_COPY_GAIN = 0.3


def build_model(
    vocab_size: int, *, seed: int, layers: int = 4, width: int = 128
) -> LlamaForCausalLM:
    """Return an untrained model in float32; the same seed gives the same weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=344,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attention_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


@torch.no_grad()
def warm_start(model: LlamaForCausalLM, same: Sequence[tuple[int, int]], *, seed: int) -> None:
    """Set the attention and embedding weights in place.

    Args:
        model: what `build_model` returned.
        same: pairs of token ids (`A`, ` A`) that start with the same embedding, because an option's
            letter and the answer's letter are different tokens of one meaning.
        seed: source of the random projections.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = model.model.embed_tokens.weight
    _set_embeddings(embedding, same, generator)
    rms = embedding.pow(2).mean().sqrt().item()  # heads read normed states, write onto raw ones
    width = model.config.hidden_size
    size = width // model.config.num_attention_heads
    writes = _orthonormal(width, 3 * size, generator).split(size, dim=1)
    reads = [_orthonormal(width, size, generator).T for _ in writes]
    first, *later = (layer.self_attn for layer in model.model.layers)
    for head, (read, write) in enumerate(zip(reads, writes, strict=True)):
        _position_head(first, head, offset=head + 1, constant=_CONSTANT / rms)
        _set_value(first, head, read, write * _WRITE_GAIN * rms)
    for attention in later:
        copy = _orthonormal(width, size, generator)
        for head in (0, 1):
            _match_head(attention, head, reads[0], writes[0].T)
        _set_value(attention, 0, copy.T, copy * _COPY_GAIN)
        _set_value(attention, 1, writes[2].T, reads[2].T * _COPY_GAIN)


def _set_embeddings(
    embedding: Tensor, same: Sequence[tuple[int, int]], generator: torch.Generator
) -> None:
    embedding.normal_(0, _EMBEDDING_STD, generator=generator)
    embedding[:, 0] = _CONSTANT
    for first, second in same:
        noise = torch.randn(embedding.shape[1], generator=generator) * _EMBEDDING_STD * 0.2
        noise[0] = 0
        embedding[second] = embedding[first] + noise


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a matrix with orthonormal columns whose first row (the constant channel) is zero."""
    matrix, _ = torch.linalg.qr(torch.randn(rows - 1, columns, generator=generator))
    return torch.cat([torch.zeros(1, columns), matrix])


def _rows(attention: LlamaAttention, head: int) -> slice:
    return slice(head * attention.head_dim, (head + 1) * attention.head_dim)


def _set_value(attention: LlamaAttention, head: int, read: Tensor, write: Tensor) -> None:
    attention.v_proj.weight[_rows(attention, head)] = read
    attention.o_proj.weight[:, _rows(attention, head)] = write


def _position_head(attention: LlamaAttention, head: int, *, offset: int, constant: float) -> None:
    """Make a head attend `offset` tokens back: its key is the query, turned by the offset."""
    size = attention.head_dim
    half = size // 2
    frequencies = 1.0 / (10000 ** (torch.arange(half).float() / half))
    used = (torch.arange(half) < _POSITION_PAIRS).float()
    query = torch.cat([used, torch.zeros(half)])
    angle = offset * frequencies
    key = torch.cat([torch.cos(angle) * used, torch.sin(angle) * used])
    gain = (_POSITION_SCORE * size**0.5) ** 0.5 / constant
    for projection, direction in ((attention.q_proj, query), (attention.k_proj, key)):
        projection.weight[_rows(attention, head)] = 0.0
        projection.weight[_rows(attention, head), 0] = direction * gain


def _match_head(attention: LlamaAttention, head: int, query: Tensor, key: Tensor) -> None:
    """Make a head attend where what `key` reads equals what `query` reads here."""
    half = attention.head_dim // 2
    slow = (torch.arange(half) >= _SLOW_PAIR).float().repeat(2)[:, None]
    attention.q_proj.weight[_rows(attention, head)] = query * slow * _MATCH_GAIN
    attention.k_proj.weight[_rows(attention, head)] = key * slow * _MATCH_GAIN
