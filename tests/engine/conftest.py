"""Fixtures of the engine's tests."""

import pytest
from trl import DPOTrainer

from helpers.flash_emulation import flash_on_cpu


@pytest.fixture(scope="session")
def flash_kernels():
    """FlashAttention's operators on the CPU; no model is switched to them unless a test says so."""
    with flash_on_cpu():
        yield


@pytest.fixture
def no_model_cards(monkeypatch):
    """Half of what a tiny checkpoint costs, and no part of it."""
    monkeypatch.setattr(DPOTrainer, "create_model_card", lambda *_, **__: None)
