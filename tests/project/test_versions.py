"""The oldest and newest versions: `bash run.sh test --versions` tests what pyproject.toml claims."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from helpers.paths import ROOT, TESTS

FOLDER = TESTS / "versions"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_floors_are_those_of_pyproject():
    extras = [one for name, several in PROJECT["optional-dependencies"].items() if name != "test" for one in several]
    claimed = {}
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        (claimed[requirement.name],) = [each.version for each in requirement.specifier if each.operator == ">="]
    assert claimed.pop("torch") and pins("floors").keys() - claimed == {"torch"}
    for name, lowest in claimed.items():
        pinned = pins("floors")[name]
        assert pinned == lowest or re.fullmatch(re.escape(lowest) + r"(\.0)+", pinned), name


def test_torch_is_the_tested_one():
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    assert pins("floors")["torch"] == pins("newest")["torch"] == pinned and pins("newest").keys() == {"torch"}


def test_the_telling_tests_are_there():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not slow", "@tests/versions/telling.txt"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        # A collection calls nothing: CI's watch over what is called is not for it.
        env={name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 250 <= sum(int(line.rsplit(": ", 1)[1]) for line in done.stdout.splitlines() if ".py: " in line) <= 400


@pytest.mark.parametrize("word", ["oldest", ""])
def test_other_versions_are_refused(word):
    done = subprocess.run(["bash", "run.sh", "test", "--versions", word], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and f"--versions takes floors or newest; got '{word}'" in done.stderr


@pytest.mark.parametrize("name", ["floors", "newest"])
def test_what_was_run_is_recorded(name):
    row = re.search(rf"^\| `{name}` \| .*\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M).group(0)
    assert re.search(r"\| 20\d\d-\d\d-\d\d \| \d+ passed", row) and "trl 1." in row
    assert name != "floors" or all(f"{each} {pins(name)[each]}" in row for each in ("trl", "transformers", "datasets"))
    assert "bash run.sh test --versions floors" in (ROOT / "README.md").read_text()
