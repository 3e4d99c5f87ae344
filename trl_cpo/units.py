"""How log-probabilities are reduced over a response, and the unit that this gives them. Imports nothing."""

#: Reduction to the unit of log-probabilities, gaps and γ: "sum" over the tokens of a response, or "mean" per token.
UNITS = {"sum": "nats per response", "mean": "nats per token"}
REDUCTIONS = tuple(UNITS)
