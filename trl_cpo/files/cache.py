"""The cache folder, for files that can be recreated: the demo's model, tables of log-probabilities."""

import os
from pathlib import Path


def cache_root() -> Path:
    """The cache folder: $TRL_CPO_CACHE, else $XDG_CACHE_HOME/trl_cpo, else ~/.cache/trl_cpo. It may not exist yet."""
    if own := os.environ.get("TRL_CPO_CACHE"):
        return Path(own).expanduser().absolute()
    general = os.environ.get("XDG_CACHE_HOME")
    return (Path(general).absolute() if general else Path.home() / ".cache") / "trl_cpo"
