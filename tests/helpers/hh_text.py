"""HH-RLHF text as the tests write and convert it, to hold the package's parsing against."""

from collections.abc import Iterable
from typing import Any

from trl_cpo.data.hh import DialogueError, RowReport, Turn, split_pair

SIDES = ("chosen", "rejected")
SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def render_dialogue(turns: Iterable[Turn]) -> str:
    """The text of turns: the inverse of `parse_dialogue` for all that it gives."""
    return "".join(f"\n\n{SPEAKERS[role]}: {content}" for role, content in turns)


def converted(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], RowReport]:
    """The rows that `split_pair` takes, one by one, as messages with their other columns, and the report on all of them."""
    kept, report = [], RowReport()
    for number, row in enumerate(rows):
        try:
            kept.append(split_pair(row["chosen"], row["rejected"]) | {k: v for k, v in row.items() if k not in SIDES})
        except DialogueError as error:
            report.count(number, error.reason)
        else:
            report.count(number, None)
    return kept, report
