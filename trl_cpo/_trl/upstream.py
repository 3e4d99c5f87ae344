"""Which TRL this package works with."""

from packaging.specifiers import SpecifierSet
from packaging.version import Version
from trl import __version__ as trl_version

#: The versions of TRL whose DPOTrainer the identity tests were run against.
SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")


def check_trl(version: str = trl_version) -> None:
    """Raises `ImportError` if the installed TRL is not one that this package was tested with."""
    if not SUPPORTED_TRL.contains(Version(version).base_version):
        raise ImportError(
            f"trl-cpo works with TRL {SUPPORTED_TRL}, and TRL {version} is installed. It builds on the inside of "
            "DPOTrainer, which changes between releases, so other versions could train on wrong numbers without a "
            f"sign of it. Install a supported one: pip install 'trl{SUPPORTED_TRL}'."
        )
