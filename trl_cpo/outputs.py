"""Where a run may write: never over what is there."""

from pathlib import Path


def is_taken(folder: str | Path) -> bool:
    """Whether `folder` exists and holds anything (or is a file)."""
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
            f"The output folder {folder} already holds files, and nothing in it is overwritten. Give another "
            f"--output_dir ({next_free(folder)} is free), or --resume_from_checkpoint latest to go on with the run in it."
        )
