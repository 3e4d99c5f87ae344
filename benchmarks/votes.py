"""
Simulated votes on pairs: annotators who disagree more where the two answers are closer in their words.

No public set of repeated votes comes with this package, so these annotators are made up. Each prefers the chosen answer with
probability σ(s), by itself (Bradley–Terry). The strength s of a pair runs evenly from 0 to `STRONGEST`, in the order of the
distance of its answers: the share of their words that only one of them has.
"""

import math
import random
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset

from trl_cpo.data.votes import PROBABILITY, VOTES_CHOSEN, count_votes

#: Strength of the pair whose answers are furthest apart. Two annotators then agree on 73 % of pairs, as people of the
#: InstructGPT study did (arXiv 2203.02155).
STRONGEST = 3.5


def distance(row: Mapping[str, Any]) -> float:
    """The share of the two answers' words that only one of them has; rows are conversational."""
    one, other = (set(re.findall(r"\w+", row[side][-1]["content"].lower())) for side in ("chosen", "rejected"))
    return len(one ^ other) / max(1, len(one | other))


def strengths(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    """Of each pair, the log odds that an annotator prefers its chosen answer: its rank by distance; ties share one."""
    distances = list(map(distance, rows))
    order = sorted(distances)
    return [STRONGEST * (bisect_left(order, d) + bisect_right(order, d)) / (2 * len(order)) for d in distances]


def voted(rows: Dataset, annotators: int, seed: int) -> tuple[Dataset, dict[str, Any]]:
    """The pairs as the package counts the votes on them, with `chosen_probs`, and what was counted.

    Answers that the majority rejected change places, and are counted as `turned`; `certainty` is the mean of 2p − 1.
    """
    coin = random.Random(seed)
    judged = []
    for row, strength in zip(rows, strengths(rows), strict=True):
        wins = sum(coin.random() < 1 / (1 + math.exp(-strength)) for _ in range(annotators))
        judged.append({**row, "for": wins, "against": annotators - wins})
    counted = count_votes(judged, counts=("for", "against"))
    pairs = Dataset.from_list([each.pair() for each in counted.judged])
    if len(pairs) != len(rows):
        raise ValueError(f"{len(rows)} pairs became {len(pairs)}: some have the same prompt and answers. Leave those out.")
    told = {name: counted.report()[name] for name in ("judgements", "pairs", "contested", "tied")}
    told["turned"] = sum(row["for"] < row["against"] for row in judged)
    told["by_votes"] = {str(k): pairs[VOTES_CHOSEN].count(k) for k in sorted(set(pairs[VOTES_CHOSEN]))}
    told["certainty"] = sum(2 * p - 1 for p in pairs[PROBABILITY]) / len(pairs)
    return pairs, told
