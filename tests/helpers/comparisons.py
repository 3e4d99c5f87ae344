"""Two runs or two checkpoints, compared to the last bit in all but their times."""

import json
from pathlib import Path

import torch

from trl_cpo.engine.resume import checkpoints

TIMINGS = ("_runtime", "_per_second")


def without_timings(record: dict) -> dict:
    return {k: v for k, v in record.items() if not k.endswith(TIMINGS)}


def same(a, b) -> bool:
    """Equality to the last bit, through nested containers and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def differences(ours: Path, theirs: Path) -> list[str]:
    """The files of two checkpoints that differ in anything but times."""
    names = {str(path.relative_to(folder)) for folder in (ours, theirs) for path in folder.rglob("*") if path.is_file()}
    different = []
    for name in sorted(names):
        a, b = ours / name, theirs / name
        if not a.exists() or not b.exists():
            different.append(f"{name} (on one side only)")
        elif name == "training_args.bin" or name.endswith(".md"):
            continue  # they name the output folder
        elif a.suffix in (".pt", ".pth"):
            loaded = [torch.load(file, weights_only=False) for file in (a, b)]
            if not same(*loaded):
                different.append(name)
        elif name == "trainer_state.json":
            states = [json.loads(file.read_text()) for file in (a, b)]
            for state in states:
                state["log_history"] = [without_timings(record) for record in state["log_history"]]
                state["best_model_checkpoint"] = state["best_model_checkpoint"] and Path(state["best_model_checkpoint"]).name
            if states[0] != states[1]:
                different.append(name)
        elif name == checkpoints.STATE_FILE:
            states = [json.loads(file.read_text()) for file in (a, b)]
            for state in states:
                # A run that was interrupted has written more checkpoints on its way.
                del state["seconds"], state["run"], state["order"]
                state["files"].pop("training_args.bin")
            if states[0] != states[1]:
                different.append(name)
        elif a.read_bytes() != b.read_bytes():
            different.append(name)
    return different
