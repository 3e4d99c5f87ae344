"""Two forwards of the same batch, packed and padded: outputs and gradients."""

import torch

from helpers.families import OUTPUTS

ATTENTIONS = ["dense", "segments", "varlen"]


def assert_same_outputs(padded, packed, tolerance=1e-4):
    for name in (*OUTPUTS, "loss", "label_mask"):
        one, other = getattr(padded, name), getattr(packed, name)
        assert one.shape == other.shape and one.dtype == other.dtype, name
        if one.is_floating_point():
            torch.testing.assert_close(other, one, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert torch.equal(one, other), name


def gradients(model, outputs, seed=0):
    """Gradients of a random combination of log-probs and entropies, so that no two tokens weigh the same."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, *outputs.log_probs.shape, generator=generator)
    model.zero_grad()
    (outputs.log_probs * weights[0] + outputs.entropy * weights[1]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(one, other, relative=1e-4):
    assert one.keys() == other.keys()
    # Some gradients are zero but for rounding, which the largest of the model sets.
    rounding = 1e-6 * max(float(gradient.abs().max()) for gradient in one.values())
    for name, gradient in one.items():
        bound = relative * float(gradient.abs().max()) + rounding
        torch.testing.assert_close(other[name], gradient, rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}")
