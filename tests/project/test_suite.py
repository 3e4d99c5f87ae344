"""The tests themselves: what they share is in tests/helpers and in conftest.py files, never in another test module."""

import ast
import re
from pathlib import Path

import pytest

from helpers import executed
from helpers.once import once
from helpers.paths import ROOT, TESTS

PLACES = ("docs", "trl_cpo", "examples", "benchmarks", "deepspeed_configs")
MODULES = sorted(path for path in TESTS.rglob("*.py") if path.name != "__init__.py")


def imports_of(source: str) -> set[str]:
    """Dotted names of what a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def reaches_into_tests(path: Path, source: str) -> set[str]:
    """Imports of test modules and of the programs that tests start: of all under tests/ but helpers, and fuzz within fuzz."""
    open_to_it = {"helpers", path.parent.name} & {"helpers", "fuzz"}
    found = set()
    for name in imports_of(source):
        parts = name.split(".")
        inside = (TESTS / parts[0]).is_dir() and parts[0] not in open_to_it
        if inside or any(part in ("", "tests", "conftest") or part.startswith("test_") for part in parts):
            found.add(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_module_of_the_tests_imports_a_test_module(path):
    assert reaches_into_tests(path, path.read_text()) == set()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from test_identity import check", {"test_identity", "test_identity.check"}),
        ("def f():\n    import engine.test_guards", {"engine.test_guards"}),
        ("from .test_guards import x", {".test_guards", ".test_guards.x"}),
        ("from processes.kill_and_resume import same", {"processes.kill_and_resume", "processes.kill_and_resume.same"}),
        ("from fuzz.targets import TARGETS", {"fuzz.targets", "fuzz.targets.TARGETS"}),
        ("import conftest", {"conftest"}),
        ("from helpers.tiny import make_model\nimport trl_cpo.engine", set()),
    ],
)
def test_such_an_import_is_found(line, found):
    assert reaches_into_tests(TESTS / "engine" / "test_new.py", line) == found


def test_a_module_that_no_test_runs_is_named(monkeypatch):
    """By the plugin under which CI runs the fast tests."""
    modules = {str(path) for path in (ROOT / "trl_cpo").rglob("*.py")}
    monkeypatch.setattr(executed, "_called", modules - {str(ROOT / "trl_cpo" / "metrics.py")})
    assert executed._never_called() == ["trl_cpo/metrics.py"]
    monkeypatch.setattr(executed, "_called", set())
    executed._note(executed._note.__code__)
    executed._note(compile("pass", str(ROOT / "trl_cpo" / "metrics.py"), "exec"))
    assert executed._called == set(), "neither a function of another place nor an import counts"
    assert "-p helpers.executed" in (ROOT / ".ci" / "run").read_text()


def test_what_the_processes_of_a_run_share_is_made_once(tmp_path_factory):
    """And what could not be made is tried again, in another folder."""
    folders = []

    def make(folder):
        folders.append(folder)
        assert not list(folder.iterdir())
        (folder / "file").touch()
        if len(folders) == 1:
            raise OSError("a full disk")
        return {"made": len(folders)}

    with pytest.raises(OSError, match="a full disk"):
        once(tmp_path_factory, "shared-in-a-test", make)
    assert once(tmp_path_factory, "shared-in-a-test", make) == once(tmp_path_factory, "shared-in-a-test", make) == {"made": 2}
    assert len(set(folders)) == 2


def test_every_file_of_the_tests_that_is_named_is_there():
    """In the documents, the package, the examples and the configurations."""
    named = {}
    for path in (*ROOT.glob("*.md"), *(file for place in PLACES for file in (ROOT / place).rglob("*") if file.is_file())):
        if path.suffix in (".md", ".py", ".yaml", ".sh"):
            named |= dict.fromkeys(re.findall(r"tests/[\w/]+\.\w+", path.read_text(encoding="utf-8")), path.name)
    assert "tests/test_identity.py" in named
    assert {name: place for name, place in named.items() if not (ROOT / name).is_file()} == {}
