"""One RMU step: our truncated forward against whole forwards of two models.

    .venv/bin/python benchmarks/rmu_step.py [LAYERS]

The claim: the loss lives at one layer, so blocks above it, the head, and a second copy of the blocks
below the first trained one are work for nothing. A random Llama-like model is built in memory; both
versions compute the same loss in turns, and the median ratio of five turns is printed.
"""

import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from palimpsest.methods.rmu import RMU
from palimpsest.model import LM, load_model
from palimpsest.types import ForgetRetain, Message, RunContext, Sample

TURNS, STEPS, LAYER = 5, 4, 3


def whole_forwards(model: torch.nn.Module, frozen: torch.nn.Module, ids: torch.Tensor) -> None:
    """Four full forwards and one backward, as the published code does in each step."""
    for _ in range(STEPS):
        here = model(ids, output_hidden_states=True).hidden_states[LAYER + 1]
        kept = model(ids, output_hidden_states=True).hidden_states[LAYER + 1]
        with torch.no_grad():
            there = frozen(ids, output_hidden_states=True).hidden_states[LAYER + 1]
        loss = (here - 1.0).square().mean() + (kept - there).square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)


def truncated(lm: LM, text: str) -> LM:
    samples = tuple(
        Sample(id=str(i), task="perplexity", messages=(Message("user", text),), group=str(i))
        for i in range(4)
    )
    method = RMU(layer=LAYER, depth=3, fit=RMU.Fit(steps=STEPS, batch_size=4))
    return method.unlearn(lm, ForgetRetain(forget=samples, retain=samples), RunContext(seed=0))


def main() -> None:
    torch.set_num_threads(1)
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    tokenizer = load_model("sandbox/original", device="cpu").tokenizer
    config = LlamaConfig(
        vocab_size=8000, hidden_size=256, intermediate_size=688, num_hidden_layers=layers,
        num_attention_heads=8, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        lm = load_model(str(Path(folder)), device="cpu")
    frozen = lm.copy().model
    text = "The old town lies beside a quiet river and many people walk there. " * 8
    ids = torch.tensor([tokenizer(text)["input_ids"]] * 4)
    ratios = []
    for _ in range(TURNS):
        start = time.perf_counter()
        lm = truncated(lm, text)
        middle = time.perf_counter()
        lm.model.requires_grad_(False)
        for block in lm.model.model.layers[LAYER - 2 : LAYER + 1]:
            block.mlp.down_proj.weight.requires_grad_(True)
        whole_forwards(lm.model, frozen, ids)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    print(
        f"{layers} layers, loss at layer {LAYER}, {ids.shape[1]} tokens x 4: "
        f"{statistics.median(ratios):.2f} x faster "
        f"(turns: {', '.join(f'{r:.2f}' for r in ratios)})"
    )


if __name__ == "__main__":
    main()
