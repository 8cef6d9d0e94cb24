"""Every figure on GPUs, checked before it is timed.

    python benchmarks/gpu.py                                # all sections
    python benchmarks/gpu.py layer first                    # some of them
    python benchmarks/gpu.py steps --shape 64 8192          # other batches and lengths
    python benchmarks/gpu.py rows --gigabytes 24
    python benchmarks/gpu.py --out out/gpu.json             # all rows, for gpu_plot.py and the tables of the docs
    python benchmarks/gpu.py --quick                        # whether all of it runs: few layers, shapes and steps

layer: attention of one layer against flash attention. peak: memory of an attached layer's step. first: time to the
first token of a Llama of 8 billion parameters with random weights. steps: its decode steps. context: those over lengths
of context. rows: tokens per second of as many rows as equal memory holds.

Results that are wrong are said to be, without times, and the exit status is 1. What does not fit on the card is said.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from on_gpu.card import Model, about
from on_gpu.first import PROMPTS, first, peak
from on_gpu.first import RECIPES as FIRST
from on_gpu.layer import SHAPES, layer
from on_gpu.report import tables
from on_gpu.rows import Book
from on_gpu.sizes import CONTEXT, ROW_TOKENS, context, rows
from on_gpu.steps import RECIPES, steps
from on_gpu.steps import SHAPES as STEPS

SECTIONS = ("layer", "peak", "first", "steps", "context", "rows")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; by default all")
    pair: dict[str, Any] = {"type": int, "nargs": 2, "action": "append", "metavar": ("BATCH", "TOKENS")}
    parser.add_argument("--shape", **pair, help="of steps")
    parser.add_argument("--prompt", **pair, help="of first")
    parser.add_argument("--recipes", nargs="+", help="of steps, first")
    parser.add_argument("--peers", nargs="*", default=["static", "quanto"], help="of steps, beside DynamicCache")
    parser.add_argument("--gigabytes", type=float, help="of rows: for keys and values; by default 64 or what there is")
    parser.add_argument("--tokens", type=int, default=ROW_TOKENS, help="of rows: those of each row")
    parser.add_argument("--out", type=Path, help="write all rows to this file of JSON")
    parser.add_argument("--quick", action="store_true", help="few layers, shapes and steps")
    given = parser.parse_args()
    unknown = [name for name in given.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"there is no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    return given


def planned(book: Book, given: argparse.Namespace, model: Callable[[], Any]) -> dict[str, Callable[[], None]]:
    """What each section runs."""
    shapes, prompts = ([tuple(shape) for shape in x or ()] for x in (given.shape, given.prompt))
    recipes, peers = given.recipes, given.peers
    if given.quick:
        return {
            "layer": lambda: layer(book, ((2, 1024), (1, 4096))),
            "peak": lambda: peak(book, (4096,), ("logquant",), (2,), 2),
            "first": lambda: first(book, model(), prompts or [(2, 1024)], recipes or FIRST, 3),
            "steps": lambda: steps(book, model(), shapes or [(1, 1024), (2, 1024)], recipes or RECIPES, peers, 8),
            "context": lambda: context(book, model(), (512, 1024), 2, count=8),
            "rows": lambda: rows(book, model(), given.gigabytes or 0.05, 1024, points=(1, 2), count=8),
        }
    return {
        "layer": lambda: layer(book, SHAPES),
        "peak": lambda: peak(book),
        "first": lambda: first(book, model(), prompts or PROMPTS, recipes or FIRST),
        "steps": lambda: steps(book, model(), shapes or STEPS, recipes or RECIPES, peers),
        "context": lambda: context(book, model(), CONTEXT),
        "rows": lambda: rows(book, model(), given.gigabytes, given.tokens),
    }


def main() -> None:
    given = parse()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, found none")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length
    shape = Model(layers=2) if given.quick else Model()
    made: list[Any] = []

    def model() -> Any:
        if not made:
            made.append(shape.drawn())
        return made[0]

    book = Book(about(shape), given.out)
    print(book.about, flush=True)
    with torch.no_grad():
        for name, run in planned(book, given, model).items():
            if not given.sections or name in given.sections:
                begin = time.perf_counter()
                run()
                print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    for table in tables([(book.about, book.rows)]).values():
        print(f"\n{table}")
    if book.wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
