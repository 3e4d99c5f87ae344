"""Prints the installed versions of what trl-cpo rests on, in one line: for the record in CONTRIBUTING.md."""

from importlib.metadata import PackageNotFoundError, version

NAMES = "torch trl transformers datasets accelerate peft scipy numpy bitsandbytes deepspeed".split()


def installed() -> str:
    """`name version`, of those that are installed."""
    found = []
    for name in NAMES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    print(installed())
