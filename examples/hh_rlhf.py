"""
DPO with a constraint on the preference gap, on HH-RLHF or any set of preference pairs.

# HH-RLHF and a small instruct model, by their hub names; full fine-tuning
accelerate launch examples/hh_rlhf.py

# The same with LoRA, the reference computed once, and other knobs
accelerate launch examples/hh_rlhf.py --use_peft --learning_rate 1e-5 --precompute_ref_log_probs \
    --per_device_train_batch_size 8 --max_length 512 --constraint softplus --gamma 1.0

# Plain DPO, to set beside it
accelerate launch examples/hh_rlhf.py --constraint none

# The embedded model and pairs: no hub, no GPU, minutes
accelerate launch examples/hh_rlhf.py --config examples/demo.yaml

Pairs may be a hub name, a local .jsonl[.gz], .json or .parquet file, or a folder (--dataset_name). Every option of
TRL's DPOConfig, ModelConfig and ScriptArguments is an option here; unknown ones are refused.
"""

import json
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from trl import ModelConfig, ScriptArguments, TrlParser

from trl_cpo import CPOConstrainedConfig

DEMO_MODEL = "demo"


@dataclass
class PairArguments(ScriptArguments):
    """Which pairs to train on."""

    dataset_name: str = field(
        default="Anthropic/hh-rlhf",
        metadata={"help": "Hub name, local .jsonl[.gz], .json or .parquet file, folder, or 'demo' (embedded pairs)."},
    )
    dataset_data_dir: str | None = field(
        default=None, metadata={"help": "Folder inside the dataset, such as harmless-base in HH-RLHF."}
    )
    held_out: float = field(
        default=0.1,
        metadata={"help": "Where the dataset has but one split: the fraction (below 1) or number of pairs held out."},
    )
    max_train_pairs: int | None = field(default=None, metadata={"help": "Train on the first so many pairs only."})
    max_test_pairs: int | None = field(default=1000, metadata={"help": "Evaluate on the first so many pairs only."})


@dataclass
class RunConfig(CPOConstrainedConfig):
    """CPOConstrainedConfig with this script's defaults."""

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where everything goes; by default outputs/<dataset>-<constraint>, numbered if taken."},
    )
    constraint: str = field(default="clip", metadata=CPOConstrainedConfig.__dataclass_fields__["constraint"].metadata)
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training pairs."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two logs."})

    def __post_init__(self):
        self.chose_output_dir = self.output_dir is not None
        super().__post_init__()


@dataclass
class PolicyConfig(ModelConfig):
    """ModelConfig with this script's default model."""

    model_name_or_path: str | None = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        metadata={"help": "Hub name or folder, or 'demo' (the embedded SmolLM2-135M-Instruct)."},
    )


def load_sets(options: PairArguments):
    """Training and held-out pairs as messages, the reports on rows that were refused, and how many were held out."""
    from trl_cpo.sources import NoSuchSplit, hold_out, load_pairs, to_conversational

    def load(split):
        return load_pairs(
            options.dataset_name, split, config=options.dataset_config, data_dir=options.dataset_data_dir,
            streaming=options.dataset_streaming,
        )  # fmt: skip

    def first(pairs, count):
        return pairs if count is None else pairs.take(min(count, len(pairs)) if hasattr(pairs, "__len__") else count)

    reports, held_out = {}, None
    train, reports["train"] = to_conversational(load(options.dataset_train_split))
    try:
        test = load(options.dataset_test_split)
    except NoSuchSplit as error:
        # Where there is another split, or one was asked for by name, a part of the training pairs is not what was meant.
        asked = options.dataset_test_split != PairArguments.dataset_test_split
        if asked or error.known != [options.dataset_train_split]:
            raise
        count = options.held_out if options.held_out < 1 else int(options.held_out)
        train, test = hold_out(train, count, seed=0)
        held_out = len(test)
    else:
        test, reports["test"] = to_conversational(test)
    return first(train, options.max_train_pairs), first(test, options.max_test_pairs), reports, held_out


def checkpoint_of(args: "RunConfig") -> str | None:
    """The checkpoint to go on from: the folder given, or with `latest` the newest one in the output folder."""
    from transformers.trainer_utils import get_last_checkpoint

    given = args.resume_from_checkpoint
    if given is None or str(given).lower() in ("false", "none", ""):
        return None
    if str(given).lower() not in ("latest", "true"):
        return given
    found = get_last_checkpoint(args.output_dir) if args.chose_output_dir and Path(args.output_dir).is_dir() else None
    if found is None:
        raise FileNotFoundError(
            f"--resume_from_checkpoint {given}: there is no checkpoint-* folder in {args.output_dir}. Give the --output_dir "
            "of the run to go on with (checkpoints are written with --save_strategy steps), or a checkpoint's folder."
        )
    return found


