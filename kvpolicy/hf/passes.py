"""Forward passes of a model: hooks that tell a cache when one begins, with which padding, and how it ends.

The hooks are functions of this file, which look up their state by the model that runs. So the hooks in a copy or a
pickle of a hooked model do nothing.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvpolicy.errors import CacheError
from kvpolicy.hf.calls import Call, PassAware, names_of, parts_of, path_between
from kvpolicy.hf.modes import precise
from kvpolicy.layer.layer import LayerCache
from kvpolicy.layer.prompt import AT_ONCE, LATE, hold_all

lock = threading.RLock()
"""Held while hooks or registries change. Finalizers may run anywhere, so that a thread may hold it twice."""
_by_module: WeakKeyDictionary[nn.Module, Hooked] = WeakKeyDictionary()
_by_decoder: WeakKeyDictionary[nn.Module, Hooked] = WeakKeyDictionary()
_attached: WeakKeyDictionary[nn.Module, Hooked] = WeakKeyDictionary()
"""Every module inside a decoder that is attached."""


class Attachment(Protocol):
    """What `attach` leaves with the hooks of a model."""

    recipe: Any
    """Of the caches for calls that bring none; None if they get none."""

    def check(self, module: nn.Module, call: Call) -> None:
        """Refuse a call with a compressed cache that would not be right."""
        ...

    def supplied(self, module: nn.Module, call: Call) -> PassAware | None:
        """A cache for a call that brings none and may have one."""
        ...

    def tell(self, why: str, depth: int) -> None:
        """Warn, once, that a call does not use the recipe."""
        ...


@dataclass(slots=True, eq=False)
class Pass:
    """One forward pass of a hooked model, in one thread."""

    module: ReferenceType[nn.Module]
    """The module that was entered first. It ends the pass."""
    frame: int
    """Identity of the frame of that call. After-hooks don't run after Ctrl-C, so a pass is over once this is gone."""
    carried: ReferenceType[PassAware] | None
    outer: Pass | None
    """The pass of the same model within which this one runs."""
    tokens: int = 0
    masked: bool = False
    """Whether the 2-D mask was seen."""
    late: list[LayerCache] = field(default_factory=list)
    """Layers whose tokens are let in once the next one's attention is under way."""

    @property
    def cache(self) -> PassAware | None:
        return None if self.carried is None else self.carried()

    def runs(self) -> bool:
        """Whether the call that began this pass is still on this thread's stack."""
        frame = sys._getframe(1)
        while id(frame) != self.frame:
            if frame.f_back is None:
                return False
            frame = frame.f_back
        return frame.f_locals.get("self") is self.module()

    def end(self, failed: bool) -> None:
        if self.late and not failed:
            with precise(self.late[0].like["keys"].device):
                hold_all(self.late)
        cache = self.cache
        if cache is not None:
            cache.finish(failed)


def let_in(tiers: LayerCache, module: Any, query: Tensor) -> None:
    """Let a layer's many new tokens in; on a GPU with those of other layers, once the next one has given it work.

    So it never waits for the host, which plans for several layers at once.
    """
    current = attached_pass(module) if query.device.type in LATE else None
    if current is None or current.cache is None:
        tiers.hold()
        return
    if len(current.late) == AT_ONCE:
        hold_all(current.late)
        current.late.clear()
    current.late.append(tiers)


