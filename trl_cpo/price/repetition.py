"""Repetition: how much of an answer says again what it has said."""

from collections.abc import Sequence


def repeated(tokens: Sequence[int], n: int = 3) -> tuple[int, int]:
    """How many n-grams of an answer occurred in it before, and how many it has.

    `repeated = total − distinct`, so that their ratio is 0 where no n-gram occurs twice, and near 1 in a loop.
    """
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(grams) - len(set(grams)), len(grams)
