"""Reads a run's log, without importing the libraries needed to write one."""

import json
from pathlib import Path
from typing import Any

from ..files.schema import COUNT


def read_log(file: str | Path) -> list[dict[str, Any]]:
    """The valid lines of a run's log, in order, as if the run had never been interrupted.

    Skips lines torn by a kill and lines without a step. `{"resumed_from": step}` voids all earlier lines of later steps, or
    all earlier lines if step is 0, because the run then started over. A line also replaces an earlier one with the same
    step and the same keys.
    """
    kept: dict[tuple, dict[str, Any]] = {}
    for text in Path(file).read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(line, dict):
            continue
        if _is_step(line.get("resumed_from")):
            start = line["resumed_from"]
            kept = {key: old for key, old in kept.items() if start and key[0] <= start}
        elif _is_step(line.get("step")):
            key = line["step"], *sorted(line)
            kept.pop(key, None)  # a replaced line moves to the place of the later one
            kept[key] = line
    return list(kept.values())


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and COUNT.holds(value)
