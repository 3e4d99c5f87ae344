"""Check the package with mypy: `python tests/processes/check_types.py` prints what differs from `mypy_baseline.txt`.

The baseline holds the errors that are left, without line numbers. It may only shrink. `--write` records what mypy finds now:
do that after errors were mended or modules were renamed, and read the diff.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "mypy_baseline.txt"
_HEAD = "# Errors of mypy that are left. No line may be added: see tests/processes/check_types.py.\n"
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


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record what mypy finds now")
    options = parser.parse_args(arguments)
    found = errors_in(mypy())
    differences = compared(found, read_baseline(BASELINE.read_text() if BASELINE.is_file() else ""))
    if differences:
        print("\n".join(differences))
    print(f"{found.total()} errors, {'as recorded' if not differences else f'{len(differences)} differences'}")
    if options.write:
        BASELINE.write_text(_HEAD + "".join(f"{error}\n" for error in sorted(found.elements())))
        return 0
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
