"""Reads price.json: what training did to the model, measurement by measurement. What it should not hold becomes a note."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .numbers import number

FORMAT = 1
#: What is measured on a set of prompts: the label, how it is written, and the range that its values lie in.
NUMBERS = {
    "kl": ("KL to the reference, nats per token", "nats", (-1e-3, 1e9)),
    "kl_response": ("KL to the reference, nats per response", "nats", (-1e-3, 1e12)),
    "repetition": ("repeated 3-grams of greedy answers", "%", (0.0, 1.0)),
    "ended": ("greedy answers that end", "%", (0.0, 1.0)),
    "tokens": ("length of greedy answers, tokens", "count", (0.0, 1e9)),
    "chosen_nll": ("negative log-likelihood, nats per token", "nats", (-1e-3, 1e9)),
    "text_nll": ("negative log-likelihood, nats per token", "nats", (-1e-3, 1e9)),
}
#: Names of numbers in the log, where they are others.
_LOGGED = {"tokens": "answer_tokens", "ended": "answers_ended"}
#: The sets of prompts, and how the page names them.
SETS = {"pairs": "the pairs' prompts", "general": "general prompts"}
#: More faults of a file than this are counted, not told.
_MOST_FAULTS = 4


@dataclass(frozen=True)
class Estimate:
    """A measured number and the ends of its 95 % interval, if known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class OnPrompts:
    """What was measured on one set of prompts: numbers by their name in `NUMBERS`, and greedy answers by their prompt."""

    numbers: dict[str, Estimate] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    prompts: int | None = None


@dataclass(frozen=True)
class Measurement:
    """One measurement of the price: its step, what was found on each set of prompts, and sentences.

    `damage` says what is wrong with the model, `missing` what was not measured.
    """

    step: int
    sets: dict[str, OnPrompts] = field(default_factory=dict)
    damage: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def filled_from(self, other: "Measurement | None") -> "Measurement":
        """This measurement, with the numbers of another at the same step where it has none."""
        if other is None:
            return self
        sets = dict(self.sets)
        for name, more in other.sets.items():
            own = sets.get(name, OnPrompts())
            sets[name] = replace(own, numbers={**more.numbers, **own.numbers})
        return replace(self, sets=sets)

    def told(self, summary: dict, name: str) -> "Measurement":
        """This measurement with the sentences of a run's summary of its price, in the file `name`."""
        faults: list[str] = []
        return replace(self, **{key: _sentences(summary, key, name, faults) for key in ("damage", "missing")})


