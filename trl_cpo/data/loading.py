"""Loads preference pairs and prepares them for training.

`load_pairs` reads rows as they are stored. `to_conversational` converts HH-RLHF text to messages, passes rows that TRL
understands, and refuses all others. `hold_out` splits a test set off a source that has none.
"""

import glob
import hashlib
import os
import random
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.cache import cache_folder
from ..quoting import harmless, names
from . import hh
from .demo import PAIR_FILES
from .expansion import Bomb, refuse_bombs
from .rows import first_pairs, refusal

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# The loader of `datasets` for each file ending.
FILE_KINDS = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".parquet": "parquet"}
_ALLOWED = (
    f"Give a {', '.join(FILE_KINDS)} file with one pair per row, a folder with such files or written by save_to_disk, "
    "the name of a dataset on the hub (owner/name; needs a network or the local cache), or one of the embedded sets, "
    f"{' and '.join(PAIR_FILES)}."
)
_FORMS = (
    "Allowed are prompt, chosen and rejected, all strings or all messages; chosen and rejected as messages that "
    r"begin with the prompt; or chosen and rejected as HH-RLHF text ('\n\nHuman: ...\n\nAssistant: ...')."
)
_REFUSED = "_trl_cpo_refused"
# Rows inspected to identify a dataset; several, so that a damaged first row does not hide HH-RLHF text.
_INSPECTED = 20


class SourceError(ValueError):
    """Pairs cannot be loaded or used; the message says what was got, what is allowed and what to do next."""


class NoSuchSplit(SourceError):
    """The source lacks a split; `known` lists the splits that it has."""

    def __init__(self, message: str, known: list[str]):
        super().__init__(message)
        self.known = known


