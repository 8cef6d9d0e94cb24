"""What quantizers, transforms and extras return, checked before a store takes it.

Types, shapes and devices are compared, which costs nothing; numbers are looked at on a CPU alone, where no device
waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.calibrator import Calibrator, Watched
from kvpolicy.interfaces.component import TRY, Component, call
from kvpolicy.interfaces.extra import Extra, Grouping
from kvpolicy.interfaces.quantizer import Affine, AffineQuantizer, Quantizer, TensorQuantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform

__all__ = [
    "added",
    "adjoined",
    "calibrated",
    "decoded",
    "encoded",
    "finished",
    "fitted",
    "fitted_to_error",
    "multiplied",
    "needed",
    "part_of",
    "placed",
    "taken",
    "transformed",
    "versions",
    "watched",
]


Q = TypeVar("Q", bound=Quantizer)


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was written to, so that it is noticed where a plugin writes to what it is shown."""
    return [0 if x.is_inference() else x._version for x in tensors]


def _fail(component: Component, rule: str) -> PluginError:
    return PluginError(f"{component._role} {component.kind!r} {rule}. {TRY}")


def _found(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} in {value.dtype} on {value.device}"


def placed(quantizer: Q, site: Site) -> Q:
    """A quantizer for a place in a model.

    Raises:
        PluginError: it raised, or returned something else.
    """
    found = call(quantizer, "at", site)
    if type(found) is not type(quantizer) or (found is not quantizer and dict(found) != dict(quantizer)):
        raise _fail(quantizer, f"must give itself or a copy with the same options from at, found {found!r:.80}")
    return found


def calibrated(quantizer: AffineQuantizer, groups: Tensor, count: int) -> Affine:
    """Codes below `count`, scale and offset of `groups`, `[groups, group_size]`.

    Raises:
        PluginError: the quantizer raised, returned something else, or wrote to `groups`.
    """
    before = versions([groups])
    found = call(quantizer, "calibrate", groups)
    one = (len(groups), 1)
    parts = found if isinstance(found, tuple) and all(isinstance(x, Tensor) for x in found) else ()
    if [x.shape for x in parts] != [groups.shape, one, one]:
        shapes = [tuple(x.shape) for x in parts] or type(found).__name__
        raise _fail(
            quantizer,
            f"must give codes {tuple(groups.shape)} and scale and offset {one} from calibrate, found {shapes}",
        )
    codes, scale, offset = parts
    if [x.dtype for x in parts] != [torch.uint8, torch.float32, torch.float32]:
        raise _fail(
            quantizer,
            f"must give codes as uint8, and scale and offset in float32, found {[str(x.dtype) for x in parts]}",
        )
    if any(x.device != groups.device for x in parts):
        raise _fail(quantizer, f"must stay on {groups.device}, found {[str(x.device) for x in parts]}")
    if versions([groups]) != before:
        raise _fail(quantizer, "must not change the groups that calibrate is given, found them changed")
    if codes.device.type == "cpu" and not torch.compiler.is_compiling():
        largest = int(codes.max()) if codes.numel() else 0
        if largest >= count:
            raise _fail(quantizer, f"must give codes below {count}, found {largest}")
    return Affine(codes, scale, offset)


