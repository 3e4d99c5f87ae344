"""
Measures training steps on a GPU, ours and DPOTrainer's, and puts them beside what was predicted.

    python -m benchmarks.gpu                        # all rows: some 10 minutes on an H200, estimated from those that ran
    python -m benchmarks.gpu --only "8b lora"       # those whose name contains this
    python -m benchmarks.gpu --trial                # tiny rows, on a CPU too: that it runs
    python -m benchmarks.gpu --table gpu.jsonl      # the table of a file, nothing measured

Every model has random weights in the shape of Qwen2.5-0.5B, Qwen2.5-1.5B or Qwen3-8B, in bfloat16. A record a line is
added to --out as it comes.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from .rows import ALL, ROWS, TRIAL, Row


def about() -> dict[str, Any]:
    """The card, which one of its kind, and the versions."""
    import torch

    names = ("trl-cpo", "trl", "transformers", "torch", "peft")
    found = {name: _version(name) for name in names}
    card, machine = "cpu", ""
    if torch.cuda.is_available():
        card, machine = torch.cuda.get_device_name(), str(getattr(torch.cuda.get_device_properties(), "uuid", ""))[:8]
    return {"when": time.strftime("%Y-%m-%d"), "card": card, "machine": machine, "versions": found}


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:
        return "not installed"


def measured(rows: list[Row], *, loop: bool) -> Iterator[dict[str, Any]]:
    """A record of each row and arm. An arm's trainer is made once for all rows of a model."""
    import torch

    from .models import CONFIGS, useful_operations
    from .steps import freed, measure, train, trainer_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for (size, training), group in groupby(rows, lambda row: (row.size, row.training)):
        of_model = list(group)
        arms = dict.fromkeys(arm for row in of_model for arm in row.arms)
        for arm in arms:
            own = [row for row in of_model if arm in row.arms]
            start = time.perf_counter()
            try:
                trainer = trainer_of(own[0], arm, device)
            except Exception as error:
                # Without a GPU, varlen: the other arms go on.
                yield from ({"row": row.name, "arm": arm, **_failure(error)} for row in own)
                continue
            began = {"start_s": time.perf_counter() - start, "start_bytes": 0}
            if device.type == "cuda":
                began["start_bytes"] = torch.cuda.max_memory_allocated()
            print(f"{size} {training}: {arm} made in {began['start_s']:.1f} s", flush=True)
            for row in own:
                record: dict[str, Any] = {"row": row.name, "arm": arm, **(began if row is own[0] else {})}
                try:
                    record |= measure(trainer, row, device)
                    lengths = [pair for batch in range(row.batches) for pair in row.lengths(batch)]
                    work = useful_operations(CONFIGS[size], lengths, full=training == "full")
                    record["useful_operations"] = work / row.batches
                    if loop and row is of_model[0]:
                        record |= train(trainer, row, device)
                except Exception as error:
                    record |= _failure(error)
                freed()
                yield record
            del trainer
            freed()


def _failure(error: Exception) -> dict[str, str]:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return {"failed": "out of memory"}
    traceback.print_exception(error)
    return {"failed": f"{type(error).__name__}: {error}"[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=None, help="rows whose name contains one of these")
    parser.add_argument("--arms", nargs="*", default=ALL, choices=ALL, help="default: those that each row names")
    parser.add_argument("--out", default="gpu.jsonl", help="file to add records to")
    parser.add_argument("--trial", action="store_true", help="tiny rows: that the program runs")
    parser.add_argument("--loop", action="store_true", help="also time train() itself, on each model's first row")
    parser.add_argument("--table", default=None, help="print the table of this file, and measure nothing")
    options = parser.parse_args()
    from .table import short_table, table

    if options.table is not None:
        records = [json.loads(line) for line in Path(options.table).read_text().splitlines()]
        print(table(records), short_table(records), sep="\n\n")
        return
    rows = [
        replace(row, arms=tuple(arm for arm in row.arms if arm in options.arms))
        for row in (TRIAL if options.trial else ROWS)
        if options.only is None or any(part in row.name for part in options.only)
    ]
    if not rows:
        parser.error(f"no row's name contains {options.only}; the rows are {', '.join(row.name for row in ROWS)}")
    arms = list(dict.fromkeys(arm for row in rows for arm in row.arms))
    if len(arms) > 1 and not options.trial:
        # Each in a process of its own: what one leaves behind would be counted as another's.
        command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--arms"]
        for arm in arms:
            subprocess.run([*command, arm], check=False)
        return
    facts, records = about(), []
    for record in measured(rows, loop=options.loop):
        records.append({**facts, **record})
        with Path(options.out).open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        shown = record.get("failed") or f"{1000 * sum(record['new_s']) / len(record['new_s']):.0f} ms"
        print(f"{record['row']}: {record['arm']} {shown}", flush=True)
    print(table(records))


if __name__ == "__main__":
    main()
