"""What keeps a cache whole: a forward pass happens to all of its layers, or to none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import get_ident
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.hf.modes import precise
from kvpolicy.hf.one_thread import OneThread
from kvpolicy.layer.commit import commit_all, groups_of
from kvpolicy.layer.held import Reading
from kvpolicy.layer.layer import MAX_APART
from kvpolicy.placement.padding import Padding

BETWEEN = ("kvpolicy", "torch._dynamo", "contextlib")
"""Modules whose frames stand between a forward pass and what it calls of ours."""
WINDOWED = "DynamicSlidingWindowLayer"
BY_REFERENCE = ("DynamicLayer", WINDOWED)
"""Layers of transformers that replace their tensors instead of writing to them."""


@dataclass(eq=False)
class Transaction:
    """A forward pass that brings tokens to a cache, from its beginning to its end."""

    before: int
    """Tokens seen before."""
    padding: Padding | None
    """Which of these are padding."""
    own: dict[int, dict[str, Any]]
    """What transformers' own layers held."""
    frame: FrameType | None
    """The frame of whoever runs the pass."""
    thread: int = field(default_factory=get_ident)
    given: set[int] = field(default_factory=set)
    """Layers that got their tokens."""

    @property
    def elsewhere(self) -> bool:
        """Whether it runs in another thread."""
        return self.thread != get_ident()

    def alive(self) -> bool:
        """Whether its frame is still on its thread's stack. Ctrl-C ends a pass without a call of `finish`."""
        frame = sys._current_frames().get(self.thread) if self.elsewhere else sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


def _caller() -> FrameType | None:
    """The frame of whoever runs the forward pass that is about to begin."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(BETWEEN):
        frame = frame.f_back
    return frame


def _kept(layer: Any) -> dict[str, Any]:
    """What a layer of transformers' own holds. Updates replace its keys and values, but write into its states."""
    return {name: x if name in ("keys", "values") else _cloned(x) for name, x in layer.__dict__.items()}


def _cloned(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, dict):
        return {key: _cloned(value) for key, value in x.items()}
    return type(x)(map(_cloned, x)) if type(x) in (list, tuple) else x


