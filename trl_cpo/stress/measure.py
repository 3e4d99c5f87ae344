"""From a run to the gaps of its held-out pairs under each shift: read, changed, tokenized, scored."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .._trl.datasets import TEXT_COLUMNS, with_prompt
from ..data.models import ModelError, first_line
from ..scoring.scorer import ROW, PreparedPairs, Scorer
from ..scoring.steps import score_roles
from ..scoring.token_pairs import answer_tokens
from .recorded import Recorded, StressError, gammas, held_out_pairs, reference_of
from .shifts import BASE, SHIFTS, DoesNotApply, Options, Shift

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

#: Settings of the run that decide over its log-probabilities, beside those that `Scorer` names.
_PASSED_ON = ("use_cpu", "pad_to_multiple_of", "ld_alpha")
_CUT = "max_length cuts more of an answer"


@dataclass(frozen=True)
class Gaps:
    """The pairs that could be scored under a shift, and their gaps.

    Attributes:
        at: their numbers among those that were taken, (n,).
        gap, ref_gap: δ_θ and δ_ref, (n,).
        changed: pairs whose prompt is another.
        left_out: reason to number of pairs.
    """

    at: np.ndarray
    gap: np.ndarray
    ref_gap: np.ndarray
    changed: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        gammas: γ of each pair taken, (m,).
        shifts: by name; the first is `BASE`.
        not_applied: name of a shift to why it was not.
        largest: largest difference of a log-probability from pairs.json, nats.
        reproduced: whether all are within rounding.
    """

    gammas: np.ndarray
    shifts: dict[str, Gaps]
    not_applied: dict[str, str]
    largest: float
    reproduced: bool


