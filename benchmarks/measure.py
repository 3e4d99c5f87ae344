"""Measures time (arms interleaved in one process, ratios of medians) and memory (peaks in fresh processes)."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Seconds(NamedTuple):
    """Seconds of wall-clock time, and of this process's CPU time, which other work on the machine hardly affects."""

    wall: float
    cpu: float


def synchronised(run: Callable[[], Any]) -> Seconds:
    """The time `run` takes, with the GPU's queue empty at start and end."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = Seconds(time.perf_counter(), time.process_time())
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - start.wall, time.process_time() - start.cpu)


def interleaved(arms: Mapping[str, Callable[[Any], Any]], batches: Sequence[Any]) -> dict[str, list[Seconds]]:
    """Times every arm on every batch. Arms alternate, so that disturbances of the machine affect all alike.

    Each arm first runs the first batch once as a warm-up. The arm that starts changes from batch to batch.
    """
    for run in arms.values():
        run(batches[0])
    seconds: dict[str, list[Seconds]] = {name: [] for name in arms}
    names = list(arms)
    for number, batch in enumerate(batches):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(synchronised(lambda name=name, batch=batch: arms[name](batch)))
    return seconds


def compared(seconds: Mapping[str, Sequence[Seconds]], baseline: str, ours: str) -> dict[str, float]:
    """How many times faster `ours` is: the ratio of medians, and the smallest and largest ratio of a single batch."""
    ratios = [b.wall / o.wall for b, o in zip(seconds[baseline], seconds[ours], strict=True)]
    wall, cpu = (
        {arm: statistics.median(getattr(taken, clock) for taken in seconds[arm]) for arm in (baseline, ours)}
        for clock in ("wall", "cpu")
    )
    return {
        "baseline_s": wall[baseline],
        "ours_s": wall[ours],
        "ratio": wall[baseline] / wall[ours],
        "cpu_ratio": cpu[baseline] / cpu[ours],
        "lowest": min(ratios),
        "highest": max(ratios),
        "batches": len(ratios),
    }


def _peak_in_child(work: Callable[[Callable[[], None]], None], answer) -> None:
    """Runs `work(loaded)`, which calls `loaded()` once its model is in memory; answers the peak above that point, MiB."""
    base = [0.0]
    if torch.cuda.is_available():

        def loaded():
            torch.cuda.reset_peak_memory_stats()
            base[0] = torch.cuda.memory_allocated()

        work(loaded)
        answer.put((torch.cuda.max_memory_allocated() - base[0]) / 2**20)
        return

    def loaded():
        # Writing 5 resets the high-water mark to the current resident size, so that a peak during loading does not count.
        Path("/proc/self/clear_refs").write_text("5")
        base[0] = _resident("VmRSS")

    work(loaded)
    answer.put(_resident("VmHWM") - base[0])


def _resident(field: str) -> float:
    """Resident MiB of this process, now ("VmRSS") or its maximum so far ("VmHWM"). Linux only."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 2**10


def peak_memory(work: Callable[[Callable[[], None]], None]) -> float:
    """The peak of `work` above the loaded model, in MiB, measured in a fresh process (allocated on a GPU, else RSS).

    NaN if the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=_peak_in_child, args=(work, answer))
    child.start()
    while child.is_alive() and answer.empty():
        time.sleep(0.1)
    if answer.empty():
        child.join()
        return float("nan")  # killed, most likely for memory
    peak = answer.get()
    child.join()
    return peak
