"""What stores of quantizers have in common: transforms before the codes, and the positions that some of them need."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.interfaces.checks import check_fit
from kvpolicy.interfaces.quantizer import Quantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.base import Ints, Store
from kvpolicy.storage.chain import Chain
from kvpolicy.storage.pages import Pages

__all__ = ["POSITIONS", "CodedStore", "of_store"]

OWN = "transforms."
"""How the names of what belongs to transforms begin."""
POSITIONS = "transforms.positions"
"""The part that holds the position of each token, where a transform needs them: int32 `[batch, 1 or kv_heads, tokens]`.
"""


def of_store(name: str) -> bool:
    """Whether a tensor of that name, of those that are saved, has no entry for each token or group."""
    return name.startswith(OWN) and name != POSITIONS


class CodedStore(Store):
    """A store whose tokens are coded by a quantizer, maybe behind transforms.

    What is coded lies in the space of the transforms; decoding leads back from it. What waits exactly does not.
    """

    def __init__(self, quantizer: Quantizer, head_dim: int, site: Site | None) -> None:
        check_fit(quantizer, head_dim)
        self.head_dim = head_dim
        self.site = replace(site or Site(), head_dim=head_dim)
        self.chain = Chain(quantizer.transforms, self.site) if quantizer.transforms else None
        self.parts = {}
        if self.by_position:
            self.parts[POSITIONS] = Pages()

    @property
    def by_position(self) -> bool:
        """Whether tokens can't be coded without their positions."""
        return self.chain is not None and self.chain.by_position

    @property
    def _along(self) -> tuple[str, ...]:
        """The parts with an entry for each token held, coded or not."""
        return (POSITIONS,) if self.by_position else ()

    def _note(self, x: Tensor, positions: Tensor | None) -> None:
        """Keep the positions of tokens that are coming in, if they are needed."""
        if not self.by_position:
            return
        if positions is None:
            raise CacheError("a store whose transforms need positions must be given those of each token, found none")
        part = self.parts[POSITIONS]
        heads = part.pages[0].shape[1] if part.pages else positions.shape[-2] if positions.ndim > 1 else 1
        shape = (x.shape[0], heads, x.shape[2])
        part.append(positions.to(x.device, torch.int32).expand(shape).unsqueeze(3))

    def _places(self, first: int, last: int) -> Tensor | None:
        """Positions of the tokens from `first` to `last`, if they are needed: `[batch, kv_heads or 1, tokens]`."""
        return self.parts[POSITIONS].slice(first, last).squeeze(3) if self.by_position and first < last else None

    def _gathered(self, index: Tensor) -> Tensor | None:
        """Positions of the tokens at `index`, `[batch, kv_heads or 1, tokens]`, if they are needed."""
        return self.parts[POSITIONS].gather(index).squeeze(3) if self.by_position else None

    def _taken(self, index: Ints) -> Tensor | None:
        """Positions of the tokens at `index`, ascending, if they are needed."""
        return self.parts[POSITIONS].take(torch.from_numpy(index)).squeeze(3) if self.by_position else None

    def ragged(self, lines: tuple[int, int]) -> None:
        part = self.parts.get(POSITIONS)
        if part is not None and part.length and lines[1] > part.pages[0].shape[1]:
            x = part.slice(0, part.length)
            self.parts[POSITIONS] = Pages(whole=True)
            self.parts[POSITIONS].append(x.expand(-1, lines[1], -1, -1))
        super().ragged(lines)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        if self.chain is not None:
            self.chain.select(rows)

    def to(self, device: torch.device) -> None:
        super().to(device)
        if self.chain is not None:
            self.chain.to(device)

    def _own_bytes(self) -> dict[str, int]:
        """Bytes of positions, and of what transforms keep."""
        own = {"indices": self.parts[POSITIONS].used()} if self.by_position else {}
        return own if self.chain is None else {**own, "state": self.chain.bytes()}

    def reserved(self) -> int:
        return super().reserved() + (self.chain.bytes() if self.chain is not None else 0)

    def tensors(self) -> dict[str, Tensor]:
        kept = self.chain.tensors() if self.chain is not None else {}
        return {**super().tensors(), **kept}

    def _restore_own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Restore what belongs to transforms of what `tensors` gave; returns the rest."""
        own = {name: t for name, t in tensors.items() if name.startswith(OWN)}
        if POSITIONS in own:
            super().restore({POSITIONS: own.pop(POSITIONS)})
        if self.chain is not None and tensors:
            self.chain.restore(own)
        return {name: t for name, t in tensors.items() if not name.startswith(OWN)}
