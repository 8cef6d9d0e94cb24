"""Recipes that take a calibration: what they decode to by their papers' formulas, and that they serve a model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpolicy_log import Log
from safetensors.torch import load_file
from torch import Tensor

from kvpolicy import CompressedCache, Recipe, attach, load_recipe, make_cache
from kvpolicy.errors import CacheError, PluginError, RecipeError
from kvpolicy.hf.calibration import read_calibration, write_calibration
from kvpolicy.recipe.load import bundled_names
from kvpolicy.recipe.spec import Tier
from tests.support.calibrations import calibrated, calibration
from tests.support.models import exact, ids, tiny
from tests.support.saved import rewritten
from tests.support.words import CACHE

NAMES = [name for name in bundled_names() if load_recipe(name).calibration and name != "logquant-exponent"]
"""The bundled recipes whose codes take a calibration."""
SMALL: dict[str, dict[str, Any]] = {"skvq": {"window": 8, "group_size": 8}, "kvquant": {"share": 0.05}}
SMALL["skvq-1.5"] = SMALL["skvq"]


def recipe_of(name: str, model: Any, **params: Any) -> Any:
    family = name.removesuffix("-post-rope")
    return calibrated(name, model, **{**SMALL.get(family, {}), **params})


def turned(x: Tensor, sign: int) -> Tensor:
    """Llama's rotation of all tokens of a text, or its inverse, in float64."""
    half = x.shape[3] // 2
    frequency = 1e4 ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[3])
    angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * frequency
    a, b = x[..., :half], x[..., half:]
    sin = sign * angle.sin()
    return torch.cat([a * angle.cos() - b * sin, b * angle.cos() + a * sin], dim=-1)


def without_outlier(y: Tensor) -> Tensor:
    """The mean of the others in place of the largest magnitude of a token and head."""
    taken = torch.zeros_like(y, dtype=torch.bool).scatter_(3, y.abs().argmax(3, keepdim=True), True)
    mean = y.masked_fill(taken, 0).sum(3, keepdim=True) / (y.shape[3] - 1)
    return torch.where(taken, mean, y), taken


def nearest(y: Tensor, levels: Tensor) -> Tensor:
    return levels[(y.unsqueeze(-1) - levels).abs().argmin(-1)]


def kvquant(x: Tensor, side: str, bare: bool, held: dict[str, Tensor]) -> Tensor:
    name = "values" if side == "values" else "unrotated" if bare else "keys"
    levels = held[f"{name}.levels3"].double()
    y = turned(x, -1) if bare and side == "keys" else x
    if side == "keys":
        low, high = (held[f"{name}.{n}"].double()[None, :, None] for n in ("low", "high"))
        y = (y - (high + low) / 2) / ((high - low) / 2)
        rest, taken = without_outlier(y)
        y = torch.where(taken, y, nearest(rest, levels)) * (high - low) / 2 + (high + low) / 2
        return turned(y, 1) if bare else y
    rest, taken = without_outlier(y)
    low, high = rest.amin(3, keepdim=True), rest.amax(3, keepdim=True)
    half, middle = (high - low) / 2, (high + low) / 2
    return torch.where(taken, y, nearest((rest - middle) / half, levels) * half + middle)


def skvq_error(x: Tensor, found: Tensor, side: str, bare: bool, held: dict[str, Tensor], steps: int) -> None:
    """Within its group each number is at most half a step of the clipped range off, or as far as it was clipped.

    A step is as wide as float8 scales may make it.
    """
    x, found = (turned(t, -1) if bare and side == "keys" else t for t in (x, found))
    name = "values" if side == "values" else "unrotated" if bare else "keys"
    points = torch.stack([held[f"{name}.low"], held[f"{name}.high"]], dim=-1).double()
    for head in range(x.shape[1]):
        centred = points[head] - points[head].mean(0)
        _, vectors = torch.linalg.eigh(centred.T @ centred)  # the line along which the points are spread most
        order = (centred @ vectors[:, -1]).argsort()
        groups, decoded = (t[:, head][..., order].unflatten(-1, (-1, 8)) for t in (x, found))
        low, high = groups.amin(-1, keepdim=True) * 0.95, groups.amax(-1, keepdim=True) * 0.95
        clipped = groups.clamp(low, high)
        # The offset loses up to 1/8 of itself, the scale as much.
        step = ((high - low) / steps + low.abs() / 8) * 1.2 + 0.01
        assert ((decoded - clipped).abs() <= step / 2 + 1e-6).all()


def wkvquant(x: Tensor, side: str, held: dict[str, Tensor]) -> Tensor:
    largest = torch.maximum(held[f"{side}.low"].abs(), held[f"{side}.high"].abs()).double().sqrt()
    divisor = largest.clamp(min=0.25 * largest.mean(1, keepdim=True))[None, :, None]
    y = x / divisor
    low, high = y.amin(3, keepdim=True), y.amax(3, keepdim=True)
    return (((y - low) / (high - low) * 15).round() / 15 * (high - low) + low) * divisor


