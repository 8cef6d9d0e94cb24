"""What torch's modes mean for a cache: autocast does not reach its arithmetic, and lost gradients are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.layer.view import View

_compiling: Callable[[], Any] | None = None
"""Gives what compiles the frames of this thread, None where nothing does."""
with suppress(ImportError):  # releases of PyTorch may have other names for it
    from torch._C._dynamo.eval_frame import get_eval_frame_callback
    from torch._dynamo.decorators import skip

    _compiling = get_eval_frame_callback
F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")
_AS_IT_IS: AbstractContextManager[Any] = nullcontext()

nothing_hidden: ContextVar[Tensor | None] = ContextVar("kvpolicy_nothing_hidden", default=None)
"""A mask that stands for none. Models make one of their own where a CUDA graph is captured and they are given none."""
watching: ContextVar[Callable[..., None] | None] = ContextVar("kvpolicy_watching", default=None)
"""Called with module, query, key, value, mask, options and output of every attention that reads a `CompressedCache`."""
ATTACHED = (
    "gradients can't pass through attention that reads a compressed cache where it lies; detach the model, so that "
    "they reach the new tokens, or run it under torch.no_grad()"
)
HELD = (
    "the tokens that a compressed cache holds must have come without gradients, and these came with some, which the "
    "cache does not carry; run what fills the cache under torch.no_grad(), or use transformers' DynamicCache"
)


def uncompiled(function: F) -> F:
    """A function that `torch.compile` calls instead of looking into it."""
    apart: F = torch.compiler.disable(function)
    if _compiling is None:
        return apart
    asks = _compiling

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:  # to go apart costs some ten calls, which eager models need not pay
        return (function if asks() is None else apart)(*args, **kwargs)

    return cast(F, skip(called))


def precise(device: torch.device) -> AbstractContextManager[Any]:
    """Arithmetic without gradients and in the types of the tensors, although the caller may run under autocast."""
    if torch._C._is_any_autocast_enabled():
        return _unchanged(device.type)
    return torch.no_grad() if torch.is_grad_enabled() else _AS_IT_IS


def precisely(device: torch.device, function: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    """Call a function under `precise`, which is not entered where it would change nothing."""
    if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
        with precise(device):
            return function(*args, **kwargs)
    return function(*args, **kwargs)


@contextmanager
def _unchanged(device: str) -> Iterator[None]:
    with torch.no_grad():
        if torch.amp.is_autocast_available(device):
            with torch.autocast(device, enabled=False):
                yield
        else:
            yield


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether autograd records what is done to one of the tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _Barred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, why: str, out: Tensor, *_: Tensor) -> Tensor:
        ctx.why = why
        # What is given, autograd would hand out a view of, and of a `View` that is the decoded tensor.
        return out.anew() if isinstance(out, View) else out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise CacheError(ctx.why)


def barred(why: str, out: Tensor, *through: Tensor) -> Tensor:
    """`out`, through which gradients would be wrong: `backward` to one of `through` raises a `CacheError`.

    The error waits for `backward`, because a model that is run outside `torch.no_grad` mostly does not mean it.
    """
    found: Tensor = _Barred.apply(why, out, *through)  # type: ignore[no-untyped-call]
    return found
