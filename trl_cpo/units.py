"""How log-probabilities are reduced over a response, and the unit that this gives them. Imports nothing."""

#: Reduction to the unit of log-probabilities, gaps and γ: "sum" over the tokens of a response, or "mean" per token.
UNITS = {"sum": "nats per response", "mean": "nats per token"}
REDUCTIONS = tuple(UNITS)

#: Of β and γ that are not given: their values per token, the paper's. Per response β is TRL's and γ is 0.
DEFAULTS_OF_MEANS = {"beta": 2.5, "gamma": 0.05}
