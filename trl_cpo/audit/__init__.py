"""Look before you train: what a reference makes of a set of preference pairs, measured before anything is trained.

`examine` (preflight: what the model sees) and `measure` (arrays of log-probabilities to numbers) know nothing of models;
`scoring` gets the log-probabilities as training would; `advice` says in words what the numbers justify; `text` renders the
one document that all of them make, which `trl-cpo audit --json` prints.
"""
