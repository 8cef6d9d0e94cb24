"""The base class of scorers that see the model read its prompt again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from kvpolicy.errors import PluginError
from kvpolicy.interfaces.component import TRY, call
from kvpolicy.interfaces.scorer import Given, Scorer
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PromptScorer", "noted", "settled", "spans_of"]


class PromptScorer(Scorer):
    """Scores the tokens of a prompt by what the model does when it is fed parts of it once more.

    `kvpolicy.prepare(model, cache, input_ids)` runs these passes, row by row and without padding, on an exact cache,
    and then fills the cache of the recipe. Without it the cache refuses tokens.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"told"})

    @abstractmethod
    def spans(self, length: int) -> Sequence[tuple[int, int]]:
        """The parts of a prompt of so many tokens that are fed again: each its first token and its last + 1."""

    @abstractmethod
    def note(self, query: Tensor, keys: Tensor, span: tuple[int, int], scaling: float, site: Site) -> Tensor:
        """What the tokens of a span score in a layer.

        Args:
            query: of the instruction and of the span, fed after the prompt: `[1, heads, tokens, head_dim]`.
            keys: of the prompt, and then of these tokens: `[1, kv_heads, all tokens, head_dim]`.
            span: the part that is fed.
            scaling: factor of the model's products.
            site: where the layer stands in its model.

        Returns:
            Scores of the span's tokens, float32 `[1, kv_heads, tokens]`.
        """

    @abstractmethod
    def settle(self, scores: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """What the tokens of a prompt score in the end.

        Args:
            scores: of each layer what `note` gave, spans side by side: `[1, kv_heads, tokens]`; minus infinity where no
                span was.

        Returns:
            The same for each layer, in float32.
        """

    def score(self, given: Given, site: Site) -> Tensor:
        return given.told


def _fail(scorer: PromptScorer, rule: str, found: Any) -> PluginError:
    return PluginError(f"scorer {scorer.kind!r}: {rule}, found {found!s:.200}. {TRY}")


def _shape(x: Any) -> tuple[int, ...] | str:
    return tuple(x.shape) if hasattr(x, "shape") else type(x).__name__


def spans_of(scorer: PromptScorer, length: int) -> list[tuple[int, int]]:
    """The parts of a prompt that are fed again.

    Raises:
        PluginError: the scorer raised, or gave something else.
    """
    found = call(scorer, "spans", length)
    rule = f"spans must give pairs of a first token and a last + 1, up to {length}"
    if not isinstance(found, list | tuple) or not found:
        raise _fail(scorer, rule, found)
    for span in found:
        whole = isinstance(span, tuple) and len(span) == 2 and all(type(x) is int for x in span)
        if not whole or not 0 <= span[0] < span[1] <= length:
            raise _fail(scorer, rule, span)
    return list(found)


def noted(
    scorer: PromptScorer, query: Tensor, keys: Tensor, span: tuple[int, int], scaling: float, site: Site
) -> Tensor:
    """What a scorer gives to the tokens of a span.

    Raises:
        PluginError: it raised, or gave something else.
    """
    found = call(scorer, "note", query, keys, span, scaling, site)
    shape = (1, keys.shape[1], span[1] - span[0])
    if _shape(found) != shape or not found.is_floating_point() or found.device != keys.device:
        raise _fail(scorer, f"note must return a float tensor {shape} on {keys.device}", _shape(found))
    scores: Tensor = found.float()
    return scores


def settled(scorer: PromptScorer, scores: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """What the tokens of a prompt score in the end, by layer.

    Raises:
        PluginError: it raised, or gave something else.
    """
    found = call(scorer, "settle", dict(scores))
    shapes = {layer: tuple(x.shape) for layer, x in scores.items()}
    given = {layer: _shape(x) for layer, x in found.items()} if isinstance(found, dict) else type(found).__name__
    if given != shapes or not all(x.is_floating_point() for x in found.values()):
        raise _fail(scorer, f"settle must return float tensors {shapes}", given)
    return {layer: x.float() for layer, x in found.items()}
