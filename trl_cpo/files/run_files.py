"""The files that a run leaves in its folder beside the model, and the columns of its pairs. Imports nothing."""

LOG, METRICS, PAIRS = "log.jsonl", "metrics.json", "pairs.json"
#: The columns of pairs.json, log-probabilities in nats: of the policy after training, of the reference, and of the policy
#: before training.
PAIR_COLUMNS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "start_chosen", "start_rejected")
#: Those of them that every pair has; the start may be unknown (null).
KNOWN_COLUMNS = PAIR_COLUMNS[:4]
