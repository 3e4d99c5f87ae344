"""The README's table of the demo under several seeds, from what the runs printed."""

import sys

import pytest

from helpers.paths import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import demo_seeds


def test_the_table_is_what_the_runs_printed():
    made = "\n".join(f"  {line}" for line in demo_seeds.table().splitlines())
    assert f"\n\n{made}\n\n" in (ROOT / "README.md").read_text(encoding="utf-8"), made


def test_numbers_are_those_after_training():
    found = demo_seeds.read("clip", 42)
    assert found == {"preferred": 74, "likeliest of six": 56, "greedy answer right": 52, "KL, general prompts": 0.042}


def test_the_interval_by_hand():
    """Of 1, 2 and 3: the standard error is 1/√3, and Student's t with 2 degrees of freedom is 4.303."""
    assert demo_seeds.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 / 3**0.5), rel=1e-6)
