"""Names of the files that a run writes beside the model, and the columns of pairs.json. Imports nothing."""

LOG, METRICS, PAIRS, PRICE = "log.jsonl", "metrics.json", "pairs.json", "price.json"
#: What `trl-cpo stress` leaves beside them.
STRESS = "stress.json"
#: The columns of pairs.json: log-probabilities in nats under the policy after training, the reference, and the policy before
#: training.
PAIR_COLUMNS = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "start_chosen", "start_rejected")
#: The columns known for every pair; those before training may be unknown (null).
KNOWN_COLUMNS = PAIR_COLUMNS[:4]
#: Columns that pairs.json may have too: tokens of each answer.
TOKEN_COLUMNS = ("chosen_tokens", "rejected_tokens")
