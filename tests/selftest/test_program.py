"""The self-test as a program: its exit code, and the outcome that it writes."""

import json

import pytest

from trl_cpo._trl import trial
from trl_cpo.selftest import __main__ as program
from trl_cpo.selftest import checks


@pytest.mark.parametrize("failed", [{}, {"none": ["the loss is 1.0 and not 0.5"]}])
def test_the_outcome_is_written_and_told_by_the_exit_code(failed, monkeypatch, tmp_path, capsys):
    def run() -> dict[str, list[str]]:
        print("said by a library")
        return failed

    monkeypatch.setattr(checks, "run", run)
    file = tmp_path / "outcome.json"
    assert program.main([str(file)]) == program.main([]) == bool(failed)
    shown = capsys.readouterr()
    for document in (json.loads(file.read_text()), json.loads(shown.out)):
        assert document.pop("seconds") >= 0
        assert document == {"format": 1, "about": trial.subject(), "failed": failed}
    assert "said by a library" in shown.err
