"""Atomic writing: a file is written completely or not at all."""

import json
import math
import os
import re
import secrets
from pathlib import Path
from typing import Any

# A draft's name: hidden, beside the file, with the process and a random part.
_DRAFT = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.tmp")
#: Matches the drafts of every file in a folder.
DRAFTS = ".*.tmp"


def draft_of(name: str) -> str | None:
    """The name of the file that the draft `name` was meant to become; None if `name` is not a draft."""
    found = _DRAFT.fullmatch(name)
    return None if found is None else found["name"]


def replace_file(file: Path, content: bytes) -> None:
    """Writes `content` into a draft beside `file`, syncs it to disk, and renames it to `file`.

    If the process is killed at any moment, `file` holds either its old or its complete new content. The draft has a random
    name, never reuses an existing file and follows no link. A failure removes it; a kill leaves it behind (see `draft_of`).

    Raises:
        OSError: a step failed; `file` is unchanged.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write does not know its file
            error.filename = str(file)
        raise
    finally:
        draft.unlink(missing_ok=True)
    _sync_folder(file.parent)


def _sync_folder(folder: Path) -> None:
    # So that the rename survives a power cut. Not every file system can sync a folder.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def strict(value: Any) -> Any:
    """`value` as strict JSON: null for NaN and infinities, which JSON lacks, and strings for unknown objects."""
    if isinstance(value, dict):
        return {str(key): strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_json(file: Path, document: dict[str, Any]) -> None:
    """Writes `document` to `file` as strict JSON, atomically."""
    text = json.dumps(strict(document), indent=1, ensure_ascii=False, allow_nan=False)
    replace_file(file, f"{text}\n".encode())
