"""Arguments that are checked before torch is loaded: what can't be right is refused at once."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from kvpolicy.errors import CalibrationError, CompareError, MissingDependencyError
from kvpolicy.words import clip, in_line, in_words, quoted, suggest

RESULTS = ("run.sqlite", "report.html", "report.md", "comparison.png", "attention.png")
"""Files that a comparison writes; the first holds every row, from which the others follow."""
LEGACY = ("samples.jsonl", "summary.json")
"""What versions before 0.3 wrote in its place."""
CHARACTERS_PER_POSITION = 64
"""Characters that no tokenizer puts into one token on average: a longer text is refused without being read."""
TOKENS_PER_POSITION = 4
"""Tokens of the bundled tokenizer that no other puts into one on average."""
MAX_PROMPT = 1 << 24
"""Characters of a prompt for a model that names no bound."""
MAX_TEXT = 1 << 30
"""Bytes of a text that a model is calibrated on."""
MAX_SEARCHED = 1 << 24
"""Tokens of prompts that a search reads, all samples together."""
OLDEST_OPTUNA = (4,)
OLDEST_LM_EVAL = (0, 4, 13)
OLDEST_RAY = (2, 40)
_PICTURES = (
    "avif", "eps", "gif", "jpeg", "jpg", "pdf", "pgf", "png", "ps", "raw", "rgba", "svg", "svgz", "tif", "tiff", "webp",
)  # fmt: skip
_DEVICES = (
    "cpu", "cuda", "fpga", "hip", "hpu", "ideep", "ipu", "lazy", "maia", "meta", "mkldnn", "mps", "mtia", "opencl",
    "opengl", "ve", "vulkan", "xla", "xpu",
)  # fmt: skip


def check_comparison(n: Any, seed: Any, tokens: Any, task: Any, out: Any) -> None:
    """Arguments of `compare` that are of the wrong kind, or out of range for every model.

    Raises:
        CompareError: naming the argument.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise CompareError(f"n, the number of samples, must be an integer of at least 1, found {in_words(n)}")
    if not isinstance(task, str | os.PathLike):
        raise CompareError(f"task must be a name or the path of a .jsonl file, found {in_words(task)}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise CompareError(f"seed must be an integer of at least 0, found {in_words(seed)}")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int)):
        raise CompareError(f"tokens, the length of a sample, must be an integer, found {in_words(tokens)}")
    if out is not None and (not isinstance(out, str | os.PathLike) or not os.fspath(out)):
        raise CompareError(f"out must be the path of a directory, found {in_words(out)}")


def check_room(tokens: int | None, limit: int | None) -> None:
    """Refuse a length of samples that a model with `limit` positions can't hold, whatever its tokenizer."""
    if tokens is not None and limit is not None and tokens > TOKENS_PER_POSITION * limit:
        raise CompareError(
            f"tokens, the length of a sample, must fit the model's max_position_embeddings, {limit}, found {tokens}; "
            "ask for shorter samples (--tokens)"
        )


def check_prompt(what: str, text: str, limit: int | None) -> None:
    """Refuse a text that a model with `limit` positions can't hold, before it is cut into tokens."""
    most = MAX_PROMPT if limit is None else min(MAX_PROMPT, CHARACTERS_PER_POSITION * limit)
    if len(text) > most:
        bound = "" if limit is None else f" to fit the model's max_position_embeddings, {limit}"
        raise CompareError(f"{what} must have at most {most:,} characters{bound}, found {len(text):,}; shorten it")


def check_generation(prompt: str, tokens: int, limit: int | None) -> None:
    """Refuse a prompt or a number of new tokens that can't be right for a model with `limit` positions."""
    if tokens < 1:
        raise CompareError(
            f"max_new_tokens (on the shell --max-new-tokens) must be at least 1, found {in_words(tokens)}"
        )
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise CompareError("the prompt must be text, found bytes that are no UTF-8")
    if not prompt:
        raise CompareError("the prompt must not be empty; give a text, or - to read it from stdin")
    check_prompt("the prompt", prompt, limit)
    if limit is not None and tokens > limit:
        raise CompareError(
            f"max_new_tokens (on the shell --max-new-tokens) must fit the model's max_position_embeddings, {limit}, "
            f"found {in_words(tokens)}; give a smaller one"
        )


def check_device(device: str | None) -> None:
    """Refuse what is no name of a device, before torch is there to say so; whether there is such a device it says."""
    if device is None:
        return
    kind, colon, index = device.partition(":")
    # An extension of torch that is loaded with it may bring kinds of its own.
    known = kind in _DEVICES or (kind.isidentifier() and bool(entry_points(group="torch.backends")))
    if not known or (colon and not (index.isascii() and index.isdigit())):
        raise CompareError(
            f"device must be a name such as cpu, cuda or cuda:1, found {quoted(device)}{suggest(kind, _DEVICES)}"
        )


def check_picture(path: Path) -> None:
    """Refuse the path of a picture that can't be written.

    Raises:
        CompareError: its ending is no format, it is a directory, or its directory is missing.
    """
    name = clip(str(path), 300)
    try:
        there, home = path.is_dir(), path.parent.is_dir()
    except (OSError, ValueError) as error:
        raise CompareError(f"{name}: the picture can't be written: {_reason(error)}") from error
    if there:
        raise CompareError(f"{name}: a picture is a file, found a directory; name a file in it such as picture.png")
    if path.suffix.lstrip(".").lower() not in _PICTURES:
        raise CompareError(f"{name}: a picture must end in one of {', '.join(_PICTURES)}, found {quoted(path.suffix)}")
    if not home:
        raise CompareError(f"{name}: the picture can't be written: there is no directory {clip(str(path.parent))}")
    if (why := unwritable(path)) is not None:
        raise CompareError(f"{name}: the picture can't be written: {why}; name another file")


def unwritable(path: Path) -> str | None:
    """Why a file of this name, or one within a directory of this name, can't be written; None where it can.

    Directories that are missing would be made. What can be tried is tried, since rights alone don't tell of a mount
    that is read-only or of a system that refuses; nothing is left behind.

    Raises:
        OSError: it can't even be looked at.
        ValueError: it is no name of a file.
    """
    there = next((home for home in (path, *path.parents) if os.path.lexists(home)), None)
    if there is not None and not there.exists():
        return f"{in_line(there)} is a link to nothing"
    if there is not None and there != path and not there.is_dir():
        return f"{in_line(there)} is a file"
    try:
        if there is not None and there.is_dir():
            with TemporaryFile(dir=there):
                pass
        elif there is not None and there.is_file():
            with there.open("ab"):
                pass
    except OSError as error:
        return f"{in_line(there)}: {_reason(error)}"
    return None


def check_directory(path: Path) -> None:
    """Refuse early a directory that can't be made or written; nothing is touched yet.

    Raises:
        CompareError: saying why.
    """
    name = clip(str(path), 300)
    try:
        if path.exists() and not path.is_dir():
            raise CompareError(f"{name}: the results go into a directory, found a file; choose another name")
        why = unwritable(path)
    except (OSError, ValueError) as error:
        raise CompareError(f"{name}: the results can't be written there: {_reason(error)}") from error
    if why is not None:
        raise CompareError(f"{name}: the results can't be written there: {why}; choose another name")


def check_search(settings: Mapping[str, Any]) -> None:
    """Arguments of `tune` that are of the wrong kind, or out of range for every model.

    Args:
        settings: trials, tokens, samples, seed, held_out, bits and out, as `tune` takes them.

    Raises:
        CompareError: naming the argument.
    """
    least = {"trials": 1, "tokens": 1, "samples": 2, "seed": 0}
    for name, bound in least.items():
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise CompareError(f"{name} must be an integer of at least {bound}, found {in_words(value)}")
    if settings["samples"] * settings["tokens"] > MAX_SEARCHED:
        found = f"{in_words(settings['samples'])} times {in_words(settings['tokens'])}; ask for fewer samples"
        raise CompareError(f"samples times tokens must be at most {MAX_SEARCHED:,}, found {found}")
    share, bits, out = settings["held_out"], settings["bits"], settings["out"]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise CompareError(
            f"held_out, the share of samples that is kept for the report (on the shell --held-out), must lie between 0 "
            f"and 1, found {in_words(share)}"
        )
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits < math.inf):
        raise CompareError(f"bits, the most effective bits per value, must be a number above 0, found {in_words(bits)}")
    if out is not None and (not isinstance(out, str | os.PathLike) or not os.fspath(out)):
        raise CompareError(f"out must be the path of a directory, found {in_words(out)}")


