"""The benchmark of GPUs shows no figures of results that are wrong or were not checked."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import kvpolicy

ROOT = Path(__file__).parents[2]
BENCHMARKS = str(ROOT / "benchmarks")


@pytest.fixture(autouse=True)
def _found() -> Iterator[None]:
    sys.path.insert(0, BENCHMARKS)
    yield
    sys.path.remove(BENCHMARKS)


def part(name: str) -> Any:
    return importlib.import_module(f"on_gpu.{name}")


def row(arm: str, *checks: tuple[float, float], **more: Any) -> Any:
    rows = part("rows")
    made = [rows.Check("attention", error, bound) for error, bound in checks]
    return rows.Row("steps", arm, 1, 4096, seconds=0.0123, base=(1, 0.0246), checks=made, **more)


def test_a_ratio_is_only_to_be_had_of_a_checked_row() -> None:
    assert row("logquant", (1e-3, 4e-3)).ratio == pytest.approx(0.5)
    assert row("logquant", (1e-3, 4e-3)).throughput == pytest.approx(2.0)
    for other in (row("logquant"), row("logquant", (5e-3, 4e-3)), row("logquant", (float("nan"), 4e-3))):
        assert other.ratio is None
        assert other.throughput is None
    assert row("logquant", (1e-3, 4e-3), skipped="does not fit").ratio is None


def test_a_wrong_row_shows_no_time_anywhere() -> None:
    report = part("report")
    wrong, graphs = row("kivi", (5e-3, 4e-3)), row("logquant", (1.0, 0.0), graphs=True)
    found = [row("DynamicCache"), wrong, row("logquant", (1e-3, 4e-3)), graphs]
    table = report.tables([("a card", found)])["steps"].splitlines()
    assert [line.count("12.3") for line in table[2:]] == [0, 0, 1, 0, 1]
    assert table[5].count("WRONG") == 1
    assert table[6].count("WRONG") == 1
    for one in (wrong, graphs):
        assert "WRONG" in str(one)
        assert "12.3" not in str(one)


def test_an_arm_that_raises_is_wrong_and_the_next_has_its_turn(capsys: pytest.CaptureFixture[str]) -> None:
    rows = part("rows")
    book = rows.Book("a card")

    def fails() -> None:
        raise ValueError("no such thing")

    def too_large() -> None:
        raise torch.cuda.OutOfMemoryError("of 80 GB")

    assert book.attempt(rows.Row("steps", "kivi", 64, 8192), too_large) is None
    assert not book.wrong
    assert book.attempt(rows.Row("steps", "kivi", 1, 8192), fails) is None
    assert book.wrong
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "no such thing" in out


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = part("rows")
    book = rows.Book("a card", tmp_path / "gpu.json")
    for one in (row("DynamicCache"), row("kivi", (1e-3, 4e-3), graphs=True, more={"peak MB": 1.0})):
        book.add(one)
    assert rows.read(book.path) == ("a card", book.rows)


@pytest.fixture(scope="module")
def model() -> Any:
    sys.path.insert(0, BENCHMARKS)
    torch.manual_seed(0)
    return part("card").Model(layers=2, hidden=64, inner=64, vocabulary=50).drawn("cpu")


@pytest.mark.parametrize("recipe", ["logquant", "h2o"])
def test_attention_is_compared_layer_by_layer(model: Any, recipe: str) -> None:
    checks, prompts, card = part("checks"), part("prompts"), part("card")
    hidden = importlib.import_module("kvpolicy.hf.attach")
    attend, calls = hidden.attend, 0

    def wrong(tiers: Any, query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        found: torch.Tensor = attend(tiers, query, *args, **options)
        calls += 1
        return found * 1.01 if calls == 3 else found  # the second layer's; the others are PyTorch's in between

    with torch.no_grad():
        cache = kvpolicy.make_cache(recipe, model)
        with kvpolicy.attach(model):
            prompts.prefilled(model, cache, card.prompt_of(model, 2, 150))
        token = card.prompt_of(model, 2, 1)
        seen = cache.get_seq_length()
        right = checks.eager_checks(model, cache, token)
        assert all(check.holds for check in right), right
        assert cache.get_seq_length() == seen
        assert [check.what for check in right] == ["attention", *["attention received"] * (recipe == "h2o"), "logits"]
        with patch.object(hidden, "attend", wrong):
            found = checks.eager_checks(model, cache, token)
    assert [check.what for check in found if not check.holds] == ["attention"]
    assert found[0].error == pytest.approx(0.01, rel=0.3)


def test_the_rows_and_first_tokens_of_a_small_model_are_measured(model: Any) -> None:
    rows, first, sizes, report = part("rows"), part("first"), part("sizes"), part("report")
    book = rows.Book("a card")
    with torch.no_grad():
        first.first(book, model, [(1, 200)], ("logquant",), 3)
        sizes.rows(book, model, 0.003, 200, sizes.ARMS[:1] + sizes.ARMS[3:4], (1,), 2)
    assert not book.wrong
    assert [r.arm for r in book.rows if r.section == "first"] == ["DynamicCache", "logquant"]
    assert book.rows[1].ratio is not None
    assert book.rows[1].checks[0].error < 1e-6
    replayed = [r for r in book.rows if r.section == "rows" and r.arm == "logquant"]
    assert replayed
    assert all(r.skipped.startswith("not replayed") and r.ratio is None for r in replayed)  # there is no GPU
    assert set(report.tables([(book.about, book.rows)])) == {"first", "rows"}


def test_the_picture_is_drawn_and_the_pages_marks_are_filled_from_what_was_written(tmp_path: Path) -> None:
    rows = part("rows")
    book = rows.Book("a card, 80 GB", tmp_path / "gpu.json")
    right = [rows.Check("attention", 0.0, 1.0)]
    for arm, seconds in (("DynamicCache", 0.02), ("quanto, 2 bits", 0.05), ("logquant", 0.01)):
        for size in (1, 2):
            book.add(rows.Row("context", arm, 8, 1024 * size, seconds=seconds * size, checks=right))
            more = {"of GB": 24.0, "tokens/s": size / seconds, "most": float(size > 1)}
            book.add(rows.Row("rows", arm, size, 8192, seconds=seconds, checks=right, base=(2, 0.02), more=more))
    importlib.import_module("gpu_plot").main([str(book.path)], str(tmp_path / "gpu.png"))
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")

    spec = importlib.util.spec_from_file_location("fill_measured", ROOT / "docs" / "_hooks" / "fill_measured.py")
    assert spec is not None
    assert spec.loader is not None
    fill_measured = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill_measured)
    page = tmp_path / "page.md"
    page.write_text("<!-- measured: gpu-rows -->\nold\n<!-- /measured: gpu-rows -->\nkept\n", encoding="utf-8")
    with patch.object(fill_measured, "ROOT", tmp_path):
        fill_measured.fill(fill_measured.on_gpu([book.path]), [page])
    text = page.read_text(encoding="utf-8")
    assert "| kvpolicy logquant | 2 |" in text
    assert "old" not in text
    assert text.endswith("kept\n")


def test_each_mark_of_the_page_has_a_table() -> None:
    text = (ROOT / "docs" / "explanation" / "benchmarks.md").read_text(encoding="utf-8")
    marks = set(re.findall(r"<!-- measured: gpu-(\w+) -->", text))
    assert marks
    assert marks <= set(part("report").MAKERS)
