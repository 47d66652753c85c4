"""Multiple choice by log-probability: our scorer against one full forward per option.

    .venv/bin/python benchmarks/scoring.py [MODEL]

Two claims, each with the same numbers as its baseline. Running a question's prompt once, and taking logits
only where they are needed, beats scoring each (prompt, option) pair as a sequence of its own. Running the
tokens with which all prompts begin (solved examples, filler) once for the batch beats running them in every
row. All run in this process, in turns, on the same batches; the median ratio of five turns is printed.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from palimpsest.channels import continuation_ids
from palimpsest.chat import text_ids
from palimpsest.model import load_model
from palimpsest.plugins import build_plugin
from palimpsest.prompts import cloze_prompt
from palimpsest.scoring import Query, query_length, score_batch, score_text_batch

Scorer = Callable[[], list[tuple[float, ...]]]
TURNS = 5
ROWS = 64
FILLER = "Filler text that every option shares. " * 8


def main() -> None:
    torch.set_num_threads(1)
    lm = load_model(sys.argv[1] if len(sys.argv) > 1 else "sandbox/original", device="cpu")
    samples = build_plugin("datasets", "sandbox_facts", {}).load(None)[:ROWS]
    queries = []
    for sample in samples:
        prompt = FILLER + cloze_prompt(sample)
        prefix = tuple(text_ids(lm.tokenizer, prompt))
        ends = tuple(
            continuation_ids(lm.tokenizer, prompt, prefix, f" {o} and more of it")
            for o in sample.options
        )
        queries.append(Query(prefix=prefix, continuations=ends))
    width = max(query_length(q) for q in queries)

    def ours() -> list[tuple[float, ...]]:
        return score_batch(lm.model, queries, width=width)

    def one_forward_per_option() -> list[tuple[float, ...]]:
        out = []
        for q in queries:
            rows = [q.prefix + c for c in q.continuations]
            whole = score_text_batch(lm.model, rows, width=max(map(len, rows)))
            alone = score_text_batch(lm.model, [q.prefix], width=len(q.prefix))[0][0]
            out.append(tuple(total - alone for total, _ in whole))
        return out

    def behind_shared_tokens() -> list[tuple[float, ...]]:
        return score_batch(lm.model, queries, width=width, shared=shared)

    shared = len(text_ids(lm.tokenizer, FILLER)) - 1
    said = f"{len(queries)} questions, {width} tokens"
    compare(f"{said}; against a forward per option", ours, one_forward_per_option)
    compare(f"{said}, {shared} of them shared; against all rows", behind_shared_tokens, ours)


def compare(said: str, fast: Scorer, slow: Scorer) -> None:
    """Print how many times faster one scorer is, and how far apart the two are."""
    ratios, worst = [], 0.0
    for _ in range(TURNS):
        start = time.perf_counter()
        a = fast()
        middle = time.perf_counter()
        b = slow()
        ratios.append((time.perf_counter() - middle) / (middle - start))
        pairs = [(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
        worst = max(worst, *(abs(x - y) for x, y in pairs))
    print(
        f"{said}: {statistics.median(ratios):.2f} x faster "
        f"(turns: {', '.join(f'{r:.2f}' for r in ratios)}); largest difference {worst:.1e} nats"
    )


if __name__ == "__main__":
    main()
