"""Started by test_new_form.py in a copy of this repository to which the forms "squared" and "lift" were added.

Writes the stub, runs the matrix on the two forms, and uses all that should follow from their fields. Exit code 0 where it does.
"""

import contextlib
import dataclasses
import io
import json
import math
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEW = ("squared", "lift")


def write_stub() -> None:
    """python -m trl_cpo.constraint_fields > trl_cpo/constraint_fields.pyi"""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_module("trl_cpo.constraint_fields", run_name="__main__")
    (ROOT / "trl_cpo" / "constraint_fields.pyi").write_text(said.getvalue())


def options(name: str, **changed):
    from constraint_cases import CASES

    form = CASES[name].form
    return {each.name: getattr(form, each.name) for each in dataclasses.fields(form)} | {"constraint": name, **changed}


def check_config() -> None:
    from trl_cpo import CPOConstrainedConfig

    def config(**values):
        return CPOConstrainedConfig("out", use_cpu=True, bf16=False, report_to="none", **values)

    field = CPOConstrainedConfig.__dataclass_fields__["lift"]
    assert field.default == 10.0 and field.metadata["help"] == "For 'lift': most nats that a target is raised by. [> 0]"
    assert "lift (`float`, *optional*, defaults to `10.0`):" in CPOConstrainedConfig.__doc__
    assert "For 'penalty' and 'squared': weight" in CPOConstrainedConfig.__dataclass_fields__["penalty_weight"].metadata["help"]
    with pytest.raises(ValueError, match="lift must be a finite number > 0; got 0.0"):
        config(constraint="clip", lift=0.0)
    with pytest.raises(TypeError, match="lieft"):
        config(constraint="lift", lieft=3.0)
    with pytest.raises(ValueError, match="Did you mean 'squared'"):
        config(constraint="sqared")
    assert config(constraint="clip", gamma=1.0, lift=3.0).cautions() == ["constraint='clip' does not use lift=3.0."]
    assert config(constraint="lift", lift=3.0, gamma=1.0).form.lift == 3.0


def check_command_line() -> None:
    from trl_cpo.cli import main, train
    from trl_cpo.cli.options import parse_run, run_parser
    from trl_cpo.report.table import MAIN_SETTINGS

    every = " ".join(run_parser("trl-cpo train").format_help().split())
    assert "--lift LIFT" in every and "For 'lift': most nats that a target is raised by. [> 0]" in every
    assert all(name in train._OFTEN for name in NEW) and "lift" in MAIN_SETTINGS
    arguments = ["--output_dir", "out", "--use_cpu", "--bf16", "False", "--constraint", "lift", "--lift", "4"]
    assert parse_run(arguments, None)[1].form.lift == 4.0
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main(["train", "--constraint", "lift", "--lieft", "4"]) == 2
    assert "--lieft" in said.getvalue()


def check_certificates() -> None:
    from trl_cpo.certificates import certify_run, check

    def certified(folder: str, **config):
        run = ROOT / folder
        run.mkdir()
        told = {"beta": config["beta"], "gamma": config["gamma"], "constraint": config["constraint"]}
        sides = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"]
        rows = [[-1, -4, -1, -3], [-2, -3, -3, -2]]
        pairs = {"reduction": config["logps_reduction"], "split": "test", "columns": sides, "rows": rows, **told}
        (run / "pairs.json").write_text(json.dumps(pairs))
        (run / "metrics.json").write_text(json.dumps({"config": config, "after": {}}))
        made = certify_run(run)
        assert check(made, run) == []
        return made["subject"]

    for name, field in (("lift", "lift"), ("squared", "penalty_weight")):
        first = certified(f"{name}-1", **options(name))
        second = certified(f"{name}-2", **options(name, **{field: 7.0}))
        assert first != second and {**first, "hyperparameters": 0} == {**second, "hyperparameters": 0}
        assert second["hyperparameters"] == {field: 7.0}


def check_population_optimum() -> None:
    import torch

    from trl_cpo.constraints import CONSTRAINTS
    from trl_cpo.pairs import PairLogps
    from trl_cpo.theory import population_gaps

    def one(value):
        return torch.tensor([value], dtype=torch.float64)

    pairs, p = PairLogps(one(0.0), one(0.0), one(-3.0), one(-1.0)), one(0.7)  # δ_ref = −2
    lift = CONSTRAINTS["lift"](beta=1.0, gamma=1.0, lift=2.0)
    assert population_gaps(lift, pairs, p).item() == pytest.approx(0.0 + math.log(0.7 / 0.3), abs=1e-12)
    squared = CONSTRAINTS["squared"](beta=1.0, gamma=1.0, penalty_weight=0.4)
    grid = torch.linspace(-6, 6, 1_200_001, dtype=torch.float64)
    loss = torch.log1p(torch.exp(-(grid + 2))) + 0.3 * (grid + 2) + 0.2 * (1 - grid).clamp(min=0) ** 2
    found = population_gaps(squared, pairs, p).item()
    assert found == pytest.approx(grid[loss.argmin()].item(), abs=2e-5) and found > -2 + math.log(0.7 / 0.3) + 0.1


def main() -> int:
    import trl_cpo

    assert Path(trl_cpo.__file__).is_relative_to(ROOT), "the copy is used, and not the package as it is installed"
    write_stub()
    matrix = [str(ROOT / "tests" / file) for file in ("test_constraints.py", "test_config.py")]
    if "--trainer" in sys.argv:
        matrix = [str(ROOT / "tests" / "test_trainer.py")]
    code = pytest.main([*matrix, "-p", "no:cacheprovider", "-p", "no:xdist", "-k", " or ".join((*NEW, "stub"))])
    if code or "--trainer" in sys.argv:
        return code
    for check in (check_config, check_command_line, check_certificates, check_population_optimum):
        check()
    print("all of it follows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
