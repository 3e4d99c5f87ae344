"""An untested TRL is refused, or tried where the user asks for it: the process, its environment, and what is remembered."""

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import trl
from packaging.specifiers import SpecifierSet

import trl_cpo
from trl_cpo._trl import trial, upstream

PACKAGE = Path(trl_cpo.__file__).parent
NEWER = SpecifierSet(">=90,<91")


@pytest.fixture(autouse=True)
def an_untested_trl(monkeypatch, tmp_path):
    """To this package the installed TRL is an unknown one."""
    monkeypatch.setattr(upstream, "SUPPORTED_TRL", NEWER)
    monkeypatch.setattr(upstream, "_accepted", set())
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(trial.ALLOWED_BY, raising=False)


def program(monkeypatch, folder: Path, code: str) -> None:
    """The self-test's process runs this code instead."""
    (folder / "a_self_test.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(trial, "_PROGRAM", "a_self_test")


def outcome(**changes) -> dict:
    return {"format": 1, "about": trial.subject(), "failed": {}, "seconds": 1.0} | changes


def writes(document: dict | str) -> str:
    text = document if isinstance(document, str) else json.dumps(document)
    return f"import sys, pathlib; pathlib.Path(sys.argv[1]).write_text({text!r})"


def kept_file() -> Path:
    return Path(os.environ["TRL_CPO_CACHE"]) / "selftest" / f"{trial._digest(trial.subject())}.json"


def test_the_refusal_names_the_way(monkeypatch):
    with pytest.raises(ImportError, match=rf"{trl.__version__} is installed.*{trial.ALLOWED_BY}=1.*self-test"):
        upstream.check_upstream()
    monkeypatch.setenv(trial.ALLOWED_BY, "please")
    with pytest.raises(ImportError, match="is 'please' now, not '1'"):
        upstream.check_upstream()


def test_a_pass_is_said_once_and_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv(trial.ALLOWED_BY, "1")
    program(monkeypatch, tmp_path, writes(outcome()))
    with pytest.warns(UserWarning, match="passed the self-test. The self-test cannot see") as said:
        upstream.check_upstream()
    assert trial.BLIND in str(said[0].message)
    upstream.check_upstream()  # once in a process
    upstream._accepted.clear()
    program(monkeypatch, tmp_path, "raise SystemExit(1)")
    with pytest.warns(UserWarning, match="passed the self-test before"):
        upstream.check_upstream()
    assert kept_file().stat().st_mode & 0o777 == 0o600


def test_one_rank_says_it(monkeypatch, tmp_path):
    monkeypatch.setenv(trial.ALLOWED_BY, "1")
    monkeypatch.setenv("RANK", "3")
    program(monkeypatch, tmp_path, writes(outcome()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upstream.check_upstream()


def test_a_failure_is_a_refusal_with_reasons_and_is_not_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv(trial.ALLOWED_BY, "1")
    failed = {"clip": [f"loss is {number}, by the formula 2" for number in range(6)]}
    program(monkeypatch, tmp_path, writes(outcome(failed=failed)))
    with pytest.raises(ImportError, match="failed the self-test: clip: loss is 0, by the formula 2.*and 2 more"):
        upstream.check_upstream()
    assert not kept_file().exists()
    with pytest.raises(ImportError, match="failed the self-test"):
        upstream.check_upstream()


def test_a_missing_name_is_refused_without_a_trial(monkeypatch, tmp_path):
    monkeypatch.setenv(trial.ALLOWED_BY, "1")
    monkeypatch.delattr(trl.DPOTrainer, "_precompute_ref_logps")
    program(monkeypatch, tmp_path, writes(outcome()))
    with pytest.raises(ImportError, match="_precompute_ref_logps"):
        upstream.check_upstream()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; print('one'); print('the last words', flush=True); os._exit(7)", "exit code 7: the last words"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9: it said nothing"),
        ("import time; time.sleep(60)", "did not end within 1 seconds"),
        (writes("{"), "cannot be read"),
        (writes("[" * 100_000), "cannot be read"),
        (writes(outcome(failed={"clip": []})), "cannot be read"),
        (writes(outcome(failed=["clip"])), "cannot be read"),
        (writes(outcome(seconds=-1)), "cannot be read"),
        (writes(outcome(format=2)), "cannot be read"),
        (writes(outcome(more=1)), "cannot be read"),
        (writes(outcome(about={"versions": {"trl": "0.1"}})), "found other libraries"),
    ],
)
def test_a_process_without_a_sound_outcome_is_a_failure(monkeypatch, tmp_path, code, reason):
    monkeypatch.setattr(trial, "_SECONDS", 1.0 if "sleep" in code else 60.0)
    program(monkeypatch, tmp_path, code)
    failed, remembered = trial.tried()
    assert reason in failed["process"][0] and not remembered and not kept_file().exists()


