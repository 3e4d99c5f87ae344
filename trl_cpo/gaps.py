"""What the preference gaps of a pair say: of floats, NumPy arrays and tensors alike. Imports nothing."""


def in_undesirable_region(gap, ref_gap):
    """Def. 3.3 of arXiv 2605.20834, elementwise: `U = {δ < 0 and δ > δ_ref}`.

    The loss has fallen, and the policy still prefers the rejected response.
    """
    return (gap < 0) & (gap > ref_gap)
