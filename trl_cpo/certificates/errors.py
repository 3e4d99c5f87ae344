"""What goes wrong with certificates, and reading JSON that cannot be read in two ways."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from ..files.schema import faults, is_number

__all__ = ["CertificateError", "is_number", "read_json", "refuse_faults"]


class CertificateError(ValueError):
    """A certificate cannot be made or read: the message says what was got, what is needed, and what to do next."""


def refuse_faults(document: Any, where: str) -> None:
    """Raises `CertificateError` where a number of the document cannot be what it is said to be."""
    wrong = list(islice(faults(document), 4))
    if wrong:
        more = "; …" if len(wrong) > 3 else ""
        raise CertificateError(f"{where} holds what cannot be: {'; '.join(wrong[:3])}{more}. It was changed, or is damaged.")


def read_json(file: str | Path) -> Any:
    """What a JSON file holds. Raises `CertificateError` where it holds no JSON, NaN, an infinity, or a key twice."""

    def once(items):
        # A reader that takes the first and one that takes the last would see two documents.
        if len(dict(items)) != len(items):
            raise ValueError("an object names a key twice")
        return dict(items)

    def never(constant):
        raise ValueError(f"it holds {constant}, which is no number")

    try:
        return json.loads(Path(file).read_text(encoding="utf-8"), object_pairs_hook=once, parse_constant=never)
    except OSError as error:
        raise CertificateError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CertificateError(f"{file} is not the JSON it should be: {error}.") from error
