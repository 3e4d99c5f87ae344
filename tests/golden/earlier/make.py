"""Makes the files of this folder with an earlier version of the package: see README.md.

PYTHONPATH=<checkout of the earlier version> python tests/golden/earlier/make.py
"""

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # for helpers

# isort: split

import contextlib
import io
import json
import shutil

import trl_cpo
from trl_cpo.cli import main

from helpers.earlier import MODEL, PAIRS, RUN, SAVED_AT, lagrangian, scored
from helpers.tiny import make_model, make_tokenizer, pair_rows


def said(*arguments: str) -> dict:
    """What a command prints with --json."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main([*arguments, "--json"])
    return json.loads(out.getvalue())


def make_run() -> None:
    """From a working folder that holds the model and the pairs, so that their paths are recorded as names."""
    if main(["train", "--model_name_or_path", MODEL, "--dataset_name", PAIRS, "--output_dir", "run", *sum(RUN.items(), ())]):
        raise RuntimeError("trl-cpo train failed")
    (HERE / "run").mkdir()
    for name in ("metrics.json", "pairs.json", "log.jsonl"):
        shutil.copy(Path("run") / name, HERE / "run" / name)
    shutil.copytree(HERE / "run", "kept")
    report = said("report", "kept", "--out", "report")["runs"][0]
    certificate = said("certify", "kept", "--gamma", "0", "--out", str(HERE / "certificate.json"))
    numbers = {"report": {name: report[name] for name in ("unit", "pairs", "metrics")}}
    numbers["certify"] = {name: certificate[name] for name in ("asked", "certified_share", "holds", "slack")}
    (HERE / "numbers.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")


def make() -> None:
    for name in ("run", "checkpoint", "scores", MODEL):
        shutil.rmtree(HERE / name, ignore_errors=True)
    (HERE / "certificate.json").unlink(missing_ok=True)
    make_model(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    ).save_pretrained(HERE / MODEL)
    make_tokenizer().save_pretrained(HERE / MODEL)
    (HERE / PAIRS).write_text("".join(json.dumps(row) + "\n" for row in pair_rows(32)))
    shutil.copytree(HERE / MODEL, MODEL)
    shutil.copy(HERE / PAIRS, PAIRS)
    make_run()
    lagrangian("lagrangian", Path()).train()
    shutil.copytree(Path("lagrangian") / f"checkpoint-{SAVED_AT}", HERE / "checkpoint" / f"checkpoint-{SAVED_AT}")
    os.environ["TRL_CPO_CACHE"] = "cache"
    scored("scored", Path())
    shutil.copytree(Path("cache") / "scores", HERE / "scores")


if __name__ == "__main__":
    print(f"trl-cpo {trl_cpo.__version__}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        make()
