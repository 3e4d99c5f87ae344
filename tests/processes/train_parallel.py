"""Run by helpers/parallel_jobs.py: the trainings of two tests under whatever launched it; each process writes what it saw.

    train_parallel.py '{"kind": "zero3", "model": ..., "folder": ..., "batch": 2, "jobs": {"scaling": ..., "packed": ...}}'

They follow one another in one launch, because importing the libraries takes longer than training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split

from helpers.process_job import read_job

JOB = read_job()

# isort: split

from helpers import imported  # noqa: F401

# isort: split

import json
import os

from helpers import packed_training, scaling_training

#: In the order in which they are done.
TRAIN = {"scaling": scaling_training.train, "packed": packed_training.train}


def done(name: str) -> list:
    """What was seen of the trainings of a job. It has caches of its own, so that it takes up nothing of another's."""
    folder = Path(JOB["folder"]) / name
    os.environ["TRL_CPO_CACHE"] = str(folder / "trl_cpo")
    job = {**JOB, **JOB["jobs"][name], "folder": str(folder)}
    return [TRAIN[name](job, run) for run in job["runs"]]


if __name__ == "__main__":
    seen = {name: done(name) for name in TRAIN if name in JOB["jobs"]}
    # Every process writes: a fall-back on one of them alone would otherwise go unseen.
    (Path(JOB["folder"]) / f"seen{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