class Guard:
    """Knows of the forward pass under way, and takes back one that was interrupted."""

    def __init__(self, recipe: str, layers: list[Any], reading: Reading) -> None:
        self.recipe, self.layers, self.reading = recipe, layers, reading
        self._pass: Transaction | None = None
        """The forward pass under way, or one that was interrupted."""
        self._torn: str | None = None
        """The operation that was interrupted after some layers, so that the cache must be reset."""
        self.tiers = [layer.tiers for layer in layers if isinstance(layer, TieredLayer)]
        """Of the layers that the recipe keeps."""
        self.evicts = any(tiers.evicts for tiers in self.tiers)
        """Whether tokens are dropped in any layer."""
        self.selects_together = any(tiers.placement.shared for tiers in self.tiers)
        """Whether a policy selects the same tokens in several layers."""
        self._groups = groups_of(self.tiers)
        self._asking = [tiers for tiers in self.tiers if tiers.asks_for_end]
        self.updating = OneThread()
        self.untold = False
        """Whether tokens came outside any pass that a model announced."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pass": None}

    @property
    def pending(self) -> int:
        """Tokens of the latest update that no tier has yet."""
        return max((tiers.waiting for tiers in self.tiers), default=0)

    @property
    def seen(self) -> int:
        """Tokens that the layers have seen, if they are whole."""
        return max(self._lengths(), default=0)

    def _lengths(self) -> list[int]:
        """Tokens seen by each layer that has any: of the recipe's, and of transformers' own with a window."""
        own = [layer for layer in self.layers if type(layer).__name__ == WINDOWED and layer.is_initialized]
        return [tiers.seen for tiers in self.tiers if tiers.stores] + [int(layer.get_seq_length()) for layer in own]

    def begin(self, tokens: int, mask: Any = None, attached: bool = False) -> None:
        """A forward pass with this cache begins, which brings `tokens` tokens to every layer.

        Called by the hooks of a model. If the pass is interrupted, the cache goes back to where it is now.

        Args:
            tokens: how many.
            mask: the pass's attention mask, if it has one. One over all tokens, 2-D, tells padding.
            attached: whether the model reads the stores itself.

        Raises:
            CacheError: the cache is not whole or in use, or the pass can't be served.
        """
        before, padding = max(self.whole(), default=0), self.reading.padding
        if isinstance(mask, Tensor) and mask.ndim == 4 and self.evicts and not attached:
            self._check_columns(mask, tokens)
        ragged = not attached and self.evicts and not any(getattr(layer, "uneven", None) for layer in self.layers)
        held = {tiers.planner.width for tiers in self.tiers if ragged and tiers.evicts and tiers.step.by_head}
        if len(held) > 1:
            raise CacheError(
                "layers that drop tokens must hold the same number while the model is not attached, found "
                f"{sorted(held)} after a crop; attach the model, or reset() the cache"
            )
        coming = self._padding_with(mask, tokens, before, attached)
        own = {i: _kept(x) for i, x in enumerate(self.layers) if not isinstance(x, TieredLayer)}
        together = self.selects_together and not any(tiers.observes for tiers in self.tiers)
        # Where this may end the prompt, layers wait for their updates, which know how many tokens come.
        ends = tokens == 1 and not self.selects_together and any(tiers.ends_prompt() for tiers in self._asking)
        if (attached and not ends) or together:
            device = next((tiers.like["keys"].device for tiers in self.tiers if tiers.like), torch.device("cpu"))
            with precise(device):
                self.commit(tokens)
        self._pass = Transaction(before, padding, own, _caller())
        self.reading.forget()
        self.reading.padding, self.reading.attached = coming, attached

    def _check_columns(self, mask: Tensor, tokens: int) -> None:
        """Refuse a 4-D mask that has columns for dropped tokens."""
        held = next(tiers.held_after_commit(tokens) for tiers in self.tiers if tiers.evicts)
        if mask.shape[3] != held + tokens:
            raise CacheError(
                f"a 4-D attention mask must have a column for each of the {held + tokens} tokens that the layers of "
                f"recipe {self.recipe!r} show while its model is not attached, found {mask.shape[3]}; attach the "
                "model: its masks then speak of all tokens seen"
            )

    def finish(self, failed: bool = False) -> None:
        """The forward pass has ended; if it `failed`, what it did is taken back, as far as that can be done."""
        if self._pass is None:
            return
        if failed:
            with suppress(CacheError):  # said by whatever uses the cache next
                self.take_back()
            return
        for tiers in self.tiers:
            if tiers.staged or tiers.decoded:
                tiers.hold()
        if self.selects_together and self.pending > MAX_APART:
            self.commit()
        self.reading.attached = False
        self.reading.forget()
        self._pass = None  # last: until here an interruption takes the pass back

    def announce(self, tokens: int, mask: Any, attached: bool) -> None:
        """Within a pass an inner model is called with so many tokens, or with the mask that an outer one lacks."""
        known = self.reading.padding
        if mask is not None or known is None or known.length < self.seen + tokens:
            self.reading.padding = self._padding_with(mask, tokens, self.seen, attached)

    def note_padding(self, mask: Any, tokens: int) -> None:
        """Note which of the next `tokens` are padding, from a 2-D attention mask over all tokens."""
        self.reading.padding = self._padding_with(mask, tokens, self.seen, True)

    def _padding_with(self, mask: Any, tokens: int, seen: int, attached: bool) -> Padding | None:
        """What is known of padding once a pass has brought `tokens` more."""
        padding = self.reading.padding
        real: Any = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > seen:
            real = mask[:, seen : seen + tokens] != 0
            if self.evicts and padding is None and not bool(mask[:, :seen].all()):
                raise CacheError(
                    f"recipe {self.recipe!r} drops tokens, so an attached model must be told padding when it comes; "
                    f"found a mask that hides some of the {seen} tokens seen. reset() the cache, attach the model, "
                    "and give the mask from the first tokens on"
                )
            if self.evicts and not attached and not bool(real.all()):
                raise CacheError(
                    f"recipe {self.recipe!r} drops tokens, and takes padding for tokens while its model is not "
                    "attached; found a padded batch. Attach the model before its first tokens: "
                    "with kvpolicy.attach(model): ..."
                )
        if padding is None and (not attached or real is None or bool(real.all())):
            return None
        batch = padding.batch if padding is not None else len(real)
        if real is None or real.shape != (batch, tokens):
            real = np.ones((batch, tokens), np.bool_)
        else:
            real = real.cpu().numpy()
        return (padding or Padding.none(batch, seen)).crop(seen).append(real)

    def whole(self, same_tokens: bool = True) -> list[int]:
        """Take an interrupted pass back, and check that all layers hold the `same_tokens`, if they must.

        Returns:
            The tokens that layers have seen, if these were checked.

        Raises:
            CacheError: they don't, or the cache is in use.
        """
        if self._pass is not None:
            if self._pass.alive():
                where = "by another thread" if self._pass.elsewhere else "by the forward pass that is running"
                raise CacheError(
                    f"a cache serves one forward pass at a time, and this one is in use {where}; use another"
                )
            self.take_back()
        if self._torn is not None:
            raise CacheError(
                f"the layers of a cache must agree, and {self._torn} was interrupted; reset() the cache, "
                "or make a new one"
            )
        lengths = self._lengths() if same_tokens else []
        for tiers in self.tiers if same_tokens else ():
            if tiers.broken:
                tiers.check_whole()
        if len(set(lengths)) > 1:
            raise CacheError(
                f"the layers of a cache must hold the same tokens, and an update was interrupted: they have seen "
                f"{lengths}; crop({min(lengths)}) takes it back, or reset() the cache"
            )
        return lengths

    def ready(self, same_tokens: bool = True) -> None:
        """`whole`, unless the forward pass that is running asks itself."""
        if self._pass is None or self._pass.elsewhere or not self._pass.alive():
            self.whole(same_tokens)

    def take_back(self) -> None:
        """Undo what an interrupted pass did.

        Raises:
            CacheError: tokens have left places that they can't return to.
        """
        p = self._pass
        assert p is not None
        done = [tiers.revert(p.before if tiers.stores else 0) for tiers in self.tiers]
        for i, layer in enumerate(self.layers):
            if i in p.own:
                layer.__dict__.clear()
                layer.__dict__.update(p.own[i])
        self.reading.attached, self.reading.padding = False, p.padding
        self.reading.forget()
        if not all(done):
            raise CacheError(
                "a forward pass with this cache was interrupted after tokens had left their places for good; reset() "
                "the cache, or make a new one"
            )
        if len({tiers.committed for tiers in self.tiers}) > 1:
            self.commit()
        self._agree()
        self._pass = None

    def _agree(self) -> None:
        """Where the prompt has ended for some layers it has for all."""
        if any(tiers.step.prompt is not None for tiers in self.tiers):
            commit_all(groups_of(tiers for tiers in self.tiers if tiers.step.prompt is None), coming=1)

    def expects(self, layer: int) -> bool:
        """Whether the forward pass of an attached model under way, in this thread, brings tokens to a layer now."""
        p = self._pass
        known = p is not None and self._torn is None and self.reading.attached and p.thread == get_ident()
        if p is None or not known or layer in p.given:
            return False
        p.given.add(layer)
        return True

    def expect(self, layer: int, keys: Tensor) -> None:
        """Refuse tokens for a layer that has seen more than the others, or in a pass of another thread."""
        p = self._pass
        if self._torn is not None:
            self.whole()
        if p is not None and (p.elsewhere or layer in p.given) and not p.alive():
            self.take_back()
            p = None
        if p is not None and p.elsewhere:
            self.whole()
        if p is not None:
            p.given.add(layer)
            return
        tiered = self.layers[layer]
        if not isinstance(tiered, TieredLayer):
            return
        self.untold = True
        seen = tiered.tiers.seen
        if seen > min([seen, *self._lengths()]):
            self.whole()
        if self.selects_together and len(set(self._lengths())) == 1:
            self.commit(keys.shape[2])
        padding = self.reading.padding
        if padding is not None and padding.length < seen + keys.shape[2]:
            self.reading.padding = padding.append(
                np.ones((padding.batch, seen + keys.shape[2] - padding.length), np.bool_)
            )

    def cropped(self, tokens: int, known: int) -> int:
        """The length that `crop(tokens)` leads to from `known`; layers of unequal length are made ready for it.

        Raises:
            CacheError: they can't all have that length, or the cache is in use.
        """
        if self._pass is not None:
            if self._pass.alive():
                self.whole()
            self.take_back()
        seen = self._lengths()
        if tokens <= 0 or len(set(seen)) < 2:
            self.whole()
        length = tokens if tokens > 0 else max(max(self.seen, known) + tokens, 0)
        if len(set(seen)) > 1:
            self._level(length, seen)
        return length

    @torch.no_grad()
    def _level(self, length: int, seen: list[int]) -> None:
        """Commit in every layer as many tokens as in the one that has seen most, so that a crop leaves them equal."""
        most = max((tiers.committed for tiers in self.tiers), default=0)
        behind = [tiers for tiers in self.tiers if tiers.committed < most]
        if min(seen) < length or self.selects_together or any(t.committed + t.waiting != most for t in behind):
            raise CacheError(
                "crop must lead to a length that all layers had, and an update was interrupted: they have seen "
                f"{seen}, found {length}; reset() the cache, or make a new one"
            )
        for tiers in behind:
            tiers.commit()
        self._agree()

    @contextmanager
    def rows_of_all(self, what: str) -> Iterator[None]:
        """Within it, rows are selected in every layer; see `tearing`."""
        self.whole()
        with self.tearing(what):
            yield

    @contextmanager
    def tearing(self, what: str) -> Iterator[None]:
        """Within it, layers may differ. If it is interrupted, the cache refuses everything until it is reset."""
        self._torn = what
        try:
            yield
        except CacheError:  # raised before anything was changed
            self._torn = None
            raise
        self._torn = None

    def recover(self) -> None:
        """Take an interrupted pass back, if there is one."""
        if self._pass is not None and not self._pass.alive():
            self.take_back()

    def commit(self, coming: int = 0) -> None:
        """Let the pending tokens into the tiers, in all layers; see `commit_all`."""
        commit_all(self._groups, coming)

    @contextmanager
    def emptying(self) -> Iterator[None]:
        """All layers are reset, which mends whatever was broken."""
        if self._pass is not None and self._pass.elsewhere and self._pass.alive():
            self.whole()
        self._torn, self.untold = "reset", False
        yield
        self.reading.padding, self.reading.attached = None, False
        self._pass = self._torn = None
