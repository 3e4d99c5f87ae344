"""A plugin of pytest that says which modules of the package no test has run, and fails the session where there are any.

    PYTEST_ADDOPTS="-p helpers.executed" bash run.sh test

A module is run once a function of it was called, in the tests' own processes; one that defines none needs no call. The tests
take longer under it, most of all before Python 3.12.
"""

import ast
import inspect
import os
import sys
from pathlib import Path

from helpers.paths import ROOT

PACKAGE = str(ROOT / "trl_cpo") + os.sep
_called: set[str] = set()


def _start() -> None:
    if sys.version_info >= (3, 12):
        monitoring, tool = sys.monitoring, sys.monitoring.COVERAGE_ID
        monitoring.use_tool_id(tool, "trl_cpo's tests")

        def on_start(code, offset):
            _note(code)
            return monitoring.DISABLE  # once is enough

        monitoring.register_callback(tool, monitoring.events.PY_START, on_start)
        monitoring.set_events(tool, monitoring.events.PY_START)
    else:
        sys.setprofile(lambda frame, event, _: _note(frame.f_code) if event == "call" else None)


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


def pytest_configure(config) -> None:
    # A process that only hands out tests to others runs none.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        _start()


def pytest_sessionfinish(session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["executed"] = sorted(_called)
    elif never := _never_called():
        session.config.never_called = never
        session.exitstatus = session.exitstatus or 1


def pytest_testnodedown(node) -> None:
    _called.update(getattr(node, "workeroutput", {}).get("executed", ()))


def pytest_terminal_summary(terminalreporter, config) -> None:
    if never := getattr(config, "never_called", None):
        terminalreporter.section("modules of which no function was called")
        terminalreporter.write_line("\n".join(never))
    else:
        terminalreporter.write_line("A function of every module of the package was called.")
