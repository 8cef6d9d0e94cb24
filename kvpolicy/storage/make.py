"""The store for each kind of storage."""

from __future__ import annotations

import torch

from kvpolicy.interfaces.quantizer import AffineQuantizer, Quantizer, TensorQuantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.affine import AffineStore
from kvpolicy.storage.base import LARGE, Store
from kvpolicy.storage.coded import CodedStore
from kvpolicy.storage.exact import ExactStore
from kvpolicy.storage.named import NamedStore


def make_store(spec: Quantizer | str, head_dim: int, site: Site | None = None) -> Store | None:
    """The store for `full`, a quantizer, or `evict` (None).

    Args:
        spec: how keys or values are stored.
        head_dim: their channels.
        site: where the store stands, as far as that is known.

    Raises:
        RecipeError: the quantizer's options don't fit `head_dim` channels.
        PluginError: the quantizer misbehaves.
    """
    if spec == "evict":
        return None
    if isinstance(spec, AffineQuantizer):
        return AffineStore(spec, head_dim, site)
    return NamedStore(spec, head_dim, site) if isinstance(spec, TensorQuantizer) else ExactStore()


def may_be_flat(spec: Quantizer | str) -> bool:
    """Whether rows and heads of a store can take as much room as each has tokens: not if tokens share what is kept.

    Those of a group per channel do, those of an arrival, and those that extras look at together.
    """
    if not isinstance(spec, Quantizer):
        return spec == "full"
    axes = spec.axes.values() if isinstance(spec, TensorQuantizer) else ()
    return not spec.extras and "arrival" not in axes and getattr(spec, "per", "token") == "token"


def try_store(quantizer: Quantizer, head_dim: int, site: Site | None = None) -> None:
    """Encode and decode a few numbers, so that a quantizer that can't work fails at once and by name.

    Raises:
        RecipeError, PluginError: as `make_store`, and where what it returns is not what it must be.
    """
    store = make_store(quantizer, head_dim, site)
    assert store is not None
    with torch.no_grad():
        heads = 1 if site is None else site.kv_heads
        x = torch.linspace(-1.0, 1.0, heads * 128 * head_dim, device="cpu").view(1, heads, 128, head_dim)
        if isinstance(store, CodedStore) and store.chain is not None:
            store.chain.heed(x[:, :, :: x.shape[2] - 1])
            store.chain.check_state(x)
        for part, places in zip(x.split([96, 32], dim=2), torch.arange(128).split([96, 32]), strict=True):
            store.append(part, None, places)
        for _ in store.decoded(LARGE, x.dtype):
            pass
        if isinstance(store, CodedStore):
            store.try_attention(x)
