"""The audit's document: what `trl-cpo audit --json` prints and the text is rendered from, JSON's types alone."""

from collections.abc import Callable, Sequence

import numpy as np

from ..quoting import quoted
from ..scoring.scored_pairs import ScoredPairs
from ..slices import slices_of
from .advice import advise
from .measures import Settings, groups, measure

#: Raised when a field changes its meaning.
FORMAT = 1
#: Longest quotation of a prompt's end and of an answer.
_QUOTED = 240


def audited_set(
    name: str,
    pairs: ScoredPairs,
    settings: Settings,
    *,
    preflight: dict,
    rows: Sequence[int],
    text_of: Callable[[int], dict],
    worst: int = 3,
    by: tuple[str, np.ndarray] | None = None,
) -> dict:
    """One set: its preflight, the measures of all its pairs and of each slice, its groups, its worst pairs and the advice.

    Args:
        name: of the set.
        pairs: those that could be scored.
        preflight: what `preflight.examine` gave.
        rows: (n,), the number of each pair in its source.
        text_of: position of a pair to its "prompt", "chosen" and "rejected", strings or messages.
        worst: how many of the pairs with the lowest δ_ref are quoted.
        by: a column, and the name of each pair's group in it, (n,); None: no groups.
    """
    slices = [
        {"column": column, "value": quoted(value, 40), **measure(pairs.take(mask), settings)}
        for column, values in pairs.slices.items()
        for value, mask in slices_of(values)
    ]
    document = {
        "set": name,
        "preflight": preflight,
        "all": measure(pairs, settings),
        "slices": slices,
        "groups": None if by is None else {"column": by[0], "each": groups(pairs, by[1], settings)},
        "worst": _worst(pairs, settings, rows, text_of, worst),
    }
    return {**document, "advice": advise(document, vars(settings))}


def _worst(pairs, settings, rows, text_of, count) -> list[dict]:
    ref_gap = pairs.ref_gap(settings.reduction)
    lowest = [int(at) for at in np.argsort(ref_gap, kind="stable")[:count] if ref_gap[at] < 0]
    quotations = []
    for at in lowest:
        text = text_of(at)
        quotations.append(
            {
                "row": int(rows[at]),
                "ref_gap": {name: float(pairs.ref_gap(name)[at]) for name in ("sum", "mean")},
                "tokens": {"chosen": int(pairs.chosen_tokens[at]), "rejected": int(pairs.rejected_tokens[at])},
                "prompt": _end(quoted(last_words(text["prompt"]), 10**9)),
                "chosen": quoted(last_words(text["chosen"]), _QUOTED),
                "rejected": quoted(last_words(text["rejected"]), _QUOTED),
            }
        )
    return quotations


def _end(text: str) -> str:
    # Of a prompt the end says what is answered.
    return text if len(text) <= _QUOTED else "…" + text[1 - _QUOTED :]


def last_words(text: "str | list[dict]") -> str:
    """A text, or the content of the last message where it is messages."""
    if isinstance(text, str):
        return text
    content = text[-1]["content"] if text else ""
    return content if isinstance(content, str) else str(content)
