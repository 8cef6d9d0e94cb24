"""Identifies the model that computed keys and values: the config entries that matter, and hashes of weights."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 4096
"""Numbers of a weight that are hashed, evenly spaced; all of a smaller one."""
BLOCKS = 8
"""Blocks of a decoder whose weights are hashed, evenly spaced, the first and the last among them."""
IRRELEVANT = {
    *("architectures", "chunk_size_feed_forward", "dtype", "finetuning_task", "id2label", "initializer_range"),
    *("is_decoder", "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states"),
    *("output_router_logits", "prefix", "problem_type", "pretraining_tp", "quantization_config", "return_dict"),
    *("router_aux_loss_coef", "task_specific_params", "tie_word_embeddings", "tokenizer_class", "torch_dtype"),
    *("torchscript", "transformers_version", "use_cache"),
}
"""Config entries that keys and values don't depend on. Token ids and dropout are left out besides."""


@dataclass(frozen=True)
class Fingerprint:
    """What tells models apart whose keys and values mean different things."""

    config: dict[str, Any]
    """The text config, flattened: `{"rope_parameters.rope_theta": 10000.0}`."""
    weights: dict[str, str | None] | None
    """A hash for each weight sampled, None where it can't be read; None as a whole if no model is known."""


class Origin:
    """The model that a cache was made for, by a weak reference, or the fingerprint of it in a file."""

    def __init__(self, model_or_config: Any) -> None:
        config = getattr(model_or_config, "config", model_or_config)
        self.text = config.get_text_config(decoder=True)
        self._model = weakref.ref(model_or_config) if isinstance(model_or_config, nn.Module) else None
        self.loaded: Fingerprint | None = None
        """From the file that the cache was read from. It takes precedence over the model."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a weak reference can't be pickled

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        copied = Origin.__new__(Origin)
        copied.__dict__.update(self.__dict__)
        return copied

    @property
    def model_type(self) -> str:
        return str(getattr(self.text, "model_type", ""))

    def fingerprint(self) -> Fingerprint:
        """That of the model as it is now; without weights if it is gone, or was never known."""
        model = self._model() if self._model is not None else None
        return self.loaded or fingerprint_of(self.text if model is None else model)


def fingerprint_of(model_or_config: Any) -> Fingerprint:
    """The fingerprint of a model; of a config, that of an unknown one."""
    config = getattr(model_or_config, "config", model_or_config)
    known = isinstance(model_or_config, nn.Module)
    return Fingerprint(_config(config), _weights(model_or_config, config) if known else None)


def differences(saved: Fingerprint, found: Fingerprint, same_release: bool) -> list[str]:
    """What tells the model of a file from another, in words; weights are compared where both are known.

    Args:
        saved: of the file.
        found: of the model at hand.
        same_release: whether both come from one release of transformers. Then an entry that only one of them has
            counts as a difference; releases differ in the entries of a config.
    """
    told = []
    for name in sorted(saved.config.keys() | found.config.keys()):
        a, b = (x.config.get(name, "not set") for x in (saved, found))
        if a != b and str(a) != str(b) and (same_release or (name in saved.config and name in found.config)):
            told.append(f"{name} is {_shown(a)} in the file and {_shown(b)} in this model")
    if saved.weights is None or found.weights is None:
        return told
    common = saved.weights.keys() & found.weights.keys()
    pairs = [(name, saved.weights[name], found.weights[name]) for name in common]
    others = [name for name, a, b in pairs if a is not None and b is not None and a != b]
    others += (saved.weights.keys() ^ found.weights.keys()) if same_release else []
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        told.append(f"its weights are others ({min(others)[:80]}{more})")
    return told


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _config(config: Any) -> dict[str, Any]:
    text = config.get_text_config(decoder=True)
    flat = dict(_flat(json.loads(json.dumps(text.to_dict(), default=str)), ""))
    types = {value for name, value in flat.items() if name.endswith("rope_type")}
    if types == {"default"}:  # other types of RoPE scale by it
        flat.pop("max_position_embeddings", None)
    return flat


def _flat(data: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if name in IRRELEVANT or name[:1] == "_" or "dropout" in name or name.endswith(("_pdrop", "token_id")):
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


def blocks_of(model: Any, count: int) -> nn.ModuleList | None:
    """The blocks of a model's decoder, `count` of them at least; None where there is no such list."""
    decoder = _decoder(model)
    modules = decoder.modules() if isinstance(decoder, nn.Module) else ()
    return next((m for m in modules if isinstance(m, nn.ModuleList) and len(m) >= count), None)


