"""Fixtures of the engine's tests."""

import pytest
from trl import DPOTrainer

from helpers import parallel_jobs
from helpers.flash_emulation import flash_on_cpu
from helpers.once import once


@pytest.fixture(scope="session")
def flash_kernels():
    """FlashAttention's operators on the CPU; no model is switched to them unless a test says so."""
    with flash_on_cpu():
        yield


@pytest.fixture
def no_model_cards(monkeypatch):
    """Half of what a tiny checkpoint costs, and no part of it."""
    monkeypatch.setattr(DPOTrainer, "create_model_card", lambda *_, **__: None)


@pytest.fixture(scope="session")
def parallel(tmp_path_factory, model_folder, ref_model_folder):
    """What was seen of the trainings of a kind of processes, by job; launched once in a run of the tests."""

    def seen(kind: str) -> dict:
        return once(
            tmp_path_factory,
            f"parallel-{kind}",
            lambda folder: parallel_jobs.launch(kind, folder, model_folder, ref_model_folder),
        )

    return seen
