"""What a compressed cache does to attention: its outputs against those of the exact cache on the same queries.

A `Watcher` keeps, beside the cache, all keys and values that each layer was given. So it costs an exact cache while
it watches. "Exact" is attention of the same queries over these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvpolicy.attention.mask import Queries, as_mask
from kvpolicy.attention.reference import only_new, weights
from kvpolicy.experiment.attention_distance import Distances
from kvpolicy.hf.attach import watching
from kvpolicy.hf.cache import CompressedCache
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.interfaces.backend import AttentionOptions
from kvpolicy.layer.held import DROPPED, EXACT, QUANTIZED
from kvpolicy.layer.view import View

FIELDS = ("l1", "l2", "exact_mass", "quantized_mass", "dropped_mass")


@dataclass(frozen=True)
class AttentionErrors:
    """What a run did to attention, layer by layer. None: a layer that was not, or can't be, watched."""

    layers: dict[str, list[float | None]]
    """For each of l1, l2, exact_mass, quantized_mass and dropped_mass a value per layer of the model."""
    means: dict[str, float | None]
    """Their means over the compressed layers; None if one of these can't be watched."""
    distances: Distances
    """Exact attention by distance."""


@dataclass
class _Sums:
    """Of one layer, over the queries of a run."""

    errors: Tensor
    """Sums of absolute and squared differences, and of absolute and squared exact outputs."""
    mass: Tensor
    """Attention on tokens that are exact, quantized, dropped."""


class _Call(NamedTuple):
    layer: int
    owner: int
    query: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    output: Tensor
    seen: int
    """Tokens that the queries may attend, their own included."""
    kept: Tensor
    """`LayerCache.exactness` of those before."""


