"""What the blocks of a launch use among themselves, kept from call to call for each stream."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["counters", "partials"]

AT_FIRST = 4096
"""Counters of a stream."""
FOR_GRAPHS = 1 << 16
"""Counters of a device that graphs have, each its own for as long as the process lives."""
_streams: dict[tuple[int, int], Tensor] = {}
_graphs: dict[tuple[int, int, int], Tensor] = {}
_left: dict[int, Tensor] = {}
_partials: dict[tuple[int, int], Tensor] = {}


def partials(count: int, device: int) -> Tensor:
    """Room for what blocks found, at least `count` numbers in float32."""
    if torch.cuda.is_current_stream_capturing():
        return torch.empty(count, dtype=torch.float32, device=f"cuda:{device}")
    key = (device, torch._C._cuda_getCurrentRawStream(device))
    found = _partials.get(key)
    if found is None or found.numel() < count:
        with torch.inference_mode(False):
            found = _partials[key] = torch.empty(count, dtype=torch.float32, device=f"cuda:{device}")
    return found


def counters(lines: int, device: int) -> Tensor:
    """A zero for each line, by which the last block of a line knows that it is the last; kernels leave zeros.

    They are those of the current stream, or of the graph that captures it. Launches on one stream come one after the
    other. A graph may be replayed on any, so it shares with nobody.
    """
    stream = torch._C._cuda_getCurrentRawStream(device)
    if torch.cuda.is_current_stream_capturing():
        return _of_graph(lines, device, stream)
    found = _streams.get((device, stream))
    if found is None or found.numel() < lines:
        found = _streams[device, stream] = _zeros(max(lines, AT_FIRST), device)
        if device not in _left:
            _left[device] = _zeros(FOR_GRAPHS, device)
    return found


def _of_graph(lines: int, device: int, stream: int) -> Tensor:
    from cuda.bindings import driver

    key = (device, stream, int(driver.cuStreamGetCaptureInfo(stream)[2]))
    found = _graphs.get(key)
    if found is None or found.numel() < lines:
        left = _left.get(device)
        if left is None or left.numel() < lines:  # at a launch more, the graph makes them itself
            return torch.zeros(lines, dtype=torch.int32, device=f"cuda:{device}")
        found, _left[device] = left[:lines], left[lines:]
        _graphs[key] = found
    return found


def _zeros(count: int, device: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int32, device=f"cuda:{device}")
