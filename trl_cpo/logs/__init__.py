"""The log of a run: writing it, reading it, and putting it into words."""
