"""The paper's tables from run folders."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from statistics import harmonic_mean

import numpy as np
import pytest

from errata.base.errors import ConfigError
from errata.data.records import Record
from errata.evaluation import formats
from errata.evaluation.report import Row, Table, _beside, table
from errata.evaluation.results import Result, Run
from errata.models.scoring import Score
from errata.tasks.counterfact import COUNTERFACT
from errata.tasks.registry import task_of
from made_runs import counterfact_records, counterfact_run, failed, write_run, zsre_run


def said(record: Record, new: float, old: float, neighbour_new: float, tokens: int = 1, **more) -> Result:
    """A result of these probabilities per token: after own prompts, and of the new object after neighbours'."""

    def scores(p: float, q: float, prompts: tuple[str, ...]):
        return tuple((Score(tokens * math.log(p), tokens, 0), Score(math.log(q), 1, 0)) for _ in prompts)

    answers = {
        "rewrite": scores(new, old, ("",)),
        "paraphrase": scores(new, old, record.paraphrase),
        "neighborhood": scores(neighbour_new, old, record.neighborhood),
        "attribute": scores(new, old, record.attribute),
    }
    return Result(record.case_id, answers, **more)


@pytest.fixture
def run(tmp_path):
    """Four records; an editor with three right edits, a failure and a disabling one; one that is not done."""
    records = [replace(record, attribute=()) for record in counterfact_records(4)]
    results = {
        "unedited": [said(each, 0.1, 0.4, 0.1, seconds={"ask": 1.0}) for each in records],
        "rome": [
            said(records[0], 0.9, 0.1, 0.05, health={"disabling": True}, seconds={"edit": 2.0, "ask": 1.0}),
            said(records[1], 0.8, 0.1, 0.05, health={"disabling": False}, seconds={"edit": 2.0, "ask": 2.0}),
            said(records[2], 0.7, 0.1, 0.3, health={"disabling": False}, seconds={"edit": 2.0, "ask": 3.0}),
            failed(records[3]),
        ],
        "ft": [said(each, 0.9, 0.05, 0.6, tokens=2) for each in records[:2]],
    }
    return Run.load(write_run(tmp_path / "run", records, results))


def rows(found: Table, source: str = "run") -> dict[str, Row]:
    return {row.name: row for block in found.blocks for row in block if row.source == source}


def test_numbers_of_a_row(run):
    rome = rows(table([run]))["rome"]
    mean = {name: each.mean for name, each in rome.values.items()}
    # The failure counts as the unedited model: 0.1 against 0.4.
    assert mean["es"] == mean["ps"] == pytest.approx(0.75)
    assert mean["em"] == pytest.approx((0.8 + 0.7 + 0.6 - 0.3) / 4)
    assert mean["ns"] == pytest.approx(0.75)
    assert mean["nm"] == pytest.approx((0.05 + 0.05 - 0.2 + 0.3) / 4)
    assert mean["s"] == pytest.approx(0.75)
    half = 1.96 * np.std([0.8, 0.7, 0.6, -0.3], ddof=1) / 2
    assert rome.values["em"].high - mean["em"] == pytest.approx(half)
    assert (rome.measured, rome.of, rome.failures, rome.disabling) == (4, 4, 1, 1)
    assert rome.seconds == pytest.approx((3 + 4 + 5 + 0.1) / 4)
    assert "ats" not in rome.values
    assert "ge" not in rome.values


def test_what_no_row_has_is_no_column(run):
    assert [column.name for column in table([run]).columns] == ["s", "es", "em", "ps", "pm", "ns", "nm", "ge", "rs"]
    other = replace(run, settings={**run.settings, "model": "mine"})  # without the paper's rows
    assert [column.name for column in table([other]).columns] == ["s", "es", "em", "ps", "pm", "ns", "nm"]


def test_an_incomplete_row_says_so(run):
    found = table([run])
    ft = rows(found)["ft"]
    assert (ft.label, ft.complete, ft.failures, ft.disabling) == ("ft (2 of 4)", False, 0, None)
    assert "| ft (2 of 4) |" in formats.markdown(found)
    assert "2 of 4" in [cell.text for _, lines in formats.panels(found)[1].blocks for x in lines for cell in x.cells]


