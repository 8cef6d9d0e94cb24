"""Scores in [0, 1] of what a model wrote against the references of a sample."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final

from kvpolicy.errors import MissingDependencyError, TaskError
from kvpolicy.tasks.longbench_metrics import longbench
from kvpolicy.tasks.measures import common_subsequence, f1, normalized, similarity
from kvpolicy.tasks.sample import Sample
from kvpolicy.words import in_words, quoted, suggest

_STATED = re.compile(r"^(<k\d+>)[ =](?:\S*=)?(\S+)$", re.MULTILINE)
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])(?P<sign>[-+\u2212])(?=[$€£¥]?\.?\d))?(?:[$€£¥](?P<minus>-)?)?"
    r"(?:(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<part>\.\d+)?|(?<![\d.])(?P<only>\.\d+))"
    r"(?P<power>[eE][-+]?\d{1,3}(?!\w))?"
)
"""A sign follows no word and no bracket: `5-3` are 5 and 3."""


def score(sample: Sample, generated: str) -> float:
    """The score of a text that was decoded after the prompt of a sample, up to where it is to stop.

    Raises:
        TaskError: the scorer is unknown, or of the user's own and failed or gave no number from 0 to 1.
    """
    scorer = SCORERS.get(sample.scorer) if isinstance(sample.scorer, str) else sample.scorer
    if scorer is None:
        raise TaskError(f"scorer must be {_known(sample.scorer)}")
    text = generated[: min((at for stop in sample.stop if (at := generated.find(stop)) >= 0), default=len(generated))]
    if isinstance(sample.scorer, str):
        return float(scorer(text, sample))
    name = getattr(sample.scorer, "__name__", type(sample.scorer).__name__)
    try:
        found = float(scorer(text, sample))
    except Exception as error:
        raise TaskError(f"scorer {quoted(name)} must not fail, found {type(error).__name__}: {error}") from error
    if not 0 <= found <= 1 or math.isnan(found):
        raise TaskError(f"scorer {quoted(name)} must give a number from 0 to 1, found {in_words(found)}")
    return found


def check_scorer(scorer: Any) -> None:
    """Refuse what is no scorer.

    Raises:
        TaskError: it is neither the name of one nor a function, or needs a library that is not installed.
    """
    if not callable(scorer) and not (isinstance(scorer, str) and scorer in SCORERS):
        raise TaskError(f"scorer must be {_known(scorer)}")
    if scorer == "rouge":
        _rouge_scorer()


def _known(found: Any) -> str:
    hint = suggest(found, SCORERS) if isinstance(found, str) else ""
    return f"one of {', '.join(SCORERS)}, or from Python a function of text and sample, found {in_words(found)}{hint}"


def exact(text: str, sample: Sample) -> float:
    """1 if the text equals a reference, leaving out surrounding white space and the lines beyond the reference's."""
    found = text.strip()
    for reference in sample.references:
        wanted = reference.strip()
        if "\n".join(found.split("\n")[: wanted.count("\n") + 1]).rstrip() == wanted:
            return 1.0
    return 0.0


def contains(text: str, sample: Sample) -> float:
    """1 if a reference stands in the text, in upper or lower case (RULER's string_match_part)."""
    return float(any(_within(reference, text) for reference in sample.references))


def contains_all(text: str, sample: Sample) -> float:
    """The share of the references that stand in the text, in upper or lower case (RULER's string_match_all)."""
    return sum(_within(reference, text) for reference in sample.references) / len(sample.references)


def _within(reference: str, text: str) -> bool:
    return reference.strip().lower() in re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip().lower()


def word_f1(text: str, sample: Sample) -> float:
    """F1 of words against the best reference, without punctuation and articles (SQuAD's and LongBench's)."""
    return max(f1(normalized(text), normalized(reference)) for reference in sample.references)


