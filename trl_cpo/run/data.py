"""The pairs of a run: read, brought into TRL's form, and a part held out where the source has no test split."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..data.identity import pair_digests, split_names, without
from ..data.loading import NoSuchSplit, SourceError, hold_out
from ..data.reading import read_pairs
from ..data.rows import first_pairs

if TYPE_CHECKING:
    from ..data.hh import RowReport
    from .arguments import PairArguments


def load_sets(options: "PairArguments"):
    """Training and held-out pairs as messages, reports on rows refused, "n of m" held out or None, and what was trained on.

    Pairs that are trained on are no held-out pairs.

    Raises:
        SourceError: the pairs cannot be read or used, the source lacks a split that was asked for, or none is held out.
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
        rows = len(train)
        train, test = hold_out(train, count, seed=0)
        held_out = f"{len(test):,} of {rows:,}"
    cut_off = None if held_out is None else len(test)
    train = first_pairs(train, options.max_train_pairs)
    test, learned = _not_trained_on(test, train, options, sliced=held_out is not None)
    # With these, the same pairs are read again.
    learned |= {"dataset_config": options.dataset_config, "data_dir": options.dataset_data_dir, "held_out": cut_off}
    return train, first_pairs(test, options.max_test_pairs), reports, held_out, learned


def _not_trained_on(test: Any, train: Any, options: "PairArguments", sliced: bool) -> tuple[Any, dict[str, Any]]:
    """The pairs of `test` that are not in `train`, and what metrics.json says of it.

    By content; of a stream, whose pairs are not known before they are trained on, by the names of the splits alone.
    """
    names = {"train_split": options.dataset_train_split, "test_split": "held out" if sliced else options.dataset_test_split}
    if hasattr(train, "__len__") and hasattr(test, "__len__"):
        trained = pair_digests(train)
        kept, left_out = without(test, trained), len(test)
        left_out -= len(kept)
        learned = {**names, "trained_on_left_out": left_out, "digests": "".join(sorted(set(trained)))}
        none_left = not len(kept)
    else:
        kept, learned = test, {**names, "trained_on_left_out": None, "digests": None}
        none_left = bool(split_names(names["train_split"]) & split_names(names["test_split"]))
    if none_left and sliced:
        raise SourceError(
            f"The pairs of {options.dataset_name} repeat: all {len(test)} that were held out are trained on too. Remove "
            "repeated pairs (trl-cpo audit names them), or give a --dataset_test_split of other pairs."
        )
    if none_left:
        raise SourceError(
            f"The pairs of the split {names['test_split']!r} are all trained on (--dataset_train_split "
            f"{names['train_split']}), so none is held out. Give another --dataset_test_split or --dataset_train_split."
        )
    return kept, learned


def say_reports(reports: "Mapping[str, RowReport | None]", say: Callable[[str], None]) -> None:
    """Rows kept and refused, by split; a streamed split's report is whole once it has been read."""
    for split, report in reports.items():
        if report is not None:
            say(f"      {split}: {report}".replace("\n", "\n      "))
