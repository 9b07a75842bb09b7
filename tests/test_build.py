"""A CounterFact of one's own facts: what a record may hold, what makes none, and what changes what."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.base.errors import ConfigError, FactError, ResultFileError
from errata.data.build import BuildConfig, Maker, build
from errata.data.counterfact import write_records
from errata.data.templates import Wordings, read_templates
from errata.data.triples import Triple, folded, read_texts, read_triples, uniform
from errata.tasks.records import read_records
from helpers.budget import examples

MAKERS = {
    "Norvik": ["Aurora", "Borea", "Cirrus", "Dione", "Erida", "Faro", "Gallo"],
    "Halden": ["Hespera", "Iliona", "Juno", "Kalypso", "Lumen", "Melita"],
    "Orsted": ["Naiad", "Oberon", "Pandora", "Quill", "Rhea"],
    "Solo": ["Sirius", "Titan"],
}
COLOURS = {
    "red": ["Aurora", "Cirrus", "Erida", "Gallo", "Iliona", "Kalypso", "Melita", "Oberon"],
    "blue": ["Borea", "Dione", "Faro", "Hespera", "Juno", "Lumen", "Naiad", "Pandora", "Titan"],
    "green": ["Quill", "Rhea", "Sirius"],
}
FACTS = [
    Triple(subject, relation, its_object)
    for relation, table in (("maker", MAKERS), ("colour", COLOURS))
    for its_object, subjects in table.items()
    for subject in subjects
]
WORDINGS = {
    "maker": Wordings(
        ("{} is made by", "The maker of {} is", "{} comes from", "Who sells {}? It is"),
        ("The factory of {} stands", "Parts of {} are sold by"),
    ),
    "colour": Wordings(("{} is painted", "The colour of {} is", "{} comes in"), prompt="{} has the colour"),
}
ALL = {"neighbors": 3}


def subject_of(prompt: str, wordings: Wordings) -> str:
    """The subject of a prompt, by its template."""
    found = set()
    for template in wordings.templates:
        before, after = template.split("{}")
        if prompt.startswith(before) and prompt.endswith(after):
            found.add(prompt[len(before) : len(prompt) - len(after)])
    return min(found, key=len)


def require_sound(built, facts, wordings, neighbors, paraphrases=2):
    """What holds of every record, whatever the facts."""
    truth = {fact.identity for fact in facts}
    names = [folded(f.subject) for f in facts]
    assert [record.case_id for record in built.records] == list(range(len(built.records)))
    for record in built.records:
        rewrite, of = record.rewrite, record.relation
        old, new = rewrite.fact.object, rewrite.new_object
        templates = wordings[of].templates

        def true(subject, its_object, of=of):
            return (folded(subject), folded(of), folded(its_object)) in truth

        assert true(rewrite.subject, old)
        assert not true(rewrite.subject, new)
        assert folded(new) not in (folded(old), folded(rewrite.subject))
        assert rewrite.prompt in templates
        assert len(set(record.paraphrase)) == paraphrases
        used = []
        for text in record.paraphrase:
            (template,) = [
                t for t in templates if text.endswith(" " + t.replace("{}", rewrite.subject)) and t != rewrite.prompt
            ]
            used.append(template)
            sentence = text.removesuffix(template.replace("{}", rewrite.subject))
            assert folded(rewrite.subject) not in folded(sentence).split()
        assert len(set(used)) == paraphrases
        for prompts, has, has_not in ((record.neighborhood, old, new), (record.attribute, new, old)):
            subjects = [subject_of(prompt, wordings[of]) for prompt in prompts]
            assert len(set(map(folded, subjects))) == len(prompts) == neighbors
            for subject in subjects:
                assert folded(subject) in names
                assert folded(subject) != folded(rewrite.subject)
                assert true(subject, has)
                assert not true(subject, has_not)
        own = [snippet.name for snippet in built.snippets.of(record)]
        assert own
        assert all(true(name, new) for name in own)
        assert rewrite.subject in [s.name for s in built.snippets.groups[of, old]]


def test_forty_facts_make_records_or_say_why_not():
    assert len(FACTS) == 40
    built = build(FACTS, WORDINGS, neighbors=3)
    require_sound(built, FACTS, WORDINGS, 3)
    made = {(r.rewrite.subject, r.relation) for r in built.records}
    assert {reason: {fact.object for fact in facts} for reason, facts in built.missed.items()} == {
        "its object has fewer than 3 other subjects": {"Solo", "green"}
    }
    assert len(made) == len(built.records) == 35
    for record in built.records:
        if record.relation == "colour":
            assert record.rewrite.prompt == "{} has the colour"
            assert record.generation == ()
        else:
            one, other = record.generation[:2]
            assert {one, other} == {t.replace("{}", record.rewrite.subject) for t in WORDINGS["maker"].generation}
            assert record.generation == (one, other) * 5
        others = COLOURS if record.relation == "maker" else MAKERS
        for text in record.paraphrase:
            assert text.split(". ")[0].split()[-1] in others  # the sentence tells of another relation


def test_the_order_of_the_table_and_copies_in_it_change_nothing():
    shuffled = random.Random(3).sample(FACTS + FACTS[:7], 47)
    assert build(shuffled, WORDINGS, **ALL) == build(FACTS, WORDINGS, **ALL)
    assert build(FACTS, WORDINGS, seed=1, **ALL).records != build(FACTS, WORDINGS, **ALL).records


def test_fewer_records_are_the_first_of_more():
    more = build(FACTS, WORDINGS, **ALL).records
    assert build(FACTS, WORDINGS, count=9, **ALL).records == more[:9]


def test_a_fact_more_moves_few_records():
    def by_fact(facts):
        made = build(facts, WORDINGS, **ALL).records
        return {(r.rewrite.subject, r.relation): dataclasses.replace(r, case_id=0) for r in made}

    before, after = by_fact(FACTS), by_fact([*FACTS, Triple("Umbra", "maker", "Halden")])
    assert after.keys() - before.keys() == {("Umbra", "maker")}
    same = sum(after[key] == record for key, record in before.items())
    others = [key for key in before if key[1] == "colour"]
    assert same >= len(before) / 2
    assert sum(after[key].neighborhood == before[key].neighborhood for key in others) == len(others)


def test_new_objects_are_drawn_by_frequency():
    sizes = {"a": 60, "b": 30, "c": 10}
    facts = [Triple(f"{name} {i}", "r", name) for name, size in sizes.items() for i in range(size)]
    facts += [Triple(f"d {i}", "r", "d") for i in range(400)]
    wordings = {"r": Wordings(("{} x", "{} y", "{} z"))}
    built = build(facts, wordings, neighbors=5)
    drawn = Counter(r.rewrite.new_object for r in built.records if r.rewrite.fact.object == "d")
    assert sum(drawn.values()) == 400
    for name, size in sizes.items():
        assert drawn[name] / 4 == pytest.approx(size, abs=3 * (size * (100 - size) / 400) ** 0.5), drawn


def test_what_is_true_is_no_new_object_no_neighbour_and_no_attribute():
    both = [Triple(subject, "maker", "Halden") for subject in MAKERS["Norvik"][:3]]
    facts = [f for f in FACTS if f.relation == "maker" and f.object in ("Norvik", "Halden")] + both
    built = build(facts, WORDINGS, neighbors=3)
    require_sound(built, facts, WORDINGS, 3)
    assert {r.rewrite.subject for r in built.records} == {*MAKERS["Norvik"][3:], *MAKERS["Halden"]}
    assert {f.subject for f in built.missed["its relation has no other object"]} == {f.subject for f in both}
    # of seven that have Norvik three have Halden too, so the others have three neighbours, not four
    built = build(facts, WORDINGS, neighbors=4)
    assert {f.subject for f in built.missed["no other object has 4 subjects of its own"]} >= {*MAKERS["Norvik"][3:]}


def test_the_subject_is_not_its_own_new_object():
    towns = ["Ada", "Bled", "Cork", "Deal"]
    facts = [Triple(f"{a} {i}", "twin", a) for a in towns for i in range(3)] + [Triple("ADA", "twin", "Bled")]
    wordings = {"twin": Wordings(("{} is the twin of", "The twin of {} is", "{} has a twin in"))}
    for seed in range(20):
        built = build(facts, wordings, neighbors=2, seed=seed)
        require_sound(built, facts, wordings, 2)


@pytest.mark.parametrize(
    ("facts", "wordings", "reason"),
    [
        (FACTS[:13], {"colour": WORDINGS["colour"]}, "its relation has no templates"),
        (FACTS[:13], {"maker": Wordings(("{} is by", "{} is of"))}, "its relation has fewer than 3 templates"),
        (FACTS[:7], WORDINGS, "its relation has no other object"),
        (FACTS[:9], WORDINGS, "no other object has 3 subjects of its own"),
        ([Triple("a", "maker", o) for o in "xyz"], WORDINGS, "its object has fewer than 3 other subjects"),
    ],
)
def test_why_a_fact_makes_no_record(facts, wordings, reason):
    built = build(facts, wordings, **ALL)
    assert reason in built.missed
    assert sum(map(len, built.missed.values())) + len(built.records) == len(facts)


def test_names_that_differ_in_case_and_space_and_form_are_one():
    cafe = ("Café  Noir", "Cafe\u0301 Noir", "CAFÉ NOIR", "Café Noir")
    facts = [Triple(name, " Maker ", maker) for name, maker in zip(cafe, ("Norvik", "NORVIK", " norvik", "Norvik"))]  # noqa: B905
    (one,) = uniform(facts, ["maker"])
    assert one == Triple("Café Noir", "maker", "Norvik")
    assert uniform([Triple("a", "r", "x"), Triple("A", "r", "x"), Triple("A", "R", "x")]) == (Triple("A", "r", "x"),)
    with pytest.raises(ConfigError, match="which are one relation"):
        build(FACTS, {"maker": WORDINGS["maker"], "Maker ": WORDINGS["maker"]})
    # a rewrite of Ada in other letters is never drawn against Ada's own truth
    facts = [*FACTS, *(Triple(s.upper(), "MAKER", "hALDEN") for s in MAKERS["Norvik"][:2])]
    require_sound(build(facts, WORDINGS, **ALL), facts, WORDINGS, 3)


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ann", "Ann", "bo", "李明", "É.", "c", "d e", "d  e", "f", "g", "h", "i{}", "j", "k"]),
            st.sampled_from(["r", "R", "q"]),
            st.sampled_from(["x", "X", " y", "y", "z", "ann", "中"]),
        ),
        min_size=1,
        max_size=60,
    ),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_whatever_the_facts_records_are_sound(rows, neighbors, seed):
    facts = [Triple(*row) for row in rows]
    wordings = {
        "r": Wordings(("{} @1", "{} @2", "@3 {} @3", "@4 {} @4"), ("{} @5",)),
        "q": Wordings(("{} #1", "#2 {} #2", "#3 {} #3")),
    }
    built = build(facts, wordings, neighbors=neighbors, seed=seed)
    assert sum(map(len, built.missed.values())) + len(built.records) == len(uniform(facts, wordings))
    require_sound_of_any(built, facts, wordings, neighbors)


def require_sound_of_any(built, facts, wordings, neighbors):
    truth = {fact.identity for fact in facts}
    for record in built.records:
        rewrite = record.rewrite
        old, new = folded(rewrite.fact.object), folded(rewrite.new_object)
        own = {o for s, r, o in truth if s == folded(rewrite.subject) and r == record.relation}
        assert old in own
        assert new not in own | {folded(rewrite.subject)}
        for prompts, has, has_not in ((record.neighborhood, old, new), (record.attribute, new, old)):
            subjects = {folded(subject_of(prompt, wordings[record.relation])) for prompt in prompts}
            assert len(subjects) == len(prompts) == neighbors
            assert folded(rewrite.subject) not in subjects
            for subject in subjects:
                assert (subject, record.relation, has) in truth
                assert (subject, record.relation, has_not) not in truth
        assert len(set(record.paraphrase)) == 2
        assert all(rewrite.subject in text for text in record.paraphrase)


def test_sentences_and_texts_of_ones_own():
    sentences = ("It rained on Aurora.", "The bus was late.", "Nobody knew.")
    texts = {"aurora": "Aurora is a lamp."}
    built = build(FACTS, WORDINGS, sentences=sentences, texts=texts, **ALL)
    for record in built.records:
        allowed = sentences[1:] if record.rewrite.subject == "Aurora" else sentences
        assert all(text.startswith(allowed) for text in record.paraphrase)
    by_name = {s.name: s.text for s in built.snippets.groups["maker", "Norvik"]}
    assert by_name.keys() == set(MAKERS["Norvik"])
    assert by_name["Aurora"] == "Aurora is a lamp."
    assert "Norvik." in by_name["Borea"]
    assert "blue." in by_name["Borea"]
    built = build(FACTS, WORDINGS, sentences=sentences[:1], **ALL)
    assert {f.subject for f in built.missed["no sentence for its paraphrases is without its subject"]} == {"Aurora"}


def test_a_name_is_a_word():
    facts = [*FACTS, Triple("A", "colour", "red")]
    (record,) = [r for r in build(facts, WORDINGS, **ALL).records if r.rewrite.subject == "A"]
    assert len(record.paraphrase) == 2


def test_new_objects_that_the_model_finds_more_likely_are_not_taken():
    asked = []

    def less_likely(rewrites):
        asked.append(len(rewrites))
        return [rewrite.new_object in ("Halden", "red") for rewrite in rewrites]

    built = build(FACTS, WORDINGS, less_likely=less_likely, **ALL)
    require_sound(built, FACTS, WORDINGS, 3)
    assert {r.rewrite.new_object for r in built.records} == {"Halden", "red"}
    refused = built.missed["no new object is less likely to the model"]
    assert {f.object for f in refused} == {"Halden", "red"}
    assert asked[0] == 35
    assert len(asked) == 2  # at most two other makers with enough subjects
    free = {(r.rewrite.subject, r.rewrite.new_object) for r in build(FACTS, WORDINGS, **ALL).records}
    kept = {(r.rewrite.subject, r.rewrite.new_object) for r in built.records}
    assert {pair for pair in free if pair[1] in ("Halden", "red")} <= kept


def test_chosen_facts_are_rewritten_and_the_others_are_true():
    chosen = [f for f in FACTS if f.object == "Halden"]
    built = build(FACTS, WORDINGS, chosen=chosen, **ALL)
    assert {r.rewrite.fact.object for r in built.records} == {"Halden"}
    require_sound(built, FACTS, WORDINGS, 3)
    assert not built.missed


def test_one_record_a_subject():
    built = build(FACTS, WORDINGS, once=True, **ALL)
    subjects = [r.rewrite.subject for r in built.records]
    assert len(set(subjects)) == len(subjects) == 19
    assert len(built.missed["another record is about its subject"]) == 16


def test_settings_are_checked():
    for wrong in ({"neighbors": 0}, {"neighbours": 3}, {"count": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            build(FACTS, WORDINGS, **wrong)
    with pytest.raises(ConfigError, match="given twice"):
        build(FACTS, WORDINGS, BuildConfig(), neighbors=3)


def test_a_record_of_ones_choice_has_what_there_is():
    maker = Maker(FACTS, WORDINGS, BuildConfig())
    record = maker.record(Triple("Titan", "maker", "Solo"), "Orsted", "{} is made by", case_id=7)
    assert (record.case_id, record.rewrite.prompt, len(record.neighborhood)) == (7, "{} is made by", 1)
    assert len(record.attribute) == 5


def test_records_go_through_the_published_schema(tmp_path):
    built = build(FACTS, WORDINGS, **ALL)
    write_records(tmp_path / "counterfact.json", built.records)
    assert read_records(tmp_path / "counterfact.json").records == built.records


# ---- tables -----------------------------------------------------------------------------------------------

ROWS = "subject{0}relation{0}object{0}text\nAda{0}maker{0}Norvik{0}Ada is old.\nada{0}colour{0}red{0}Ada is big.\n"


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_facts_are_read_from_tables(tmp_path, ending):
    import json

    path = tmp_path / f"t.{ending}"
    header, *lines = (line.split(",") for line in ROWS.format(",").splitlines())
    entries = [dict(zip(header, line, strict=True)) for line in lines]
    entries.append({"subject": " ADA ", "relation": "maker", "object": "norvik", "text": ""})
    entries.append({"subject": "Ada", "relation": "", "object": "norvik", "text": ""})
    if ending == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(entries), path)
    elif ending == "json":
        path.write_text(json.dumps(entries))
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, entries)))
    else:
        mark = "," if ending == "csv" else "\t"
        path.write_text(ROWS.format(mark) + "".join(mark.join(entry.values()) + "\n" for entry in entries[2:]))
    table = read_triples(path)
    assert [row.triple for row in table.rows] == [Triple("Ada", "maker", "Norvik"), Triple("ada", "colour", "red")]
    assert ["the same fact" in table.bad[0].reason, "no relation" in table.bad[1].reason] == [True, True]
    assert table.texts == {"ada": "Ada is old. Ada is big."}
    assert len(table.digest) == 64


def test_parquet_that_will_not_do(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ResultFileError, match="not a whole Parquet"):
        read_triples(tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"subject": ["a"], "relation": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(ResultFileError, match="needs subject, relation and object"):
        read_triples(tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match="by its ending"):
        read_triples(tmp_path / "none.parquet")
    numbers = arrow.table({"Subject": ["a", "b"], "relation": ["year"] * 2, "object": [1999, None]})
    parquet.write_table(numbers, tmp_path / "c.parquet")
    table = read_triples(tmp_path / "c.parquet")
    assert [row.triple.object for row in table.rows] == ["1999"]
    assert "no object" in table.bad[0].reason


def test_texts_are_read_from_a_table(tmp_path):
    (tmp_path / "t.csv").write_text("subject,text\nAda,Old.\nADA,Big.\nBo,\n")
    texts, bad, unit, _ = read_texts(tmp_path / "t.csv")
    assert texts == {"ada": "Old. Big."}
    assert [(each.line, unit) for each in bad] == [(4, "line")]


TEMPLATES = """relation,template,kind
maker,{} is made by,
maker,The maker of {} is,template
maker,{} comes from,prompt
maker,The factory of {} stands,generation
"""


def test_templates_are_read(tmp_path):
    (tmp_path / "t.csv").write_text(TEMPLATES)
    found, _ = read_templates(tmp_path / "t.csv")
    prompt = "{} comes from"
    wanted = Wordings(("{} is made by", "The maker of {} is"), ("The factory of {} stands",), prompt)
    assert found == {"maker": wanted}
    assert wanted.templates == (prompt, "{} is made by", "The maker of {} is")
    (tmp_path / "t.json").write_text('{"maker": {"templates": [" {} is made by ", "{} is made by"]}}')
    assert read_templates(tmp_path / "t.json")[0] == {"maker": Wordings(("{} is made by",))}


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("t.json", '{"r": {"templates": ["no slot"]}}', FactError, "relation 'r': the prompt 'no slot' has 0 places"),
        ("t.json", '{"r": {"templates": ["{} {}"]}}', FactError, "has 2 places"),
        ("t.json", '{"r": {"templates": ["{} a"], "generation": ["b"]}}', FactError, "has 0 places"),
        ("t.json", '{"r": {"templates": []}}', FactError, "there is no template"),
        ("t.json", '{"r": {"generations": ["{}"]}}', FactError, "may have"),
        ("t.json", '{"r": {"templates": "{} is"}}', FactError, "are lists"),
        ("t.json", '{"r": {"templates": ["{} is"], "prompt": 1}}', FactError, "is one text"),
        ("t.json", '{"r": {"templates": ["{} a"]}, "r": {"templates": ["{} b"]}}', FactError, "two entries 'r'"),
        ("t.json", '{" ": {"templates": ["{} a"]}}', FactError, "without a name"),
        ("t.json", "[]", ResultFileError, "has no templates"),
        ("t.json", "{", ResultFileError, "not JSON"),
        ("t.csv", "relation,template,kind\nr,{} is,odd\n", ResultFileError, "must be one of"),
        ("t.csv", "relation,template\nr,{} is\nr,is\n", FactError, "line 3: the prompt 'is' has 0 places"),
        ("t.csv", "relation,template,kind\nr,{} is,prompt\nr,{} was,prompt\n", FactError, "keep one"),
        ("t.csv", "relation,template\n,{} is\n", ResultFileError, "no relation"),
        ("t.txt", "", ConfigError, "by its ending"),
    ],
)
def test_templates_that_will_not_do(tmp_path, name, content, error, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_templates(tmp_path / name)
    with pytest.raises(ResultFileError, match="no file"):
        read_templates(tmp_path / "none.json")
