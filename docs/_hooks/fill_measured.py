"""Writes measured figures between the marks of README.md and docs/explanation/benchmarks.md.

make demo && .venv/bin/python docs/_hooks/fill_measured.py demo out/demo
make real && .venv/bin/python docs/_hooks/fill_measured.py real out/real/recipes
make bench ARGS="--update --tokens 4096 16384 --batch 1 --nbits 2 --md out/decode.md" &&
    .venv/bin/python docs/_hooks/fill_measured.py decode out/decode.md
(and so on for store and attend, each with the command that stands above its mark)
"""

from __future__ import annotations

import re
import sys
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


def decode(path: Path) -> str:
    """The table that the benchmark wrote."""
    return path.read_text(encoding="utf-8").strip()


def main(what: str, source: str) -> None:
    """Fill in one kind of figures wherever its marks stand."""
    text = compared(what, Path(source)) if what in MODELS else decode(Path(source))
    mark = re.compile(rf"(<!-- measured: {what} -->\n).*?(<!-- /measured: {what} -->)", re.DOTALL)
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = mark.sub(lambda match: f"{match[1]}{text}\n{match[2]}", old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"filled {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
