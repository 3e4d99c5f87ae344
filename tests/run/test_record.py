"""The versions that a run records."""

import importlib.metadata

import trl_cpo
from trl_cpo.run.record import versions


def test_a_checkout_that_was_never_installed_has_a_version_too(monkeypatch):
    """It was looked up among installed packages, at the end of a training, which then failed."""
    installed = importlib.metadata.version

    def version(name):
        if name == "trl-cpo":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = versions()
    assert found["trl-cpo"] == trl_cpo.__version__ and found["trl"] == installed("trl")
    assert list(found)[:3] == ["python", "trl-cpo", "trl"]
