"""The base class of readers: which of the tokens that a tier holds a query reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from kvpolicy.interfaces.component import MOST, Component
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Reader"]


class Reader(Component):
    """Chooses the pages of the last tier that each query of a decode step reads. Nothing is dropped.

    A page is `page` tokens that are neighbours in the text. The core keeps what `summarize` says of each beside the
    keys, gathers the pages that score highest, and attends them together with the tiers above and the token that is
    just coming in. Updates of several tokens read all, as does a step while there are no more pages than are read.

    `read: {kind: ...}` is an option of the last tier of a recipe. The model must be attached.

    Example:
        Pages by their mean key::

            class MeanKey(Reader):
                kind: Literal["mean_key"] = "mean_key"

                def summarize(self, keys, real, site):
                    return {"mean": keys.float().sum(3) / real.sum(3, keepdim=True).clamp(min=1)}

                def score(self, query, summary, site):
                    return query @ summary["mean"].transpose(2, 3)
    """

    _role: ClassVar[str] = "reader"

    page: int = Field(16, ge=1, le=MOST, description="Tokens of a page, neighbours in the text.")
    budget: int = Field(
        1024, ge=1, le=MOST, description="Tokens of the tier that a query of a decode step reads, in whole pages."
    )

    def check(self, site: Site) -> None:
        """Raise a `RecipeError` where the options don't fit a place in a model; returns nothing."""
        return

    def count(self) -> int:
        """Pages that each query reads, 1 or more; depends on options alone. By default the budget, rounded down."""
        return max(1, self.budget // self.page)

    @abstractmethod
    def summarize(self, keys: Tensor, real: Tensor, site: Site) -> dict[str, Tensor]:
        """What is kept of some pages.

        Args:
            keys: as their store decodes them, in the model's type: `[batch, kv_heads, pages, page, head_dim]`. Not to
                be written to.
            real: which of them are tokens of the tier, `[batch, kv_heads or 1, pages, page]`; the other keys are zero.
            site: where the layer stands in its model, on the side of the keys.

        Returns:
            Named float tensors `[batch, kv_heads, pages, ...]`, whose further shape is the same each time. Pages must
            not depend on each other. What is said of a page without any token is of no account.
        """

    @abstractmethod
    def score(self, query: Tensor, summary: Mapping[str, Tensor], site: Site) -> Tensor:
        """What pages are ranked by, the highest being read.

        Args:
            query: of one token, float32 `[batch, kv_heads, query heads of a KV head, head_dim]`, as the model hands it
                to its attention, without its scaling.
            summary: what `summarize` gave of all pages. Neither is to be written to.
            site: as of `summarize`.

        Returns:
            A float tensor `[batch, kv_heads, query heads of a KV head, pages]`, or with 1 in place of the query heads
            where all of them read the same pages. A nan ranks lowest.
        """
