"""The page's section on the price: numbers with their intervals, sampled answers side by side, and what is damaged."""

from .price import NUMBERS, SETS, Estimate, Measurement, OnPrompts
from .run import Run
from .table import minus

#: Prompts shown of each set, characters shown of each text, and sentences of damage shown of each run.
MOST_PROMPTS, MOST_CHARACTERS, MOST_SENTENCES = 4, 1500, 8
#: What a number that is of no prompts is of.
_OF_TEXTS = {"chosen_nll": "held-out chosen answers", "text_nll": "the text given"}


def ends(run: Run) -> tuple[Measurement | None, Measurement | None]:
    """The first and the last measurement of the price; a single one is the first if it was at step 0, else the last."""
    if len(run.prices) == 1:
        (only,) = run.prices
        return (only, None) if only.step == 0 else (None, only)
    return (run.prices[0], run.prices[-1]) if run.prices else (None, None)


def _on(measurement: Measurement | None, name: str) -> OnPrompts:
    return (measurement and measurement.sets.get(name)) or OnPrompts()


def _written(value: float, form: str) -> str:
    if form == "%":
        return f"{100 * value:.1f}"
    if form == "count":
        return f"{value:.1f}" if value < 1e5 else f"{value:.3g}"
    # A KL rounded below 0 is 0.
    return minus(f"{max(0.0, value):.3f}" if value < 1e5 else f"{value:.3g}")


def cell(estimate: Estimate | None, form: str) -> tuple[str, str] | None:
    """A number and its interval as texts; the interval is empty if not known."""
    if estimate is None:
        return None
    unit = "\u00a0%" if form == "%" else ""
    if estimate.low is None or estimate.high is None:
        return _written(estimate.value, form) + unit, ""
    return _written(estimate.value, form) + unit, f"{_written(estimate.low, form)} to {_written(estimate.high, form)}"


def rows(runs: list[Run]) -> list[dict]:
    """One row per number and set of prompts that a run measured: its set, its label, and cells (first, last) of each run."""
    found = []
    for of_set in SETS:
        for name, (label, form, _) in NUMBERS.items():
            pairs = [
                tuple(cell(_on(one, of_set).numbers.get(name), form) for one in ends(run))  # first, last
                for run in runs
            ]
            if any(any(pair) for pair in pairs):
                found.append({"of": _OF_TEXTS.get(name, SETS[of_set]), "label": label, "cells": pairs})
    return found


def _clipped(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} … ({len(text)} characters in all)"


def _names(place: str, letters_by_step: dict[int, list[str]], several: bool) -> str:
    """Who gave an answer: "A, B before, step 0", or "before, step 0" of a single run."""
    return "; ".join(
        f"{', '.join(letters)} {place}, step {step}" if several else f"{place}, step {step}"
        for step, letters in letters_by_step.items()
    )


def samples(runs: list[Run]) -> list[dict]:
    """A few prompts of each set: the prompt, and the answers before and after with the runs that gave them.

    Answers that are the same text are shown once, under the names of all that gave it.
    """
    shown = []
    for of_set in SETS:
        asked = dict.fromkeys(prompt for run in runs for one in ends(run) for prompt in _on(one, of_set).answers)
        for prompt in list(asked)[:MOST_PROMPTS]:
            answers: dict[tuple[str, str], dict[int, list[str]]] = {}
            for place in (0, 1):
                for run in runs:
                    measurement = ends(run)[place]
                    text = _on(measurement, of_set).answers.get(prompt)
                    if measurement is not None and text is not None:
                        gave = answers.setdefault((("before", "after")[place], text), {})
                        gave.setdefault(measurement.step, []).append(run.letter)
            cells = [(_names(place, gave, len(runs) > 1), _clipped(text)) for (place, text), gave in answers.items()]
            shown.append({"of": SETS[of_set], "prompt": _clipped(prompt), "answers": cells})
    return shown


def damage(run: Run) -> list[str]:
    """What the last measurement found damaged, in sentences, with the number of those left out."""
    sentences = run.prices[-1].damage if run.prices else ()
    more = len(sentences) - MOST_SENTENCES
    clipped = [_clipped(sentence) for sentence in sentences[:MOST_SENTENCES]]
    return clipped + ([f"And {more} more."] if more > 0 else [])


def missing(run: Run) -> list[str]:
    """What the last measurement did not measure, in sentences."""
    sentences = run.prices[-1].missing if run.prices else ()
    return [f"The price was not measured in whole: {_clipped(sentence)}" for sentence in sentences[:MOST_SENTENCES]]


def sentence(run: Run) -> str:
    """The price in one sentence, for the summary; empty if it was not measured."""
    first, last = ends(run)
    kl, repeated = (_on(last, "pairs").numbers.get(name) for name in ("kl", "repetition"))
    parts = []
    if kl is not None:
        parts.append(f"a KL of {_written(kl.value, 'nats')} nats per token to the reference")
    if repeated is not None:
        before = _on(first, "pairs").numbers.get("repetition")
        was = "" if before is None else f", {_written(before.value, '%')}\u00a0% before"
        parts.append(f"{_written(repeated.value, '%')}\u00a0% repeated 3-grams in greedy answers{was}")
    return f" The price: {'; '.join(parts)}." if parts else ""
