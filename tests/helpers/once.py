"""What several test processes of a run need is made by the first that asks."""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def once(factory, name: str, make: Callable[[Path], object]):
    """What `make` gives for an empty folder, as JSON keeps it; the others wait for it. What fails is tried by each.

    Args:
        factory: pytest's tmp_path_factory.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # the folder that all processes of the run share
    made = base / f"{name}.json"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            made.write_text(json.dumps(make(Path(tempfile.mkdtemp(prefix=f"{name}-", dir=base)))))
        return json.loads(made.read_text())
