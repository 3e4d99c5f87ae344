"""Training steps on a GPU: ours against DPOTrainer's, at real lengths, in models of common sizes with random weights."""
