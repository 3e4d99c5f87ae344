"""Where a packed step's time goes, kernel by kernel."""

import json
from pathlib import Path

import torch

from .rows import VARLEN, Row
from .steps import batches_of, freed, set_checkpointing, step, synchronise, trainer_of


def kernels(row: Row, folder: Path, warm: int = 3) -> Path:
    """Writes a JSON file with the kernels of one step, longest first, and the time that the device was busy and was not."""
    from torch.profiler import ProfilerActivity, profile

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = trainer_of(row, VARLEN, device)
    set_checkpointing(trainer, row.checkpointing)
    *before, last = batches_of(row, 0, warm + 1)
    for rows in before:
        step(trainer, rows)
    synchronise(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step(trainer, last)
        synchronise(device)
    events = [event for event in found.events() if str(event.device_type).endswith("CUDA")]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy, end = 0.0, 0.0
    for start, stop in spans:
        busy, end = busy + max(0.0, stop - max(start, end)), max(end, stop)
    totals: dict[str, list[float]] = {}
    for event in events:
        total = totals.setdefault(event.name, [0.0, 0])
        total[0], total[1] = total[0] + event.time_range.elapsed_us() / 1000, total[1] + 1
    longest = sorted(totals.items(), key=lambda item: -item[1][0])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{row.size}-{row.training}.json"
    record = {
        "row": row.name,
        "span_ms": (spans[-1][1] - spans[0][0]) / 1000 if spans else 0.0,
        "busy_ms": busy / 1000,
        "kernels": sum(count for _, count in totals.values()),
        "longest": [{"name": name[:160], "ms": total, "calls": count} for name, (total, count) in longest[:40]],
    }
    file.write_text(json.dumps(record, indent=1) + "\n")
    del trainer
    freed()
    return file
