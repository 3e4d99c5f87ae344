"""What the page says of the price: numbers with intervals, answers side by side, damage; and of a forged price.json."""

import copy
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_cpo.cli import main
from trl_cpo.report import price, price_section
from trl_cpo.report.page import render
from trl_cpo.report.reading import of_runs, read_run, read_runs

from helpers.report_looks import Page
from helpers.run_folders import make_run, price_document


def priced(folder, document, **made):
    """A run's folder with this price.json in it."""
    made = make_run(folder, steps=60, **made)
    (made / "price.json").write_text(json.dumps(document))
    return made


def page_of(*folders) -> Page:
    runs = read_runs(folders)
    return Page(render(runs, of_runs(runs), []))


def test_numbers_stand_on_the_page_with_their_intervals(tmp_path):
    page = page_of(priced(tmp_path / "r", price_document(kl=0.5)))
    assert [attributes["class"] for tag, attributes in page.tags if tag == "table"][:3] == ["runs", "metrics", "metrics price"]
    for text in ("0.500", "0.450 to 0.550", "27.0\u00a0%", "26.0 to 28.0", "15.000", "14.500 to 15.500", "step 60", "step 0"):
        assert text in page.text, text
    for text in (
        "The price: a KL of 0.500 nats per token to the reference; ",
        "27.0\u00a0% repeated 3-grams in greedy answers, 2.0\u00a0% before.",
    ):
        assert text in page.text, text
    # 5 numbers on 2 sets of prompts, each at the start and at the end.
    (run,) = read_runs([tmp_path / "r"])
    found = price_section.rows([run])
    assert len(found) == 10 and all(None not in row["cells"][0] for row in found)


def test_answers_stand_side_by_side_before_and_after(tmp_path):
    page = page_of(priced(tmp_path / "r", price_document(steps=(0, 30, 60))))
    for prompt in ("What is a leek?", "Why rest?"):
        before, after = (page.text.index(f"An answer to {prompt!r} at step {step}.") for step in (0, 60))
        assert page.text.index("before, step 0") < before < after
    assert "at step 30" not in page.text
    assert sum(attributes.get("class") == "sample" for _, attributes in page.tags) == 4


def test_an_answer_that_runs_share_is_shown_once(tmp_path):
    folders = [
        priced(tmp_path / name, price_document(kl=kl), seed=seed) for seed, (name, kl) in enumerate([("a", 1), ("b", 2)])
    ]
    document = json.loads((folders[1] / "price.json").read_text())
    document["measurements"][1]["sets"]["pairs"]["samples"][0]["greedy"] = "Another answer."
    (folders[1] / "price.json").write_text(json.dumps(document))
    first = price_section.samples(read_runs(folders))[0]
    assert first["prompt"] == "What is a leek?"
    assert [names for names, _ in first["answers"]] == [
        "A, B before, step 0",
        "A after, step 60",
        "B after, step 60",
    ]


def test_damage_is_told_before_all_else(tmp_path):
    sentence = "Greedy answers repeat themselves: this model is damaged; lower the learning rate."
    good, bad = (
        priced(tmp_path / "good", price_document()),
        priced(tmp_path / "bad", price_document(damage=(sentence,)), seed=1),
    )
    page = page_of(good, bad)
    assert f"B: {sentence}" in page.text
    assert page.text.index(sentence) < page.text.index("Notes") < page.text.index("Runs")
    assert "damage" in [attributes.get("id") for _, attributes in page.tags]
    assert "damage" not in [attributes.get("id") for _, attributes in page_of(good).tags]


def test_damage_without_price_json_is_that_of_the_summary(tmp_path):
    folder = make_run(tmp_path / "r", kl=0.9)
    record = json.loads((folder / "metrics.json").read_text())
    record["price"] = {
        "words": "…",
        "damage": ["it is 0.9 nats a token from its reference"],
        "missing": [7, "no general prompts"],
    }
    (folder / "metrics.json").write_text(json.dumps(record))
    page = page_of(folder)
    assert "This model is damaged" in page.text and "it is 0.9 nats a token from its reference" in page.text
    assert "The price was not measured in whole: no general prompts" in page.text