def main(options: PairArguments, args: RunConfig, policy: PolicyConfig) -> None:
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from transformers import PrinterCallback, ProgressCallback
    from trl import get_peft_config, get_quantization_config

    from trl_cpo import CPOConstrainedTrainer
    from trl_cpo.outputs import next_free, refuse_taken
    from trl_cpo.progress import RunLog
    from trl_cpo.summary import before_after

    state, started = PartialState(), time.time()

    def say(text: str) -> None:
        if state.is_main_process:
            print(text, flush=True)

    # One process chooses the folder: another one that looked a moment later would see it taken.
    if not args.chose_output_dir:
        name = Path(options.dataset_name).name.split(".")[0]
        chosen = [str(next_free(f"outputs/{name}-{args.constraint}"))]
        broadcast_object_list(chosen, from_process=0)
        args.output_dir = chosen[0]
    checkpoint = checkpoint_of(args)
    if args.chose_output_dir and checkpoint is None:
        refuse_taken(args.output_dir)
    state.wait_for_everyone()
    output_dir = Path(args.output_dir)

    say(f"[1/4] Reading pairs: {options.dataset_name}")
    with state.main_process_first():
        train, test, reports, held_out = load_sets(options)
    if not options.dataset_streaming:
        say_reports(reports, say)
    if held_out is not None:
        say(f"      no test split: held {held_out} of {held_out + len(train)} pairs out")

    say(f"[2/4] Loading the model: {policy.model_name_or_path}")
    model = policy.model_name_or_path
    if model == DEMO_MODEL:
        from trl_cpo.demo.model import demo_model_folder

        with state.main_process_first():
            model = str(demo_model_folder())
    loading = dict(revision=policy.model_revision, attn_implementation=policy.attn_implementation, dtype=policy.dtype)
    args.model_init_kwargs = {**loading, **(args.model_init_kwargs or {})}
    args.eval_on_start = checkpoint is None
    run_log = RunLog(output_dir / "log.jsonl")
    trainer = CPOConstrainedTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        quantization_config=get_quantization_config(policy),
        peft_config=get_peft_config(policy),
        callbacks=[run_log],
    )
    if options.ignore_bias_buffers:
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    # RunLog prints one line where these print every number; the numbers are in the log.
    trainer.remove_callback(PrinterCallback)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressCallback):
            callback.on_log = lambda *_, **__: None

    trained_on = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else "streamed"
    say(f"[3/4] Training on {trained_on} pairs with constraint {args.constraint}; held-out pairs before and after")
    trainer.train(resume_from_checkpoint=checkpoint)
    starts = [r for r in trainer.state.log_history if r["step"] == 0 and "eval_cpo/gap" in r]
    before = starts[0] if starts else None
    after = trainer.evaluate()
    evaluated = after["eval_cpo/pairs"]
    if options.dataset_streaming:
        say_reports(reports, say)

    say(f"[4/4] Saving to {output_dir}")
    trainer.save_model(str(output_dir))
    trainer.create_model_card(model_name=output_dir.name)
    if state.is_main_process:
        record = {
            "held_out_pairs": evaluated,
            "before": before,
            "after": after,
            "seconds": round(time.time() - started, 1),
            "data": {split: report.to_dict() for split, report in reports.items() if report is not None},
            "pairs": {"dataset_name": options.dataset_name, "trained_on": trained_on},
            "model": policy.model_name_or_path,
            "seed": args.seed,
            "versions": versions(),
            "config": args.to_dict(),
        }
        (output_dir / "metrics.json").write_text(json.dumps(record, indent=1, default=str, ensure_ascii=False) + "\n")
        table = before_after(
            before, after, pairs=evaluated, gamma=args.gamma, reduction=args.logps_reduction, constraint=args.constraint
        )
        say(
            f"\n{table}\n\nmodel    {output_dir}\nmetrics  {output_dir / 'metrics.json'}\nlog      {run_log.file}\n"
            f"took {time.time() - started:.0f} s"
        )
    trainer.end()


def say_reports(reports, say) -> None:
    """Rows kept and refused, by split; a streamed split's report is whole once it has been read."""
    for split, report in reports.items():
        if report is not None:
            say(f"      {split}: {report}".replace("\n", "\n      "))


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    from importlib.metadata import version

    names = ("trl-cpo", "trl", "transformers", "torch", "peft", "accelerate", "datasets")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


if __name__ == "__main__":
    from trl_cpo.demo.model import DemoModelError
    from trl_cpo.sources import SourceError

    parser, name = TrlParser((PairArguments, RunConfig, PolicyConfig)), Path(sys.argv[0]).name
    try:
        parsed = parser.parse_args_and_config()
    except ValueError as error:
        sys.exit(f"{name}: {error}")
    try:
        main(*parsed)
    except (SourceError, DemoModelError, FileExistsError, FileNotFoundError) as error:
        sys.exit(f"{name}: {error}")
