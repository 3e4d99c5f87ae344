"""What a pair is by its content, to tell which pairs were trained on."""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

#: Of a digest, in hexadecimal digits.
WIDTH = 16
_COLUMN = "_trl_cpo_digest"


def pair_digest(pair: dict[str, Any]) -> str:
    """`WIDTH` digits that stand for a pair's prompt and answers, whatever other columns it has."""
    content = {column: told(pair.get(column)) for column in ("prompt", "chosen", "rejected")}
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=WIDTH // 2).hexdigest()


def told(value: Any) -> Any:
    """Text or messages without the nulls that stand where some rows lack a field."""
    if isinstance(value, dict):
        return {key: told(inner) for key, inner in value.items() if inner is not None}
    return [told(inner) for inner in value] if isinstance(value, list) else value


def pair_digests(pairs: "Dataset") -> list[str]:
    """The digest of each pair, in order."""
    columns = [column for column in ("prompt", "chosen", "rejected") if column in pairs.column_names]
    digested = pairs.select_columns(columns).map(lambda pair: {_COLUMN: pair_digest(pair)}, remove_columns=columns)
    return digested[_COLUMN][:]


def without(pairs: "Dataset", trained: Iterable[str]) -> "Dataset":
    """The pairs whose digests are not among `trained`."""
    known = set(trained)
    kept = [number for number, digest in enumerate(pair_digests(pairs)) if digest not in known]
    return pairs if len(kept) == len(pairs) else pairs.select(kept)


def digests_of(text: Any) -> set[str]:
    """The digests in a run's record, where they are one text; empty if it holds none."""
    text = text if isinstance(text, str) else ""
    return {text[at : at + WIDTH] for at in range(0, len(text), WIDTH)}


def split_names(split: str) -> set[str]:
    """The splits that a sum of slices, such as `train[:10%]+test`, is taken from."""
    return {part.partition("[")[0].strip() for part in split.split("+")}
