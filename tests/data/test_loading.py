"""Where pairs come from: every local kind, the hub's call, the forms allowed, and errors that say what to do."""

import gzip
import json
import os
import subprocess
import sys

import datasets
import pytest

from trl_cpo.data import hh
from trl_cpo.data import loading as sources
from trl_cpo.data.loading import SourceError, hold_out, load_pairs, to_conversational

from helpers.hh_text import converted as converted_one_by_one


def hh_row(n: int) -> dict:
    return {"chosen": f"\n\nHuman: Q{n}\n\nAssistant: I say yes", "rejected": f"\n\nHuman: Q{n}\n\nAssistant: I say no"}


ROWS = [hh_row(n) for n in range(6)]
BROKEN = {"chosen": "no dialogue", "rejected": "\n\nHuman: Q\n\nAssistant: A"}
USER, YES, NO = ({"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "Yes"), ("assistant", "No")))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    # Not inside tmp_path: datasets would take its files for data of the folder under test.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets_cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_file(path, rows):
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.json", "p.parquet"])
def test_single_file_is_all_train(tmp_path, name, streaming):
    path = write_file(tmp_path / name, ROWS)
    assert list(load_pairs(path, "train", streaming=streaming)) == ROWS
    with pytest.raises(SourceError, match=r"no split 'test'; it has train\. .*hold out a fraction .* second source"):
        load_pairs(str(path), "test", streaming=streaming)


def test_slices_of_a_file(tmp_path):
    path = write_file(tmp_path / "p.jsonl", ROWS)
    assert list(load_pairs(path, "train[:2]+train[5:]")) == [*ROWS[:2], ROWS[5]]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_folder_of_data_files(tmp_path, ending, streaming):
    write_file(tmp_path / f"train.{ending}", ROWS[:4])
    write_file(tmp_path / f"test.{ending}", ROWS[4:])
    assert list(load_pairs(tmp_path, "train", streaming=streaming)) == ROWS[:4]
    assert list(load_pairs(tmp_path, "test", streaming=streaming)) == ROWS[4:]
    with pytest.raises(SourceError, match="no split 'validation'; it has train, test"):
        load_pairs(tmp_path, "validation", streaming=streaming)


@pytest.mark.parametrize("name", [".", "./", "..", "inside/.."])
def test_the_folder_that_one_stands_in(tmp_path, monkeypatch, name):
    """A folder without a last part of its own, which the loader of datasets asks for."""
    (tmp_path / "inside").mkdir()
    write_file(tmp_path / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path / "inside" if name == ".." else tmp_path)
    assert list(load_pairs(name)) == ROWS


def test_folder_inside_a_folder(tmp_path):
    write_jsonl(tmp_path / "harmless-base" / "train.jsonl.gz", ROWS)
    assert list(load_pairs(tmp_path, "train", data_dir="harmless-base")) == ROWS
    with pytest.raises(SourceError, match="no subfolder 'helpful-base'"):
        load_pairs(tmp_path, "train", data_dir="helpful-base")


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_folders(tmp_path, streaming):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([5])).save_to_disk(tmp_path / "two")
    assert list(load_pairs(tmp_path / "one", "train", streaming=streaming)) == ROWS
    assert list(load_pairs(tmp_path / "two", "test", streaming=streaming)) == ROWS[5:]
    assert list(load_pairs(tmp_path, "test", data_dir="two", streaming=streaming)) == ROWS[5:]
    with pytest.raises(SourceError, match="no split 'eval'; it has train, test"):
        load_pairs(tmp_path / "two", "eval", streaming=streaming)
    with pytest.raises(SourceError, match=r"no split 'train\[:1\]'"):
        load_pairs(tmp_path / "one", "train[:1]", streaming=streaming)


@pytest.mark.parametrize(("name", "files"), [("demo", "decisions"), ("demo-answers", "answers")])
def test_demo_reads_the_embedded_files(tmp_path, monkeypatch, name, files):
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "sources.py"))
    write_jsonl(tmp_path / "demo" / f"{files}-train.jsonl", ROWS[:5])
    write_jsonl(tmp_path / "demo" / f"{files}-test.jsonl", ROWS[5:])
    assert list(load_pairs(name, "train")) == ROWS[:5]
    assert list(load_pairs(name, "test")) == ROWS[5:]
    with pytest.raises(SourceError, match="no split 'dev'; it has train, test"):
        load_pairs(name, "dev")
    (tmp_path / "demo" / f"{files}-test.jsonl").unlink()
    with pytest.raises(SourceError, match=f"lacks .*{files}-test.jsonl"):
        load_pairs(name, "train")


