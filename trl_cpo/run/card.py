"""The model card: what the run was, what it reached on held-out pairs, and at what price."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Where the section begins; what follows it is written anew.
_HEADING = "## Held-out results"


def add_results(card: Path, *, settings: Mapping[str, Any], table: str, sentence: str | None) -> None:
    """Adds a section to a model card that TRL wrote, before its citations.

    Args:
        card: README.md of the run.
        settings: by name, what the run was.
        table: the summary, as text.
        sentence: gain and price in words, if there is a price.
    """
    text = card.read_text(encoding="utf-8")
    # TRL names neither a base model that is a folder, nor a model that is on no hub.
    text = text.replace("[None](https://huggingface.co/None)", f"`{settings['base model']}`")
    text = text.replace('model="None"', f'model="{card.parent.name}"')
    shown = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    section = f"{_HEADING}\n\n| setting | value |\n|---|---|\n{shown}\n\n```text\n{table}\n```\n"
    if sentence:
        section += f"\n{sentence}\n"
    before, heading, after = text.partition("## Citations")
    card.write_text(f"{before.rstrip()}\n\n{section}\n{heading}{after}", encoding="utf-8")
