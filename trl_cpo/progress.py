"""What a run says while it works: one short line a log for people, every number as JSON for programs."""

import json
from pathlib import Path

from transformers import TrainerCallback


class RunLog(TrainerCallback):
    """Appends each log as a JSON line to `file`, and prints the gap's part of it, from the first process alone."""

    def __init__(self, file: str | Path):
        self.file = Path(file)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as lines:
            lines.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        line = self._line(logs, state)
        if line:
            print(line, flush=True)

    @staticmethod
    def _line(logs, state) -> str | None:
        name, prefix = ("train", "") if "loss" in logs else ("eval", "eval_")
        if f"{prefix}cpo/gap" not in logs or f"{prefix}loss" not in logs:
            return None
        value = {key: logs[f"{prefix}cpo/{key}"] for key in ("gap", "prefers_chosen", "in_undesirable_region")}
        return (
            f"step {state.global_step:>5}/{state.max_steps} {name:>5}: loss {float(logs[f'{prefix}loss']):.4f}, "
            f"gap {value['gap']:+.2f} nats, prefers chosen {100 * value['prefers_chosen']:.0f} %, "
            f"in U {100 * value['in_undesirable_region']:.0f} %"
        )
