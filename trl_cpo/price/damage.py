"""Is the model damaged? Thresholds, and the verdict in words."""

from collections.abc import Mapping

from .document import SetPrice

#: Nats per token beyond which a model is called damaged; docs/price.md says which runs the thresholds come from.
MOST_KL = 0.25
#: The same for the rise of the share of repeated 3-grams over the reference's.
MOST_REPETITION = 0.15

#: The sets of prompts, in words.
WHERE = {"pairs": "on the pairs' prompts", "general": "on general prompts"}


def verdict(now: Mapping[str, SetPrice], before: Mapping[str, SetPrice]) -> list[str]:
    """What is wrong with a model, a sentence each; empty where nothing is.

    Judged on general prompts, which training was not meant to change; on the pairs' prompts where there are no others.

    Args:
        now: the price of the model, by set of prompts.
        before: the same of its reference.
    """
    name = "general" if "general" in now else "pairs"
    if name not in now:
        return []
    found, where = [], WHERE[name]
    kl = now[name].kl
    if kl.low > MOST_KL:
        found.append(f"KL to the reference is {kl.value:.2g} nats a token {where}, beyond {MOST_KL:g}")
    if name in before:
        rise = now[name].repetition.value - before[name].repetition.value
        if rise > MOST_REPETITION:
            found.append(
                f"greedy answers repeat {_percent(now[name].repetition.value)} of their 3-grams {where}, "
                f"{_percent(before[name].repetition.value)} before, a rise of more than {100 * MOST_REPETITION:.0f} points"
            )
    return found


def in_words(now: Mapping[str, SetPrice], before: Mapping[str, SetPrice], damage: list[str]) -> str | None:
    """The price as one sentence; None where nothing was measured."""
    parts = []
    for name, part in now.items():
        words = f"{part.kl.value:.2g} nats a token from the reference {WHERE[name]}"
        earlier = f", {_percent(before[name].repetition.value)} before" if name in before else ""
        parts.append(f"{words} (3-grams repeated: {_percent(part.repetition.value)}{earlier})")
    if not parts:
        return None
    sentence = f"the price: {'; '.join(parts)}"
    if damage:
        sentence += (
            f". This model is damaged: {'; '.join(damage)}. Lower the learning rate, train for fewer steps, or set max_kl"
        )
    return sentence


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"
