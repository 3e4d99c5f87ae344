"""Files of a few KB that would fill memory or end the process: refused in words, in bounded memory."""

import bz2
import gzip
import json
import lzma
import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_cpo.data import expansion
from trl_cpo.data.expansion import Bomb, refuse_bombs
from trl_cpo.data.loading import SourceError, load_pairs

from helpers.paths import ROOT
from helpers.tiny import pair_rows

ROW = {"prompt": "why", "chosen": " a", "rejected": " b"}
LINE = json.dumps(ROW).encode() + b"\n"
PACKERS = {"jsonl.gz": gzip.open, "jsonl.bz2": bz2.open, "jsonl.xz": lzma.open}


@pytest.fixture
def small_limit(monkeypatch):
    """Bombs of a few MB, so that tests are quick."""
    monkeypatch.setattr(expansion, "LARGEST", 2**20)


def packed(file: Path, lines: int) -> Path:
    with PACKERS[file.name.partition(".")[2]](file, "wb") as stream:
        stream.write(LINE * lines)
    return file


def parquet(file: Path, text: str, rows: int, *, nested: bool = False) -> Path:
    """`rows` times the same text, which a dictionary holds once."""
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, dtype="i4")), pa.array([text]))
    if nested:
        offsets = pa.array(np.arange(rows + 1, dtype="i4"))
        values = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays([values, values], ["role", "content"]))
    table = pa.table({"prompt": values, "chosen": values, "rejected": values})
    pq.write_table(table, file, compression="zstd", store_schema=False, row_group_size=10**9)
    return file


def arrow(folder: Path, text: str, packing: str | None) -> Path:
    datasets.Dataset.from_list([ROW]).save_to_disk(folder)
    (file,) = folder.glob("*.arrow")
    table = pa.table(dict.fromkeys(ROW, pa.array([text])))
    options = pa.ipc.IpcWriteOptions(compression=packing)
    with pa.OSFile(str(file), "wb") as stream, pa.ipc.new_stream(stream, table.schema, options=options) as writer:
        writer.write_table(table)
    return file


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_lines(tmp_path, small_limit, kind):
    bomb = packed(tmp_path / f"bomb.{kind}", 100_000)
    with pytest.raises(Bomb, match=r"unpacks to more than 1,048,576: 50 times its size at most .* unpack it into a .jsonl"):
        refuse_bombs([bomb])
    refuse_bombs([packed(tmp_path / f"fits.{kind}", 1000)])


def test_a_zip(tmp_path, small_limit):
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train.jsonl", LINE * 100_000)
    with pytest.raises(SourceError, match="train.zip, of .* unpacks to more than"):
        load_pairs(tmp_path)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "messages"])
@pytest.mark.parametrize(("text", "rows"), [("why not", 200_000), ("x" * 100_000, 1000)], ids=["many", "long"])
def test_parquet_that_repeats_one_text(tmp_path, small_limit, nested, text, rows):
    with pytest.raises(Bomb, match="unpacks to more than"):
        refuse_bombs([parquet(tmp_path / "bomb.parquet", text, rows, nested=nested)])


def test_parquet_of_one_long_text(tmp_path, small_limit):
    pq.write_table(
        pa.table(dict.fromkeys(ROW, ["x" * 2**22])), tmp_path / "a.parquet", compression="zstd", use_dictionary=False
    )
    with pytest.raises(Bomb):
        refuse_bombs([tmp_path / "a.parquet"])


