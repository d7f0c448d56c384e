"""The page of a report: well-formed, alone in the world, with the numbers of the markdown, figures where data are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from icecache.errors import ConfigError, DataError
from icecache.eval import curves
from icecache.eval.attention import MEASURES, save
from icecache.eval.figures import draw
from icecache.eval.folder import RunFolder
from icecache.eval.heads import HeadRow
from icecache.eval.html import to_elements, to_page
from icecache.eval.panel import read_rows
from icecache.eval.record import ArmStats, Manifest, Record, RunPart
from icecache.eval.report import sections, write_report
from icecache.eval.results import Results

PART = RunPart(
    "icecache eval run --out <r> & co", "2026-11-24T15:00:00+00:00", "abc", {"torch": "2"}, {"device": "cpu"}
)
MANIFEST = Manifest({"model": "needle-3m"}, {}, {}, {"kv": "EM"}, (PART,))
N = 20
RIGHT = {"full": 20, "random@64": 0, "streaming@64": 1, "icecache@64": 19, "icecache@256": 20, "quest@64": 7}
LOADED = {"full": 1000.0, "icecache@64": 70.0, "icecache@256": 260.0, "quest@64": 150.0}
VOID = {"meta", "br"}
BROWSER = os.environ.get("ICECACHE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
# What lies outside of where it belongs, in pixels, and the smallest text of a figure.
LOOK = """<script>
const right = e => e.getBoundingClientRect().right, all = q => [...document.querySelectorAll(q)];
parent.postMessage(JSON.stringify({
  width: innerWidth, page: document.documentElement.scrollWidth,
  blocks: Math.max(...all("main > *").map(right)),
  figures: Math.max(...all("svg").map(e => right(e) - right(e.parentElement))),
  text: Math.min(...all("svg text").map(e => e.getBoundingClientRect()).filter(r => r.width > r.height)
    .map(r => r.height)),
}), "*");
</script>"""
# A window cannot be as narrow as a phone; a frame in it can.
FRAME = """<!DOCTYPE html><script>onmessage = e => { document.title = e.data; };</script>
<iframe src="page.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>"""


def _records(task, arm, right, *, length=1024, depth=True):
    budget = int(arm.partition("@")[2] or 0) or None
    loaded = LOADED.get(arm, 64.0)
    stats = ArmStats(loaded, loaded, 1, 3 << 20, 0.5, 1.5, 0.01, generated_kept="all")
    for i in range(N):
        meta = {"length": length, **({"depth": i / (N - 1)} if depth else {})}
        identity = ("needle", task, f"{length}-{i}", arm, "B", f"h{length}-{i}")
        yield Record(*identity, 9, 1, "yes", ("yes",), float(i < right), budget, 0, stats, {}, meta)


def _run(lengths=(1024, 4096), tasks=("kv", "vt"), leave_out=frozenset(), depth=True):
    found = [
        record
        for length in lengths
        for task in tasks
        for arm, right in RIGHT.items()
        if (task, arm) not in leave_out
        for record in _records(task, arm, right, length=length, depth=depth)
    ]
    return Results(found, MANIFEST)


def _page(results):
    return to_page(sections(results), draw(results), folded="## Task by task")


@pytest.fixture(scope="module")
def page():
    return _page(_run())


