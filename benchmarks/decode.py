"""Time one decode step of a cache, per layer, against the caches of transformers.

The layer is that of an 8-billion-parameter Llama: 32 query heads, 8 key-value heads of 128 channels. All caches of one
size are filled with the same random prompt and then take turns, ten steps at a time, so that whatever else the machine
does meets all alike. A run is `--steps` steps, so that flushes count; what is printed is the median over the runs of
each run's mean. Three things are timed, all unless options choose:

`--attend`: an update with one token and the attention of one query over all tokens. For the peers that is
transformers' own `sdpa_attention_forward` without a mask (and, for information, SDPA with the query heads of each
key-value head packed as queries of one head); kvpolicy reads its stores directly, as in an attached model.

`--update`: an update that returns all keys and values as dense tensors, what attention of any implementation needs.

`--store`: the part of an update that stores and descends alone: nothing is decoded for attention.

    python benchmarks/decode.py --tokens 16384 --md table.md
    python benchmarks/decode.py --attend --batch 4 --peers dynamic quanto
    python benchmarks/decode.py --attend --device cuda
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from arms import (
    DTYPES,
    DYNAMIC,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    RESIDUAL,
    SLOW_STEPS,
    Arm,
    Ours,
    Store,
    data,
    machine,
    ours,
    peers,
    turns,
)
from torch import Tensor

MODES = {"attend": "update and attention", "update": "an update", "store": "storing"}


@dataclass
class Row:
    """One cache of one size."""

    mode: str
    tokens: int
    batch: int
    nbits: int
    dtype: str
    cache: str
    ms: float
    runs: list[float]
    bits: float
    """Bits per number held, everything included but scratch space, which all layers share."""
    scratch_mb: float
    steps: int
    versus: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """What is timed in one go: only storing takes several lengths, so that they can be compared."""

    mode: str
    dtype: str
    batch: int
    nbits: int
    tokens: tuple[int, ...]


def sizes(options: argparse.Namespace) -> Iterator[Size]:
    for mode, dtype, batch, nbits in product(options.modes, options.dtype, options.batch, options.nbits):
        tokens = tuple(n for n in options.tokens if n * batch <= options.most)
        for part in [tokens] if mode == "store" else [(n,) for n in tokens]:
            if part:
                yield Size(mode, dtype, batch, nbits, part)


def measure(size: Size, options: argparse.Namespace) -> list[Row]:
    like = (size.batch, DTYPES[size.dtype], options.device)
    feed = data(max(options.steps, RESIDUAL), 1, *like)
    attend, mine = size.mode == "attend", Store if size.mode == "store" else Ours
    with torch.no_grad():
        arms: list[tuple[int, Arm]] = []
        for tokens in size.tokens:
            prompt = data(tokens, 0, *like)
            of: list[Arm] = [mine(f"kvpolicy {r}", ours(r, size.nbits), prompt, attend) for r in options.recipes]
            if size.mode != "store":
                of += peers(options.peers, size.nbits, prompt, attend)
            arms += [(tokens, arm) for arm in of]
            del prompt
        runs = timed([arm for _, arm in arms], feed, options)
    rows = [
        Row(
            size.mode,
            tokens,
            size.batch,
            size.nbits,
            size.dtype,
            arm.name,
            statistics.median(run),
            run,
            arm.bits(),
            arm.scratch(),
            arm.steps or options.steps,
        )
        for (tokens, arm), run in zip(arms, runs, strict=True)
    ]
    others = {row.cache: row.ms for row in rows if not row.cache.startswith("kvpolicy")}
    for row in rows:
        row.versus = {name: row.ms / ms for name, ms in others.items()}
    return rows


def timed(arms: Sequence[Arm], feed: tuple[Tensor, Tensor], options: argparse.Namespace) -> list[list[float]]:
    """The mean of each run, for each arm."""
    for arm in arms:
        arm.step(feed[0][:, :, :1], feed[1][:, :, :1])
        arm.seconds = []
    runs: list[list[float]] = []
    for _ in range(options.runs):
        turns(arms, options.steps, feed)
        runs.append([arm.mean() for arm in arms])
    return [list(run) for run in zip(*runs, strict=True)]


def about(options: argparse.Namespace) -> str:
    slow = (
        f" (HQQ: {SLOW_STEPS} around a flush, the flush counted once in {RESIDUAL})" if "hqq" in options.peers else ""
    )
    return (
        f"{machine(options.device)}; per layer, {HEADS} query heads, {KV_HEADS} key-value heads, head_dim {HEAD_DIM}; "
        f"{options.runs} interleaved run{'s' * (options.runs > 1)} of {options.steps} steps{slow}; peers with the same "
        f"nbits, q_group_size 64, residual_length {RESIDUAL}"
    )


def table(rows: Sequence[Row]) -> str:
    """Milliseconds of a step, a line for each size; of kvpolicy's caches also as a part of DynamicCache's."""
    modes = list(dict.fromkeys(r.mode for r in rows))
    found = [(MODES[mode], _table([r for r in rows if r.mode == mode])) for mode in modes]
    return "\n\n".join(text if len(modes) == 1 else f"{name}:\n\n{text}" for name, text in found)


def _ms(ms: float) -> str:
    return f"{ms:.3g}" if ms < 999 else f"{ms:,.0f}"


def _table(rows: Sequence[Row]) -> str:
    caches = sorted(dict.fromkeys(r.cache for r in rows), key=lambda name: name.startswith("kvpolicy"))
    sizes: dict[tuple[str, ...], dict[str, Row]] = {}
    for r in rows:
        sizes.setdefault((f"{r.tokens:,}", str(r.batch), str(r.nbits), r.dtype), {})[r.cache] = r
    head, rule = "| tokens | batch | nbits | dtype |", "|---:|---:|---:|---|"
    columns: list[Callable[[dict[str, Row]], str]] = []
    for name in caches:
        head, rule = f"{head} {name}, ms |", f"{rule}---:|"
        columns.append(lambda of, name=name: _ms(of[name].ms) if name in of else "")
        if name.startswith("kvpolicy") and DYNAMIC in caches:
            head, rule = f"{head} of DynamicCache's |", f"{rule}---:|"
            columns.append(lambda of, name=name: f"{of[name].versus[DYNAMIC]:.2f}" if name in of else "")
    lines = [f"| {' | '.join([*size, *(cell(of) for cell in columns)])} |" for size, of in sizes.items()]
    return "\n".join([head, rule, *lines])


def merged(paths: Iterable[Path]) -> str:
    """One table of what several runs wrote, below what each was made with."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rows = [Row(**row) for run in runs for row in run["rows"]]
    order = list(DTYPES)
    rows.sort(key=lambda row: (order.index(row.dtype), row.batch, row.tokens, row.nbits))
    said = [run["about"].split("; ") for run in runs]
    common = [part for part in said[0] if all(part in parts for parts in said)]
    lines = [f"{'; '.join(common)}.", ""]
    for run, parts in zip(runs, said, strict=True):
        own = "; ".join(part for part in parts if part not in common)
        lines.append(f"- `{run['command']}`" + f": {own}" * bool(own))
    return "\n".join([*lines, "", table(rows)])


