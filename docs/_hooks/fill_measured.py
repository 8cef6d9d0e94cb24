"""Writes measured figures between the marks of README.md and docs/explanation/benchmarks.md.

make demo && .venv/bin/python docs/_hooks/fill_measured.py demo out/demo
make real && .venv/bin/python docs/_hooks/fill_measured.py real out/real/recipes
make bench ARGS="--update --tokens 4096 16384 --batch 1 --nbits 2 --json out/update.json" &&
    .venv/bin/python docs/_hooks/fill_measured.py decode out/update.json
(and so on for attend, of several runs; for store, memory and prefill with --md, each with the command that is shown)
.venv/bin/python benchmarks/gpu.py --out out/gpu.json && .venv/bin/python docs/_hooks/fill_measured.py gpu out/gpu.json
(fills gpu-layer, gpu-steps and so on; of several runs, say on two cards, the tables stand one after the other)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODELS = {"demo": "bundled model", "real": "SmolLM2-135M-Instruct"}
L1 = "L1 error"
PAGES = [ROOT / "README.md", ROOT / "docs" / "explanation" / "benchmarks.md"]


def _mean(found: Any, digits: int, sign: bool = False) -> str:
    if found is None:
        return "-"
    mean = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    return mean if not found.half_width else f"{mean} ± {found.half_width:.{digits}f}"


def compared(command: str, path: Path) -> str:
    """The table of a comparison's directory, which a command made."""
    from kvpolicy.experiment.names import EXACT
    from kvpolicy.experiment.result import Comparison
    from kvpolicy.experiment.store import read
    from kvpolicy.recipe.load import load_yaml

    evidence = read(path)
    arms = {name: load_yaml(recipe) for name, recipe in evidence.arms.items() if name != EXACT and recipe}
    found, summary = Comparison(evidence, arms), evidence.settings
    rows = [_row(found, name) for name in arms]
    head = [name for name in rows[0] if any(row[name] != "-" for row in rows)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(row[name] for name in head) + " |" for row in rows]
    versions = ", ".join(f"{library} {version}" for library, version in summary["versions"].items())
    note = (
        f"`make {command}`: task `{summary['task']}`, {summary['n']} samples, the same for all arms, seed "
        f"{summary['seed']}; {MODELS[command]} in {summary['dtype']} on {summary['device']}; {versions}.\n"
        "± is the half-width of a 95% confidence interval. Δ NLL is the paired difference to the exact cache; KL and "
        "top-1\ncompare the predictions with the exact cache's."
    )
    note += " L1 is the relative error of attention outputs." if L1 in head else ""
    return "\n".join([*lines, "", note])


def _row(found: Any, name: str) -> dict[str, str]:
    bits, exact, final, top1, l1 = (
        found.mean(name, metric) for metric in ("bits", "exact_bytes", "final_bytes", "top1", "l1")
    )
    return {
        "Recipe": f"`{name}`",
        "Bits per value": f"{bits.mean:.2f}",
        "Smaller than exact": f"{exact.mean / final.mean:.2f}x",
        "Score": _mean(found.mean(name, "score"), 3),
        "Δ NLL (nats per token)": _mean(found.difference(name, metric="nll"), 4, sign=True),
        "KL (nats)": _mean(found.mean(name, "kl"), 4),
        "Top-1": "-" if top1 is None else f"{100 * top1.mean:.1f} %",
        L1: "-" if l1 is None else f"{l1.mean:.3f}",
    }


def written(paths: Sequence[Path]) -> str:
    """What a benchmark wrote: a text, or the rows of some runs, which become one table."""
    if paths[0].suffix != ".json":
        return "\n\n".join(path.read_text(encoding="utf-8").strip() for path in paths)
    from decode import merged

    return merged(paths)


def on_gpu(paths: Sequence[Path]) -> dict[str, str]:
    """The tables of all sections, by the names of their marks."""
    from on_gpu.report import tables
    from on_gpu.rows import read

    return {f"gpu-{name}": table for name, table in tables([read(path) for path in paths]).items()}


def fill(texts: dict[str, str], pages: Sequence[Path]) -> None:
    """Write texts wherever their marks stand."""
    for page in pages:
        old = new = page.read_text(encoding="utf-8")
        for what, text in texts.items():
            mark = re.compile(rf"(<!-- measured: {what} -->\n).*?(<!-- /measured: {what} -->)", re.DOTALL)
            new = mark.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", new)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"filled {page.relative_to(ROOT)}")


def main(what: str, *sources: str) -> None:
    """Fill in one kind of figures wherever its marks stand."""
    paths = [Path(source) for source in sources]
    sys.path.insert(0, str(ROOT / "benchmarks"))
    if what == "gpu":
        fill(on_gpu(paths), PAGES)
    else:
        fill({what: compared(what, paths[0]) if what in MODELS else written(paths)}, PAGES)


if __name__ == "__main__":
    main(*sys.argv[1:])
