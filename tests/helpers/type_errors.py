"""The package held against mypy: what it finds, and what is recorded as left."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from helpers.paths import ROOT

BASELINE = ROOT / "mypy_baseline.txt"
HEAD = "# Errors of mypy that are left. No line may be added: see tests/processes/check_types.py.\n"
_ERROR = re.compile(r"(?P<file>.+?):\d+(?::\d+)?: error: (?P<words>.+)")
_CODE = re.compile(r"  (\[[a-z0-9-]+\])$")
_MOST = 200  # characters of a message; some list every option of a library


def mypy(*arguments: str | Path, path: Path = ROOT) -> str:
    """What mypy prints, with the configuration of this project; `path` is where it looks for packages."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--no-error-summary", *arguments],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(path)},
        capture_output=True,
        text=True,
    )
    if done.returncode not in (0, 1) or done.stderr:
        raise RuntimeError(f"mypy failed: {done.stdout}{done.stderr}")
    return done.stdout


def errors_in(output: str) -> Counter[str]:
    """The errors in mypy's output, `file: message [code]`, without line numbers, with their counts."""
    found: Counter[str] = Counter()
    for line in output.splitlines():
        if match := _ERROR.fullmatch(line):
            words = match["words"]
            code = code_match[1] if (code_match := _CODE.search(words)) else ""
            message = _CODE.sub("", words)
            message = message if len(message) <= _MOST else message[:_MOST] + "…"
            found[f"{match['file']}: {message} {code}".rstrip()] += 1
    return found


def read_baseline(text: str) -> Counter[str]:
    return Counter(line for line in text.splitlines() if line and not line.startswith("#"))


def compared(found: Counter[str], recorded: Counter[str]) -> list[str]:
    """A line for every error that is new, and for every recorded one that occurs no more."""
    new = [f"new: {error}" for error in sorted((found - recorded).elements())]
    return new + [f"mended, take it out of the baseline: {error}" for error in sorted((recorded - found).elements())]
