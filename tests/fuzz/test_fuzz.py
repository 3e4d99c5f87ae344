"""The suite's share of the fuzzing: 10,000 draws of each target, fewer of the slow ones, the same ones in every run."""

import random

import pytest

from trl_cpo import CPOConstrainedConfig
from trl_cpo.objective import pair_loss

from fuzz import targets
from fuzz.run import run
from fuzz.targets import OWN_FIELDS, TARGETS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_ten_thousand_draws(name, tmp_path):
    line = run(name, 10_000, 0, str(tmp_path))
    # A target whose inputs are all refused would say little.
    accepted = int(line.split("draws, ")[1].split(" of them")[0]) if "accepted" in line else None
    assert accepted is None or accepted > 5, line


def test_a_planted_fault_is_found(monkeypatch):
    """A thousandth of a nat too little: the fuzzer must not be blind."""
    monkeypatch.setattr(targets, "pair_loss", lambda gap, target, beta: pair_loss(gap, target, beta=beta) - 1e-3)
    with pytest.raises(AssertionError):
        targets.objective(random.Random(0), 2000)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"gamma": 10**400}, "gamma"),
        ({"constraint": "clip", "beta": 10**400}, "beta"),
        ({"constraint": "lagrangian", "beta": 1e308}, "beta"),
        ({"constraint": "lagrangian", "dual_init": [], "dual_max": object()}, "dual_max"),
        ({"prefix_sharing": [True]}, "prefix_sharing"),
        ({"balance_tokens": "yes"}, "balance_tokens"),
        ({"check_reference": None}, "check_reference"),
    ],
)
def test_what_fuzzing_found(tmp_path, options, field):
    """Each of these once ended in an OverflowError or a TypeError of Python's, or was taken."""
    with pytest.raises(ValueError, match=field):
        CPOConstrainedConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_every_own_field_is_drawn():
    assert {"constraint", "gamma", "check_reference", "epsilon", "prefix_sharing"} <= set(OWN_FIELDS)
    assert not {"learning_rate", "output_dir"} & set(OWN_FIELDS)