def test_a_record_that_the_model_itself_cannot_be_asked_is_no_failure_of_an_editor(tmp_path):
    records = counterfact_records(3)
    results = {name: [said(each, 0.1, 0.4, 0.1) for each in records[:2]] for name in ("unedited", "rome")}
    for each in results.values():
        each.append(failed(records[2], "a prompt of 2000 tokens"))
    found = rows(table([Run.load(write_run(tmp_path / "r", records, results))]))
    assert (found["rome"].failures, found["rome"].measured, found["unedited"].measured) == (0, 2, 2)


def test_probability_of_all_tokens(run):
    per_token, total = (rows(table([run], kind))["ft"].values["em"].mean for kind in ("per_token", "total"))
    assert per_token == pytest.approx(0.9 - 0.05)
    assert total == pytest.approx(0.81 - 0.05)


def test_marks(run):
    found = rows(table([run]))
    assert found["unedited"].strong == found["unedited"].fails == frozenset()
    assert {"ns", "nm", "s"} <= found["rome"].strong
    assert {"es", "em", "ps", "pm"} <= found["ft"].strong
    # ft: neighbours' new object 0.36 or 0.6 against 0.05; rome: three of four are right
    assert {"ns", "nm"} <= found["ft"].fails
    assert found["rome"].fails == frozenset()


def test_what_fails_is_measured_against_the_unedited_model(tmp_path):
    found = rows(table([Run.load(counterfact_run(tmp_path / "r", 150, ("rome", "ft", "kn")))]))
    assert {"es", "em", "ps", "pm", "ge"} <= found["kn"].fails
    assert "ge" not in found["ft"].fails
    assert {"ns", "nm"} <= found["ft"].fails
    assert not found["rome"].fails
    assert found["unedited"].fails == frozenset()


def test_one_editor_is_not_the_best(tmp_path):
    row = rows(table([Run.load(zsre_run(tmp_path / "z"))]))["rome"]
    assert row.strong == frozenset()


def test_only_the_unedited_model(tmp_path):
    found = table([Run.load(counterfact_run(tmp_path / "r", 5, (), "mine"))], compare=None)
    assert [row.name for row in found.blocks[0]] == ["unedited"]
    assert formats.markdown(found)
    assert formats.latex(found)


def test_a_run_that_has_just_begun(tmp_path):
    found = table([Run.load(write_run(tmp_path / "r", counterfact_records(3), {"unedited": []}, "mine"))])
    assert found.columns == ()
    assert rows(found)["unedited"].label == "unedited (0 of 3)"
    for kind in ("markdown", "latex", "csv", "json"):
        assert "unedited" in formats.as_text(found, kind)


def test_bootstrap(tmp_path):
    run = Run.load(counterfact_run(tmp_path / "r", 60))
    one, two = (rows(table([run], interval=way))["ft"].values["ns"] for way in ("normal", "bootstrap"))
    assert one.mean == two.mean
    assert two.low != one.low
    assert two.low == pytest.approx(one.low, abs=0.03)
    shown = table([run], interval="bootstrap")
    assert re.search(r"\[\d+\.\d, \d+\.\d\]", formats.markdown(shown))
    assert "resamples" in shown.legend()[2]


# ---- the paper's rows ----


@pytest.mark.parametrize("model", COUNTERFACT.paper)
def test_published_scores_are_the_harmonic_means_of_their_parts(model):
    for s, es, _, ps, _, ns, *_ in COUNTERFACT.paper[model].rows.values():
        assert s == pytest.approx(harmonic_mean([es, ps, ns]), abs=0.11)


@pytest.mark.parametrize(
    ("kind", "model", "name", "editor", "number"),
    [
        ("counterfact", "openai-community/gpt2-xl", "", "", ("s", 30.5)),
        ("counterfact", "gpt2-xl", "rome", "ROME", ("s", 89.2)),
        ("counterfact", "EleutherAI/gpt-j-6B", "ft_l", "FT+L", ("ns", 78.6)),
        ("counterfact", "/models/gpt-j-6b/", "mend", "MEND", ("es", 97.4)),
        ("zsre", "D:\\models\\gpt2-xl", "KE-zsre", "KE-zsRE", ("paraphrase", 90.0)),
    ],
)
def test_published_rows(kind, model, name, editor, number):
    found = task_of(kind).paper_row(model, name)
    assert (found.editor, found.numbers[number[0]]) == (editor, number[1])


