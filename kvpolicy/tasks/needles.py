"""Needles in a haystack, in RULER's forms (Hsieh et al. 2024, arXiv:2404.06654), and passkeys."""

from __future__ import annotations

import random
from typing import Any, ClassVar, Literal

from pydantic import Field

from kvpolicy.tasks.haystack import NOISE, filling, hide, scatter
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.task import Chat, Fitted, spread
from kvpolicy.tasks.vocabulary import distinct

_DEPTH = "Where in the context the thing asked for stands, from 0 to 1; default: spread evenly over the samples."


class Needle(Fitted, Chat):
    """Special magic values for keys, hidden in a text, of which some are asked for.

    RULER's forms: `haystack=noise` for niah_single_1, the path of its essays for niah_single_2 and with
    `value_kind=uuids` for niah_single_3, `keys=4` for niah_multikey_1, `haystack=needles` for niah_multikey_2 and with
    `key_kind=uuids,value_kind=uuids` for niah_multikey_3, `values=4` for niah_multivalue, `queries=4` for
    niah_multiquery. RULER's essays are not bundled; sentences are drawn instead, or any text given. Keys are pairs of
    words of kvpolicy's own list, all different, and so are values. Under a chat template the answer's prefix loses its
    first space. The score is the share of the values asked for that the output contains.
    """

    name: ClassVar[str] = "needle"
    keys: int = Field(1, ge=1, le=1000, description="Keys in the text; at least as many as are asked for.")
    values: int = Field(1, ge=1, le=100, description="Values of each key.")
    queries: int = Field(1, ge=1, le=100, description="Keys that are asked for.")
    depth: float | None = Field(None, ge=0, le=1, description=_DEPTH)
    haystack: str = Field(
        "prose",
        description="`prose` (drawn sentences), `noise` (RULER's five sentences), `needles` (other keys and values), "
        "or the path of a text.",
    )
    key_kind: Literal["words", "numbers", "uuids"] = Field("words", description="What keys are.")
    value_kind: Literal["words", "numbers", "uuids"] = Field("numbers", description="What values are.")

    def build(self, units: int, rng: random.Random, depth: float, tokenizer: Any) -> Sample:
        """Of several needles the first that is asked for stands at the depth, the others anywhere."""
        count = max(self.keys, self.queries)
        needles = self.haystack == "needles"
        spare = units if needles else 0
        keys = distinct(rng, self.key_kind, count + spare)
        values = distinct(rng, self.value_kind, count * self.values + spare)
        told = [self._tell(keys[i // self.values], values[i]) for i in range(count * self.values)]
        if needles:
            rest = zip(keys[count:], values[count * self.values :], strict=True)
            pieces, between = [self._tell(key, value) for key, value in rest], "\n"
        else:
            pieces, between = filling(self.haystack, self.name, units, rng)
        asked = range(self.queries * self.values)
        context, places = hide(pieces, told, scatter(rng, self.depth, depth, len(told)), between)
        wanted = [values[i] for i in asked]
        question, prefix = self._ask(context, keys[: self.queries])
        return self.chat(
            question,
            ", ".join(wanted),
            tokenizer,
            prefix,
            task=self.name,
            answers=tuple(wanted),
            facts={**spread([places[i] for i in asked]), "length": self.tokens},
            scorer="contains_all",
        )

    def _tell(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value_kind} for {key} is: {value}."

    def _ask(self, context: str, keys: list[str]) -> tuple[str, str]:
        query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        one = self.queries * self.values == 1
        kind = self.value_kind[:-1] if one else self.value_kind
        some, what, verb = ("A", "What is the", "is") if one else ("Some", "What are all the", "are")
        return (
            f"{some} special magic {kind} {verb} hidden within the following text. Make sure to memorize it. I will "
            f"quiz you about the {kind} afterwards.\n{context}\n{what} special magic {kind} for {query} mentioned in "
            f"the provided text?",
            f" The special magic {kind} for {query} mentioned in the provided text {verb}",
        )


class Passkey(Fitted, Chat):
    """A pass key in a text that says nothing (Mohtashami and Jaggi 2023, arXiv:2305.16300)."""

    name: ClassVar[str] = "passkey"
    digits: int = Field(5, ge=1, le=100, description="Digits of the pass key.")
    depth: float | None = Field(None, ge=0, le=1, description=_DEPTH)

    def build(self, units: int, rng: random.Random, depth: float, tokenizer: Any) -> Sample:
        """The key is told twice in one place."""
        key = str(rng.randint(10 ** (self.digits - 1), 10**self.digits - 1))
        told = f"The pass key is {key}. Remember it. {key} is the pass key."
        context, places = hide([NOISE] * units, [told], [depth if self.depth is None else self.depth], "\n")
        question = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz "
            f"you about the important information there.\n{context}\nWhat is the pass key?"
        )
        return self.chat(
            question,
            key,
            tokenizer,
            " The pass key is",
            task=self.name,
            facts={**spread(places), "length": self.tokens},
            scorer="contains",
        )