def load_pairs(
    name_or_path: str | Path,
    split: str = "train",
    *,
    config: str | None = None,
    data_dir: str | None = None,
    streaming: bool = False,
) -> "Dataset | IterableDataset":
    """Loads a split of a source, with rows as they are stored.

    Args:
        name_or_path: "demo" or "demo-answers" (embedded pairs; use ./demo for a folder of that name), a file (.jsonl,
            .jsonl.gz, .json or .parquet; all of it is the split "train"), a folder (written by `save_to_disk`, or with data
            files whose names contain their split), or a dataset on the hub.
        split: name of the split.
        config: configuration of a folder's or hub dataset.
        data_dir: folder inside a folder's or hub dataset.
        streaming: whether to stream the rows instead of loading them.

    Raises:
        SourceError: the source does not exist, cannot be read, lacks the split, or has no rows.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name in PAIR_FILES:
        _refuse_options(name, "an embedded set", config=config, data_dir=data_dir)
        files = {key: Path(__file__).parent / "demo" / file for key, file in PAIR_FILES[name].items()}
        dataset = _from_files("json", files, name, split, streaming)
    elif path.is_file():
        _refuse_options(name, "a single file", config=config, data_dir=data_dir)
        dataset = _from_files(_file_kind(path), {"train": path}, name, split, streaming)
    elif path.is_dir():
        folder = path / data_dir if data_dir else path
        if not folder.is_dir():
            raise SourceError(f"The folder {name} has no subfolder {data_dir!r}. Correct data_dir.")
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            _refuse_options(name, "a folder written by save_to_disk", config=config)
            dataset = _from_saved(folder, split, streaming)
        else:
            # datasets names what it reads by a folder's last part, and "." has none.
            dataset = _from_loader(str(folder if folder.name else folder.resolve()), split, streaming, config)
    elif _looks_like_path(name):
        raise SourceError(f"There is no file or folder {name}. {_ALLOWED}")
    else:
        dataset = _from_loader(name, split, streaming, config, data_dir)
    with _readable(name):
        rows = list(first_pairs(dataset, 1))
    if not rows:
        raise SourceError(f"{name}, split {split!r}, has no rows. Give another split or source.")
    return dataset


def to_conversational(dataset: "Dataset | IterableDataset") -> "tuple[Dataset | IterableDataset, hh.RowReport | None]":
    """Converts rows to a form that DPOTrainer can train on.

    HH-RLHF text (strings, no `prompt`, beginning with a turn) becomes messages; its other columns are kept. Two forms pass
    unchanged: prompt, chosen and rejected, all strings or all messages; and chosen and rejected as messages that begin with
    the prompt.

    Returns:
        The rows; and for HH-RLHF text a report on refused rows, else None. The report on a streamed dataset fills as rows
        are read, and restarts with each pass.

    Raises:
        SourceError: the rows have none of these forms, or every HH-RLHF row was refused, or one of the others is damaged.
    """
    rows = list(first_pairs(dataset, _INSPECTED))
    if not rows:
        raise SourceError("The dataset has no rows. Give another split or source.")
    if not _is_hh(rows):
        # Streamed rows are looked at as they come, by the trainer.
        message = None if _is_streamed(dataset) else refusal(dataset, "the pairs")
        if message is not None:
            raise SourceError(f"{message} {_FORMS}")
        return dataset, None
    split = _split_rows(dataset)
    kept, report = _kept_stream(split) if _is_streamed(dataset) else _kept_rows(split)
    others = [column for column in rows[0] if column not in ("chosen", "rejected")]
    return kept.select_columns(["prompt", "chosen", "rejected", *others]), report


def hold_out(dataset: "Dataset", fraction_or_count: float | int, seed: int = 0) -> "tuple[Dataset, Dataset]":
    """Splits rows into a rest and a held-out part; returns both, in that order.

    The same seed and number of rows hold out the same rows on any machine. Both parts keep the rows' order.

    Args:
        dataset: the rows.
        fraction_or_count: how many rows to hold out: a fraction below 1, or a count.
        seed: seed of the choice.

    Raises:
        SourceError: the dataset is streamed, or a part would be empty.
    """
    if _is_streamed(dataset):
        raise SourceError("Cannot hold out rows of a stream. Load it without streaming, or give a test split.")
    rows, count = len(dataset), 0
    if isinstance(fraction_or_count, Integral) and not isinstance(fraction_or_count, bool):
        count = int(fraction_or_count)
    elif isinstance(fraction_or_count, float) and 0 < fraction_or_count < 1:
        count = max(1, round(rows * fraction_or_count))
    if not 0 < count < rows:
        allowed = f"Give a fraction above 0 and below 1, or a count from 1 to {rows - 1}."
        raise SourceError(f"Cannot hold {fraction_or_count!r} out of {rows} rows. {allowed}")
    held = set(random.Random(seed).sample(range(rows), count))
    rest = [row for row in range(rows) if row not in held]
    return dataset.select(rest), dataset.select(sorted(held))


def _refuse_options(name: str, kind: str, **options: str | None) -> None:
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise SourceError(f"{name} is {kind}, which does not take {' or '.join(given)}. Leave that out.")


def _looks_like_path(name: str) -> bool:
    # Hub datasets are named name or owner/name; neither part begins with a dot.
    return name.endswith(tuple(FILE_KINDS)) or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is None


def _file_kind(path: Path) -> str:
    if path.stat().st_size == 0:
        raise SourceError(f"The file {path} is empty. {_ALLOWED}")
    for ending, kind in FILE_KINDS.items():
        if path.name.endswith(ending):
            return kind
    raise SourceError(f"The file {path} is of an unknown kind. {_ALLOWED}")


def _check_split(split: str, known: list[str], name: str, slices: bool = True) -> None:
    # A split may be a sum of slices, such as train[:10%]+test.
    asked = [part.partition("[")[0].strip() for part in split.split("+")] if slices else [split]
    if not all(part in known for part in asked):
        advice = "Give one of these."
        if len(known) == 1:
            advice = "For a test set, hold out a fraction of the rows, or give a second source."
        raise NoSuchSplit(f"{name} has no split {split!r}; it has {names(known)}. {advice}", known)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        # datasets wraps the real error in a general one.
        cause = error.__cause__ or error
        raise SourceError(f"Could not load {name}: {type(cause).__name__}: {harmless(str(cause))}\n{_ALLOWED}") from error


def _from_files(kind: str, files: dict[str, Path], name: str, split: str, streaming: bool):
    import datasets

    _check_split(split, list(files), name)
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise SourceError(f"{name} lacks {', '.join(missing)}. Install trl-cpo again.")
    _refuse_bombs(files.values())
    with _readable(name):
        # As lists that are resolved already: datasets would take a name for a pattern, and a file's time for its identity.
        listed = {key: datasets.data_files.DataFilesList(*_identified(file)) for key, file in files.items()}
        return datasets.load_dataset(kind, data_files=listed, split=split, streaming=streaming)


def _refuse_bombs(files: Iterable[str | Path]) -> None:
    try:
        refuse_bombs(files)
    except Bomb as error:
        raise SourceError(str(error)) from error


def _identified(file: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    """A file's path, such that datasets takes it as it is, and its content, by which results are cached."""
    path, content = os.path.abspath(file), _digest([file])
    if re.fullmatch(r"[\w./@+=, -]*", path) is None:
        # datasets reads brackets and double colons as parts of an address.
        ending = next(ending for ending in FILE_KINDS if file.name.endswith(ending))
        link = cache_folder("pairs") / f"{content}{ending}"
        if not link.is_symlink() or os.readlink(link) != path:
            draft = link.with_name(f".{content}-{secrets.token_hex(4)}.tmp")
            os.symlink(path, draft)
            os.replace(draft, link)
        path = str(link)
    return [path], [(content,)]


