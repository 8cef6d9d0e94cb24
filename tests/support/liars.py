"""Plugins that misbehave, each in one way, and what is to notice it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from honest import (
    Good,
    GoodExtra,
    GoodPolicy,
    GoodRank,
    GoodTensors,
    GoodTransform,
    Liar,
    changing,
    counted,
    lying,
    raising,
    writing_first,
)
from reader_liars import MERGERS, READERS
from torch import Tensor

from kvpolicy import Affine, Policy, RankPolicy, Scores
from kvpolicy.interfaces.policy import NEVER

__all__ = ["LIARS"]


def _tensors() -> dict[str, Liar]:
    encode, decode, base = GoodTensors.encode, GoodTensors.decode, GoodTensors
    calls = itertools.count()

    def encoded(change: Callable[[dict[str, Tensor]], Any]) -> Any:
        return changing(change, encode)

    def given(change: Callable[[Tensor], Any]) -> Any:
        return changing(change, decode)

    named, must = r"must give named tensors from encode", r"must give tensors \[batch, kv_heads, tokens, \.\.\.\]"
    back = r"must give \(1, [12], \d+, \d+\) in torch\.\w+ on cpu from decode"
    same = "must give the same tensors each time"
    product = r"must give .* in torch.float32 on cpu from scores"
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
        "encode writes": ("must not change the tensor that encode is given", {"encode": writing_first(encode)}),
        "decode is one token short": (back, {"decode": given(lambda x: x[:, :, 1:])}),
        "decode has its own type": (back, {"decode": given(lambda x: x.double())}),
        "decode is always float32": ("", {"decode": given(lambda x: x.float())}),
        "decode flattens": (back, {"decode": given(lambda x: x.flatten(1, 2))}),
        "decode is one channel short": (back, {"decode": given(lambda x: x[..., 1:])}),
        "decode elsewhere": (back, {"decode": given(lambda x: x.to("meta"))}),
        "decode gives None": (back, {"decode": given(lambda x: None)}),
        "decode gives an array": (back, {"decode": given(lambda x: x.float().numpy())}),
        "decode raises": ("decode must not fail, found RuntimeError", {"decode": raising(RuntimeError("no"))}),
        "decode writes": ("must not change the tensors that decode is given", {"decode": writing_first(decode)}),
        "decode sees neighbours": ("", {"decode": given(lambda x: x + 0.01 * x.mean(2, keepdim=True))}),
        "decode is random": ("", {"decode": given(lambda x: x + 1e-3 * torch.rand_like(x))}),
        "decode gives nan": ("", {"decode": given(lambda x: x * torch.nan)}),
        "decode is far off": ("", {"decode": given(lambda x: x * -1)}),
        "scores is one token short": (product, {"scores": changing(lambda x: x[..., 1:], base.scores)}),
        "scores in float64": (product, {"scores": changing(lambda x: x.double(), base.scores)}),
        "scores gives None": (product, {"scores": changing(lambda x: None, base.scores)}),
        "scores of others": ("", {"scores": changing(lambda x: x * 1.1, base.scores)}),
        "scores raises": ("scores must not fail, found IndexError", {"scores": raising(IndexError("far"))}),
        "scores writes": ("must not change what scores is given", {"scores": writing_first(base.scores)}),
        "combine is one channel short": (
            r"must give .* in torch.float32 on cpu from combine",
            {"combine": changing(lambda x: x[..., 1:], base.combine)},
        ),
        "combine is of others": ("", {"combine": changing(lambda x: x + 1, base.combine)}),
        "combine writes": ("must not change what combine is given", {"combine": writing_first(base.combine)}),
    }
    return {name: lying(base, run, **methods) for name, (run, methods) in cases.items()}


def _affine() -> dict[str, Liar]:
    calibrate = Good.calibrate

    def given(change: Callable[[Affine], Any]) -> Any:
        return {"calibrate": changing(change, calibrate)}

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
        "calibrate writes": ("must not change the groups", {"calibrate": writing_first(calibrate)}),
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
    cases["precision changes"] = ("", {"precision": counted(lambda n: 2.0 + n)})
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

    def given(change: Callable[[Any], Any], method: Any = keep) -> Any:
        return changing(change, method)

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
        "departures write": ("departures must not fail, found ValueError", {"departures": writing_first(departures)}),
        "arrival is no truth": ("", {"keep": lambda self, p, seen: keep(self, p, seen) | (p == 0), "acts": "arrival"}),
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
        return {"rank": changing(change, rank)}

    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "budget raises": ("budget_tokens must not fail", {"budget_tokens": raising(AttributeError("n"))}),
        "budget falls": ("", {"budget_tokens": lambda self, seen, prompt: max(0, 50 - seen)}),
        "scores of a mapping": (must, {"scores": lambda self: {"queries": "all"}}),
        "scores of nothing": (must, {"scores": lambda self: None}),
        "scores of bananas": ("queries must be one of 'all'", {"scores": lambda self: Scores(queries="bananas")}),  # type: ignore[arg-type]
        "scores raise": ("scores must not fail", {"scores": raising(NameError("x"))}),
        "scores change": ("", {"scores": counted(lambda n: Scores(seed=n))}),
        "rank of nan": ("", given(lambda x: x * torch.nan)),
        "rank of integers": (floats, given(lambda x: x.long())),
        "rank one token short": (floats, given(lambda x: x[..., 1:])),
        "rank of a head": (floats, given(lambda x: x[:, 0])),
        "rank of nothing": (floats, given(lambda x: None)),
        "rank of an array": (floats, given(lambda x: x.numpy())),
        "rank elsewhere": ("rank must return a tensor on cpu", given(lambda x: x.to("meta"))),
        "rank raises": ("rank must not fail", {"rank": raising(RuntimeError("shape"))}),
        "rank writes": ("leave its arguments as they", {"rank": writing_first(rank)}),
        "rank by order": ("", given(lambda x: torch.arange(x.shape[2]).expand(x.shape).float())),
        "every 0 tokens": ("every must be an integer, 1 or more", {"every": 0}),
        "share by row": ("share must be one of head, layer, model", {"share": "row"}),
    }
    for number, found in enumerate([-1, 2.5, float("nan"), "six", None, True, torch.tensor(3), [6]]):
        cases[f"budget {number}"] = (count, {"budget_tokens": lambda self, seen, prompt, found=found: found})
    return {name: lying(GoodRank, run, **methods) for name, (run, methods) in cases.items()}


def _transforms() -> dict[str, Liar]:
    fit, forward, inverse, adjoint = (getattr(GoodTransform, n) for n in ("fit", "forward", "inverse", "adjoint"))
    kept = "must keep nothing per token, and the same of any tokens"
    given = "must give .* from"

    def nan(x: Tensor) -> Tensor:
        return torch.where(x.abs() > 1, torch.nan, x)

    def kept_as(change: Callable[[Tensor], Any]) -> Any:
        return changing(lambda state: {"sizes": change(state["sizes"])}, fit)

    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "forward gives nan": ("", {"forward": changing(nan, forward)}),
        "needs more than it says": ("must give some of its needs", {"needed": lambda self: frozenset({"positions"})}),
        "forward gives inf": ("", {"forward": changing(lambda x: x / 0.0, forward)}),
        "forward of zeros gives nan": ("", {"fit": lambda self, x, q, site: {"sizes": x.abs().mean(2, keepdim=True)}}),
        "inverse gives nan": ("", {"inverse": changing(nan, inverse)}),
        "inverse is none": ("", {"inverse": changing(lambda x: x * 2, inverse)}),
        "adjoint gives nan": ("", {"adjoint": changing(nan, adjoint)}),
        "adjoint is another's": ("", {"adjoint": lambda self, q, state: q / state["sizes"].to(q.dtype)}),
        "adjoint of what is not linear": ("", {"inverse": changing(lambda x: x + 1, inverse)}),
        "adjoint is None at times": (
            "must give an adjoint always or never",
            {"adjoint": lambda self, q, state: None if q.shape[2] > 1 else adjoint(self, q, state)},
        ),
        "adjoint in float64": (f"{given} adjoint", {"adjoint": changing(lambda x: x.double(), adjoint)}),
        "adjoint of one query": (f"{given} adjoint", {"adjoint": changing(lambda x: x[:, :, :0], adjoint)}),
        "adjoint writes": ("must not change what adjoint is given", {"adjoint": writing_first(adjoint)}),
        "forward is one token short": (f"{given} forward", {"forward": changing(lambda x: x[:, :, 1:], forward)}),
        "forward of integers": (f"{given} forward", {"forward": changing(lambda x: x.long(), forward)}),
        "inverse elsewhere": (f"{given} inverse", {"inverse": changing(lambda x: x.to("meta"), inverse)}),
        "fit per token": (kept, {"fit": lambda self, x, q, site: {"sizes": x.abs().clamp(min=0.5)}}),
        "fit per token, turned": (
            kept,
            {
                "fit": lambda self, x, q, site: {**fit(self, x, q, site), "all": x.transpose(2, 3).contiguous()},
            },
        ),
        "fit names anew": (
            kept,
            {"fit": lambda self, x, q, site: {**fit(self, x, q, site), f"x{x.shape[2]}": x[:, :, 0]}},
        ),
        "fit gives a number": ("must give tensors .* from fit", {"fit": kept_as(lambda x: 1.0)}),
        "fit gives nan": ("", {"fit": kept_as(lambda x: x * torch.nan)}),
        "rows depend on each other": ("", {"fit": kept_as(lambda x: x.mean(0, keepdim=True))}),
    }
    return {f"transform: {name}": lying(GoodTransform, run, **methods) for name, (run, methods) in cases.items()}


def then(method: Callable[..., Any], change: Callable[..., Any]) -> Any:
    """A method that works in place, and then does something else."""
    return lambda self, *args: (method(self, *args), change(*args))[1]


def spoil(x: Tensor) -> None:
    x.add_(1)


def _extras() -> dict[str, Liar]:
    names = ("take", "fit", "add", "add_scores", "add_values")
    take, fit, add, scores, values = (getattr(GoodExtra, name) for name in names)
    nothing, alone = "must write to out and return nothing from", "must change nothing but out in"
    same = "must give the same tensors each time"

    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "take leaves nan": ("", {"take": changing(lambda f: (f[0] * torch.nan, f[1]), take)}),
        "take keeps nan": ("", {"take": changing(lambda f: (f[0], {"first": f[1]["first"] * torch.nan}), take)}),
        "fit gives inf": ("", {"fit": changing(lambda f: {"mean": f["mean"] / 0.0}, fit)}),
        "fit divides by the error": (
            "",
            {"fit": lambda self, e, g, s: {"mean": (e.square() / e).mean(3, keepdim=True)}},
        ),
        "add gives nan": ("", {"add": then(add, lambda out, parts: spoil(out.mul_(torch.nan)))}),
        "add_scores gives nan": ("", {"add_scores": then(scores, lambda rows, out, parts: spoil(out.mul_(torch.nan)))}),
        "add_values are others": ("", {"add_values": then(values, lambda weights, out, parts: spoil(out))}),
        "add returns": (f"{nothing} add", {"add": lambda self, out, parts: out + parts["mean"]}),
        "add_scores returns": (f"{nothing} add_scores", {"add_scores": lambda self, rows, out, parts: out + 1}),
        "add writes to what is kept": (f"{alone} add", {"add": then(add, lambda out, parts: spoil(parts["first"]))}),
        "add_scores writes to queries": (
            f"{alone} add_scores",
            {"add_scores": then(scores, lambda rows, out, parts: spoil(rows))},
        ),
        "fit writes": ("must not change the tensor that fit is given", {"fit": writing_first(fit)}),
        "take writes": ("must not change the tensor that take is given", {"take": writing_first(take)}),
        "take is one token short": (
            "must give .* from take",
            {"take": changing(lambda f: (f[0][:, :, 1:], f[1]), take)},
        ),
        "take names anew": (
            same,
            {"take": lambda self, x, g, s: (x, {**take(self, x, g, s)[1], f"x{x.shape[2]}": x[..., 0]})},
        ),
        "fit keeps tokens for the store": (
            same,
            {
                "axes": {"all": "store"},
                "fit": lambda self, e, g, s: {**fit(self, e, g, s), "all": e[:1].mean(3).contiguous()},
            },
        ),
        "take gives half": ("must give .* from take", {"take": changing(lambda f: f[0], take)}),
        "check_grouping answers": ("must refuse by a RecipeError", {"check_grouping": lambda self, grouping: False}),
        "arrival is no number": ("must give a number of tokens", {"arrival": lambda self, grouping: True}),
        "add raises": ("add must not fail, found KeyError", {"add": raising(KeyError("mean"))}),
    }
    return {f"extra: {name}": lying(GoodExtra, run, **methods) for name, (run, methods) in cases.items()}


LIARS: dict[str, Liar] = {
    **_tensors(),
    **_affine(),
    **_policies(),
    **_ranks(),
    **_transforms(),
    **_extras(),
    **READERS,
    **MERGERS,
}
