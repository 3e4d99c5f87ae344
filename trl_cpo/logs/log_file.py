"""Reading a run's log, without any of the libraries that it takes to write one."""

import json
from pathlib import Path
from typing import Any


def read_log(file: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log that count, in order: what a `RunLog` would hold had the run never been interrupted.

    Lines torn by a kill, and lines of no step, are skipped. `{"resumed_from": step}` takes back every earlier line of a
    later step (every line before it, where step is 0: the run began anew), and a line takes back an earlier one of its
    step and its names.
    """
    kept: dict[tuple, dict[str, Any]] = {}
    for text in Path(file).read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(line, dict):
            continue
        if isinstance(line.get("resumed_from"), int):
            start = line["resumed_from"]
            kept = {key: old for key, old in kept.items() if start and key[0] <= start}
        elif isinstance(line.get("step"), int):
            key = line["step"], *sorted(line)
            kept.pop(key, None)  # its place is that of the later one
            kept[key] = line
    return list(kept.values())