class Reader(HTMLParser):
    """Fails on an element that is not closed where it was opened; keeps tables, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tables, self.attributes, self.text, self.ids = [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in {"th", "td"}:
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def _note(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


def _markdown_tables(text):
    tables, before = [], False
    for line in text.splitlines():
        is_row = line.startswith("| ")
        if is_row and not before:
            tables.append([])
        if is_row and not re.fullmatch(r"[|\-: ]+", line):
            tables[-1].append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
        before = is_row
    return tables


def test_the_page_holds_the_tables_of_the_markdown_number_for_number(page):
    tables = Reader(page).tables
    assert tables == _markdown_tables("\n\n".join(sections(_run())))
    assert len(tables) > 6


def test_the_page_is_well_nested_and_escapes_what_it_quotes(page):
    Reader(page)
    assert "--out &lt;r&gt; &amp; co" in page
    with pytest.raises(AssertionError):
        Reader(page.replace("</table>", "", 1))


def test_the_page_asks_for_nothing_outside_itself(page):
    read = Reader(page)
    assert "://" not in page
    assert "@import" not in page
    for tag, name, value in read.attributes:
        assert tag not in {"script", "link", "img", "iframe", "image"} or value.startswith("#")
        assert name not in {"src", "href"} or value.startswith("#")
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(read.ids)
    assert {value[1:] for _, name, value in read.attributes if name == "href"} <= set(read.ids)
    assert len(read.ids) == len(set(read.ids))
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in read.attributes


def test_the_page_fits_a_phone_and_the_dark(page):
    read = Reader(page)
    assert ("meta", "name", "viewport") in read.attributes
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page
    n_scroll = sum(pair == ("div", "class", "scroll") for pair in read.attributes)
    assert n_scroll == len(read.tables) + page.count("<svg")


def test_every_arm_is_named_and_every_policy_drawn(page):
    results = _run()
    texts = {text.strip() for text in Reader(page).text}
    assert set(results.arms) <= texts
    curve = next(d for d in draw(results) if d.title.startswith("Score against loaded"))
    drawn = {text.strip() for text in Reader(curve.svg).text}
    assert {"full", "icecache", "quest", "random", "streaming"} <= drawn


def test_figures_stand_only_where_their_data_are():
    titles = [d.title for d in draw(_run())]
    assert [t.partition(":")[0] for t in titles] == [
        *["Score against loaded tokens"] * 2,
        "Score against length",
        *["Length and depth"] * 2,
        *["Cost"] * 2,
    ]
    one_length = [d.title.partition(":")[0] for d in draw(_run(lengths=(1024,)))]
    assert one_length == ["Score against loaded tokens", "Cost"]
    assert not any("depth" in d.title for d in draw(_run(depth=False)))
    alone = Results(_records("kv", "full", 20), MANIFEST)
    assert list(draw(alone)) == []
    Reader(_page(alone))


def test_an_arm_without_some_of_the_tasks_is_left_out_and_said_so():
    results = _run(leave_out={("vt", "quest@64")})
    found = curves.shared(results, [("B", 1024)], results.arms)
    assert found.tasks == ("kv", "vt")
    assert found.left_out == ("quest@64",)
    curve = next(draw(results))
    assert "did not run on all of these: quest@64" in curve.caption
    assert "quest" not in {text.strip() for text in Reader(curve.svg).text}


def test_a_picture_of_more_arms_may_be_worth_a_task():
    lone = {("vt", arm) for arm in RIGHT if arm not in {"full", "icecache@64"}}
    found = curves.shared(_run(leave_out=lone), [("B", 1024)], list(RIGHT))
    assert found.tasks == ("kv",)
    assert found.left_out == ()


def test_tasks_that_random_pages_solve_are_not_drawn():
    easy = [r for arm in RIGHT for r in _records("easy", arm, 20)]
    hard = [r for arm, right in RIGHT.items() for r in _records("kv", arm, right)]
    assert curves.shared(Results(easy + hard), [("B", 1024)], list(RIGHT)).tasks == ("kv",)
    assert curves.shared(Results(easy), [("B", 1024)], list(RIGHT)) is None


def test_the_heat_map_averages_by_depth_and_length():
    results = Results(_records("kv", "full", 5), MANIFEST)
    heat = curves.heat(results, "B", "kv", "full")
    depths = np.arange(N) / (N - 1)
    scores = np.arange(N) < 5
    for row in range(curves.DEPTH_BINS):
        inside = (np.minimum((10 * depths).astype(int), 9)) == row
        expected = scores[inside].mean() if inside.any() else np.nan
        np.testing.assert_equal(heat.scores[row, 0], expected)
    assert heat.lengths == (1024,)
    assert curves.heat(results, "B", "kv", "quest@64") is None


def test_markup_of_the_reports_becomes_elements():
    made = list(to_elements("### A\n\n**INVALID RUN**: `a*b*<c>` of *macro*\n5 * 3 * 2"))
    assert made == [
        "<h3>A</h3>",
        "<p><strong>INVALID RUN</strong>: <code>a*b*&lt;c&gt;</code> of <em>macro</em><br>5 * 3 * 2</p>",
    ]


def test_an_attention_report_in_the_folder_is_drawn(tmp_path):
    with RunFolder(tmp_path / "r", MANIFEST, resume=False) as folder:
        folder.add([r for arm, right in RIGHT.items() for r in _records("kv", arm, right)])
    means = dict.fromkeys(MEASURES, 0.25)
    rows = [
        HeadRow(f"{policy}@64", layer, head, 5, {**means, "packing": packing, "search": packing}, 0.1, 0.5, None)
        for policy, packing in [("icecache", 0.1), ("quest", None)]
        for layer in range(3)
        for head in range(2)
    ]
    save(tmp_path / "r", {}, rows)
    assert read_rows(tmp_path / "r/attention.json") == rows
    _, (path,) = write_report(tmp_path / "r", formats=("html",))
    page = path.read_text(encoding="utf-8")
    Reader(page)
    assert "Attention at 64 tokens" in page
    assert "://" not in page
    (tmp_path / "r/attention.json").write_text('{"heads": [{"arm": 1}]}', encoding="utf-8")
    with pytest.raises(DataError, match="not what icecache eval attention writes"):
        write_report(tmp_path / "r", formats=("html",))


def test_a_report_is_written_in_the_formats_asked_for(tmp_path):
    with RunFolder(tmp_path / "r", MANIFEST, resume=False) as folder:
        folder.add([r for arm, right in RIGHT.items() for r in _records("kv", arm, right)])
    text, written = write_report(tmp_path / "r", formats=("md", "html"))
    assert written == [tmp_path / "r/report.md", tmp_path / "r/report.html"]
    assert written[0].read_text(encoding="utf-8") == text
    assert Reader(written[1].read_text(encoding="utf-8")).tables == _markdown_tables(text)
    _, written = write_report(tmp_path / "r", tmp_path / "page.htm", formats=("html",))
    assert written == [tmp_path / "page.htm"]
    _, written = write_report(tmp_path / "r", tmp_path / "x.md", formats=("md", "html"))
    assert written == [tmp_path / "x.md", tmp_path / "x.html"]
    with pytest.raises(ConfigError, match="one or more of md, html, got pdf"):
        write_report(tmp_path / "r", formats=("pdf",))


def test_samples_are_sorted_by_the_length_of_full_attentions_answer():
    def lengthened(arm, n_right):
        for length in (1024, 4096):
            for i, record in enumerate(_records("kv", arm, n_right, length=length)):
                # Rivals may ramble: what counts is full attention's answer.
                yield replace(record, n_generated=(5 if i < 10 else 40 + i) if arm == "full" else 999)

    results = Results([r for arm, right in RIGHT.items() for r in lengthened(arm, right)], MANIFEST)
    found = curves.by_generated(results, results.groups, ["icecache@64", "quest@64"])
    assert (found.edges, found.counts) == (((5, 5), (50, 59)), (20, 20))
    means = [mean.estimate for mean in found.scores["quest@64"]]
    assert means == [0.7, 0.0]
    assert any(d.title.startswith("Score against generated tokens") for d in draw(results))
    assert curves.by_generated(_run(), [("B", 1024)], ["icecache@64"]) is None


@pytest.mark.skipif(BROWSER is None, reason="no chromium (ICECACHE_CHROMIUM names one)")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_anything_cut_off(page, width, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", LOOK + "</body>"), encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=5000",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--dump-dom", outer.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    look = json.loads(unescape(re.search(r"<title>(.*?)</title>", shown)[1]))
    assert look["width"] == width
    assert look["page"] <= width, "the page scrolls sideways"
    assert look["blocks"] <= width
    assert look["figures"] <= 0, "a figure is wider than its frame"
    assert look["text"] >= 8, "text of a figure is too small to read"
