"""A lock that nobody waits for: who comes second is refused."""

from __future__ import annotations

from threading import get_ident
from typing import Any

from kvpolicy.errors import CacheError


class OneThread:
    """Within it, one thread updates one layer."""

    def __init__(self) -> None:
        self.user: dict[str, int] = {}
        """The thread that is doing so right now."""

    def __enter__(self) -> None:
        me = get_ident()
        if self.user.setdefault("thread", me) != me:
            raise CacheError("a cache serves one thread at a time, and another is updating this one; use another cache")

    def __exit__(self, *_: Any) -> None:
        self.user.pop("thread", None)

    def __reduce__(self) -> tuple[Any, ...]:
        return OneThread, ()