@pytest.mark.parametrize(
    ("kind", "model", "name"),
    [
        ("counterfact", "gpt2", "rome"),
        ("zsre", "gpt-j-6b", "rome"),
        ("counterfact", "gpt2-xl", "mine"),
        ("counterfact", "gpt2-xl", "+"),
        ("counterfact", "gpt2-xl-mine", ""),
        ("counterfact", "someone/distilgpt2-xl", ""),
        ("counterfact", "gpt2-xl/merged", ""),
    ],
)
def test_the_paper_has_no_such_row(kind, model, name):
    assert task_of(kind).paper_row(model, name) is None


def test_each_of_the_papers_rows_stands_beside_one_and_the_one_called_so_first():
    found = _beside(COUNTERFACT, "gpt2-xl", {"deep": "rome", "rome": "rome", "mine": "ft", "other": "ft", "new": ""})
    assert {row: paper.editor for row, paper in found.items()} == {"rome": "ROME", "mine": "FT"}
    assert list(_beside(COUNTERFACT, "gpt2-xl", {"ft_l": "ft", "FT+L": "ft-l", "kn": "kn"})) == ["ft_l", "kn"]


def test_the_papers_row_stands_below(run):
    names = [(row.name, row.source) for row in table([run]).blocks[0]]
    assert names == [
        ("unedited", "run"),
        ("unedited", "paper"),
        ("rome", "run"),
        ("ROME", "paper"),
        ("ft", "run"),
        ("FT", "paper"),
    ]


def test_the_editor_of_a_row_counts_where_its_name_says_nothing(tmp_path):
    records = counterfact_records(2)
    results = {name: [said(each, 0.1, 0.4, 0.1) for each in records] for name in ("unedited", "layer-5")}
    folder = write_run(tmp_path / "r", records, results, editors={"layer-5": "rome"})
    assert [row.name for row in table([Run.load(folder)]).blocks[0]][-1] == "ROME"


# ---- differences ----


def test_differences_are_paired(run):
    row = table([run], compare=("rome", "unedited")).differences[0]
    assert row.values["em"].mean == pytest.approx((0.8 + 0.7 + 0.6 - 0.3) / 4 + 0.3)
    half = 1.96 * np.std([1.1, 1.0, 0.9, 0.0], ddof=1) / 2
    assert row.values["em"].high - row.values["em"].mean == pytest.approx(half)
    assert row.measured == 4
    assert "em" in row.strong
    assert "ns" not in row.strong
    assert table([run], compare=("rome", "ft")).differences[0].measured == 2


def test_differences_of_several_runs(tmp_path):
    runs = [
        Run.load(counterfact_run(tmp_path / "a", 20)),
        Run.load(counterfact_run(tmp_path / "b", 20, ("rome",), "gpt-j-6b")),
    ]
    assert [row.model for row in table(runs, compare=("rome", "unedited")).differences] == ["gpt2-xl", "gpt-j-6b"]
    found = table(runs, compare=("rome", "ft"))
    assert [row.run for row in found.differences] == [tmp_path / "a"]
    assert "*gpt-j-6b*" in formats.markdown(found)
    assert "gpt2-xl, gpt-j-6b" in found.title


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("roem", "ft"), "did you mean rome"),
        (("xyz", "ft"), "choose from unedited, rome, ft"),
        (("ft", "ft"), "itself"),
    ],
)
def test_rows_that_cannot_be_compared(run, names, message):
    with pytest.raises(ConfigError, match=message):
        table([run], compare=names)


def test_rows_of_different_runs_cannot_be_compared(tmp_path):
    runs = [Run.load(counterfact_run(tmp_path / name, 3, (name,))) for name in ("rome", "ft")]
    with pytest.raises(ConfigError, match="no run has both"):
        table(runs, compare=("rome", "ft"))


def test_runs_that_do_not_belong_together(tmp_path):
    one, other = Run.load(counterfact_run(tmp_path / "c", 2)), Run.load(zsre_run(tmp_path / "z"))
    with pytest.raises(ConfigError, match=r"of CounterFact and .* of zsRE"):
        table([one, other])
    with pytest.raises(ConfigError, match="twice"):
        table([one, Run.load(tmp_path / "c" / ".." / "c")])
    with pytest.raises(ConfigError, match="no run"):
        table([])


# ---- texts ----


def test_values_as_they_are_shown():
    column = {each.name: each for each in COUNTERFACT.columns}
    assert column["es"].shown(0.75) == "75.0"
    assert column["em"].shown(-0.0483) == "−4.8"
    assert column["em"].shown(-0.0001) == "0.0"
    assert column["ge"].shown(6.266) == "626.6"
    assert column["essence"].shown(21.14) == "21.1"
    assert column["essence"].shown(1.5e7) == "1.5e+07"
    assert column["es"].shown(math.nan) == "–"


