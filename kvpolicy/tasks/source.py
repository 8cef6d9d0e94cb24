"""Continuation of Python source: files of the standard library that the bundled model was not trained on."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Final, Literal

from pydantic import Field

from kvpolicy.errors import TaskError
from kvpolicy.tasks.encoding import count
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.task import MAX_TOKENS, Generated

CHARACTERS_PER_TOKEN: Final = 2.5
"""Characters of Python source per token of the bundled tokenizer, less a margin for dense text."""
ANSWER_CHARACTERS: Final = 192
"""Characters of an answer, about 64 tokens of the bundled tokenizer."""
SHORTEST: Final = 128

_HELD_OUT_ONE_IN: Final = 10
_TEST_DIRECTORIES: Final = frozenset({"test", "tests", "idle_test"})
_EXCLUDED_DIRECTORIES: Final = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib-dynload"}
)
_EXCLUDED_NAMES: Final = ("config-", "_sysconfigdata", "stringprep.")


class Code(Generated):
    """Continuation of Python source, from the standard library of the running interpreter.

    A sample starts at a line of a randomly drawn file; its answer is the text that follows the prompt. With
    `split=test` the files are those the bundled model was not trained on. The samples depend on the Python version as
    well as on the seed.
    """

    name: ClassVar[str] = "code"
    tokens: int = Field(
        1024,
        ge=SHORTEST,
        le=MAX_TOKENS,
        description="Tokens of prompt and answer together, of the model's tokenizer.",
    )
    split: Literal["test", "train"] = Field(
        "test", description="Files held out of the bundled model's training, or the others."
    )

    def samples(self, n: int, seed: int, tokenizer: Any = None) -> list[Sample]:
        """Samples whose document is their file."""
        self.check(n)
        length = int(self.tokens * CHARACTERS_PER_TOKEN)
        known = _sources(self.split, sysconfig.get_path("stdlib"))
        files = [(name, text) for name, text in known if len(text) >= length]
        if not files:
            raise TaskError(
                f"code: the standard library must hold a file of at least {length} characters in "
                f"the {self.split} split, found none; ask for fewer than {self.tokens} tokens or run a Python "
                f"whose standard library is installed as source files"
            )
        rng = random.Random(seed)
        return [self._sample(rng, files, length, tokenizer) for _ in range(n)]

    def _sample(self, rng: random.Random, files: list[tuple[str, str]], length: int, tokenizer: Any) -> Sample:
        name, text = rng.choices(files, [len(text) for _, text in files])[0]
        start = text.rfind("\n", 0, rng.randrange(len(text) - length + 1) + 1) + 1
        length = self._length(text[start:], length, tokenizer)
        # Cut after a line's last character, where tokens of prompt and answer do not merge.
        end = start + length - ANSWER_CHARACTERS
        cut = start + len(text[start : max(start, text.rfind("\n", start, end))].rstrip())
        cut = cut if cut > start else end
        facts = {"file": name, "length": self.tokens}
        answer = text[cut : cut + ANSWER_CHARACTERS]
        return Sample("code", text[start:cut], answer, document=name, facts=facts, scorer="code")

    def _length(self, text: str, length: int, tokenizer: Any) -> int:
        """Characters that are as many tokens as asked for, or all there are."""
        if tokenizer is None:
            return length
        for _ in range(4):
            found = count(text[:length], tokenizer)
            if self.tokens * 0.98 <= found <= self.tokens or (found < self.tokens and length >= len(text)):
                break
            length = min(max(int(length * self.tokens * 0.99 / found), 2 * ANSWER_CHARACTERS), len(text))
        return length


@lru_cache(maxsize=1)
def _sources(split: str, root: str) -> list[tuple[str, str]]:
    return list(stdlib_files(split, Path(root)))


def split_of(path: str) -> str:
    """Split of a standard-library file: `"test"` (held out) or `"train"`.

    The split is a hash of the top-level module in the file's path relative to the
    root of the standard library, so that it is the same for every Python version, a
    module that becomes a package stays where it was, and a module's unit tests
    (`test/test_<module>.py`) go with the module.

    Args:
        path: Path relative to the root of the standard library, with forward slashes.
    """
    parts = PurePosixPath(path).parts
    name = parts[1] if parts[0] == "test" and len(parts) > 1 else parts[0]
    module = name.removesuffix(".py").removeprefix("test_")
    digest = int.from_bytes(hashlib.sha256(module.encode()).digest(), "big")
    return "test" if digest % _HELD_OUT_ONE_IN == 0 else "train"


def stdlib_files(split: str, root: Path | None = None) -> Iterator[tuple[str, str]]:
    """Paths, relative to the standard library, and texts of the files of a split, in order.

    Tables of characters and encodings, installed packages and files that are not UTF-8 are
    left out; unit tests belong to the training split only, or to none.

    Args:
        split: `"test"` or `"train"`.
        root: Root of a standard library, by default that of the running interpreter.

    Raises:
        TaskError: If `split` is unknown.
    """
    if split not in ("test", "train"):
        raise TaskError(f"code: split must be 'test' or 'train', found {split!r}")
    base = root if root is not None else Path(sysconfig.get_path("stdlib"))
    relative = sorted(path.relative_to(base).as_posix() for path in base.rglob("*.py"))
    for name in relative:
        directories = frozenset(PurePosixPath(name).parts[:-1])
        if directories & _EXCLUDED_DIRECTORIES or name.startswith(_EXCLUDED_NAMES):
            continue
        if split_of(name) != split or (split == "test" and directories & _TEST_DIRECTORIES):
            continue
        try:
            yield name, (base / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
