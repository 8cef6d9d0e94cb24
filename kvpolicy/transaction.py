"""A forward pass with a cache: it happens whole, or not at all."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from threading import get_ident
from types import FrameType
from typing import Any

from kvpolicy.padding import Padding

__all__ = ["Transaction", "caller"]

BETWEEN = ("kvpolicy", "torch._dynamo", "contextlib")
"""Modules whose frames stand between a forward pass and what it calls of ours."""


def caller() -> FrameType | None:
    """The frame of whoever runs the forward pass that is about to begin."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith(BETWEEN):
        frame = frame.f_back
    return frame


@dataclass(eq=False)
class Transaction:
    """A forward pass that brings tokens to a cache, from its beginning to its end."""

    before: int
    """Tokens seen before."""
    padding: Padding | None
    """Which of these are padding."""
    own: dict[int, dict[str, Any]]
    """What transformers' own layers held, where that can be kept by reference."""
    frame: FrameType | None
    thread: int = field(default_factory=get_ident)
    given: set[int] = field(default_factory=set)
    """Layers that got their tokens."""

    @property
    def elsewhere(self) -> bool:
        """Whether it runs in another thread."""
        return self.thread != get_ident()

    def alive(self) -> bool:
        """Whether it still runs. Where Ctrl-C ended it nobody could say so, but its frame is gone."""
        frame = sys._current_frames().get(self.thread) if self.elsewhere else sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None
