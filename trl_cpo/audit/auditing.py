"""One audit from a request to its document: read, look through, score, measure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ..data.models import end_tokens, source_of
from ..data.votes import count_votes
from ..scoring.scored_pairs import ScoredPairs
from ..scoring.scorer import ROW, PreparedPairs, Scorer
from ..scoring.steps import PairSet, read_set, score_roles
from ..scoring.token_pairs import answer_tokens
from .command import train_command
from .document import FORMAT, audited_set
from .export import pair_rows
from .measures import Settings
from .preflight import digests, examine

#: The columns in which TRL's own preference sets keep the scores of the two answers.
SCORE_COLUMNS = ("score_chosen", "score_rejected")
#: More groups than this are refused in training too.
MOST_GROUPS = 100


class AuditError(ValueError):
    """A set that cannot be audited: what was got, what is allowed, what to do."""


@dataclass(frozen=True)
class AuditRequest:
    """What is asked for: names as the user gave them, and how to score."""

    model: str
    dataset: str
    ref_model: str | None = None
    splits: tuple[str, ...] = ("train",)
    dataset_config: str | None = None
    dataset_data_dir: str | None = None
    slices: tuple[str, ...] = ()
    by: str | None = None
    score_columns: tuple[str, str] | None = None
    settings: Settings = field(default_factory=lambda: Settings(beta=0.1, gamma=1.0))
    max_pairs: int | None = None
    seed: int = 0
    worst: int = 3
    preflight_only: bool = False
    scorer: Scorer = field(default_factory=Scorer)


def audit(
    request: AuditRequest,
    say: Callable[[str], None] = lambda _: None,
    export: Callable[[Iterable[dict]], None] = lambda _: None,
) -> dict:
    """The audit's document.

    Args:
        say: told, line by line, what is being done.
        export: given the rows of each set's pairs (`export.pair_rows`).

    Raises:
        ValueError: models, pairs or columns that cannot be audited, in words; before any scoring where it can be known then.
    """
    model, ref_model = (None if name is None else source_of(name) for name in (request.model, request.ref_model))
    sets = {
        split: read_set(
            request.dataset,
            split,
            config=request.dataset_config,
            data_dir=request.dataset_data_dir,
            needs=(*request.slices, *(request.score_columns or ()), *([] if request.by is None else [request.by])),
            max_pairs=request.max_pairs,
            seed=request.seed,
        )
        for split in request.splits
    }
    if request.by is not None:
        for name, one in sets.items():
            _check_groups(request.by, one, name)
    scorer = request.scorer
    tokenizer = scorer.tokenizer(model)
    if ref_model is not None:
        scorer.check_same_vocabulary(model, ref_model)
    ends = end_tokens(model, tokenizer)
    prepared, preflights = {}, {}
    for name, one in sets.items():
        say(f"{name}: looking through {len(one.pairs)} pairs")
        prepared[name] = scorer.prepare(one.pairs, tokenizer, name)
        preflights[name] = examine(
            prepared[name].tokens,
            tokenizer,
            scorer.truncation,
            ends=ends,
            prompt_alone=prepared[name].prompt_alone,
            tokens_of_others=prepared[name].tokens_of_others,
            given=prepared[name].given,
        )
        faults = [found for found in preflights[name]["findings"] if found["fault"]]
        for found in faults:
            say(f"{name}: FAULT: {found['count']} of {found['of']} pairs {found['says']}")
    document = {
        "format": FORMAT,
        "model": request.model,
        "ref_model": request.ref_model,
        "dataset": request.dataset,
        "seed": request.seed,
        "settings": vars(request.settings),
        "sets": [
            {
                "set": name,
                "rows": one.rows,
                "refused": one.refused,
                "refused_for": list(one.refused_for),
                "preflight": preflights[name],
                "judgements": count_votes(one.pairs).report(),
            }
            for name, one in sets.items()
        ],
    }
    if request.preflight_only:
        return document
    # Without a reference the model's own start is one.
    roles = {"ref": model} if ref_model is None else {"ref": ref_model, "policy": model}
    scored = score_roles(scorer, roles, prepared, tokenizer, say)
    for entry in document["sets"]:
        name = entry["set"]
        entry.update(_numbers(request, sets[name], prepared[name], entry, scored[name], export))
    return document


def _numbers(
    request: AuditRequest,
    one: PairSet,
    prepared: PreparedPairs,
    entry: dict,
    logps: dict[str, np.ndarray],
    export: Callable[[Iterable[dict]], None],
) -> dict:
    tokens = prepared.tokens
    chosen_tokens, rejected_tokens, degenerate = answer_tokens(tokens, request.scorer.truncation)
    if degenerate.all():
        raise AuditError(
            f"{entry['set']}: max_length={request.scorer.max_length} leaves no pair whose two answers can be compared: in all "
            "of them they are the same, or one is empty. Set a larger one, or mend the pairs."
        )
    numbers, _ = digests(tokens)
    place = {row: at for at, row in enumerate(one.pairs[ROW][:])}
    places = [place[row] for row in tokens.rows]

    def column(name: str, kind) -> np.ndarray:
        values = one.pairs[name][:]
        return np.array([values[at] for at in places], dtype=kind)

    pairs = ScoredPairs(
        **{name: np.where(degenerate, 0.0, values) for name, values in logps.items()},
        chosen_tokens=np.maximum(chosen_tokens, 1),
        rejected_tokens=np.maximum(rejected_tokens, 1),
        prompt_of=numbers,
        reward_gap=_reward_gap(request, one, column),
        slices={name: column(name, object) for name in request.slices},
    )
    kept = np.flatnonzero(~degenerate)
    export(pair_rows(entry["set"], pairs.take(kept), [tokens.rows[at] for at in kept]))
    audited = audited_set(
        entry["set"],
        pairs.take(kept),
        request.settings,
        preflight=entry["preflight"],
        rows=[tokens.rows[at] for at in kept],
        text_of=lambda at: prepared.dataset[int(kept[at])],
        worst=request.worst,
        by=None if request.by is None else (request.by, np.array([str(each) for each in column(request.by, object)[kept]])),
    )
    options = {
        "model_name_or_path": request.ref_model or request.model,
        "dataset_name": request.dataset,
        "dataset_config": request.dataset_config,
        "dataset_data_dir": request.dataset_data_dir,
        "dataset_train_split": entry["set"],
        "group_column": request.by,
        "max_length": request.scorer.max_length,
        "truncation_mode": request.scorer.truncation_mode,
        "assistant_turns_only": True if request.scorer.assistant_turns_only else None,
    }
    return {**audited, "command": train_command(audited["advice"], vars(request.settings), options)}


def _check_groups(column: str, one: PairSet, name: str) -> None:
    """Raises `AuditError` where training with this `group_column` would be refused."""
    values = one.pairs[column][:]
    for row, value in zip(one.pairs[ROW][:], values, strict=True):
        if isinstance(value, (list, dict)) or value is None or not str(value).strip() or "/" in str(value):
            raise AuditError(
                f"{name}, row {row}: --by {column} must hold the name of a group, without '/'; got {value!r}. Name another "
                "column, or correct it."
            )
    if (number := len({str(value) for value in values})) > MOST_GROUPS:
        raise AuditError(
            f"{name}: --by {column} holds {number} different values, too many for groups (at most {MOST_GROUPS}). Name a "
            f"column with few, or use --slice {column}."
        )


def _reward_gap(request: AuditRequest, one: PairSet, column: Callable) -> np.ndarray | None:
    names = request.score_columns or SCORE_COLUMNS
    if not set(names) <= set(one.pairs.column_names):
        return None
    try:
        # None becomes NaN: not known.
        chosen, rejected = (column(name, np.float64) for name in names)
    except (TypeError, ValueError) as error:
        raise AuditError(f"The score columns {' and '.join(names)} must hold numbers: {error}.") from error
    return chosen - rejected