class Builder:
    """Stands in for what datasets knows about a hub dataset before downloading it."""

    def __init__(self, *splits):
        self.info = datasets.DatasetInfo(splits={name: {"name": name, "dataset_name": "pairs"} for name in splits})
        self.config = datasets.BuilderConfig()


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load_dataset_builder(path, name=None, **options):
        calls.append(("builder", path, name, options))
        return Builder("train", "test")

    def load_dataset(path, name=None, **options):
        calls.append(("dataset", path, name, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_name_goes_to_load_dataset(hub):
    assert list(load_pairs("owner/pairs", "test[:5]", config="c", data_dir="harmless-base", streaming=True)) == ROWS
    assert hub == [
        ("builder", "owner/pairs", "c", {"data_dir": "harmless-base"}),
        ("dataset", "owner/pairs", "c", {"data_dir": "harmless-base", "split": "test[:5]", "streaming": True}),
    ]


def test_unknown_split_on_the_hub_is_found_before_the_download(hub):
    with pytest.raises(SourceError, match="no split 'dev'; it has train, test"):
        load_pairs("owner/pairs", "dev")
    assert [call[0] for call in hub] == ["builder"]


def test_a_folder_of_that_name_comes_before_the_hub(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "owner" / "pairs" / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert list(load_pairs("owner/pairs", "train")) == ROWS


def test_hub_that_cannot_be_reached_is_explained(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(SourceError, match=r"owner/pairs: ConnectionError: no route\n.*needs a network"):
        load_pairs("owner/pairs", "train")


@pytest.mark.parametrize("name", ["no/file.jsonl", "nothing.parquet", "./nothing", "/no/such", "~/no/such", "a/b/c"])
def test_missing_paths_never_reach_the_hub(name, hub):
    with pytest.raises(SourceError, match="There is no file or folder"):
        load_pairs(name, "train")
    assert hub == []


def test_unreadable_files(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SourceError, match="is empty"):
        load_pairs(tmp_path / "empty.jsonl", "train")
    (tmp_path / "pairs.txt").write_text("x")
    with pytest.raises(SourceError, match=r"unknown kind.*\.parquet"):
        load_pairs(tmp_path / "pairs.txt", "train")
    (tmp_path / "bad.parquet").write_text("no parquet")
    for streaming in (False, True):
        with pytest.raises(SourceError, match="Could not load .*bad.parquet"):
            load_pairs(tmp_path / "bad.parquet", "train", streaming=streaming)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SourceError, match="Could not load .*nothing"):
        load_pairs(tmp_path / "nothing", "train")


def test_no_rows(tmp_path):
    empty = datasets.Dataset.from_list(ROWS).select([])
    empty.to_parquet(tmp_path / "p.parquet")
    for streaming in (False, True):
        with pytest.raises(SourceError, match="no rows|no data"):
            load_pairs(tmp_path / "p.parquet", "train", streaming=streaming)
    with pytest.raises(SourceError, match="no rows"):
        to_conversational(empty)


def test_options_without_meaning_are_refused(tmp_path):
    path = write_file(tmp_path / "p.jsonl", ROWS)
    with pytest.raises(SourceError, match="does not take config or data_dir"):
        load_pairs(path, "train", config="c", data_dir="d")
    with pytest.raises(SourceError, match="does not take config"):
        load_pairs("demo", "train", config="c")


@pytest.mark.parametrize("streaming", [False, True])
def test_hh_text_becomes_messages(tmp_path, streaming):
    # The damaged row comes first: it must neither hide the form of the others nor be repaired.
    rows = [{**row, "id": n} for n, row in enumerate([BROKEN, *ROWS, hh_row(0) | {"rejected": hh_row(0)["chosen"]}])]
    path = write_file(tmp_path / "p.jsonl", rows)
    converted, report = to_conversational(load_pairs(path, "train", streaming=streaming))
    expected, expected_report = converted_one_by_one(rows)
    for _ in range(2):  # a stream is counted afresh in each pass
        assert list(converted) == expected
        assert report == expected_report
    assert converted.column_names == ["prompt", "chosen", "rejected", "id"]
    assert report.to_dict()["refused"] == {"not_a_dialogue": 1, "identical_answers": 1}


def test_a_cached_conversion_reports_the_same(tmp_path, monkeypatch):
    path = write_file(tmp_path / "p.jsonl", [*ROWS, BROKEN])
    first, report = to_conversational(load_pairs(path, "train"))
    monkeypatch.setattr(hh, "split_pair", None)  # not called again: the rows come out of the cache
    again, report_again = to_conversational(load_pairs(path, "train"))
    assert list(first) == list(again)
    assert report == report_again and report.kept == 6
    assert first._fingerprint == again._fingerprint


def test_another_parser_does_not_meet_the_old_cache(tmp_path, monkeypatch):
    path = write_file(tmp_path / "p.jsonl", ROWS)
    to_conversational(load_pairs(path, "train"))
    (tmp_path / "hh.py").write_text("# another parser")
    monkeypatch.setattr(hh, "__file__", str(tmp_path / "hh.py"))

    def refuse(*pair):
        raise hh.DialogueError(hh.Reason.ROLE_ORDER)

    monkeypatch.setattr(hh, "split_pair", refuse)
    with pytest.raises(SourceError, match=r"(?s)Every row was refused.*6 role_order"):
        to_conversational(load_pairs(path, "train"))


PASSED = {
    "standard": {"prompt": "Q", "chosen": "Yes", "rejected": "No"},
    "messages": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "messages with the prompt inside": {"chosen": [USER, YES], "rejected": [USER, NO]},
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("row", PASSED.values(), ids=PASSED.keys())
def test_rows_that_trl_understands_pass_unchanged(row, streamed):
    dataset = datasets.Dataset.from_list([{**row, "id": 1}])
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    converted, report = to_conversational(dataset)
    assert list(converted) == list(dataset)
    assert converted is dataset and report is None


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "parquet"])
@pytest.mark.parametrize("name", ["q[1]", "q?", "q*", "a::b", "x#y", "zip:__x::y", "é b%20"])
def test_names_are_taken_literally(tmp_path, name, ending, streaming, monkeypatch):
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "cache"))
    for other in ("q1", "qx", "a", "b"):
        write_file(tmp_path / f"{other}.{ending}", ROWS[3:])
    asked = write_file(tmp_path / f"plain.{ending}", ROWS[:2]).rename(tmp_path / f"{name}.{ending}")
    assert list(load_pairs(asked, streaming=streaming)) == ROWS[:2]


