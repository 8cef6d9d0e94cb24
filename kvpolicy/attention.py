"""Attached models: attention reads compressed caches directly. The only file that touches transformers' registries."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy.attend import attend, observe
from kvpolicy.cache import CompressedCache, TieredLayer, make_cache
from kvpolicy.errors import CacheError
from kvpolicy.layer import MAX_APART
from kvpolicy.modes import ATTACHED, barred, precise, wants_gradients
from kvpolicy.recipe import load_recipe
from kvpolicy.views import View

__all__ = ["Attached", "attach"]

SERVED = ("sdpa", "eager")
_reading: ContextVar[CompressedCache | None] = ContextVar("kvpolicy_reading", default=None)
"""The cache of the attached model that is running."""
watching: ContextVar[Callable[..., None] | None] = ContextVar("kvpolicy_watching", default=None)
"""Called with module, query, key, value, mask, options and output of every attention that reads a `CompressedCache`."""
_attached: WeakSet[nn.Module] = WeakSet()


def attach(model: Any, recipe: Any = None, **params: Any) -> Attached:
    """Let a model read compressed caches directly, instead of decoding them at each step.

    Any other cache is served as before. Nothing but this model is changed, and `detach` undoes it.

    Args:
        model: a transformers decoder model.
        recipe: what `load_recipe` takes. Calls that bring no cache get a fresh one of this recipe.
        **params: parameters of the recipe.

    Returns:
        A handle, which is also a context manager.

    Raises:
        CacheError: the model is attached already, or does not use transformers' attention interface.
        RecipeError: the recipe is not valid, or does not fit the model.

    Example:
        Greedy generation with a compressed cache::

            with kvpolicy.attach(model, recipe="logquant"):
                model.generate(**inputs, max_new_tokens=100)
    """
    return Attached(model, load_recipe(recipe, **params) if recipe is not None else None)


def is_attached(model: Any) -> bool:
    """Whether a model (not a config) is attached now."""
    return isinstance(model, nn.Module) and any(module in _attached for module in model.modules())


class Attached:
    """What `attach` returns: `detach` it, or use it in a `with` statement."""

    def __init__(self, model: Any, recipe: Any) -> None:
        owner, decoder = _parts(model)
        if decoder in _attached:
            raise CacheError(
                f"a model can be attached once, and this {type(decoder).__name__} is attached already; "
                "detach its handle first"
            )
        self.decoder, self.owner, self.recipe = decoder, owner, recipe
        self.config = decoder.config.get_text_config(decoder=True)
        self.original = self.config._attn_implementation
        name = _register(self.original, type(decoder).__name__)
        if not decoder._can_set_attn_implementation():
            raise CacheError(
                f"{type(decoder).__name__} does not use transformers' attention interface, so it can't be attached; "
                "use the cache without attaching the model"
            )
        if recipe is not None:
            make_cache(recipe, owner)  # what does not fit fails here
        self.config._attn_implementation_internal = name
        self._hooks = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._generate = self._supply() if recipe is not None else None
        _attached.add(decoder)

    def detach(self) -> None:
        """Leave the model as it was. A second time does nothing."""
        if not self._hooks:
            return
        _attached.discard(self.decoder)
        self.config._attn_implementation_internal = self.original
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._generate is not None and self.owner.__dict__.get("generate") is self._generate:
            del self.owner.__dict__["generate"]

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    def _supply(self) -> Callable[..., Any] | None:
        """Make `generate` begin with a fresh cache; it would make one of transformers' own."""
        if not hasattr(self.owner, "generate"):
            return None
        original = self.owner.generate

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            config = kwargs.get("generation_config") or self.owner.generation_config
            wanted = kwargs.get("use_cache", getattr(config, "use_cache", None))
            chosen = kwargs.get("cache_implementation", getattr(config, "cache_implementation", None))
            if kwargs.get("past_key_values") is None and wanted is not False and chosen is None:
                kwargs["past_key_values"] = make_cache(self.recipe, self.owner)
            return original(*args, **kwargs)

        self.owner.__dict__["generate"] = generate
        return generate

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        args, kwargs = _named(module, args, kwargs)
        cache = kwargs.get("past_key_values")
        if cache is None and self.recipe is not None:
            wanted = kwargs.get("use_cache")
            if (self.config.use_cache if wanted is None else wanted) and not module.training:
                kwargs["past_key_values"] = cache = make_cache(self.recipe, self.owner)
        if not isinstance(cache, CompressedCache):
            return None
        if module.training:
            raise CacheError(
                "an attached model must be in evaluation mode when it is given a compressed cache, which carries no "
                "gradients; call model.eval()"
            )
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise CacheError(
                "an attached model gives no attention weights (output_attentions=True) with a compressed cache; "
                "detach it first"
            )
        cache.note_padding(kwargs.get("attention_mask"), _tokens(args, kwargs))
        if cache.selects_together:
            cache.settle()
        _mark(cache, True)
        _reading.set(cache)
        return args, kwargs

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = _named(module, args, kwargs)[1].get("past_key_values")
        if isinstance(cache, CompressedCache):
            _reading.set(None)
            _mark(cache, False)
            if cache.selects_together and cache.pending > MAX_APART:
                cache.settle()


