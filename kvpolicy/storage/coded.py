"""What stores of quantizers have in common: transforms before the codes, and the positions that some of them need."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.errors import CacheError
from kvpolicy.interfaces.component import check_answer
from kvpolicy.interfaces.extra import Grouping
from kvpolicy.interfaces.quantizer import Quantizer
from kvpolicy.interfaces.site import Site
from kvpolicy.storage.base import Ints, Store
from kvpolicy.storage.beside import EXTRAS, Beside, Runs
from kvpolicy.storage.chain import Chain
from kvpolicy.storage.named_parts import NamedParts
from kvpolicy.storage.pages import Pages

__all__ = ["NOTHING", "POSITIONS", "Aside", "CodedStore"]

OWN = "transforms."
"""How the names of what belongs to transforms begin."""
POSITIONS = "transforms.positions"
"""The part that holds the position of each token, where a transform needs them: int32 `[batch, 1 or kv_heads, tokens]`.
"""


class Aside(NamedTuple):
    """What decoding needs of some tokens besides their codes."""

    places: Tensor | None
    """Their positions, where transforms need them."""
    parts: Runs | None
    """What extras keep of them."""


NOTHING = Aside(None, None)


class CodedStore(Store):
    """A store whose tokens are coded by a quantizer, maybe behind transforms.

    What is coded lies in the space of the transforms; decoding leads back from it. What waits exactly does not.
    """

    def __init__(self, quantizer: Quantizer, head_dim: int, site: Site | None) -> None:
        check_answer(quantizer, "check", head_dim)
        self.head_dim = head_dim
        self.site = replace(site or Site(), head_dim=head_dim)
        self.chain = Chain(quantizer.transforms, self.site) if quantizer.transforms else None
        self.beside = Beside(quantizer.extras, self.site, self._grouping(quantizer)) if quantizer.extras else None
        self.parts = {}
        if self.by_position:
            self.parts[POSITIONS] = Pages()

    def _grouping(self, quantizer: Quantizer) -> Grouping:
        """Which numbers share a scale."""
        return Grouping("token", self.head_dim)

    @property
    def by_position(self) -> bool:
        """Whether tokens can't be coded without their positions."""
        return self.chain is not None and self.chain.by_position

    @property
    def _kept(self) -> list[NamedParts]:
        """What extras keep of the tokens that are coded."""
        return self.beside.kept if self.beside is not None else []

    @property
    def _along(self) -> tuple[str, ...]:
        """The parts with an entry for each token held, coded or not."""
        return (POSITIONS,) if self.by_position else ()

    def _note(self, x: Tensor, positions: Tensor | None, full: bool) -> None:
        """Keep the positions of tokens that are coming in, if they are needed. `full` as in `append`."""
        if self.chain is not None:
            self.chain.late.full = full
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

    def _sliced(self, first: int, last: int) -> Aside:
        """What there is beside the codes from `first` to `last`."""
        found = self.beside.slice(first, last) if self.beside is not None and first < last else None
        return Aside(self._places(first, last), found)

    def _gathered(self, index: Tensor) -> Aside:
        """What there is beside the codes at `index`, `[batch, kv_heads or 1, tokens]`."""
        found = self.beside.gather(index) if self.beside is not None else None
        return Aside(self.parts[POSITIONS].gather(index).squeeze(3) if self.by_position else None, found)

    def _taken(self, index: Ints) -> Aside:
        """What there is beside the codes at `index`, ascending."""
        found = self.beside.of_taken(index) if self.beside is not None and len(index) else None
        places = self.parts[POSITIONS].take(index).squeeze(3) if self.by_position else None
        return Aside(places, found)

    def _finished(self, out: Tensor, aside: Aside) -> Tensor:
        """What was decoded, with what is kept beside, led back from the space of the transforms."""
        if self.beside is not None and aside.parts is not None:
            out = out.float() if out.dtype != torch.float32 else out.clone()
            self.beside.add(out, aside.parts)
        return out if self.chain is None else self.chain.inverse(out, aside.places)

    def try_attention(self, x: Tensor) -> None:
        """Ask transforms and extras for what attention asks of them, for tokens like `x`.

        Raises:
            PluginError: they misbehave.
        """
        chain, beside = self.chain, self.beside
        rows = x.new_zeros((*x.shape[:2], 1, self.head_dim))
        if chain is not None:
            rows = chain.adjoint(rows) if chain.linear else rows
        coded = beside.kept[0].length if beside is not None and beside.additive else 0
        if beside is not None and coded:
            beside.add_scores(rows, rows.new_zeros((*x.shape[:2], 1, coded)), 0)
            beside.add_values(rows.new_zeros((*x.shape[:2], 1, coded)), rows, 0)

    def differ_by_head(self, row_heads: tuple[int, int]) -> None:
        part = self.parts.get(POSITIONS)
        if part is not None and part.length and row_heads[1] > part.pages[0].shape[1]:
            x = part.slice(0, part.length)
            self.parts[POSITIONS] = Pages(whole=True)
            self.parts[POSITIONS].append(x.expand(-1, row_heads[1], -1, -1))
        super().differ_by_head(row_heads)
        for kept in self._kept:
            kept.differ_by_head(row_heads)
        if self.chain is not None:
            self.chain.late.apart = True

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        for kept in self._kept:
            kept.select(rows)
        if self.chain is not None:
            self.chain.select(rows)

    def to(self, device: torch.device) -> None:
        super().to(device)
        for kept in self._kept:
            kept.to(device)
        if self.chain is not None:
            self.chain.to(device)

    def _own_bytes(self) -> dict[str, int]:
        """Bytes of positions, and of what transforms keep."""
        own = {"indices": self.parts[POSITIONS].used()} if self.by_position else {}
        if self.front is not None:
            own["indices"] = own.get("indices", 0) + sum(part.bounds() for part in self.parts.values())
        if self.beside is not None:
            beside = self.beside.kept
            own["indices"] = own.get("indices", 0) + sum(kept.used_by_groups() for kept in beside)
            own["extras"] = sum(kept.used() for kept in beside)
        return own if self.chain is None else {**own, "state": self.chain.bytes()}

    def reserved(self) -> int:
        own = sum(kept.reserved() for kept in self._kept)
        return super().reserved() + own + (self.chain.bytes() if self.chain is not None else 0)

    def of_store(self, name: str) -> bool:
        """Whether a tensor of that name, of those that are saved, has no entry for each token or group."""
        if name.startswith(EXTRAS):
            _, number, own = name.split(".", 2)
            beside = self.beside.kept if self.beside is not None else []
            at = int(number) if number.isdecimal() else len(beside)
            return at < len(beside) and beside[at].axis(own) == "store"
        return name.startswith(OWN) and name != POSITIONS

    def tensors(self) -> dict[str, Tensor]:
        kept = self.chain.tensors() if self.chain is not None else {}
        beside = self.beside.tensors() if self.beside is not None else {}
        return {**super().tensors(), **kept, **beside}

    def _restore_own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Restore what belongs to transforms of what `tensors` gave; returns the rest."""
        own = {name: t for name, t in tensors.items() if name.startswith(OWN)}
        if POSITIONS in own:
            super().restore({POSITIONS: own.pop(POSITIONS)})
        coded = any(not name.startswith((OWN, EXTRAS)) and name not in ("exact", "sizes") for name in tensors)
        if self.chain is not None and (own or coded):
            self.chain.restore(own)
        if self.beside is not None:
            self.beside.restore(tensors)
        return {name: t for name, t in tensors.items() if not name.startswith((OWN, EXTRAS))}
