"""Scorer `key_norm`: tokens whose keys are short."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from kvpolicy.hookspecs import hookimpl
from kvpolicy.interfaces.scorer import Given, Scorer
from kvpolicy.interfaces.site import Site


class KeyNorm(Scorer):
    """Ranks tokens by the length of their keys, the shortest first: these receive much attention.

    Source: Devoto et al. (arXiv 2406.11430, section 3). The length is the same before and after rotary embedding.
    """

    kind: Literal["key_norm"] = "key_norm"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    def score(self, given: Given, site: Site) -> Tensor:
        lengths: Tensor = given.keys.float().norm(dim=-1)
        return -lengths


@hookimpl
def kvpolicy_scorers() -> list[type[Scorer]]:
    return [KeyNorm]
