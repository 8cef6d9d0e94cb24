"""Whether a recipe fits a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvpolicy.errors import CacheError, MissingDependencyError, RecipeError
from kvpolicy.interfaces.budget import layers_named
from kvpolicy.interfaces.component import check_answer
from kvpolicy.interfaces.policy import RankPolicy
from kvpolicy.interfaces.quantizer import Quantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.recipe.load import Recipe
from kvpolicy.recipe.spec import Tier
from kvpolicy.recipe.yaml import path_text
from kvpolicy.storage.make import make_store, try_store


def check_selectors(recipe: Recipe, layers: list[Any], compressed: list[int]) -> None:
    """Refuse `layers` entries that no layer of the model could follow."""
    recipe.tiers_of(0, len(layers))
    for key, tiers in recipe.layers.items():
        named = layers_named(key, len(layers))
        if tiers != "full" and not set(named) & set(compressed):
            raise RecipeError(
                f"recipe {recipe.name}: layers.{key} must name layers that can be compressed, which are {compressed}; "
                f"layer {named[0]} is a {type(layers[named[0]]).__name__} and keeps the library's own cache"
            )


def config_of(model_or_config: Any) -> Any:
    """The config of a model, or the one given; a `CacheError` if no cache can serve it."""
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "get_text_config"):
        raise CacheError(
            "make_cache needs a transformers model or its config, "
            f"found {type(model_or_config).__name__}; pass the model itself or model.config"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise CacheError(
            f"make_cache serves decoder models; {type(config).__name__} is an encoder-decoder. "
            "Use transformers' EncoderDecoderCache for it"
        )
    for name, peft in (getattr(model_or_config, "peft_config", None) or {}).items():
        if getattr(peft, "is_prompt_learning", False) and "PREFIX" in str(getattr(peft, "peft_type", "")).upper():
            raise CacheError(
                f"PEFT adapter {name!r} is prefix tuning, which replaces the cache that it is given by one of its own; "
                "use an adapter that leaves the cache alone, such as LoRA"
            )
    return config


def layer_config(text: Any, layer: int) -> Any:
    """The config of one layer; where layers differ in shape (gemma4), transformers keeps one for each."""
    return text.per_layer_config[layer] if getattr(text, "is_heterogeneous", False) else text


def head_dim_of(text: Any, layer: int) -> int | None:
    """Channels of a head, where the config says so; latent attention caches something else."""
    own = layer_config(text, layer)
    if getattr(own, "kv_lora_rank", None):
        return None
    dim = getattr(own, "head_dim", None)
    heads, hidden = getattr(own, "num_attention_heads", None), getattr(own, "hidden_size", None)
    if isinstance(dim, int):
        return dim
    return hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None


def tiers_at(tiers: tuple[Tier, ...], site: Site) -> tuple[Tier, ...]:
    """Tiers whose policies know what a calibration says of a layer.

    Raises:
        RecipeError: a policy can't work there.
    """
    found = []
    for number, tier in enumerate(tiers):
        try:
            found.append(tier.at(site))
        except RecipeError as error:
            assert tier.policy is not None
            part = path_text(("tiers", number, "policy", *error.place))
            raise RecipeError(f"{part} ({tier.policy.kind}), layer {site.layer}: {error}") from None
    return tuple(found)


def check_stores(tiers: Any, dim: int | None, site: Site, tried: bool = False) -> None:
    """Encode a few numbers with every quantizer, so that what can't work fails now and by name.

    Where that was `tried` in another layer, it is only asked whether they fit this one, of which a calibration says
    other things.
    """
    for number, tier in enumerate(tiers):
        scorer = tier.policy._scorer() if isinstance(tier.policy, RankPolicy) else None
        if scorer is not None:
            try:
                check_answer(scorer, "check", site)
            except RecipeError as error:
                part = path_text(("tiers", number, "policy", "scorer", *error.place))
                raise RecipeError(f"{part} ({scorer.kind}), layer {site.layer}: {error}") from None
        for name in ("read", "merge"):
            if (own := getattr(tier, name)) is None:
                continue
            try:
                check_answer(own, "check", site)
            except RecipeError as error:
                part = path_text(("tiers", number, name, *error.place))
                raise RecipeError(f"{part} ({own.kind}), layer {site.layer}: {error}") from None
        for side in ("keys", "values"):
            spec = getattr(tier, side)
            if not isinstance(spec, Quantizer):
                continue
            try:
                here = replace(site, side="keys" if side == "keys" else "values")
                (make_store if tried else try_store)(spec, dim or 64, here)
            except MissingDependencyError:
                raise
            except RecipeError as error:
                if dim is None:
                    continue
                part = path_text(("tiers", number, side, *error.place))
                kind = "" if error.place else f" ({spec.kind})"
                raise RecipeError(f"{part}{kind}, layer {site.layer}: {error}") from None


def uneven_layers(chosen: dict[int, Any]) -> str | None:
    """Why the layers can't share one mask, if they drop tokens by different rules."""
    shapes: list[tuple[Any, list[int]]] = []
    for i, tiers in chosen.items():
        shape = [tier.policy for tier in tiers] if tiers[-1].keys == "evict" else None
        group = next((found for known, found in shapes if known == shape), None)
        if group is None:
            shapes.append((shape, [i]))
        else:
            group.append(i)
    if len(shapes) < 2:
        return None
    groups = " and ".join(f"layers {found}" for _, found in shapes)
    return (
        "all full-attention layers must hold the same number of tokens by the same rule, because one attention mask "
        f"serves them all; this recipe drops by different rules in {groups}. Give all layers the same evicting tiers, "
        "or none, or let the model read the cache itself: kvpolicy.attach(model)"
    )
