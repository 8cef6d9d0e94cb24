"""What a check found: typed, as tables, as a mapping."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Check", "KeyLayer", "Probe"]

STANDS_OUT = 32.0
"""How many times as large as the median channel's the largest channel's mean magnitude is where it is told."""
BIASED = 16.0
"""The magnitude of a bias of `k_proj` from which on it is told."""
COLLAPSE = 4.0
"""How many times the KL of keys per channel is that of keys per token where the latter collapse."""


@dataclass(frozen=True)
class KeyLayer:
    """Keys of one layer on the text."""

    layer: int
    largest: float
    """The largest magnitude."""
    outlier: float
    """The mean magnitude of the largest channel by that of the median one, in the head where it is most."""
    offset: float
    """The mean of a channel by its range, of the channel where it is most: a constant that codes per token span."""
    bias: float
    """The largest magnitude of the bias of `k_proj`; 0 without one."""


@dataclass(frozen=True)
class Probe:
    """One width and grouping, all of the prompt kept so."""

    bits: int
    keys: str
    """Whether keys share a scale per `token` or per `channel`; values do per token."""
    kl: float | None
    """Nats per predicted token from the exact cache's predictions; None: it can't be tried."""
    error: str = ""


@dataclass(frozen=True)
class Check:
    """What `check` found of a model."""

    model: str
    tokens: int
    own_text: bool
    """Whether the text was that of Python's own library, as none was given."""
    layers: tuple[KeyLayer, ...]
    probes: tuple[Probe, ...]
    proposal: str
    """A bundled recipe, with parameters as on the shell."""
    proposal_kl: float
    """Nats per predicted token of that."""
    limit: float
    """Nats up to which a width counts as safe."""
    head_dims: tuple[int, ...]
    apart: dict[int, str] = field(default_factory=dict)
    """The layers that no recipe can keep, and what keeps them."""
    path: str | None = None
    """The directory of the model, if it was given as one."""

    width = 160
    """Characters of a line where no terminal reads it."""

    def kl(self, bits: int, keys: str) -> float:
        """The KL of a width and grouping; nan if it can't be tried."""
        found = next((p.kl for p in self.probes if (p.bits, p.keys) == (bits, keys)), None)
        return math.nan if found is None else found

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to fear, a sentence each."""
        found = []
        biased = [x for x in self.layers if x.bias >= BIASED]
        if biased:
            most = max(biased, key=lambda x: x.bias)
            found.append(
                f"k_proj has biases of up to {most.bias:.0f} (layer {most.layer}; {len(biased)} layers above "
                f"{BIASED:.0f}): keys in few bits per token lose their other channels"
            )
        out = [x for x in self.layers if x.outlier >= STANDS_OUT]
        if out:
            most = max(out, key=lambda x: x.outlier)
            found.append(
                f"channels of keys stand out by up to {most.outlier:.0f} times the median channel (layer {most.layer}; "
                f"layers {', '.join(str(x.layer) for x in out)})"
            )
        token, channel = self.kl(4, "token"), self.kl(4, "channel")
        if token > self.limit and token > COLLAPSE * channel:
            found.append(
                f"4 bits per token collapse: KL {token:.3f} nats per token, against {channel:.3f} with keys per channel"
            )
        for dim in self.head_dims:
            sizes = [size for size in (32, 64, 128) if size <= dim and dim % size]
            if sizes or dim < 32:
                what = (
                    f"not divided by groups of {', '.join(map(str, sizes))}" if sizes else "smaller than groups of 32"
                )
                found.append(f"head_dim {dim} is {what}; use group_size: auto or head")
        if self.apart:
            kinds = ", ".join(sorted(set(self.apart.values())))
            count = len(self.apart) + len(self.layers)
            found.append(f"{len(self.apart)} of {count} layers can't be compressed and keep transformers' own {kinds}")
        found += [f"{p.bits} bits, keys per {p.keys}, can't be tried: {p.error}" for p in self.probes if p.kl is None]
        if self.proposal == "full":
            found.append(f"no width is within {self.limit:g} nats per token on this text: keep the exact cache")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "warnings": list(self.warnings), "apart": {str(i): x for i, x in self.apart.items()}}

    def tables(self) -> list[Any]:
        """Keys by layer, and the probes."""
        from rich.table import Table
        from rich.text import Text

        def table(title: str, *columns: str) -> Any:
            made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
            for column in columns:
                made.add_column(column, justify="right", overflow="fold")
            return made

        keys = table(f"Keys of {self.model}", "layer", "largest", "outlier channel", "offset", "bias of k_proj")
        for x in self.layers:
            mark = " !" if x.bias >= BIASED or x.outlier >= STANDS_OUT else ""
            numbers = (f"{x.largest:.1f}", f"{x.outlier:.1f}x{mark}", f"{x.offset:.1f}", f"{x.bias:.1f}")
            keys.add_row(*map(Text, (str(x.layer), *numbers)))
        probes = table("KL from the exact cache, nats per token", "bits", "keys per", "KL", "")
        for p in self.probes:
            kl = "-" if p.kl is None else f"{p.kl:.4f}"
            verdict = "can't be tried" if p.kl is None else "safe" if p.kl <= self.limit else "too much"
            probes.add_row(*map(Text, (str(p.bits), p.keys, kl, verdict)))
        return [keys, probes]

    def notes(self) -> str:
        """Warnings and the proposal."""
        text = "source code of Python's own library, as no text was given" if self.own_text else "the text given"
        lines = [f"{self.tokens} tokens of {text}; the first half kept in so many bits, the other predicted."]
        lines += [f"warning: {warning}." for warning in self.warnings]
        lines.append(f"Proposal: {self.proposal} (KL {self.proposal_kl:.4f} on this text)")
        where = f" --model {shlex.quote(self.path)}" if self.path else ""
        lines.append(f"  kvpolicy compare full {self.proposal}{where}")
        name, _, params = self.proposal.partition(":")
        lines.append(f"  extends: {name}" + (f"\n  params: {{{params.replace('=', ': ')}}}" if params else ""))
        return "\n".join(lines)