def check_optuna() -> None:
    """Refuse to search where Optuna is missing or too old."""
    _check_library("optuna", "kvpolicy tune needs Optuna", OLDEST_OPTUNA, "tune")


def check_ray() -> None:
    """Refuse the engine ray where Ray is missing or too old."""
    _check_library("ray", "the engine ray needs Ray", OLDEST_RAY, "ray")


def check_lm_eval() -> None:
    """Refuse to evaluate where lm-evaluation-harness is missing or too old."""
    _check_library("lm-eval", "kvpolicy lm-eval needs lm-evaluation-harness", OLDEST_LM_EVAL, "lm-eval")


def _check_library(name: str, needs: str, oldest: tuple[int, ...], extra: str) -> None:
    """Refuse to go on where an optional library is missing or too old.

    Raises:
        MissingDependencyError: saying how it is installed.
    """
    try:
        found = version(name)
    except PackageNotFoundError:
        found = ""
    known = tuple(int(part) for part in found.split(".")[: len(oldest)] if part.isdigit())
    if known < oldest:
        least, state = ".".join(map(str, oldest)), f"found {clip(found)}" if found else "which is not installed"
        raise MissingDependencyError(f"{needs} {least} or newer, {state}; pip install 'kvpolicy[{extra}]'")


CALIBRATION = "kvpolicy-calibration"
"""The format of a calibration, by its file's header."""


