"""What a disk refuses, in words: who raised it, and as what, differs from library to library."""

import errno
import os
import re
from pathlib import Path

_REFUSALS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "EIO")
    if hasattr(errno, name)
}
# As libraries written in Rust say it, such as safetensors; in words; and as torch does where a file could not be written to
# its end.
_NUMBERED = re.compile(r"\(os error (\d+)\)")
_FULL = re.compile(r"No space left on device")
_CUT_OFF = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+")


class CannotWrite(OSError):
    """A folder cannot be made or written into; the message says which, and why."""


def refusal(error: BaseException) -> str | None:
    """What the disk refused, where that is what `error`, or what it came from, is about; None: it is about something else."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, CannotWrite):
            return str(error)
        if isinstance(error, OSError) and error.errno in _REFUSALS:
            where = "A file" if error.filename is None else os.fsdecode(error.filename)
            return f"{where} cannot be used: {os.strerror(error.errno or 0)}."
        numbered = _NUMBERED.search(str(error))
        number = int(numbered[1]) if numbered else errno.ENOSPC if _FULL.search(str(error)) else 0
        if isinstance(error, Exception) and number in _REFUSALS:
            return f"A file cannot be written: {os.strerror(number)}."
        if isinstance(error, RuntimeError) and _CUT_OFF.search(str(error)):
            return "A file could not be written to its end: the disk is full, or was taken away."
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return None


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents. Raises `CannotWrite`, with the part of the path that is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        for part in (folder, *folder.parents):
            if part.is_symlink() and not part.exists():
                why = f"{part} is a link to nothing"
                break
            if part.exists():
                why = f"{part} is a file" if not part.is_dir() else f"{why} in {part}"
                break
        raise CannotWrite(f"The folder {folder} cannot be made: {why}. Nothing was written.") from error


def left_in(folder: Path) -> list[str]:
    """The names of what a run that could not write on has left."""
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith(("_", ".")))
    except OSError:
        return []
