"""Plugins that misbehave, each in one way, and what is to notice it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kvpolicy import Affine, AffineQuantizer, Policy, RankPolicy, Scores, TensorQuantizer
from kvpolicy.interfaces.component import Component
from kvpolicy.interfaces.policy import NEVER

__all__ = ["LIARS", "Good", "GoodPolicy", "GoodRank", "GoodTensors", "Liar"]


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


class GoodTensors(TensorQuantizer):
    """Keeps float16 numbers and a float32 sum."""

    kind: str = "liar"

    def precision(self) -> float:
        return 12.0

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        return {"half": x.half(), "sum": x.float().sum(3)}

    def decode(self, encoded: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return encoded["half"].to(dtype)


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


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def lying(base: type[Any], run: str, **methods: Any) -> Liar:
    """`base` with some methods or options replaced."""
    plain = {name: value for name, value in methods.items() if not callable(value) and name != "acts"}
    namespace = {"__module__": __name__, "__annotations__": dict.fromkeys(plain, Any), **methods}
    return Liar(base, lambda: type(base.__name__, (base,), dict(namespace))(), run)


def _mutate(x: Any) -> None:
    x[..., :1] += 1


def _with(result: Callable[[Any], Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose result is changed."""
    return lambda self, *args: result(method(self, *args))


