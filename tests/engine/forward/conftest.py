"""Fixtures of the forward's tests."""

import pytest


@pytest.fixture(autouse=True)
def over_emulated_kernels(flash_kernels):
    """Variable-length attention can be asked for in every test here."""
