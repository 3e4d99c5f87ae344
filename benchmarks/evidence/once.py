"""What several runs share is made once, also where they run side by side."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def made(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, a file or folder; where there is none, `make` is given a place to make it in. A half of it is never used."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            place = target.with_name(target.name + ".making")
            if place.is_dir():
                shutil.rmtree(place)
            make(place)
            place.rename(target)
    return target
