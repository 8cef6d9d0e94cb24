"""Short documents about people and towns that don't exist, and questions about them, of which no model has read."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from kvpolicy.tasks.vocabulary import ADJECTIVES, NAMES, NOUNS, TRADES, pair_of

__all__ = ["Question", "invented"]

KNOWN: Final = ("bell tower", "bridge", "fish market", "library", "observatory", "pottery", "salt works", "silk mill")
PEOPLE: Final = 6000
TOWNS: Final = 2000


@dataclass(frozen=True)
class Question:
    """A question, the documents that answer it, and others that came with it."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[str, ...]
    beside: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def invented() -> tuple[list[Question], list[str]]:
    """Three questions of one document and one of two for each person, and all documents; always the same."""
    rng = random.Random("people and towns")
    towns = []
    for number in rng.sample(range(len(ADJECTIVES) * len(NOUNS)), TOWNS):
        name, river = pair_of(number).replace("-", " ").title(), rng.choice(NOUNS).title()
        text = (
            f"{name} is a town on the river {river}. It was founded in {rng.randint(1100, 1599)} and is known for its "
            f"{rng.choice(KNOWN)}."
        )
        towns.append((name, river, text))
    questions, people = [], []
    for number in rng.sample(range(len(NAMES) * len(NOUNS)), min(PEOPLE, len(NAMES) * len(NOUNS))):
        name = f"{NAMES[number % len(NAMES)]} {NOUNS[number // len(NAMES)].title()}"
        (town, river, about), year, craft = rng.choice(towns), str(rng.randint(1600, 1899)), rng.choice(TRADES)
        text = (
            f"{name}, a {craft}, was born in {town} in {year}. The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} that "
            f"{name} left to a friend has been lost."
        )
        people.append(text)
        questions += [
            Question(f"In which town was {name} born?", (town,), (text,)),
            Question(f"In which year was {name} born?", (year,), (text,)),
            Question(f"What was the trade of {name}?", (craft,), (text,)),
            Question(f"On which river lies the town where {name} was born?", (river,), (text, about)),
        ]
    return questions, [*people, *(about for _, _, about in towns)]
