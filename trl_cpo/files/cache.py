"""The cache folder, for files that can be recreated: the demo's model, tables of log-probabilities."""

import os
import stat
from pathlib import Path


def cache_root() -> Path:
    """The cache folder: $TRL_CPO_CACHE, else $XDG_CACHE_HOME/trl_cpo, else ~/.cache/trl_cpo. It may not exist yet."""
    if own := os.environ.get("TRL_CPO_CACHE"):
        return Path(own).expanduser().absolute()
    general = os.environ.get("XDG_CACHE_HOME")
    return (Path(general).absolute() if general else Path.home() / ".cache") / "trl_cpo"


def is_own(status: os.stat_result) -> bool:
    """Whether only this user, or root, can have written a file: it is theirs, and not writable by everybody."""
    if not hasattr(os, "geteuid"):  # not a POSIX system, which has no such owners
        return True
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & stat.S_IWOTH
