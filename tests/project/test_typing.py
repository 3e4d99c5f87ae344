"""Types: what a type checker tells the user of this package, and the errors of the package itself, which may only shrink."""

import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

from helpers.once import once
from helpers.paths import ROOT
from helpers.type_errors import BASELINE, compared, errors_in, mypy, read_baseline

#: What decides the errors that mypy finds.
DECIDING = ("mypy", "torch", "transformers", "trl", "peft", "numpy", "matplotlib")

RIGHT = """
from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

args = CPOConstrainedConfig("out", constraint="clip", gamma=1.0, logps_reduction="mean")
trainer = CPOConstrainedTrainer(model="model", args=args)
trainer.train()
"""
#: Snippets with one fault each, and the error for it.
WRONG = {
    "constraint": (
        'from trl_cpo import CPOConstrainedConfig\nCPOConstrainedConfig("out", constraint="clipp")\n',
        r'Argument "constraint" .* incompatible type "(str|Literal\[.clipp.\]\??)".*\[arg-type\]',
    ),
    "import_name": ("from trl_cpo import CPOTrainer\n", r'no attribute "CPOTrainer".*\[attr-defined\]'),
    "field": (
        'from trl_cpo import CPOConstrainedConfig\nCPOConstrainedConfig("out", gama=1.0)\n',
        r'keyword argument "gama".*\[call-arg\]',
    ),
    "gamma": (
        'from trl_cpo import CPOConstrainedConfig\nCPOConstrainedConfig("out", gamma="1")\n',
        r'Argument "gamma" .* incompatible type "str"; expected "float".*\[arg-type\]',
    ),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, list[str]]:
    """What mypy says of a user's code, in one run: by snippet, the lines about it."""
    return once(tmp_path_factory, "mypy", said_in)


def said_in(folder: Path) -> dict[str, list[str]]:
    snippets = {"right": RIGHT, **{name: code for name, (code, _) in WRONG.items()}}
    files = [folder / f"{name}.py" for name in snippets]
    for file, code in zip(files, snippets.values(), strict=True):
        file.write_text(code)
    lines = mypy(*files).splitlines()
    return {file.stem: [line for line in lines if line.partition(":")[0].endswith(file.name)] for file in files}


@pytest.mark.slow(40)
def test_right_code_of_a_user_has_no_error(said):
    assert said["right"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_code_of_a_user_is_an_error(said, name):
    errors = [line for line in said[name] if ": error: " in line]
    assert len(errors) == 1 and re.search(WRONG[name][1], errors[0]), said[name]


@pytest.mark.slow
def test_the_package_has_the_recorded_errors_and_no_other():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    others = [name for name in DECIDING if version(name).partition("+")[0] != pins[name]]
    if others:
        pytest.skip(f"the baseline was recorded with the versions in constraints.txt; others are installed: {others}")
    differences = compared(errors_in(mypy()), read_baseline(BASELINE.read_text()))
    assert differences == [], "\n".join(["mypy_baseline.txt may only shrink:", *differences])


def test_the_baseline_holds_errors_of_files_that_are_there():
    text = BASELINE.read_text()
    recorded = list(read_baseline(text).elements())
    assert recorded == sorted(recorded)
    assert [line for line in recorded if not (ROOT / line.partition(": ")[0]).is_file()] == []


def test_differences_are_told_both_ways_and_without_line_numbers():
    output = "a.py:3: error: Wrong  [misc]\na.py:3: note: Why\na.py:7:2: error: Wrong  [misc]\nb.py:1: error: Other  [index]\n"
    found = errors_in(output)
    assert found == Counter({"a.py: Wrong [misc]": 2, "b.py: Other [index]": 1})
    assert compared(found, found) == []
    assert compared(found, read_baseline("# head\na.py: Wrong [misc]\nc.py: Gone [misc]\n")) == [
        "new: a.py: Wrong [misc]",
        "new: b.py: Other [index]",
        "mended, take it out of the baseline: c.py: Gone [misc]",
    ]
