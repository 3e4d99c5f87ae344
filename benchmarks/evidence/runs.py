"""Runs, one after the other or side by side, and their records."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .arms import device
from .bench import EXPERIMENTS, Bench


class Records:
    """Runs, a line each; a run is found again by what tells it apart."""

    def __init__(self, file: Path):
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.runs = [json.loads(line) for line in lines]

    def has(self, key: dict[str, Any]) -> bool:
        return any(all(run.get(name) == value for name, value in key.items()) for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")


def run_of(job: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """The record of one run."""
    torch.set_num_threads(1)
    began, name = time.perf_counter(), job["experiment"]
    found = bench.run(name, job["variant"], job["arm"], job["seed"])
    about = {
        "scale": bench.scale[f"{name}_arms"],
        "settings": EXPERIMENTS[name].get(job["arm"], {}),
        "seconds": round(time.perf_counter() - began),
        "when": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if device().type == "cuda" else "cpu",
        "versions": {name: _version(name) for name in ("trl-cpo", "trl", "transformers", "torch", "peft")},
    }
    return {**job, **found, **about}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def done(bench: Bench, jobs: list[dict[str, Any]], processes: int) -> Iterator[dict[str, Any]]:
    """The records of these runs, as they end. Side by side, one that fails stops no other; failures are raised at the end."""
    if processes == 1:
        yield from (run_of(job, bench) for job in jobs)
        return
    failed: list[Exception] = []
    # Spawned: a forked process cannot use a GPU that this one has touched.
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_Worker.begin, initargs=(bench,)) as pool:
        for future in as_completed([pool.submit(_Worker.run, job) for job in jobs]):
            try:
                found = future.result()
            except Exception as error:
                failed.append(error)
                continue
            yield found
    if failed:
        raise ExceptionGroup(f"{len(failed)} of {len(jobs)} runs failed", failed)


class _Worker:
    """A process of the pool: its texts and tasks are read once."""

    bench: Bench

    @classmethod
    def begin(cls, bench: Bench) -> None:
        cls.bench = bench

    @classmethod
    def run(cls, job: dict[str, Any]) -> dict[str, Any]:
        return run_of(job, cls.bench)
