"""Where a model comes from: a directory, the Hugging Face hub, or a GGUF file. What can't be right is refused before
torch is loaded."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from kvpolicy.arguments import check_device
from kvpolicy.errors import CompareError, MissingDependencyError
from kvpolicy.words import clip, in_words, listed, quoted, suggest

BUNDLED = Path(__file__).parents[1] / "model"
"""The directory of the bundled model."""
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of transformers to spread a model over devices."""
GGUF = ".gguf"
NOT_HERE = "it is not in the hub's cache here, and the hub can't be reached (or HF_HUB_OFFLINE is set)"
_MAGIC = b"GGUF"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


@dataclass(frozen=True)
class Place:
    """What `from_pretrained` is asked for."""

    home: str
    """A directory, or an id of the hub."""
    file: str | None
    """The name of a GGUF file in it."""
    local: bool

    @property
    def shown(self) -> str:
        """Its name in messages."""
        return clip(self.home if self.file is None else os.path.join(self.home, self.file), 300)


@dataclass(frozen=True)
class ModelSource:
    """A model given by its name, and how it is loaded.

    Whatever takes a model takes one of these, too::

        kvpolicy.compare(["logquant"], model=kvpolicy.ModelSource("org/name", dtype="bfloat16", device_map="auto"))

    Args:
        name: a directory that `save_pretrained` wrote, an id of the Hugging Face hub, or a GGUF file (`folder/x.gguf`,
            or `org/name/x.gguf` on the hub; the extra `gguf`); by default the bundled model.
        dtype: `auto` (that of the weights), `bfloat16`, `float16`, `float32` or `float64`; by default `auto`, and
            `float32` for a GGUF file.
        device: where the model goes, such as `cpu` or `cuda:1`; by default CUDA where there is one, else the CPU.
        device_map: in the place of a device, how the model is spread over several: `auto`, `balanced`,
            `balanced_low_0`, `sequential`, a device, or a mapping from modules to devices (the extra `device-map`).
        trust_remote_code: run code that comes with the model.
        revision: a branch, tag or commit of the hub.
        tokenizer: a directory or an id to take the tokenizer from; by default the model's own.
    """

    name: str | os.PathLike[str] | None = None
    dtype: str | None = None
    device: str | None = None
    device_map: str | Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    tokenizer: str | os.PathLike[str] | None = None

    @property
    def bundled(self) -> bool:
        """Whether it is the bundled model."""
        return self.name is None

    @property
    def shown(self) -> str:
        """Its name in results."""
        return "bundled" if self.name is None else os.fspath(self.name)

    def place(self) -> Place:
        """Where its files are, after all that can be said of the arguments without loading anything.

        Raises:
            CompareError: there is no such model, or arguments don't go together.
            MissingDependencyError: a package that such a model needs is not installed.
        """
        _check_names(self)
        place = _place_of(BUNDLED if self.name is None else self.name)
        if self.revision is not None and place.local:
            raise CompareError(
                f"revision (--revision) is for a model of the hub, found {self.revision!r} with "
                f"{'the bundled model' if self.bundled else place.shown}; leave it out"
            )
        if self.trust_remote_code and (self.bundled or place.file):
            what = "the bundled model" if self.bundled else "a GGUF file"
            raise CompareError(f"trust_remote_code (--trust-remote-code) is for models with code, which {what} has not")
        if place.file:
            _need("gguf", "a GGUF file", "gguf")
        if self.device_map is not None:
            _need("accelerate", "device_map (--device-map)", "device-map")
        return place


def source_of(model: Any, device: str | None = None) -> ModelSource | None:
    """A model given by its name; None if it is given as an object.

    Raises:
        CompareError: a device is named twice.
    """
    if isinstance(model, ModelSource):
        if device is None:
            return model
        if model.device is not None or model.device_map is not None:
            raise CompareError(f"a model has one device, found device={device!r} beside that of {model}; name one")
        return replace(model, device=device)
    return ModelSource(model, device=device) if model is None or isinstance(model, str | os.PathLike) else None


