"""The command line: help at once, exit codes, errors that end with the next command, recipes copied and never overwritten."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from trl_cpo import __version__, cli
from trl_cpo.cli import COMMANDS, command_parser, main
from trl_cpo.cli.errors import UserError, nearest, user_errors
from trl_cpo.cli.options import run_parser
from trl_cpo.cli.parser import ACCELERATES, ELSEWHERE, option_strings, unknown_options
from trl_cpo.data.loading import SourceError
from trl_cpo.recipes import names, recipe
from trl_cpo.run.arguments import PairArguments
from trl_cpo.run.data import load_sets

from helpers.paths import ROOT
from helpers.tiny import pair_rows

DOC = (ROOT / "docs" / "cli.md").read_text()


def test_every_command_has_its_module():
    assert cli.available() == list(COMMANDS)
    for name in COMMANDS:
        assert f"`trl-cpo {name}`" in DOC or f"trl-cpo {name} " in DOC, name


def test_the_overview(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w.*$", out, re.M), name
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trl-cpo {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_answers_within_a_second(arguments):
    """A second of the processor's time, whatever else the machine does; nothing heavy is imported."""
    code = (
        "import sys\nfrom trl_cpo.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('HEAVY', [m for m in ('torch', 'trl', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout.startswith("usage: trl-cpo"), done.stderr
    assert done.stdout.endswith("HEAVY []\n"), done.stdout[-300:]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_misspelt_recipe_is_answered_before_anything_heavy_is_imported(command):
    code = (
        "import sys\nfrom trl_cpo.cli import main\ncode = main(sys.argv[1:])\n"
        "print(code, [m for m in ('torch', 'trl', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, command, "--config", "dmeo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 []\n" and "Did you mean demo?" in done.stderr


def test_python_dash_m_and_the_script_are_the_same(tmp_path):
    entry = Path(sys.executable).with_name("trl-cpo")
    for command in ([sys.executable, "-m", "trl_cpo"], [str(entry)]):
        done = subprocess.run([*command, "recipes", "--json"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 0 and done.stderr == ""
        assert [each["name"] for each in json.loads(done.stdout)] == names()
        done = subprocess.run([*command, "recipe"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 2 and "Did you mean recipes?" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "no command given"),
        (["tran"], "unknown command tran; the commands are train, "),
        (["tran"], "Did you mean train?"),
        (["--versoin"], "unknown option --versoin"),
        (["recipes", "--jsno"], "unknown option --jsno. Did you mean --json?"),
        (["recipes", "cpoy", "demo"], "Did you mean copy?"),
        (["recipes", "copy"], "NAME"),
        (["recipes", "copy", "demmo"], "no recipe demmo"),
        (["recipes", "copy", "demmo"], "Did you mean demo?"),
        (["recipes", "copy", "../recipes/demo"], "no recipe ../recipes/demo"),
        (
            ["train"],
            "nothing to train was named. By default it would be HuggingFaceTB/SmolLM2-135M-Instruct on Anthropic/hh-rlhf",
        ),
        (["train"], "trl-cpo train --config demo"),
        (["train", "--config"], "--config"),
        (["train", "--config", "a", "--config", "b"], "--config is given twice"),
    ],
)
def test_mistakes_exit_with_2_and_name_the_next_command(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and "Traceback" not in captured.err
    last = captured.err.strip().splitlines()[-1]
    command = re.search(r"trl-cpo( \w+)?", last.partition(": ")[2] or last)
    assert command, f"no next command in {last!r}"
    assert not command.group(1) or command.group(1).strip() in COMMANDS


def test_train_without_arguments_shows_the_help_and_the_defaults(capsys, monkeypatch, tmp_path):
    def reached(*_, **__):
        raise AssertionError("a run was started")

    monkeypatch.setattr("trl_cpo.cli.options.parse_run", reached)
    assert main(["train"]) == 2
    err = capsys.readouterr().err
    assert "--dataset_name D" in err and "usage: trl-cpo train" in err
    assert "with constraint clip, gamma 0 and beta 0.1" in err


def test_exit_codes(monkeypatch, capsys):
    """Each of the documented codes, through a command that ends in each way."""

    class Ending:
        HELP = "Ends."

        @staticmethod
        def add_arguments(parser):
            parser.add_argument("--how")

        @staticmethod
        def run(options):
            if options.how in ("0", "1"):
                return int(options.how)
            raise {"user": UserError("wrong.\nNext: trl-cpo end"), "stop": KeyboardInterrupt, "bug": ZeroDivisionError("x")}[
                options.how
            ]

    monkeypatch.setitem(COMMANDS, "end", "end")
    monkeypatch.setitem(sys.modules, "trl_cpo.cli.end", Ending)
    monkeypatch.setattr(cli, "available", lambda: list(COMMANDS))
    codes = {how: main(["end", "--how", how]) for how in ("0", "1", "user", "bug", "stop")}
    assert codes == {"0": 0, "1": 1, "user": 2, "bug": 3, "stop": 130}
    err = capsys.readouterr().err
    assert "trl-cpo end: wrong.\nNext: trl-cpo end\n" in err
    assert err.count("Traceback") == 1 and "ZeroDivisionError: x" in err
    for code in set(codes.values()):
        assert re.search(rf"^\| {code} \|", DOC, re.M), code


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "import sys; from trl_cpo.cli import main; sys.exit(main(['--help']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.returncode == 0 and done.stderr == ""


def test_options_are_not_abbreviated(capsys):
    assert main(["recipes", "--js"]) == 2
    assert "unknown option --js" in capsys.readouterr().err


def test_unknown_options_and_their_values():
    known = ["--gamma", "--max_steps", "--beta"]
    assert unknown_options(["--gama", "-1", "--max-stepz=3", "x"], known) == [
        "unknown option --gama. Did you mean --gamma?",
        "unknown option --max-stepz. Did you mean --max_steps?",
    ]
    assert unknown_options(["-1"], known) == ["unknown argument -1."]
    assert unknown_options(["word"], known) == ["unknown argument word."]
    assert nearest("zzz", known) == ""


@pytest.mark.parametrize(
    "got, said",
    [
        ("torch_dtype", "Did you mean {}dtype?"),
        ("lora_rank", "Did you mean {}lora_r?"),
        ("lr", "Did you mean {}learning_rate?"),
        ("batch_size", "Did you mean {}per_device_train_batch_size?"),
        ("config_file", "It is accelerate's: accelerate launch --config_file ... -m trl_cpo train ..."),
        ("num_processes", "It is accelerate's: accelerate launch --num_processes ... -m trl_cpo train ..."),
    ],
)
def test_names_of_other_tools_are_known(tmp_path, capsys, got, said):
    """The nearest name by letters would be another one: torch_compile for torch_dtype."""
    assert main(["train", f"--{got}", "4"]) == 2
    err = capsys.readouterr().err
    assert f"unknown option --{got}. {said.format('--')}" in err
    (tmp_path / "recipe.yaml").write_text(f"{got}: 4\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert f"unknown key {got!r}. {said.format('')}" in capsys.readouterr().err


def test_what_other_tools_call_otherwise_is_named_as_it_is_here():
    known = option_strings(run_parser("x"))
    assert {f"--{name}" for name in ELSEWHERE.values()} <= set(known)
    assert not {f"--{name}" for name in (*ELSEWHERE, *ACCELERATES)} & set(known)


def test_pairs_held_out_are_counted_before_the_training_pairs_are_limited(tmp_path):
    rows = pair_rows(50)
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    options = PairArguments(dataset_name=str(tmp_path / "pairs.jsonl"), held_out=10, max_train_pairs=8)
    train, test, _, held_out, _ = load_sets(options)
    assert (len(train), len(test), held_out) == (8, 10, "10 of 50")


def test_pairs_that_repeat_leave_none_to_hold_out(tmp_path):
    """What the user can mend are the pairs: no split was named."""
    file = tmp_path / "pairs.jsonl"
    file.write_text((json.dumps({"prompt": "Why?", "chosen": " Rain.", "rejected": " No."}) + "\n") * 8)
    with pytest.raises(SourceError, match=r"pairs.jsonl repeat: all 1 that were held out are .*\(trl-cpo audit"):
        load_sets(PairArguments(dataset_name=str(file)))


def test_which_errors_are_the_users(tmp_path):
    from trl_cpo.data.loading import load_pairs

    with pytest.raises(UserError, match=r"(?s)There is no file or folder ./none.jsonl.*\nNext: x"), user_errors("Next: x"):
        load_pairs("./none.jsonl")
    for error in (ValueError("a library's"), KeyError("k"), FileNotFoundError("f")):
        with pytest.raises(type(error)), user_errors("Next: x"):
            raise error


def test_options_reach_trl_in_their_order():
    """What `trl-cpo train` does not know itself is handed on as it was written, negative numbers and lists included."""
    arguments = ["--gamma", "-1", "--lora_target_modules", "q_proj", "v_proj", "--use_peft", "--beta=0.2", "--seed", "1e3"]
    options, rest = command_parser("train").parse_known_args([*arguments[:5], "--config", "demo", *arguments[5:]])
    assert rest == arguments and options.config == ["demo"]


class TestRecipes:
    def test_listed_with_what_they_need(self, capsys):
        assert main(["recipes"]) == 0
        out = capsys.readouterr().out
        for name in names():
            each = recipe(name)
            assert f"{name}\n    {each.title}\n    needs {each.needs}\n" in out
            assert f"`{name}`" in DOC, name

    def test_copied_where_asked(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        text = recipe("demo").file.read_text()
        (tmp_path / "folder").mkdir()
        for arguments, file in (
            (["demo"], "demo.yaml"),
            (["demo", "mine.yaml"], "mine.yaml"),
            (["demo", "folder"], "folder/demo.yaml"),
        ):
            assert main(["recipes", "copy", *arguments]) == 0
            assert capsys.readouterr().out == f"{file}\n" and (tmp_path / file).read_text() == text

    def test_never_over_a_file(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "demo.yaml").write_text("mine")
        (tmp_path / "linked.yaml").symlink_to(tmp_path / "elsewhere.yaml")
        for arguments in (["demo"], ["demo", "linked.yaml"]):
            assert main(["recipes", "copy", *arguments]) == 2
            assert "exists and is not overwritten" in capsys.readouterr().err
        assert (tmp_path / "demo.yaml").read_text() == "mine" and not (tmp_path / "elsewhere.yaml").exists()
        assert main(["recipes", "copy", "demo", "no/such/folder/x.yaml"]) == 2
        assert "cannot write" in capsys.readouterr().err
