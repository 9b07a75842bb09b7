"""The page of runs: what is in it, and what a browser makes of it."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from errata.base.facts import Fact, Rewrite
from errata.evaluation import page as pages
from errata.evaluation.page import data, in_script, page, write_page
from errata.evaluation.report import table
from errata.evaluation.results import Run
from errata.evaluation.run_header import sha256
from made_runs import counterfact_records, counterfact_result, counterfact_run, failed, write_run, zsre_run

pytest.importorskip("jinja2")

NASTY = "</script><script>alert(1)</script><!-- <b>&amp;'\"\u2028{{ 7 * 7 }}"


@pytest.fixture
def run(tmp_path):
    """Sixty records, one with markup everywhere, one whose edit failed; one editor is not done."""
    records = counterfact_records(60)
    rewrite = Rewrite(Fact(NASTY, "{} was born in", NASTY + " old"), NASTY + " new")
    records[3] = replace(records[3], rewrite=rewrite, relation=NASTY, generation=(NASTY,))
    results = {name: [counterfact_result(r, name) for r in records] for name in ("unedited", "rome", "ft")}
    results["rome"][3] = replace(results["rome"][3], texts=(NASTY + " and on",))
    results["rome"][5] = failed(records[5], f"because {NASTY}")
    results["ft"] = results["ft"][:40]
    return Run.load(write_run(tmp_path / "run", records, results, model=f"<i>gpt2-xl</i>{NASTY}"))


def drawn(text: str) -> dict:
    """The data in a page, as its script reads them."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.all: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))


@pytest.mark.parametrize("probability", ["per_token", "total"])
def test_the_new_objects_probability_is_the_same_in_a_records_prompts_and_its_health(tmp_path, probability):
    (record,) = counterfact_records(1)
    edited = counterfact_result(record, "rome")
    new, old = edited.answers["rewrite"][0]
    rewrite = ((replace(new, total=-3.0, n_tokens=3), old),)
    health = {**edited.health, "probability_before": math.exp(-6), "probability_after": math.exp(-3)}
    edited = replace(edited, answers={**edited.answers, "rewrite": rewrite}, health=health)
    results = {"unedited": [counterfact_result(record, "unedited")], "rome": [edited]}
    run = Run.load(write_run(tmp_path / "run", [record], results))
    (shown,) = data([run], table([run], probability=probability))["runs"][0]["rows"][1]["results"]
    share = 1 / 3 if probability == "per_token" else 1
    assert shown["health"]["probability_before"] == pytest.approx(math.exp(-6 * share), rel=1e-3)
    assert shown["health"]["probability_after"] == pytest.approx(math.exp(-3 * share), rel=1e-3)
    assert shown["said"][0][0][0][0] == shown["health"]["probability_after"]


def test_texts_stay_texts(run):
    text = page([run], table([run]))
    found = Elements(text).all
    assert [tag for tag, _ in found].count("script") == 2
    assert not {"i", "b"} & {tag for tag, _ in found}
    assert "<!--" not in text
    assert "49" not in re.search(r"<h1>(.*?)</h1>", text)[1]
    said = drawn(text)
    assert said["runs"][0]["records"][3]["subject"] == NASTY.strip()
    assert said["runs"][0]["rows"][1]["results"][3]["texts"] == [NASTY + " and on"]
    assert html.unescape(re.search(r"<h1>(.*?)</h1>", text)[1]).endswith(NASTY)


def test_in_script():
    text = in_script({"a": "<!-- </script> & \u2028\u2029 é", "b": 1.5})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": "<!-- </script> & \u2028\u2029 é", "b": 1.5}


def test_nothing_is_fetched(run):
    text = page([run], table([run]))
    assert "default-src 'none'" in text
    for _, attributes in Elements(text).all:
        assert not {"src", "action"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "@import" not in text
    assert "url(" not in text
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}


