"""The models of an audit, loaded when they are needed, and whether they can be compared."""

from __future__ import annotations

import gc
from typing import Any

from palimpsest.audit.jobs import done_facts, job_folder
from palimpsest.audit.planning import Planned
from palimpsest.errors import ModelError
from palimpsest.model import LM, load_model, weights_sha256
from palimpsest.scoring import Query, score_batch
from palimpsest.store import RunFolder

KEPT_BYTES = 2 * 2**30
"""Models stay loaded after their job as long as they do not take more than this together."""


class Models:
    """Loads models when they are needed; keeps those that are `held`, and small ones for the next job.

    Of large models so many are in memory at a time as one job touches at once: the one that the attack is
    built on, the original if it needs that, and the arm that is scored. Weights come without gradients:
    what trains switches on those that it trains.

    Attributes:
        hashes: of the weights of every model as it was loaded first.
        run_hashes: the same behind a forward pass, in which bitsandbytes repacks quantised weights.
    """

    def __init__(self, plan: Planned) -> None:
        self.plan = plan
        self._loaded: dict[str, LM] = {}
        self.hashes: dict[str, str] = {}
        self.run_hashes: dict[str, str] = {}
        self.held: set[str] = set()

    def get(self, name: str) -> LM:
        """Return a loaded model."""
        if name in self._loaded:
            self._loaded[name] = self._loaded.pop(name)
            return self._loaded[name]
        spare = [loaded for loaded in self._loaded if loaded not in self.held]
        while spare and sum(map(_num_bytes, self._loaded.values())) > KEPT_BYTES:
            self._loaded.pop(spare.pop(0)).close()
            gc.collect()
        model, numerics = self.plan.models[name], self.plan.recipe.numerics
        lm = load_model(
            model.spec.source,
            name=name,
            revision=model.revision,
            dtype=numerics.dtype,
            device="auto" if model.spec.device_map else numerics.device,
            device_map=model.spec.device_map,
            quantization=model.spec.quantization,
            trust_remote_code=model.spec.trust_remote_code,
        )
        for parameter in lm.model.parameters():
            parameter.requires_grad_(False)
        if name not in self.hashes:
            self.hashes[name] = self.run_hashes[name] = weights_sha256(lm.model)
            if lm.quantization:
                score_batch(lm.model, [Query((0,), ((0,),))], width=2)
                self.run_hashes[name] = weights_sha256(lm.model)
        self._loaded[name] = lm
        return lm

    def drop(self) -> None:
        """Let go of all models."""
        for lm in self._loaded.values():
            lm.close()
        self._loaded.clear()
        gc.collect()

    def check(self) -> dict[str, str]:
        """Refuse arms that cannot be compared: other tokens, another architecture, other sizes.

        Returns:
            How each model is quantised; empty = it is not.

        Raises:
            ModelError: names both models and what differs.
        """
        original = self.plan.recipe.original.name
        first = _shape(self.get(original))
        quantization = {}
        for name in self.plan.models:
            lm = self.get(name)
            quantization[name] = lm.quantization
            for what, value in _shape(lm).items():
                if value != first[what]:
                    shown = "" if what == "tokenizer" else f": {value}, not {first[what]}"
                    raise ModelError(
                        f"{name} has another {what} than {original}{shown}; all arms of an audit need the "
                        "same, or their answers cannot be compared"
                    )
        return quantization

    def compare(self, folder: RunFolder) -> None:
        """Refuse finished jobs that were made with other weights than those of the models here.

        Raises:
            ModelError: names the job, both hashes, and what to do.
        """
        for job in self.plan.jobs:
            made = done_facts(folder, job).get("weights_sha256", {})
            for name in (n for n, model in job.prints.items() if model in made):
                then = made[job.prints[name]]
                now = self.run_hashes.get(name, then)
                if now != then:
                    place = job_folder(folder, job)
                    assert place is not None
                    raise ModelError(
                        f"{job.id} was run on {name} with weights {then[:12]}, which are {now[:12]} now, "
                        "though its source is the same: did files change while an audit began? Remove "
                        f"jobs/{place.path.name} from the folder and run again"
                    )


def _num_bytes(lm: LM) -> int:
    return sum(p.nbytes for p in lm.model.parameters())


def _shape(lm: LM) -> dict[str, Any]:
    config = lm.model.config.get_text_config()
    return {
        "architecture": config.model_type,
        "hidden size": getattr(config, "hidden_size", None),
        "number of layers": getattr(config, "num_hidden_layers", None),
        "number of heads": getattr(config, "num_attention_heads", None),
        "number of key-value heads": getattr(config, "num_key_value_heads", None),
        "size of the vocabulary": lm.vocab_size,
        "size of the MLP": getattr(config, "intermediate_size", None),
        "tokenizer": sorted(lm.tokenizer.get_vocab().items()),
    }
