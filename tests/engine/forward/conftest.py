"""Fixtures of the forward's tests."""

import pytest

from helpers.flash_emulation import flash_on_cpu


@pytest.fixture(scope="session", autouse=True)
def flash_kernels():
    """FlashAttention's operators on the CPU; no model is switched to them unless a test says so."""
    with flash_on_cpu():
        yield
