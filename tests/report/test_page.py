"""The page and the Markdown: what they say, that they stand alone, and how a browser shows them."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from evidence import ARMS, evidence

from kvpolicy.report.charts import Point, Scale, scatter
from kvpolicy.report.figures import heat_maps
from kvpolicy.report.page import title
from kvpolicy.report.tables import Report
from kvpolicy.report.write import write
from kvpolicy.statistics.rows import Evidence, Row
from kvpolicy.statistics.verdicts import judge

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    write(evidence(12), directory)
    return directory


class Outline(HTMLParser):
    """Elements that are open, ids, and what would be asked for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.asked: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.asked += [given[name] or "" for name in ("src", "href", "action", "data") if name in given]
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def test_page_stands_alone_and_says_what_is_known(written: Path) -> None:
    text = (written / "report.html").read_text(encoding="utf-8")
    page = Outline(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:")) for link in page.asked), page.asked
    assert "url(" not in text
    assert "@import" not in text
    assert page.tags.count("script") == 2, "texts of the run are no markup"
    body = text.split("<main>")[1].split("<script")[0]
    order = [
        body.index(f'id="{name}"') for name in ("verdicts", "means", "quality", "costs", "divergence", "attention")
    ]
    assert order == sorted(order)
    assert "This run is partial." in text
    assert "streaming-llm &lt;b&gt;&amp;: lines 8 of 12" in text
    assert "CUDA out of memory" in text
    for layer in range(6):
        assert f'data-name="layer {layer}"' in text
    assert "kvpolicy compare kivi:nbits=2 logquant:window=42 --task lines" in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert len(data["samples"]) == data["total"] == 36
    assert "nan" not in re.sub(r"<[^>]*>", "", text).lower().split()


def test_markdown_says_the_same(written: Path) -> None:
    text = (written / "report.md").read_text(encoding="utf-8")
    assert "**This run is partial.**" in text
    assert "&lt;script>" in text
    assert "<script>" not in text.split("```")[0]
    tables = [block for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) >= 5
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert "needle\\|multi" in text


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("org/small-1B", "org/small-1B"),
        ("bundled", "bundled"),
        ("benchmarks/../out/real/model", "real/model"),
        ("../nets/tiny/", "tiny"),
        ("./tiny", "tiny"),
        ("x/..", Path.cwd().name),
        ("/data/link/checkpoint-500", "link/checkpoint-500"),
        ("/c/models--org--small/snapshots/0123456789012345678901234567890123456789", "org/small"),
        ("/nets/tiny.gguf", "tiny.gguf"),
        ("/", "/"),
    ],
)
def test_a_title_names_the_model_and_not_the_way_to_it(given: str, shown: str, tmp_path: Path) -> None:
    row = Row("exact", "t", "0", {"score": 1.0})
    found = Evidence((row,), {"exact": None}, "exact", {"t": 1}, {"model": given})
    assert title(Report.of(found, judge(found))) == f"0 arms against exact, t, {shown}"