def test_half_a_character_can_be_written(tmp_path):
    folder = counterfact_run(tmp_path / "r", 2)
    file = folder / "records.json"
    file.write_text(file.read_text(encoding="utf-8").replace("lives in", "lives \\ud800 in"), encoding="utf-8")
    for journal in folder.rglob("*.jsonl"):
        header, lines = journal.read_text(encoding="utf-8").split("\n", 1)
        told = json.loads(header)
        told["records"]["digest"] = sha256(file.read_text(encoding="utf-8"))
        journal.write_text(json.dumps(told) + "\n" + lines, encoding="utf-8")
    run = Run.load(folder)
    write_page(tmp_path / "p.html", [run], table([run]))
    written = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert drawn(written)["runs"][0]["records"][0]["generation"][0].endswith("lives \ud800 in")


def test_what_the_script_draws(run):
    said = data([run], table([run]))
    names = [each["name"] for each in said["columns"]]
    assert names == ["s", "es", "em", "ps", "pm", "ns", "nm", "ge", "rs", "ats", "atm", "essence", "drift"]
    unedited, rome, ft = said["runs"][0]["rows"]
    assert [len(row["results"]) for row in (unedited, rome, ft)] == [60] * 3
    assert ft["results"][39] is not None
    assert ft["results"][40:] == [None] * 20
    assert ft["numbers"]["es"][40:] == [None] * 20
    numbers = run.numbers(run.edited["rome"])
    assert rome["numbers"]["pm"][0] == pytest.approx(numbers["pm"][0], rel=1e-3)
    assert rome["results"][5]["error"].startswith("because")
    assert "said" not in rome["results"][5]
    assert rome["numbers"]["es"][5] == unedited["numbers"]["es"][5]
    kinds = rome["results"][0]["said"]
    assert [len(kind) for kind in kinds] == [1, 2, 3, 1]
    new, old = kinds[2][1]
    answer = run.edited["rome"].by_case[0].answers["neighborhood"][1]
    assert new == [pytest.approx(2.718281828 ** answer[0].total, rel=1e-3), 0, 1]
    assert len(old) == 3
    parts = [rome["numbers"][name][0] for name in ("es", "ps", "ns")]
    assert rome["numbers"]["s"][0] == pytest.approx(3 / sum(1 / part for part in parts), rel=1e-3)


def test_of_long_texts_the_last_are_left_out(tmp_path, monkeypatch):
    run = Run.load(counterfact_run(tmp_path / "r", 4))
    assert data([run], table([run]))["textsKept"] == 2
    lengths = sum(len(one.texts[0]) for each in (run.unedited, *run.edited.values()) for one in each.by_case.values())
    monkeypatch.setattr(pages, "TEXTS", lengths)
    said = data([run], table([run]))
    assert said["textsKept"] == 1
    assert len(said["runs"][0]["rows"][1]["results"][0]["texts"]) == 1


def test_zsre_data(tmp_path):
    run = Run.load(zsre_run(tmp_path / "z"))
    said = data([run], table([run]))
    assert [each["name"] for each in said["columns"]] == ["efficacy", "paraphrase", "specificity"]
    assert said["runs"][0]["records"][0]["targets"][2] == [("Nobody",)]
    assert said["runs"][0]["rows"][1]["results"][0]["said"][0] == [[[pytest.approx(0.6065), 2, 2]]]


