"""Calibrates a model: samples of a text through it, what a calibrator makes of them, and the file of that."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.arguments import CHARACTERS_PER_POSITION, check_calibration
from kvpolicy.errors import CalibrationError
from kvpolicy.experiment.observation import Observed
from kvpolicy.hf.calibration import Calibration, read_calibration, write_calibration
from kvpolicy.hf.fingerprint import fingerprint_of
from kvpolicy.hf.models import load_model, one_thread, positions_of
from kvpolicy.hf.source import check_model, source_of
from kvpolicy.interfaces.calibrator import Calibrator
from kvpolicy.interfaces.checks import finished, watched
from kvpolicy.plugins import calibrator_of
from kvpolicy.words import clip

__all__ = ["PARTIAL", "Run", "calibrate"]

PARTIAL = ".partial"
"""What is added to the name of the file while it is being made."""
UNFINISHED = "kvpolicy-calibration-unfinished"
Tell = Callable[[int, int, str], None]
"""Is told how many samples are done, of how many, and what goes on."""


def calibrate(
    method: str | Calibrator,
    *,
    text: str | os.PathLike[str],
    model: Any = None,
    tokenizer: Any = None,
    samples: int = 16,
    tokens: int = 2048,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    device: str | None = None,
    tell: Tell | None = None,
) -> Path:
    """Find out what a method needs to know of a model, and write it to a file that recipes name as `calibration`.

    After each sample what is known so far is written to a file beside, `OUT.partial`. Called again with the same
    arguments after an interruption, it goes on from there.

    Args:
        method: the kind of a calibrator that is installed, maybe with options (`"name:key=value"`), or a `Calibrator`.
        text: a text file in UTF-8.
        model: as `compare` takes it.
        tokenizer: the tokenizer of a model given as an object.
        samples: pieces of the text, evenly spaced, without overlap.
        tokens: tokens of each.
        out: the file to write, by default the name of the method with the ending `.safetensors`.
        overwrite: replace the file if there is one.
        device: where a model given by its name is loaded, such as `cpu`; by default CUDA where there is one.
        tell: called with the samples done, their number and words for what goes on.

    Returns:
        The path of the file.

    Raises:
        CalibrationError: no such method, a text that is too short or can't be read, a file that is there already or
            can't be written, or a model that can't be calibrated so.
        CompareError: the model can't be loaded.
    """
    calibrator = calibrator_of(method) if isinstance(method, str) else method
    target = Path(f"{calibrator.kind}.safetensors" if out is None else out)
    content = check_calibration(samples, tokens, text, target, overwrite)
    source = source_of(model, device)
    if source is None and tokenizer is None:
        raise CalibrationError("a model given as an object must come with its tokenizer, found none; say tokenizer=...")
    if source is not None:
        check_model(source)
        model, tokenizer = load_model(source)
    ids = _tokens(content, tokenizer, samples, tokens, positions_of(model), text)
    with one_thread(source is not None and sum(p.numel() for p in model.parameters()) < 1 << 24):
        Run(calibrator, model, ids, target, tell).go()
    return target


def _tokens(content: str, tokenizer: Any, samples: int, tokens: int, limit: int | None, name: Any) -> Tensor:
    """Samples `[samples, tokens]`, evenly spaced over the text."""
    if limit is not None and tokens > limit:
        raise CalibrationError(
            f"tokens of a sample must fit the model's max_position_embeddings, {limit}, found {tokens}; ask for fewer "
            "(--tokens)"
        )
    most = CHARACTERS_PER_POSITION * tokens
    if len(content) > samples * most:  # more than is needed: as much from everywhere
        starts = [i * (len(content) - most) // max(samples - 1, 1) for i in range(samples)]
        content = "\n".join(content[start : start + most] for start in starts)
    ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < samples * tokens:
        raise CalibrationError(
            f"{clip(str(name), 300)}: the text must have {samples} samples of {tokens} tokens, {samples * tokens} in "
            f"all, found {len(ids)}; give a longer text, or ask for fewer (--samples, --tokens)"
        )
    firsts = torch.linspace(0, len(ids) - tokens, samples, dtype=torch.float64).long()
    return torch.stack([ids[first : first + tokens] for first in firsts.tolist()])


class Run:
    """The samples of all turns, one after the other, each followed by writing what is known."""

    def __init__(self, calibrator: Calibrator, model: Any, ids: Tensor, target: Path, tell: Tell | None = None) -> None:
        self.calibrator, self.ids, self.target, self.tell = calibrator, ids, target, tell or _silent
        self.partial = target.with_name(target.name + PARTIAL)
        self.observed = Observed(model, ids.numel())
        self.model = fingerprint_of(model)
        self.about = {
            "options": calibrator.model_dump(mode="json"),
            "samples": len(ids),
            "tokens": ids.shape[1],
            "text": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        }
        self.states: dict[int, dict[str, Tensor]] = {}
        self.sites: dict[int, Any] = {}
        self.done = 0

    def go(self) -> None:
        """All that is left to do, and the file in the end."""
        turns, count = self.calibrator.turns, len(self.ids)
        self._resume()
        self.tell(self.done, len(turns) * count, "resuming" if self.done else "starting")
        for turn, needs in enumerate(turns):
            if self.done >= (turn + 1) * count:
                continue
            with self.observed.ready(needs):
                for sample in range(self.done - turn * count, count):
                    self._sample(sample, turn, needs)
                    self.done += 1
                    if self.done < len(turns) * count:
                        self._write(self.partial, self.states, UNFINISHED)
                    self.tell(self.done, len(turns) * count, f"turn {turn + 1} of {len(turns)}")
        found = {
            layer: finished(self.calibrator, state, self.sites[layer]) for layer, state in sorted(self.states.items())
        }
        write_calibration(self.target, Calibration(self.calibrator.kind, self.model, found, self.about))
        self.partial.unlink(missing_ok=True)
        self.tell(self.done, self.done, self.calibrator.sentence(found))

    def _sample(self, sample: int, turn: int, needs: frozenset[str]) -> None:
        fresh: dict[int, dict[str, Tensor]] = {}
        for layer, given in self.observed.watch(self.ids[sample], needs):
            self.sites[layer] = given.site
            fresh[layer] = watched(self.calibrator, given, self.states.get(layer, {}), turn)
        if not fresh:
            raise CalibrationError("a model must bring keys and values to its cache to be calibrated, found none")
        self.states = fresh

    def _write(self, path: Path, layers: Mapping[int, Mapping[str, Tensor]], kind: str) -> None:
        about = {**self.about, "done": self.done}
        state = {layer: dict(tensors) for layer, tensors in layers.items()}
        write_calibration(path, Calibration(self.calibrator.kind, self.model, state, about), kind)

    def _resume(self) -> None:
        """Go on from what an interrupted run has left, if that was the same in all it was given."""
        if not self.partial.exists():
            return
        try:
            held, _ = read_calibration(self.partial, UNFINISHED)
        except CalibrationError:
            return  # nothing that can be gone on from: it is written over
        done = held.about.pop("done", 0)
        same = json.dumps(held.about, sort_keys=True) == json.dumps(self.about, sort_keys=True)
        most = len(self.calibrator.turns) * len(self.ids)
        if held.method == self.calibrator.kind and held.model == self.model and same and 0 < done < most:
            self.states, self.done = held.layers, done


def _silent(done: int, of: int, what: str) -> None:
    """Tell nobody."""
