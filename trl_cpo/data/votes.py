"""Repeated judgements of the same two answers, counted: one pair with a probability, and what no ranking explains."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .identity import told

#: Columns of a counted pair: the probability of its label, and the votes behind it.
PROBABILITY, VOTES, VOTES_CHOSEN = "chosen_probs", "votes", "votes_chosen"
#: Cycles that are shown.
MOST_SHOWN = 3


class VoteError(ValueError):
    """Judgements that cannot be counted: the row, what was got, what to do."""


@dataclass
class Judged:
    """Two answers to one prompt, and how often each was preferred; `row` is the first judgement."""

    row: dict[str, Any]
    first: str
    second: str
    votes: list[int] = field(default_factory=lambda: [0, 0])
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def contested(self) -> bool:
        """Whether both answers have votes."""
        return min(self.votes) > 0

    @property
    def tied(self) -> bool:
        return self.votes[0] == self.votes[1]

    def pair(self) -> dict[str, Any]:
        """The counted pair: the answer with more votes is chosen, in a tie the one that was first.

        `p = (k + 1/2)/(n + 1)`, the mean of the posterior under Jeffreys' prior, k of n votes for the chosen answer.
        """
        names = ("chosen", "rejected") if self.votes[0] >= self.votes[1] else ("rejected", "chosen")
        k, n = max(self.votes), sum(self.votes)
        prompt = {"prompt": self.row["prompt"]} if "prompt" in self.row else {}
        pair = {**prompt, "chosen": self.row[names[0]], "rejected": self.row[names[1]]}
        return {**pair, PROBABILITY: (k + 0.5) / (n + 1), VOTES: n, VOTES_CHOSEN: k, **self.kept}


@dataclass
class Counted:
    """The pairs of a set of judgements.

    Attributes:
        judged: one entry for every two answers to a prompt, in the order of their first judgement.
        judgements: votes in all.
        same: rows whose two answers are the same, which are left out.
    """

    judged: list[Judged]
    judgements: int
    same: int

    def report(self) -> dict[str, Any]:
        """What was counted, as plain numbers: pairs, ties, contradictions, and answers that beat each other in a circle."""
        cycles = list(self._cycles())
        return {
            "judgements": self.judgements,
            "pairs": len(self.judged),
            "judged_once": sum(sum(each.votes) == 1 for each in self.judged),
            "contested": sum(each.contested for each in self.judged),
            "tied": sum(each.tied for each in self.judged),
            "same_answers": self.same,
            "prompts": len({_prompt(each.row) for each in self.judged}),
            "prompts_with_cycles": len({_prompt(rows[0].row) for rows in cycles}),
            "pairs_in_cycles": sum(map(len, cycles)),
            "cycles": [{"answers": _answers(rows), "prompt": _prompt_text(rows[0].row)} for rows in cycles[:MOST_SHOWN]],
        }

    def _cycles(self) -> Iterable[list[Judged]]:
        """Of each group of answers of which every one beats every other by some chain: the pairs within it."""
        prompts: dict[str, list[Judged]] = {}
        for each in self.judged:
            if not each.tied:
                prompts.setdefault(_prompt(each.row), []).append(each)
        for rows in prompts.values():
            beats: dict[str, list[str]] = {}
            for each in rows:
                winner, loser = (each.first, each.second) if each.votes[0] > each.votes[1] else (each.second, each.first)
                beats.setdefault(winner, []).append(loser)
            for group in strongly_connected(beats):
                yield [each for each in rows if each.first in group and each.second in group]


def count_votes(
    rows: Iterable[Mapping[str, Any]], *, counts: tuple[str, str] | None = None, keep: Sequence[str] = ()
) -> Counted:
    """Counts judgements by prompt and answers, in either order.

    Args:
        rows: with `chosen` and `rejected`, and `prompt` where there is one.
        counts: columns with the votes for the chosen and for the rejected answer; None: a row is one vote for the chosen.
        keep: columns that the counted pairs have too; they must be the same in all judgements of a pair.

    Raises:
        VoteError: votes are no whole numbers ≥ 0, or a column to keep differs.
    """
    found: dict[tuple[str, str, str], Judged] = {}
    same = judgements = 0
    for number, row in enumerate(rows):
        row = dict(row)
        first, second = _digest(row["chosen"]), _digest(row["rejected"])
        if first == second:
            same += 1
            continue
        votes = (1, 0) if counts is None else tuple(_whole(row.get(name), name, number) for name in counts)
        key = (_prompt(row), min(first, second), max(first, second))
        kept = {name: row.get(name) for name in keep}
        if key not in found:
            found[key] = Judged(row, first, second, kept=kept)
        judged = found[key]
        for name, value in kept.items():
            if value != judged.kept[name]:
                raise VoteError(
                    f"Row {number}: {name} is {value!r}, and {judged.kept[name]!r} in an earlier judgement of the same "
                    "answers. A column to keep must be the same in all of them; leave it out of --keep."
                )
        turned = first != judged.first
        judged.votes[turned] += votes[0]
        judged.votes[not turned] += votes[1]
        judgements += sum(votes)
    return Counted([each for each in found.values() if sum(each.votes)], judgements, same)


def strongly_connected(beats: Mapping[str, Sequence[str]]) -> list[set[str]]:
    """Groups of at least two nodes of which each reaches each other, by Tarjan's algorithm, without recursion."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    groups = []
    for root in beats:
        if root in index:
            continue
        work = [(root, iter(beats.get(root, ())))]
        index[root] = lowest[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, others = work[-1]
            for other in others:
                if other not in index:
                    index[other] = lowest[other] = len(index)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(beats.get(other, ()))))
                    break
                if other in on_stack:
                    lowest[node] = min(lowest[node], index[other])
            else:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[node])
                if lowest[node] == index[node]:
                    group = set()
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        group.add(member)
                        if member == node:
                            break
                    if len(group) > 1:
                        groups.append(group)
    return groups


