"""Scorer `kvpress`: what a press of NVIDIA's kvpress ranks tokens by."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.errors import MissingDependencyError, RecipeError
from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.scorer import Given, Scorer
from kvpolicy.interfaces.site import Site

LIBRARY = "kvpress"


class KVPress(Scorer):
    """Ranks tokens as a scorer of kvpress does: a subclass of its `ScorerPress`, by the contract of kvpress 0.5.5.

    A press is shown keys, values and queries. It finds the queries where it would compute them: as hidden states,
    before the rotary embedding, on an attention module that hands them through. What else it reads of a model is
    refused by name. It is asked once for each update of the prompt; rows with padding are shown to it one by one,
    without. How many tokens stay is the policy's to say; some presses look at their `compression_ratio` as they score.
    """

    kind: Literal["kvpress"] = "kvpress"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "values", "query", "positions"})
    requires: ClassVar[str | None] = "kvpress"
    pools: ClassVar[bool] = True
    press: str = Field(description="Name of the press, as in kvpress.", examples=["KnormPress"])
    options: dict[str, int | float | bool | str] = Field(
        {}, description="Options of the press, such as {window_size: 32}."
    )

    def __hash__(self) -> int:
        return hash((self.press, *sorted((k, repr(v)) for k, v in self.options.items())))

    def check(self, site: Site) -> None:
        self._made()

    def _made(self) -> Any:
        """The press.

        Raises:
            MissingDependencyError: kvpress is not installed, or can't be imported beside what is.
            RecipeError: it has no such scorer, or not with these options.
        """
        try:
            library = importlib.import_module(LIBRARY)
        except Exception as error:  # of another range of transformers it fails in many ways
            raise MissingDependencyError(
                f"scorer 'kvpress' must import kvpress, found {type(error).__name__}: {str(error)[:200]}; install it "
                "(pip install kvpress) in a release that takes the transformers installed here, or use kvpolicy's own "
                "scorers (kvpolicy plugins)"
            ) from error
        cls = getattr(library, self.press, None)
        if not isinstance(cls, type) or not callable(getattr(cls, "score", None)):
            raise RecipeError(
                f"press must name a scorer of kvpress, found {self.press!r}; those are the subclasses of ScorerPress, "
                "such as SnapKVPress, ExpectedAttentionPress, TOVAPress, KnormPress and KeyDiffPress"
            )
        try:
            return cls(**self.options)
        except Exception as error:
            raise RecipeError(
                f"options must be those of {self.press}, found {type(error).__name__}: {str(error)[:200]}"
            ) from error

    def score(self, given: Given, site: Site) -> Tensor:
        press, real = self._made(), given.real[:, 0]
        found = torch.zeros_like(given.keys[..., 0], dtype=torch.float32)
        shown = given.keys, given.values, given.query
        if shown[0].shape[2] == shown[2].shape[2] and bool(real.all()):
            return self._asked(press, shown, given.positions[:, 0], site)
        for row, own in enumerate(real):
            at = own.nonzero()[:, 0]
            if len(at) and shown[0].shape[2] == shown[2].shape[2]:
                parts = [x[row : row + 1].index_select(2, at) for x in shown]
                place = given.positions[row : row + 1, 0].index_select(1, at)
                found[row : row + 1, :, at] = self._asked(press, parts, place, site)
        return found

    def _asked(self, press: Any, shown: Any, positions: Tensor, site: Site) -> Tensor:
        """Ranks of tokens of which none is padding."""
        keys, values, query = shown
        cos, sin = (
            (torch.ones_like(query[:, 0]), torch.zeros_like(query[:, 0]))
            if site.rotary is None
            else (x.to(query.dtype) for x in site.rotary(positions))
        )
        if cos.shape[-1] != query.shape[3] or site.interleaved:
            raise RecipeError(
                "scorer 'kvpress' takes models that rotate all channels of a head, in two halves, as kvpress does, "
                "found another rotary embedding; use kvpolicy's own scorers (kvpolicy plugins)"
            )
        plain = query.float() * cos.float().unsqueeze(1) - _swapped(query.float()) * sin.float().unsqueeze(1)
        plain = plain / (cos.float().square() + sin.float().square()).unsqueeze(1)
        hidden = plain.to(query.dtype).transpose(1, 2).flatten(2)
        module = _Module(query.shape[1], keys.shape[1], query.shape[3], site)
        told = {"position_embeddings": (cos, sin), "hidden_states": hidden}
        try:
            found = press.score(module, hidden, keys, values, None, told)
        except Exception as error:
            raise RecipeError(
                f"press {self.press!r} must score {keys.shape[2]} tokens by keys, values and queries, found "
                f"{type(error).__name__}: {str(error)[:200]}; give it more tokens, or another press"
            ) from error
        if not isinstance(found, Tensor) or found.shape != keys.shape[:3]:
            raise RecipeError(
                f"press {self.press!r} must give scores {tuple(keys.shape[:3])}, found "
                f"{tuple(getattr(found, 'shape', ())) or type(found).__name__}; use another press"
            )
        return found.float()


def _swapped(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


class _Module:
    """What a press finds of an attention module: it takes hidden states for queries."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, site: Site) -> None:
        self.config = SimpleNamespace(
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            hidden_size=heads * head_dim,
            num_hidden_layers=site.layers,
        )
        self.head_dim, self.layer_idx, self.num_key_value_groups = head_dim, site.layer, heads // kv_heads
        self._rotary = site.rotary

    def q_proj(self, hidden: Tensor) -> Tensor:
        return hidden

    def rotary_emb(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self._rotary is None:
            ones = like.new_ones((*positions.shape, self.head_dim))
            return ones, torch.zeros_like(ones)
        cos, sin = self._rotary(positions)
        return cos.to(like.dtype), sin.to(like.dtype)


@hookimpl
def kvpolicy_scorers() -> list[type[Scorer]]:
    return [KVPress]