def rouge(text: str, sample: Sample) -> float:
    """ROUGE-L against the best reference, by the package rouge-score, without stemming."""
    scorer = _rouge_scorer()
    return max(float(scorer.score(reference, text)["rougeL"].fmeasure) for reference in sample.references)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependencyError(
            "scorer 'rouge' needs rouge-score, which is not installed; pip install 'kvpolicy[tasks]'"
        ) from error
    return RougeScorer(["rougeL"])


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order: `1,234.0`, `$5`, `-3`, `.5`, `1e3`; commas stand before three digits each."""
    found = []
    for match in _NUMBER.finditer(text):
        sign = "-" if match["sign"] in ("-", "\u2212") or match["minus"] else ""
        digits = (match["digits"] or "").replace(",", "") + (match["part"] or match["only"] or "")
        found.append(Decimal(f"{sign}{digits}{match['power'] or ''}"))
    return found


def numeric(text: str, sample: Sample) -> float:
    """1 if the number after the first `####`, or else the last number, equals that of a reference as a number."""
    found = _final_number(text)
    wanted = [_final_number(reference) for reference in sample.references]
    return float(found is not None and any(found == number for number in wanted))


def _final_number(text: str) -> Decimal | None:
    head, mark, tail = text.partition("####")
    if mark and (after := numbers(tail)):
        return after[0]
    found = numbers(head)
    return found[-1] if found else None


def pattern(text: str, sample: Sample) -> float:
    """1 if a reference, as a regular expression, matches somewhere in the text."""
    return float(any(re.search(reference, text) for reference in sample.references))


def edit(text: str, sample: Sample) -> float:
    """Edit similarity to the best reference: 1 less the insertions and deletions over both lengths."""
    return max(similarity(text.strip(), reference.strip()) for reference in sample.references)


def copied(text: str, sample: Sample) -> float:
    """The share of the reference's words that the text has in the same order."""
    wanted = sample.references[0].split()
    return common_subsequence(text.split()[: 2 * len(wanted)], wanted) / len(wanted)


def pairs(text: str, sample: Sample) -> float:
    """The fraction of the answer's keys for which the text states the same value; a key counts as first stated."""
    expected = dict(_STATED.findall(sample.answer))
    stated: dict[str, str] = {}
    for key, value in _STATED.findall(text):
        stated.setdefault(key, value)
    right = sum(stated.get(key) == value for key, value in expected.items())
    return right / len(expected) if expected else 0.0


def code(text: str, sample: Sample) -> float:
    """The fraction of the answer's first line that is reproduced before the first differing character.

    Several continuations of code are right, so the negative log-likelihood of the answer is the better measure.
    """
    # Indentation is part of the line; only line breaks before it are not.
    wanted = sample.answer.strip("\r\n").split("\n")[0].rstrip() or sample.answer.strip()
    found = text.strip("\r\n").split("\n")[0].rstrip()
    same = 0
    while same < min(len(wanted), len(found)) and wanted[same] == found[same]:
        same += 1
    return same / len(wanted) if wanted else 1.0


def call(text: str, sample: Sample) -> float:
    """The share of arguments that the first JSON call in the text has right, of all that it or the answer names.

    Values are equal as parsed JSON, of the same type. A call of another function scores 0.
    """
    wanted, found = json.loads(sample.references[0]), first_object(text)
    given = found.get("arguments", found.get("parameters")) if found is not None else None
    if found is None or found.get("name") != wanted["name"] or not isinstance(given, dict):
        return 0.0
    expected = wanted["arguments"]
    right = sum(name in given and _same(given[name], value) for name, value in expected.items())
    return right / len({*expected, *given})


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def first_object(text: str) -> dict[str, Any] | None:
    """The first JSON object that begins in a text."""
    decoder = json.JSONDecoder()
    for match in list(re.finditer(r"\{", text))[:100]:
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return None


SCORERS: Final[dict[str, Callable[[str, Sample], float]]] = {
    "exact": exact,
    "contains": contains,
    "contains_all": contains_all,
    "f1": word_f1,
    "rouge": rouge,
    "numeric": numeric,
    "regex": pattern,
    "edit": edit,
    "copied": copied,
    "pairs": pairs,
    "code": code,
    "call": call,
    "longbench": longbench,
}
"""The scorers by name."""