def read_price(document: dict, name: str) -> tuple[list[Measurement], list[str]]:
    """The measurements in order of steps, of two at one step the later; and notes on what was left out.

    Args:
        document: what the file holds.
        name: the file's name, for the notes.
    """
    if document.get("format") != FORMAT or isinstance(document.get("format"), bool):
        got = _quoted(document.get("format"))
        return [], [f"{name} has format {got}; this version reads format {FORMAT}: its measurements are not shown."]
    faults: list[str] = []
    measured = {}
    for place, entry in enumerate(_listed(document.get("measurements"), "measurements", faults)):
        where = f"measurements[{place}]"
        step = entry.get("step") if isinstance(entry, dict) else None
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
            got = _quoted(step) if isinstance(entry, dict) else _quoted(entry)
            faults.append(f"{where} needs a whole number of 0 or more as its step; got {got}")
            continue
        sentences = {key: _sentences(entry, key, where, faults) for key in ("damage", "missing")}
        measured[step] = Measurement(step, _sets(entry, where, faults), **sentences)
    if not measured and not faults:
        faults.append("it holds no measurements")
    told = faults[:_MOST_FAULTS] + ([f"and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else [])
    notes = [f"{name}: {'; '.join(told)}. What is at fault is left out."] if told else []
    return [measured[step] for step in sorted(measured)], notes


def _quoted(value) -> str:
    """A value of the file, short enough for a note."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"
    return text if len(text) <= 40 else f"{text[:39]}…"


def _listed(value, where: str, faults: list[str]) -> list:
    if value is None:
        return []
    if not isinstance(value, list):
        faults.append(f"{where} must be a list; got {_quoted(value)}")
        return []
    return value


def _sets(entry: dict, where: str, faults: list[str]) -> dict[str, OnPrompts]:
    sets = entry.get("sets", {})
    if not isinstance(sets, dict):
        faults.append(f"{where}.sets must be an object; got {_quoted(sets)}")
        return {}
    found = {}
    for name in SETS:
        got = sets.get(name)
        if isinstance(got, dict):
            found[name] = _on_prompts(got, f"{where}.sets.{name}", faults)
        elif got is not None:
            faults.append(f"{where}.sets.{name} must be an object; got {_quoted(got)}")
    texts = entry.get("nll", {})
    if not isinstance(texts, dict):
        faults.append(f"{where}.nll must be an object; got {_quoted(texts)}")
        return found
    for text in ("chosen", "text"):
        got = None if texts.get(text) is None else {"value": texts[text]}
        estimate = _estimate(got, f"{text}_nll", f"{where}.nll.{text}", faults)
        if estimate is not None:
            found.setdefault("pairs", OnPrompts()).numbers[f"{text}_nll"] = estimate
    return found


def _on_prompts(got: dict, where: str, faults: list[str]) -> OnPrompts:
    numbers = {}
    for name in NUMBERS:
        estimate = _estimate(got.get(name), name, f"{where}.{name}", faults)
        if estimate is not None:
            numbers[name] = estimate
    answers: dict[str, Any] = {}
    for place, sample in enumerate(_listed(got.get("samples"), f"{where}.samples", faults)):
        prompt, greedy = (sample.get("prompt"), sample.get("greedy")) if isinstance(sample, dict) else (None, None)
        if isinstance(prompt, str) and isinstance(greedy, str):
            answers.setdefault(prompt, greedy)
        else:
            faults.append(f"{where}.samples[{place}] needs the texts prompt and greedy")
    prompts = got.get("prompts")
    counted = isinstance(prompts, int) and not isinstance(prompts, bool) and 0 <= prompts < 2**53
    if prompts is not None and not counted:
        faults.append(f"{where}.prompts must be a whole number of 0 or more; got {_quoted(prompts)}")
    return OnPrompts(numbers, answers, prompts if counted else None)


def _estimate(got, name: str, where: str, faults: list[str]) -> Estimate | None:
    if got is None:
        return None
    if not isinstance(got, dict):
        faults.append(f"{where} must be an object with value, low and high; got {_quoted(got)}")
        return None
    least, most = NUMBERS[name][2]
    value = number(got.get("value"))
    if value is None or not least <= value <= most:
        if got.get("value") is not None:
            faults.append(f"{where}.value must be a number from {max(0.0, least):g} to {most:g}; got {_quoted(got['value'])}")
        return None
    low, high = number(got.get("low")), number(got.get("high"))
    room = 1e-3 * (1.0 + abs(value))  # numbers in the file may be rounded
    if got.get("low") is None or got.get("high") is None:
        return Estimate(value)
    if low is None or high is None or not least <= low <= value + room or not value - room <= high <= most:
        ends = f"{_quoted(got['low'])} to {_quoted(got['high'])}"
        faults.append(f"{where}: the interval {ends} must hold the value {value:g}")
        return Estimate(value)
    return Estimate(value, low, high)


def _sentences(entry: dict, key: str, where: str, faults: list[str]) -> tuple[str, ...]:
    found = []
    for place, sentence in enumerate(_listed(entry.get(key), f"{where}.{key}", faults)):
        if isinstance(sentence, str):
            found.append(sentence)
        else:
            faults.append(f"{where}.{key}[{place}] must be a sentence; got {_quoted(sentence)}")
    return tuple(found)


def of_metrics(step: int, value: Callable[[str], float | None]) -> Measurement | None:
    """A measurement out of an evaluation's metrics, without intervals; None if it has none of a price's.

    Args:
        step: of the evaluation.
        value: gives a metric by its name, without the evaluation's prefix.
    """
    sets = {}
    for of_set, suffix in (("pairs", ""), ("general", "_general")):
        found = {}
        for name, (_, _, (least, most)) in NUMBERS.items():
            got = value(f"cpo/{_LOGGED.get(name, name)}{suffix}")
            if got is not None and math.isfinite(got) and least <= got <= most:
                found[name] = Estimate(got)
        if found:
            sets[of_set] = OnPrompts(found)
    return Measurement(step, sets) if sets else None
