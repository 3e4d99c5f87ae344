"""A self-test of the installed TRL: is what this package relies on still so? `python -m trl_cpo.selftest` runs it.

materials  a tiny model with random weights, a tokenizer and pairs, made in memory
by_hand    losses, gradients and metrics from plain formulas
checks     the checks, in words and in code
"""
