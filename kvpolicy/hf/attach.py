"""Attached models: attention reads compressed caches directly."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy.attention.attend import attend, observe
from kvpolicy.attention.mask import visible_columns
from kvpolicy.errors import CacheError
from kvpolicy.hf import passes
from kvpolicy.hf.cache import CompressedCache, make_cache
from kvpolicy.hf.calls import WORDS, Call, PassAware, names_of, parts_of, path_between
from kvpolicy.hf.flash import own_attention
from kvpolicy.hf.graphs import install, remove
from kvpolicy.hf.layer import TieredLayer
from kvpolicy.hf.modes import ATTACHED, barred, nothing_hidden, precisely, uncompiled, wants_gradients
from kvpolicy.hf.modes import watching as watching
from kvpolicy.hf.override import EAGER, eager_of, interface_of, override
from kvpolicy.hf.passes import Pass, attached_pass
from kvpolicy.hf.passes import is_attached as is_attached
from kvpolicy.layer.layer import MAX_PENDING, LayerCache
from kvpolicy.layer.view import View
from kvpolicy.placement.attention_scores import Observer
from kvpolicy.recipe.load import Recipe, load_recipe

SERVED = ("sdpa", "eager")
_reading = passes.reading
_eager: WeakKeyDictionary[type, tuple[str, str]] = WeakKeyDictionary()
"""Where the eager function is that a class of attention modules names."""


def attach(model: Any, recipe: Any = None, *, graphs: bool | None = None, **params: Any) -> Attached:
    """Let a model read compressed caches directly, instead of decoding them at each step.

    Any other cache is served as before. Nothing but this model is changed, and `detach` undoes it.

    Args:
        model: a transformers decoder model.
        recipe: what `load_recipe` takes. Calls that bring no cache get a fresh one of this recipe.
        graphs: replay decode steps as CUDA graphs; None: where the model is on an NVIDIA GPU. The results are the same.
            A step that can't be replayed runs as it would without; `Attached.graphs.reasons` counts why.
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
    return Attached(model, load_recipe(recipe, **params) if recipe is not None else None, graphs)


class _Attachment(passes.Attachment):
    """What an attached model is attached with. It must not keep the model alive."""

    def __init__(self, owner: PreTrainedModel, decoder: PreTrainedModel, recipe: Recipe | None) -> None:
        self.owner, self.decoder, self.recipe = weakref.ref(owner), weakref.ref(decoder), recipe
        self.config = decoder.config.get_text_config(decoder=True)
        self.implementation = self.config._attn_implementation
        if self.implementation not in SERVED:
            raise CacheError(
                f"attach serves the attention implementations {list(SERVED)}; {type(decoder).__name__} uses "
                f'{self.implementation!r}. Load the model with attn_implementation="sdpa"'
            )
        if not decoder._can_set_attn_implementation():
            raise CacheError(
                f"{type(decoder).__name__} does not use transformers' attention interface, so it can't be attached; "
                "use the cache without attaching the model"
            )
        self.override = override(interface_of(decoder), self.implementation, _attention)
        self.override.add(self)
        self.restore = weakref.finalize(decoder, self.override.remove, self)
        self.restore.atexit = False
        self.told = False

    def check(self, module: nn.Module, call: Call) -> None:
        """Refuse a call with a compressed cache that would not be right.

        Raises:
            CacheError: training, attention weights, or another attention function since the model was attached.
        """
        if module.training:
            raise CacheError(
                "an attached model must be in evaluation mode when it is given a compressed cache, which carries no "
                "gradients; call model.eval()"
            )
        weights = call.get("output_attentions")
        if getattr(self.config, "output_attentions", False) if weights is None else weights:
            raise CacheError(
                "an attached model gives no attention weights (output_attentions=True) with a compressed cache; "
                "detach it first"
            )
        now = self.config._attn_implementation
        if now != self.implementation or not self.override.stands:
            raise CacheError(
                f"an attached model must keep its attention, {self.implementation!r}, found "
                f"{repr(now) if now != self.implementation else 'another function under this name'}; detach it, change "
                "that, attach it again"
            )

    def inside(self) -> bool:
        """Whether a model around the one that is attached is running: it makes caches that no one asked for."""
        owner, frame = self.owner(), sys._getframe(1)
        while owner is not None and frame.f_back is not None:
            frame = frame.f_back
            module = frame.f_locals.get("self")
            if isinstance(module, PreTrainedModel) and any(m is owner for m in module.modules() if m is not module):
                return True
        return False

    def tell(self, why: str, depth: int) -> None:
        """Warn, once, that a call does not use the recipe."""
        if self.told:
            return
        self.told = True
        assert self.recipe is not None
        warnings.warn(
            f"{why}, so this call does not use recipe {self.recipe.name!r}, with which the model is attached.",
            stacklevel=depth + 1,
        )

    def supplied(self, module: nn.Module, call: Call) -> CompressedCache | None:
        """A fresh cache of the recipe for a call that brings none and may have one."""
        wanted = call.get("use_cache")
        if self.recipe is None or module.training or not call.word:
            return None
        if call.has_cache:
            given = None if self.told else call.unasked()
            if given is not None and self.inside():
                self.tell(f"The {type(given).__name__} that a model around {type(module).__name__} made is used", 2)
            return None
        return make_cache(self.recipe, self.owner()) if (self.config.use_cache if wanted is None else wanted) else None


