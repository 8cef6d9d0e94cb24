"""Evaluation samples as plain text: line retrieval, chained arithmetic, Python code, JSON Lines.

Every generator is deterministic in its seed. `tokens` is the approximate length of
prompt and answer together in the tokenizer of the bundled model; the text itself
suits any tokenizer. Greedy decoding of a sample's prompt is compared with its answer
by `score`.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from kvpolicy.errors import TaskError
from kvpolicy.experiment.samples import Sample, from_jsonl
from kvpolicy.words import clip, in_words, quoted, suggest

KEYS: Final = 704
"""Keys `<k0>` to `<k703>` are single tokens of the bundled tokenizer."""
VALUES: Final = 128
"""Values ` <v0>` to ` <v127>`, with their space, are single tokens of the bundled tokenizer."""
QUERIES: Final = 4
"""Keys asked for in one sample of `lines`."""
STEPS: Final = 4
"""Definitions in one chain of `arithmetic`."""
MODULUS: Final = 10
OPERATORS: Final = "+-*"
LINES_HEADER: Final = "Keys and values:\n"
ARITHMETIC_HEADER: Final = "Arithmetic modulo 10:\n"
CHARACTERS_PER_TOKEN: Final = 2.5
"""Characters of Python source per token of the bundled tokenizer, less a margin for dense text."""
DEFAULT_TOKENS: Final = 1024
MAX_TOKENS: Final = 1 << 20
"""Tokens of a generated sample."""
MAX_TOTAL: Final = 1 << 27
"""Tokens of all generated samples together."""
ANSWER_CHARACTERS: Final = 192
"""Characters of a `code` answer, about 64 tokens of the bundled tokenizer."""

_HEADER_TOKENS: Final = 8
_HELD_OUT_ONE_IN: Final = 10
_TEST_DIRECTORIES: Final = frozenset({"test", "tests", "idle_test"})
_EXCLUDED_DIRECTORIES: Final = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib-dynload"}
)
_EXCLUDED_NAMES: Final = ("config-", "_sysconfigdata", "stringprep.")
_STATED = re.compile(r"^(<k\d+>)[ =](?:\S*=)?(\S+)$", re.MULTILINE)


def lines(n: int, seed: int, tokens: int = DEFAULT_TOKENS) -> list[Sample]:
    """Key-value line retrieval: distinct keys with values, then a request for four of them.

    The prompt holds lines such as `<k17> <v93>` and ends with the request
    `? <k17> <k5> <k99> <k3>`; the answer repeats the four lines in the order asked.
    The requested lines are drawn uniformly from the whole context.

    Args:
        n: Number of samples.
        seed: Seed of the generator.
        tokens: Approximate length of prompt and answer. Above about 2,130 the keys no
            longer are single tokens of the bundled tokenizer.

    Raises:
        TaskError: If `n` is negative, or `tokens` is out of range or leaves no room for four lines.
    """
    check_size("lines", n, tokens)
    overhead = _HEADER_TOKENS + 2 + 2 * QUERIES + 3 * QUERIES
    count = (tokens - overhead) // 3
    if count < QUERIES:
        raise TaskError(
            f"lines: tokens must be at least {overhead + 3 * QUERIES} to hold {QUERIES} lines, "
            f"found {tokens}; ask for a longer context"
        )
    rng = random.Random(seed)
    samples = []
    for _ in range(n):
        keys = rng.sample(range(max(KEYS, count)), count)
        pairs = {f"<k{key}>": f"<v{rng.randrange(VALUES)}>" for key in keys}
        asked = rng.sample(sorted(pairs), QUERIES)
        context = "".join(f"{key} {value}\n" for key, value in pairs.items())
        prompt = f"{LINES_HEADER}{context}? {' '.join(asked)}\n"
        samples.append(Sample("lines", prompt, "\n".join(f"{key} {pairs[key]}" for key in asked)))
    return samples


def arithmetic(n: int, seed: int, tokens: int = 512) -> list[Sample]:
    """Chained arithmetic modulo 10 with the intermediate results stated in the answer.

    The prompt interleaves the definitions of several chains: `<k3>=4+3` opens one and
    `<k9>=<k3>*5` continues it. It ends with a request for one chain's four variables,
    in order; the answer repeats each definition followed by its value, such as
    `<k9>=<k3>*5=5`.

    Args:
        n: Number of samples.
        seed: Seed of the generator.
        tokens: Approximate length of prompt and answer.

    Raises:
        TaskError: If `n` is negative, or `tokens` is out of range or leaves no room for one chain.
    """
    check_size("arithmetic", n, tokens)
    overhead = _HEADER_TOKENS + 2 + 2 * STEPS + 8 * STEPS
    chains = (tokens - overhead) // (6 * STEPS)
    if chains < 1:
        raise TaskError(
            f"arithmetic: tokens must be at least {overhead + 6 * STEPS} to hold one chain of "
            f"{STEPS} definitions, found {tokens}; ask for a longer context"
        )
    rng = random.Random(seed)
    return [_chained(rng, chains) for _ in range(n)]


def _chained(rng: random.Random, chains: int) -> Sample:
    count = chains * STEPS
    keys = rng.sample(range(max(KEYS, count)), count)
    variables = [f"<k{key}>" for key in keys]
    definitions: dict[str, str] = {}
    results: dict[str, int] = {}
    order = [chain for chain in range(chains) for _ in range(STEPS)]
    rng.shuffle(order)
    done = [0] * chains
    for chain in order:
        variable = variables[chain * STEPS + done[chain]]
        if done[chain]:
            operand = variables[chain * STEPS + done[chain] - 1]
            left = results[operand]
        else:
            left = rng.randrange(MODULUS)
            operand = str(left)
        operator, right = rng.choice(OPERATORS), rng.randrange(MODULUS)
        definitions[variable] = f"{operand}{operator}{right}"
        results[variable] = _apply(operator, left, right)
        done[chain] += 1
    chosen = rng.randrange(chains)
    asked = variables[chosen * STEPS : (chosen + 1) * STEPS]
    context = "".join(f"{name}={text}\n" for name, text in definitions.items())
    prompt = f"{ARITHMETIC_HEADER}{context}? {' '.join(asked)}\n"
    answer = "\n".join(f"{name}={definitions[name]}={results[name]}" for name in asked)
    return Sample("arithmetic", prompt, answer)


def _apply(operator: str, left: int, right: int) -> int:
    results = {"+": left + right, "-": left - right, "*": left * right}
    return results[operator] % MODULUS


def code(n: int, seed: int, tokens: int = DEFAULT_TOKENS, split: str = "test") -> list[Sample]:
    """Continuation of Python source, from the standard library of the running interpreter.

    A sample starts at a line of a randomly drawn file; its answer is the text that
    follows the prompt. With `split="test"` the files are those the bundled model was
    not trained on. The samples depend on the Python version as well as on the seed.

    Args:
        n: Number of samples.
        seed: Seed of the generator.
        tokens: Approximate length of prompt and answer, at least 128.
        split: `"test"` for held-out files, `"train"` for the others.

    Raises:
        TaskError: If an argument is out of range or no file is long enough.
    """
    check_size("code", n, tokens)
    if tokens < 128:
        raise TaskError(f"code: tokens must be at least 128, found {tokens}; ask for a longer context")
    length = int(tokens * CHARACTERS_PER_TOKEN)
    texts = [text for _, text in stdlib_files(split) if len(text) >= length]
    if not texts:
        raise TaskError(
            f"code: the standard library must hold a file of at least {length} characters in "
            f"the {split} split, found none; ask for fewer than {tokens} tokens or run a Python "
            f"whose standard library is installed as source files"
        )
    rng = random.Random(seed)
    samples = []
    for _ in range(n):
        text = rng.choices(texts, [len(text) for text in texts])[0]
        start = text.rfind("\n", 0, rng.randrange(len(text) - length + 1) + 1) + 1
        # Cut after a line's last character, where tokens of prompt and answer do not merge.
        end = start + length - ANSWER_CHARACTERS
        cut = start + len(text[start : max(start, text.rfind("\n", start, end))].rstrip())
        cut = cut if cut > start else end
        samples.append(Sample("code", text[start:cut], text[cut : cut + ANSWER_CHARACTERS]))
    return samples


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


TASKS: Final[dict[str, Callable[..., list[Sample]]]] = {
    "lines": lines,
    "arithmetic": arithmetic,
    "code": code,
}
"""The generated tasks by name."""


def load_task(name_or_path: str, n: int, seed: int, tokens: int | None = None) -> list[Sample]:
    """Samples of a generated task by its name, or of a JSON Lines file by its path.

    Args:
        name_or_path: `lines`, `arithmetic`, `code`, or the path of a file for `from_jsonl`.
        n: Number of samples; of a file with more rows, `n` are drawn by the seed and kept
            in the order of the file.
        seed: Seed of the generator.
        tokens: Approximate length of a sample, by default the task's own; not used for files.

    Raises:
        TaskError: If the task is unknown or its generator or file reports an error.
    """
    generator = TASKS.get(name_or_path)
    if generator is not None:
        return generator(n, seed) if tokens is None else generator(n, seed, tokens=tokens)
    check_size(name_or_path, n)
    check_name(name_or_path)
    samples = from_jsonl(name_or_path)
    if n > len(samples):
        warnings.warn(
            f"{clip(name_or_path, 300)} holds {len(samples)} row{'s' if len(samples) > 1 else ''}, "
            f"fewer than the {n} samples asked for (-n): each is used once",
            stacklevel=2,
        )
    if n >= len(samples):
        return samples
    chosen = random.Random(seed).sample(range(len(samples)), n)
    return [samples[index] for index in sorted(chosen)]


def check_name(name_or_path: str) -> None:
    """Refuse what is neither the name of a task nor the path of a file.

    Raises:
        TaskError: If it is neither.
    """
    if name_or_path in TASKS or name_or_path.endswith((".jsonl", ".json")) or os.path.exists(name_or_path):
        return
    raise TaskError(
        f"task must be one of {', '.join(TASKS)} or the path of a JSON Lines file, "
        f"found {quoted(name_or_path)}{suggest(name_or_path, TASKS)}"
    )


def score(task: str, answer: str, generated: str) -> float:
    """Score in [0, 1] of a greedily decoded text against the answer of a sample.

    - `lines` and `arithmetic`: the fraction of the answer's keys for which the
      generated text states the same value. A key stated twice counts as first stated.
    - `code`: the fraction of the answer's first non-blank line that is reproduced
      before the first differing character. Several continuations of code are right, so
      the negative log-likelihood of the answer is the better measure.
    - any other task: 1 if the generated text equals the answer, else 0, leaving out
      surrounding white space and the lines generated beyond the answer's.

    Args:
        task: Task of the sample.
        answer: Its answer.
        generated: Text decoded after the prompt.
    """
    if task in ("lines", "arithmetic"):
        expected = dict(_STATED.findall(answer))
        stated: dict[str, str] = {}
        for key, value in _STATED.findall(generated):
            stated.setdefault(key, value)
        right = sum(stated.get(key) == value for key, value in expected.items())
        return right / len(expected) if expected else 0.0
    wanted, found = answer.strip(), generated.strip()
    if task == "code":
        # Indentation is part of the line; only line breaks before it are not.
        wanted = answer.strip("\r\n").split("\n")[0].rstrip() or wanted
        found = generated.strip("\r\n").split("\n")[0].rstrip()
        same = 0
        while same < min(len(wanted), len(found)) and wanted[same] == found[same]:
            same += 1
        return same / len(wanted) if wanted else 1.0
    return float("\n".join(found.split("\n")[: wanted.count("\n") + 1]).rstrip() == wanted)


def check_size(task: str, n: int, tokens: int | None = None) -> None:
    """Refuse numbers of samples and tokens that would take hours, before anything is made.

    Raises:
        TaskError: If `n` is negative, `tokens` is above 1,048,576, or both together are above 134,217,728.
    """
    shown = clip(task, 300)
    if n < 0:
        raise TaskError(f"{shown}: the number of samples must be at least 0, found {n}")
    if task not in TASKS:
        return
    if tokens is not None and tokens > MAX_TOKENS:
        raise TaskError(
            f"{shown}: tokens must be at most {MAX_TOKENS:,}, found {in_words(tokens)}; ask for shorter samples"
        )
    if n * (tokens or DEFAULT_TOKENS) > MAX_TOTAL:
        raise TaskError(
            f"{shown}: samples times tokens must be at most {MAX_TOTAL:,}, found {in_words(n)} times "
            f"{tokens or DEFAULT_TOKENS}; ask for fewer samples"
        )