# ---- in a browser ----


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """What a page is after its script and some more: its elements as text, or the screen's errors as a failure."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no chromium to look at the page with")

    def look(text: str, steps: str = "", at: str = "") -> str:
        folder = tmp_path_factory.mktemp("browser")
        # Run as part of the page's own script: the page allows no other.
        file = folder / "page.html"
        end = text.rindex("</script>")
        file.write_text(f"{text[:end]}\n;{steps}\n{text[end:]}", encoding="utf-8")
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        flags += "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom "
        flags += "--virtual-time-budget=5000"
        command = [browser, *flags.split(), f"--user-data-dir={folder / 'user'}", f"{file.as_uri()}{at}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if not done.stdout:
            pytest.skip(f"chromium does not run here: {done.stderr[-300:]}")
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    return look


def listed(dom: str) -> list[int]:
    return [int(case) for case in re.findall(r'id="record-(\d+)"', dom)]


def test_the_page_draws_itself(run, browse):
    dom = browse(page([run], table([run])))
    assert dom.count("<svg") == 13
    assert "50 of 60 records" not in dom
    assert "60 of 60 records" in dom
    assert len(listed(dom)) == 50
    # Worst first, and the edit that failed counts as unedited.
    rome = data([run], table([run]))["runs"][0]["rows"][1]["numbers"]["s"]
    shown = [rome[case] for case in listed(dom)]
    assert shown == sorted(shown)
    assert shown[0] == min(rome)
    assert dom.count("<script") == 2


LONG = "ft-l-layer=2,epsilon=0.0005"
OWN = "my-own-name-of-an-editor-that-goes-on-and-on-beyond-the-end-of-any-histogram"


@pytest.fixture
def long_names(tmp_path):
    """A run with long names of editors, one of which fails in columns that a narrow screen has no room for."""
    records = counterfact_records(20)
    manners = {"unedited": "unedited", LONG: "rome", OWN: "kn", "編" * 30: "ft"}
    results = {name: [counterfact_result(r, manner) for r in records] for name, manner in manners.items()}
    return Run.load(write_run(tmp_path / "run", records, results, "a-model-whose-name-has-no-end-" * 3))


def test_long_names_are_short_in_histograms(long_names, browse):
    dom = browse(page([long_names], table([long_names])))
    names = re.findall(r'<text class="name"[^>]*>(.*?)<title>(.*?)</title>', dom)
    assert names[:4] == [
        ("unedited", "unedited"),
        ("ft-l#2", LONG),
        (OWN[:35] + "…", OWN),
        ("編" * 17 + "…", "編" * 30),
    ]
    assert f"ft-l#2 is {LONG}" in dom


MEASURE = """
const inside = (each) => each.closest(".scroll, .said, .hidden, svg");
const box = (query) => document.querySelector(query).getBoundingClientRect();
const wide = [...document.querySelectorAll("body *")].filter((each) => !inside(each) &&
  each.getBoundingClientRect().right > innerWidth + 0.5);