def measure(
    run: Recorded,
    options: Options,
    *,
    only: Sequence[str] = (),
    dataset: str | None = None,
    ref_model: str | None = None,
    max_pairs: int | None = None,
    batch_size: int = 8,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Scores a run's held-out pairs, or `max_pairs` of them drawn at random, as they were and under each shift.

    Args:
        only: names of shifts; empty: all.
        dataset, ref_model: where pairs and reference are now, if elsewhere.

    Raises:
        StressError: the pairs are not those of the run, or give NaN.
        ValueError: pairs or models cannot be read or used, in words.
    """
    scorer = Scorer(
        max_length=run.settings.get("max_length"),
        truncation_mode=run.settings.get("truncation_mode") or "keep_start",
        dtype=run.dtype,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        assistant_turns_only=bool(run.settings.get("assistant_turns_only")),
        options=_options(run),
    )
    sources = {"policy": str(run.folder), "ref": reference_of(run, ref_model)}
    with _loadable():
        tokenizer = scorer.tokenizer(sources["policy"])
        scorer.check_same_vocabulary(sources["policy"], sources["ref"])
    found, rows = _of_run(run, held_out_pairs(run, dataset), scorer, tokenizer)
    if max_pairs is not None and max_pairs < len(found):
        drawn = np.sort(np.random.default_rng(0).choice(len(found), max_pairs, replace=False))
        found, rows = found.select(drawn), rows[drawn]
    taken = _numbered(found)
    changed, not_applied = _changed(taken, tokenizer, options, only)
    prepared: dict[str, PreparedPairs] = {}
    for name, (pairs, *_) in changed.items():
        try:
            prepared[name] = scorer.prepare(pairs, tokenizer, name)
        except ValueError as error:
            if name == BASE:
                raise
            not_applied[name] = str(error).splitlines()[0].rstrip(".")
    with _loadable():
        scored = score_roles(scorer, sources, prepared, tokenizer, say)
    lost = {name: _lost(one, scorer) for name, one in prepared.items()}
    shifts = {}
    for name, one in prepared.items():
        _, number, left_out = changed[name]
        at, usable = np.asarray(one.tokens.rows), _usable(one, scorer, lost[name], lost[BASE])
        cut = len(changed[name][0]) - int(usable.sum())
        logps = _logps(scored[name], one, scorer, run.reduction)[usable]
        if not np.isfinite(logps).all():
            raise StressError(f"Under {name!r} a log-probability is not finite. Look at the model's weights and dtype.")
        policy, ref = logps[:, 0] - logps[:, 1], logps[:, 2] - logps[:, 3]
        shifts[name] = Gaps(at[usable], policy, ref, number, {**left_out, **({_CUT: cut} if cut else {})})
        if name == BASE:
            apart = np.abs(logps - rows[at[usable]])
            close = bool(run.close(logps, rows[at[usable]]).all()) and len(logps) == len(rows)
            largest = float(apart.max(initial=0.0))
    return Measured(gammas(run, taken), shifts, not_applied, largest, close)


@contextmanager
def _loadable() -> Iterator[None]:
    """Says of a model that cannot be loaded what to do here."""
    try:
        yield
    except (ModelError, OSError) as error:
        # Their advice is of another command.
        why = first_line(error).partition(" Give --")[0]
        raise StressError(
            f"The run's model or its reference cannot be loaded: {why}\nIf the reference is elsewhere now, give --ref-model; "
            "an adapter names its base in its adapter_config.json."
        ) from error


def _options(run: Recorded) -> dict[str, Any]:
    """Settings of the run for `Scorer`: half precision only where this machine has it."""
    from ..engine.config import has_bf16

    own = {name: run.settings[name] for name in _PASSED_ON if run.settings.get(name) is not None}
    bf16 = bool(run.settings.get("bf16")) and has_bf16(own.get("use_cpu", False))
    return own | {"bf16": bf16, "fp16": bool(run.settings.get("fp16")) and _has_cuda()}


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _of_run(
    run: Recorded, pairs: "Dataset", scorer: Scorer, tokenizer: "PreTrainedTokenizerBase"
) -> "tuple[Dataset, np.ndarray]":
    """The pairs that have a row in the run's pairs.json, in its order, and those rows."""
    count = len(run.rows) + run.left_out
    prepared = scorer.prepare(_numbered(pairs), tokenizer, run.split)
    chosen, rejected, degenerate = answer_tokens(prepared.tokens, scorer.truncation)
    kept = np.flatnonzero(~degenerate[:count])
    tokens = np.stack([chosen, rejected], axis=1)[kept]
    if len(kept) != len(run.rows) or (run.tokens is not None and not np.array_equal(tokens, run.tokens)):
        raise StressError(
            f"The pairs read now are not those that the run was evaluated on: {len(kept)} of {len(prepared.tokens)} can be "
            f"compared, pairs.json has {len(run.rows)}"
            + ("" if len(kept) != len(run.rows) else ", and the lengths of their answers differ")
            + ". If the data set has changed or is elsewhere, give the old one with --dataset."
        )
    return pairs.select([prepared.tokens.rows[at] for at in kept.tolist()]), run.rows


def _numbered(pairs: "Dataset") -> "Dataset":
    """With each pair's number in the column `ROW`."""
    bare = pairs.remove_columns([ROW]) if ROW in pairs.column_names else pairs
    return bare.add_column(ROW, list(range(len(bare))))


def _changed(
    pairs: "Dataset", tokenizer: "PreTrainedTokenizerBase", options: Options, only: Sequence[str]
) -> tuple[dict[str, tuple["Dataset", int, dict[str, int]]], dict[str, str]]:
    """By shift: its pairs, how many have another prompt, and reason to number of those it does not apply to.

    And shifts that apply to none, with the reason.
    """
    found: dict[str, tuple[Dataset, int, dict[str, int]]] = {BASE: (pairs, 0, {})}
    not_applied: dict[str, str] = {}
    rows = [with_prompt(row) for row in pairs]
    for shift in SHIFTS[1:]:
        if only and shift.name not in only:
            continue
        kept, reasons, number = [], Counter[str](), 0
        for at, row in enumerate(rows):
            try:
                kept.append((at, _applied(shift, row, tokenizer, options)))
                number += kept[-1][1]["prompt"] != row["prompt"]
            except DoesNotApply as reason:
                reasons[str(reason)] += 1
        if kept:
            found[shift.name] = (_with_text(pairs, kept), number, dict(reasons))
        else:
            not_applied[shift.name] = reasons.most_common(1)[0][0]
    return found, not_applied


def _applied(shift: Shift, row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", options: Options) -> dict[str, Any]:
    changed = shift.apply(row, options)
    if shift.needs_system and not _shows_system(tokenizer, changed):
        raise DoesNotApply("the chat template has no system role")
    return changed


def _shows_system(tokenizer: "PreTrainedTokenizerBase", row: dict[str, Any]) -> bool:
    """Whether the chat template renders the first message, which is the system's."""
    text = row["prompt"][0]["content"]
    # Templates raise what they like: Gemma's where there is a system message.
    try:
        rendered = tokenizer.apply_chat_template(row["prompt"], tokenize=False, **(row.get("chat_template_kwargs") or {}))
    except Exception:
        return False
    return text.strip() in str(rendered)


def _with_text(pairs: "Dataset", kept: list[tuple[int, dict[str, Any]]]) -> "Dataset":
    """The pairs at these places with other texts; all other columns as they are."""
    from datasets import Dataset, concatenate_datasets

    gone = {"chat_template_kwargs"} if "chat_template_kwargs" not in kept[0][1] else set()
    rest = pairs.select([at for at, _ in kept])
    rest = rest.select_columns([name for name in rest.column_names if name not in {*TEXT_COLUMNS, *gone}])
    text = Dataset.from_list([{name: row[name] for name in TEXT_COLUMNS} for _, row in kept])
    return concatenate_datasets([rest, text], axis=1)


def _lost(prepared: PreparedPairs, scorer: Scorer) -> dict[int, tuple[int, int]]:
    """Of each pair, by its number: tokens that truncation takes from its chosen and from its rejected answer."""
    chosen, rejected, _ = answer_tokens(prepared.tokens, scorer.truncation)
    whole = zip(prepared.tokens.rows, prepared.tokens.chosen, prepared.tokens.rejected, chosen, rejected, strict=True)
    return {row: (len(c) - int(left_c), len(r) - int(left_r)) for row, c, r, left_c, left_r in whole}


def _usable(prepared: PreparedPairs, scorer: Scorer, lost: dict, before: dict) -> np.ndarray:
    """Which pairs still compare two answers of which no more is cut than before, (n,)."""
    _, _, degenerate = answer_tokens(prepared.tokens, scorer.truncation)
    same = [all(now <= then for now, then in zip(lost[row], before[row], strict=True)) for row in prepared.tokens.rows]
    return ~degenerate & np.array(same, dtype=bool)


def _logps(scored: dict[str, np.ndarray], prepared: PreparedPairs, scorer: Scorer, reduction: str) -> np.ndarray:
    """Columns as `KNOWN_COLUMNS`, (n, 4), in nats of the reduction."""
    columns = np.stack([scored[f"{role}_{side}"] for role in ("policy", "ref") for side in ("chosen", "rejected")], axis=1)
    if reduction == "mean":
        chosen, rejected, _ = answer_tokens(prepared.tokens, scorer.truncation)
        columns = columns / np.maximum(np.stack([chosen, rejected] * 2, axis=1), 1)
    return columns