class Attached:
    """What `attach` returns: `detach` it, or use it in a `with` statement."""

    def __init__(self, model: Any, recipe: Any, graphs: bool | None = None) -> None:
        owner, decoder = parts_of(model)
        self.owner, self.decoder, self.recipe = owner, decoder, recipe
        with passes.lock:
            self._hooked = passes.hooked_of(decoder)
            if self._hooked.attachment is not None:
                raise CacheError(
                    f"a model can be attached once, and this {type(decoder).__name__} is attached already; "
                    "detach its handle first"
                )
            self._attachment: _Attachment | None = _Attachment(owner, decoder, recipe)
            self._hooked.attach(self._attachment)
            self._hooked.hook(path_between(owner, decoder))
        try:
            if recipe is not None:
                make_cache(recipe, owner)  # what does not fit fails here
                _check_word(owner, decoder)
        except BaseException:
            self.detach()
            raise
        self._generate = _supply(owner) if recipe is not None else None
        wanted = next((x.is_cuda for x in owner.parameters()), False) if graphs is None else graphs
        self.graphs = install(owner) if wanted else None
        """The graphs of decode steps, if there may be any."""

    def detach(self) -> None:
        """Leave the model as it was. A second time does nothing."""
        with passes.lock:
            attachment, self._attachment = self._attachment, None
            if attachment is None:
                return
            attachment.restore()
            self._hooked.detach()
        if getattr(self, "graphs", None) is not None:
            remove(self.owner)
        given = getattr(self, "_generate", None)
        if given is not None and self.owner.__dict__.get("generate") is given:
            del self.owner.__dict__["generate"]
            if given.args[1] is not None:
                self.owner.__dict__["generate"] = given.args[1]

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()


def _check_word(owner: PreTrainedModel, decoder: PreTrainedModel) -> None:
    """Refuse a model that a cache of the recipe could not be given to."""
    path = [owner] if hasattr(owner, "generate") else path_between(owner, decoder)
    if not any(Call(names_of(m), (), {}).word for m in path):
        raise CacheError(
            f"attach with a recipe needs a forward with an argument {' or '.join(repr(w) for w in WORDS)}, found none "
            f"in that of {type(owner).__name__}; give its forward one, or attach without a recipe the model inside it"
        )


def _supply(owner: PreTrainedModel) -> functools.partial[Any] | None:
    """Make `generate` begin with a fresh cache; it would make one of transformers' own."""
    if not hasattr(owner, "generate"):
        return None
    before = owner.__dict__.get("generate")
    if isinstance(before, functools.partial) and before.func is _generate:  # of a model that this one is a copy of
        before = before.args[1]
    # Not a closure: copies and pickles of the model carry it, with themselves in the owner's place.
    given = owner.__dict__["generate"] = functools.partial(_generate, owner, before)
    return given