def _digest(files: Iterable[str | Path]) -> str:
    """Of the files' contents, in that order."""
    whole = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as stream:
            whole.update(hashlib.file_digest(stream, "blake2b").digest())
    return whole.hexdigest()


def _from_saved(folder: Path, split: str, streaming: bool):
    import datasets

    _refuse_bombs(sorted(folder.rglob("*.arrow")))
    with _readable(str(folder)):
        saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.DatasetDict):
        saved = {"train": saved}
    _check_split(split, list(saved), str(folder), slices=False)
    # What is made of the rows is cached by this name, which state.json gives; it may have been kept while the rows changed.
    content = _digest(each["filename"] for each in saved[split].cache_files)
    saved[split]._fingerprint = hashlib.blake2b(f"{saved[split]._fingerprint} {content}".encode(), digest_size=8).hexdigest()
    return saved[split].to_iterable_dataset() if streaming else saved[split]


def _from_loader(name: str, split: str, streaming: bool, config: str | None, data_dir: str | None = None):
    import datasets

    is_folder = Path(name).is_dir()
    if is_folder and glob.has_magic(str(Path(name).resolve())):
        raise SourceError(
            f"The path of the folder {name} holds one of the characters * ? [, which would be read as a pattern. Rename it, or "
            "give the file in it."
        )
    with _readable(name):
        builder = datasets.load_dataset_builder(name, config, data_dir=data_dir)
        local = _local_files(builder.config.data_files) if is_folder else []
        _refuse_bombs(local)
        cache = os.path.join(datasets.config.HF_DATASETS_CACHE, "trl_cpo", _digest(local)) if local else None
    # Known before any download, unless the dataset's loader gives neither.
    known = [str(key) for key in (builder.info.splits or builder.config.data_files or ())]
    if known:
        _check_split(split, known, name)
    with _readable(name):
        own = {} if cache is None else {"cache_dir": cache}
        return datasets.load_dataset(name, config, data_dir=data_dir, split=split, streaming=streaming, **own)


