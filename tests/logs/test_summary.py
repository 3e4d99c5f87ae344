"""The table at the end of a run: groups and the chosen floor have rows where they were in use."""

from trl_cpo.logs.summary import before_after

BEFORE = {
    "eval_cpo/prefers_chosen": 0.5,
    "eval_cpo/ref_gap": 1.0,
    "eval_cpo/a/prefers_chosen": 0.25,
    "eval_cpo/a/violation_rate": 1.0,
}
AFTER = {
    **BEFORE,
    "eval_cpo/a/prefers_chosen": 0.75,
    "eval_cpo/a/slack": -0.125,
    "eval_cpo/\x1b[2J/prefers_chosen": 1.0,
    "eval_cpo/chosen_floor_violation": 0.5,
}


def table(before, after) -> str:
    return before_after(before, after, pairs=8, gamma=1.0, reduction="sum", constraint="lagrangian")


def test_groups_and_the_floor_have_rows():
    lines = table(BEFORE, AFTER).splitlines()
    rows = {line[:36].strip(): line.split() for line in lines}
    assert rows["a: prefers chosen"][-4:] == ["25.0", "%", "75.0", "%"]
    assert rows["a: violations (δ < γ of the group)"][-4:] == ["100.0", "%", "100.0", "%"]
    assert rows["a: the bound holds (slack)"][-3:] == ["-", "no", "(-0.125)"]
    assert rows["chosen answers below their floor by"][-2:] == ["-", "+0.500"]
    widths = {len(line) for line in lines[2:-1]}
    assert widths == {64}


def test_a_groups_name_drives_no_terminal():
    assert "\x1b" not in table(BEFORE, AFTER) and "\\x1b[2J: prefers chosen" in table(BEFORE, AFTER)


def test_no_groups_no_rows():
    plain = {"eval_cpo/prefers_chosen": 0.5, "eval_cpo/kl": 0.1}
    assert "group" not in table(plain, plain) and "floor" not in table(plain, plain)