def test_markdown(run):
    text = formats.markdown(replace_model(run, "a|b_c*"))
    assert r"a\|b\_c\*" in text
    for part in text.split("\n\n")[1:4:2]:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in part.splitlines()}) == 1
    assert re.search(r"\| \*\*90\.0 ±0\.0\*\* \|", text) is None
    assert re.search(r"\| 0\.0 ±0\.0 \|", text)
    assert " ✗ |" in text


def replace_model(run: Run, model: str) -> Table:
    return table([replace(run, settings={**run.settings, "model": model})])


def test_latex(run):
    text = formats.latex(replace_model(run, "50%_{model}&co\\~^#$"))
    assert r"50\%" not in text  # a lone model stands in a comment only
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"\textcolor{red}{" in text
    assert r"\textbf{" in text
    assert r"\multicolumn{2}{c}{Efficacy}" in text
    for block in re.findall(r"\\begin{tabular}{(l+r*)}(.*?)\\end{tabular}", text, re.DOTALL):
        for line in block[1].splitlines():
            if line.endswith(r"\\") and "multicolumn" not in line:
                assert line.count("&") == len(block[0]) - 1
    assert not re.search(r"[±−–×ᶜ]", text.split("\n", 3)[3])


def test_latex_escapes_names_of_models(tmp_path):
    runs = [
        Run.load(counterfact_run(tmp_path / name, 3, (), model)) for name, model in (("a", "x_1&%"), ("b", "y\\{}#$~^"))
    ]
    text = formats.latex(table(runs))
    assert r"\emph{x\_1\&\%}" in text
    assert r"\emph{y\textbackslash{}\{\}\#\$\textasciitilde{}\textasciicircum{}}" in text


SIGNS = "[a]& 50% _x_ #1 {b} ~c~ ^d^ $e$ \\f *g* `h` <i> |j|"


def two_models(tmp_path, *models) -> Table:
    """Headings with the names of models, which a table of one model has not."""
    return table([Run.load(counterfact_run(tmp_path / str(i), 3, (), model)) for i, model in enumerate(models)])


def test_signs_that_latex_takes_for_its_own(tmp_path):
    text = formats.latex(two_models(tmp_path, SIGNS, "\x1b[31m*"))
    wanted = r"{}[a]\& 50\% \_x\_ \#1 \{b\} \textasciitilde{}c\textasciitilde{} \textasciicircum{}d\textasciicircum{} "
    wanted += r"\$e\$ \textbackslash{}f *g* `h` $<$i$>$ |j|"
    assert rf"\emph{{{wanted}}}" in text
    assert "\x1b" not in text
    for line in text.splitlines():  # all that is left are LaTeX's own
        bare = re.sub(r"\\([&%$#_{}\\]|[a-z]+)|\$[^$]*\$", "", line)
        assert not re.search(r"[#_~^$]", bare) or line.startswith("%"), line
        assert line.startswith("%") or bare.count("{") == bare.count("}")


def test_names_that_latex_would_take_for_arguments_of_the_line_before(run):
    row = table([run]).blocks[0][0]
    for name in ("[5pt] mine", "*mine"):
        text = formats.latex(Table(COUNTERFACT, "per_token", "normal", (), ((replace(row, short=name),),)))
        assert f"\\midrule\n{{}}{name} &" in text


def test_signs_that_markdown_takes_for_its_own(tmp_path):
    text = formats.markdown(two_models(tmp_path, SIGNS, "\x1b[31m*"))
    wanted = r"\[a\]&amp; 50% \_x\_ #1 {b} \~c\~ ^d^ \$e\$ \\f \*g\* \`h\` &lt;i&gt; \|j\|"
    assert f"| *{wanted}* |" in text
    assert r"| *\\x1b\[31m\** |" in text


def test_markdowns_notes_are_text(run):
    row = replace(table([run]).blocks[0][0], short="a", name="<b>_c_*")
    notes = formats.markdown(Table(COUNTERFACT, "per_token", "normal", (), ((row,),))).rsplit("\n\n", 1)[1]
    assert r"a is &lt;b&gt;\_c\_\*." in notes