def _parts(model: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The model that generates, and the decoder inside it that is given the cache."""
    found = [m for m in model.modules() if isinstance(m, PreTrainedModel)] if isinstance(model, nn.Module) else []
    if not found:
        raise CacheError(f"attach needs a transformers model, found {type(model).__name__}")
    owner = found[0]
    if getattr(owner.config, "is_encoder_decoder", False):
        raise CacheError(f"attach serves decoder models; {type(owner).__name__} is an encoder-decoder")
    text = owner.config.get_text_config(decoder=True)
    inner = [m for m in found if m.config is text]
    return owner, (inner or found)[-1]


def _mark(cache: CompressedCache, attached: bool) -> None:
    for layer in cache.layers:
        if isinstance(layer, TieredLayer):
            layer.attached = attached
            if not attached:
                layer.tiers.commit()


def _named(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments of a call, all but the first by name, as far as they have names."""
    if len(args) < 2:
        return args, kwargs
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
    if len(args) > len(names):
        return args, kwargs
    return args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}


def _tokens(args: Any, kwargs: dict[str, Any]) -> int:
    """How many tokens a call brings."""
    for given in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args):
        if isinstance(given, Tensor):
            return given.shape[1]
    return 0


def _register(original: str, model: str) -> str:
    """The name under which the implementation `original` also reads compressed caches."""
    if original not in SERVED:
        raise CacheError(
            f"attach serves the attention implementations {list(SERVED)}; {model} uses {original!r}. Load the model "
            'with attn_implementation="sdpa"'
        )
    name = f"kvpolicy_{original}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, functools.partial(attention_forward, original))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def attention_forward(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of attached models: views are read from their stores, all else is for `original`."""
    if not (isinstance(key, View) and isinstance(value, View)):  # DiffLlama computes on values alone
        key, value = (x.dense() if isinstance(x, View) else x for x in (key, value))
        attention_mask = _of_dense(module, key, attention_mask)
        found: tuple[Tensor, Tensor | None] = _function(original, module)(
            module, query, key, value, attention_mask, *args, **kwargs
        )
        _show(module, query, key, value, attention_mask, kwargs, found[0])
        return found
    return _read(original, module, query, key, value, attention_mask, *args, **kwargs), None


@torch.compiler.disable
def _read(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: View,
    value: View,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Attention over views."""
    tiers, new = key.tiers, (key.arriving, value.arriving)
    options = {
        name: kwargs.get(given) for name, given in (("scaling", "scaling"), ("softcap", "softcap"), ("sinks", "s_aux"))
    }
    if tiers.densely and attention_mask is not None and attention_mask.shape[-1] != tiers.seen:
        raise CacheError(
            f"{type(module).__name__} makes its mask from the values of the tokens held, so that an attached model must "
            f"hold all {tiers.seen} tokens seen, found a mask of {attention_mask.shape[-1]}; use a recipe that drops "
            "none, or detach the model, which decodes them all in any case"
        )
    observer, settled = tiers.observe(), tiers.settled
    if not settled:
        out = _function(original, module)(module, query, *new, attention_mask, *args, **kwargs)[0]
    with torch.no_grad(), precise(query.device):
        if settled:
            out = attend(tiers, query, new, attention_mask, observer=observer, **options)
        elif observer is not None:
            observe(query, new[0], observer, attention_mask, **options)
    _show(module, query, key, value, attention_mask, kwargs, out)
    if tiers.scratch is not None:  # no other layer reads these keys and values
        tiers.commit()
    return barred(ATTACHED, out, query, key, value) if settled and wants_gradients(query, key, value) else out


def _show(*seen: Any) -> None:
    watch = watching.get()
    if watch is not None and _reading.get() is not None:
        watch(*seen)


def _of_dense(module: nn.Module, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """The columns of a mask over all tokens seen that belong to a decoded layer from which tokens were dropped."""
    cache = _reading.get()
    if cache is None:
        return mask
    layer = cache.layers[module.layer_idx]
    if not isinstance(layer, TieredLayer) or not layer.tiers.densely:
        return mask
    places = layer.tiers.visible().to(key.device)
    if places.ndim == 1:
        return mask if mask is None or mask.shape[-1] == len(places) else mask.index_select(-1, places)
    return visible_columns(mask, places, layer.tiers.seen - layer.tiers.settled)


def visible_columns(mask: Tensor | None, places: Tensor, new: int) -> Tensor:
    """A mask for keys whose positions are `places`, `[batch, 1, columns]`, -1 where there is none."""
    empty = (places < 0).unsqueeze(2)
    if mask is None:
        later = torch.arange(new, device=places.device) > torch.arange(new, device=places.device)[:, None]
        shown = torch.nn.functional.pad(~later, (places.shape[2] - new, 0), value=True)
        return shown & ~empty
    wide = mask.expand(len(places), -1, -1, -1)
    found = wide.gather(3, places.clamp(min=0).unsqueeze(2).expand(*wide.shape[:3], -1))
    return found.masked_fill(empty, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def _function(original: str, module: nn.Module) -> Callable[..., Any]:
    found: Callable[..., Any] | None = None
    if original != "eager":
        found = ALL_ATTENTION_FUNCTIONS[original]
    for cls in type(module).__mro__:
        found = found or getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
    if found is None:
        raise CacheError(f"{type(module).__name__} must come with a function eager_attention_forward, found none")
    return found
