"""Run by tests/attacks/test_hub.py: commands of `trl-cpo`, each in a fork of a process that has imported what they need.

commands_in_turn.py '[["train", ...], ...]'

What each says goes to 0.out and 0.err, 1.out and so on, in the folder that this runs in; their exit codes are printed.
"""

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split

import trl_cpo.run  # noqa: F401
from trl_cpo.cli import main

from helpers import imported  # noqa: F401


def forked(number: int, command: list[str]) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = -1
    try:
        for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream.fileno())
        code = main(command)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    print(json.dumps([forked(number, command) for number, command in enumerate(json.loads(sys.argv[1]))]))
