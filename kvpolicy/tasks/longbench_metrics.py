"""LongBench's metrics, computed as its `metrics.py` and `eval.py` do (MIT license, commit c5ea10b)."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Final

from kvpolicy.errors import MissingDependencyError, TaskError
from kvpolicy.tasks.measures import f1, normalized
from kvpolicy.tasks.sample import Sample
from kvpolicy.words import clip

_CHINESE: Final = bytes.fromhex(
    """
ff01 ff1f ff61 3002 ff02 ff03 ff04 ff05 ff06 ff07 ff08 ff09 ff0a ff0b ff0c ff0d ff0f ff1a ff1b ff1c ff1d ff1e
ff20 ff3b ff3c ff3d ff3e ff3f ff40 ff5b ff5c ff5d ff5e ff5f ff60 ff62 ff63 ff64 3001 3003 300b 300c 300d 300e
300f 3010 3011 3014 3015 3016 3017 3018 3019 301a 301b 301c 301d 301e 301f 3030 303e 303f 2013 2014 2018 2019
201b 201c 201d 201e 201f 2026 2027 fe4f 002e
"""
).decode("utf-16-be")
"""Full-width and Chinese punctuation, by its code points."""
_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE)
FIRST_LINE: Final = ("trec", "triviaqa", "samsum", "lsht")
"""Tasks of which the first line of the output is scored."""


def longbench(text: str, sample: Sample) -> float:
    """The official metric of the fact `dataset`, the best over the references."""
    dataset = str(sample.facts["dataset"])
    if dataset in FIRST_LINE:
        text = text.lstrip("\n").split("\n")[0]
    metric, classes = DATASETS[dataset], sample.facts.get("classes") or ()
    return max(metric(text, reference, classes) for reference in sample.references)


def check_dataset(dataset: str) -> None:
    """Refuse a Chinese task where its library is not installed.

    Raises:
        MissingDependencyError: saying how it is installed.
    """
    if DATASETS[dataset] in (_qa_f1_zh, _rouge_zh):
        _cut("")


def _qa_f1(text: str, reference: str, classes: Sequence[str]) -> float:
    return f1(normalized(text), normalized(reference))


def _qa_f1_zh(text: str, reference: str, classes: Sequence[str]) -> float:
    found, wanted = (
        ["".join(word.lower().translate(_PUNCTUATION).split()) for word in _cut(given)] for given in (text, reference)
    )
    return f1([word for word in found if word], [word for word in wanted if word])


def _rouge(text: str, reference: str, classes: Sequence[str]) -> float:
    return rouge_l(text, reference)


def _rouge_zh(text: str, reference: str, classes: Sequence[str]) -> float:
    return rouge_l(" ".join(_cut(text)), " ".join(_cut(reference)))


def _cut(text: str) -> list[str]:
    try:
        import jieba
    except ImportError as error:
        raise MissingDependencyError(
            "LongBench's Chinese tasks need jieba, which is not installed; pip install 'kvpolicy[tasks]'"
        ) from error
    jieba.setLogLevel("ERROR")
    return list(jieba.cut(text, cut_all=False))


def rouge_l(text: str, reference: str) -> float:
    """F of ROUGE-L as the package `rouge` 1.0.1 computes it, without its recursion, which long texts exhaust.

    Texts are split into sentences at full stops. Words found are those of the longest common subsequences of each pair
    of sentences, as a set; so are the words they are counted against.
    """
    found, wanted = (
        [" ".join(part.split()).split(" ") for part in given.split(".") if part] for given in (text, reference)
    )
    if not found or not wanted:
        return 0.0
    shared = {word for sentence in wanted for other in found for word in _subsequence(sentence, other)}
    precision = len(shared) / len({word for sentence in found for word in sentence})
    recall = len(shared) / len({word for sentence in wanted for word in sentence})
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def _subsequence(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """The longest common subsequence that the package finds, of those there may be; backwards."""
    table = [[0] * (len(other) + 1)]
    for word in one:
        above, row = table[-1], [0]
        for j, candidate in enumerate(other):
            row.append(above[j] + 1 if word == candidate else max(above[j + 1], row[j]))
        table.append(row)
    found, i, j = [], len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            found.append(one[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _classification(text: str, reference: str, classes: Sequence[str]) -> float:
    named = [name for name in classes if name in text]
    # As the official loop, which removes from the list that it walks, and so passes over what follows.
    place = 0
    while place < len(named):
        if named[place] in reference and named[place] != reference:
            named.remove(named[place])
        place += 1
    return 1.0 / len(named) if reference in named else 0.0


def _count(text: str, reference: str, classes: Sequence[str]) -> float:
    numbers = re.findall(r"\d+", text)
    return sum(number == reference for number in numbers) / len(numbers) if numbers else 0.0


def _retrieval(form: str) -> Callable[[str, str, Sequence[str]], float]:
    def metric(text: str, reference: str, classes: Sequence[str]) -> float:
        wanted = re.findall(form, reference)
        if not wanted:
            raise TaskError(
                f"answers of this task must be like {form!r}, found {clip(reference, 80)!r}; check the rows"
            )
        return _count(text, wanted[0], classes)

    return metric


def _code_sim(text: str, reference: str, classes: Sequence[str]) -> float:
    lines = (line for line in text.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    found = next(lines, "")
    if found == reference:
        return 1.0
    if not found or not reference:
        return 0.0
    return round(100 * SequenceMatcher(None, found, reference).ratio()) / 100


DATASETS: Final[dict[str, Callable[[str, str, Sequence[str]], float]]] = {
    "narrativeqa": _qa_f1,
    "qasper": _qa_f1,
    "multifieldqa_en": _qa_f1,
    "multifieldqa_zh": _qa_f1_zh,
    "hotpotqa": _qa_f1,
    "2wikimqa": _qa_f1,
    "musique": _qa_f1,
    "dureader": _rouge_zh,
    "gov_report": _rouge,
    "qmsum": _rouge,
    "multi_news": _rouge,
    "vcsum": _rouge_zh,
    "trec": _classification,
    "triviaqa": _qa_f1,
    "samsum": _rouge,
    "lsht": _classification,
    "passage_count": _count,
    "passage_retrieval_en": _retrieval(r"Paragraph (\d+)"),
    "passage_retrieval_zh": _retrieval(r"段落(\d+)"),
    "lcc": _code_sim,
    "repobench-p": _code_sim,
}
"""The 21 tasks and their metrics."""