@pytest.mark.parametrize("name", NAMES)
def test_what_is_decoded_is_what_the_formulas_say(name: str) -> None:
    model = tiny("llama")
    recipe = recipe_of(name, model)
    cache, truth = make_cache(recipe, model), exact(model)
    with torch.no_grad():
        for held in (cache, truth):
            model(ids(60, seed=9), **{CACHE: held})
    method, bare = Path(recipe.calibration).stem.rpartition("-")[2], not name.endswith("-post-rope")
    file = load_file(calibration(model, method))
    for layer in (0, 1):
        held = {n.partition(".")[2]: t for n, t in file.items() if n.startswith(f"{layer}.")}
        cache.commit()
        for side, found in zip(("keys", "values"), cache.dense(layer), strict=True):
            x, found = getattr(truth.layers[layer], side).double(), found.double()
            if method == "skvq":
                assert torch.equal(found[:, :, :5], x[:, :, :5])
                assert torch.equal(found[:, :, -8:], x[:, :, -8:])
                steps = 2 if name == "skvq-1.5" and side == "values" else 3
                skvq_error(x[:, :, :-8] * 1, torch.cat([x[:, :, :5], found[:, :, 5:-8]], 2), side, bare, held, steps)
                continue
            expected = wkvquant(x, side, held) if method == "wkvquant" else kvquant(x, side, bare, held)
            first = 1 if method == "kvquant" else 0
            assert torch.equal(found[:, :, :first], x[:, :, :first])
            off = (found - expected)[:, :, first:].abs() > 1e-3 * x.abs().max()
            assert off.double().mean() < 0.01, "but for codes at a bound, and two largest that tie"


@pytest.mark.parametrize("name", [*NAMES, "best-4bit"])
def test_a_padded_batch_is_served_attached_and_not(name: str, tmp_path: Path) -> None:
    model = tiny("llama")
    if name == "best-4bit":  # which takes no calibration, but keys before RoPE
        recipe = load_recipe(name, window=8, flush=4, group_size=16)
    else:  # with fewer bits it is seen that, unattached, the first tokens of a padded row are coded
        recipe = recipe_of(name, model, nbits=4)
    with torch.no_grad():
        with attach(model):
            found = served(model, recipe, tmp_path, 1e-3)
        # Unattached, padding takes the places of the first tokens, and the own ones are coded: three levels show that.
        if name == "skvq-1.5":
            return
        unattached = served(model, recipe, tmp_path, 0.02)
    torch.testing.assert_close(found, unattached, rtol=0.02, atol=0.02 * float(found.abs().max()))


def served(model: Any, recipe: Any, tmp_path: Path, bound: float) -> Tensor:
    """Logits of a padded batch after a few steps, whose rows are compared with the second row alone on the way."""
    mask, tokens = torch.ones(2, 56, dtype=torch.long), ids(56, 2)
    mask[1, :11] = 0
    cache, alone = make_cache(recipe, model), make_cache(recipe, model)

    def step(first: int, last: int) -> tuple[Tensor, Tensor]:
        shown = {"attention_mask": mask[:, :last], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, first:last]}
        one = model(tokens[:, first:last], **shown, **{CACHE: cache}).logits
        return one, model(tokens[1:, max(first, 11) : last], **{CACHE: alone}).logits

    step(0, 50)
    for i in range(50, 56):
        if i == 52:  # a rollback, and what was saved in place of the cache
            step(i, i + 1)
            cache.crop(-1)
            alone.crop(-1)
            cache.save(tmp_path / "cache")
            loaded = CompressedCache.load(tmp_path / "cache", model)
            assert loaded.memory().bytes == cache.memory().bytes
            cache = copy.deepcopy(loaded)
        one, two = step(i, i + 1)
        if recipe.calibration:  # others' groups begin elsewhere in a padded row
            torch.testing.assert_close(one[1:], two, rtol=bound, atol=bound * float(two.abs().max()))
    return one


