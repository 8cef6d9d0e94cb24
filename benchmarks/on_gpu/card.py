"""What is measured on: the card, versions, the shapes of a layer, and a model of random weights."""

from __future__ import annotations

import gc
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 8, 128, 32
HIDDEN, INNER, VOCABULARY = 4096, 14336, 128256


@dataclass(frozen=True)
class Model:
    """A Llama of 8 billion parameters, or one of fewer layers."""

    layers: int = LAYERS
    hidden: int = HIDDEN
    inner: int = INNER
    vocabulary: int = VOCABULARY

    def drawn(self, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Any:
        """One with random weights."""
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
            max_position_embeddings=131072, rope_theta=500000.0,
        )  # fmt: skip
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def drawn(*shape: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def prompt_of(model: Any, batch: int, tokens: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, tokens), device=model.device)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    torch.cuda.empty_cache()


def exact_bytes(layers: int, tokens: int) -> int:
    """Bytes of the keys and values of a row in 16 bits."""
    return 2 * 2 * layers * KV_HEADS * HEAD_DIM * tokens


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        found = []
    return found[0] if found else "unknown"


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def about(model: Model) -> str:
    """One line: what all figures of a run have in common."""
    properties = torch.cuda.get_device_properties(0)
    packages = ", ".join(map(_version, ("kvpolicy", "transformers", "cuda-core", "optimum-quanto")))
    return (
        f"{properties.name}, {properties.total_memory / 1e9:.0f} GB; driver {_driver()}, CUDA {torch.version.cuda}, "
        f"torch {torch.__version__}, {packages}; {model.layers} layers, {HEADS} query and {KV_HEADS} KV heads of "
        f"{HEAD_DIM}, hidden size {model.hidden}, bfloat16; cuDNN's attention off"
    )
