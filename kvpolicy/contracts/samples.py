"""Instances of the installed plugins to try, and what to try them on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from kvpolicy.errors import KvpolicyError, RecipeError
from kvpolicy.interfaces.calibrator import Calibrator, Watched
from kvpolicy.interfaces.checks import finished, watched
from kvpolicy.interfaces.component import Component, check_answer
from kvpolicy.interfaces.extra import Extra
from kvpolicy.interfaces.merger import Merger
from kvpolicy.interfaces.policy import Policy
from kvpolicy.interfaces.quantizer import AffineQuantizer, Quantizer
from kvpolicy.interfaces.reader import Reader
from kvpolicy.interfaces.scorer import Scorer
from kvpolicy.interfaces.site import Site
from kvpolicy.interfaces.transform import Transform
from kvpolicy.plugins import PluginInfo, registry

C = TypeVar("C", bound=Component)
NUMBERS = (0, 1, 2, 3, 7, 32, 0.3, 0.9)
Ints = NDArray[np.int64]


class TwoTier(NamedTuple):
    """A tier as the planner sees it."""

    policy: Policy | None
    keys: Any = "full"
    values: Any = "full"


class Block(Policy):
    """Lets tokens go in blocks of `size`, so that what stands below sees several arrive at once."""

    kind: Literal["contract-block"] = "contract-block"
    acts: ClassVar[Literal["arrival", "step"]] = "step"
    size: int = 8

    def keep(self, positions: Ints, seen: int) -> NDArray[np.bool_]:
        return np.arange(len(positions)) >= len(positions) // self.size * self.size


def _words(annotation: Any) -> list[Any]:
    """Every value of an option of few values."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if annotation is bool:
        return [True, False]
    return list(itertools.chain.from_iterable(_words(part) for part in get_args(annotation)))


def _numeric(annotation: Any) -> bool:
    """Whether an option takes numbers of its own choice."""
    if get_origin(annotation) is Literal:
        return False
    return annotation in (int, float) or any(map(_numeric, get_args(annotation)))


def required_options(cls: type[Component]) -> dict[str, Any]:
    """What a class must be given: the first example of each required option."""
    fields = cls.model_fields.items()
    return {name: field.examples[0] for name, field in fields if field.examples and field.is_required()}


