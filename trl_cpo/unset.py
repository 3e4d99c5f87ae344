"""Defaults that a config can tell from the same value given by its user. To everything else they are that value.

TRL's parser hands a default on as it is, so they are told apart on the command line too.
"""


class UnsetNumber(float):
    """A number that nobody gave."""


class UnsetText(str):
    """A text that nobody gave."""

    def __str__(self):
        return self  # argparse converts a text's default by str()
