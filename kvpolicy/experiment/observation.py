"""One sample through a model, and what each layer made of it: keys, values, derivatives, attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.errors import CalibrationError
from kvpolicy.experiment.attention_error import exact_attention
from kvpolicy.hf.attach import watching
from kvpolicy.hf.cache import make_cache
from kvpolicy.hf.models import attached, cache_word
from kvpolicy.hf.recorder import Recorder, recordable
from kvpolicy.hf.rotary import rotaries
from kvpolicy.interfaces.calibrator import Watched
from kvpolicy.interfaces.rotation import find_rotation, unrotate
from kvpolicy.interfaces.site import Site
from kvpolicy.layer.view import View

__all__ = ["Observed"]

QUERIES = 256
"""Of so many of the newest tokens of a sample attention is looked at."""


class Observed:
    """A model whose layers are watched, sample by sample; it is left as it was.

    Args:
        model: a causal language model of transformers.
        length: tokens of all samples together.
    """

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.length, self.word = model, length, cache_word(model)
        self.layers, self.count = recordable(model.config)
        if not self.layers:
            raise CalibrationError(
                "a model must have full-attention layers to be calibrated, which are those that recipes keep, found "
                f"none in this {type(model).__name__}"
            )
        self.rotary = rotaries(model, self.count)
        self.raised = 2.0**12 if model.dtype == torch.float16 else 1.0
        """Derivatives are computed of so many times the loss: float16 holds no smaller ones."""

    def site(self, layer: int, keys: Tensor) -> Site:
        """Where a layer stands."""
        own = self.rotary[layer]
        turned = own is not None and own.interleaved
        return Site(layer, self.count, "keys", keys.shape[1], keys.shape[3], own, turned)

    @contextmanager
    def ready(self, needs: frozenset[str]) -> Iterator[None]:
        """Evaluation mode, and attached where attention is asked for; afterwards all is as it was."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with attached(self.model, "attention" in needs) as found:
                if "attention" in needs and not found:
                    raise CalibrationError(
                        f"attention must be watched on an attached model, and this {type(self.model).__name__} can't "
                        "be attached"
                    )
                yield
        finally:
            for module in training:
                module.training = True

    def watch(self, tokens: Tensor, needs: frozenset[str]) -> Iterator[tuple[int, Watched]]:
        """What each layer makes of a sample `[tokens]`, in the order of layers."""
        ids = tokens.view(1, -1).to(self.model.device)
        if "attention" in needs:
            yield from self._attention(ids)
        else:
            yield from self._plain(ids, "gradients" in needs)

    def _plain(self, ids: Tensor, gradients: bool) -> Iterator[tuple[int, Watched]]:
        recorder = Recorder(self.model.config, gradients)
        given: dict[str, Any] = {self.word: recorder, "use_cache": True}
        found: dict[int, list[Tensor | None]] = {}
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            if gradients:
                loss = self.model(ids, labels=ids, **given).loss * self.raised
                kept = [layer for layer in self.layers if layer in recorder.noted]
                noted = [x for layer in kept for x in recorder.noted[layer]]
                derived: list[Tensor | None] = list(torch.autograd.grad(loss, noted, allow_unused=True))
                found = {layer: [*derived[2 * i : 2 * i + 2]] for i, layer in enumerate(kept)}
            else:
                self.model(ids, **given, **last_only(self.model))
        for layer in self.layers:
            keys, values = recorder.noted.pop(layer, (None, None))
            if keys is None or values is None:  # it reads the keys of another layer
                continue
            with torch.no_grad():
                yield layer, self._watched(layer, keys.detach(), values.detach(), found.get(layer))

    def _watched(self, layer: int, keys: Tensor, values: Tensor, derived: list[Tensor | None] | None) -> Watched:
        site, keys, values = self.site(layer, keys), keys.float(), values.float()
        places = torch.arange(keys.shape[2], device=keys.device).view(1, 1, -1)
        rotation = None if site.rotary is None else find_rotation(site, keys.device)
        unrotated = None if rotation is None else unrotate(keys, rotation, places)
        gradients: dict[str, Tensor] = {}
        if derived is not None:
            by_keys, by_values = (
                torch.zeros_like(x) if d is None else (d.float() / self.raised).nan_to_num_(0, 0, 0)
                for x, d in zip((keys, values), derived, strict=True)
            )
            gradients = {"keys": by_keys, "values": by_values}
            if rotation is not None:  # the adjoint of the rotation: its inverse, but for the factor, which stays
                back = unrotate(by_keys, {**rotation, "factor": 1 / rotation["factor"]}, places)
                gradients["unrotated"] = back
        return Watched(site, self.length, keys, values, unrotated, gradients, None)

    def _attention(self, ids: Tensor) -> Iterator[tuple[int, Watched]]:
        found: dict[int, Watched] = {}
        cache = make_cache("full", self.model)

        def note(
            module: nn.Module, query: Tensor, key: Any, value: Any, mask: Any, options: dict[str, Any], output: Any
        ) -> None:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            keys, values = (x.arriving if isinstance(x, View) else x for x in (key, value))
            n = min(QUERIES, query.shape[2])
            if layer not in self.layers or keys.shape[2] != query.shape[2]:
                return
            if isinstance(mask, Tensor) and mask.shape[-2] == query.shape[2]:
                mask = mask[..., -n:, :]
            _, weights = exact_attention(query[:, :, -n:], keys, values, mask, options)
            mean = weights.unflatten(2, (-1, n)).mean((0, 1, 2))
            watched = self._watched(layer, keys, values, None)
            found[layer] = Watched(**{**vars(watched), "attention": mean})

        token = watching.set(note)
        try:
            with torch.no_grad():
                self.model(ids, **{self.word: cache, "use_cache": True}, **last_only(self.model))
        finally:
            watching.reset(token)
        yield from sorted(found.items())


def last_only(model: Any) -> dict[str, int]:
    """Arguments by which a model computes the logits of the last token alone, where it can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
