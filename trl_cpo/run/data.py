"""The pairs of a run: read, brought into TRL's form, and a part held out where the source has no test split."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..data.loading import NoSuchSplit, hold_out
from ..data.reading import first_pairs, read_pairs

if TYPE_CHECKING:
    from ..data.hh import RowReport
    from .arguments import PairArguments


def load_sets(options: "PairArguments"):
    """Training and held-out pairs as messages, the reports on rows that were refused, and how many were held out.

    Raises:
        SourceError: the pairs cannot be read or used, or the source lacks a split that was asked for.
    """

    def read(split):
        return read_pairs(
            options.dataset_name,
            split,
            config=options.dataset_config,
            data_dir=options.dataset_data_dir,
            streaming=options.dataset_streaming,
        )

    reports, held_out = {}, None
    train, reports["train"] = read(options.dataset_train_split)
    try:
        test, reports["test"] = read(options.dataset_test_split)
    except NoSuchSplit as error:
        # Where there is another split, or one was asked for by name, a part of the training pairs is not what was meant.
        asked = options.dataset_test_split != type(options).dataset_test_split
        if asked or error.known != [options.dataset_train_split]:
            raise
        count = options.held_out if options.held_out < 1 else int(options.held_out)
        train, test = hold_out(train, count, seed=0)
        held_out = len(test)
    return first_pairs(train, options.max_train_pairs), first_pairs(test, options.max_test_pairs), reports, held_out


def say_reports(reports: "Mapping[str, RowReport | None]", say: Callable[[str], None]) -> None:
    """Rows kept and refused, by split; a streamed split's report is whole once it has been read."""
    for split, report in reports.items():
        if report is not None:
            say(f"      {split}: {report}".replace("\n", "\n      "))
