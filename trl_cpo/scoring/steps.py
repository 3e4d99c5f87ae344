"""The way from a source of pairs to their log-probabilities, a function a step: read, prepare, score.

`read_set` is the first, `Scorer.prepare` the second, `score_roles` the third.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.reading import read_pairs, sample_pairs
from .scorer import ROW, PreparedPairs, Scorer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PairSet:
    """Pairs to be scored, with their numbers in the column `ROW`; rows in the source, and those that were refused.

    `refused_for` has a reason each: its name, `count`, what it `says`, and the first `rows`, from 0.
    """

    pairs: "Dataset"
    rows: int
    refused: int
    refused_for: tuple[dict[str, Any], ...] = ()


def read_set(
    source: str,
    split: str,
    *,
    config: str | None = None,
    data_dir: str | None = None,
    needs: Sequence[str] = (),
    max_pairs: int | None = None,
    seed: int = 0,
) -> PairSet:
    """The pairs of a split, or a random sample of `max_pairs` of them.

    Raises:
        SourceError: the pairs cannot be read or used, or a column in `needs` is missing.
    """
    pairs, report = read_pairs(source, split, config=config, data_dir=data_dir, number_as=ROW, needs=needs)
    drawn = sample_pairs(pairs, max_pairs, seed)
    if report is None:
        return PairSet(drawn, len(pairs), 0)
    return PairSet(drawn, report.total, report.total - report.kept, tuple(report.reasons()))


def score_roles(
    scorer: Scorer,
    roles: dict[str, str],
    sets: dict[str, PreparedPairs],
    tokenizer: "PreTrainedTokenizerBase",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, np.ndarray]]:
    """Of each set the log-probabilities under each model, (n,), nats, as `<role>_chosen` and `<role>_rejected`.

    Args:
        roles: "policy" or "ref" to where its model is loaded from; one model at a time is.
        say: told before each model.

    Raises:
        ModelError: there is no such model, or it cannot be scored.
    """
    scored: dict[str, dict[str, np.ndarray]] = {name: {} for name in sets}
    for role, source in roles.items():
        say(f"scoring with {source}")
        for name, (chosen, rejected) in scorer.score(source, sets, tokenizer).items():
            scored[name] |= {f"{role}_chosen": chosen, f"{role}_rejected": rejected}
    return scored