class Lease:
    """What a cache holds so that its model keeps the hooks. Copies of the cache share it."""

    def __copy__(self) -> Lease:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Lease:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Hooked:
    """The hooks of one decoder and of the models around it, and the passes that they have announced."""

    def __init__(self, decoder: nn.Module) -> None:
        self.token = object()
        """Part of every hook. In a copy it is another object, so the copy's hooks are not taken for this model's."""
        self.decoder = weakref.ref(decoder)
        self.attachment: Attachment | None = None
        self.lease: ReferenceType[Lease] | None = None
        self.handles: WeakKeyDictionary[nn.Module, tuple[Any, Any]] = WeakKeyDictionary()
        self.names: WeakKeyDictionary[nn.Module, tuple[str, ...]] = WeakKeyDictionary()
        """What the forward of each module calls its arguments, in order."""
        self.passes: dict[int, Pass] = {}
        """The innermost pass of each thread."""

    def hook(self, path: list[nn.Module]) -> None:
        for module in path:
            if module in self.handles:
                continue
            self.names[module] = names_of(module)
            self.handles[module] = (
                module.register_forward_pre_hook(functools.partial(_enter, self.token), with_kwargs=True),
                module.register_forward_hook(functools.partial(_leave, self.token), with_kwargs=True, always_call=True),
            )
            _by_module[module] = self

    def release(self) -> None:
        """Take the hooks away, once neither a handle nor a cache needs them."""
        with lock:
            if self.attachment is not None or (self.lease is not None and self.lease() is not None):
                return
            for module, handles in self.handles.items():
                for handle in handles:
                    handle.remove()
                _by_module.pop(module, None)
            self.handles = WeakKeyDictionary()
            decoder = self.decoder()
            if decoder is not None and _by_decoder.get(decoder) is self:
                del _by_decoder[decoder]

    def attach(self, attachment: Attachment) -> None:
        decoder = self.decoder()
        assert decoder is not None
        self.attachment = attachment
        for module in decoder.modules():
            _attached[module] = self

    def detach(self) -> None:
        """Forget the attachment, and end passes that were abandoned."""
        self.attachment = None
        for module in [m for m, hooked in _attached.items() if hooked is self]:
            del _attached[module]
        for thread in list(self.passes):
            running = self.passes.pop(thread, None)
            while running is not None:
                running.end(failed=True)
                running = running.outer
        self.release()

    def running(self, new: int = 0) -> Pass | None:
        """The innermost pass of this model in this thread. Those that were abandoned are ended.

        Args:
            new: the frame of a call that begins; a pass that claims it had another at the same place in memory.
        """
        thread = threading.get_ident()
        found = self.passes.get(thread)
        while found is not None and (found.frame == new or not found.runs()):
            self._put(thread, found.outer)
            found.end(failed=True)
            found = found.outer
        return found

    def _put(self, thread: int, running: Pass | None) -> None:
        if running is None:
            self.passes.pop(thread, None)
        else:
            self.passes[thread] = running

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """What the pre-hook does; gives the arguments back where a cache was added to them."""
        frame = _frame(module)
        hooks: Any = module._forward_hooks
        hooks.move_to_end(self.handles[module][1].id)  # after the user's, which may raise
        running = self.running(frame)
        call, added = Call(self.names[module], args, kwargs), None
        cache = call.compressed()
        if cache is None and self.attachment is not None and (running is None or running.cache is None):
            cache = self.attachment.supplied(module, call)
            added = None if cache is None else call.with_cache(cache)
        if running is not None and cache is running.cache and module is not running.module():
            self._again(running, call)
            return None
        if cache is None and running is None:
            return None
        mask, tokens = call.mask(), call.tokens()
        if cache is not None:
            if self.attachment is not None:
                self.attachment.check(module, call)
            cache.begin(tokens, mask, self.attachment is not None)
        carried = None if cache is None else weakref.ref(cache)
        masked = mask is not None and mask.ndim == 2
        found = Pass(weakref.ref(module), frame, carried, running, tokens, masked)
        self.passes[threading.get_ident()] = found
        return added

    def _again(self, running: Pass, call: Call) -> None:
        """Announce a pass anew where an inner model is told what an outer one was not: more tokens, or the mask."""
        mask, tokens, cache = call.mask(), call.tokens(), running.cache
        mask = mask if mask is not None and mask.ndim == 2 else None
        known = running.masked or mask is None
        if cache is None or not tokens or (known and tokens == running.tokens):
            return
        cache.announce(tokens, mask, self.attachment is not None)
        running.tokens, running.masked = tokens, running.masked or mask is not None

    def leave(self, module: nn.Module, failed: bool) -> None:
        running = self.running()
        if running is not None and running.module() is module:
            self._put(threading.get_ident(), running.outer)
            running.end(failed)


