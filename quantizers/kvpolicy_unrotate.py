"""Transform `unrotate`: keys as they were before the model's rotary position embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.rotation import check_rotation, find_rotation, rotate, unrotate
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor


class Unrotate(Transform):
    """Turns keys back by the angles of their positions, so that they are coded as they were before RoPE.

    A channel of a key then keeps its range from token to token, which a static range or a permutation of channels
    relies on. The angles are those of the model's own rotary embedding: partial, interleaved or scaled (YaRN) ones
    included. A model without one, or with one that depends on more than the position, is refused. Decoded block by
    block in attention. Tokens that are exact are never turned.

    Source: KVQuant (arXiv 2401.18079, section 3.2), SKVQ (arXiv 2405.06219). Deviations: keys are turned back from what
    the model caches, not taken before. In half precision a model rounds its cos and sin, so that what is coded differs
    from the key before RoPE by up to 0.3%; what is decoded does not, since it is turned by the same angles.
    """

    kind: Literal["unrotate"] = "unrotate"
    needs: ClassVar[frozenset[str]] = frozenset({"positions"})

    def check(self, site: Site) -> None:
        check_rotation(site)

    def fit(self, x: Tensor, queries: Tensor | None, site: Site) -> dict[str, Tensor]:
        return find_rotation(site, x.device)

    def forward(self, x: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        assert positions is not None
        return unrotate(x, state, positions)

    def inverse(self, y: Tensor, state: Mapping[str, Tensor], positions: Tensor | None) -> Tensor:
        assert positions is not None
        return rotate(y, state, positions)


@hookimpl
def kvpolicy_transforms() -> list[type[Transform]]:
    return [Unrotate]
