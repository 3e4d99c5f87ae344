"""Output folders: a run never overwrites existing files."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def is_taken(folder: str | Path) -> bool:
    """Whether `folder` exists and is not empty, or is a file."""
    path = Path(folder)
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def next_free(folder: str | Path) -> Path:
    """`folder`, or the first of `folder-2`, `folder-3`, … that is not taken."""
    path, number = Path(folder), 1
    while is_taken(path):
        number += 1
        path = Path(f"{folder}-{number}")
    return path


def refuse_taken(folder: str | Path) -> None:
    """Raises `FileExistsError` if `folder` is taken."""
    if is_taken(folder):
        raise FileExistsError(
            f"The output folder {folder} already holds files, and they are never overwritten. Give another --output_dir "
            f"({next_free(folder)} is free), or --resume_from_checkpoint latest to continue the run in it."
        )


@contextmanager
def making(folder: str | Path) -> Iterator[Path]:
    """Creates `folder` and its parents; if the block raises, removes those that it created and that are still empty."""
    path = Path(folder)
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except Exception:
        for each in missing:
            with suppress(OSError):
                each.rmdir()
        raise