const beside = [...document.querySelectorAll(".plot")].map((each) => {
  const edge = each.getBoundingClientRect();
  const texts = [...each.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
  return Math.max(...texts.map((text) => Math.max(text.right - edge.right, edge.left - text.left)));
});
parent.postMessage(JSON.stringify({
  window: innerWidth, page: document.documentElement.scrollWidth,
  wide: wide.map((each) => each.outerHTML.slice(0, 200)), beside: Math.max(...beside),
  parts: [".scores", ".legend", ".records", ".plots"].map((query) => box(query).width),
  opened: document.querySelectorAll(".detail").length, fails: document.querySelectorAll(".scores .fails").length,
}), "*");
"""


@pytest.mark.parametrize("width", [320, 390, 700, 1400, 2000])
def test_the_page_uses_its_width_and_no_more(long_names, browse, width, tmp_path):
    # In a frame, for a browser's own window is never as narrow as a telephone.
    text, end = page([long_names], table([long_names])), "</script>\n</body>"
    assert text.count(end) == 1
    (tmp_path / "framed.html").write_text(text.replace(end, MEASURE + end), encoding="utf-8")
    address = f"{(tmp_path / 'framed.html').as_uri()}#open=3&row={LONG}"
    dom = browse(
        f'<pre id="measured"></pre><iframe src="{address}" width="{width}" height="900" style="border: 0"></iframe>'
        "<script></script>",
        "onmessage = (event) => { document.getElementById('measured').textContent = event.data; };",
    )
    found = json.loads(html.unescape(re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found["window"] == width
    assert found["opened"] == 1
    assert found["fails"] > 0
    assert found["page"] <= width
    assert found["wide"] == []
    assert found["beside"] <= 1
    assert min(found["parts"]) >= min(width - 64, 1400)
    if width >= 1400:
        assert found["parts"][0] <= width


def test_a_record_opens(run, browse):
    dom = browse(page([run], table([run])), at="#open=3")
    opened = dom[dom.index('class="detail"') :]
    assert html.escape(NASTY.strip(), quote=False).split("\u2028")[0] in opened
    assert opened.count('class="said"') == 2 * 7
    assert "<h4>Before</h4>" in opened
    assert "<mark" in opened
    assert "Drift allowed" in opened
    closed = browse(page([run], table([run])), "document.getElementById('record-3').click();", at="#open=3")
    assert 'class="detail"' not in closed
    other = browse(page([run], table([run])), "document.querySelectorAll('.open')[1].click();")
    assert other.count('class="detail"') == 1
    assert listed(other)[1] == int(re.search(r'aria-expanded="true" id="record-(\d+)"', other)[1])


def test_records_are_chosen_and_sorted(run, browse):
    relation = run.records[0].relation
    steps = f"""
const found = {{}};
const list = (name) => {{
  found[name] = [...document.querySelectorAll(".open")].map((each) => Number(each.id.slice(7)));
  found[name + ", said"] = document.getElementById("count").textContent + document.getElementById("place").textContent;
}};
const set = (id, value, event = "change") => {{
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event(event));
}};
document.getElementById("next").click(); list("next");
set("relation", {json.dumps(relation)}); list("relation"); set("relation", "");
set("which", "failed"); list("failed"); set("which", "");
set("text", "QUIST 1", "input"); list("text"); set("text", "", "input");
document.querySelector("[data-sort=drift]").click(); list("drift");
found.arrow = document.querySelector("[aria-sort]").getAttribute("aria-sort");
set("row", "ft"); set("order", "best"); list("ft");
const told = {{ id: "found", textContent: JSON.stringify(found) }};
document.body.append(Object.assign(document.createElement("pre"), told));
"""
    dom = browse(page([run], table([run])), steps)
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert len(found["next"]) == 10
    assert found["next, said"].endswith("51–60 of 60")
    assert set(found["relation"]) == {case for case, record in run.records.items() if record.relation == relation}
    assert found["failed"] == [5]
    assert set(found["text"]) == {case for case, each in run.records.items() if "Ada Quist 1" in each.rewrite.subject}
    drift = data([run], table([run]))["runs"][0]["rows"][1]["numbers"]["drift"]
    shown = [drift[case] for case in found["drift"]]
    assert shown == sorted((value for value in drift if value is not None), reverse=True)[:50]
    assert found["arrow"] == "descending"
    assert found["ft, said"].startswith("40 of 40 records; 20 of ft are still to come")
    least = data([run], table([run]))["runs"][0]["rows"][2]["numbers"]["drift"]
    assert found["ft"][0] == least.index(min(value for value in least if value is not None))


def test_addresses_of_other_pages_do_no_harm(run, browse):
    dom = browse(
        page([run], table([run])), at="#run=9&row=nobody&relation=x&sort=constructor&which=none&open=77&page=4&z=1"
    )
    assert "60 of 60 records" in dom
    assert "aria-sort" in dom


def test_what_goes_wrong_in_the_script_is_seen(run, browse):
    with pytest.raises(AssertionError, match="wrong indeed"):
        browse(page([run], table([run])), "throw new Error('wrong indeed');")


def test_pages_of_other_runs(tmp_path, browse):
    one, other = Run.load(counterfact_run(tmp_path / "a", 3)), Run.load(counterfact_run(tmp_path / "b", 5, ()))
    dom = browse(page([one, other], table([one, other])), at="#run=1&open=4")
    assert len(listed(dom)) == 5
    assert "<h4>After</h4>" not in dom
    zsre = Run.load(zsre_run(tmp_path / "z"))
    dom = browse(page([zsre], table([zsre])), at="#open=1")
    assert "2/2 tokens" in dom
    assert "Edited question" in dom
    begun = Run.load(write_run(tmp_path / "n", counterfact_records(3), {"unedited": []}))
    assert "0 of 0 records; 3 of unedited are still to come" in browse(page([begun], table([begun])))