def _decoder(model: Any) -> Any:
    return model.get_decoder() if hasattr(model, "get_decoder") else None


def _weights(model: nn.Module, config: Any) -> dict[str, str | None]:
    """A hash for each parameter and each saved buffer, of a few blocks and all that is outside of blocks."""
    decoder = _decoder(model)
    decoder = decoder if isinstance(decoder, nn.Module) else model
    blocks = blocks_of(model, getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1))
    others = set(_left_out(blocks))
    adapters = set(getattr(model, "peft_config", None) or ())
    active = {name for m in decoder.modules() for name in _active_adapters(m)}
    found: dict[str, str | None] = {}
    for path, module in decoder.named_modules():
        if module in others:
            continue
        saved = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, weight in {**module._parameters, **saved}.items():
            parts = [part for part in (*path.split("."), name) if part not in ("", "_orig_mod", "base_layer")]
            if weight is not None and not adapters.difference(active).intersection(parts):
                found[".".join(parts)] = _hash(module, name, weight)
    return found


def _left_out(blocks: nn.ModuleList | None) -> Iterator[nn.Module]:
    """All modules of the blocks that are not sampled."""
    count = len(blocks) if blocks is not None else 0
    step = (count - 1) / (BLOCKS - 1)
    kept = set(range(count)) if count <= BLOCKS else {round(i * step) for i in range(BLOCKS)}
    for i, block in enumerate(blocks if blocks is not None else ()):
        if i not in kept:
            yield from block.modules()


def _active_adapters(module: nn.Module) -> list[str]:
    """Of a layer with adapters of PEFT those that compute."""
    active = getattr(module, "active_adapters", None)
    return active if isinstance(active, list) and not getattr(module, "disable_adapters", False) else []


def _hash(module: nn.Module, name: str, weight: Tensor) -> str | None:
    """A hash of a sample of a weight, on any device and in any float type; None if it can't be read."""
    if weight.device.type == "meta":
        hook = getattr(module, "_hf_hook", None)  # accelerate keeps offloaded weights elsewhere
        held = [getattr(x, "weights_map", None) for x in getattr(hook, "hooks", [hook])]
        found = [x[name] for x in held if x is not None and name in x]
        if not found:
            return None
        weight = found[0]
    digest = hashlib.blake2b(str(tuple(weight.shape)).encode(), digest_size=8)
    try:
        with torch.no_grad():
            for part in _plain(weight):
                digest.update(_sampled(part))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None  # a quantized tensor whose numbers can't be read
    return digest.hexdigest()


def _plain(weight: Tensor) -> Iterator[Tensor]:
    """The tensors in which a subclass of tensors keeps its numbers."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight.detach()
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from _plain(getattr(weight, name))


def _sampled(x: Tensor) -> bytes:
    """Numbers of any float type as float32, so that a weight is the same in each type that holds it exactly."""
    x, n = (x.reshape(1) if x.ndim == 0 else x), x.numel()
    at = torch.arange(min(n, SAMPLE), device=x.device) * (n - 1) // max(min(n, SAMPLE) - 1, 1)
    some = x[torch.unravel_index(at, x.shape)]
    some = torch.view_as_real(some) if some.is_complex() else some
    some = some.float() if some.is_floating_point() else some.long()
    return some.cpu().numpy().tobytes()
