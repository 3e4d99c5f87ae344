"""The log that a run writes: one short line for people, and every number as JSON for programs."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .log_file import read_log

__all__ = ["RunLog", "read_log"]


class RunLog(TrainerCallback):
    """Appends each log as a JSON line to `file`, and prints a short line about loss and gap; process 0 only.

    Lines are never changed or removed. A run that is resumed, or restarted into the same file, first writes
    `{"resumed_from": step}`; `read_log` then skips the lines that this makes void.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file)
        self._wrote = False

    def on_train_begin(self, args, state, control, **kwargs):
        others = not self._wrote and self.file.exists() and self.file.stat().st_size
        if state.is_world_process_zero and (state.global_step or others):
            self.append({"resumed_from": state.global_step})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        self.append({"step": state.global_step, **logs})
        line = self._line(logs, state)
        if line:
            print(line, flush=True)

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line of its own; process 0 calls it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab+") as lines:
            if lines.tell():
                lines.seek(-1, 2)
                torn = lines.read(1) != b"\n"  # the previous process was killed while writing
            else:
                torn = False
            try:
                lines.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
                lines.flush()
            except OSError as error:
                error.filename = str(self.file)
                raise
        self._wrote = True

    @staticmethod
    def _line(logs, state) -> str | None:
        name, prefix = ("train", "") if "loss" in logs else ("eval", "eval_")
        if f"{prefix}cpo/gap" not in logs or f"{prefix}loss" not in logs:
            return None
        value = {key: logs[f"{prefix}cpo/{key}"] for key in ("gap", "prefers_chosen", "in_undesirable_region")}
        line = (
            f"step {state.global_step:>5}/{state.max_steps} {name:>5}: loss {float(logs[f'{prefix}loss']):.4f}, "
            f"gap {value['gap']:+.2f} nats, prefers chosen {100 * value['prefers_chosen']:.0f} %, "
            f"in U {100 * value['in_undesirable_region']:.0f} %"
        )
        kl = logs.get(f"{prefix}cpo/kl")
        return line if kl is None else f"{line}, KL {kl:.3g} nats a token"