def test_a_folder_that_reads_as_a_pattern_is_refused(tmp_path):
    for folder in ("d1", "d[1]"):
        write_jsonl(tmp_path / folder / "train.jsonl", ROWS)
    with pytest.raises(SourceError, match=r"d\[1\] holds one of the characters"):
        load_pairs(tmp_path / "d[1]")


@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_other_content_of_the_same_age_is_not_met_in_the_cache(tmp_path, kind, ending):
    def write(rows):
        if kind == "saved":
            saved = datasets.Dataset.from_list(rows)
            saved._fingerprint = "0" * 16
            saved.save_to_disk(tmp_path / "saved")
            return tmp_path / "saved"
        file = write_file(tmp_path / "in" / f"train.{ending}" if kind == "folder" else tmp_path / f"p.{ending}", rows)
        os.utime(file, (1_000_000_000, 1_000_000_000))
        return file if kind == "file" else file.parent

    (tmp_path / "in").mkdir()
    for rows in (ROWS[:2], ROWS[2:4], ROWS[:2]):
        loaded = load_pairs(write(rows))
        assert list(loaded) == rows
        assert list(to_conversational(loaded)[0]) == converted_one_by_one(rows)[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "text": "b"}, "lack rejected; their columns are chosen, text.*Rename"),
        ({"instruction": "a"}, "lack chosen and rejected"),
        ({"chosen": "a", "rejected": "b"}, "chosen is a string, rejected is a string.*Add the column prompt"),
        ({"prompt": "Q", **ROWS[0]}, "contains the prompt too.*Remove the column prompt"),
        ({"prompt": "Q", "chosen": [USER, YES], "rejected": [USER, NO]}, "prompt is a string.*Remove the column"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "prompt is messages, chosen is a string"),
        ({"prompt": "Q", "chosen": "a", "rejected": None}, "rejected is NoneType"),
        ({"prompt": "Q", "chosen": ["a"], "rejected": ["b"]}, "chosen is list"),
    ],
)
def test_other_rows_are_refused_and_told_what_to_do(row, message):
    with pytest.raises(SourceError, match=rf"(?s){message}") as caught:
        to_conversational(datasets.Dataset.from_list([row]))
    assert "Allowed are" in str(caught.value)


def test_hold_out_by_fraction_and_by_count():
    dataset = datasets.Dataset.from_list([{"n": n} for n in range(50)])
    for amount in (0.1, 5):
        rest, held = hold_out(dataset, amount, seed=3)
        assert (len(rest), len(held)) == (45, 5)
        assert sorted(rest["n"][:] + held["n"][:]) == list(range(50))
        assert rest["n"][:] == sorted(rest["n"]) and held["n"][:] == sorted(held["n"])
        assert hold_out(dataset, amount, seed=3)[1]["n"][:] == held["n"][:] == [8, 15, 23, 34, 37]
        assert hold_out(dataset, amount, seed=4)[1]["n"][:] != held["n"][:]
    assert len(hold_out(dataset, 0.001)[1]) == 1


@pytest.mark.parametrize("amount", [0, 50, -1, 0.0, 1.0, 1.5, float("nan"), True, "0.1", None])
def test_hold_out_refuses_an_empty_part(amount):
    with pytest.raises(SourceError, match="Cannot hold"):
        hold_out(datasets.Dataset.from_list([{"n": n} for n in range(50)]), amount)


def test_hold_out_refuses_a_stream():
    with pytest.raises(SourceError, match="stream"):
        hold_out(datasets.Dataset.from_list(ROWS).to_iterable_dataset(), 0.5)


def test_importing_it_imports_nothing_heavy():
    code = "import sys, trl_cpo.data.loading; print(sorted({'torch', 'datasets', 'trl', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
