"""The log of a run: written while it works, read afterwards, and told in words."""
