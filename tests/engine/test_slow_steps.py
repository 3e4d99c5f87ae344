"""Steps that take far longer than others are reported, once."""

import logging
from types import SimpleNamespace

import pytest

from trl_cpo.engine.slow_steps import SlowSteps


def run(seconds):
    """Steps of the given lengths, each with an evaluation of an hour after it."""
    now = [0.0]
    callback = SlowSteps(clock=lambda: now[0])
    for step, length in enumerate(seconds, 1):
        callback.on_step_begin(None, None, None)
        now[0] += length
        callback.on_step_end(None, SimpleNamespace(global_step=step), None)
        now[0] += 3600


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1] * 30 + [3.5] + [1] * 5 + [9], 31),
        ([30, 9] + [1] * 40, None),  # slow at first
        ([1, 2] * 30 + [4], None),
        ([1] * 19 + [9] * 2, 21),
        ([1] * 19 + [9], None),
    ],
)
def test_a_step_of_more_than_three_medians_is_told_once(seconds, slow, caplog):
    with caplog.at_level(logging.WARNING):
        run(seconds)
    assert [record.args[0] for record in caplog.records] == ([] if slow is None else [slow])
    assert all("times the median" in record.getMessage() for record in caplog.records)