def test_thousands_of_samples_and_none_are_pages_that_open(tmp_path: Path) -> None:
    long = "word " * 2_000
    many = [
        Row(
            arm,
            "t",
            str(i),
            {"score": float(i % 7 == 0 or arm == "exact")},
            prompt=long,
            answer=long,
            output=long + arm,
        )
        for i in range(1_200)
        for arm in ("exact", "a")
    ]
    write(Evidence(tuple(many), {"exact": None, "a": None}, "exact"), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 5_000_000
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert data["total"] == 1_200
    assert 100 < len(data["samples"]) <= 600
    assert any(record["arms"]["a"]["v"] == 0 for record in data["samples"]), "losses are among them"
    part = data["samples"][0]["arms"]["a"]["out"]
    assert part["b"] + part["p"] == len(long), "the window is where outputs part"
    for rows in ((), (Row("exact", "t", "0", {"score": 1.0}),), (Row("exact", "t", "0", error=""),)):
        write(Evidence(rows, {"exact": None}, "exact", {"t": 4}), tmp_path)
        assert Outline((tmp_path / "report.html").read_text()).open == []


def test_axes_use_the_panel_and_labels_cover_no_point() -> None:
    assert Scale.over([1.0, 1.0]).low > 0.9
    narrow = Scale.over([0.91, 0.94])
    assert narrow(0.91) < 0.1
    assert narrow(0.94) > 0.9
    assert all(narrow.low <= value <= narrow.high for value, _ in narrow.ticks())
    assert [text for _, text in Scale.over([1.0, 16.0], log=True).ticks()] == ["1", "2", "4", "8", "16"]
    points = [Point(f"arm {i}", 2 + i % 3, 0.9 + 0.01 * (i // 3), 0.88, 0.95, i, i == 0) for i in range(9)]
    picture = str(scatter(points, "bits", "score", True))
    dots = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', picture)]
    marks = [(float(x), float(y)) for x, y in re.findall(r'class="mark" x="([\d.]+)" y="([\d.]+)"', picture)]
    assert len(dots) == len(marks) == 9
    assert all(abs(x - a) > 8 or abs(y - 4 - b) > 8 for x, y in marks for a, b in dots)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.chrome.service.Service(DRIVER)
        driver = webdriver.Chrome(options, service)
        yield driver
        driver.quit()


_BEYOND = """
return [...document.querySelectorAll('body *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, pre'))
    .map(e => e.tagName + '.' + e.className)
"""
_CONTRAST = """
const linear = x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
const light = c => {
    const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => linear(x / 255));
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2];
};
const ground = light(getComputedStyle(document.body).backgroundColor);
return [...document.querySelectorAll('p, td, th, small, .chip, summary, label, h1, h2, a, .key, svg text')]
    .map(e => [light(getComputedStyle(e)[e.tagName === 'text' ? 'fill' : 'color']), e.className.baseVal ?? e.className])
    .map(([l, name]) => [(Math.max(l, ground) + 0.05) / (Math.min(l, ground) + 0.05), name])
    .filter(([ratio]) => ratio < 4.5)
"""


def test_a_browser_shows_it(browser: Any, written: Path) -> None:
    """Light and dark, wide and narrow: nothing beyond the page, no complaint, no request, colours that can be read."""
    browser.get_log("performance")
    grounds = set()
    for scheme in ("light", "dark"):
        for width in (1400, 400):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get((written / "report.html").as_uri())
            state = (scheme, width)
            browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), state
            assert browser.execute_script(_BEYOND) == [], state
            assert browser.execute_script(_CONTRAST) == [], state
            assert browser.get_log("browser") == [], state
            grounds.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith(("chrome://", "data:"))} == {(written / "report.html").as_uri()}


def test_a_keyboard_is_enough_and_paper_shows_all(browser: Any, written: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    browser.get((written / "report.html").as_uri())
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("class") == "skip"
    Select(browser.find_element(By.ID, "arm")).select_by_visible_text(list(ARMS)[-1])
    browser.find_element(By.ID, "apart").send_keys(Keys.SPACE)
    first = browser.find_element(By.CSS_SELECTOR, "#list summary")
    assert "failed" in first.text
    second = browser.find_elements(By.CSS_SELECTOR, "#list summary")[4]
    second.send_keys(Keys.ENTER)
    opened = browser.find_elements(By.CSS_SELECTOR, "#list details")[4]
    assert opened.get_attribute("open")
    marks = opened.find_elements(By.TAG_NAME, "mark")
    assert len(marks) == 2, "both outputs are marked from where they part"
    assert marks[0].text != marks[1].text
    key = browser.find_element(By.CSS_SELECTOR, "#attention button.key[data-pick='layer 3']")
    key.send_keys(Keys.ENTER)
    picked = browser.find_elements(By.CSS_SELECTOR, "#attention path.picked")
    assert [line.get_attribute("data-name") for line in picked] == ["layer 3"]
    closed = "return document.querySelectorAll('details:not([open])').length"
    folded = browser.execute_script(closed)
    assert folded > 0
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(closed) == 0
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(closed) == folded


def test_a_task_at_several_lengths_is_one_map() -> None:
    rows = tuple(
        Row("arm", f"needle:tokens={n},keys=2", str(i), {"score": 1.0 - i}, facts={"depth": i * 0.5, "length": n})
        for n in (64, 128)
        for i in (0, 1)
    )
    found = Evidence(rows, {"arm": None}, "arm")
    (heat,) = heat_maps(Report.of(found, judge(found)))
    assert (heat.arm, heat.task, list(heat.lengths)) == ("arm", "needle:keys=2", ["64", "128"])
    assert [band for band, _ in heat.lines] == [f"{d} to {d + 10}%" for d in range(0, 60, 10)]
    assert [value for _, value, _ in heat.lines[0][1]] == [1.0, 1.0]
    assert [value for _, value, _ in heat.lines[1][1]] == [None, None]
