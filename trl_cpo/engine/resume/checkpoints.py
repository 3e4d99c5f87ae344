"""Checkpoint folders: staged and moved into place once complete; found again; refused if incomplete."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...files.claims import CLAIM

#: Staging folder, inside a run's folder, for checkpoints being written or deleted. Uploads to the hub skip `_*`.
UNFINISHED = "_unfinished"
#: The file that trl-cpo adds to a checkpoint of transformers.
STATE_FILE = "trl_cpo_state.json"
#: Version of that file's layout.
FORMAT = 1
TRAINER_STATE_FILE = "trainer_state.json"

_NAME = re.compile(r"checkpoint-(\d+)")
_WHOLE, _REPLACED, _REMOVED = "whole-", "replaced-", "removed-"
#: Patterns of weight files: unsharded or in shards, of adapters, of FSDP, of DeepSpeed.
_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model.*", "*/adapter_model.*", "latest")
#: Suffixes of files that a resume reads numbers from; their sizes are recorded. Others (model card, tokenizer) may be edited.
_MEASURED = (".safetensors", ".bin", ".pt", ".pth", ".distcp")
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM)


class CheckpointError(ValueError):
    """There is no checkpoint to resume from, or it is incomplete."""


class NotStaged(Exception):
    """There is no staged checkpoint to publish; another machine on the same disk has moved it."""


def staging(run_dir: str | Path) -> Path:
    """The staging folder of `run_dir`, into which its checkpoints are written first."""
    return Path(run_dir) / UNFINISHED


def clean_up(run_dir: str | Path) -> None:
    """Cleans up after a killed run: deletes half-written checkpoints, restores a complete one that was being replaced."""
    folder = staging(run_dir)
    if not folder.is_dir():
        return
    for replaced in folder.glob(f"{_REPLACED}checkpoint-*"):
        final = Path(run_dir) / replaced.name.removeprefix(_REPLACED)
        if not final.exists():
            with suppress(FileNotFoundError):  # another machine on the same disk has moved it
                os.rename(replaced, final)
    shutil.rmtree(folder, ignore_errors=True)


def sync(folder: Path) -> None:
    """Flushes everything in `folder` to disk, so that a later rename cannot reach the disk before the contents."""
    for here, _, names in os.walk(folder):
        for path in [*(os.path.join(here, name) for name in names), here]:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                if path == here:  # not every system can open folders
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
    """Moves the checkpoint `name` from the staging folder into `run_dir` by one rename, replacing an older one.

    Raises:
        NotStaged: there is no such checkpoint; `run_dir` is unchanged.
    """
    claimed, final = staging(run_dir) / f"{_WHOLE}{name}", Path(run_dir) / name
    # Claim the staged folder first. On a network disk this machine may have a stale view of a folder that another one has
    # already moved; the checkpoint in place must not be removed for one that is gone.
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
    """Deletes a checkpoint; if the process is killed, the checkpoint is either complete or gone."""
    aside = staging(folder.parent)
    aside.mkdir(exist_ok=True)
    os.rename(folder, aside / f"{_REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes `state` and the sizes of the checkpoint's files into `folder`; floats are stored exactly."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(_measured(folder))}
    (folder / STATE_FILE).write_text(json.dumps({**state, "files": files}, indent=1) + "\n", encoding="utf-8")


def read_state(folder: str | Path) -> dict[str, Any] | None:
    """Reads what `write_state` wrote; None if another trainer wrote the checkpoint."""
    file = Path(folder) / STATE_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _measured(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix in _MEASURED and path.is_file())


def fault_of(folder: str | Path) -> str | None:
    """Why `folder` cannot be resumed from, as text for a message; None if it is a complete checkpoint."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if folder.absolute().parent.name == UNFINISHED:
        return "the run ended while writing or deleting it"
    return fault_within(folder)


def fault_within(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`, staged or not, as text for a message; None if it is complete."""
    for name, required in ((TRAINER_STATE_FILE, True), (STATE_FILE, False)):
        file = folder / name
        if not file.exists():
            if required:
                return f"it has no {name}, which is written last; the run probably ended while writing it"
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            return f"its {name} cannot be read ({error})"
        if required and not (isinstance(content, dict) and isinstance(content.get("global_step"), int)):
            return f"its {name} has no global_step"
        if not required and not (isinstance(content, dict) and isinstance(content.get("files"), dict)):
            return f"its {name} lists no files"
        if not required and content.get("format") != FORMAT:
            return f"its {name} has format {content.get('format')!r}; this version of trl-cpo reads format {FORMAT}"
        if not required:
            for path, size in content["files"].items():
                found = (folder / path).stat().st_size if (folder / path).is_file() else None
                if found != size:
                    return f"its {path} " + ("is missing" if found is None else f"has {found} bytes, expected {size}")
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
        return "it holds no weights"
    return None


def step_of(folder: str | Path) -> int | None:
    """The step after which a checkpoint was written; None if it cannot be read."""
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
    """The complete checkpoints of the run that wrote the latest one, by step, lowest first.

    An earlier run may have left checkpoints with higher steps in the same folder. Resumed from one of those, the later run
    would end at once.
    """
    whole = whole_checkpoints(run_dir)
    if not whole:
        return {}
    runs = {step: (read_state(path) or {}).get("run") for step, path in whole.items()}
    last = max(whole, key=lambda step: _age(whole[step]))
    return {step: path for step, path in whole.items() if runs[step] == runs[last]}


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step of the run that wrote last, or None."""
    return next(reversed(of_last_run(run_dir).values()), None)


def refusal(folder: str | Path, fault: str) -> CheckpointError:
    """The error for an incomplete checkpoint; names the newest complete one beside it."""
    beside = Path(folder).absolute().parent
    run_dir = beside.parent if beside.name == UNFINISHED else beside
    newest = newest_checkpoint(run_dir)
    if newest:
        advice = f"Resume from {newest}, the newest complete checkpoint there."
    else:
        advice = f"There is no complete checkpoint in {run_dir}; train from the start."
    return CheckpointError(f"Cannot resume from {folder}: {fault}. {advice}")


def is_fresh(run_dir: str | Path) -> bool:
    """Whether `run_dir` holds only what a run leaves if it is killed before its first checkpoint.

    A damaged checkpoint does not count as fresh: checkpoints appear complete, so something else must have damaged it.
    """
    return Path(run_dir).is_dir() and {UNFINISHED, CLAIM, "log.jsonl", "README.md", "runs"}.issuperset(os.listdir(run_dir))
