"""Where things lie."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
#: Programs that tests start as processes of their own.
PROCESSES = TESTS / "processes"
