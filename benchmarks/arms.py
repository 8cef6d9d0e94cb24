"""What the benchmarks of a cache share: the layer's shape, the caches that take turns, and how they are timed."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, QuantizedCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvpolicy import make_cache
from kvpolicy.hf.attach import attention_forward

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
RESIDUAL = 128
SLICE = 10
"""Steps that a cache takes before the next one has its turn."""
SLOW_STEPS = 16
"""Steps of a slow peer around a flush: HQQ's runs an optimiser over the whole cache."""
DYNAMIC, PACKED = "DynamicCache", "DynamicCache, packed heads"
QUANTO, HQQ = "QuantizedCache quanto", "QuantizedCache HQQ"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Module:
    """What the attention functions ask of a layer of the model."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True
    layer_idx = 0


MODULE = Module()


def config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        intermediate_size=HEAD_DIM,
    )


def data(tokens: int, seed: int, batch: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    shape = (2, batch, KV_HEADS, tokens, HEAD_DIM)
    keys, values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return keys, values


def clock(device: torch.device) -> float:
    """Seconds: of the processor with one thread, so that a busy machine may be measured on too; else of the wall."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


def machine(device: str) -> str:
    """Versions, and what measures and computes."""

    def found(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"no {name}"

    packages = ", ".join(map(found, ("kvpolicy", "torch", "transformers", "optimum-quanto", "hqq")))
    threads = f"{n} threads, wall time" if (n := torch.get_num_threads()) > 1 else "1 thread, processor time"
    where = f"{torch.cuda.get_device_name()}, wall time" if device == "cuda" else f"CPU, {threads}"
    return f"{packages}, Python {platform.python_version()}; {where}"


def held_bytes(thing: Any) -> int:
    """Bytes of all tensors inside a peer's layer, wrapper tensors opened."""
    if isinstance(thing, Tensor):
        if hasattr(thing, "__tensor_flatten__"):
            return sum(held_bytes(getattr(thing, name)) for name in thing.__tensor_flatten__()[0])
        return thing.numel() * thing.element_size()
    if isinstance(thing, dict):
        return sum(map(held_bytes, thing.values()))
    return sum(map(held_bytes, thing)) if isinstance(thing, (list, tuple)) else 0


class Arm:
    """A cache being timed: its update, and with `attend` the attention of one query as well."""

    steps: int | None = None
    attention: Any = staticmethod(sdpa_attention_forward)

    def __init__(self, name: str, make: Callable[[], Any], prompt: tuple[Tensor, Tensor], attend: bool = False) -> None:
        self.name, self.cache = name, make()
        self.layer = self.cache.layers[0]
        self.batch, self.device = prompt[0].shape[0], prompt[0].device
        query = torch.randn(self.batch, HEADS, 1, HEAD_DIM, generator=torch.Generator().manual_seed(2))
        self.query = query.to(prompt[0]) if attend else None
        self.seconds: list[float] = []
        self.cache.update(*prompt, 0)

    def step(self, keys: Tensor, values: Tensor) -> None:
        start = clock(self.device)
        found = self.cache.update(keys, values, 0)
        if self.query is not None:
            found = self.attention(MODULE, self.query, *found, None, scaling=HEAD_DIM**-0.5)
        self.seconds.append(clock(self.device) - start)
        del found  # freed outside the time

    def mean(self) -> float:
        """Milliseconds per step of the run that ends here."""
        mean, self.seconds = statistics.fmean(self.seconds) * 1e3, []
        return mean

    def bits(self) -> float:
        seen: int = self.layer.get_seq_length()
        numbers = 2 * seen * KV_HEADS * HEAD_DIM * self.batch
        return 8 * held_bytes(vars(self.layer)) / numbers

    def scratch(self) -> float:
        return 0.0


def packed_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float) -> Tensor:
    """SDPA with the query heads of a key-value head as queries of one head, so that no key is repeated."""
    packed = query.view(query.shape[0], KV_HEADS, -1, query.shape[3])
    return torch.nn.functional.scaled_dot_product_attention(packed, key, value, scale=scaling).reshape(query.shape)


class Packed(Arm):
    attention = staticmethod(packed_attention)


class Ours(Arm):
    attention = staticmethod(partial(attention_forward, "sdpa"))

    def __init__(self, name: str, make: Callable[[], Any], prompt: tuple[Tensor, Tensor], attend: bool = False) -> None:
        super().__init__(name, make, prompt, attend)
        self.layer.attached = attend

    def bits(self) -> float:
        return float(self.cache.memory().bits_per_value)

    def scratch(self) -> float:
        return float(self.cache.scratch.bytes) / 1e6


class Store(Ours):
    """Storing and descending alone."""

    def step(self, keys: Tensor, values: Tensor) -> None:
        start = clock(self.device)
        self.layer.tiers.add(keys, values)
        self.seconds.append(clock(self.device) - start)


class Slow(Arm):
    """A peer timed over fewer steps: those around a flush, the flush weighted as often as it comes."""

    steps = SLOW_STEPS

    def mean(self) -> float:
        flush, rest = max(self.seconds), sorted(self.seconds)[:-1]
        self.seconds = []
        return (flush + (RESIDUAL - 1) * statistics.fmean(rest)) / RESIDUAL * 1e3

    def approach(self, keys: Tensor, values: Tensor) -> None:
        """Fill the residual up to half a window before its flush, in one update."""
        held = self.layer.keys.shape[-2] if self.layer.keys.dim() == 4 else 0
        n = RESIDUAL - SLOW_STEPS // 2 - held
        self.cache.update(keys[:, :, :n], values[:, :, :n], 0)


def ours(recipe: str, nbits: int) -> Callable[[], Any]:
    return partial(make_cache, recipe, config(), nbits=nbits)


def peers(names: Sequence[str], nbits: int, prompt: tuple[Tensor, Tensor], attend: bool) -> list[Arm]:
    """The caches of transformers; those that quantize do so with `nbits`."""
    found: list[Arm] = []
    quantized = partial(QuantizedCache, config=config(), nbits=nbits, residual_length=RESIDUAL, q_group_size=64)
    if "dynamic" in names:
        found.append(Arm(DYNAMIC, partial(DynamicCache, config=config()), prompt, attend))
    if "packed" in names and attend:
        found.append(Packed(PACKED, partial(DynamicCache, config=config()), prompt, attend))
    if "quanto" in names:
        found.append(Arm(QUANTO, partial(quantized, "quanto"), prompt, attend))
    if "hqq" in names:
        found.append(Slow(HQQ, partial(quantized, "hqq"), prompt, attend))
    return found


def turns(arms: Sequence[Arm], steps: int, feed: tuple[Tensor, Tensor]) -> None:
    """Let the caches take `steps` steps each, a few at a time in turn."""
    keys, values = feed
    for slow in (arm for arm in arms if isinstance(arm, Slow)):
        slow.approach(keys, values)
    for first in range(0, steps, SLICE):
        for arm in arms:
            last = min(first + SLICE, arm.steps or steps)
            for i in range(first, last):
                arm.step(keys[:, :, i : i + 1], values[:, :, i : i + 1])