def test_what_the_programs_own_writer_says_is_read(tmp_path):
    """The document of price.json and the metrics of the log, as a run writes them."""
    from trl_cpo.price.document import AnswerRecord, Price, SetPrice

    records = [AnswerRecord(place, f"p{place}", "a b a b", place, 4, 5, True, 0.5 * place, 5) for place in range(4)]
    sets = {"pairs": SetPrice.of(records), "general": SetPrice.of(records[:2])}
    written = Price(60, sets, {"chosen": 1.5, "text": 2.5}, 3.0, ["no text"], ["it is far from its reference"])
    run = read_run(priced(tmp_path / "r", {"format": 1, "measurements": [written.to_dict()]}))
    assert run.notes == []
    (got,) = run.prices
    assert (got.step, got.damage, got.missing) == (60, ("it is far from its reference",), ("no text",))
    for name, part in sets.items():
        assert list(got.sets[name].answers) == [sample["prompt"] for sample in part.samples]
        for key in ("kl", "kl_response", "repetition", "tokens", "ended"):
            assert vars(got.sets[name].numbers[key]) == getattr(part, key).to_dict()
    logged = price.of_metrics(60, written.metrics().get)
    for name, part in got.sets.items():
        assert {key: one.value for key, one in part.numbers.items()} == {
            key: one.value for key, one in logged.sets[name].numbers.items()
        }
    assert [row["of"] for row in price_section.rows([run])][5:7] == ["held-out chosen answers", "the text given"]


def test_damage_of_an_earlier_measurement_is_not_that_of_the_model(tmp_path):
    document = price_document(damage=("broken",))
    document["measurements"].append({**document["measurements"][1], "step": 70, "damage": []})
    assert price_section.damage(read_run(priced(tmp_path / "r", document))) == []


def test_hostile_texts_are_shown_and_do_nothing(tmp_path):
    attack = "</p></div><img src=x onerror=alert(1)><script>alert(1)</script>{{ 7 * 7 }}\u202e\x1b[2J\ud800"
    document = price_document(damage=(attack,), prompts=(attack,))
    for measurement in document["measurements"]:
        measurement["sets"]["pairs"]["samples"][0]["greedy"] = attack
    page = page_of(priced(tmp_path / "r", document))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})
    assert page.text.count("<script>alert(1)</script>{{ 7 * 7 }}\\u202e\\u001b[2J\\ud800") >= 4


def test_long_texts_and_many_prompts_are_cut(tmp_path):
    document = price_document(prompts=tuple(f"prompt {place}" for place in range(9)), damage=("bad",) * 20)
    document["measurements"][1]["sets"]["pairs"]["samples"][0]["greedy"] = "12:" * 5000
    (run,) = read_runs([priced(tmp_path / "r", document)])
    shown = price_section.samples([run])
    assert [sample["prompt"] for sample in shown] == 2 * [f"prompt {place}" for place in range(price_section.MOST_PROMPTS)]
    assert shown[0]["answers"][1][1].endswith(" … (15000 characters in all)") and len(shown[0]["answers"][1][1]) < 1600
    assert (
        price_section.damage(run)[-1] == "And 12 more." and len(price_section.damage(run)) == price_section.MOST_SENTENCES + 1
    )


def test_without_price_json_the_log_gives_the_numbers(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "r", evaluate_every=20, kl=0.5)])
    assert run.notes == [] and [measurement.step for measurement in run.prices] == [0, 20, 40, 60]
    found = price_section.rows([run])
    assert [(row["of"], row["cells"]) for row in found] == [
        ("the pairs' prompts", [(("0.000", ""), ("0.500", ""))]),
        ("general prompts", [(("0.000", ""), ("0.050", ""))]),
    ]
    assert price_section.samples([run]) == [] and page_of(make_run(tmp_path / "old")).text.count("What it cost") == 0


def test_what_price_json_lacks_comes_from_the_log(tmp_path):
    folder = priced(tmp_path / "r", price_document(), kl=0.25)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log[-1] |= {"eval_cpo/chosen_nll": 2.5}
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    (run,) = read_runs([folder])
    numbers = run.prices[-1].sets["pairs"].numbers
    assert numbers["chosen_nll"] == price.Estimate(2.5) and numbers["kl"].value == 0.5 and numbers["kl"].low == 0.45


def set_at(document, path, value):
    """A copy of the document with one value replaced, or removed where the value is `...`."""
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


