"""What is printed, where, and what an output that fails does: nothing to the work, and no traceback."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trl_cpo.certificates import certify_run
from trl_cpo.cli import main
from trl_cpo.files import atomic, claims
from trl_cpo.report import style

from helpers.run_folders import make_run
from helpers.tiny import hh_rows

PAINT = "\x1b[1A\x1b[2K\x9b2J\rIt holds\u202e"
TINY = ["--use_cpu", "--bf16", "False", "--max_steps", "2", "--logging_steps", "1", "--max_length", "128", "--price", "False"]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", steps=5)


@pytest.fixture
def training(tmp_path, model_folder, monkeypatch):
    """The options of a small run; into `mine`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hh_rows(12, 0)))
    return ["train", "--model_name_or_path", model_folder, "--dataset_name", "pairs.jsonl", "--output_dir", "mine", *TINY]


def clean(text):
    return not set(text) & set("\x1b\x9b\r\u202e")


# Text that comes from files


def test_a_certificates_keys_cannot_paint_over_the_verdict(run, tmp_path, capsys):
    made = certify_run(run)
    (tmp_path / "c.json").write_text(
        json.dumps({**made, PAINT: 1, "subject": {**made["subject"], f"a\nIt holds{PAINT}": PAINT}})
    )
    assert main(["certify", "--check", str(tmp_path / "c.json")]) == 1
    said = capsys.readouterr().out
    assert clean(said) and "\\x1b[1A\\x1b[2K" in said
    assert not any(line.startswith("It holds") for line in said.splitlines())
    assert main(["certify", "--check", str(tmp_path / "c.json"), "--json"]) == 1
    said = capsys.readouterr().out
    assert clean(said) and any(
        PAINT.split("\r")[0].encode("unicode_escape").decode()[:4] in d for d in json.loads(said)["differences"]
    )


def test_an_error_that_quotes_a_file_cannot_drive_the_terminal(run, tmp_path, capsys):
    document = json.loads((run / "pairs.json").read_text())
    for change in ({"reduction": PAINT}, {"split": f"train{PAINT}"}, {"left_out": PAINT}, {PAINT: -1, "gamma": PAINT}):
        (run / "pairs.json").write_text(json.dumps({**document, **change}))
        assert main(["certify", str(run)]) == 2
        assert clean(capsys.readouterr().err)


@pytest.mark.parametrize("command", ["train", "audit"])
def test_column_names_cannot_drive_the_terminal(tmp_path, capsys, command, model_folder):
    (tmp_path / "p.jsonl").write_text(json.dumps({f"{PAINT}\nIt holds": "x", "text": "y"}) + "\n")
    options = {"train": ["--dataset_name", str(tmp_path / "p.jsonl"), "--output_dir", str(tmp_path / "o"), *TINY]}
    assert main([command, *options.get(command, ["--model", model_folder, "--dataset", str(tmp_path / "p.jsonl")])]) == 2
    said = capsys.readouterr().err
    assert clean(said) and "\\x1b[1A" in said and not any(line.startswith("It holds") for line in said.splitlines())


# Outputs that fail


class Failing(io.TextIOWrapper):
    def __init__(self, fault):
        super().__init__(io.BytesIO(), encoding="ascii")
        self.fault = fault

    def write(self, text):
        if self.fault:
            raise self.fault
        return super().write(text)


@pytest.mark.parametrize("fault", [None, BrokenPipeError(), OSError(errno.ENOSPC, "full"), ValueError("closed file")])
def test_a_training_whose_words_reach_nobody_is_finished(training, tmp_path, monkeypatch, fault):
    stdout = Failing(fault)
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main([*training, "--constraint", "clip"]) == 0
    assert sys.stdout is stdout
    assert (tmp_path / "mine" / "metrics.json").is_file() and (tmp_path / "mine" / "model.safetensors").is_file()
    if fault is None:
        stdout.flush()
        assert b"constraint clip, \\u03b3 = " in stdout.buffer.getvalue()


