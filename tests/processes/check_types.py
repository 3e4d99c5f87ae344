"""Check the package with mypy: `python tests/processes/check_types.py` prints what differs from `mypy_baseline.txt`.

The baseline holds the errors that are left, without line numbers. It may only shrink. `--write` records what mypy finds now:
do that after errors were mended or modules were renamed, and read the diff.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for helpers

# isort: split
from helpers.type_errors import BASELINE, HEAD, compared, errors_in, mypy, read_baseline


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record what mypy finds now")
    options = parser.parse_args(arguments)
    found = errors_in(mypy())
    differences = compared(found, read_baseline(BASELINE.read_text() if BASELINE.is_file() else ""))
    if differences:
        print("\n".join(differences))
    print(f"{found.total()} errors, {'as recorded' if not differences else f'{len(differences)} differences'}")
    if options.write:
        BASELINE.write_text(HEAD + "".join(f"{error}\n" for error in sorted(found.elements())))
        return 0
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
