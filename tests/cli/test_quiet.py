"""What libraries print is held back, and nothing else: what concerns the user is shown, and a failure shows all."""

import gc
import json
import logging
import os
import subprocess
import sys
import warnings

import pytest

from trl_cpo.cli import main
from trl_cpo.cli.errors import UserError
from trl_cpo.cli.imports import fast_imports
from trl_cpo.cli.quiet import MESSAGES, NO_BARS, quiet

from helpers.paths import ROOT
from helpers.tiny import pair_rows, training_options


@pytest.fixture
def shown(monkeypatch):
    """The warnings that reach the user."""
    told = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: told.append(str(message)))
    monkeypatch.setattr(sys, "warnoptions", [])
    return told


def warn(text, category):
    warnings.simplefilter("always")
    warnings.warn(text, category, stacklevel=2)


def test_deprecations_are_held_back_and_other_warnings_shown(shown):
    with quiet():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, UserWarning, RuntimeWarning):
            warn(category.__name__, category)
    assert shown == ["UserWarning", "RuntimeWarning"]
    warn("behind", FutureWarning)
    assert shown[-1] == "behind"


@pytest.mark.parametrize("word", ["--warmup_ratio", "--warmup-ratio", "--warmup_ratio=0.1"])
def test_a_deprecated_option_that_was_given_is_shown(shown, word):
    with quiet(["--beta", "0.1", word]):
        warn("`warmup_ratio` is deprecated", FutureWarning)
        warn("`warmup` is deprecated", FutureWarning)
    assert shown == ["`warmup_ratio` is deprecated"]


def test_filters_that_the_user_asked_python_for_stay(shown, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["always"])
    with quiet():
        warn("old", FutureWarning)
    assert shown == ["old"]


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_that_say_nothing_about_a_run_are_held_back(name, caplog):
    logger = logging.getLogger(name)
    caplog.handler.setLevel(0)
    logger.addHandler(caplog.handler)
    before, logger.disabled = logger.disabled, False
    try:
        with quiet():
            for begins in MESSAGES[name]:
                logger.warning("%s: nothing", begins)
            logger.warning("something else")
        logger.warning(MESSAGES[name][0])
    finally:
        logger.removeHandler(caplog.handler)
        logger.disabled = before
    assert list(dict.fromkeys(record.getMessage() for record in caplog.records)) == ["something else", MESSAGES[name][0]]


def test_a_failure_shows_what_was_held_back(shown, capsys, monkeypatch):
    def fail(_):
        warn("the reason, perhaps", FutureWarning)
        warn("the reason, perhaps", FutureWarning)
        raise RuntimeError("broken")

    monkeypatch.setattr("trl_cpo.cli.recipes.run", fail)
    assert main(["recipes"]) == 3
    told = capsys.readouterr().err
    assert told.index("the reason, perhaps") < told.index("Traceback") and "broken" in told and shown == []


def test_a_refusal_in_words_shows_the_words_alone(shown, capsys):
    def refuse():
        with quiet():
            warn("old", FutureWarning)
            raise UserError("give another")

    with pytest.raises(UserError):
        refuse()
    assert capsys.readouterr().err == "" and shown == []


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(terminal, monkeypatch):
    for name in NO_BARS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(NO_BARS[0], "0")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with quiet():
        assert [os.environ.get(name) for name in NO_BARS] == ["0", *[None if terminal else "1"] * 2]
    assert [os.environ.get(name) for name in NO_BARS] == ["0", None, None]


def in_a_process(*arguments, cwd):
    command = [sys.executable, "-m", "trl_cpo", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in (*NO_BARS, "PYTHONWARNINGS"):
        environment.pop(name, None)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


GIVEN = ("output_dir", "max_steps", "use_cpu", "bf16", "price", "precompute_ref_log_probs")


def test_a_run_of_which_nothing_is_to_be_said_leaves_stderr_empty(tmp_path, small_model):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in pair_rows(12)))
    options = training_options(tmp_path / "run") | {"max_steps": 2, "price": False, "precompute_ref_log_probs": True}
    done = in_a_process(
        *("train", "--model_name_or_path", small_model, "--dataset_name", "p.jsonl"),
        *(word for name in GIVEN for word in (f"--{name}", options[name])),
        cwd=tmp_path,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("[1/4]") and not any("WARNING" in line for line in lines)


def test_verbose_brings_it_back(tmp_path, small_model):
    command = ["plan", "--model", small_model, "--memory", "24GB"]
    assert in_a_process(*command, cwd=tmp_path).stderr == ""
    done = in_a_process(*command, "--verbose", cwd=tmp_path)
    assert done.returncode == 0 and "is deprecated and will be removed" in done.stderr


def test_an_audit_says_nothing_of_training(monkeypatch):
    """A machine without bfloat16 trains in float32, and says so; it also scores in float32, which was asked for."""
    from trl_cpo.engine import config
    from trl_cpo.scoring.scorer import Scorer

    said = []
    monkeypatch.setattr(config, "has_bf16", lambda use_cpu: False)
    monkeypatch.setattr(config.logger, "warning_once", said.append)
    assert Scorer().config().bf16 is False and said == []
    assert config.DPOConfig("x", report_to="none").bf16 is False and len(said) == 1


def test_the_first_imports_are_not_interrupted(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with fast_imports(absent=["wave", "gc"]):
        assert not gc.isenabled()
        with pytest.raises(ImportError):
            import wave
        import gc as still  # noqa: F401 - imported before: it stays
    assert gc.isenabled()
    import wave  # noqa: F401


def test_later_imports_are_as_ever():
    with fast_imports(absent=["wave"]):
        assert gc.isenabled()
        import wave  # noqa: F401


def test_a_look_at_tokens_imports_no_kernels(tmp_path, small_model):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row in pair_rows(12)))
    code = (
        "import sys; from trl_cpo.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print('LOADED', [m for m in sys.modules if m.startswith(('bitsandbytes.', 'deepspeed.'))]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "audit", "--model", small_model, "--dataset", "p.jsonl", "--preflight-only"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout.endswith("LOADED []\n"), done.stdout + done.stderr
    assert done.stderr == "train: looking through 12 pairs\n"
