"""The page about published gains says what its command says."""

from __future__ import annotations

from pathlib import Path

from kvpolicy.report.merging import of_arms
from kvpolicy.report.readers import read_csv
from kvpolicy.report.tables import difference, name_of, number, p_value
from kvpolicy.statistics.verdicts import ALL_TASKS, judge

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "explanation" / "published-gains.md"
BASELINE, ARM = "kivi-hf 2 bits", "logquant 2 bits"


def lines() -> list[str]:
    """The lines of the page's table."""
    evidence = of_arms(read_csv(DOCS / "data" / "longbench_llama31.csv.gz"), [ARM], BASELINE)
    return [
        f"| {name_of(v.task)} | {v.n} | {number(v.baseline)} | {number(v.mean)} | {difference(v)} "
        f"| {p_value(v.p_holm)} | {v.verdict} |"
        for v in judge(evidence, baseline=BASELINE).found
    ]


def test_the_page_says_what_the_command_says() -> None:
    text, found = PAGE.read_text(encoding="utf-8"), lines()
    assert len(found) == 22
    assert [line for line in found if line not in text] == []
    by_task = [line for line in found if not line.startswith(f"| {name_of(ALL_TASKS)}")]
    better = [line for line in by_task if line.endswith("| better |")]
    assert f"On {len(better)} of 21 tasks the gain is significant" in text
    assert f'--baseline "{BASELINE}" --arm "{ARM}"' in text
