"""The sdist and the wheel, as setuptools builds them from what git tracks: complete, and an sdist's tests run."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser

import pytest

from helpers.checkout import tracked_files
from helpers.paths import ROOT

BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # setuptools changes sys.argv
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""
#: Fast tests of several folders, some of which read files outside the package.
SOME_TESTS = ("test_intervals.py", "theory/test_region.py", "theory/test_bounds.py", "project/test_cluster_configs.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The tracked files, and the folder with the sdist and the wheel made of a copy of them."""
    files, folder = tracked_files(), tmp_path_factory.mktemp("built")
    for name in files:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=folder / "source", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Deprecat" not in done.stderr
    return files, folder


def unpacked(folder):
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (tree,) = (folder / "unpacked").iterdir()
    return tree


def test_the_sdist_holds_every_tracked_file(built):
    files, folder = built
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert [name for name in files if name not in held] == [], "add them to MANIFEST.in"
    assert not [name for name in held if "__pycache__" in name]


def test_the_wheel_holds_the_package_whole_and_nothing_else(built):
    files, folder = built
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        (metadata,) = [file.read(name).decode() for name in file.namelist() if name.endswith(".dist-info/METADATA")]
    assert held == {name for name in files if name.startswith("trl_cpo/")}, "see package-data in pyproject.toml"
    assert "trl_cpo/py.typed" in held
    fields = Parser().parsestr(metadata)
    assert fields["License-Expression"] == "Apache-2.0" and fields["License-File"] == "LICENSE"


@pytest.mark.slow
def test_tests_run_from_the_sdist(built):
    tree = unpacked(built[1])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{name}" for name in SOME_TESTS)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