M = ("measurements", 1)
KL = (*M, "sets", "pairs", "kl")
FORGED = {
    "another format": (("format",), 2, "has format 2; this version reads format 1"),
    "format true": (("format",), True, "has format True"),
    "no format": (("format",), ..., "has format None"),
    "measurements": (("measurements",), {}, "measurements must be a list; got an object"),
    "no measurements": (("measurements",), ..., "it holds no measurements"),
    "a measurement": (M, 7, "measurements[1] needs a whole number of 0 or more as its step; got 7"),
    "no step": ((*M, "step"), ..., "as its step; got None"),
    "step": ((*M, "step"), -1, "as its step; got -1"),
    "step true": ((*M, "step"), True, "as its step; got True"),
    "huge step": ((*M, "step"), 10**400, "as its step; got a huge number"),
    "sets": ((*M, "sets"), [1], "measurements[1].sets must be an object; got a list"),
    "a set": ((*M, "sets", "general"), "x", "measurements[1].sets.general must be an object; got 'x'"),
    "an estimate": (KL, 0.5, "sets.pairs.kl must be an object with value, low and high; got 0.5"),
    "negative KL": ((*KL, "value"), -0.5, "kl.value must be a number from 0 to 1e+09; got -0.5"),
    "text": ((*KL, "value"), "0.5", "kl.value must be a number from 0 to 1e+09; got '0.5'"),
    "NaN": ((*KL, "value"), math.nan, "kl.value must be a number"),
    "infinite": ((*KL, "value"), math.inf, "kl.value must be a number"),
    "huge": ((*KL, "value"), 10**400, "got a huge number"),
    "interval beside its value": ((*KL, "high"), 0.1, "the interval 0.45 to 0.1 must hold the value 0.5"),
    "interval of text": ((*KL, "low"), "0", "the interval '0' to 0.55 must hold the value 0.5"),
    "a share above 1": ((*M, "sets", "pairs", "repetition", "value"), 1.5, "repetition.value must be a number from 0 to 1"),
    "samples": ((*M, "sets", "pairs", "samples"), "x", "samples must be a list; got 'x'"),
    "a sample": ((*M, "sets", "pairs", "samples", 0), {"prompt": "x"}, "samples[0] needs the texts prompt and greedy"),
    "an answer": ((*M, "sets", "pairs", "samples", 0, "greedy"), None, "samples[0] needs the texts prompt and greedy"),
    "prompts": ((*M, "sets", "pairs", "prompts"), -3, "prompts must be a whole number of 0 or more; got -3"),
    "likelihoods": ((*M, "nll"), 3, "measurements[1].nll must be an object; got 3"),
    "a likelihood": ((*M, "nll"), {"chosen": "x"}, "nll.chosen.value must be a number from 0 to 1e+09; got 'x'"),
    "missing": ((*M, "missing"), "x", "missing must be a list; got 'x'"),
    "damage": ((*M, "damage"), {"a": 1}, "damage must be a list; got an object"),
    "a sentence": ((*M, "damage"), [None, "fine"], "damage[0] must be a sentence; got None"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_what_is_forged_is_said_and_left_out(tmp_path, forgery):
    path, value, says = FORGED[forgery]
    folder = priced(tmp_path / "r", set_at(price_document(), path, value))
    (note,) = read_run(folder).notes
    assert note.startswith("price.json") and says in note and len(note) < 300
    page = page_of(folder)
    assert says in page.text and "nan" not in page.text.lower().replace("got nan", "")


@pytest.mark.parametrize(
    "path", [KL, (*KL, "low"), (*KL, "value"), (*M, "sets"), (*M, "damage"), (*M, "seconds"), (*M, "sets", "general")]
)
def test_what_is_missing_is_missed_in_silence(tmp_path, path):
    folder = priced(tmp_path / "r", set_at(price_document(), path, ...))
    assert read_run(folder).notes == []
    page_of(folder)


def test_a_file_that_is_no_json_and_many_faults_are_one_note(tmp_path):
    folder = priced(tmp_path / "r", {})
    (folder / "price.json").write_text('{"format": 1')
    assert "price.json cannot be read" in " ".join(read_run(folder).notes)
    (folder / "price.json").write_text(json.dumps({"format": 1, "measurements": [None] * 1000}))
    (note,) = read_run(folder).notes
    assert "and 996 more" in note and len(note) < 500


def test_of_two_measurements_at_a_step_the_later_counts(tmp_path):
    document = price_document(steps=(60, 0))
    document["measurements"].append(price_document(kl=2.0)["measurements"][1])
    run = read_run(priced(tmp_path / "r", document))
    assert [measurement.step for measurement in run.prices] == [0, 60]
    assert run.prices[-1].sets["pairs"].numbers["kl"].value == 2.0


def keys() -> st.SearchStrategy[str]:
    names = [
        "format",
        "measurements",
        "step",
        "sets",
        "pairs",
        "general",
        "samples",
        "prompt",
        "greedy",
        "damage",
        "value",
        "low",
    ]
    return st.sampled_from([*names, "high", "prompts", *price.NUMBERS]) | st.text(max_size=3)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys(), inner, max_size=6),
    max_leaves=14,
)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=JUNK, of_pairs=JUNK, whole=st.booleans())
def test_no_price_json_whatever_it_holds_stops_the_page(tmp_path, junk, of_pairs, whole):
    document = (
        junk if whole else {"format": 1, "measurements": [{"step": 0, "sets": {"pairs": of_pairs}, "damage": junk}, junk]}
    )
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / "price.json").write_text(json.dumps(document))
    page_of(tmp_path)


def test_programs_get_the_last_measurement(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_cpo.report.pictures.KINDS", ())
    assert main(["report", str(priced(tmp_path / "r", price_document(damage=("broken \ud800",)))), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["price"]["step"] == 60 and run["price"]["damage"] == ["broken \\ud800"]
    assert run["price"]["sets"]["pairs"]["kl"] == {"value": 0.5, "low": 0.45, "high": 0.55}