def encoded(quantizer: TensorQuantizer, x: Tensor, kept: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of `x`, `[batch, kv_heads, tokens, head_dim]`, by name; `kept` are those per store so far.

    Raises:
        PluginError: the quantizer raised, returned something else, or wrote to what it was given.
    """
    kept = kept or {}
    before = versions([x, *kept.values()])
    if "store" in quantizer.axes.values():
        found = call(quantizer, "encode_with", x, dict(kept))
    else:
        found = call(quantizer, "encode", x)
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) and name for name in found):
        shown = [str(name) for name in found] if isinstance(found, dict) else type(found).__name__
        raise _fail(quantizer, f"must give named tensors from encode, found {shown}")
    for name, tensor in found.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        first, words = _first(quantizer.axes.get(name, "token"), x, tensor)
        fits = plain and tuple(tensor.shape[: len(first)]) == first and len(first) <= tensor.ndim
        if not fits or tensor.device != x.device:
            raise _fail(
                quantizer,
                f"must give tensors {words} of {tuple(x.shape[:3])} on {x.device} from encode, "
                f"found {name} of {_found(tensor)}",
            )
    if not any(quantizer.axes.get(name, "token") == "token" for name in found):
        raise _fail(quantizer, f"must give a tensor per token from encode, found {sorted(found)}")
    if versions([x, *kept.values()]) != before:
        raise _fail(quantizer, "must not change the tensor that encode is given, found it changed")
    return {**found, **{name: t for name, t in kept.items() if name not in found}}


def _first(axis: str, x: Tensor, found: Any) -> tuple[tuple[int, ...], str]:
    """What the shape of a tensor of the tokens `x` must begin with, and that in words."""
    batch, heads, tokens = x.shape[:3]
    if axis == "token":
        return (batch, heads, tokens), "[batch, kv_heads, tokens, ...]"
    if axis == "arrival":
        return (batch, heads, 1), "[batch, kv_heads, 1, ...]"
    shape = tuple(getattr(found, "shape", ()))[:2]
    first = tuple(1 if n == 1 else most for n, most in zip(shape, (batch, heads), strict=False))
    return (first if len(first) == 2 else (batch, heads)), "[batch or 1, kv_heads or 1, ...]"


def decoded(quantizer: TensorQuantizer, parts: dict[str, Tensor], dtype: torch.dtype, head_dim: int) -> Tensor:
    """What some tokens' tensors stand for: `[batch, kv_heads, tokens, head_dim]`.

    Raises:
        PluginError: the quantizer raised, returned something else, or wrote to `parts`.
    """
    before = versions(parts.values())
    like = next(t for name, t in parts.items() if quantizer.axes.get(name, "token") == "token")
    shape = (*like.shape[:3], head_dim)
    x = call(quantizer, "decode", dict(parts), dtype)
    if not isinstance(x, Tensor) or x.shape != shape or x.dtype != dtype or x.device != like.device:
        raise _fail(quantizer, f"must give {tuple(shape)} in {dtype} on {like.device} from decode, found {_found(x)}")
    if versions(parts.values()) != before:
        raise _fail(quantizer, "must not change the tensors that decode is given, found them changed")
    return x


def multiplied(quantizer: TensorQuantizer, method: str, x: Tensor, parts: dict[str, Tensor], columns: int) -> Tensor:
    """What `scores` or `combine` of a quantizer makes of `x`: `[batch, kv_heads, rows, columns]`, float32.

    Raises:
        PluginError: it raised, returned something else, or wrote to what it was given.
    """
    before = versions([x, *parts.values()])
    shape = (*x.shape[:3], columns)
    found = call(quantizer, method, x, dict(parts))
    if not isinstance(found, Tensor) or found.shape != shape or found.dtype != x.dtype or found.device != x.device:
        raise _fail(
            quantizer, f"must give {tuple(shape)} in {x.dtype} on {x.device} from {method}, found {_found(found)}"
        )
    if versions([x, *parts.values()]) != before:
        raise _fail(quantizer, f"must not change what {method} is given, found it changed")
    return found


def needed(transform: Transform) -> frozenset[str]:
    """What a transform must be given.

    Raises:
        PluginError: it names something that its class does not.
    """
    found = call(transform, "needed")
    if not isinstance(found, frozenset) or not found <= transform.needs:
        raise _fail(transform, f"must give some of its needs from needed, found {found!r:.80}")
    return found


def fitted(transform: Transform, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
    """What a transform keeps of the first tokens, and of the queries if it needs them.

    Raises:
        PluginError: it raised, returned something else, or wrote to what it was given.
    """
    shown = [x] if queries is None or "queries" not in needed(transform) else [x, queries]
    before = versions(shown)
    found = call(transform, "fit", x, shown[1] if len(shown) > 1 else None, site)
    if not isinstance(found, dict) or not all(isinstance(name, str) and name.isidentifier() for name in found):
        raise _fail(transform, f"must give named tensors from fit, found {_found(found)}")
    for name, t in found.items():
        fits = isinstance(t, Tensor) and t.layout == torch.strided and t.ndim >= 2 and t.device == x.device
        if not fits or t.shape[0] not in (1, x.shape[0]) or t.shape[1] not in (1, x.shape[1]):
            raise _fail(
                transform,
                f"must give tensors [batch or 1, kv_heads or 1, ...] of {tuple(x.shape[:2])} on {x.device} from fit, "
                f"found {name} of {_found(t)}",
            )
    if versions(shown) != before:
        raise _fail(transform, "must not change the tensor that fit is given, found it changed")
    return found


def transformed(
    transform: Transform, method: str, x: Tensor, state: dict[str, Tensor], positions: Tensor | None
) -> Tensor:
    """What `forward` or `inverse` of a transform makes of `x`.

    Raises:
        PluginError: it raised, returned something else, or wrote to what it was given.
    """
    before = versions([x, *state.values()])
    found = call(transform, method, x, state, positions)
    return _mapped(transform, method, found, x, state, before)


def adjoined(transform: Transform, q: Tensor, state: dict[str, Tensor]) -> Tensor | None:
    """What `adjoint` of a transform makes of queries, if it has one.

    Raises:
        PluginError: as `transformed`.
    """
    before = versions([q, *state.values()])
    found = call(transform, "adjoint", q, state)
    return None if found is None else _mapped(transform, "adjoint", found, q, state, before)


def _mapped(
    transform: Transform, method: str, found: Any, x: Tensor, state: dict[str, Tensor], before: list[int]
) -> Tensor:
    if not isinstance(found, Tensor) or (found.shape, found.dtype, found.device) != (x.shape, x.dtype, x.device):
        raise _fail(transform, f"must give {_found(x)} from {method}, found {_found(found)}")
    if versions([x, *state.values()]) != before:
        raise _fail(transform, f"must not change what {method} is given, found it changed")
    return found


def taken(extra: Extra, x: Tensor, grouping: Grouping, site: Site) -> tuple[Tensor, dict[str, Tensor]]:
    """What an extra leaves of `x` to be coded, and what it keeps of it.

    Raises:
        PluginError: it raised, returned something else, or wrote to `x`.
    """
    before = versions([x])
    found = call(extra, "take", x, grouping, site)
    y, parts = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
    if not isinstance(y, Tensor) or (y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device):
        raise _fail(extra, f"must give {_found(x)} and named tensors from take, found {_found(y)}")
    if versions([x]) != before:
        raise _fail(extra, "must not change the tensor that take is given, found it changed")
    return y, part_of(extra, "take", parts, x)


def fitted_to_error(extra: Extra, error: Tensor, grouping: Grouping, site: Site) -> dict[str, Tensor]:
    """What an extra keeps of the error that coding made.

    Raises:
        PluginError: it raised, returned something else, or wrote to `error`.
    """
    before = versions([error])
    found = part_of(extra, "fit", call(extra, "fit", error, grouping, site), error)
    if versions([error]) != before:
        raise _fail(extra, "must not change the tensor that fit is given, found it changed")
    return found


def added(extra: Extra, method: str, given: Tensor | None, out: Tensor, parts: dict[str, Tensor]) -> None:
    """Have an extra add what it keeps, `parts`, to `out`: by `add`, or to products with `given`.

    Raises:
        PluginError: it raised, returned something, or wrote to anything else.
    """
    shown = list(parts.values()) if given is None else [given, *parts.values()]
    before = versions(shown)
    found = call(extra, method, out, parts) if given is None else call(extra, method, given, out, parts)
    if found is not None and found is not out:
        raise _fail(extra, f"must write to out and return nothing from {method}, found {_found(found)} returned")
    if versions(shown) != before:
        raise _fail(extra, f"must change nothing but out in {method}, found what it is given changed")


def part_of(extra: Extra, method: str, found: Any, x: Tensor) -> dict[str, Tensor]:
    """Named tensors of the tokens `x`, each on its axis.

    Raises:
        PluginError: they are not.
    """
    if not isinstance(found, dict) or not all(isinstance(name, str) and name.isidentifier() for name in found):
        raise _fail(extra, f"must give named tensors from {method}, found {_found(found)}")
    for name, t in found.items():
        axis = extra.axes.get(name, "token")
        first = {"token": x.shape[:3], "arrival": (*x.shape[:2], 1), "store": ()}[axis]
        fits = isinstance(t, Tensor) and t.layout == torch.strided and t.device == x.device
        fits = fits and tuple(t.shape[: len(first)]) == tuple(first)
        if fits and axis == "store":
            fits = t.ndim >= 2 and t.shape[0] == 1 and t.shape[1] in (1, x.shape[1])
        if not fits:
            raise _fail(
                extra, f"must give tensors per {axis} of {tuple(first)} from {method}, found {name} of {_found(t)}"
            )
    return dict(found)


def watched(calibrator: Calibrator, given: Watched, state: dict[str, Tensor], turn: int) -> dict[str, Tensor]:
    """What a calibrator keeps of a layer after a sample, on the CPU.

    Raises:
        PluginError: it raised, returned something else, or wrote to what it was given.
    """
    shown = [given.keys, given.values, *given.gradients.values(), *state.values()]
    before = versions(shown)
    found = call(calibrator, "watch", given, state, turn)
    if not _named(found):
        raise _fail(calibrator, f"must give named tensors from watch, found {_found(found)}")
    if versions(shown) != before:
        raise _fail(calibrator, "must not change what watch is given, found it changed")
    return {name: t.detach().to("cpu") for name, t in found.items()}


def finished(calibrator: Calibrator, state: dict[str, Tensor], site: Site) -> dict[str, Tensor]:
    """What a calibrator has to say of a layer in the end.

    Raises:
        PluginError: it raised, or returned something else.
    """
    found = call(calibrator, "finish", state, site)
    sides = ("keys.", "values.", "unrotated.")
    if not _named(found) or not all(name.startswith(sides) for name in found):
        raise _fail(calibrator, f"must give tensors named {', '.join(sides)} from finish, found {_found(found)}")
    for name, t in found.items():
        if t.is_floating_point() and (t.dtype != torch.float32 or not t.isfinite().all()):
            raise _fail(calibrator, f"must give finite numbers in float32 from finish, found {name} of {_found(t)}")
    return {name: t.detach().to("cpu").contiguous() for name, t in found.items()}


def _named(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items())
