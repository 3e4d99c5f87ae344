"""Where a benchmark runs: a GPU if there is one, unless the command names a device."""

import torch


def chosen(name: str | None = None) -> torch.device:
    """The device of that name; by default CUDA's where there is one, else the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def described(device: torch.device) -> str:
    """What records say of a device: a card's name, or the device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
