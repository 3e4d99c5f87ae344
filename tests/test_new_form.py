"""A new form of the constraint is a file, its line in the table and its row in the matrix; everything else follows.

Two forms are added to a copy of the repository, one without and one with a hyperparameter of its own, and used there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from constraint_cases import CASES, case_of

from helpers.paths import ROOT

SQUARED = '''\
"""A penalty on the square of the violated part of the gap."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pairs import PairLogps
from .penalty import Penalty


@dataclass(frozen=True)
class Squared(Penalty):
    """DPO plus `λ/2 · max(0, γ − δ_θ)²`, λ = `penalty_weight`. λ = 0 is DPO."""

    def added_loss(self, pairs: PairLogps, multiplier: float) -> Tensor:
        return self.penalty_weight / 2 * torch.relu(self.gamma - pairs.gap) ** 2
'''
SQUARED_ROW = """\
    # 0.4/2 · (0, 3², 0.5²)
    "squared": Case(
        CONSTRAINTS["squared"](beta=0.5, gamma=1.0, penalty_weight=0.4),
        targets=(2, -3, 0),
        added=(0, 1.8, 0.05),
        dpo={"penalty_weight": 0.0},
    ),
"""
LIFT = '''\
"""The target margin, clipped from below as far as it may be raised."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..hyperparameters import hyperparameter
from ..pairs import PairLogps
from .base import Constraint


@dataclass(frozen=True)
class Lift(Constraint):
    """Clip, raised by at most r nats: `t = δ_ref + min(max(0, γ − δ_ref), r)`, r = `lift`. γ → −∞ is DPO."""

    lift: float = hyperparameter(10.0, "Most nats that a target is raised by.", above=0.0)

    def target(self, pairs: PairLogps) -> Tensor:
        return pairs.ref_gap + torch.clamp(self.gamma - pairs.ref_gap, min=0.0, max=self.lift)
'''
LIFT_ROW = """\
    # δ_ref + min(max(0, 1 − δ_ref), 2): 2 + 0, −3 + 2, 0 + 1
    "lift": Case(
        CONSTRAINTS["lift"](beta=0.5, gamma=1.0, lift=2.0), targets=(2, -1, 1), dpo={"gamma": -math.inf}
    ),
"""


class Copy:
    """A copy of the repository, and what was added to it by hand: lines by file."""

    def __init__(self, root: Path):
        self.root = root
        self.added: dict[str, int] = {}
        unwanted = shutil.ignore_patterns("__pycache__", ".*")
        for name in ("trl_cpo", "tests", "docs"):
            shutil.copytree(ROOT / name, root / name, ignore=unwanted)
        for name in ("README.md", "setup.cfg"):
            shutil.copy(ROOT / name, root / name)

    def write(self, file: str, text: str) -> None:
        assert not (self.root / file).exists()
        (self.root / file).write_text(text)
        self.added[file] = len(text.splitlines())

    def insert(self, file: str, before: str, text: str) -> None:
        """Lines, before the one line that begins so."""
        lines = (self.root / file).read_text().splitlines(keepends=True)
        (at,) = (number for number, line in enumerate(lines) if line.startswith(before))
        (self.root / file).write_text("".join([*lines[:at], text, *lines[at:]]))
        self.added[file] = self.added.get(file, 0) + len(text.splitlines())

    def add(self, name: str, form: str, row: str, docs: str) -> dict[str, int]:
        """What a stranger does for a form; gives the lines it took, by file."""
        self.added = {}
        table = "trl_cpo/constraints/__init__.py"
        self.write(f"trl_cpo/constraints/{name}.py", form)
        self.insert(table, "from .softplus", f"from .{name} import {name.title()}\n")
        self.insert(table, "}", f'    "{name}": {name.title()},\n')
        self.insert("tests/constraint_cases.py", "}", row)
        for file in ("README.md", "docs/constraints.md"):
            self.insert(file, "| `clip` |", docs)
        return self.added

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, "tests/processes/use_new_forms.py", *arguments]
        environment.pop("PYTEST_ADDOPTS", None)  # a plugin of the run around would judge these few tests
        return subprocess.run(program, cwd=self.root, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture
def copy(tmp_path):
    """With both forms, and what each of them took."""
    copy = Copy(tmp_path)
    copy.took = {
        "squared": copy.add("squared", SQUARED, SQUARED_ROW, "| `squared` | λ/2 · max(0, γ − δ_θ)² |\n"),
        "lift": copy.add("lift", LIFT, LIFT_ROW, "| `lift` | min(max(δ_ref, γ), δ_ref + lift) |\n"),
    }
    # A hyperparameter has a row of its own.
    copy.insert("docs/constraints.md", "| `epsilon` |", "| `lift` | 10.0 | nats |\n")
    return copy


def test_a_new_form_is_a_file_a_line_and_a_row(copy):
    """With a new hyperparameter and without: the matrix, config, command line, report, certificates and theory know it."""
    for name, added in copy.took.items():
        print(f"{name}: {len(added)} files, {sum(added.values())} lines, of them by file {added}")
        beside = {file: lines for file, lines in added.items() if not file.endswith(f"constraints/{name}.py")}
        # The table's line and its import, the row of the matrix, and a row in the docs' tables.
        assert beside["trl_cpo/constraints/__init__.py"] == 2 and beside["tests/constraint_cases.py"] <= 7
        assert len(beside) == 4 and sum(beside.values()) - beside["tests/constraint_cases.py"] <= 5
    done = copy.run()
    assert done.returncode == 0 and done.stdout.endswith("all of it follows\n"), done.stdout[-4000:] + done.stderr[-2000:]
    # Every test of the contract ran on both, and on the new hyperparameter.
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 40


@pytest.mark.slow(26)
def test_the_trainer_trains_with_a_new_form(copy):
    """Every test that the trainer's own forms pass."""
    copy.run()  # writes the stub
    done = copy.run("--trainer")
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 40


def test_a_missing_row_is_named_with_what_to_add(monkeypatch):
    monkeypatch.delitem(CASES, "clip")
    with pytest.raises(pytest.fail.Exception, match=r"no row for the form 'clip'\. Add CASES\['clip'\] = Case\(Clip\("):
        case_of("clip")
