"""Presets of other projects as recipes: tables of widths, layer by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from kvpolicy.errors import RecipeError
from kvpolicy.recipe.yaml import BAD, Document, read_file
from kvpolicy.words import clip, in_words, listed, quoted

__all__ = ["GROUPS", "Groups", "kvtuner_recipe"]

Groups = Literal["channel", "token"]
GROUPS = ("channel", "token")
WIDTHS = (1, 2, 3, 4, 8)
SIDES = ("nbits_key", "nbits_value")
Pair = tuple[int, int]
"""Bits of keys and of values."""
_EXACT = "&exact {policy: {kind: residual, length: $residual}, store: full}"
_STORES = {
    "channel": (
        "{kind: int, nbits: %d, per: channel, group_size: $group_size}",
        "{kind: int, nbits: %d, per: token, group_size: $group_size}",
    ),
    "token": ("{kind: int, nbits: %d, per: token, group_size: head}",) * 2,
}


def kvtuner_recipe(path: Path, groups: Groups | None = None, name: str | None = None) -> str:
    """The YAML of a recipe with the widths of a KVTuner preset.

    Args:
        path: a mapping of each layer, from 0, to `nbits_key` and `nbits_value`.
        groups: `channel` for presets that were tuned for KIVI's groups, `token` for one group per token and head. None:
            as the file's name says, which has `kivi` or `pertoken` in it.
        name: the recipe's; None: made from the file's.

    Raises:
        RecipeError: the file is no such preset, or its name doesn't tell the groups.
    """
    pairs = _pairs(read_file(path))
    found = groups or _groups(path.stem)
    if found is None:
        raise RecipeError(
            f"{clip(str(path), 300)}: a preset's name must have kivi or pertoken in it, found {quoted(path.name)}; "
            "give --groups channel or --groups token"
        )
    if name is None:
        name = re.sub(r"[^a-z0-9.]+", "-", path.stem.lower()).strip("-") or "kvtuner"
    if not name.strip() or not name.isprintable():
        raise RecipeError(f"a recipe's name must be text on one line, found {quoted(name)}")
    return "\n".join(_lines(pairs, found, name)) + "\n"


def _groups(stem: str) -> Groups | None:
    """What the name of a preset says of its groups."""
    words = re.split(r"[^a-z]+", stem.lower())
    return "channel" if "kivi" in words else "token" if "pertoken" in words else None


def _pairs(document: Document) -> list[Pair]:
    """The widths of each layer."""
    found: dict[int, Pair] = {}
    if not document.data:
        document.note((), "a preset must map each layer to nbits_key and nbits_value, found none")
    for key, widths in document.data.items():
        if not re.fullmatch(r"\d{1,4}", key):
            document.note((key,), f"a preset's keys must be layers, counted from 0, found {quoted(key)}")
        elif _is_layer(widths):
            found[int(key)] = _pair(document, key, widths)
        elif widths is not BAD:
            what = listed(widths) if isinstance(widths, dict) else in_words(widths)
            need = "a layer must have nbits_key and nbits_value"
            document.fail((key,), f"{need}, found {what}; presets by head are none")
    missing = [i for i in range(len(document.data)) if i not in found]
    if missing and not document.problems:
        document.note((), f"a preset must name layers 0 to {max(found)}, found none for layer {missing[0]}")
    document.check()
    return [found[i] for i in range(len(found))]


def _is_layer(widths: Any) -> bool:
    return isinstance(widths, dict) and set(widths) == set(SIDES)


def _pair(document: Document, key: str, widths: dict[str, Any]) -> Pair:
    bits = []
    for side in SIDES:
        width = widths[side]
        fits = isinstance(width, int) and not isinstance(width, bool) and width in WIDTHS
        if not fits and width is not BAD:
            document.note((key, side), f"must be one of {', '.join(map(str, WIDTHS))} bits, found {in_words(width)}")
        bits.append(width if fits and isinstance(width, int) else 0)
    return bits[0], bits[1]


def _lines(pairs: Sequence[Pair], groups: Groups, name: str) -> Iterator[str]:
    mean = sum(map(sum, pairs)) / 2 / len(pairs)
    usual = Counter(pairs).most_common(1)[0][0]
    shape = "keys per channel, values per token" if groups == "channel" else "one group per token and head"
    yield f"name: {_text(name)}"
    yield "summary: >-"
    yield f"  KVTuner's widths of keys and values, layer by layer, {mean:.4g} bits on average;"
    yield f"  {shape}."
    yield "source: https://arxiv.org/abs/2502.04420"
    yield f"model_layers: {len(pairs)}"
    if groups == "channel":
        yield "params: {residual: 32, group_size: 32}"
    yield "tiers:"
    yield from _tiers(usual, groups, "  ", True)
    runs = [(pair, [i for i, _ in run]) for pair, run in groupby(enumerate(pairs), lambda item: item[1])]
    others = [(pair, layers) for pair, layers in runs if pair != usual]
    if others:
        yield "layers:"
    told: set[Pair] = set()
    for pair, layers in others:
        key = f'  "{layers[0]}":' if len(layers) == 1 else f'  "{layers[0]}-{layers[-1]}":'
        anchor = f"k{pair[0]}v{pair[1]}"
        if pair in told:
            yield f"{key} *{anchor}"
            continue
        told.add(pair)
        yield f"{key} &{anchor}"
        yield from _tiers(pair, groups, "    ", False)


def _tiers(pair: Pair, groups: Groups, indent: str, first: bool) -> Iterator[str]:
    if groups == "channel":
        yield f"{indent}- {_EXACT if first else '*exact'}"
    for side, store, bits, mark in zip(("keys", "values"), _STORES[groups], pair, "- ", strict=True):
        yield f"{indent}{mark} {side}: {store % bits}"


def _text(name: str) -> str:
    """As YAML writes text that may look like something else."""
    return name if re.fullmatch(r"[a-z][a-z0-9.-]*[a-z0-9]", name) else "'" + name.replace("'", "''") + "'"
