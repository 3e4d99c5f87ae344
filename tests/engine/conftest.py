"""Fixtures of the engine's tests."""

import pytest
from trl import DPOTrainer


@pytest.fixture
def no_model_cards(monkeypatch):
    """Half of what a tiny checkpoint costs, and no part of it."""
    monkeypatch.setattr(DPOTrainer, "create_model_card", lambda *_, **__: None)
