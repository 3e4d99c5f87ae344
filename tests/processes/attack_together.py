"""Run by tests/attacks/test_processes.py: `trl-cpo` in two processes, one of which has a full disk or another clock.

attack_together.py '{"full": rank, "left": bytes of a file, "clock": seconds ahead of rank 1}' train ...
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

JOB, RANK = json.loads(sys.argv[1]), int(os.environ["RANK"])
if JOB.get("full") == RANK:
    resource.setrlimit(resource.RLIMIT_FSIZE, (JOB["left"], resource.RLIM_INFINITY))
if RANK == 1 and "clock" in JOB:
    own = time.time
    time.time = lambda: own() + JOB["clock"]

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split

from helpers import imported  # noqa: F401

# isort: split

from trl_cpo.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