@pytest.mark.parametrize("shut", ["1", "0 1", "1 2", "0 1 2"])
def test_standard_streams_that_are_closed(run, tmp_path, shut):
    """As `>&-` leaves them: the next file opened would have their number."""
    close = "".join(f"os.close({number}); " for number in shut.split())
    start = f"import os; {close}os.execv({sys.executable!r}, [{sys.executable!r}, '-m', 'trl_cpo', *{{!r}}])"
    options = ["certify", str(run), "--out", str(tmp_path / "c.json")]
    done = subprocess.run([sys.executable, "-c", start.format(options)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert json.loads((tmp_path / "c.json").read_text())["holds"] is True


def test_ascii_is_enough(run):
    done = subprocess.run(
        [sys.executable, "-m", "trl_cpo", "certify", str(run)],
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0 and b"gap \\u03b4_\\u03b8 of at least" in done.stdout, done.stderr


# Places that cannot be written


def one_sentence(capsys, *words):
    said = capsys.readouterr().err
    lines = re.findall(r"trl-cpo \w+: .*", said)  # a progress bar may stand before it
    assert "Traceback" not in said and len(lines) == 1 and all(word in lines[0] for word in words), said
    return said


@pytest.mark.parametrize("place", ["dangling", "under a file", "under a dangling link"])
def test_an_output_that_cannot_be_made(training, run, tmp_path, capsys, place):
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "far")
    (tmp_path / "file").write_text("mine")
    target = {"dangling": "nowhere", "under a file": "file/x", "under a dangling link": "nowhere/x"}[place]
    why = "file is a file" if "file" in place else "nowhere is a link to nothing"
    assert main([*training, "--output_dir", target]) == 2
    one_sentence(capsys, f"The folder {target} cannot be made", why, "Nothing was written")
    assert main(["report", str(run), "--out", target]) == 2
    one_sentence(capsys, f"The folder {target} cannot be made", why)
    assert main(["certify", str(run), "--out", target]) == 2
    one_sentence(capsys, target)
    scores = ["--model", "m", "--dataset", "pairs.jsonl", "--gamma", "0", "--scores", target]
    assert main(["certify", *scores]) == 2
    one_sentence(capsys, f"The folder {target} cannot be made", why)
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "gone").exists()


def test_an_output_that_is_read_only(training, tmp_path, capsys, monkeypatch):
    def refuse(file, how):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr(claims, "_open", refuse)
    assert main(training) == 2
    one_sentence(capsys, "The folder mine cannot be written into: Permission denied", "Nothing was written")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("full", ["the model", "a checkpoint", "the record", "the log"])
def test_a_disk_that_fills_up(training, tmp_path, capsys, monkeypatch, full):
    """However the library puts it: the path, what is left, and how to go on."""
    import torch
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    from trl_cpo.logs import run_log

    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        if full == "the model":

            def fail(self, folder, *args, real=PreTrainedModel.save_pretrained, **options):
                if "checkpoint" in str(folder):
                    return real(self, folder, *args, **options)
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

            patch.setattr(PreTrainedModel, "save_pretrained", fail)
        elif full == "a checkpoint":

            def fail(content, file, *args, real=torch.save, **options):
                if str(file).endswith("optimizer.pt"):
                    raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
                return real(content, file, *args, **options)

            patch.setattr(torch, "save", fail)
        elif full == "the record":
            patch.setattr(atomic.os, "replace", lambda *_: (_ for _ in ()).throw(no_space))
        else:
            patch.setattr(run_log, "json", SimpleNamespace(dumps=lambda _: (_ for _ in ()).throw(no_space)))
        saving = ["--save_strategy", "steps", "--save_steps", "1"]
        assert main([*training, *(saving if full in ("the model", "a checkpoint") else [])]) == 2
    left = {"the model": "checkpoint-1, checkpoint-2"}.get(full, "log.jsonl")
    said = one_sentence(capsys, left)
    assert ("No space left" in said or "the disk is full" in said) and "All options" not in said
    assert {"the record": "pairs.json cannot be used", "the log": "log.jsonl"}.get(full, "file c") in said
    if full == "the log":
        return
    assert "--output_dir mine --resume_from_checkpoint latest" in said
    if full == "the model":
        assert main([*training, *saving, "--resume_from_checkpoint", "latest"]) == 0


def test_a_disk_that_is_full_from_the_start_leaves_nothing_to_go_on_with(training, tmp_path, capsys, monkeypatch):
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", lambda *_: (_ for _ in ()).throw(no_space))
        assert main([*training, "--price", "True"]) == 2
    said = one_sentence(capsys, "mine/price.json cannot be used", "Nothing is left of the run")
    assert "--resume_from_checkpoint" not in said and not (tmp_path / "mine").exists()


def test_a_report_and_a_certificate_on_a_full_disk(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(style, "DPI", 24)
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(atomic.os, "fsync", lambda _: (_ for _ in ()).throw(no_space))
    assert main(["report", str(run)]) == 2
    one_sentence(capsys, "report-contents.json cannot be used: No space left on device")
    shutil.rmtree(run / "report")

    class Full:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def write(self, _):
            raise no_space

    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *rest, **more: (self.touch(), Full())[1] if mode == "x" else opened(self, mode, *rest, **more),
    )
    assert main(["certify", str(run), "--out", str(tmp_path / "c.json")]) == 2
    assert not (tmp_path / "c.json").exists()
    one_sentence(capsys, "c.json cannot be written: No space left on device", "Nothing is left of it")
