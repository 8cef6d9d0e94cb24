"""How alike two texts are: what scorers are made of."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as SQuAD and LongBench compare them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(found: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    """Harmonic mean of precision and recall of the parts that two sequences share, however ordered."""
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def similarity(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Twice the longest common subsequence over both lengths: 1 for equal texts, 0 where nothing is shared."""
    if not one and not other:
        return 1.0
    return 2 * common_subsequence(one, other) / (len(one) + len(other))


def common_subsequence(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, by the bits of integers (Hyyrö 2004)."""
    places: dict[Hashable, int] = {}
    for i, part in enumerate(one):
        places[part] = places.get(part, 0) | 1 << i
    every = (1 << len(one)) - 1
    row = every
    for part in other:
        met = row & places.get(part, 0)
        row = ((row + met) | (row - met)) & every
    return len(one) - row.bit_count()