def _is_calibration(path: Path) -> bool:
    """Whether a file is what `calibrate` writes, going by its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return bool((file.metadata() or {}).get("format") == CALIBRATION)
    except SafetensorError:
        return False


def check_calibration(samples: Any, tokens: Any, text: Any, out: Path, overwrite: bool) -> str:
    """Arguments of `calibrate` that can't be right for any model; nothing is written yet.

    Returns:
        The text.

    Raises:
        CalibrationError: naming the argument.
    """
    for name, value, least in (("samples", samples, 1), ("tokens", tokens, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_PROMPT:
            raise CalibrationError(f"{name} must be an integer from {least} to {MAX_PROMPT}, found {in_words(value)}")
    name = clip(str(out), 300)
    try:
        if out.is_dir() or not out.parent.is_dir() or unwritable(out.parent if overwrite else out):
            what = "a directory of that name" if out.is_dir() else "no directory that it could be written to"
            raise CalibrationError(f"{name}: the calibration goes into a file, found {what}; name another (--out)")
        known = out.exists() and isinstance(text, str | os.PathLike) and os.path.exists(text)
        if known and os.path.samefile(out, text):
            raise CalibrationError(f"{name}: must be another file than the text, found the same; name another (--out)")
        if out.exists() and overwrite and not _is_calibration(out):
            raise CalibrationError(f"{name}: only a calibration is replaced, found another file; name another (--out)")
        if out.exists() and not overwrite:
            raise CalibrationError(
                f"{name}: there must be no such file yet, found one; name another (--out), or replace it "
                "(overwrite=True, on the shell --overwrite)"
            )
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{name}: the calibration can't be written there: {_reason(error)}") from error
    return _read_text(text)


def _read_text(path: Any) -> str:
    shown = clip(str(path), 300)
    try:
        file = Path(path)
        if file.exists() and not file.is_file():
            raise ValueError("a directory" if file.is_dir() else "something that is no regular file")
        if file.exists() and file.stat().st_size > MAX_TEXT:
            raise ValueError(f"one of more than {MAX_TEXT} bytes")
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{shown}: must be text in UTF-8, found other bytes; save it as UTF-8") from error
    except (OSError, ValueError, TypeError) as error:
        raise CalibrationError(f"{shown}: must be a text file that can be read, found {_reason(error)}") from error
    return text


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
