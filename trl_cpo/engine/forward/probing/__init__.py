"""Whether packing is right for a model, found out on the model itself.

static_checks  what can be told without running it
random_pairs   pairs of tokens to try
rounding       what rounding alone does
comparison     packed held against padded
probe          the verdict
"""
