"""The picture of the package in docs/design.md, held against the code: who imports whom, and that imports point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_cpo

from helpers.paths import ROOT

PACKAGE = Path(trl_cpo.__file__).parent

#: Each module or folder at the top of the package, what it is, and what of the package it imports. A line imports lines
#: below it alone. Those above the blank line are what a user starts; below it the method, and what it stands on.
LAYOUT = {
    "__main__": ("python -m trl_cpo", {"cli"}),
    "cli": (
        "the command line",
        {
            "audit",
            "certificates",
            "constraint_names",
            "data",
            "files",
            "plan",
            "quoting",
            "recipes",
            "report",
            "run",
            "scoring",
            "stress",
        },
    ),
    "__init__": ("the public names", {"config", "monitor", "trainer"}),
    "monitor": (
        "PairMonitor: pairs and price, for any trainer",
        {"data", "faults", "files", "logs", "metrics", "pairs", "price", "run", "scoring"},
    ),
    "run": (
        "one training run, from pairs to a folder",
        {"config", "constraint_fields", "data", "decisions", "engine", "files", "labels", "logs", "pairs", "trainer"},
    ),
    "selftest": ("an untested TRL against plain formulas", {"_trl", "config", "files", "trainer"}),
    "decisions": ("the right option: preferred, likeliest, given", {"intervals"}),
    "audit": (
        "look before you train",
        {"data", "intervals", "metrics", "pairs", "quoting", "scoring", "slices", "theory", "units"},
    ),
    "certificates": ("what held-out pairs prove", {"constraints", "data", "files", "intervals", "quoting", "scoring", "units"}),
    "stress": (
        "whether a gain holds under other prompts",
        {"_trl", "data", "engine", "files", "gaps", "intervals", "quoting", "scoring", "units"},
    ),
    "scoring": ("a model scores a set of pairs", {"_trl", "config", "data", "engine"}),
    "report": ("one page of pictures of runs", {"constraint_names", "files", "gaps", "intervals", "logs", "slices", "units"}),
    "plan": ("what a device will hold", set()),
    "recipes": ("settings with a name", set()),
    "trainer": (
        "compute_loss with the constraint",
        {"config", "engine", "labels", "logs", "metrics", "multiplier", "price"},
    ),
    "config": (
        "its options",
        {
            "_trl",
            "constraint_fields",
            "constraints",
            "engine",
            "faults",
            "hyperparameters",
            "labels",
            "metrics",
            "pairs",
            "price",
            "units",
            "unset",
        },
    ),
    "price": ("what training did to the model", {"engine", "faults", "files"}),
    "theory": ("closed forms, in float64", {"constraints", "gaps", "objective", "pairs"}),
    "engine": ("DPOTrainer: exact resume, packing, guards", {"_trl", "data", "faults", "files", "pairs"}),
    "_trl": ("the seam: all of upstream's insides", {"data", "files", "pairs"}),
    "objective": ("the pair loss by itself, for tests and theory", {"pairs"}),
    "constraint_fields": ("the forms' hyperparameters as options", {"constraints", "hyperparameters"}),
    "labels": (
        "how sure a pair is, by how much, of which group",
        {"constraints", "faults", "hyperparameters", "metrics", "multiplier", "pairs"},
    ),
    "multiplier": ("the dual variable", {"constraints"}),
    "constraints": ("one form of the constraint a file", {"hyperparameters", "pairs"}),
    "metrics": ("what is logged of the gap", {"gaps", "pairs"}),
    "constraint_names": ("the same names, without torch", set()),
    "hyperparameters": ("one declaration each: default, help, bounds", {"faults"}),
    "logs": ("a run's log, and in words", {"files", "quoting", "units"}),
    "pairs": ("log-probabilities of a batch of pairs", {"units"}),
    "data": ("reading, HH-RLHF, validation, the demo's pairs", {"files", "quoting"}),
    "gaps": ("regions of the gap", set()),
    "slices": ("parts of a set of pairs, by a column", set()),
    "intervals": ("intervals of fractions and means", set()),
    "faults": ("sentences for options", set()),
    "files": ("where to write, and whole; what is read", {"quoting"}),
    "quoting": ("other people's text, made harmless", set()),
    "units": ("nats per response or per token", set()),
    "unset": ("defaults, told from the same value given", set()),
}


def imported(path: Path, package: Path = PACKAGE) -> set[str]:
    """First names, below the folder `package`, of what a file in it imports."""
    depth, inside = len(path.relative_to(PACKAGE).parts) - 1, len(package.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.ImportFrom) and node.level):
            continue
        folder = path.relative_to(PACKAGE).parts[: depth - (node.level - 1)]
        parts = (*folder, *((node.module or "").split(".") if node.module else ()))
        if parts[:inside] != package.relative_to(PACKAGE).parts:
            continue
        found |= {parts[inside]} if len(parts) > inside else {alias.name for alias in node.names}
    return found


def import_graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        graph.setdefault(name, set()).update(imported(path, package) - {name, "__version__"})
    return graph


def picture() -> str:
    width = max(map(len, LAYOUT))
    lines = [f"{name:<{width}}  {what:<47}  {', '.join(sorted(needs))}".rstrip() for name, (what, needs) in LAYOUT.items()]
    return "\n".join(f"    {line}" for line in lines)


def test_the_layout_is_that_of_the_code():
    graph = import_graph()
    assert set(graph) == set(LAYOUT)
    wrong = {name: sorted(needs) for name, needs in graph.items() if needs != LAYOUT[name][1]}
    assert not wrong, f"imports that LAYOUT does not say, or no longer there; the code has {wrong}"


def test_imports_point_one_way():
    order = list(LAYOUT)
    for place, (name, (_, needs)) in enumerate(LAYOUT.items()):
        assert needs <= set(order[place + 1 :]), f"{name} imports what stands above it"


def test_the_picture_in_the_docs_is_this():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    if picture() not in text:
        print(picture())
        pytest.fail("docs/design.md does not have the block printed above: put it there.")


#: Modules of the engine that may be imported by others of it only in this order, first those that import the most.
ENGINE = [
    "dpo_trainer", "preflight", "resume", "start_check", "slow_steps", "guards", "interruption", "batching", "reference",
    "forward", "processes", "shutdown", "model_state", "precision", "config", "__init__",
]  # fmt: skip


def test_the_engine_points_one_way_too():
    graph = import_graph(PACKAGE / "engine")
    assert set(graph) == set(ENGINE)
    for place, name in enumerate(ENGINE):
        needs = graph[name] - {"config", "dpo_trainer"} if name == "__init__" else graph[name]
        assert needs <= set(ENGINE[place + 1 :]), f"engine.{name} imports {sorted(needs)}"


def test_the_engine_loads_no_constraint():
    code = (
        "import sys; from trl_cpo.engine import DPOConfig, DPOTrainer\n"
        "method = ('constraints', 'multiplier', 'metrics', 'config', 'trainer', 'objective', 'theory')\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'trl_cpo' and m.split('.')[1:2] and m.split('.')[1] in method])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("word", ["constraint", "lagrangian", "multiplier", "gamma"])
def test_the_engine_does_not_name_what_it_does_not_know(word):
    """In code, that is; help texts and docstrings may say what stands on it."""
    for path in (PACKAGE / "engine").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not [name for name in names if word in name.lower()], path.relative_to(PACKAGE)


METHOD = ["pairs.py", "objective.py", "constraints", "multiplier.py", "trainer.py", "_trl/loss.py"]


def test_the_method_is_read_in_an_hour():
    """At most 1,000 lines, no module above 300, the trainer at most 260; and nothing about the plumbing."""
    files = [file for name in METHOD for file in ([PACKAGE / name] if name.endswith(".py") else (PACKAGE / name).glob("*.py"))]
    lines = {file.relative_to(PACKAGE).as_posix(): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert sum(lines.values()) <= 1000, lines
    assert max(lines.values()) <= 300 and lines["trainer.py"] <= 260, lines
    for file in files:
        names = {
            node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
        }
        assert not [name for name in names if any(word in name for word in ("resume", "pack", "checkpoint"))], file.name
