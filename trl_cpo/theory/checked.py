"""Checks the arguments of closed forms: float64 vectors of one shape, numbers in their range."""

import torch
from torch import Tensor


def one_shape(**values: Tensor) -> list[Tensor]:
    """Returns the values as float64, (B,) each. Raises `ValueError` if lengths differ or a value is NaN, naming which."""
    tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) != 1:
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"Expected vectors of one length, one number per pair; got {got}.")
    nan = [name for name, tensor in tensors.items() if tensor.isnan().any()]
    if nan:
        raise ValueError(f"NaN in {', '.join(nan)}. Closed forms need numbers.")
    return list(tensors.values())


def probabilities(p: Tensor) -> None:
    """Raises `ValueError` unless every value lies in [0, 1]."""
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p must lie in [0, 1]; got {p[(p < 0) | (p > 1)][:3].tolist()}.")


def positive(**values: float) -> None:
    """Raises `ValueError`, naming the number, unless each is finite and above 0."""
    for name, value in values.items():
        if not 0.0 < value < float("inf"):
            raise ValueError(f"{name} must be finite and > 0; got {value!r}.")
