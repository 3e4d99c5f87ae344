"""A plugin of pytest that says which modules of the package no test has run, and fails the session where there are any.

    PYTEST_ADDOPTS="-p helpers.executed" bash run.sh test

A module is run once a function of it was called, in the tests' own processes; one that defines none needs no call.
"""

import ast
import inspect
import os
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

PACKAGE = str(ROOT / "trl_cpo") + os.sep
_called: set[str] = set()
_watched: set[str] = set()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """Watches the first case of every test, since it takes as long again to watch one."""
    name = item.nodeid.partition("[")[0]
    if name in _watched:
        yield
        return
    _watched.add(name)
    sys.setprofile(lambda frame, event, _: _note(frame.f_code) if event == "call" else None)
    try:
        yield
    finally:
        sys.setprofile(None)


def _note(code) -> None:
    # Bodies of modules and classes are not optimized; they run when a module is imported.
    if code.co_flags & inspect.CO_OPTIMIZED and code.co_filename.startswith(PACKAGE):
        _called.add(code.co_filename)


def _never_called() -> list[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    modules = [path for path in Path(PACKAGE).rglob("*.py") if str(path) not in _called]
    return sorted(
        str(path.relative_to(ROOT))
        for path in modules
        if any(isinstance(node, functions) for node in ast.walk(ast.parse(path.read_text())))
    )


def pytest_sessionfinish(session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["executed"] = sorted(_called)
    elif never := _never_called():
        session.config.never_called = never
        session.exitstatus = session.exitstatus or 1


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_testnodedown(node) -> None:
    _called.update(getattr(node, "workeroutput", {}).get("executed", ()))


def pytest_terminal_summary(terminalreporter, config) -> None:
    if never := getattr(config, "never_called", None):
        terminalreporter.section("modules of which no function was called")
        terminalreporter.write_line("\n".join(never))
    else:
        terminalreporter.write_line("A function of every module of the package was called.")