def test_the_process_knows_no_launch_no_device_and_no_token(monkeypatch, tmp_path):
    told = {
        **dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"), "1"),
        **dict.fromkeys(("ACCELERATE_USE_FSDP", "FSDP_VERSION", "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID", "PMI_RANK"), "1"),
        **dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY", "CUDA_LAUNCH_BLOCKING", trial.ALLOWED_BY), "1"),
        "CUDA_VISIBLE_DEVICES": "0,1",
        "LC_ALL": "C.UTF-8",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    seen = tmp_path / "seen.json"
    code = f"import json, os, pathlib; pathlib.Path({str(seen)!r}).write_text(json.dumps(dict(os.environ)))"
    program(monkeypatch, tmp_path, code)
    trial.tried()
    found = json.loads(seen.read_text())
    assert found["CUDA_VISIBLE_DEVICES"] == "" and found["LC_ALL"] == "C.UTF-8" and found["HF_HUB_OFFLINE"] == "1"
    assert not set(told) - {"CUDA_VISIBLE_DEVICES", "LC_ALL"} & set(found)
    assert found["TRL_CPO_CACHE"] != os.environ["TRL_CPO_CACHE"]


def test_the_process_imports_what_this_one_does_and_nothing_of_its_folder(monkeypatch, tmp_path):
    (tmp_path / "json.py").write_text("raise SystemExit('planted')")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    program(monkeypatch, tmp_path / "elsewhere", "import json\n" + writes(outcome()))
    assert trial.tried() == ({}, False)


def forged(kind: str, file: Path, monkeypatch) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(outcome()))
    file.chmod(0o600)
    match kind:
        case "of another user":
            monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
            if os.getuid() == 0:
                os.chown(file, 12345, -1)
        case "writable by the group":
            file.chmod(0o660)
        case "writable by all":
            file.chmod(0o666)
        case "a link":
            file.rename(file.with_suffix(".there"))
            file.symlink_to(file.with_suffix(".there"))
        case "a pipe":
            file.unlink()
            os.mkfifo(file)
        case "a folder":
            file.unlink()
            file.mkdir()
        case "about another version":
            file.write_text(json.dumps(outcome(about={**trial.subject(), "code": "0"})))
        case "a failure":
            file.write_text(json.dumps(outcome(failed={"clip": ["no"]})))
        case "too long":
            file.write_text(json.dumps(outcome()) + " " * 200_000)
        case "no JSON":
            file.write_bytes(b"\xff\xfe")
        case "nested":
            file.write_text("[" * 50_000)


KINDS = ["of another user", "writable by the group", "writable by all", "a link", "a pipe", "a folder", "about another version"]
KINDS += ["a failure", "too long", "no JSON", "nested"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_pass_is_not_believed(monkeypatch, tmp_path, kind):
    forged(kind, kept_file(), monkeypatch)
    program(monkeypatch, tmp_path, writes(outcome(failed={"clip": ["it is wrong"]})))
    assert trial.tried() == ({"clip": ["it is wrong"]}, False)


def test_an_own_pass_is_believed(monkeypatch, tmp_path):
    forged("by nobody", kept_file(), monkeypatch)
    program(monkeypatch, tmp_path, "raise SystemExit(1)")
    assert trial.tried() == ({}, True)


def test_a_cache_that_cannot_be_written_costs_only_the_memory(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "file"))
    program(monkeypatch, tmp_path, writes(outcome()))
    assert trial.tried() == ({}, False)


def test_many_ranks_try_at_once(monkeypatch, tmp_path):
    program(monkeypatch, tmp_path, writes(outcome()))
    results = []
    ranks = [threading.Thread(target=lambda: results.append(trial.tried()[0])) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert results == [{}] * 4
    assert trial.tried() == ({}, True) and [file.name for file in kept_file().parent.iterdir()] == [kept_file().name]


def test_the_code_is_part_of_what_a_pass_is_about():
    """A development version keeps its number while its code changes."""
    files = list(trial._files())
    assert {Path(trl.__file__).parent / "trainer/dpo_trainer.py", PACKAGE / "trainer.py", PACKAGE / "_trl/loss.py"} <= set(
        files
    )
    assert any(file.name == "trainer.py" and file.parent.name == "transformers" for file in files)


TRAINER = """
import sys, warnings
from packaging.specifiers import SpecifierSet
from trl_cpo._trl import upstream
upstream.SUPPORTED_TRL = SpecifierSet(">=90,<91")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    try:
        upstream.check_upstream()
        print("passed", [str(each.message) for each in said if "self-test" in str(each.message)])
    except ImportError as error:
        print("refused", error)
"""


def edited_trl(folder: Path) -> Path:
    """A copy of the installed TRL whose `_compute_loss` reads the args in place of the attribute."""
    shutil.copytree(Path(trl.__file__).parent, folder / "trl", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "trl" / "trainer" / "dpo_trainer.py"
    text = file.read_text()
    head, method, body = text.partition("    def _compute_loss(")
    assert "self.precompute_ref_logps" in body
    file.write_text(head + method + body.replace("self.precompute_ref_logps", "self.args.precompute_ref_log_probs", 1))
    return folder


@pytest.mark.slow(70)
def test_for_real_the_installed_trl_passes_and_an_edited_one_does_not(tmp_path):
    """As a rank of a launch would, with the processes and the self-test as they are."""
    told = {
        trial.ALLOWED_BY: "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "nowhere",
        "MASTER_PORT": "1",
    }

    def tried(*places: Path) -> str:
        path = os.pathsep.join(map(str, (*places, PACKAGE.parent)))
        environment = {**os.environ, **told, "PYTHONPATH": path, "TRL_CPO_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", TRAINER], env=environment, capture_output=True, text=True, timeout=500, check=True
        )
        return done.stdout.strip()

    first, second = tried(), tried()
    assert first.startswith("passed") and "passed the self-test. " in first
    assert second.startswith("passed") and "passed the self-test before" in second
    refused = tried(edited_trl(tmp_path / "edited"))
    assert refused.startswith("refused") and "failed the self-test: clip: step 1: loss is" in refused