def test_csv_and_json_hold_fractions(run):
    found = table([run], compare=("rome", "ft"))
    lines = list(csv.DictReader(io.StringIO(formats.as_csv(found))))
    assert [line["source"] for line in lines] == ["run", "paper"] * 3 + ["difference"]
    rome = lines[2]
    assert (rome["row"], rome["failures"], rome["measured"]) == ("rome", "1", "4")
    assert float(rome["es_mean"]) == 0.75
    assert lines[3]["es_mean"] == "1.0"
    assert lines[3]["es_low"] == rome["ge_mean"] == ""
    said = json.loads(formats.as_text(found, "json"))
    assert said["rows"][2]["values"]["es"]["mean"] == 0.75
    assert said["rows"][3]["values"]["em"] == {"mean": 0.979, "low": None, "high": None, "count": 7500, "missing": 0}
    assert said["rows"][4]["fails"] == ["nm", "ns"]
    assert [row["name"] for row in said["differences"]] == ["rome − ft"]


def test_zsre(tmp_path):
    found = table([Run.load(zsre_run(tmp_path / "z"))])
    assert [column.symbol for column in found.columns] == ["Efficacy", "Paraphrase", "Specificity"]
    row = rows(found)["rome"]
    assert [each.mean for each in row.values.values()] == [1.0, 1.0, 0.5]
    assert rows(found, "paper")["ROME"].values["paraphrase"].mean == 0.881
    assert "P is" not in " ".join(found.legend())


LONG = ("ft-l-layer=2,epsilon=0.0005", "ft-l-layer=3,epsilon=0.0005")


@pytest.fixture
def long_names(tmp_path) -> Table:
    """A table of a run whose editors have long automatic names, with the difference of two of them."""
    records = counterfact_records(4)
    results = {name: [said(each, 0.9, 0.1, 0.1) for each in records] for name in ("unedited", "rome", "ft-l", *LONG)}
    return table([Run.load(write_run(tmp_path / "run", records, results, "mine"))], compare=LONG)


def test_the_title_names_the_set(long_names):
    assert replace(long_names, sets=("my set",)).title == "CounterFact's numbers on my set: mine"


def test_long_automatic_names_are_short_in_tables_and_told_in_the_legend(long_names):
    assert [row.label for row in long_names.blocks[0]] == ["unedited", "rome", "ft-l", "ft-l#2", "ft-l#3"]
    assert [row.name for row in long_names.blocks[0]][3:] == [*LONG]
    assert [row.label for row in long_names.differences] == ["ft-l#2 − ft-l#3"]
    assert f"ft-l#2 is {LONG[0]}; ft-l#3 is {LONG[1]}." in long_names.legend()


def test_long_names_in_markdown_and_latex_stand_in_the_notes_alone(long_names):
    markdown, latex = formats.markdown(long_names), formats.latex(long_names)
    for text, minus in ((markdown, "| ft-l#2 − ft-l#3 |"), (latex, r"ft-l\#2 $-$ ft-l\#3 &")):
        tables, notes = text.rsplit("\n\n", 1)
        assert minus in tables
        for name in LONG:
            assert name not in tables
            assert notes.count(name) == 1


def test_long_names_in_csv_and_json_stand_beside_the_short_ones(long_names):
    lines = list(csv.DictReader(io.StringIO(formats.as_csv(long_names))))
    wanted = [("unedited", ""), ("rome", ""), ("ft-l", ""), (LONG[0], "ft-l#2"), (LONG[1], "ft-l#3")]
    difference = (f"{LONG[0]} − {LONG[1]}", "ft-l#2 − ft-l#3")
    assert [(line["row"], line["short"]) for line in lines] == [*wanted, difference]
    held = json.loads(formats.as_text(long_names, "json"))
    assert [(row["name"], row["short"]) for row in (*held["rows"], *held["differences"])] == [*wanted, difference]


@pytest.mark.parametrize("kind", ["per_token", "total"])
def test_every_format_says_what_its_probabilities_are_of(run, kind):
    found = table([run], kind)
    words = {"per_token": "exp of the mean log-probability per token", "total": "of all tokens"}[kind]
    for text in (formats.markdown(found), formats.latex(found), " ".join(found.legend())):
        assert f"P is the object's probability, {words}." in text
    lines = list(csv.DictReader(io.StringIO(formats.as_csv(found))))
    assert {line["probability"] for line in lines} == {kind} == {formats.as_json(found)["probability"]}
