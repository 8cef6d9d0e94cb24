"""Plugins that behave, and how to make one misbehave in one way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kvpolicy import (
    Affine,
    AffineQuantizer,
    Backend,
    Extra,
    Merger,
    Policy,
    RankPolicy,
    Reader,
    Scores,
    TensorQuantizer,
    Transform,
)
from kvpolicy.interfaces.component import Component

__all__ = [
    "Good",
    "GoodBackend",
    "GoodExtra",
    "GoodMerger",
    "GoodPolicy",
    "GoodRank",
    "GoodReader",
    "GoodTensors",
    "GoodTransform",
    "Liar",
    "changing",
    "counted",
    "lying",
    "raising",
    "writing_first",
]


class Liar(NamedTuple):
    """A plugin that misbehaves."""

    base: type[Component]
    make: Callable[[], Component]
    run: str
    """What the `PluginError` at run time says, or nothing where only the contract suite notices."""


class Good(AffineQuantizer):
    """Rounds to the nearest, as it should be."""

    kind: str = "liar"

    def calibrate(self, groups: Tensor) -> Affine:
        x, levels = groups.float(), 2**self.nbits - 1
        low, high = torch.aminmax(x, dim=1, keepdim=True)
        scale = (high - low) / levels
        codes = ((x - low) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, levels).nan_to_num(0)
        return Affine(codes.to(torch.uint8), scale, low)


class GoodBackend(Backend):
    """Observes prompts, and codes what has levels between extremes of a token's groups."""

    kind: str = "liar"
    watches: ClassVar[bool] = True

    def refuses(self, spec: Any) -> str | None:
        return "it observes and codes"

    def attend(self, query: Tensor, part: Any, mask: Tensor | None, options: Any) -> Any:
        raise AssertionError

    def observe(self, query: Tensor, keys: Tensor, mask: Tensor | None, options: Any) -> bool:
        observer, tokens = options.observer, keys.shape[2]
        if not observer.sums:
            return False
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None] if mask is None else mask
        scores = query.float().unflatten(1, (keys.shape[1], -1)) @ keys.float().unsqueeze(2).transpose(3, 4)
        scores *= options.scaling
        scores = scores if options.softcap is None else (scores / options.softcap).tanh() * options.softcap
        weights = scores.masked_fill(~seen.unsqueeze(2), -torch.inf).softmax(-1).nan_to_num(0.0)
        for k, counted in enumerate(observer.counted.masks):
            share = counted.float()[:, None, :, None]
            summed = (weights * share.unsqueeze(2)).sum((2, 3))
            observer.add_sums(k, summed, (seen * share).sum(2), query.shape[1] // keys.shape[1])
        return True

    def encodes(self, encoding: Any) -> bool:
        known = (
            encoding.rounding.by == "extremes" and not encoding.rounding.symmetric and encoding.nbits in (1, 2, 4, 8)
        )
        return (
            known
            and not (encoding.by_channel or encoding.rotated or encoding.divided)
            and encoding.kept != torch.float8_e4m3fn
        )

    def encode(self, encoding: Any, pieces: Any) -> None:
        most, planes = 2**encoding.nbits - 1, 8 // encoding.nbits
        for x, codes, params in pieces:
            groups = x.float().unflatten(3, (-1, encoding.group))
            low, high = torch.aminmax(groups, dim=4, keepdim=True)
            scale = (high - low) / most
            found = ((groups - low) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, most).nan_to_num(0)
            parts = found.to(torch.uint8).flatten(3).unflatten(3, (planes, -1)).unbind(3)
            codes.copy_(sum(part << encoding.nbits * i for i, part in enumerate(parts)))
            params.copy_(torch.cat([scale, low], dim=3).squeeze(4))


class GoodTensors(TensorQuantizer):
    """Keeps float16 numbers and a float32 sum."""

    kind: str = "liar"

    def precision(self) -> float:
        return 12.0

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"half": x.half(), "sum": x.float().sum(3)}

    def decode(self, encoded: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return encoded["half"].to(dtype)

    def scores(self, rows: Tensor, encoded: dict[str, Tensor]) -> Tensor:
        return rows @ encoded["half"].to(rows.dtype).transpose(2, 3)

    def combine(self, weights: Tensor, encoded: dict[str, Tensor]) -> Tensor:
        return weights @ encoded["half"].to(weights.dtype)


class GoodPolicy(Policy):
    """Keeps the newest tokens."""

    kind: str = "liar"
    n: int = Field(5, ge=1, description="Tokens.")

    def keep(self, positions: Any, seen: int) -> Any:
        return positions >= seen - self.n

    def capacity(self, seen: int) -> int:
        return 0


class GoodRank(RankPolicy):
    """Keeps the tokens with the most attention."""

    kind: str = "liar"

    def scores(self) -> Scores:
        return Scores()

    def budget_tokens(self, seen: int, prompt: int) -> int:
        return 6


class GoodTransform(Transform):
    """Divides each channel by what it was on average."""

    kind: str = "liar"

    def fit(self, x: Tensor, queries: Any, site: Any) -> dict[str, Tensor]:
        return {"sizes": x.abs().mean(2, keepdim=True).clamp(min=0.5)}

    def forward(self, x: Tensor, state: Any, positions: Any) -> Tensor:
        return x / state["sizes"].to(x.dtype)

    def inverse(self, y: Tensor, state: Any, positions: Any) -> Tensor:
        return y * state["sizes"].to(y.dtype)

    def adjoint(self, q: Tensor, state: Any) -> Any:
        return q * state["sizes"].to(q.dtype)


class GoodReader(Reader):
    """Reads the pages whose mean key is nearest."""

    kind: str = "liar"
    page: int = 8
    budget: int = 16

    def count(self) -> Any:
        return Reader.count(self)

    def summarize(self, keys: Tensor, real: Tensor, site: Any) -> Any:
        return {"mean": keys.float().sum(3) / real.sum(3).clamp(min=1).unsqueeze(3)}

    def score(self, query: Tensor, summary: Any, site: Any) -> Any:
        return query @ summary["mean"].transpose(2, 3)


class GoodMerger(Merger):
    """Adds a dropped value to all that stay, in equal parts."""

    kind: str = "liar"

    def shares(self, gone: Any, kept: Any, site: Any) -> Any:
        real = (kept.positions >= 0).float().unsqueeze(2)
        return (real / real.sum(3, keepdim=True).clamp(min=1)).expand(-1, -1, gone.positions.shape[2], -1)


class GoodExtra(Extra):
    """Takes the first channel away, and adds the mean error of each token."""

    kind: str = "liar"
    axes: ClassVar[Any] = {"mean": "token"}
    additive: ClassVar[bool] = True

    def take(self, x: Tensor, grouping: Any, site: Any) -> Any:
        return torch.cat([x[..., :1] * 0, x[..., 1:]], dim=3), {"first": x[..., 0].clone()}

    def fit(self, error: Tensor, grouping: Any, site: Any) -> Any:
        return {"mean": error.mean(3, keepdim=True)}

    def add(self, out: Tensor, parts: Any) -> Any:
        out += parts.get("mean", 0.0)
        out[..., 0] += parts["first"].to(out.dtype)

    def add_scores(self, rows: Tensor, out: Tensor, parts: Any) -> Any:
        return Extra.add_scores(self, rows, out, parts)

    def add_values(self, weights: Tensor, out: Tensor, parts: Any) -> Any:
        return Extra.add_values(self, weights, out, parts)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def lying(base: type[Any], run: str, **methods: Any) -> Liar:
    """`base` with some methods or options replaced."""
    plain = {name: value for name, value in methods.items() if not callable(value) and name not in ("acts", "axes")}
    namespace = {"__module__": __name__, "__annotations__": dict.fromkeys(plain, Any), **methods}
    return Liar(base, lambda: type(base.__name__, (base,), dict(namespace))(), run)


def _mutate(x: Any) -> None:
    x[..., :1] += 1


def changing(result: Callable[[Any], Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose result is changed."""
    return lambda self, *args: result(method(self, *args))


def writing_first(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that first writes to its arguments."""

    def changed(self: Any, *args: Any) -> Any:
        for arg in args:
            for x in arg.values() if isinstance(arg, dict) else [arg]:
                if isinstance(x, Tensor | np.ndarray):
                    _mutate(x)
        return method(self, *args)

    return changed


def counted(choose: Callable[[int], Any]) -> Any:
    """What changes from call to call."""
    count = itertools.count()
    return lambda *_: choose(next(count))
