"""Claims: a folder belongs to one live process at a time, and a process that died holds nothing."""

import errno
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system: the process noted in the claim decides alone
    fcntl = None  # type: ignore[assignment]

#: The claim in a folder. Uploads to the hub skip `_*`.
CLAIM = "_claim.json"
# The folders that this process holds. A lock does not keep the process that has it from taking it again.
_held: set[Path] = set()


class Claimed(FileExistsError):
    """Another run, which is still alive, has the folder."""


@contextmanager
def claim(folder: str | Path) -> Iterator[None]:
    """Holds an existing folder for this process alone, until the block or the process ends.

    The claim is a file that is made exclusively and locked; it notes its process. The system frees the lock when the
    process dies, however it dies, so that a claim left behind is known as stale, and replaced. A process of this machine
    that lives keeps it even where the file system has no locks; one of another machine counts as dead there.

    Raises:
        Claimed: a live process has the folder.
        OSError: the claim cannot be written.
    """
    key, file = Path(os.path.realpath(folder)), Path(folder) / CLAIM
    descriptor = None if key in _held else _take(file)
    if descriptor is None:
        raise Claimed(f"The folder {folder} is in use by {_owner(file)}.")
    _held.add(key)
    owner = os.getpid()
    try:
        yield
    finally:
        _held.discard(key)
        with suppress(OSError):
            if os.getpid() == owner and _is_same(descriptor, file):  # a forked child leaves its parent's claim
                file.unlink()
        os.close(descriptor)


def is_claimed(folder: str | Path) -> bool:
    """Whether a live process holds the folder, this one included."""
    file = Path(folder) / CLAIM
    if Path(os.path.realpath(folder)) in _held:
        return True
    try:
        descriptor = _open(file, os.O_RDWR)
    except OSError:
        return os.path.lexists(file) and not os.path.islink(file)  # a claim that this user may not touch
    try:
        return not _is_stale(descriptor)
    finally:
        os.close(descriptor)


def _take(file: Path) -> int | None:
    """The descriptor of a new, locked claim; None where a live process has one."""
    for _ in range(20):
        try:
            descriptor = _open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            if not _remove_stale(file):
                return None
            continue
        except FileNotFoundError:
            file.parent.mkdir(parents=True, exist_ok=True)  # a run beside this one has failed, and taken its folder away
            continue
        # Whoever looked between the two steps may have held the lock for a moment, or removed the file.
        if _lock(descriptor) is not False and _is_same(descriptor, file):
            note = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
            os.write(descriptor, json.dumps(note).encode() + b"\n")
            return descriptor
        os.close(descriptor)
        time.sleep(0.01)
    return None


def _remove_stale(file: Path) -> bool:
    """Removes a claim whose process is dead. Nothing is ever written into one that is found."""
    try:
        descriptor = _open(file, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        if not file.is_symlink():  # nothing here makes a link
            raise
        file.unlink()
        return True
    try:
        if not _is_stale(descriptor):
            return False
        if _is_same(descriptor, file):
            file.unlink()
        return True
    finally:
        os.close(descriptor)


def _is_stale(descriptor: int) -> bool:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return True
    # A process that opens and closes its own claim loses the lock, and still has the folder.
    return _lock(descriptor) is not False and not _lives(_note(descriptor))


def _open(file: Path, how: int) -> int:
    # No link is followed, and a pipe does not block.
    return os.open(file, how | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o644)


def _lock(descriptor: int) -> bool | None:
    """Whether the lock could be had; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        # Of the process, not of the open file: a data loader's worker that outlives its run must not hold it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _is_same(descriptor: int, file: Path) -> bool:
    """Whether the open file still is the one at its path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except OSError:
        return False


def _note(descriptor: int) -> dict[str, Any]:
    try:
        note = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def _lives(note: dict[str, Any]) -> bool:
    pid = note.get("pid")
    if note.get("host") != socket.gethostname() or type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    # A number is given again to another process.
    return note.get("started") in (None, _started(pid))


def _started(pid: int) -> str | None:
    """When a process began, as Linux tells it; None elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _owner(file: Path) -> str:
    """The process of a claim, in words."""
    if Path(os.path.realpath(file.parent)) in _held:  # to open and close its claim would free the lock
        return "another run of this process"
    try:
        descriptor = _open(file, os.O_RDONLY)
    except OSError:
        return "another run"
    try:
        note = _note(descriptor)
    finally:
        os.close(descriptor)
    pid, host = note.get("pid"), note.get("host")
    known = type(pid) is int and isinstance(host, str) and host.isprintable() and len(host) < 256
    return f"another run (process {pid} on {host})" if known else "another run"