def _generate(owner: PreTrainedModel, before: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    generate = before or functools.partial(type(owner).generate, owner)
    attachment = passes.attachment_of(owner)
    if attachment is not None and attachment.recipe is not None:
        try:
            given = inspect.signature(type(owner).generate).bind_partial(owner, *args, **kwargs)
        except TypeError:  # the call itself will say so
            return generate(*args, **kwargs)
        named = {**given.arguments, **given.arguments.get("kwargs", {})}
        kwargs.update(_cache_for(attachment, owner, named))
    return generate(*args, **kwargs)


def _cache_for(attachment: passes.Attachment, owner: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """What a call of `generate` is given besides, so that it uses a fresh cache of the recipe."""
    call = Call(names_of(owner), (), given)
    if not call.word or call.has_cache:
        return {}
    own, config = owner.generation_config, given.get("generation_config")
    asked = [given] if config is None or config is own else [given, vars(config)]

    def wish(option: str) -> Any:
        return next((x[option] for x in asked if x.get(option) is not None), None)

    use, implementation = wish("use_cache"), wish("cache_implementation")
    if use is False or (use is None and own.use_cache is False):
        reason = "use_cache=False"
    elif implementation not in (None, "hybrid"):  # generate takes "hybrid" for None
        reason = f"cache_implementation={implementation!r}"
    else:
        default = {} if own.cache_implementation is None else {"cache_implementation": None}
        return {call.word: make_cache(attachment.recipe, owner), **default}
    attachment.tell(f"{reason} is followed", 4)
    return {}


def attention_forward(name: str, module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What attached models that use the implementation `name` call as their attention function."""
    return _attention(ALL_ATTENTION_FUNCTIONS.get(name), module, *args, **kwargs)


def _attention(
    before: Callable[..., Any] | None, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Views are read from their stores, all else is for `before`, or for the module's own eager function."""
    original = before or _eager_in(type(module)) or eager_of(module, sys._getframe(1))
    if isinstance(key, View) and isinstance(value, View):
        return _read(original, module, query, key, value, *args, **kwargs)
    current = attached_pass(module)
    key, value = (x.dense() if isinstance(x, View) else x for x in (key, value))  # DiffLlama computes on values alone
    if current is None or current.cache is None:
        found: tuple[Tensor, Tensor | None] = original(module, query, key, value, *args, **kwargs)
        return found
    return _pass_on(original, module, current, query, key, value, *args, **kwargs)


def _eager_in(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """The eager function that the forward of a class names. `torch.compile` can follow this, and not a frame."""
    file, name = _place_of_eager(cls)
    found: Callable[..., Any] | None = getattr(sys.modules[file], name) if name else None
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _place_of_eager(cls: type[nn.Module]) -> tuple[str, str]:
    """The module of Python and the name in it; no name where forward names none."""
    where = _eager.get(cls)
    if where is None:
        forward = inspect.unwrap(cls.forward)
        names = forward.__code__.co_names if inspect.isfunction(forward) else ()
        file = sys.modules.get(forward.__module__)
        named = (x for x in names if x.endswith(EAGER) and hasattr(file, x))
        where = _eager[cls] = (forward.__module__, next(named, ""))
    return where


def _pass_on(
    original: Callable[..., Any],
    module: nn.Module,
    current: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a model that runs with a compressed cache, over keys and values that are tensors."""
    attention_mask = _of_dense(module, current, query, key, attention_mask)
    found: tuple[Tensor, Tensor | None] = original(module, query, key, value, attention_mask, *args, **kwargs)
    _show(current, module, query, key, value, attention_mask, kwargs, found[0])
    return found


@uncompiled
def _read(
    original: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: View,
    value: View,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the stores behind views."""
    tiers, new = key.tiers, (key.arriving, value.arriving)
    if attention_mask is not None and attention_mask is nothing_hidden.get():
        attention_mask = None
    assert isinstance(tiers, LayerCache)
    if not query.shape[2]:
        return query.new_empty((query.shape[0], 0, query.shape[1], value.shape[3])), None
    if tiers.densely and attention_mask is not None and attention_mask.shape[-1] != tiers.seen:
        raise CacheError(
            f"{type(module).__name__} makes its mask from the values that it is given, which must be those of all "
            f"{tiers.seen} tokens seen where its model is attached, found {attention_mask.shape[-1]}; use a recipe "
            "that drops none, or detach the model"
        )
    observer = _observer(module, tiers, query) if tiers.observes else None
    committed = tiers.planner.step.seen
    options = kwargs.get("scaling"), kwargs.get("softcap"), kwargs.get("s_aux")
    if committed:
        out = precisely(query.device, attend, tiers, query, new, attention_mask, *options, observer=observer)
    else:
        out, lse = own_attention(original, module, query, new, attention_mask, args, kwargs, observer is not None)
        if observer is not None:
            precisely(query.device, observe, query, new[0], observer, attention_mask, *options, lse)
    if watching.get() is not None:
        _show(attached_pass(module), module, query, key, value, attention_mask, kwargs, out)
    if tiers.asked_for:
        tiers.heed(query)
    if tiers.scratch is not None:  # no other layer reads these keys and values
        passes.let_in(tiers, module, query) if query.shape[2] > MAX_PENDING else tiers.hold()
    if committed and torch.is_grad_enabled() and wants_gradients(query, key, value):
        out = barred(ATTACHED, out, query, key, value)
    return out, None


def _observer(module: Any, tiers: LayerCache, query: Tensor) -> Observer | None:
    """Who is told of the attention of a layer.

    Layers that share another's keys may leave out queries: the scores speak of the attention of the layer itself.
    """
    current = attached_pass(module)
    cache = None if current is None else current.cache
    return tiers.observe(query) if cache is None or _tiers_of(cache, module.layer_idx) is tiers else None


def _show(current: Pass | None, *seen: Any) -> None:
    watch = watching.get()
    if watch is not None and current is not None and current.cache is not None:
        watch(*seen)


def _of_dense(module: Any, current: Pass, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """The columns of a mask over all tokens seen that belong to a decoded layer from which tokens were dropped."""
    cache, layer = current.cache, module.layer_idx
    if cache is not None and layer >= len(cache.layers):  # it shares the keys of the last layer of its type
        types = module.config.layer_types
        layer = max((i for i in range(len(cache.layers)) if types[i] == types[layer]), default=layer)
    tiers = None if cache is None else _tiers_of(cache, layer)
    if tiers is None or not tiers.densely or not current.runs():
        return mask
    places = tiers.visible().to(key.device)
    if places.ndim == 1:
        return mask if mask is None or mask.shape[-1] == len(places) else mask.index_select(-1, places)
    return visible_columns(mask, places, tiers.seen - tiers.committed, query.shape[1])


def _tiers_of(cache: PassAware, layer: int) -> LayerCache | None:
    """The stores of a layer; None if transformers keeps it, or it has none of its own."""
    found = cache.layers[layer] if layer < len(cache.layers) else None
    return found.tiers if isinstance(found, TieredLayer) else None