def _after(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that first writes to its arguments."""

    def changed(self: Any, *args: Any) -> Any:
        for arg in args:
            for x in arg.values() if isinstance(arg, dict) else [arg]:
                if isinstance(x, Tensor | np.ndarray):
                    _mutate(x)
        return method(self, *args)

    return changed


def _counted(choose: Callable[[int], Any]) -> Any:
    """What changes from call to call."""
    count = itertools.count()
    return lambda *_: choose(next(count))


def _tensors() -> dict[str, Liar]:
    encode, decode, base = GoodTensors.encode, GoodTensors.decode, GoodTensors
    calls = itertools.count()

    def encoded(change: Callable[[dict[str, Tensor]], Any]) -> Any:
        return _with(change, encode)

    def given(change: Callable[[Tensor], Any]) -> Any:
        return _with(change, decode)

    named, must = r"must give named tensors from encode", r"must give tensors \[batch, kv_heads, tokens, \.\.\.\]"
    back, same = (
        r"must give \(1, [12], \d+, \d+\) in torch\.\w+ on cpu from decode",
        "must give the same tensors each time",
    )
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "encode gives a list": (named, {"encode": encoded(lambda e: list(e.values()))}),
        "encode gives nothing": (named, {"encode": encoded(lambda e: {})}),
        "encode gives None": (named, {"encode": encoded(lambda e: None)}),
        "encode names by numbers": (named, {"encode": encoded(lambda e: dict(enumerate(e.values())))}),
        "encode gives arrays": (must, {"encode": encoded(lambda e: {k: v.numpy() for k, v in e.items()})}),
        "encode is one token short": (must, {"encode": encoded(lambda e: {"half": e["half"][:, :, 1:]})}),
        "encode sums tokens": (must, {"encode": encoded(lambda e: {"half": e["half"].sum(2)})}),
        "encode gives sparse": (must, {"encode": encoded(lambda e: {"half": e["half"].to_sparse()})}),
        "encode elsewhere": (must, {"encode": encoded(lambda e: {"half": e["half"].to("meta")})}),
        "encode names anew": (same, {"encode": encoded(lambda e: {**e, f"x{next(calls)}": e["sum"]})}),
        "encode types anew": (
            same,
            {"encode": encoded(lambda e: {**e, "x": e["sum"].to((torch.float64, torch.float32)[next(calls) % 2])})},
        ),
        "encode shapes anew": (
            same,
            {"encode": encoded(lambda e: {**e, "x": e["sum"][..., None].expand(-1, -1, -1, next(calls) % 3)})},
        ),
        "encode raises": ("encode must not fail, found KeyError: 'x'", {"encode": raising(KeyError("x"))}),
        "encode writes": ("must not change the tensor that encode is given", {"encode": _after(encode)}),
        "decode is one token short": (back, {"decode": given(lambda x: x[:, :, 1:])}),
        "decode has its own type": (back, {"decode": given(lambda x: x.double())}),
        "decode is always float32": ("", {"decode": given(lambda x: x.float())}),
        "decode flattens": (back, {"decode": given(lambda x: x.flatten(1, 2))}),
        "decode is one channel short": (back, {"decode": given(lambda x: x[..., 1:])}),
        "decode elsewhere": (back, {"decode": given(lambda x: x.to("meta"))}),
        "decode gives None": (back, {"decode": given(lambda x: None)}),
        "decode gives an array": (back, {"decode": given(lambda x: x.float().numpy())}),
        "decode raises": ("decode must not fail, found RuntimeError", {"decode": raising(RuntimeError("no"))}),
        "decode writes": ("must not change the tensors that decode is given", {"decode": _after(decode)}),
        "decode sees neighbours": ("", {"decode": given(lambda x: x + 0.01 * x.mean(2, keepdim=True))}),
        "decode is random": ("", {"decode": given(lambda x: x + 1e-3 * torch.rand_like(x))}),
        "decode gives nan": ("", {"decode": given(lambda x: x * torch.nan)}),
        "decode is far off": ("", {"decode": given(lambda x: x * -1)}),
    }
    return {name: lying(base, run, **methods) for name, (run, methods) in cases.items()}


def _affine() -> dict[str, Liar]:
    calibrate = Good.calibrate

    def given(change: Callable[[Affine], Any]) -> Any:
        return {"calibrate": _with(change, calibrate)}

    must, types = r"must give codes \(.*\) and scale and offset", "must give codes as uint8"
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "codes beyond nbits": ("must give codes below 16", given(lambda a: a._replace(codes=a.codes + 1))),
        "codes of int64": (types, given(lambda a: a._replace(codes=a.codes.long()))),
        "scale in float16": (types, given(lambda a: a._replace(scale=a.scale.half()))),
        "offset in float64": (types, given(lambda a: a._replace(offset=a.offset.double()))),
        "scale without its last axis": (must, given(lambda a: a._replace(scale=a.scale[:, 0]))),
        "codes one short": (must, given(lambda a: a._replace(codes=a.codes[:, 1:]))),
        "two of three": (must, given(lambda a: tuple(a)[:2])),
        "None": (must, given(lambda a: None)),
        "arrays": (must, given(lambda a: tuple(x.numpy() for x in a))),
        "elsewhere": ("must stay on cpu", given(lambda a: Affine(*(x.to("meta") for x in a)))),
        "calibrate raises": (
            "calibrate must not fail, found IndexError",
            {"calibrate": raising(IndexError("list index out of range"))},
        ),
        "calibrate writes": ("must not change the groups", {"calibrate": _after(calibrate)}),
        "scales of nan": ("", given(lambda a: a._replace(scale=a.scale * torch.nan))),
        "random codes": ("", given(lambda a: a._replace(codes=torch.randint_like(a.codes, 2)))),
        "scale for offset": ("", given(lambda a: Affine(a.codes, a.offset, a.scale))),
        "a range for all": (
            "",
            {"calibrate": lambda self, groups: calibrate(self, groups - groups.mean() + groups.mean())},
        ),
        "nbits of 5": ("must have nbits 1, 2, 3, 4 or 8", {"nbits": 5}),
        "nbits of true": ("must have nbits 1, 2, 3, 4 or 8", {"nbits": True}),
        "per row": ("per token or channel", {"per": "row"}),
        "groups of 0": ("a group_size that is a number", {"group_size": 0}),
    }
    bits = "must give its precision as a number of bits above 0 and up to 64"
    for number, found in enumerate([float("nan"), -1.0, 0, "four", True, float("inf"), None, 10**400]):
        cases[f"precision {number}"] = (bits, {"precision": lambda self, found=found: found})
    cases["precision raises"] = ("precision must not fail", {"precision": raising(ZeroDivisionError())})
    cases["precision changes"] = ("", {"precision": _counted(lambda n: 2.0 + n)})
    cases["check answers"] = ("must refuse by a RecipeError", {"check": lambda self, head_dim: False})
    cases["check raises"] = ("check must not fail, found KeyError", {"check": raising(KeyError(3))})
    return {name: lying(Good, run, **methods) for name, (run, methods) in cases.items()}


def _policies() -> dict[str, Liar]:
    keep, mask = GoodPolicy.keep, "keep must return a NumPy array of bool"
    departures = Policy.departures
    array = "departures must return a NumPy array of integers"
    late = r"must leave then or later, after \d+ and by \d+ or NEVER"
    count = "capacity must return an integer, 0 or more"
    rng = np.random.default_rng(0)

    def held(self: Any, positions: Any, seen: int) -> Any:
        return keep(self, positions, seen) | (positions == 0)

    def given(change: Callable[[Any], Any], method: Any = keep) -> Any:
        return _with(change, method)

    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "keep gives a list": (mask, {"keep": given(lambda m: m.tolist())}),
        "keep gives numbers": (mask, {"keep": given(lambda m: m.astype(np.int64))}),
        "keep gives indices": (mask, {"keep": given(np.flatnonzero)}),
        "keep lets go of more than there are": (mask, {"keep": given(lambda m: np.append(m, False))}),
        "keep gives a tensor": (mask, {"keep": given(lambda m: torch.tensor(m))}),
        "keep gives None": (mask, {"keep": given(lambda m: None)}),
        "keep raises": ("keep must not fail, found KeyError", {"keep": raising(KeyError("budget"))}),
        "keep raises StopIteration": ("keep must not fail, found StopIter", {"keep": raising(StopIteration())}),
        "keep counts its calls": ("", {"keep": _toggling(keep)}),
        "keep is random": ("", {"keep": given(lambda m: m & (rng.random(m.shape) < 0.9))}),
        "keep writes": ("", {"keep": _writing(keep)}),
        "capacity lies": ("", {"capacity": lambda self, seen: 100}),
        "capacity is negative": (count, {"capacity": lambda self, seen: -1}),
        "capacity is a fraction": (count, {"capacity": lambda self, seen: 0.5}),
        "capacity is nan": (count, {"capacity": lambda self, seen: float("nan")}),
        "capacity is a word": (count, {"capacity": lambda self, seen: "all"}),
        "capacity is true": (count, {"capacity": lambda self, seen: True}),
        "capacity raises": ("capacity must not fail, found Zero", {"capacity": raising(ZeroDivisionError())}),
        "departures disagree": (
            "",
            {"departures": lambda self, p, a, start, stop: np.where(p < stop - 9, np.maximum(a, stop), NEVER)},
        ),
        "departures in the past": (late, {"departures": given(lambda d: d * 0, departures)}),
        "departures before arrival": (
            late,
            {"departures": lambda self, p, a, start, stop: np.full_like(p, start + 1)},
        ),
        "departures in the future": (late, {"departures": lambda self, p, a, start, stop: a + stop + 1}),
        "departures of other tokens": (array, {"departures": given(lambda d: np.append(d, 1), departures)}),
        "departures of floats": (array, {"departures": given(lambda d: d.astype(float), departures)}),
        "departures of nothing": (array, {"departures": given(lambda d: None, departures)}),
        "departures raise": ("departures must not fail", {"departures": raising(TypeError("no"))}),
        "departures write": ("departures must not fail, found ValueError", {"departures": _after(departures)}),
        "arrival is no truth": ("", {"keep": held, "acts": "arrival"}),
        "acts sometimes": ("acts must be arrival or step", {"acts": "sometimes"}),
    }
    return {name: lying(GoodPolicy, run, **methods) for name, (run, methods) in cases.items()}


def _toggling(method: Callable[..., Any]) -> Any:
    count = itertools.count()

    def keep(self: Any, positions: Any, seen: int) -> Any:
        return method(self, positions, seen + next(count) % 2)

    return keep


def _writing(method: Callable[..., Any]) -> Any:
    def keep(self: Any, positions: Any, seen: int) -> Any:
        stays = method(self, positions, seen)
        positions[:1] = 0
        return stays

    return keep


def _ranks() -> dict[str, Liar]:
    rank, count = RankPolicy.rank, "budget_tokens must return an integer, 0 or more"
    must, floats = "scores must return kvpolicy.Scores", "rank must return a float tensor"

    def given(change: Callable[[Tensor], Any]) -> Any:
        return {"rank": _with(change, rank)}

    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "budget raises": ("budget_tokens must not fail", {"budget_tokens": raising(AttributeError("n"))}),
        "budget falls": ("", {"budget_tokens": lambda self, seen, prompt: max(0, 50 - seen)}),
        "scores of a mapping": (must, {"scores": lambda self: {"queries": "all"}}),
        "scores of nothing": (must, {"scores": lambda self: None}),
        "scores of bananas": ("queries must be one of 'all'", {"scores": lambda self: Scores(queries="bananas")}),  # type: ignore[arg-type]
        "scores raise": ("scores must not fail", {"scores": raising(NameError("x"))}),
        "scores change": ("", {"scores": _counted(lambda n: Scores(seed=n))}),
        "rank of nan": ("", given(lambda x: x * torch.nan)),
        "rank of integers": (floats, given(lambda x: x.long())),
        "rank one token short": (floats, given(lambda x: x[..., 1:])),
        "rank of a head": (floats, given(lambda x: x[:, 0])),
        "rank of nothing": (floats, given(lambda x: None)),
        "rank of an array": (floats, given(lambda x: x.numpy())),
        "rank elsewhere": ("rank must return a tensor on cpu", given(lambda x: x.to("meta"))),
        "rank raises": ("rank must not fail", {"rank": raising(RuntimeError("shape"))}),
        "rank writes": ("leave its arguments as they", {"rank": _after(rank)}),
        "rank by order": ("", given(lambda x: torch.arange(x.shape[2]).expand(x.shape).float())),
        "every 0 tokens": ("every must be an integer, 1 or more", {"every": 0}),
        "share by row": ("share must be one of head, layer, model", {"share": "row"}),
    }
    for number, found in enumerate([-1, 2.5, float("nan"), "six", None, True, torch.tensor(3), [6]]):
        cases[f"budget {number}"] = (count, {"budget_tokens": lambda self, seen, prompt, found=found: found})
    return {name: lying(GoodRank, run, **methods) for name, (run, methods) in cases.items()}


LIARS: dict[str, Liar] = {**_tensors(), **_affine(), **_policies(), **_ranks()}