def in_words(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['judgements']} judgements of {report['pairs']} pairs, over {report['prompts']} prompts; "
        f"{report['judged_once']} pairs were judged once.",
        f"{report['contested']} pairs have votes for both answers, {report['tied']} of them are tied.",
    ]
    if report["same_answers"]:
        lines.append(f"{report['same_answers']} rows were left out: their two answers are the same.")
    if report["pairs_in_cycles"]:
        lines.append(
            f"{report['pairs_in_cycles']} pairs of {report['prompts_with_cycles']} prompts lie in circles: every answer there "
            "is beaten by another of them. No reward explains such pairs."
        )
        for cycle in report["cycles"]:
            lines.append(f"  {len(cycle['answers'])} answers to {cycle['prompt']!r}: " + ", ".join(map(repr, cycle["answers"])))
    else:
        lines.append("No answers beat each other in a circle.")
    return "\n".join(lines)


def _whole(value: Any, name: str, number: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise VoteError(f"Row {number}: {name} must be a number of votes, a whole number ≥ 0; got {value!r}.")
    return value


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(told(value), sort_keys=True, default=str).encode(), digest_size=12).hexdigest()


def _prompt(row: Mapping[str, Any]) -> str:
    return _digest(row.get("prompt"))


def _short(value: Any, length: int = 60) -> str:
    if isinstance(value, list):
        value = value[-1].get("content", "") if value and isinstance(value[-1], dict) else ""
    text = " ".join(str(value).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _prompt_text(row: Mapping[str, Any]) -> str:
    return _short(row.get("prompt", ""))


def _answers(rows: Sequence[Judged]) -> list[str]:
    shown = {}
    for each in rows:
        shown[each.first], shown[each.second] = _short(each.row["chosen"]), _short(each.row["rejected"])
    return list(shown.values())