def _variants(cls: type[C]) -> Iterator[C]:
    """The defaults, then variations of one option that the class accepts: every word, and of numbers three."""
    base = required_options(cls)
    tries: list[list[dict[str, Any]]] = [[base]]
    for name, field in cls.model_fields.items():
        if name != "kind":
            tries += [[{**base, name: value} for value in [*(field.examples or []), *_words(field.annotation)]]]
            tries += [[{**base, name: value} for value in NUMBERS] if _numeric(field.annotation) else []]
    seen: set[str] = set()
    for i, options in enumerate(tries):
        made = list(_accepted(cls, options))
        few = made if i % 2 or len(made) < 4 else [made[0], made[len(made) // 2], made[-1]]
        for variant in few:
            if repr(variant) not in seen:
                seen.add(repr(variant))
                yield variant


def _accepted(cls: type[C], tries: list[dict[str, Any]]) -> Iterator[C]:
    for options in tries:
        with suppress(Exception):  # whether the defaults work is a test of its own
            yield cls.model_validate(options, strict=True)


def _params(known: dict[str, PluginInfo[Any]]) -> list[Any]:
    made = [variant for kind in sorted(known) for variant in _variants(known[kind].cls)]
    return sorted(made, key=lambda component: component.kind)


def name_of(component: Component) -> str:
    """Kind and options that are not at their defaults, for the names of tests."""
    fields = type(component).model_fields
    shown = [f"{k}={v}" for k, v in component if k != "kind" and v != fields[k].default]
    return "-".join([component.kind, *shown])


def policies() -> list[Policy]:
    """Policies to try."""
    return _params(registry().policies)


def scorers() -> list[Scorer]:
    """Scorers to try."""
    return _params(registry().scorers)


def _told_apart_by(component: Component) -> set[str]:
    """The options that are not at their defaults."""
    fields = type(component).model_fields
    return {name for name, value in component if name != "kind" and value != fields[name].default}


def readers() -> list[Reader]:
    """Readers to try."""
    return _params(registry().readers)


def mergers() -> list[Merger]:
    """Mergers to try."""
    return _params(registry().mergers)


def quantizers() -> list[Quantizer]:
    """Quantizers to try; affine ones also per channel, in every width."""
    made: dict[str, Quantizer] = {}
    for quantizer in _params(registry().quantizers):
        tries = [quantizer]
        if isinstance(quantizer, AffineQuantizer) and _told_apart_by(quantizer) <= {"nbits", "group_size"}:
            tries.append(quantizer.model_copy(update={"per": "channel"}))
        for tried in tries:
            try:
                same = type(tried).model_validate(tried.model_dump(), strict=True)
            except (ValidationError, KvpolicyError):
                continue
            if not _fits_nowhere(same):
                made.setdefault(name_of(same), same)
    return list(made.values())


def extras() -> list[Extra]:
    """Extras to try."""
    return _params(registry().extras)


def transforms() -> list[Transform]:
    """Transforms to try."""
    return _params(registry().transforms)


def calibrators() -> list[Calibrator]:
    """Calibrators to try."""
    return _params(registry().calibrators)


SAMPLES, SAMPLE = 3, 64
"""Samples that a calibrator is shown, and the tokens of each."""


def run_calibrator(
    calibrator: Calibrator, site: Site, unrotated: bool = True, constant: bool = False
) -> dict[str, Tensor]:
    """What a calibrator finds out about a layer on made-up samples."""
    state: dict[str, Tensor] = {}
    for turn, needs in enumerate(type(calibrator).turns):
        for sample in range(SAMPLES):
            given = _watched(site, sample, needs, unrotated, constant)
            # As a file gives it back, after an interruption.
            state = watched(calibrator, given, {name: t.clone() for name, t in state.items()}, turn)
    return finished(calibrator, state, site)


def _watched(site: Site, seed: int, needs: frozenset[str], unrotated: bool, constant: bool) -> Watched:
    shape = (1, site.kv_heads, SAMPLE, site.head_dim)
    keys, values, bare = (tensor(shape, torch.float32, 10 * seed + i) * (not constant) for i in range(3))
    sides = {"keys": keys, "values": values, **({"unrotated": bare} if unrotated else {})}
    gradients = {n: tensor(shape, torch.float32, seed + 100) * 1e-3 for n in sides} if "gradients" in needs else {}
    weights = torch.rand(8, SAMPLE, generator=torch.Generator().manual_seed(seed)).tril(SAMPLE - 8)
    attention = weights / weights.sum(1, keepdim=True) if "attention" in needs else None
    return Watched(site, SAMPLES * SAMPLE, keys, values, sides.get("unrotated"), gradients, attention)


@lru_cache(maxsize=16)
def calibration(kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    """What the installed calibrators find out about a layer, all together."""
    site = Site(0, 1, "keys", kv_heads, head_dim)
    found: dict[str, Tensor] = {}
    for kind in sorted(registry().calibrators):
        cls = registry().calibrators[kind].cls
        found |= run_calibrator(cls.model_validate(required_options(cls), strict=True), site)
    return found


def _fits_nowhere(quantizer: Quantizer) -> bool:
    """Whether it refuses heads of 64 channels, its group size doesn't divide these, or suits per: channel only."""
    if not isinstance(quantizer, AffineQuantizer):
        try:
            check_answer(quantizer, "check", 64)
        except RecipeError:
            return True
        except KvpolicyError:  # a test of its own tells
            return False
    if not isinstance(quantizer, AffineQuantizer) or quantizer.per == "channel":
        return False
    return quantizer.group_size == "arrival" or (
        isinstance(quantizer.group_size, int) and 64 % quantizer.group_size > 0
    )


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers, not quite around zero."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers with some channels far larger than others, as keys have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x[..., ::16] *= 8
    return (x + 0.5).to(dtype)