def growth(rows: Sequence[Row]) -> list[str]:
    """What storing costs at the greatest length, as a multiple of that at the least."""
    lines = []
    kinds = [(r.dtype, r.batch, r.nbits, r.cache) for r in rows if r.mode == "store"]
    for kind in dict.fromkeys(kinds):
        of = [r for r in rows if r.mode == "store" and (r.dtype, r.batch, r.nbits, r.cache) == kind]
        least, most = min(of, key=lambda r: r.tokens), max(of, key=lambda r: r.tokens)
        if least is not most:
            dtype, batch, nbits, cache = kind
            lines.append(
                f"{cache}, {nbits} bits, {dtype}, batch {batch}: storing at {most.tokens:,} tokens / at "
                f"{least.tokens:,}: {most.ms / least.ms:.2f}"
            )
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for mode, what in MODES.items():
        parser.add_argument(f"--{mode}", action="append_const", dest="modes", const=mode, help=f"time {what}")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="rows of the batch")
    parser.add_argument("--most", type=int, default=1 << 18, help="skip sizes of more tokens in all rows together")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--recipes", nargs="+", default=["logquant", "kivi"])
    parser.add_argument("--nbits", type=int, nargs="+", default=[2, 4])
    known = ["dynamic", "packed", "quanto", "hqq"]
    parser.add_argument("--peers", nargs="*", choices=known, default=known, help="hqq is by far the slowest")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=200, help="decode steps of a run")
    parser.add_argument("--runs", type=int, default=3, help="interleaved runs, of which the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1: counts processor time")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--md", type=Path, help="write the table here")
    options = parser.parse_args()
    options.modes = options.modes or list(MODES)
    return options


def write(rows: Sequence[Row], options: argparse.Namespace) -> None:
    for path in filter(None, (options.json, options.md)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if options.json:
        command = " ".join(["python benchmarks/decode.py", *sys.argv[1:]])
        found: dict[str, Any] = {"about": about(options), "command": command, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.md:
        notes = [f"- {note}" for note in growth(rows)]
        options.md.write_text(
            "\n".join([f"{about(options)}.", "", table(rows), *([""] if notes else []), *notes]) + "\n"
        )


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    print(about(options), flush=True)
    rows: list[Row] = []
    for size in sizes(options):
        found = measure(size, options)
        rows += found
        print(table(found), flush=True)
        write(rows, options)
        gc.collect()
    print("\n".join(["", table(rows), *growth(rows)]))


if __name__ == "__main__":
    main()
