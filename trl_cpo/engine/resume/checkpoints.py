"""Checkpoint folders: written aside and moved into place whole; found again; refused where they are not whole."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

#: Folder, inside a run's folder, of everything that is on its way in or out. Uploads to the hub leave out `_*`.
UNFINISHED = "_unfinished"
#: What trl-cpo keeps in a checkpoint beside what transformers keeps there.
STATE_FILE = "trl_cpo_state.json"
#: How that file is laid out.
FORMAT = 1
TRAINER_STATE_FILE = "trainer_state.json"

_NAME = re.compile(r"checkpoint-(\d+)")
_WHOLE, _REPLACED, _REMOVED = "whole-", "replaced-", "removed-"
#: Any of these holds weights: whole, in shards, of adapters, of FSDP, of DeepSpeed.
_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model.*", "*/adapter_model.*", "latest")
#: Files that a resume reads numbers from. The others (a model card, a tokenizer) may be edited.
_MEASURED = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


class CheckpointError(ValueError):
    """There is no checkpoint to resume from, or it is not whole."""


class NotStaged(Exception):
    """There is no checkpoint to publish: another machine on the disk was first."""


def staging(run_dir: str | Path) -> Path:
    """The folder that checkpoints of `run_dir` are written into."""
    return Path(run_dir) / UNFINISHED


def clean_up(run_dir: str | Path) -> None:
    """Clears what a killed run left: half-written checkpoints go, a finished one that was to be replaced comes back."""
    folder = staging(run_dir)
    if not folder.is_dir():
        return
    for replaced in folder.glob(f"{_REPLACED}checkpoint-*"):
        final = Path(run_dir) / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            with suppress(FileNotFoundError):  # another machine on the same disk was first
                os.rename(replaced, final)
    shutil.rmtree(folder, ignore_errors=True)


def sync(folder: Path) -> None:
    """Waits until everything in `folder` is on the disk, so that a rename cannot come to it before the contents."""
    for here, _, names in os.walk(folder):
        for path in [*(os.path.join(here, name) for name in names), here]:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                if path == here:  # not every system opens folders
                    continue
                raise
            try:
                os.fsync(descriptor)
            except OSError as error:
                if error.errno not in _NO_SYNC:
                    raise
            finally:
                os.close(descriptor)


def publish(run_dir: str | Path, name: str) -> None:
    """Moves the checkpoint `name` from the staging folder into `run_dir` by one rename, in place of an older one.

    Raises `NotStaged`, with `run_dir` as it was, if there is none.
    """
    claimed, final = staging(run_dir) / f"{_WHOLE}{name}", Path(run_dir) / name
    # The first thing asked of the disk: what a machine remembers of a folder on a network's disk may be older than a
    # rename by another one, and the checkpoint in place must not make room for one that is no longer there.
    try:
        os.rename(staging(run_dir) / name, claimed)
    except FileNotFoundError as error:
        raise NotStaged(f"{staging(run_dir) / name} is not there") from error
    if final.exists():
        os.rename(final, staging(run_dir) / f"{_REPLACED}{name}")
    os.rename(claimed, final)
    with suppress(OSError):
        descriptor = os.open(run_dir, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    shutil.rmtree(staging(run_dir), ignore_errors=True)


def excess_checkpoints(run_dir: str | Path, limit: int | None, best: str | None = None) -> list[Path]:
    """The checkpoints to delete so that `limit` are left: those written first, never the last one nor the best.

    As transformers' `rotate_checkpoints`, but by the order in which checkpoints say they were written: file times follow
    clocks, and a clock may go back.
    """
    if limit is None or limit <= 0:
        return []
    checkpoints = sorted(_named(run_dir).values(), key=_age)
    kept = {checkpoints[-1]} if checkpoints else set()
    if best is not None:
        kept.add(Path(best))
    excess = len(checkpoints) - max(limit, len(kept))
    return [path for path in checkpoints if path not in kept][: max(excess, 0)]


def next_order(run_dir: str | Path) -> int:
    """What a checkpoint about to be written into `run_dir` has for its order: one more than any that lies there."""
    return 1 + max((_age(path)[0] for path in _named(run_dir).values()), default=0)


def _age(checkpoint: Path) -> tuple[int, int]:
    """What checkpoints are sorted by, the first written first: their order, then their step.

    One that names no order, of version 0.1.0 or of another trainer, is older than all that do.
    """
    try:
        order = (read_state(checkpoint) or {}).get("order", 0)
    except (ValueError, OSError, RecursionError, AttributeError):
        order = 0  # damaged: refused where it is resumed from
    return order if isinstance(order, int) else 0, int(checkpoint.name.rpartition("-")[2])


def remove(folder: Path) -> None:
    """Deletes a checkpoint so that it is there whole or not at all, whenever the process is killed."""
    aside = staging(folder.parent)
    aside.mkdir(exist_ok=True)
    os.rename(folder, aside / f"{_REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes `state`, and the sizes of the checkpoint's files, into `folder`; floats are exact."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(_measured(folder))}
    (folder / STATE_FILE).write_text(json.dumps({**state, "files": files}, indent=1) + "\n", encoding="utf-8")


def read_state(folder: str | Path) -> dict[str, Any] | None:
    """What `write_state` wrote, or None if another trainer wrote the checkpoint."""
    file = Path(folder) / STATE_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _measured(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix in _MEASURED and path.is_file())


def fault_of(folder: str | Path) -> str | None:
    """Why nothing can be resumed from `folder`, in words, or None if it is a whole checkpoint."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if folder.absolute().parent.name == UNFINISHED:
        return "it was being written or deleted when the run ended"
    return fault_within(folder)