def _frame(module: nn.Module) -> int:
    """The identity of the frame that calls `module`'s forward and its hooks, and lasts until both are done."""
    frame = sys._getframe(1)
    while frame.f_locals.get("self") is not module:
        if frame.f_back is None:
            return 0
        frame = frame.f_back
    outer = frame.f_back  # torch calls them from a function within `_call_impl`, and after an exception from the latter
    return id(outer if outer is not None and outer.f_locals.get("self") is module else frame)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _enter(token: object, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    hooked = _by_module.get(module)
    return None if hooked is None or hooked.token is not token else hooked.enter(module, args, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _leave(token: object, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    hooked = _by_module.get(module)
    if hooked is not None and hooked.token is token:
        hooked.leave(module, failed=_fails(module))


def _fails(module: nn.Module) -> bool:
    """Whether the call of `module` that runs its after-hooks has raised an exception."""
    error = sys.exc_info()[1]
    trace = None if error is None else error.__traceback__
    frame: Any = sys._getframe(1)
    while trace is not None and frame is not None:
        if frame is trace.tb_frame:
            return True
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return False
        frame = frame.f_back
    return False


def hooked_of(decoder: nn.Module) -> Hooked:
    """The record of a decoder, made if there is none; `lock` must be held."""
    found = _by_decoder.get(decoder)
    if found is None:
        found = _by_decoder[decoder] = Hooked(decoder)
    return found


def hold(model: Any) -> Lease | None:
    """Hooks for a model that a cache is made for, until the last cache that holds this is gone."""
    if not isinstance(model, nn.Module):
        return None
    with lock:
        hooked, path = _by_module.get(model), []
        if hooked is None:
            try:
                owner, decoder = parts_of(model)
            except CacheError:  # nothing to hook; whether a cache can serve it is not for here to say
                return None
            hooked, path = hooked_of(decoder), path_between(owner, decoder)
        lease = None if hooked.lease is None else hooked.lease()
        if lease is None:
            lease = Lease()
            weakref.finalize(lease, hooked.release).atexit = False
            hooked.lease = weakref.ref(lease)
        hooked.hook(path)
        return lease


def is_attached(model: Any) -> bool:
    """Whether a model (not a config) is attached now."""
    if not isinstance(model, nn.Module):
        return False
    return any(module in _attached for module in model.modules())


def attachment_of(model: nn.Module) -> Attachment | None:
    """What a hooked model is attached with, if it is."""
    hooked = _by_module.get(model)
    return None if hooked is None else hooked.attachment


def attached_pass(module: Any) -> Pass | None:
    """The innermost pass, in this thread, of the attached model that an attention module belongs to."""
    hooked = _attached.get(module)
    return None if hooked is None else hooked.passes.get(threading.get_ident())


def check_announced(cache: PassAware) -> None:
    """Refuse an update that comes from an attached model, or is meant for one, outside a pass with this cache.

    Raises:
        CacheError: the model's hooks have not seen this cache.
    """
    if not _attached:
        return
    lease = cache.lease
    hooked = _calling()
    if hooked is None and lease is not None:
        hooked = next((h for h in list(_by_decoder.values()) if h.lease is not None and h.lease() is lease), None)
    if hooked is None or hooked.attachment is None:
        return
    decoder = hooked.decoder()
    raise CacheError(
        f"a cache must be given to the forward of an attached model ({type(decoder).__name__}) as an argument of its "
        "own, found an update outside any forward pass with this cache; pass it as an argument of model(...) or "
        "generate(...), or detach the model"
    )


def _calling() -> Hooked | None:
    """The attached model one of whose modules is the innermost on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return _attached.get(module)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


class _Reading:
    """The cache of the innermost forward pass that runs in this thread."""

    def get(self) -> PassAware | None:
        passes = [p for p in (hooked.running() for hooked in set(_by_decoder.values())) if p is not None]
        frame: Any = sys._getframe(1)
        while frame is not None and passes:
            for found in passes:
                if found.frame == id(frame):
                    return found.cache
            frame = frame.f_back
        return None


reading = _Reading()
