"""What a plan says: typed, as a table, as a mapping, as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvpolicy.layer.report import PARTS, Memory
from kvpolicy.planning.shape import ModelShape
from kvpolicy.planning.sizes import in_units

__all__ = ["Plan", "Planned"]


@dataclass(frozen=True)
class Planned:
    """One recipe at one length."""

    recipe: str
    tokens: int
    """Tokens seen, all in all."""
    prompt: int
    generated: int
    memory: Memory
    """The cache: what `CompressedCache.memory()` gives after the same passes."""
    weights: int
    """Bytes of the model's weights."""
    prefill_peak: int
    """Bytes at the peak of the prefill: weights, what the cache has reserved, and an estimate of what a layer computes
    of a pass."""
    decoding: int
    """The same while decoding."""
    read: int
    """Bytes that a decoding step reads at least, of weights and cache, for all rows."""
    read_exact: int
    """The same with the exact cache."""
    rows: int
    at_most: tuple[str, ...] = ()
    """Why the bytes are a bound, if attention decides how many tokens are kept where."""
    largest_batch: int | None = None
    """Rows that fit at this length, where a memory was given."""
    longest_context: int | None = None
    """Tokens that fit with this batch."""

    @property
    def read_per_token(self) -> float:
        """Bytes read for each token decoded."""
        return self.read / self.rows

    @property
    def speedup_ceiling(self) -> float:
        """How many times as fast as with the exact cache a step is at most, where memory bounds it."""
        return self.read_exact / self.read

    @property
    def total(self) -> int:
        """The most bytes at any time."""
        return max(self.prefill_peak, self.decoding)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        memory = self.memory
        return {
            "recipe": self.recipe,
            "tokens": self.tokens,
            "prompt": self.prompt,
            "generated": self.generated,
            "batch": self.rows,
            "cache": {
                "bytes": memory.bytes,
                "parts": {part: memory.total(part) for part in PARTS},
                "reserved": memory.reserved,
                "scratch": memory.scratch,
                "exact_bytes": memory.exact_bytes,
                "ratio": memory.ratio,
                "bits_per_value": memory.bits_per_value,
                "at_most": list(self.at_most),
            },
            "weights": self.weights,
            "prefill_peak": self.prefill_peak,
            "decoding": self.decoding,
            "read_per_step": self.read,
            "read_per_step_exact": self.read_exact,
            "read_per_token": self.read_per_token,
            "speedup_ceiling": self.speedup_ceiling,
            "largest_batch": self.largest_batch,
            "longest_context": self.longest_context,
        }


@dataclass(frozen=True)
class Plan:
    """What `plan` found, for each recipe and length."""

    model: ModelShape
    found: tuple[Planned, ...]
    batch: int
    limit: int | None
    """Bytes of memory that there are, where they were given."""
    device: str
    attached: bool

    width = 200
    """Characters of a line where no terminal reads it."""

    def __getitem__(self, recipe: str) -> Planned:
        """The plan of a recipe, by its name, at the first length."""
        return next(found for found in self.found if found.recipe == recipe)

    def unfit(self) -> list[str]:
        """A line for each recipe and length of which not even one row fits into the memory given."""
        return [
            f"{x.recipe}: one row of {x.tokens:,} tokens does not fit into {in_units(self.limit or 0)}; "
            f"{x.longest_context or 0:,} tokens do with batch {self.batch}"
            for x in self.found
            if x.largest_batch == 0
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        model = self.model
        return {
            "model": {
                "name": model.name,
                "parameters": model.parameters,
                "dtype": model.dtype,
                "layers": len(model.layers),
                "compressible_layers": sum(layer.compressible for layer in model.layers),
                "positions": model.positions,
                "notes": list(model.notes),
            },
            "batch": self.batch,
            "memory": self.limit,
            "device": self.device,
            "attached": self.attached,
            "plans": [found.to_dict() for found in self.found],
        }

    def tables(self) -> list[Any]:
        """Sizes and what fits, and bytes by part."""
        from rich.table import Table
        from rich.text import Text

        def table(title: str, *columns: str) -> Any:
            made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
            for i, column in enumerate(columns):
                made.add_column(column, justify="right" if i else "left", overflow="fold")
            return made

        model, fits = self.model, self.limit is not None
        beyond = ("largest batch", "longest context") if fits else ()
        size = f"{model.parameters:,} parameters in {model.dtype}, {in_units(model.weights)}"
        title = f"{model.name}: {size}; batch {self.batch}"
        sizes = table(
            title, "recipe", "tokens", "cache", "bits per value", "smaller", "prefill peak", "decoding",
            "read per token", "ceiling", *beyond,
        )  # fmt: skip
        parts = table("Bytes of the cache", "recipe", "tokens", *PARTS, "in all", "reserved", "of it scratch")
        for x in self.found:
            name, more = f"{x.recipe}{'*' if x.at_most else ''}", f"{'<= ' if x.at_most else ''}"
            row = [
                name, f"{x.tokens:,}", more + in_units(x.memory.bytes), f"{more}{x.memory.bits_per_value:.2f}",
                f"{x.memory.ratio:.2f}x", in_units(x.prefill_peak), in_units(x.decoding),
                in_units(x.read_per_token), f"{x.speedup_ceiling:.2f}x",
            ]  # fmt: skip
            row += [f"{x.largest_batch:,}", f"{x.longest_context:,}"] if fits else []
            sizes.add_row(*map(Text, row))
            own = [x.memory.total(part) for part in PARTS]
            numbers = (*own, x.memory.bytes, x.memory.reserved, x.memory.scratch)
            parts.add_row(*map(Text, (name, f"{x.tokens:,}", *(f"{n:,}" for n in numbers))))
        return [sizes, parts]

    def notes(self) -> str:
        """How the tables are to be read."""
        lines = [
            "cache: what memory() of a real cache gives. prefill peak and decoding: weights, pages and an estimate of "
            "what a layer computes at once. read per token: what a decoding step must read of weights and cache, by "
            "row. ceiling: how many times as fast as with the exact cache a step gets at most.",
        ]
        for name, bounds in {x.recipe: x.at_most for x in self.found if x.at_most}.items():
            lines.append(f"* {name}: at most, for {' and '.join(bounds)}.")
        later = {x.recipe: x for x in self.found if x.generated}
        if later:
            one = next(iter(later.values()))
            lines.append(
                f"{', '.join(later)}: a prompt of {one.prompt:,} tokens and {one.generated:,} generated"
                + ("." if len(later) < len({x.recipe for x in self.found}) else " each.")
            )
        apart = sum(not layer.compressible for layer in self.model.layers)
        if apart:
            kinds = sorted({layer.kind for layer in self.model.layers if not layer.compressible})
            lines.append(
                f"{apart} of {len(self.model.layers)} layers keep transformers' own cache: {', '.join(kinds)}."
            )
        longest = max((x.longest_context or 0 for x in self.found), default=0)
        if self.model.positions and max(longest, *(x.tokens for x in self.found)) > self.model.positions:
            lines.append(f"The model was made for {self.model.positions:,} positions.")
        lines += [note[:1].upper() + note[1:] + "." for note in self.model.notes]
        return "\n".join(lines)