def test_a_saved_cache_needs_its_file_no_longer_and_damage_is_told(tmp_path: Path) -> None:
    model = tiny("llama")
    recipe = recipe_of("kvquant", model)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(Path(recipe.calibration).read_bytes())
    recipe = load_recipe("kvquant", calibration=str(moved))
    cache = make_cache(recipe, model)
    with torch.no_grad():
        model(ids(40), **{CACHE: cache})
        cache.save(tmp_path / "cache")
        moved.unlink()
        loaded = CompressedCache.load(tmp_path / "cache", model)
        one, two = (model(ids(9, seed=3), **{CACHE: c}).logits for c in (cache, loaded))
    assert torch.equal(one, two)
    content = (tmp_path / "cache").read_bytes()
    changes: list[Any] = [
        lambda held: {n: t for n, t in held.items() if n != "calibration.0.unrotated.low"},
        lambda held: {**held, "calibration.0.unrotated.low": held["calibration.0.unrotated.low"][:, 1:].clone()},
        lambda held: {**held, "calibration.x.low": torch.zeros(1)},
        lambda held: {**held, "calibration.0.values.levels3": torch.full((8,), torch.nan)},
    ]
    for change in changes:
        (tmp_path / "cache").write_bytes(content)
        with pytest.raises(CacheError, match=r"damaged|can't be used here"):
            CompressedCache.load(rewritten(tmp_path / "cache", tensors=change), model)


def test_keys_before_rope_are_refused_where_there_is_none() -> None:
    model = tiny("llama")
    with pytest.raises(Exception, match=r"keys before RoPE take a model .* not for its config"):
        make_cache("best-4bit", model.config)
    for name in ("kvquant", "skvq"):
        with pytest.raises(Exception, match=r"keys before RoPE take a model .* not for its config"):
            make_cache(recipe_of(name, model), model.config)
        make_cache(recipe_of(f"{name}-post-rope", model), model.config)


def exponents_of(model: Any, path: Path, exponents: list[float | None]) -> Path:
    """A calibration by `log` with other exponents; None: samples too short to tell."""
    made, _ = read_calibration(calibration(model, "log"))
    assert set(made.layers[0]) == {f"keys.{n}" for n in ("attention", "tokens", "counts", "exponent", "r2")}
    layers = {i: dict(made.layers[i]) for i in (0, 1)}
    for tensors, exponent in zip(layers.values(), exponents, strict=True):
        del tensors["keys.exponent"]
        tensors |= {} if exponent is None else {"keys.exponent": torch.tensor([exponent])}
    write_calibration(path, replace(made, layers=layers))
    return path


@pytest.mark.parametrize("exponents", [(0.25, 1.5), (-0.5, 9.0)])
def test_each_layer_keeps_tokens_by_the_exponent_of_its_own_attention(
    exponents: tuple[float, float], tmp_path: Path
) -> None:
    model = tiny("llama")
    file = exponents_of(model, tmp_path / "log.safetensors", list(exponents))
    recipe = load_recipe("logquant-exponent", window=8, calibration=str(file))
    logs = [Log(budget=8, exponent=min(max(a, 0.0), 8.0)) for a in exponents]
    first, _, last = recipe.tiers
    own = {str(i): (first, Tier(policy=log, keys="full", values="full"), last) for i, log in enumerate(logs)}
    cache = make_cache(recipe, model)
    truth = make_cache(Recipe(tiers=recipe.tiers, layers=own), model)
    with torch.no_grad():
        for held in (cache, truth):
            for start, stop in ((0, 150), (150, 151), (151, 190)):
                model(ids(190)[:, start:stop], **{CACHE: held})
            held.commit()
    cache.save(tmp_path / "cache")
    file.unlink()
    loaded = CompressedCache.load(tmp_path / "cache", model)
    found = [[held.positions(i).tiers.tolist() for i in (0, 1)] for held in (cache, loaded, truth)]
    assert found[0] == found[1] == found[2]
    assert found[0][0] != found[0][1]
    assert cache.memory().bytes == loaded.memory().bytes


def test_an_exponent_that_is_not_known_is_told(tmp_path: Path) -> None:
    model = tiny("llama")
    where = r"recipe logquant-exponent: tiers\[1\]\.policy\.exponent \(log\), layer 1: it takes a calibration that "
    short = exponents_of(model, tmp_path / "log.safetensors", [1.0, None])
    with pytest.raises(RecipeError, match=where + "says how .* too short for that; make it again with more"):
        make_cache("logquant-exponent", model, calibration=str(short))
    with pytest.raises(RecipeError, match=where.replace("1:", "0:") + r"holds keys\.exponent, found one that holds"):
        make_cache("logquant-exponent", model, calibration=str(calibration(model, "skvq")))
    bare = {"tiers": [{"policy": {"kind": "log", "exponent": "calibrated"}, "store": "full"}, {"store": "evict"}]}
    with pytest.raises(RecipeError, match=r"holds keys\.exponent, found none; make one by kvpolicy calibrate"):
        make_cache(bare, model)

    class Nowhere(Log):
        def at(self, site: Any) -> Any:
            return None

    tiers = (Tier(policy=Nowhere(), keys="full", values="full"), Tier(keys="evict", values="evict"))
    with pytest.raises(PluginError, match="policy 'log': at must return itself or a copy, found NoneType"):
        make_cache(Recipe(tiers=tiers), model)