class _Shadow:
    """All keys, or values, that a layer was given: a buffer with room to grow."""

    def __init__(self) -> None:
        self.length, self.buffer = 0, torch.empty(0, 0, 0, 0)

    def append(self, new: Tensor) -> None:
        length = self.length + new.shape[2]
        if length > self.buffer.shape[2]:
            grown = new.new_empty((*new.shape[:2], length + length // 8 + 64, new.shape[3]))
            if self.length:
                grown[:, :, : self.length] = self.tokens
            self.buffer = grown
        self.buffer[:, :, self.length : length] = new
        self.length = length

    @property
    def tokens(self) -> Tensor:
        return self.buffer[:, :, : self.length]


class Prefix(NamedTuple):
    """Keys and values that each layer was given, and the layers that can't be watched."""

    tokens: dict[int, tuple[Tensor, Tensor]]
    unwatched: frozenset[int]


@dataclass
class Watcher:
    """Watches the attention of an attached model while it runs with one cache, from its first token on.

    While the model runs, it only notes what passes. `result` computes everything at the end: neither within the time of
    a run, nor between two runs, where it would evict the model from the processor's caches.
    """

    cache: CompressedCache
    distances: Distances = field(default_factory=Distances)
    seconds: float = 0.0
    """Spent on notes, within runs of the model."""
    _shadows: dict[int, tuple[_Shadow, _Shadow]] = field(default_factory=dict)
    _sums: dict[int, _Sums] = field(default_factory=dict)
    _arriving: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _calls: list[_Call] = field(default_factory=list)
    _kept: dict[int, Tensor] = field(default_factory=dict)
    _unwatched: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        compressed = [(i, x) for i, x in enumerate(self.cache.layers) if isinstance(x, TieredLayer)]
        self._tiers = {i: layer.tiers for i, layer in compressed}
        self._owners = {id(tiers): i for i, tiers in self._tiers.items()}

    @contextmanager
    def update(self, measure: bool) -> Iterator[Callable[[], Any]]:
        """Around one run of the model, which happens within what is yielded.

        Args:
            measure: whether its queries count. What they read is kept in any case.
        """
        self.cache.commit()
        self._kept = self._exactness() if measure else {}
        try:
            yield self._watch
            for i, new in self._arriving.items():
                shadows = self._shadows.setdefault(i, (_Shadow(), _Shadow()))
                for shadow, x in zip(shadows, new, strict=True):
                    shadow.append(x)
        finally:
            self._arriving, self._kept = {}, {}

    def seen(self) -> Prefix:
        """What was seen until now, for `adopt`; nothing of it may change while the result is in use."""
        tokens = {i: (keys.tokens, values.tokens) for i, (keys, values) in self._shadows.items()}
        return Prefix({i: (k.clone(), v.clone()) for i, (k, v) in tokens.items()}, frozenset(self._unwatched))

    def adopt(self, prefix: Prefix) -> None:
        """Take what another watcher saw for what this one would have seen: the first tokens, exact in any cache."""
        self._unwatched |= prefix.unwatched
        for i, tokens in prefix.tokens.items():
            shadows = self._shadows.setdefault(i, (_Shadow(), _Shadow()))
            for shadow, x in zip(shadows, tokens, strict=True):
                shadow.append(x)

    def _exactness(self) -> dict[int, Tensor]:
        """How each layer keeps its tokens now; layers with equal answers share a tensor."""
        found: dict[int, Tensor] = {}
        for i, tiers in self._tiers.items():
            kept = torch.as_tensor(tiers.exactness())
            found[i] = next((other for other in found.values() if torch.equal(other, kept)), kept)
        return found

    @contextmanager
    def _watch(self) -> Iterator[None]:
        def note(*seen: Any) -> None:
            start = time.perf_counter()
            self._note(*seen)
            self.seconds += time.perf_counter() - start

        token = watching.set(note)
        try:
            yield
        finally:
            watching.reset(token)

    def _note(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
        output: Tensor,
    ) -> None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        owner = self._owners.get(id(key.tiers)) if isinstance(key, View) else layer
        if owner not in self._tiers or owner in self._unwatched:
            return
        assert owner is not None
        if isinstance(key, View):
            assert isinstance(value, View)
            self._arriving.setdefault(owner, (key.arriving, value.arriving))
        elif self._tiers[owner].densely:
            self._forget(owner)
            return
        elif owner not in self._arriving:
            known = self._shadows[owner][0].length if owner in self._shadows else 0
            # Copied, because what a cache decodes is overwritten by its next layer; at first nothing is decoded.
            new = key[:, :, known:], value[:, :, known:]
            self._arriving[owner] = (new[0].clone(), new[1].clone()) if known else new
        if owner in self._kept:
            seen = (self._shadows[owner][0].length if owner in self._shadows else 0) + self._arriving[owner][0].shape[2]
            self._calls.append(_Call(layer, owner, query, mask, options, output, seen, self._kept[owner]))

    def _forget(self, owner: int) -> None:
        """The model computes on what the cache returns: what it attends isn't what was stored."""
        self._unwatched.add(owner)
        self._shadows.pop(owner, None)
        self._arriving.pop(owner, None)
        self._calls = [call for call in self._calls if call.owner != owner]

    def _measure(self, call: _Call) -> None:
        keys, values = (shadow.tokens[:, :, : call.seen] for shadow in self._shadows[call.owner])
        exact, weights = exact_attention(call.query, keys, values, call.mask, call.options)
        off = call.output.float() - exact
        errors = _sum([off.abs(), off.square(), exact.abs(), exact.square()])
        by_token = weights.sum(2)
        kept = nn.functional.pad(call.kept, (0, call.seen - call.kept.shape[-1]), value=EXACT).to(by_token.device)
        mass = _sum([by_token * (kept == code) for code in (EXACT, QUANTIZED, DROPPED)])
        sums = self._sums.setdefault(call.layer, _Sums(torch.zeros_like(errors), torch.zeros_like(mass)))
        sums.errors += errors
        sums.mass += mass
        queries = call.query.shape[2]
        mean = weights.unflatten(2, (-1, queries)).mean((0, 1, 2))
        self.distances.profile(call.layer).add(mean.cpu().double().numpy())

    def result(self) -> AttentionErrors:
        """What was found in the runs measured; nothing of them is kept any longer."""
        for call in self._calls:
            self._measure(call)
        self._calls, self._shadows = [], {}
        found = {layer: _of_layer(sums) for layer, sums in self._sums.items()}
        count = max([len(self.cache.layers), *(layer + 1 for layer in found)])
        layers = {name: [found[i][name] if i in found else None for i in range(count)] for name in FIELDS}
        whole = bool(found) and all(i in found for i in self._tiers)
        means = {name: sum(x[name] for x in found.values()) / len(found) if whole else None for name in FIELDS}
        return AttentionErrors(layers, means, self.distances)


def exact_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attention of queries over exact keys and values, in float32.

    Args:
        query: `[batch, heads, queries, head_dim]`, of the newest tokens.
        keys: `[batch, kv_heads, tokens, head_dim]`.
        values: the same of values.
        mask: as `attend` takes it.
        options: what the model gives its attention function: of these scaling, softcap and s_aux count.

    Returns:
        The output `[batch, queries, heads, head_dim]`, and the attention `[batch, kv_heads, groups * queries, tokens]`;
        where a model has sinks of its own (`s_aux`), the rest of the attention is theirs.
    """
    queries, dim = query.shape[2:]
    scaling = options.get("scaling")
    asked = AttentionOptions(dim**-0.5 if scaling is None else scaling, options.get("softcap"), options.get("s_aux"))
    grouped = query.float().mul(asked.scaling).unflatten(1, (keys.shape[1], -1))
    scores = grouped.flatten(2, 3) @ keys.float().transpose(2, 3)
    shown = as_mask(mask, keys.shape[2], keys.shape[1])
    of_all = Queries(torch.arange(queries), queries, keys.shape[2] - queries)
    scores, divisor, _ = weights(scores, only_new(keys), shown, asked, of_all)
    if divisor is not None:
        scores.div_(divisor)
    output = (scores @ values.float()).unflatten(2, (grouped.shape[2], queries))
    return output.flatten(1, 2).transpose(1, 2), scores


def _sum(parts: list[Tensor]) -> Tensor:
    """The sum of each, in float64 on the CPU: not every device has that type."""
    return torch.stack([x.sum() for x in parts]).cpu().double()


def _of_layer(sums: _Sums) -> dict[str, float]:
    l1, l2, exact_l1, exact_l2 = sums.errors.tolist()
    exact, quantized, dropped = (sums.mass / sums.mass.sum()).tolist()
    return {
        "l1": l1 / exact_l1 if l1 else 0.0,
        "l2": (l2 / exact_l2) ** 0.5 if l2 else 0.0,
        "exact_mass": exact,
        "quantized_mass": quantized,
        "dropped_mass": dropped,
    }
