"""Samples cut from texts: a prompt of some tokens and the tokens that follow it, which nothing generates."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from kvpolicy.arguments import CHARACTERS_PER_POSITION
from kvpolicy.errors import TaskError
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.task import MAX_TOKENS, Generated
from kvpolicy.words import clip, in_words

ANSWER = 64
"""Tokens of an answer, fed one by one. The first is predicted by the prefill, which reads nothing stored."""


@dataclass(frozen=True)
class Span:
    """A sample in the tokens of a model."""

    prompt: list[int]
    answer: list[int]
    file: str


@dataclass(frozen=True)
class Split:
    """Samples that a search sees, and those that its report is made of."""

    tuned: list[Span]
    held_out: list[Span]

    def digest(self) -> str:
        """A hash of all tokens and of the split."""
        found = hashlib.sha256()
        for spans in (self.tuned, self.held_out):
            found.update(str([(span.prompt, span.answer) for span in spans]).encode())
        return found.hexdigest()


def text_files(text: Any) -> list[Path]:
    """The files that are given as one path or several.

    Raises:
        TaskError: there is none, one is given twice, or is no readable file.
    """
    given = [text] if isinstance(text, str | os.PathLike) else text
    if not isinstance(given, Iterable) or not all(isinstance(item, str | os.PathLike) for item in given):
        raise TaskError(f"text must be the path of a file or a list of such, found {in_words(text)}")
    files = [Path(item) for item in given]
    if not files:
        raise TaskError("a search needs a text to cut samples from, found none; name a file (on the shell --text FILE)")
    seen: dict[Path, Path] = {}
    for file in files:
        name = clip(str(file), 300)
        try:
            if not file.is_file():
                found = "a directory" if file.is_dir() else "no such file" if not file.exists() else "something else"
                raise TaskError(f"{name}: a text must be a readable file, found {found}; check the path")
            with file.open("rb"):
                real = file.resolve()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise TaskError(f"{name}: a text must be a readable file, found {reason!r}; check the path") from error
        if real in seen:
            raise TaskError(f"{name}: a text may be given once, found it twice; leave one out")
        seen[real] = file
    return files


def windows(files: Sequence[Path], tokenizer: Any, tokens: int, samples: int, answer: int = ANSWER) -> list[Span]:
    """Samples that don't overlap, evenly spread over the texts.

    Args:
        files: texts in UTF-8; of a long one only a beginning is read that surely holds enough tokens.
        tokenizer: of the model. What it puts before a text, such as a first token, stands before each prompt.
        tokens: tokens of a prompt.
        samples: all of them.
        answer: tokens that follow a prompt.

    Raises:
        TaskError: a file is no text, or all together are shorter than asked.
    """
    before = _before(tokenizer)
    prompt = max(tokens - len(before), 1)
    most = samples * (prompt + answer) * CHARACTERS_PER_POSITION
    spans: dict[tuple[int, ...], Span] = {}
    for file in files:
        ids = list(tokenizer(_read(file, most), add_special_tokens=False, verbose=False)["input_ids"])
        for start in range(0, len(ids) - prompt - answer + 1, prompt + answer):
            part = ids[start : start + prompt + answer]
            spans.setdefault(tuple(part), Span([*before, *part[:prompt]], part[prompt:], str(file)))
    found = list(spans.values())
    if len(found) < samples:
        raise TaskError(
            f"the texts must hold {samples} different samples of {tokens} + {answer} tokens, found {len(found)}; give "
            "longer texts, or ask for fewer samples (--samples) or shorter ones (--tokens)"
        )
    return [found[i * len(found) // samples] for i in range(samples)]


def cut(files: Sequence[Path], tokenizer: Any, tokens: int, samples: int, held_out: float) -> Split:
    """Samples as `windows` gives them; those held out are spread among the others.

    Args:
        files: texts in UTF-8.
        tokenizer: of the model.
        tokens: tokens of a prompt.
        samples: all of them.
        held_out: the share of them that the search does not see, from 0 to 1; each part has a sample at least.

    Raises:
        TaskError: a file is no text, or all together are shorter than asked.
    """
    chosen = windows(files, tokenizer, tokens, samples, ANSWER)
    kept = min(max(round(held_out * samples), 1), samples - 1)
    away = [(i + 1) * kept // samples > i * kept // samples for i in range(samples)]
    return Split(
        [span for span, held in zip(chosen, away, strict=True) if not held],
        [span for span, held in zip(chosen, away, strict=True) if held],
    )


def _before(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []


def _read(file: Path, most: int) -> str:
    name = clip(str(file), 300)
    try:
        with file.open("rb") as stream:
            raw = stream.read(most + 1)
            more = bool(stream.read(1))
    except OSError as error:
        raise TaskError(f"{name}: the text can't be read: {error.strerror or error}; check the file") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if more and error.start > len(raw) - 4:  # cut within a character
            return raw[: error.start].decode("utf-8-sig")
        line = raw[: error.start].count(b"\n") + 1
        raise TaskError(
            f"{name}, line {line}: must be UTF-8 text, found the byte 0x{raw[error.start]:02x}; save the file as UTF-8"
        ) from error


class Text(Generated):
    """Samples cut from texts: perplexity and divergence through the cache, and nothing is generated.

    The text is cut in the tokens of the model into pieces that don't overlap: a prompt, which is read at once, and the
    tokens that follow, fed one by one. Of a directory all files that end in `.txt` or `.md` are texts, each a document
    of its own. The samples of one text alone have no document: intervals speak of this text then.
    """

    name: ClassVar[str] = "text"
    path: str = Field(description="A text in UTF-8, or a directory of texts.")
    tokens: int = Field(1024, ge=1, le=MAX_TOKENS, description="Tokens of a prompt, of the model's tokenizer.")
    answer: int = Field(ANSWER, ge=2, le=MAX_TOKENS, description="Tokens that follow the prompt.")

    def check(self, n: int) -> None:
        """Look for the files."""
        super().check(n)
        self._files()

    def samples(self, n: int, seed: int, tokenizer: Any = None) -> list[Sample]:
        """Spread evenly over the texts; nothing is drawn, so that every seed gives the same."""
        files = self._files()
        if tokenizer is None:
            raise TaskError("text: samples are cut in tokens, which takes a tokenizer, found none; give tokenizer=...")
        if n == 0:
            return []
        found = []
        for span in windows(files, tokenizer, self.tokens, n, self.answer):
            facts = {"file": span.file, "length": self.tokens + self.answer}
            prompt, answer = (tokenizer.decode(ids) for ids in (span.prompt, span.answer))
            found.append(
                Sample(
                    self.name,
                    prompt,
                    answer,
                    document=span.file if len(files) > 1 else None,
                    facts=facts,
                    generate=False,
                    prompt_ids=tuple(span.prompt),
                    answer_ids=tuple(span.answer),
                )
            )
        return found

    def _files(self) -> list[Path]:
        home = Path(self.path).expanduser()
        if not home.is_dir():
            return text_files(home)
        files = sorted(file for file in home.iterdir() if file.suffix in (".txt", ".md") and file.is_file())
        if not files:
            raise TaskError(
                f"{clip(self.path, 300)}: must hold texts that end in .txt or .md, found none; check the path"
            )
        return text_files(files)
