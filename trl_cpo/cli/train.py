"""`trl-cpo train`: trains one run, from a recipe, options, or both."""

import argparse
import os
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from ..constraint_names import FORM_NAMES
from .errors import UserError, lost_process, user_errors
from .imports import fast_imports
from .needs import refuse_missing
from .output import patient_output
from .recipe_files import read_config

if TYPE_CHECKING:
    from ..run.arguments import RunConfig

HELP = "Train with a constraint on the preference gap, from a recipe or from TRL's options."
#: TRL parses the options of its DPOConfig, ModelConfig and ScriptArguments.
PASSES_ON = True

_FORMS = textwrap.fill(", ".join(FORM_NAMES), 88, subsequent_indent=33 * " ").replace("none", "none (plain DPO)", 1)
#: The most used options, so that --help answers without importing TRL; a test checks the names against TRL's.
_OFTEN = f"""\
most used options (--help-all lists all of TRL's DPOConfig, ModelConfig and ScriptArguments, and ours):
  --model_name_or_path M         hub name or folder, or 'demo' (the embedded SmolLM2-135M-Instruct)
  --dataset_name D               hub name, .jsonl[.gz], .json or .parquet file, folder, 'demo' or 'demo-answers'
  --output_dir DIR               by default outputs/<dataset>-<constraint>, numbered if taken
  --constraint C                 {_FORMS}
  --gamma G                      the preference gap to reach, >= 0, in nats (default: 0; 0.05 for means)
  --beta B                       DPO's beta (default: 0.1; 2.5 for means)
  --logps_reduction R            sum (nats per response) or mean (nats per token)
  --learning_rate LR             --num_train_epochs N, --max_steps N, --seed N
  --per_device_train_batch_size  --gradient_accumulation_steps N, --max_length N
  --use_peft                     LoRA; --lora_r N, --lora_alpha N, --lora_target_modules A B
  --load_in_4bit                 QLoRA, with --use_peft
  --precompute_ref_log_probs     score the reference once, before training
  --max_train_pairs N            --max_test_pairs N, --held_out FRACTION_OR_N
  --save_strategy steps          --save_steps N; resume with --resume_from_checkpoint latest
  --enable_jit_checkpoint        on SIGTERM, finish the step, write a checkpoint, exit with 143

  trl-cpo train --config demo                                        minutes on a CPU, no hub
  trl-cpo train --config demo --constraint none                      plain DPO beside it
  accelerate launch -m trl_cpo train --config hh-rlhf-lora --beta 0.2

The run's folder holds log.jsonl, metrics.json and pairs.json beside the model. Nothing is overwritten."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "trl-cpo train [--config RECIPE] [any TRL option, which overrides the recipe]"
    parser.epilog = _OFTEN
    parser.add_argument("--config", action="append", metavar="RECIPE", help="a YAML file, or a recipe's name (trl-cpo recipes)")
    parser.add_argument("--help-all", action="store_true", help="list every option (imports TRL: takes seconds)")


def command_line_names() -> set[str]:
    """The options that the short help names."""
    return set(re.findall(r"--[a-z][\w-]*", _OFTEN))


def run(options: argparse.Namespace) -> int:
    if len(options.config or []) > 1:
        raise UserError(
            "--config is given twice.\nGive one recipe and override its keys: trl-cpo train --config RECIPE --beta 0.2"
        )
    if options.help_all:
        with fast_imports():
            from .options import run_parser

        run_parser("trl-cpo train").print_help()
        return 0
    if not options.config and not options.passed_on:
        with fast_imports():
            from ..run.arguments import PairArguments, PolicyConfig, RunConfig
        from . import command_parser

        print(f"{command_parser('train').format_help()}", file=sys.stderr)
        raise UserError(
            f"nothing to train was named. By default it would be {PolicyConfig.model_name_or_path} on "
            f"{PairArguments.dataset_name}, downloaded from the hub, with constraint {RunConfig.constraint}, gamma "
            f"{RunConfig.gamma:g} and beta {RunConfig.beta:g}: name any of them to start.\n"
            "Minutes on a CPU, without a hub: trl-cpo train --config demo; the options: trl-cpo train --help"
        )
    config = options.config[0] if options.config else None
    refuse_missing(options.passed_on, {} if config is None else read_config(config))
    with fast_imports():
        from ..run.training import train
        from .options import parse_run

    parsed = parse_run(options.passed_on, config)

    with user_errors("All options: trl-cpo train --help"), patient_output():
        try:
            train(*parsed)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(_how_to_go_on(options, parsed[1])) from error
        except Exception as error:
            _refuse_disk(error, parsed[1])
            if lost_process(error):
                raise UserError(
                    "another process of this run has ended, so that this one cannot go on. The other one's message says "
                    "why, and what to do next."
                ) from error
            raise
    return 0


def _how_to_go_on(options: argparse.Namespace, args: "RunConfig") -> str:
    """What is left of an interrupted run, and the command that goes on with it; empty on all processes but the first."""
    from ..run.training import last_checkpoint

    if int(os.environ.get("RANK", "0")) or not args.output_dir or not Path(args.output_dir).is_dir():
        return ""
    newest = last_checkpoint(args.output_dir)
    if newest is None:
        done = "No checkpoint was written (--save_strategy steps --save_steps N writes them): this starts from the beginning"
    else:
        done = f"{newest} is the last checkpoint. To go on from there"
    words = [] if options.config is None else ["--config", options.config[0]]
    words += _without(options.passed_on, ("output_dir", "resume_from_checkpoint"))
    words += ["--output_dir", str(args.output_dir), "--resume_from_checkpoint", "latest"]
    start = "accelerate launch … -m trl_cpo train" if "RANK" in os.environ else "trl-cpo train"
    return f"{done}:\n{start} {shlex.join(words)}"


def _without(words: list[str], names: tuple[str, ...]) -> list[str]:
    """A command line without some options and their values."""
    kept, skips = [], False
    for word in words:
        if word.startswith("--"):
            name, equals, _ = word[2:].partition("=")
            named = name.replace("-", "_") in names
            skips = named and not equals
            if named:
                continue
        elif skips:
            skips = False
            continue
        kept.append(word)
    return kept


def _refuse_disk(error: Exception, args: "RunConfig") -> None:
    """Raises `UserError` where it was the disk that ended the run."""
    from ..files.disk import CannotWrite, left_in, refusal

    why = refusal(error)
    if why is None or isinstance(error, UserError):
        return
    left, advice = "", "Write elsewhere: trl-cpo train … --output_dir FOLDER"
    if not isinstance(error, CannotWrite) and args.output_dir:
        names = left_in(Path(args.output_dir))
        left = f" Left in {args.output_dir}: {', '.join(names)}." if names else " Nothing is left of the run."
        if names:
            advice = f"With room again, go on: trl-cpo train … --output_dir {args.output_dir} --resume_from_checkpoint latest"
    raise UserError(f"{why}{left}\n{advice}") from error
