"""argparse with this project's errors: `UserError`s that offer the nearest name and end with where to look."""

import argparse
from collections.abc import Iterable

from .errors import UserError, nearest

#: Names that other tools and earlier versions use, and what they are called here.
ELSEWHERE = {
    "torch_dtype": "dtype",
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "max_seq_length": "max_length",
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "target_modules": "lora_target_modules",
}
#: Options of `accelerate launch`, which stand before `-m trl_cpo`.
ACCELERATES = (
    "config_file",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "mixed_precision",
    "multi_gpu",
    "use_deepspeed",
    "deepspeed_config_file",
    "zero_stage",
    "use_fsdp",
    "fsdp_version",
    "gpu_ids",
    "dynamo_backend",
)


def hint(unknown: str, known: Iterable[str]) -> str:
    """` Did you mean X?` for an unknown option or key: what other tools call so, whose it is, or the nearest name."""
    dashes, name, known = "--" * unknown.startswith("--"), unknown.lstrip("-").replace("-", "_"), list(known)
    if name in ACCELERATES:
        return f" It is accelerate's: accelerate launch --{name} ... -m trl_cpo train ..."
    here = dashes + ELSEWHERE.get(name, "")
    return f" Did you mean {here}?" if here in known else nearest(unknown, known)


class ClearErrors(argparse.ArgumentParser):
    """A mixin for an `ArgumentParser`: raises `UserError`s and allows no abbreviated options."""

    def __init__(self, *args, **kwargs):
        # An abbreviation that works today may become ambiguous when an option is added.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(action, f"{error.message}.{nearest(value, map(str, action.choices))}") from None

    def error(self, message):
        end = "" if message.endswith((".", "?", "!")) else "."
        raise UserError(f"{message}{end}\nAll options: {self.prog} --help")


class Parser(ClearErrors):
    """The parser of one command."""

    def parse_args(self, args=None, namespace=None):
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error("\n".join(unknown_options(unknown, option_strings(self))))
        return options


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """Every option of a parser and of its subparsers."""
    found: list[str] = []
    for action in parser._actions:
        found += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found += option_strings(inner)
    return found


def unknown_options(unknown: list[str], known: list[str]) -> list[str]:
    """One sentence for each unknown option, with the nearest known one.

    What follows an unknown option counts as its value and is not reported. If no unknown argument is an option,
    the first one is reported.
    """
    options = [arg.partition("=")[0] for arg in unknown if arg.startswith("--") or (arg.startswith("-") and not _number(arg))]
    if not options:
        return [f"unknown argument {unknown[0]}."]
    return [f"unknown option {option}.{hint(option, known)}" for option in dict.fromkeys(options)]


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