def is_bundled(model: Any) -> bool:
    """Whether what is given for a model, maybe an object, stands for the bundled model."""
    source = source_of(model)
    return source is not None and source.bundled


def check_model(model: str | os.PathLike[str] | ModelSource | None) -> int | None:
    """The positions of a model given by its name, where its config says how many; nothing is loaded.

    Of a model of the hub the config is fetched, if it isn't here yet.

    Raises:
        CompareError: there is no such model, or its arguments don't go together.
        MissingDependencyError: a package that such a model needs is not installed.
    """
    source = source_of(model)
    assert source is not None
    place = source.place()
    if place.file is not None:
        return None  # told once it is loaded
    config = Path(place.home, "config.json") if place.local else _fetched(place, source.revision)
    try:
        found = json.loads(config.read_bytes())
    except OSError as error:
        raise CompareError(f"{place.shown}: config.json can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CompareError(f"{place.shown}: config.json must be JSON, found {clip(str(error))}") from error
    if not isinstance(found, dict):
        raise CompareError(f"{place.shown}: config.json must be a JSON object, found a {type(found).__name__}")
    return _positions(found)


def unreachable(place: Place, error: BaseException) -> str | None:
    """Why a model can't be had from the hub, if that is what an error says."""
    from huggingface_hub import errors

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    for kind, why in (
        (errors.GatedRepoError, "it is gated: ask for access on its page, then log in (hf auth login)"),
        (errors.RevisionNotFoundError, "it has no such revision (--revision)"),
        (errors.RepositoryNotFoundError, "the hub has no such model, or it is private: check the name, or log in"),
        (errors.RemoteEntryNotFoundError, "it lacks a file that a model has; see its page for those it has"),
        (errors.HFValidationError, "that is no id of the hub: write ORGANIZATION/NAME"),
        (errors.OfflineModeIsEnabled, NOT_HERE),
        (errors.LocalEntryNotFoundError, NOT_HERE),
        (errors.HfHubHTTPError, "the hub refuses it"),
    ):
        found = next((cause for cause in causes if isinstance(cause, kind)), None)
        if found is not None:
            said = f" ({clip(str(found).strip().partition(chr(10))[0], 200)})" if kind is errors.HfHubHTTPError else ""
            return f"{why}{said}"
    names = {type(cause).__name__ for cause in causes}
    if names & {"ConnectError", "ConnectTimeout", "ConnectionError", "ReadTimeout", "ProxyError", "SSLError"}:
        return "the hub can't be reached: is there a network?"
    return None


def hub_answers() -> bool:
    """Whether there is a network that knows the hub. Where there is none, its own client tries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():  # a proxy looks names up itself
        return not constants.HF_HUB_OFFLINE
    try:
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None))
    except OSError:
        return False


def not_from_hub(place: Place, why: str, what: str = "model") -> CompareError:
    """The error that says so, with what to do."""
    return CompareError(
        f"{what} {quoted(place.shown)}: there is no such directory or file here, and the Hugging Face hub doesn't give "
        f"it: {why}. Or give a directory that holds the {what}"
    )


def _fetched(place: Place, revision: str | None) -> Path:
    """The config of a model of the hub."""
    from huggingface_hub import hf_hub_download

    known = not hub_answers()
    try:
        return Path(hf_hub_download(place.home, "config.json", revision=revision, local_files_only=known))
    except Exception as error:
        why = unreachable(place, error)
        raise not_from_hub(place, why or f"{type(error).__name__}: {clip(str(error), 200)}") from error


def _check_names(source: ModelSource) -> None:
    for field in ("name", "tokenizer"):
        value = getattr(source, field)
        if value is not None and (not isinstance(value, str | os.PathLike) or not os.fspath(value)):
            ways = ("a directory", "an id of the Hugging Face hub", "a GGUF file")
            said, what = ("model", ", ".join(ways)) if field == "name" else (field, " or ".join(ways[:2]))
            raise CompareError(f"{said} (--{said}) must be {what}, found {in_words(value)}")
    if source.dtype is not None and source.dtype not in DTYPES:
        said = quoted(source.dtype) if isinstance(source.dtype, str) else in_words(source.dtype)
        hint = suggest(source.dtype, DTYPES) if isinstance(source.dtype, str) else ""
        raise CompareError(f"dtype (--dtype) must be one of {listed(DTYPES)}, found {said}{hint}")
    check_device(source.device)
    mapped = source.device_map
    if mapped is None:
        return
    if source.device is not None:
        raise CompareError(
            f"a model goes to a device or is spread by a device_map, found device {source.device!r} (--device) and "
            f"device_map {in_words(mapped)} (--device-map); give one of them"
        )
    if isinstance(mapped, str) and mapped not in DEVICE_MAPS:
        try:
            check_device(mapped)
        except CompareError:
            raise CompareError(
                f"device_map (--device-map) must be one of {listed(DEVICE_MAPS)}, or a device such as cuda:1, found "
                f"{quoted(mapped)}{suggest(mapped, DEVICE_MAPS)}"
            ) from None
    elif not isinstance(mapped, str | Mapping):
        raise CompareError(f"device_map must be a name or a mapping from modules to devices, found {in_words(mapped)}")


def _place_of(name: str | os.PathLike[str]) -> Place:
    text = os.fspath(name)
    found = _found_here(Path(name), clip(text, 300)) or _on_hub(text)
    if found is None:
        raise CompareError(
            f"model must be a directory, an id of the Hugging Face hub (ORGANIZATION/NAME) or a GGUF file, found no "
            f"directory or file {quoted(text)}"
        )
    return found


def _found_here(path: Path, shown: str) -> Place | None:
    """The directory or file of that name, if there is one."""
    try:
        directory, file = path.is_dir(), path.exists() and not path.is_dir()
        whole = directory and (path / "config.json").is_file()
        inside = min((p.name for p in path.glob(f"*{GGUF}")), default=None) if directory and not whole else None
        start = _first_bytes(path) if file else b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CompareError(
            f"model must be a directory, a hub id or a GGUF file, found {quoted(shown)}: {reason}"
        ) from (error)
    if directory and not whole:
        hint = "give the directory that save_pretrained wrote" if inside is None else f"give the file {clip(inside)}"
        raise CompareError(f"{shown}: a model directory must hold config.json, found none; {hint}")
    if file and start != _MAGIC:
        raise CompareError(
            f"{shown}: a model that is no directory must be a GGUF file, which begins with {_MAGIC!r}, found "
            f"{start!r}; give such a file, or the directory that save_pretrained wrote"
        )
    if file:
        return Place(str(path.parent), path.name, True)
    return Place(str(path), None, True) if directory else None


def _first_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise ValueError("no regular file")
    with path.open("rb") as file:
        return file.read(len(_MAGIC))


def _on_hub(text: str) -> Place | None:
    """`name`, `org/name` or `org/name/x.gguf`."""
    if text.endswith(GGUF):
        owner, _, rest = text.partition("/")
        name, slash, file = rest.partition("/")
        return Place(f"{owner}/{name}", file, False) if slash and _HUB_ID.fullmatch(f"{owner}/{name}") else None
    return Place(text, None, False) if _HUB_ID.fullmatch(text) else None


def _need(package: str, what: str, extra: str) -> None:
    if find_spec(package) is None:
        raise MissingDependencyError(
            f"{what} needs the package {package}, which is not installed; pip install 'kvpolicy[{extra}]'"
        )


def _positions(config: dict[str, Any]) -> int | None:
    # Of a model of several parts these may be the decoder's; which of them is, is told when it is loaded.
    parts = [
        part for part in (config, *map(config.get, ("text_config", "decoder", "generator"))) if isinstance(part, dict)
    ]
    named = [part.get(key) for part in parts for key in ("max_position_embeddings", "n_positions")]
    return max((n for n in named if type(n) is int and n > 0), default=None)
