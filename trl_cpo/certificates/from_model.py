"""Evidence for a model that is no run of this trainer: its log-probabilities of held-out pairs, in a pairs.json."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.identity import digests_of, without
from ..data.models import source_of
from ..files.atomic import write_json
from ..files.outputs import is_taken, making
from ..files.run_files import METRICS, PAIR_COLUMNS, PAIRS
from ..scoring.scorer import Scorer
from ..scoring.steps import read_set, score_roles
from ..scoring.token_pairs import answer_tokens
from .errors import CertificateError, read_json

if TYPE_CHECKING:
    from datasets import Dataset


def score_to_folder(
    folder: str | Path,
    *,
    model: str,
    dataset: str,
    gamma: float,
    ref_model: str | None = None,
    split: str = "test",
    max_pairs: int | None = None,
    reduction: str = "sum",
    max_length: int | None = 1024,
    dtype: str = "float32",
    batch_size: int = 8,
    assistant_turns_only: bool = False,
) -> Path:
    """Scores the pairs of a split by a model, as training would score them, and writes pairs.json into a new folder.

    `certify_run` makes a certificate of the folder, of kind "held_out": that the model was not trained on these pairs is
    the word of whoever names them, but pairs that its run's own record names as trained on are left out. Pairs that cannot be
    compared (dropped, nothing of an answer left by max_length, or two answers that are equal) are counted as "left_out"; a
    certificate takes them for pairs that miss γ. Scores are kept, and an interrupted call goes on where it stopped.

    Args:
        folder: does not exist yet, or is empty.
        model, ref_model: hub name, folder (an adapter's too) or "demo"; the columns of a reference that is not given are null.
        dataset, split: as for `trl-cpo train`.
        gamma: γ, nats of `reduction`, that certificates take by default.
        max_pairs: so many pairs, drawn at random with seed 0.
        max_length, dtype, batch_size: tokens, of the weights, pairs at once.
        assistant_turns_only: as in CPOConstrainedConfig.

    Raises:
        CertificateError: the folder is taken, or no pair can be scored.
        ValueError: the pairs or models cannot be read or used, in words.
    """
    folder = Path(folder)
    if is_taken(folder):
        raise CertificateError(
            f"{folder} already holds files, and nothing in it is overwritten. Give a new folder for the scores."
        )
    with making(folder):  # what cannot be written is not scored first
        settings = dict(max_length=max_length, dtype=dtype, batch_size=batch_size, assistant_turns_only=assistant_turns_only)
        scored = _scored(model, ref_model, dataset, split, gamma, max_pairs, reduction, settings)
        write_json(folder / PAIRS, scored)
    return folder


def _scored(
    model: str,
    ref_model: str | None,
    dataset: str,
    split: str,
    gamma: float,
    max_pairs: int | None,
    reduction: str,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What pairs.json holds."""
    pairs = read_set(dataset, split, max_pairs=max_pairs).pairs
    pairs, trained_on = _not_trained_on(pairs, model)
    scorer = Scorer(**settings)
    sources = {"policy": source_of(model)} | ({"ref": source_of(ref_model)} if ref_model is not None else {})
    tokenizer = scorer.tokenizer(sources["policy"])
    if ref_model is not None:
        scorer.check_same_vocabulary(sources["policy"], sources["ref"])
    prepared = scorer.prepare(pairs, tokenizer, split)
    chosen_tokens, rejected_tokens, degenerate = answer_tokens(prepared.tokens, scorer.truncation)
    if degenerate.all():
        raise CertificateError(f"max_length={scorer.max_length} leaves no pair with two answers that differ. Set a larger one.")
    columns = score_roles(scorer, sources, {split: prepared}, tokenizer)[split]
    if reduction == "mean":
        tokens = {"chosen": np.maximum(chosen_tokens, 1), "rejected": np.maximum(rejected_tokens, 1)}
        columns = {name: logps / tokens[name.split("_")[1]] for name, logps in columns.items()}
    kept = np.flatnonzero(~degenerate)
    rows = [[float(columns[name][at]) if name in columns else None for name in PAIR_COLUMNS] for at in kept]
    return {
        "reduction": reduction,
        "gamma": gamma,
        "beta": None,
        "constraint": None,
        "split": f"named as held out: {split}",
        "model": model,
        "ref_model": ref_model,
        "dataset": dataset,
        "left_out": prepared.given - len(rows),
        **({"trained_on_left_out": trained_on} if trained_on else {}),
        "columns": list(PAIR_COLUMNS),
        "rows": rows,
    }


def _not_trained_on(pairs: "Dataset", model: str) -> "tuple[Dataset, int]":
    """The pairs that the run of `model`, where it is a run's folder, was not trained on; and how many it was."""
    file = Path(model).expanduser() / METRICS
    record = read_json(file) if file.is_file() else None
    learned = record.get("pairs") if isinstance(record, dict) else None
    trained = digests_of(learned.get("digests")) if isinstance(learned, dict) else set()
    if not trained:
        return pairs, 0
    kept = without(pairs, trained)
    if not len(kept):
        raise CertificateError(f"All {len(pairs)} pairs were trained on, says {file}: they certify nothing. Give others.")
    return kept, len(pairs) - len(kept)
