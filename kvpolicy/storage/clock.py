"""When pages last changed, whosever they are."""

from __future__ import annotations

from itertools import count

__all__ = ["Clock"]

_ticks = count(1)


class Clock:
    """When what any pages of the process hold last moved, and when pages last came, went or were copied.

    No number comes twice. While neither changes, what is known of where tokens lie still holds.
    """

    moved = grown = 0

    @classmethod
    def note(cls) -> None:
        """Tokens came or went."""
        cls.moved = next(_ticks)

    @classmethod
    def tick(cls) -> None:
        """Pages are not what they were."""
        cls.moved = cls.grown = next(_ticks)
