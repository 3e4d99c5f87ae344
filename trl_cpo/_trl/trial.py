"""An untested TRL is tried: the self-test in a process of its own, and what is remembered of it.

A pass is remembered in the cache folder, by the versions and the code that it was about. It is believed only from a file that
this user wrote and nobody else can write. Every process of a launch may try: none waits for another.
"""

import hashlib
import json
import logging
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..files import schema
from ..files.atomic import write_json
from ..files.cache import ForeignCache, cache_folder, is_own

logger = logging.getLogger(__name__)

#: The user's word that an untested TRL may be tried.
ALLOWED_BY = "TRL_CPO_TRY_UNTESTED_TRL"
#: What a pass is about, beside the code of TRL, of this package, and of transformers' trainer.
PACKAGES = ("torch", "trl", "transformers", "accelerate", "peft", "datasets", "trl_cpo")
BLIND = "runs of several processes, GPU kernels, quantized models, or how text becomes tokens"

_FORMAT = 1
_PROGRAM = "trl_cpo.selftest"
_SECONDS = 600.0
_LARGEST = 100_000
# What a process needs to find its libraries. Anything else stays behind: devices, launchers, ports, tokens, reporting.
_KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "VIRTUAL_ENV")
_KEPT_GROUPS = ("LC_", "LD_", "DYLD_", "CONDA_", "TRITON_")


def tried() -> tuple[dict[str, list[str]], bool]:
    """The reasons against the installed TRL, by check (empty: it passed), and whether a remembered pass says so."""
    about = subject()
    file = _file(about)
    if file is not None and _remembered(file, about):
        return {}, True
    outcome = _run(about)
    if file is not None and not outcome["failed"]:
        _remember(file, outcome)
    return outcome["failed"], False


def _file(about: dict[str, Any]) -> Path | None:
    """Where a pass is remembered; None where nothing can be."""
    try:
        return cache_folder("selftest") / f"{_digest(about)}.json"
    except ForeignCache as error:
        logger.warning("The self-test runs, and is not remembered. %s", error)
    except OSError as error:
        logger.info("The self-test is not remembered: %s", error)
    return None


@cache
def subject() -> dict[str, Any]:
    """What a self-test is about: versions, and a digest of the code that it tests."""
    return {"python": sys.version.split()[0], "versions": _versions(), "code": _code()}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _code() -> str:
    """A digest of the code: a version built from a branch keeps its number while the code changes."""
    digest = hashlib.sha256()
    for file in _files():
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _files() -> Iterator[Path]:
    for package, pattern in (("trl", "**/*.py"), ("trl_cpo", "**/*.py"), ("transformers", "train*.py")):
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield from sorted(Path(folder).glob(pattern))


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _remembered(file: Path, about: dict[str, Any]) -> bool:
    """Whether a file says that the self-test passed for the same code, and can be believed."""
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not is_own(status, file.parent) or status.st_mode & stat.S_IWGRP:
            logger.warning("%s is not used: others can write it, or did. The self-test runs.", file)
            return False
        document = _document(os.read(descriptor, _LARGEST + 1))
    finally:
        os.close(descriptor)
    return document is not None and document["about"] == about and not document["failed"]


def _remember(file: Path, outcome: dict[str, Any]) -> None:
    try:
        write_json(file, outcome)
        file.chmod(0o600)
    except OSError as error:
        logger.info("The outcome of the self-test is not kept: %s", error)


def _document(content: bytes) -> dict[str, Any] | None:
    """The outcome of a self-test as it was written; None where it is not one."""
    try:
        document = json.loads(content) if len(content) <= _LARGEST else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or set(document) != {"format", "about", "failed", "seconds"}:
        return None
    failed = document["failed"]
    texts = isinstance(failed, dict) and all(
        isinstance(reasons, list) and reasons and all(isinstance(reason, str) for reason in reasons)
        for reasons in failed.values()
    )
    wrong = document["format"] != _FORMAT or not isinstance(document["about"], dict) or any(schema.faults(document))
    return None if wrong or not texts else document


def _run(about: dict[str, Any]) -> dict[str, Any]:
    """The outcome of the self-test in a process of its own."""

    def failed(reason: str) -> dict[str, Any]:
        return {"format": _FORMAT, "about": about, "failed": {"process": [reason]}, "seconds": None}

    with tempfile.TemporaryDirectory(prefix="trl_cpo_trial_") as folder:
        said = Path(folder) / "said.txt"
        try:
            with said.open("wb") as stream:
                done = subprocess.run(
                    [sys.executable, "-P", "-m", _PROGRAM, str(Path(folder) / "outcome.json")],
                    env=environment(folder),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=_SECONDS,
                    check=False,
                )
            outcome = _document((Path(folder) / "outcome.json").read_bytes())
        except subprocess.TimeoutExpired:
            return failed(f"it did not end within {_SECONDS:.0f} seconds")
        except FileNotFoundError:
            last = said.read_text("utf-8", "replace").strip().rpartition("\n")[2][:300]
            return failed(f"its process ended with exit code {done.returncode}: {last or 'it said nothing'}")
        except OSError as error:
            return failed(f"it could not be started: {error}")
    if outcome is None:
        return failed("its outcome cannot be read")
    if outcome["about"] != about:
        return failed(f"its process found other libraries than this one: {outcome['about']}, not {about}")
    return outcome


def environment(folder: str) -> dict[str, str]:
    """The variables of the self-test's process: no devices, no launcher, no network, caches in `folder`."""
    kept = {name: value for name, value in os.environ.items() if name.upper() in _KEPT or name.upper().startswith(_KEPT_GROUPS)}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return kept | {
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": folder,
        "TRL_CPO_CACHE": folder,
    }
