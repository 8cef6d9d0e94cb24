"""A layer that is filled update by update, each of them attended by the CUDA backend and by the reference."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.attention.attend import observe, whole
from kvpolicy.attention.backend import spec_of
from kvpolicy.attention.cuda.backend import Cuda
from kvpolicy.attention.mask import as_mask
from kvpolicy.attention.reference import REFERENCE
from kvpolicy.attention.steady import stood_of
from kvpolicy.interfaces.backend import AttentionOptions, Part
from kvpolicy.layer.held import Reading
from kvpolicy.layer.layer import LayerCache
from kvpolicy.placement.padding import Padding
from kvpolicy.placement.planner import Placement
from kvpolicy.placement.step import Step
from kvpolicy.recipe.load import load_recipe

__all__ = ["APART", "Served", "additive", "apart", "channel", "own", "some", "token"]


def token(nbits: int, group: Any = "auto", **more: Any) -> dict[str, Any]:
    return {"kind": "int", "nbits": nbits, "group_size": group, "per": "token", **more}


def channel(nbits: int, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"kind": "int", "nbits": nbits, "group_size": group, "per": "channel", **more}


def own(keys: Any, values: Any) -> dict[str, Any]:
    newest = {"policy": {"kind": "recent", "window": 40, "flush": 24}, "store": "full"}
    return {"name": "own", "summary": "own", "tiers": [newest, {"keys": keys, "values": values}]}


LOG = {"kind": "log", "budget": 40}
RANKED = {"kind": "rank", "scorer": "key_norm", "budget": 60, "share": "head"}


def apart(keys: Any, values: Any, *middle: tuple[Any, Any, Any]) -> dict[str, Any]:
    """A recipe with tiers in the middle: the policy of each, its keys and its values."""
    newest = {"policy": {"kind": "recent", "window": 20, "flush": 20}, "store": "full"}
    tiers = [{"policy": policy, "keys": k, "values": v} for policy, k, v in middle]
    last = {"store": "evict"} if keys == "evict" else {"keys": keys, "values": values}
    return {"name": "own", "summary": "own", "tiers": [newest, *tiers, last]}


APART: dict[str, Any] = {
    "keys anyhow": apart(token(4, 32), token(2), (LOG, "full", token(2))),
    "values anyhow": apart(token(4, 32), token(2), (LOG, token(4, 32), "full")),
    "both": apart(token(2), token(2), (LOG, token(4), "full"), ({**LOG, "budget": 70}, token(2), "full")),
    "channel": apart(channel(2), token(2), (LOG, "full", token(2))),
    "by head": apart(
        token(4), token(1, 16), (RANKED, "full", token(2)), ({**RANKED, "budget": 90}, token(4), token(2))
    ),
    "by attention": apart(token(4), token(2), ({"kind": "attention", "budget": 60}, "full", token(2))),
    "eight bits": apart(
        token(3), token(2, "head", range="rms", scale_dtype="float8_e4m3"), (LOG, "full", token(8, 32, range="rms"))
    ),
    "rotated": apart(
        token(2, transforms=[{"kind": "hadamard", "seed": 2}]),
        token(2, transforms=[{"kind": "hadamard"}]),
        (LOG, "full", token(2, transforms=[{"kind": "hadamard"}])),
    ),
    "evicted": apart("evict", "evict", (LOG, "full", token(2)), ({**LOG, "budget": 70}, token(4), token(2))),
}
"""Recipes whose keys and values of a token lie in stores and orders that differ."""


def some(batch: int, heads: int, n: int, seen: int, device: str) -> Tensor:
    mask = torch.rand(batch, 1, n, seen, device=device) > 0.3
    mask[..., -n:] = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    return mask


def additive(batch: int, heads: int, n: int, seen: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    mask = torch.randn(batch, heads, n, seen, device=device, dtype=dtype)
    mask[torch.rand(mask.shape, device=device) > 0.7] = torch.finfo(dtype).min
    mask[..., 0] = 0
    return mask


class Served:
    """Keys, values and queries are random; keys have a bias per channel, as those of models have."""

    def __init__(
        self,
        recipe: Any,
        dim: int = 128,
        groups: int = 4,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
        value_dim: int | None = None,
        **params: Any,
    ) -> None:
        placement = Placement(load_recipe(recipe, **params).tiers)
        self.reading = Reading(attached=True)
        self.tiers = LayerCache(Step.first(placement), None, self.reading)
        self.dims, self.groups, self.dtype, self.device = (dim, value_dim or dim), groups, dtype, device
        self.batch, self.kv_heads = 2, 2
        self.repeated = 0
        """How often the same was asked again, as for another layer."""
        torch.manual_seed(0)
        self.bias = 2 * torch.randn(1, self.kv_heads, 1, dim, device=device)

    def draw(self, n: int, heads: int, dim: int) -> Tensor:
        return torch.randn(self.batch, n, heads, dim, device=self.device).transpose(1, 2).to(self.dtype)

    def step(self, n: int, mask: Any = None, pad: int = 0, **options: Any) -> float | None:
        """The error of an update of `n` tokens; None where it was the first."""
        tiers, heads, (dim, value_dim) = self.tiers, self.kv_heads * self.groups, self.dims
        keys = (self.draw(n, self.kv_heads, dim) + self.bias).to(self.dtype)
        values, query = self.draw(n, self.kv_heads, value_dim), self.draw(n, heads, dim)
        shown = self.padded(n, pad)
        first = not tiers.stores
        tiers.stage(keys, values)
        observer = tiers.observe()
        if first:
            if observer is not None:
                observe(query, keys, observer, shown)
            tiers.heed(query)
            tiers.hold()
            return None
        if mask is not None:
            shown = mask(self.batch, heads, n, tiers.seen, self.device)
        asked = AttentionOptions(dim**-0.5, observer=observer, alone=True, **options)
        error = self.error(query, (keys, values), as_mask(shown, tiers.seen, self.kv_heads), asked)
        tiers.hold()
        return error

    def error(self, query: Tensor, new: tuple[Tensor, Tensor], mask: Tensor | None, asked: AttentionOptions) -> float:
        part, backend = whole(self.tiers, new), Cuda()
        spec = spec_of(query, part, mask, asked, self.tiers.step.by_head)
        assert self.device == "cpu" or backend.refuses(spec) is None
        reason = backend.declines(query, part, mask, asked)
        assert reason is None, reason
        second = copy.deepcopy(asked.observer)
        found, lse = backend.attend(query, part, mask, AttentionOptions(**{**vars(asked), "observer": second}))
        right, right_lse = REFERENCE.attend(query.float(), part, mask, asked)
        torch.testing.assert_close(lse, right_lse, rtol=1e-2, atol=2e-2)
        if asked.observer is not None:
            for a, b in zip(asked.observer.found, second.found, strict=True):
                for x, y in zip(a or (), b or (), strict=True):
                    torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-3)
        if mask is None:
            self.repeat(backend, query, part, asked, found)
        return float((found.float() - right).norm() / right.norm())

    def repeat(self, backend: Cuda, query: Tensor, part: Part, asked: AttentionOptions, found: Tensor) -> None:
        """What serves the other layers that stand alike gives the same to the bit."""
        assert part.new is not None
        stood, again = stood_of(self.tiers), backend.again(query, part, asked)
        if stood is None or again is None:
            return
        self.repeated += 1
        for _ in range(2):
            observer = copy.deepcopy(asked.observer)
            out = again(query, part.new, stood.addresses, self.tiers.stores, asked.sinks, observer)
            assert out is not None
            assert torch.equal(out.transpose(1, 2), found.to(query.dtype))

    def padded(self, n: int, pad: int) -> Tensor | None:
        if not pad and self.reading.padding is None:
            return None
        padding = self.reading.padding or Padding.none(self.batch, 0)
        real = np.ones((self.batch, n), np.bool_)
        real[1, :pad] = False
        self.reading.padding = padding.append(real)
        return torch.from_numpy(self.reading.padding.real.copy()).to(self.device)

    def check(self, updates: tuple[int, ...] = (517, 3, 1, 60, 1), bound: float | None = None, **options: Any) -> None:
        pad = options.pop("pad", 0)
        errors = [self.step(n, pad=0 if i else pad, **options) for i, n in enumerate(updates)]
        worst = max(error for error in errors if error is not None)
        assert worst < (bound or (4e-3 if self.dtype == torch.bfloat16 else 1e-3))
