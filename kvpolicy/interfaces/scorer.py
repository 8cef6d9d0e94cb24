"""The base class of scorers: what the tokens of a tier are ranked by."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.component import TRY, Component
from kvpolicy.interfaces.scores import Scores
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SHOWN", "Given", "Scorer"]

SHOWN = frozenset({"keys", "values", "query", "told", "attention", "queries", "positions"})
"""What a scorer may ask for."""
BESIDE = {"positions": "ages", "query": "real"}
"""What comes with some of it."""


class Given:
    """What a scorer asked for in its `needs`, and nothing else: tensors of some tokens, in token order.

    Nothing of it is to be written to.

    Raises:
        PluginError: something is read that `needs` does not name.
    """

    keys: Tensor
    """As they came, before any store encodes them, in the model's type: `[batch, kv_heads, tokens, head_dim]`."""
    values: Tensor
    """The same of values."""
    query: Tensor
    """What the tokens ask, as the model hands it to its attention, after its rotary embedding: `[batch, heads, tokens,
    head_dim]`, the heads of a KV head side by side. Of layers that leave queries out it is the newest ones'."""
    real: Tensor
    """Comes with `query`: which tokens are no padding, `[batch, kv_heads or 1, tokens]`."""
    told: Tensor
    """What the cache was told of the tokens of the prompt, `[batch, kv_heads, tokens]`; see `PromptScorer`."""
    attention: Tensor
    """Attention received, summed over the queries that `Scorer.scores` counts: `[batch, kv_heads or 1, tokens]`, in
    float32; a mean over the heads where all of them select the same tokens."""
    queries: Tensor
    """How many of those queries could see the token: `[batch, kv_heads or 1, tokens]`, float32."""
    positions: Tensor
    """Place of the token among the real ones of its row: `[batch, kv_heads or 1, tokens]`, integers. Some tokens may be
    padding, or no token; what they score is of no account."""
    ages: Tensor
    """Comes with `positions`: tokens of its row seen from this one on, itself included."""

    def __init__(self, asker: str = "a scorer", /, **shown: Tensor) -> None:
        self.__dict__.update(shown)
        self._asker = asker

    def __getattr__(self, name: str) -> Any:
        if name in SHOWN or name in BESIDE.values():
            asked = next((x for x, beside in BESIDE.items() if beside == name), name)
            raise PluginError(
                f"{self._asker} must name what it reads, found {name!r} read; add {asked!r} to its needs. {TRY}"
            )
        raise AttributeError(name)


class Scorer(Component):
    """Scores tokens; a policy keeps those that score highest. An option of policy `rank`.

    A scorer that needs keys, values or the query is asked once for each token, as it enters the tiers: with all tokens
    of its update, before any store encodes them. Its score is stored beside the token. Attention is then what the
    queries of the token's own update gave to it. Tokens after the prompt are not scored where its policy acts with the
    prompt's end.

    One that needs none of them is asked each time the policy acts, with the tokens of its tier, and all the attention
    that they received so far. Tokens of other tiers stand before them, as if they were no tokens, with zeros.

    One that needs keys, values or the query and writes `again` does both: what `score` gives as a token enters is
    stored, and each time the policy acts the tokens are ranked by what `again` makes of that and of the attention
    received so far.

    Without `"attention"`, `"queries"` and `"query"` it works whether or not the model is attached.

    Example:
        Tokens with large values::

            class ValueNorm(Scorer):
                kind: Literal["value_norm"] = "value_norm"
                needs: ClassVar[frozenset[str]] = frozenset({"values"})

                def score(self, given, site):
                    return given.values.float().norm(dim=-1)
    """

    _role: ClassVar[str] = "scorer"
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it must be given, at least one of `"keys"`, `"values"`, `"query"`, `"attention"`, `"queries"` and
    `"positions"`."""
    requires: ClassVar[str | None] = None
    """The extra of its distribution that brings the library it needs, or the library itself; None for none."""
    pools: ClassVar[bool] = False
    """Whether the score of a token depends on other tokens too, such as its neighbours. What stays then depends on how
    a prompt is cut into updates, if the scorer needs keys or values."""

    def check(self, site: Site) -> None:
        """Raise a `RecipeError` where the options don't fit a place in a model; returns nothing."""
        return

    def scores(self) -> Scores:
        """Which attention is summed up, if it needs any; the same each time. By default that of all queries."""
        return Scores()

    @abstractmethod
    def score(self, given: Given, site: Site) -> Tensor:
        """What tokens are ranked by, the highest staying.

        Args:
            given: what `needs` names.
            site: where the layer stands in its model, on the side of the keys.

        Returns:
            A float tensor `[batch, kv_heads, tokens]`, or with one head where what it is given has one, on the device
            of that. A nan ranks lowest. Rows of the batch must not depend on each other, nor heads on their order.
        """

    def again(self, noted: Tensor, given: Given, site: Site) -> Tensor:
        """What tokens are ranked by each time the policy acts, where that changes after they came.

        Args:
            noted: what `score` gave as each token came, float32 `[batch, kv_heads or 1, tokens]`. Some may be no token.
            given: what `needs` names, without keys and values; attention is all that was received so far.
            site: as of `score`.

        Returns:
            A float tensor of the shape of `noted`.
        """
        return noted

    @property
    def _again(self) -> bool:
        """Whether what `score` gives is only a part of what tokens are ranked by."""
        return self._on_arrival and type(self).again is not Scorer.again

    @property
    def _on_arrival(self) -> bool:
        """Whether it scores tokens once, as they come."""
        return bool(self.needs & {"keys", "values", "query", "told"})

    @property
    def _sums(self) -> bool:
        """Whether it needs attention summed up."""
        return bool(self.needs & {"attention", "queries"})
