"""The cache folder, for files that can be recreated: the demo's model, tables of log-probabilities."""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

#: Set to 1 by a user who trusts everybody that can write into the cache folder.
TRUSTED_BY = "TRL_CPO_TRUST_CACHE"


class ForeignCache(OSError):
    """A cache folder that another user made, or that everybody can write into."""


def cache_root() -> Path:
    """The cache folder: $TRL_CPO_CACHE, else $XDG_CACHE_HOME/trl_cpo, else ~/.cache/trl_cpo. It may not exist yet."""
    if own := os.environ.get("TRL_CPO_CACHE"):
        return Path(own).expanduser().absolute()
    general = os.environ.get("XDG_CACHE_HOME")
    return (Path(general).absolute() if general else Path.home() / ".cache") / "trl_cpo"


def cache_folder(*parts: str) -> Path:
    """A folder in the cache, made if needed; it is this user's, and so is every folder down to it.

    Raises:
        ForeignCache: one of them is another user's, or open to everybody.
        OSError: it cannot be made.
    """
    folder = cache_root()
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        folder = folder / part
        # Open to those that the user's umask says, but never to everybody.
        with suppress(FileExistsError):
            folder.mkdir(mode=0o775)
        refuse_foreign(folder)
    return folder


def refuse_foreign(folder: Path) -> None:
    """Raises `ForeignCache` if a folder is another user's, or open to everybody; or a link of theirs, or to such a one."""
    status = os.lstat(folder)
    if stat.S_ISLNK(status.st_mode) and is_trusted(status, folder.parent) and folder.exists():
        status = folder.stat()
    if stat.S_ISDIR(status.st_mode) and is_trusted(status, folder):
        return
    if not stat.S_ISDIR(status.st_mode):
        what = "is no folder, or a link of another user"
    elif status.st_mode & stat.S_IWOTH:
        what = "can be written by everybody"
    else:
        what = f"belongs to another user (number {status.st_uid})"
    raise ForeignCache(
        f"The cache folder {folder} {what}: what lies in it may be anybody's. Set TRL_CPO_CACHE to a folder of yours, or "
        f"{TRUSTED_BY}=1 if you trust everybody who can write there."
    )


def is_trusted(status: os.stat_result, folder: Path) -> bool:
    """Whether a file, or folder, may be believed: `is_own`, or the user trusts the whole cache. `folder`: where it lies."""
    return os.environ.get(TRUSTED_BY) == "1" or is_own(status, folder)


def is_own(status: os.stat_result, folder: Path) -> bool:
    """Whether only this user, or root, can have written a file or folder: it is theirs, and not open to everybody.

    On some network file systems, and in some containers, one's own files have another owner's number. So a file made in
    `folder` tells too.
    """
    if not hasattr(os, "geteuid"):  # not a POSIX system, which has no such owners
        return True
    if status.st_mode & stat.S_IWOTH and not stat.S_ISLNK(status.st_mode):
        return False
    return status.st_uid in (os.geteuid(), 0) or status.st_uid == _owner_of_new_files(folder)


def _owner_of_new_files(folder: Path) -> int | None:
    file = folder / f".{os.getpid()}-{secrets.token_hex(8)}.owner"
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError:
        return None
    try:
        return os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
        file.unlink(missing_ok=True)
