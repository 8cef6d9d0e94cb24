"""Tracking and counting over a whole context, in RULER's forms (Hsieh et al. 2024, arXiv:2404.06654)."""

from __future__ import annotations

import math
import random
import string
from itertools import pairwise
from typing import Any, ClassVar

from pydantic import Field

from kvpolicy.tasks.haystack import filling, hide
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.task import Chat, Fitted, spread
from kvpolicy.tasks.vocabulary import distinct_words

SHORT = 4096
"""RULER repeats words less often in contexts below so many tokens."""


def _names(rng: random.Random, count: int, letters: str, length: int) -> list[str]:
    """Different drawn words, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(letters, k=length))] = None
    return list(found)


class Variables(Fitted, Chat):
    """Variables assigned from one another in chains; all that have one value are asked for.

    RULER's `vt`, with its example before the text. Chains are spread over the text; an assignment comes after the one
    that it takes its value from. The score is the share of the variables that the output contains.
    """

    name: ClassVar[str] = "variables"
    chains: int = Field(1, ge=1, le=100, description="Chains; the first is asked for.")
    hops: int = Field(4, ge=1, le=100, description="Assignments that follow the first one of a chain.")
    haystack: str = Field("noise", description="`noise` (RULER's five sentences), `prose`, or the path of a text.")
    example: bool = Field(True, description="Put a solved example before the text.")

    def build(self, units: int, rng: random.Random, depth: float, tokenizer: Any) -> Sample:
        """Depths are those of the assignments that are asked for."""
        shown = ""
        if self.example:
            # RULER's example has names of three letters and one short text.
            question, prefix, names, _ = self._puzzle(rng, 5, 1, 3)
            shown = f"{question}{prefix}{' '.join(names)}\n\n"
        question, prefix, names, places = self._puzzle(rng, units, self.chains, 5)
        return self.chat(
            shown + question,
            " ".join(names),
            tokenizer,
            prefix.rstrip(),
            task=self.name,
            answers=tuple(names),
            facts={**spread(places), "length": self.tokens},
            scorer="contains_all",
        )

    def _puzzle(
        self, rng: random.Random, units: int, chains: int, letters: int
    ) -> tuple[str, str, list[str], list[float]]:
        """Question, how its answer begins, the variables asked for, and where they are assigned."""
        length = self.hops + 1
        names = _names(rng, chains * length, string.ascii_uppercase, letters)
        values = [str(rng.randrange(10_000, 100_000)) for _ in range(chains)]
        while len(set(values)) < chains:
            values = [str(rng.randrange(10_000, 100_000)) for _ in range(chains)]
        told, depths = [], []
        for chain in range(chains):
            own = names[chain * length : (chain + 1) * length]
            told.append(f"VAR {own[0]} = {values[chain]}")
            told += [f"VAR {new} = VAR {old}" for old, new in pairwise(own)]
            depths += sorted(rng.random() for _ in range(length))
        pieces, between = filling(self.haystack, self.name, units, rng)
        if between == " ":
            told = [f"{line}." for line in told]
        context, places = hide(pieces, told, depths, between)
        value, count = values[0], length
        question = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
        )
        prefix = (
            f" Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
            f"assigned the value {value}, they are: "
        )
        return question, prefix, names[:length], places[:length]


class CommonWords(Fitted, Chat):
    """The most common words of a numbered list.

    RULER's `cwe`, with its example: ten common words, 30 times each, among words that come 3 times (below 4,096 tokens
    6 times and once). Words are kvpolicy's own list, beyond it pairs joined by a hyphen. The score is the share of the
    common words that the output contains.
    """

    name: ClassVar[str] = "common_words"
    common: int = Field(10, ge=1, le=100, description="Common words, all asked for.")
    often: int | None = Field(None, ge=2, le=1000, description="Times of a common word; default: 30, or 6 if short.")
    seldom: int | None = Field(None, ge=1, le=1000, description="Times of another word; default: 3, or 1 if short.")
    example: bool = Field(True, description="Put a solved example before the list.")

    @property
    def most(self) -> int | None:
        """As many as there are words."""
        return 40_000

    def build(self, units: int, rng: random.Random, depth: float, tokenizer: Any) -> Sample:
        """Units are words that are not common."""
        short = self.tokens < SHORT
        often, seldom = self.often or (6 if short else 30), self.seldom or (1 if short else 3)
        often = max(often, seldom + 1)
        shown = ""
        if self.example:
            few, times, once = (10, 3, 1) if short else (30, 10, 3)
            question, prefix, words = self._puzzle(rng, few, times, once)
            shown = f"{question}{prefix}{_numbered(words)}\n"
        question, prefix, words = self._puzzle(rng, units, often, seldom)
        return self.chat(
            shown + question,
            _numbered(words),
            tokenizer,
            prefix.rstrip(),
            task=self.name,
            answers=tuple(words),
            facts={"length": self.tokens},
            scorer="contains_all",
        )

    def _puzzle(self, rng: random.Random, others: int, often: int, seldom: int) -> tuple[str, str, list[str]]:
        words = distinct_words(rng, self.common + others)
        common, rest = words[: self.common], words[self.common :]
        listed = common * often + rest * seldom
        rng.shuffle(listed)
        question = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{_numbered(listed)}\nQuestion: What are the {self.common} most common words in "
            "the above list?"
        )
        prefix = f" Answer: The top {self.common} words that appear most often in the list are: "
        return question, prefix, common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


class FrequentWords(Fitted, Chat):
    """The three most frequent words of a coded text, whose frequencies fall as a power of their rank.

    RULER's `fwe`: words of six letters, of which the k-th comes in proportion to k to the power of minus alpha; in the
    place of the most frequent stand dots, to be ignored. The score is the share of the three that the output contains.
    """

    name: ClassVar[str] = "frequent_words"
    least: ClassVar[int] = 60
    alpha: float = Field(2.0, gt=1, le=10, description="How fast frequencies fall.")
    letters: int = Field(6, ge=3, le=20, description="Letters of a word.")

    def build(self, units: int, rng: random.Random, depth: float, tokenizer: Any) -> Sample:
        """Units are words of text."""
        vocabulary = _names(rng, max(self.tokens // 50, 20), string.ascii_lowercase, self.letters)
        vocabulary[0] = "..."
        total = _zeta(self.alpha)
        times = [int(units * rank**-self.alpha / total) for rank in range(1, len(vocabulary) + 1)]
        # The three must come, and differ in how often they do.
        for place in (3, 2, 1):
            times[place] = max(times[place], times[place + 1] + 1)
        text = [word for word, count in zip(vocabulary, times, strict=True) for _ in range(count)]
        rng.shuffle(text)
        wanted = vocabulary[1:4]
        question = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(text)}\nQuestion: Do not provide any explanation. Please ignore the dots "
            "'....'. What are the three most frequently appeared words in the above coded text?"
        )
        return self.chat(
            question,
            " ".join(wanted),
            tokenizer,
            " Answer: According to the coded text above, the three most frequently appeared words are:",
            task=self.name,
            answers=tuple(wanted),
            facts={"length": self.tokens},
            scorer="contains_all",
        )


def _zeta(alpha: float, terms: int = 10_000) -> float:
    """Riemann's zeta function: a sum, and the integral of what is left."""
    rest = math.pow(terms, 1 - alpha) / (alpha - 1) + 0.5 * math.pow(terms, -alpha)
    return sum(math.pow(k, -alpha) for k in range(1, terms)) + rest
