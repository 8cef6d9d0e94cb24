"""The base class of calibrators: what is found out about a model once, and kept in a file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvpolicy.interfaces.component import Component
from kvpolicy.interfaces.site import Site

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SHOWN", "Calibrator", "Watched"]

SHOWN = frozenset({"gradients", "attention"})
"""What a calibrator may ask for besides keys and values."""


@dataclass(frozen=True)
class Watched:
    """What a layer made of one sample. Tensors are float32, and not to be written to."""

    site: Site
    """Where the layer stands, on the side of the keys."""
    length: int
    """Tokens of all samples together: each has as many."""
    keys: Tensor
    """As the model caches them, after RoPE: `[1, kv_heads, tokens, head_dim]`."""
    values: Tensor
    """The same of values."""
    unrotated: Tensor | None
    """Keys before RoPE. None where the layer has no rotary embedding that is a function of the position alone."""
    gradients: Mapping[str, Tensor]
    """Derivatives of the model's loss on the sample (nats per token) by `keys`, `values` and `unrotated`, in their
    shapes. Empty where they were not asked for."""
    attention: Tensor | None
    """Attention weights of the newest tokens over all, `[queries, tokens]`, the mean over heads. None where they were
    not asked for."""


class Calibrator(Component):
    """Finds out something about each layer of a model on sample texts: `kvpolicy calibrate KIND`.

    It is shown one sample after the other and keeps what it needs in named tensors, layer by layer. These are written
    to a file after each sample, so that a run that was interrupted goes on. In the end it makes of them what
    `Site.calibrated` gives to transforms and quantizers.

    Example:
        The largest magnitude of each channel of keys::

            class Largest(Calibrator):
                kind: Literal["largest"] = "largest"

                def watch(self, given, state, turn):
                    largest = given.keys[0].abs().amax(1)
                    return {"keys": torch.maximum(largest, state["keys"]) if state else largest}

                def finish(self, state, site):
                    return {"keys.largest": state["keys"]}
    """

    _role: ClassVar[str] = "calibrator"
    turns: ClassVar[tuple[frozenset[str], ...]] = (frozenset(),)
    """For each turn over all samples what it must be shown besides keys and values: `"gradients"`, which take a
    backward pass through the model, or `"attention"`, not both in one turn."""

    @abstractmethod
    def watch(self, given: Watched, state: Mapping[str, Tensor], turn: int) -> dict[str, Tensor]:
        """Look at a layer on one sample.

        Args:
            given: what the layer made of it.
            state: what this method returned of the layer on the sample before; empty at first. On the CPU.
            turn: which turn over the samples it is, counted from 0.

        Returns:
            Named tensors of any type and shape, instead of `state`.
        """

    @abstractmethod
    def finish(self, state: Mapping[str, Tensor], site: Site) -> dict[str, Tensor]:
        """What the file is to hold of a layer.

        Returns:
            Named tensors, finite, float32 or integers. Names begin with `keys.`, `values.` or, of keys before RoPE,
            `unrotated.`; those with an entry per channel are `[kv_heads, head_dim]`.
        """

    def sentence(self, found: Mapping[int, Mapping[str, Tensor]]) -> str:
        """What to tell whoever calibrates, of what `finish` gave for each layer; by default nothing."""
        return ""