def fault_within(folder: Path) -> str | None:
    """What of a checkpoint `folder` lacks, in words, wherever the folder is; None if it is whole."""
    for name, required in ((TRAINER_STATE_FILE, True), (STATE_FILE, False)):
        file = folder / name
        if not file.exists():
            if required:
                return f"it has no {name}, which is written last, so it was probably being written when the run ended"
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            return f"its {name} cannot be read ({error})"
        if required and not (isinstance(content, dict) and isinstance(content.get("global_step"), int)):
            return f"its {name} names no global_step"
        if not required and not (isinstance(content, dict) and isinstance(content.get("files"), dict)):
            return f"its {name} names no files"
        if not required and content.get("format") != FORMAT:
            return f"its {name} has the format {content.get('format')!r}, and this version of trl-cpo reads {FORMAT}"
        if not required:
            for path, size in content["files"].items():
                found = (folder / path).stat().st_size if (folder / path).is_file() else None
                if found != size:
                    return f"its {path} " + ("is missing" if found is None else f"has {found} bytes and not {size}")
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        return "it holds no weights"
    return None


def step_of(folder: str | Path) -> int | None:
    """The step that a checkpoint was written after, or None if it does not say."""
    try:
        return json.loads((Path(folder) / TRAINER_STATE_FILE).read_text(encoding="utf-8"))["global_step"]
    except (ValueError, OSError, RecursionError, TypeError, KeyError):
        return None


def _named(run_dir: str | Path) -> dict[int, Path]:
    """The folders in `run_dir` that are named as checkpoints, by their steps, lowest first; whole or not."""
    folder = Path(run_dir)
    if not folder.is_dir():
        return {}
    named = {int(match[1]): folder / match[0] for match in map(_NAME.fullmatch, sorted(os.listdir(folder))) if match}
    return dict(sorted(named.items()))


def whole_checkpoints(run_dir: str | Path) -> dict[int, Path]:
    """The whole checkpoints in a folder by their steps, lowest first."""
    return {step: path for step, path in _named(run_dir).items() if fault_of(path) is None}


def of_last_run(run_dir: str | Path) -> dict[int, Path]:
    """Those of the whole checkpoints that were written by the run that wrote the last of them.

    An earlier run may have left some with higher steps in the same folder, which would end the later one at its start.
    """
    whole = whole_checkpoints(run_dir)
    if not whole:
        return {}
    runs = {step: (read_state(path) or {}).get("run") for step, path in whole.items()}
    last = max(whole, key=lambda step: _age(whole[step]))
    return {step: path for step, path in whole.items() if runs[step] == runs[last]}


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The whole checkpoint with the highest step of the run that wrote last, or None."""
    return next(reversed(of_last_run(run_dir).values()), None)


def refusal(folder: str | Path, fault: str) -> CheckpointError:
    """The error for a checkpoint that is not whole, with the newest one beside it that is."""
    beside = Path(folder).absolute().parent
    run_dir = beside.parent if beside.name == UNFINISHED else beside
    newest = newest_checkpoint(run_dir)
    step = f"The newest whole checkpoint there is {newest}" if newest else f"There is no whole checkpoint in {run_dir}"
    then = "resume from that" if newest else "train from the start"
    return CheckpointError(f"Cannot resume from {folder}: {fault}. {step}; {then}.")


def is_fresh(run_dir: str | Path) -> bool:
    """Whether `run_dir` holds nothing but what a run leaves that was killed before its first checkpoint.

    A damaged checkpoint is not such a thing: checkpoints come into place whole, so something else befell it.
    """
    return Path(run_dir).is_dir() and {UNFINISHED, "log.jsonl", "README.md", "runs"}.issuperset(os.listdir(run_dir))
