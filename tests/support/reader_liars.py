"""Readers and mergers that misbehave, each in one way, and what is to notice it."""

from __future__ import annotations

from typing import Any

import torch
from honest import GoodMerger, GoodReader, Liar, changing, counted, lying, raising, writing_first

__all__ = ["MERGERS", "READERS"]


def _readers() -> dict[str, Liar]:
    summarize, score = GoodReader.summarize, GoodReader.score
    same = "summarize must return the same tensors each time"

    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "count is none": ("count must return an integer, 1 or more", {"count": lambda self: 0}),
        "count is no integer": ("count must return an integer, 1 or more", {"count": lambda self: 2.0}),
        "count changes": ("", {"count": counted(lambda i: 1 + i % 2)}),
        "summarize gives a page": (
            "summarize must return named float tensors",
            {"summarize": changing(lambda f: {"mean": f["mean"][:, :, :1]}, summarize)},
        ),
        "summarize gives no names": (
            "summarize must return named float tensors",
            {"summarize": changing(lambda f: f["mean"], summarize)},
        ),
        "summarize names anew": (
            same,
            {
                "summarize": lambda self, k, r, s: dict.fromkeys(
                    ["mean", f"x{k.shape[2]}"], summarize(self, k, r, s)["mean"]
                )
            },
        ),
        "summarize mixes pages": ("", {"summarize": changing(lambda f: {"mean": f["mean"].cumsum(2)}, summarize)}),
        "summarize minds absent tokens": (
            "",
            {"summarize": lambda self, k, r, s: {"mean": k.float().masked_fill(~r.unsqueeze(4), 1.0).mean(3)}},
        ),
        "summarize writes": (
            "summarize must leave its arguments",
            {"summarize": lambda self, k, r, s: summarize(self, k.add_(1), r, s)},
        ),
        "summarize raises": ("summarize must not fail, found KeyError", {"summarize": raising(KeyError("mean"))}),
        "score gives a page": (
            "score must return a float tensor",
            {"score": changing(lambda f: f[..., :1], score)},
        ),
        "score gives integers": ("score must return a float tensor", {"score": changing(lambda f: f.long(), score)}),
        "score is nan": ("", {"score": changing(lambda f: f * torch.nan, score)}),
        "score mixes rows": ("", {"score": changing(lambda f: f - f.mean(0, keepdim=True).cumsum(1), score)}),
        "score mixes pages": ("", {"score": changing(lambda f: f.cumsum(3), score)}),
        "score writes": ("score must leave its arguments", {"score": writing_first(score)}),
    }
    return {f"reader: {name}": lying(GoodReader, run, **methods) for name, (run, methods) in cases.items()}


def _mergers() -> dict[str, Liar]:
    shares, wanted = GoodMerger.shares, "shares must return a float tensor"
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "one too few": (wanted, {"shares": changing(lambda f: f[..., 1:], shares)}),
        "integers": (wanted, {"shares": changing(lambda f: f.long(), shares)}),
        "no tensor": (wanted, {"shares": lambda self, g, k, s: None}),
        "writes": (
            "shares must leave its arguments",
            {"shares": lambda self, g, k, s: shares(self, g, k._replace(attention=k.attention.add_(1)), s)},
        ),
        "raises": ("shares must not fail, found KeyError", {"shares": raising(KeyError("keys"))}),
        "changes": ("", {"shares": lambda self, g, k, s: shares(self, g, k, s) * torch.rand(())}),
        "nan": ("", {"shares": changing(lambda f: f * torch.nan, shares)}),
        "mixes rows": ("", {"shares": changing(lambda f: f.cumsum(0), shares)}),
        "mixes dropped": ("", {"shares": changing(lambda f: f.cumsum(2), shares)}),
        "minds the order": ("", {"shares": changing(lambda f: f.cumsum(3), shares)}),
        "minds absent tokens": (
            "",
            {"shares": lambda self, g, k, s: shares(self, g, k, s) * k.attention.sum(2)[..., None, None]},
        ),
    }
    return {f"merger: {name}": lying(GoodMerger, run, **methods) for name, (run, methods) in cases.items()}


READERS = _readers()
MERGERS = _mergers()
