"""Timing and memory: arms interleaved in one process, ratios of medians with their spread, peaks in fresh processes."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Seconds(NamedTuple):
    """How long something took: on the wall, and of this process's CPU time, which other work on the machine hardly changes."""

    wall: float
    cpu: float


def synchronised(run: Callable[[], Any]) -> Seconds:
    """What `run` takes, with the GPU's queue empty at both ends."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = Seconds(time.perf_counter(), time.process_time())
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter() - start.wall, time.process_time() - start.cpu)


def interleaved(arms: Mapping[str, Callable[[Any], Any]], batches: Sequence[Any]) -> dict[str, list[Seconds]]:
    """Seconds of every arm on every batch, the arms taking turns, so that what disturbs the machine disturbs all alike.

    Each arm runs the first batch once beforehand, uncounted. The arm that begins changes from batch to batch.
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
    """How many times faster `ours` is: the ratio of medians, and the smallest and largest ratio on one batch."""
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
    """Runs `work(loaded)`, which calls `loaded()` when its model is in memory; answers MiB above that point."""
    base = [0.0]
    if torch.cuda.is_available():

        def loaded():
            torch.cuda.reset_peak_memory_stats()
            base[0] = torch.cuda.memory_allocated()

        work(loaded)
        answer.put((torch.cuda.max_memory_allocated() - base[0]) / 2**20)
        return

    def loaded():
        # Writing 5 lowers the high-water mark to what is resident now, so that a peak while loading does not count.
        Path("/proc/self/clear_refs").write_text("5")
        base[0] = _resident("VmRSS")

    work(loaded)
    answer.put(_resident("VmHWM") - base[0])


def _resident(field: str) -> float:
    """MiB of this process, now ("VmRSS") or at most so far ("VmHWM"); Linux alone tells."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 2**10


def peak_memory(work: Callable[[Callable[[], None]], None]) -> float:
    """MiB that `work` needs above the loaded model, at its peak, in a process of its own (allocated on a GPU, else RSS)."""
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