def test_a_saved_folder_with_packed_buffers(tmp_path, small_limit):
    with pytest.raises(SourceError, match="unpacks to more than"):
        load_pairs(arrow(tmp_path / "saved", "x" * 2**22, "zstd").parent)
    refuse_bombs([arrow(tmp_path / "small", "x" * 1000, "lz4")])
    refuse_bombs([arrow(tmp_path / "plain", "x" * 2**22, None)])


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt":"a","chosen":"b","rejected":' + b"[" * 20_000 + b"]" * 20_000 + b"}\n",
        b'{"prompt":"a","chosen":"b","rejected":' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}\n",
        b'{"prompt":"' + b"x" * 2**25 + rb'\"","chosen":"b","rejected":' + b"[" * 20_000 + b"]" * 20_000 + b"}\n",
        b'{"prompt":"' + b'\\"' * 2**23 + b'","chosen":' + b"[ " * 20_000 + b"]" * 20_000 + b"}\n",
    ],
    ids=["lists", "objects", "after a long text", "after escaped quotes"],
)
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_rows_that_end_the_process_of_pyarrows_reader(tmp_path, line, kind):
    file = tmp_path / f"deep.{kind}"
    content = LINE * 3 + line + LINE
    file.write_bytes(gzip.compress(content, 1) if kind.endswith("gz") else content)
    with pytest.raises(SourceError, match="a row that is nested more than 1,000 deep"):
        load_pairs(file)


def test_brackets_in_text_are_no_depth(tmp_path):
    rows = [{**ROW, "chosen": "[" * 5000 + '"' + "{" * 5000 + "\\"}, {**ROW, "rejected": '\\"[' * 3000}, ROW]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "all.json").write_text(json.dumps(rows * 20))
    assert load_pairs(tmp_path / "code.jsonl").to_list() == rows
    assert len(load_pairs(tmp_path / "all.json")) == 60


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("start", range(4))
def test_a_long_line_may_be_cut_anywhere(monkeypatch, size, start):
    monkeypatch.setattr(expansion, "_CHUNK", 0)
    monkeypatch.setattr(expansion, "DEEPEST", -1)  # every line is measured
    line = b'{"a\\"[":[[{"b":"]\\\\","c":[[[1]]]}]],"d":"{{\\\\\\"{{"}\n'
    assert expansion._Depth().deepest(line) == 7
    depth = expansion._Depth()
    pieces = [line[:start], *(line[place : place + size] for place in range(start, len(line), size))]
    assert max(map(depth.deepest, pieces)) == 7
    assert depth.deepest(b"[[\n") == 2  # a line begins anew


def test_honest_files_pass(tmp_path):
    rows = pair_rows(200)
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    data.to_json(tmp_path / "a.jsonl")
    data.save_to_disk(tmp_path / "saved")
    messages = [{name: [{"role": "user", "content": text}] for name, text in row.items()} for row in rows]
    datasets.Dataset.from_list(messages).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    refuse_bombs(files)
    assert len(files) >= 6


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.zip", "a.jsonl.xz", "a.arrow", "a.jsonl"])
def test_damaged_files_are_left_to_their_reader(tmp_path, name):
    heads = {"parquet": b"PAR1", "gz": b"\x1f\x8b\x08", "zip": b"PK\x03\x04", "xz": b"\xfd7zXZ\x00", "arrow": b"\xff" * 8}
    (tmp_path / name).write_bytes(heads.get(name.rpartition(".")[2], b"{") + b"\x07" * 500)
    refuse_bombs([tmp_path / name])


LOADING = """
import resource, sys
import datasets, pyarrow.parquet
from trl_cpo.data.loading import SourceError, load_pairs
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
try:
    load_pairs(sys.argv[1])
except SourceError as error:
    print("refused", error)
"""


@pytest.mark.parametrize("kind", ["parquet", "gz"])
def test_memory_stays_small_for_real(tmp_path, kind):
    """100 GB of text in 10 KB, and a line of 2 GB, within 4 GB of addresses."""
    if kind == "parquet":
        file = parquet(tmp_path / "bomb.parquet", "x" * 100_000, 400_000)
    else:
        file = tmp_path / "bomb.jsonl.gz"
        with gzip.open(file, "wb", compresslevel=1) as stream:
            stream.write(b'{"prompt":"')
            for _ in range(1200):
                stream.write(b"x" * 2**20)
    assert file.stat().st_size < 10_000_000
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(file), str(4 * 2**30)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("refused"), done.stdout + done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6 * 2**20
