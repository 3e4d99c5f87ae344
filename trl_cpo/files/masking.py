"""Secrets in settings: masked wherever settings are written or shown."""

import re
from typing import Any

MASK = "<masked>"
_SECRET = re.compile(
    r"(?:.*_)?(?:token|secret|password|passwd|api_?key|access_?key|private_?key|credentials?|auth|authorization)", re.I
)
# Names of a tokenizer's tokens, and what transformers itself writes for a secret.
_HARMLESS = re.compile(r"(?:pad|eos|bos|unk|sep|cls|mask|image|video|audio)_token", re.I)
_IS_MASKED = re.compile(r"<[A-Z_]+>")
# Secrets that show themselves: of the hub, of other services; the password in an address.
_KNOWN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16})")
_IN_ADDRESS = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")


def masked(settings: Any, name: str = "") -> Any:
    """`settings` with every secret in it replaced by `MASK`, however deep it lies; what is given stays as it is.

    A text is a secret by its name (`token`, `hub_token`, `api_key`, `password`, …), or by what it looks like.
    """
    if isinstance(settings, dict):
        return {key: masked(inner, name if isinstance(key, int) else str(key)) for key, inner in settings.items()}
    if isinstance(settings, (list, tuple)):
        return type(settings)(masked(inner, name) for inner in settings) if type(settings) in (list, tuple) else settings
    if not isinstance(settings, str):
        return settings
    if settings and _SECRET.fullmatch(name.replace("-", "_")) and not _HARMLESS.fullmatch(name):
        return settings if _IS_MASKED.fullmatch(settings) else MASK
    return _IN_ADDRESS.sub(rf"\1{MASK}@", _KNOWN.sub(MASK, settings))
