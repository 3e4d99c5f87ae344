"""Decides whether packing is correct for a model by testing it on the model itself.

static_checks  checks that need no forward
random_pairs   pairs of random tokens to run
rounding       the effect of rounding alone
comparison     packed against padded outputs
probe          the verdict
"""
