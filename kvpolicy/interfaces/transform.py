"""The base class of transforms: linear maps between keys or values and what is coded of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from kvpolicy.interfaces.component import Component
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NEEDS", "Transform"]

NEEDS = frozenset({"positions", "queries", "calibration"})


class Transform(Component):
    """A linear map: `y = forward(x)` is coded in place of `x`, and `x = inverse(y)` is what the codes stand for.

    `transforms: [...]` is an option of every quantizer; they apply from left to right. Tokens that wait for their group
    are kept as they came and pass through the transforms when the group is full.

    Attention on an attached model decodes nothing where every transform of a store has an `adjoint`: the query goes
    through it once for keys, and for values `inverse` is applied once, to the weighted sum. Otherwise keys and values
    are decoded block by block. A map with a constant part is not linear and must leave `adjoint` out.

    All arithmetic is in the type of the tensor that is given, float32 or float64. Tensors are not to be written to.

    Example:
        Channels in another order::

            class Reverse(Transform):
                kind: Literal["reverse"] = "reverse"

                def forward(self, x, state, positions):
                    return x.flip(-1)

                def inverse(self, y, state, positions):
                    return y.flip(-1)

                def adjoint(self, q, state):
                    return q.flip(-1)
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """What it must be given, of `"positions"`, `"queries"` and `"calibration"`.

    Without `"positions"`, `forward` and `inverse` are given None for them; with it, `adjoint` is not asked. A store
    keeps the position of each token then, as int32. With `"queries"` it serves keys alone, as the first of a list, and
    only an attached model shows them."""

    butterflies: ClassVar[bool] = False
    """Whether `forward`, where `fit` keeps nothing and head_dim is a power of two, is the Hadamard matrix by sums and
    differences of channels that lie 1, 2, 4, ... apart, then times `head_dim**-0.5`. Backends may do it in its place.
    A subclass that overrides anything is taken to be none, unless it says so itself."""

    divides: ClassVar[str | None] = None
    """The name of the divisors `[batch or 1, kv_heads or 1, 1, head_dim]`, if these are all that `fit` keeps, of the
    tokens alone, and `forward` divides by them; `inverse` and `adjoint` multiply by them. All three may be done in its
    place. Subclasses as for `butterflies`."""

    _role: ClassVar[str] = "transform"

    def needed(self) -> frozenset[str]:
        """What it must be given with the options that it has: `needs`, or a part of that."""
        return self.needs

    def check(self, site: Site) -> None:
        """Raise a `RecipeError` where the options don't fit a place in a model; returns nothing."""
        return

    def fit(self, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
        """What the transform keeps of the first tokens that reach a store: once per store; saved, and counted.

        Args:
            x: these tokens, in the type of the model: `[batch, kv_heads, tokens, head_dim]`.
            queries: None without `"queries"` in `needed()`. Otherwise the least and the greatest number of each
                channel, zero counting as one: over the queries that came until now, of all heads that read a KV head,
                as they meet its keys, without padding. float32 `[batch, kv_heads, 2, head_dim]`.
            site: where the store stands.

        Returns:
            Named tensors `[batch or 1, kv_heads or 1, ...]`, on the device of `x`, whose types and shapes don't depend
            on how many tokens there are. Rows of a batch must not depend on each other. As the first tokens are those
            of the first update, codes depend on how a prompt is cut where this looks at `x`.
        """
        return {}

    @abstractmethod
    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        """What is coded of `x`, in its shape and type.

        Args:
            x: `[batch, kv_heads, tokens, head_dim]`.
            state: what `fit` returned.
            positions: the position in its row's text of each token, `[batch, kv_heads or 1, tokens]`; padding has some
                position of no meaning.
        """

    @abstractmethod
    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        """The inverse of `forward`. `y` may also be a weighted sum of tokens, one for each query."""

    def adjoint(self, q: Tensor, state: Mapping[str, Tensor]) -> Tensor | None:
        """The map of queries for which `<q, inverse(y)> == <adjoint(q), y>`, or None: decode block by block.

        `q` is `[batch, kv_heads, queries, head_dim]`. The answer is None always or never.
        """
        return None
