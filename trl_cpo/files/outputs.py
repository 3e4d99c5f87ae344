"""Output folders: a run never overwrites existing files, and has its folder to itself."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .claims import CLAIM, Claimed, claim, is_claimed
from .disk import CannotWrite, make_folder


def is_taken(folder: str | Path) -> bool:
    """Whether `folder` exists and is not empty, is a file, or is a live run's. What a killed run's claim holds is free."""
    return _holds_files(folder) or is_claimed(folder)


def _holds_files(folder: str | Path) -> bool:
    path = Path(folder)
    return path.exists() and (not path.is_dir() or any(each.name != CLAIM for each in path.iterdir()))


def next_free(folder: str | Path) -> Path:
    """`folder`, or the first of `folder-2`, `folder-3`, … that is not taken."""
    path, number = Path(folder), 1
    while is_taken(path):
        number += 1
        path = Path(f"{folder}-{number}")
    return path


@contextmanager
def claimed(folder: str | Path) -> Iterator[Path]:
    """Makes `folder` as `making` does, and claims it for this process until the block ends.

    Raises:
        Claimed: a live run has it.
        CannotWrite: it cannot be made or written into.
    """
    with making(folder) as path, ExitStack() as held:
        try:
            held.enter_context(claim(path))
        except Claimed as error:
            raise Claimed(
                f"{error} Two runs in one folder would overwrite each other. Give another --output_dir ({next_free(folder)} is "
                "free), or wait for its end."
            ) from None
        except OSError as error:
            raise CannotWrite(f"The folder {path} cannot be written into: {error.strerror}. Nothing was written.") from error
        yield path


@contextmanager
def claimed_next(folder: str | Path) -> Iterator[Path]:
    """Claims `folder`, or the first of `folder-2`, `folder-3`, … that is free; two at once get two."""
    while True:
        path = next_free(folder)
        with ExitStack() as held:
            try:
                held.enter_context(claimed(path))
            except Claimed:
                continue
            # It was free before it was claimed; a run that ended in between has left its files.
            if not _holds_files(path):
                yield path
                return


def refuse_taken(folder: str | Path) -> None:
    """Raises `FileExistsError` if `folder` holds files, other than this run's claim."""
    if _holds_files(folder):
        raise FileExistsError(
            f"The output folder {folder} already holds files, and they are never overwritten. Give another --output_dir "
            f"({next_free(folder)} is free), or --resume_from_checkpoint latest to continue the run in it."
        )


@contextmanager
def making(folder: str | Path) -> Iterator[Path]:
    """Creates `folder` and its parents; if the block raises, removes those that it created and that are still empty.

    Raises:
        CannotWrite: the folder cannot be made.
    """
    path = Path(folder)
    missing = [each for each in (path, *path.parents) if not each.exists()]
    make_folder(path)
    try:
        yield path
    except Exception:
        for each in missing:
            with suppress(OSError):
                each.rmdir()
        raise
