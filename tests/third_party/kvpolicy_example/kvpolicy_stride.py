"""Policy `stride`: every n-th position."""

from typing import ClassVar, Literal

from pydantic import Field

import kvpolicy


class Stride(kvpolicy.Policy):
    """Keeps the positions that are divisible by `n`."""

    kind: Literal["stride"] = "stride"
    acts: ClassVar[Literal["arrival", "step"]] = "arrival"
    n: int = Field(8, ge=1, description="Keep every n-th position.")

    def keep(self, positions, seen):
        return positions % self.n == 0


@kvpolicy.hookimpl
def kvpolicy_policies():
    return [Stride]
