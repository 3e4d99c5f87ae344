"""What git says about the tree under test."""

import subprocess

import pytest

from helpers.paths import ROOT


def tracked_files() -> list[str]:
    """Every file that git tracks, or will once it is added; skips the test where there is no git checkout, as in an sdist."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    return [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
