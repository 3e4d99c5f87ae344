"""Fuzz at length: `python tests/fuzz/run.py --draws 1000000 [--seed N] [--only NAME ...]`; exit code 1 at a failure."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for fuzz

# isort: split

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split

import argparse
import random
import tempfile
import time
import warnings

import torch

from fuzz.targets import TARGETS


def run(name: str, draws: int, seed: int, folder: str) -> str:
    """Runs one target and gives the line that says what it did. Raises `AssertionError` with the numbers of a failure."""
    function, share = TARGETS[name]
    draws = max(1, round(draws * share))
    arguments = [folder] if name in ("configs", "recipes") else []
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accepted = function(random.Random(f"{name} {seed}"), draws, *arguments)
    some = "" if accepted is None else f", {accepted} of them accepted"
    return f"{name}: {draws} draws{some}, {time.perf_counter() - start:.1f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            try:
                print(run(name, options.draws, options.seed, folder), flush=True)
            except Exception as error:
                failed = True
                print(f"{name}: FAILED at seed {options.seed}: {type(error).__name__}: {error}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
