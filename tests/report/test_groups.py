"""The report's table of groups, against numbers written into a run's folder."""

import json
import math

import pytest

from trl_cpo.report.groups import groups
from trl_cpo.report.page import render
from trl_cpo.report.reading import of_runs, read_run

from helpers.report_looks import Page
from helpers.run_folders import make_run

#: After training: pairs, share that prefers chosen, share of violations, slack of a bound on that share.
AFTER = {"harmless": (20, 0.9, 0.15, -0.1), "helpful": (40, 0.75, 0.2, 0.0)}


@pytest.fixture
def folder(tmp_path):
    made = make_run(tmp_path / "r", pairs=60)
    record = json.loads((made / "metrics.json").read_text())
    for name, (pairs, prefers, rate, slack) in AFTER.items():
        start = {"pairs": pairs, "prefers_chosen": 0.5, "violation_rate": 0.5}
        end = {"pairs": pairs, "prefers_chosen": prefers, "violation_rate": rate, "slack": slack, "holds": float(slack >= 0)}
        for part, values in (("before", start), ("after", end)):
            record[part] |= {f"eval_cpo/{name}/{key}": value for key, value in values.items()}
    record["config"] |= {"group_column": "kind", "dual_signal": "violation_rate", "gamma": 0.5, "epsilon": 0.2}
    record["config"] |= {"gamma_by_group": {"harmless": 1.0}, "epsilon_by_group": {"harmless": 0.05}}
    (made / "metrics.json").write_text(json.dumps(record))
    lines = [json.dumps({"step": step, "cpo/harmless/lambda": step / 100, "cpo/helpful/lambda": 0.0}) for step in (61, 62)]
    with (made / "log.jsonl").open("a") as file:
        file.write("\n".join(lines) + "\n")
    return made


def test_each_group_with_what_was_asked_and_what_came_of_it(folder):
    first, second = groups(read_run(folder))
    assert (first.name, first.pairs, first.gamma, first.allowed) == ("harmless", 20, 1.0, "5\u00a0% of pairs")
    assert (first.before.text, first.after.text, first.violations.text) == ("50.0\u00a0%", "90.0\u00a0%", "15.0\u00a0%")
    # Clopper–Pearson of 3 of 20.
    assert first.violations.interval == pytest.approx((0.0321, 0.3789), abs=1e-4)
    assert (first.weight, first.bound) == (0.62, "missed by 10 points")
    assert (second.name, second.gamma, second.allowed, second.bound) == ("helpful", 0.5, "20\u00a0% of pairs", "holds")


def test_a_bound_in_nats(folder):
    record = json.loads((folder / "metrics.json").read_text())
    record["config"]["dual_signal"] = "violation"
    (folder / "metrics.json").write_text(json.dumps(record))
    first, _ = groups(read_run(folder))
    assert (first.allowed, first.bound) == ("0.05", "missed by 0.1")


def test_the_page_has_the_table_where_there_are_groups(folder, tmp_path):
    def page(folder):
        run = read_run(folder)
        return Page(render([run], of_runs([run]), []))

    text = page(folder).text
    assert "Group by group" in text and "missed by 10 points" in text and text.index("harmless") < text.index("helpful")
    assert "Group by group" not in page(make_run(tmp_path / "plain")).text


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, -1.0, None, "many"])
@pytest.mark.parametrize("key", ["pairs", "slack", "prefers_chosen", "violation_rate"])
def test_a_forged_number_is_shown_or_left_out(folder, key, value):
    record = json.loads((folder / "metrics.json").read_text())
    record["after"][f"eval_cpo/harmless/{key}"] = value
    record["config"]["epsilon_by_group"] = [value]
    (folder / "metrics.json").write_text(json.dumps(record))
    run = read_run(folder)
    assert "Group by group" in render([run], of_runs([run]), [])
