"""Runs the self-test, and writes its outcome as JSON into a file, or on the screen: `python -m trl_cpo.selftest [FILE]`."""

import contextlib
import json
import sys
import time
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Exit code 0: every check passed; 1: one did not."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        from datasets import disable_progress_bars

        from .._trl import trial, upstream
        from ..files.atomic import write_json

        disable_progress_bars()
        with upstream.on_trial():
            from . import checks

            failed = checks.run()
    seconds = round(time.perf_counter() - started, 1)
    outcome = {"format": 1, "about": trial.subject(), "failed": failed, "seconds": seconds}
    if arguments:
        write_json(Path(arguments[0]), outcome)
    else:
        print(json.dumps(outcome, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
