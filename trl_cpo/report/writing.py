"""Writes a report; replaces nothing but an unchanged earlier report."""

import hashlib
import json
import re
from pathlib import Path

from ..files.atomic import draft_of, replace_file
from ..files.disk import make_folder
from ..files.outputs import is_taken, next_free

#: Lists a report's files and their hashes, so that the next report knows what it may replace.
CONTENTS = "report-contents.json"
_MADE_BY = "trl-cpo report"


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _own_files(out: Path) -> dict[str, list[str]]:
    """The files that an earlier report in `out` lists, each with its possible hashes; empty if there is no report."""
    try:
        contents = json.loads((out / CONTENTS).read_text(encoding="utf-8"))
        files = contents["files"] if contents["made_by"] == _MADE_BY else {}
        return {name: list(hashes) for name, hashes in files.items() if Path(name).name == name != ".."}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def check_free(out: str | Path) -> None:
    """Raises `FileExistsError` unless `out` is empty, does not exist, or holds an unchanged report and nothing else."""
    out = Path(out)
    if not is_taken(out):
        return
    advice = f"It is not overwritten. Give another folder, such as --out {next_free(out)}."
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file. {advice}")
    own = _own_files(out)
    ours = {CONTENTS, *own}
    strangers = sorted(path.name for path in out.iterdir() if path.name not in ours and _finished(path.name) not in ours)
    # A report interrupted at its first file leaves only drafts, which are not strangers.
    if strangers or (not own and (out / CONTENTS).exists()):
        raise FileExistsError(f"{out} holds files that are not a report's ({', '.join(strangers[:3]) or CONTENTS}). {advice}")
    changed = [name for name, hashes in own.items() if (out / name).exists() and _hash((out / name).read_bytes()) not in hashes]
    if changed:
        raise FileExistsError(f"{out} holds a report that has been changed ({', '.join(changed[:3])}). {advice}")


def write(out: str | Path, files: dict[str, bytes]) -> None:
    """Writes a report's files after `check_free`, and removes an earlier report's files that the new one lacks.

    The list of files is written first, with old and new hashes, so that a report interrupted here is still recognised.

    Raises:
        FileExistsError: as `check_free`.
    """
    out = Path(out)
    check_free(out)
    old = _own_files(out)
    make_folder(out)
    new = {name: [_hash(data)] for name, data in files.items()}
    replace_file(out / CONTENTS, _listed({name: old.get(name, []) + new.get(name, []) for name in {**old, **new}}))
    for name in old.keys() - new.keys():
        (out / name).unlink(missing_ok=True)
    for draft in [path for path in out.iterdir() if _finished(path.name) in {CONTENTS, *old}]:
        draft.unlink(missing_ok=True)
    for name, data in files.items():
        replace_file(out / name, data)
    replace_file(out / CONTENTS, _listed(new))


def _finished(draft: str) -> str | None:
    """The file that the draft would have become; None if `draft` is not a draft."""
    older = re.fullmatch(r"\.(.+)\.unfinished", draft)  # the name in earlier versions
    return older[1] if older else draft_of(draft)


def _listed(files: dict[str, list[str]]) -> bytes:
    return (json.dumps({"made_by": _MADE_BY, "files": files}, indent=1) + "\n").encode()
