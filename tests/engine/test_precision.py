"""Coarser products of float32 are seen, whoever asked for them."""

import pytest
import torch

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine import start_check
from trl_cpo.engine.precision import float32_products
from trl_cpo.engine.reference import table_of

from helpers.tiny import make_model, make_tokenizer, pairs_dataset, training_options

newer = pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="PyTorch before 2.9 has the older setting alone"
)


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends, "fp32_precision"):
        # The older setting pins each backend, and a pinned one no longer follows the newer.
        for place in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            place.fp32_precision = "none"


def globally(value):
    """As `TrainingArguments.tf32` and `torch_compile` set it."""
    torch.backends.fp32_precision = value


@pytest.mark.parametrize(
    "setter, value, expected",
    [
        (torch.set_float32_matmul_precision, "highest", {"cpu": "ieee", "cuda": "ieee"}),
        (torch.set_float32_matmul_precision, "high", {"cpu": "tf32", "cuda": "tf32"}),
        pytest.param(globally, "tf32", {"cpu": "tf32", "cuda": "tf32"}, marks=newer),
        pytest.param(globally, "ieee", {"cpu": "ieee", "cuda": "ieee"}, marks=newer),
    ],
)
def test_it_is_read_whichever_way_it_was_set(setter, value, expected):
    assert {device: float32_products(device) for device in expected} == {"cpu": "ieee", "cuda": "ieee"}
    setter(value)
    assert {device: float32_products(device) for device in expected} == expected


def test_products_of_a_gpu_alone():
    torch.backends.cuda.matmul.allow_tf32 = True
    assert float32_products("cuda") == "tf32"


def test_a_trainer_under_it_has_another_table_and_the_tolerance_of_fewer_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_CPO_CACHE", str(tmp_path / "cache"))

    def trainer():
        args = CPOConstrainedConfig(**training_options(tmp_path, constraint="clip", precompute_ref_log_probs=True))
        return CPOConstrainedTrainer(
            model=make_model(), args=args, processing_class=make_tokenizer(), train_dataset=pairs_dataset(3)
        )

    exact = trainer()
    torch.set_float32_matmul_precision("high")
    coarse = trainer()
    assert table_of(exact).folder != table_of(coarse).folder
    tolerances = [each._start_check._tolerance for each in (exact, coarse)]
    assert tolerances == [start_check.FULL_PRECISION_TOLERANCE, start_check.HALF_PRECISION_TOLERANCE]
