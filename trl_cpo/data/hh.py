r"""Converts HH-RLHF text to prompt, chosen and rejected messages.

HH-RLHF keeps a whole dialogue in each of its columns `chosen` and `rejected`:

    "\n\nHuman: Hi.\n\nAssistant: Hello!\n\nHuman: Bye.\n\nAssistant: Goodbye."

The two share every turn except the last answer. The prompt is found by parsing turns, not as the longest common prefix of
the two strings, which runs into the answers if both begin alike. Contents are kept byte for byte, including blanks at their
ends. A row is either converted or refused with a reason, never repaired.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

ROLES = {"Human": "user", "Assistant": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant): ")
# Inside a turn's text this is either a delimiter that lost its blank or a quotation; they cannot be told apart.
_MARK = re.compile(r"\n\n(?:Human|Assistant):")


class Reason(StrEnum):
    """Why a row is refused; `sentence` explains it."""

    NOT_A_STRING = "not_a_string"
    NOT_A_DIALOGUE = "not_a_dialogue"
    UNCLEAR_TURN = "unclear_turn"
    ROLE_ORDER = "role_order"
    EMPTY_TURN = "empty_turn"
    EMPTY_ANSWER = "empty_answer"
    NO_COMMON_PROMPT = "no_common_prompt"
    IDENTICAL_ANSWERS = "identical_answers"
    EMPTY_MESSAGE = "empty_message"

    @property
    def sentence(self) -> str:
        return _SENTENCES[self]


_SENTENCES = {
    Reason.NOT_A_STRING: "`prompt`, `chosen` or `rejected` is not a string",
    Reason.NOT_A_DIALOGUE: r"the text does not begin with a turn ('\n\nHuman: ')",
    Reason.UNCLEAR_TURN: r"'\n\nHuman:' or '\n\nAssistant:' occurs inside the text of a turn",
    Reason.ROLE_ORDER: "the turns do not alternate, starting with Human and ending with Assistant",
    Reason.EMPTY_TURN: "a turn before the last answer is empty",
    Reason.EMPTY_ANSWER: "the last answer is empty",
    Reason.NO_COMMON_PROMPT: "the turns before the last answer differ between `chosen` and `rejected`",
    Reason.IDENTICAL_ANSWERS: "`chosen` and `rejected` have the same answer",
    Reason.EMPTY_MESSAGE: "a message has no role or no content",
}


class DialogueError(ValueError):
    """A text is not an HH-RLHF dialogue, or a row not an HH-RLHF pair; `reason` says why."""

    def __init__(self, reason: Reason):
        super().__init__(f"{reason.sentence} ({reason.value})")
        self.reason = reason

    def __reduce__(self):
        # When an error is pickled, the default would pass the message to __init__ instead of the reason.
        return type(self), (self.reason,)


class Turn(NamedTuple):
    """One turn: its role, "user" or "assistant", and its exact text."""

    role: str
    content: str

    def message(self) -> dict[str, str]:
        """This turn as a chat message."""
        return {"role": self.role, "content": self.content}


def parse_dialogue(text: str) -> list[Turn]:
    """Parses one dialogue into turns, from the user's first to the last answer.

    Raises:
        DialogueError: the text is not a string, not in dialogue form, out of order, or has an empty turn.
    """
    if not isinstance(text, str):
        raise DialogueError(Reason.NOT_A_STRING)
    # Split at the delimiters: text before the first one, then speaker, content, speaker, content, ...
    before, *pieces = _TURN.split(text)
    if before or not pieces:
        raise DialogueError(Reason.NOT_A_DIALOGUE)
    if text.endswith("\n\nAssistant:"):
        # The answer is missing, and the blank after the delimiter was stripped.
        raise DialogueError(Reason.EMPTY_ANSWER)
    turns = [Turn(ROLES[speaker], content) for speaker, content in zip(pieces[::2], pieces[1::2], strict=True)]
    _check(turns)
    return turns


def _check(turns: list[Turn]) -> None:
    if any(_MARK.search(turn.content) for turn in turns):
        raise DialogueError(Reason.UNCLEAR_TURN)
    if len(turns) % 2 or any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        raise DialogueError(Reason.ROLE_ORDER)
    if not all(turn.content.strip() for turn in turns[:-1]):
        raise DialogueError(Reason.EMPTY_TURN)
    if not turns[-1].content.strip():
        raise DialogueError(Reason.EMPTY_ANSWER)


def split_pair(chosen: str, rejected: str) -> dict[str, list[dict[str, str]]]:
    """Splits the two dialogues of a row into the messages `prompt` (all common turns), `chosen` and `rejected`.

    Raises:
        DialogueError: a dialogue cannot be parsed, they differ before the last answer, or their answers are equal.
    """
    *prompt, chosen_answer = parse_dialogue(chosen)
    *rejected_prompt, rejected_answer = parse_dialogue(rejected)
    if prompt != rejected_prompt:
        raise DialogueError(Reason.NO_COMMON_PROMPT)
    if chosen_answer == rejected_answer:
        raise DialogueError(Reason.IDENTICAL_ANSWERS)
    return {
        "prompt": [turn.message() for turn in prompt],
        "chosen": [chosen_answer.message()],
        "rejected": [rejected_answer.message()],
    }


@dataclass
class RowReport:
    """Counts kept rows, and refused rows by reason, with the first row numbers (from 0) of each reason."""

    kept: int = 0
    refused: dict[Reason, int] = field(default_factory=dict)
    first_rows: dict[Reason, list[int]] = field(default_factory=dict)

    REMEMBERED = 5

    def clear(self) -> None:
        """Resets all counts."""
        self.kept = 0
        self.refused.clear()
        self.first_rows.clear()

    @property
    def total(self) -> int:
        """Number of rows counted, kept or refused."""
        return self.kept + sum(self.refused.values())

    def count(self, number: int, reason: Reason | str | None) -> None:
        """Counts row `number` as refused for `reason`, or as kept if `reason` is None.

        Raises:
            ValueError: there is no such reason.
        """
        if reason is None:
            self.kept += 1
            return
        reason = Reason(reason)
        self.refused[reason] = self.refused.get(reason, 0) + 1
        rows = self.first_rows.setdefault(reason, [])
        if len(rows) < self.REMEMBERED:
            rows.append(number)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; reasons in the order of `Reason`."""
        return {
            "total": self.total,
            "kept": self.kept,
            "refused": {reason.value: self.refused[reason] for reason in Reason if reason in self.refused},
            "first_rows": {reason.value: self.first_rows[reason] for reason in Reason if reason in self.first_rows},
        }

    def reasons(self) -> list[dict[str, Any]]:
        """Why rows were refused: `reason`, `count`, what it `says`, and the first `rows`, in the order of `Reason`."""
        return [
            {
                "reason": reason.value,
                "count": self.refused[reason],
                "says": reason.sentence,
                "rows": list(self.first_rows[reason]),
            }
            for reason in Reason
            if reason in self.refused
        ]

    def __str__(self) -> str:
        lines = [f"{self.total} rows: {self.kept} kept, {self.total - self.kept} refused"]
        for reason in Reason:
            if reason in self.refused:
                rows = self.first_rows[reason]
                shown = ", ".join(map(str, rows)) + (", ..." if self.refused[reason] > len(rows) else "")
                lines.append(f"  {self.refused[reason]} {reason.value}: {reason.sentence} (row {shown})")
        return "\n".join(lines)
