"""Policy `every`: one position in n."""

from typing import ClassVar, Literal

from pydantic import Field

import kvpolicy


class Every(kvpolicy.Policy):
    """Keeps the positions that are divisible by `n`.

    Source: this tutorial.
    """

    kind: Literal["every"] = "every"
    acts: ClassVar[Literal["arrival", "step"]] = "arrival"
    n: int = Field(8, ge=1, description="Keep the positions divisible by n.")

    def keep(self, positions, seen):
        return positions % self.n == 0


@kvpolicy.hookimpl
def kvpolicy_policies():
    return [Every]