def _local_files(data_files: dict[str, list[str]] | None) -> list[str]:
    """A folder's data files; none where some of them are elsewhere."""
    files = [file for key in sorted(data_files or ()) for file in data_files[key]]
    return files if all(os.path.isfile(file) for file in files) else []


def _is_streamed(dataset) -> bool:
    return not hasattr(dataset, "__len__")


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list) and value and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value):
        return "messages"
    return type(value).__name__


def _is_hh(rows: list[dict[str, Any]]) -> bool:
    missing = [column for column in ("chosen", "rejected") if column not in rows[0]]
    if missing:
        got = f"The rows lack {' and '.join(missing)}; their columns are {names(rows[0])}."
        raise SourceError(f"{got} {_FORMS} Rename the columns.")
    kinds = {column: _kind(rows[0][column]) for column in ("prompt", "chosen", "rejected") if column in rows[0]}
    got = "In the first row " + ", ".join(f"{column} is {kind}" for column, kind in kinds.items())
    if any(isinstance(row["chosen"], str) and row["chosen"].startswith("\n\nHuman:") for row in rows):
        if "prompt" in kinds:
            raise SourceError(f"{got}, but chosen contains the prompt too. {_FORMS} Remove the column prompt.")
        return True
    found = set(kinds.values())
    if found == {"messages"} or (found == {"a string"} and "prompt" in kinds):
        return False
    next_step = "Bring the columns into one of these forms."
    if found == {"a string"}:
        # TRL would take the longest common prefix as the prompt, which runs into answers that begin alike.
        next_step = "Add the column prompt: two strings alone do not show where the prompt ends."
    elif kinds["chosen"] == kinds["rejected"] == "messages":
        next_step = "Remove the column prompt if chosen and rejected begin with it, or make it messages."
    raise SourceError(f"{got}. {_FORMS} {next_step}")


def _split_batch(chosen: list, rejected: list, parser: str) -> dict[str, list]:
    # `parser` is unused: as an argument it enters the fingerprint, so that a new parser gets a new cached result.
    columns: dict[str, list] = {"prompt": [], "chosen": [], "rejected": [], _REFUSED: []}
    for pair in zip(chosen, rejected, strict=True):
        try:
            split, reason = hh.split_pair(*pair), None
        except hh.DialogueError as error:
            split, reason = {"prompt": [], "chosen": [], "rejected": []}, error.reason.value
        for name, value in {**split, _REFUSED: reason}.items():
            columns[name].append(value)
    return columns


def _split_rows(dataset):
    import datasets

    features = None
    # A streamed dataset may not know its column types before it is read.
    if dataset.features is not None:
        messages = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
        types = {"prompt": messages, "chosen": messages, "rejected": messages, _REFUSED: datasets.Value("string")}
        features = datasets.Features({**dataset.features, **types})
    # The reason is kept in a column, not in a separate object, so that a cached result has it too.
    return dataset.map(
        _split_batch,
        batched=True,
        input_columns=["chosen", "rejected"],
        fn_kwargs={"parser": hashlib.sha256(Path(hh.__file__).read_bytes()).hexdigest()},
        features=features,
    )


def _kept_rows(dataset) -> "tuple[Dataset, hh.RowReport]":
    report, kept = hh.RowReport(), []
    for number, reason in enumerate(dataset[_REFUSED][:]):
        report.count(number, reason)
        if reason is None:
            kept.append(number)
    if not kept:
        raise SourceError(f"Every row was refused.\n{report}\nGive HH-RLHF text or messages.")
    return dataset.select(kept) if report.refused else dataset, report


def _kept_stream(dataset) -> "tuple[IterableDataset, hh.RowReport]":
    report = hh.RowReport()

    def keep(reason: str | None, number: int) -> bool:
        if number == 0:
            report.clear()
        report.count(number, reason)
        return reason is None

    return dataset.filter(keep, with_indices=True, input_columns=[_REFUSED]), report
