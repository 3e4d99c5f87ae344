"""One run: pairs and model in; a trained model, its log, its metrics and its held-out pairs out."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.models import read_config, source_of
from ..files.run_files import LOG, METRICS
from .data import load_sets, say_reports
from .decided import Decided
from .finished import Finished

if TYPE_CHECKING:
    from .arguments import PairArguments, PolicyConfig, RunConfig


def checkpoint_of(args: "RunConfig") -> str | None:
    """The checkpoint to go on from: the folder given, or with `latest` the newest whole one that all processes see.

    None to start from the beginning: nothing was asked for, or `latest` of a run that was killed before its first one.

    Raises:
        FileNotFoundError: there is no run to go on with in the output folder.
        CheckpointError: the checkpoint given is not whole.
    """
    from ..engine.resume.checkpoints import fault_of, is_fresh, refusal
    from ..engine.resume.resumption import newest_everywhere

    given = args.resume_from_checkpoint
    if given is None or str(given).lower() in ("false", "none", ""):
        return None
    if str(given).lower() not in ("latest", "true"):
        fault = fault_of(given)
        if fault is not None:
            raise refusal(given, fault)
        return given
    found = newest_everywhere(args.output_dir) if args.chose_output_dir else None
    if found is None and not (args.chose_output_dir and is_fresh(args.output_dir)):
        for damaged in sorted(Path(args.output_dir).glob("checkpoint-*")) if args.chose_output_dir else ():
            raise refusal(damaged, fault_of(damaged))
        raise FileNotFoundError(
            f"--resume_from_checkpoint {given}: there is no whole checkpoint-* folder in {args.output_dir}. Give the "
            "--output_dir of the run to go on with (checkpoints are written with --save_strategy steps), or a checkpoint's "
            "folder."
        )
    return None if found is None else str(found)


def last_checkpoint(output_dir: str) -> Path | None:
    """The checkpoint that an interrupted run would go on from, as this process sees it; None where it has written none."""
    from ..engine.resume.checkpoints import newest_checkpoint

    return newest_checkpoint(output_dir)


def train(options: "PairArguments", args: "RunConfig", policy: "PolicyConfig") -> Path:
    """Trains, evaluates on the held-out pairs before and after, and gives the run's folder.

    The folder holds the model, log.jsonl, metrics.json and pairs.json (docs/cli.md describes them). Progress goes to
    stdout, from the first process alone.

    Raises:
        FileExistsError: the folder asked for holds files already, and no checkpoint of it was asked for.
        FileNotFoundError: there is no checkpoint to go on from.
        CheckpointError: the checkpoint to go on from is not whole.
        ValueError: there is no such model.
        SourceError: the pairs cannot be read or used.
        DemoModelError: the embedded model is not installed.
    """
    with ExitStack() as held:
        return _train(options, args, policy, held)


def _claim(options: "PairArguments", args: "RunConfig", held: ExitStack, is_main: bool) -> None:
    """Has the main process claim the output folder until `held` ends, and all processes know it, or fail with it.

    Another process that chose for itself would see the folder taken. From here on the same command with
    --resume_from_checkpoint latest goes on with this run, whenever it is killed; but a mistake in the options leaves no
    folder behind.
    """
    from accelerate.utils import broadcast_object_list

    from ..files.claims import is_claimed
    from ..files.outputs import claimed, claimed_next, refuse_taken

    told: list[Any] = [None, None]
    if is_main:
        name = Path(options.dataset_name).name.split(".")[0] or "pairs"  # of "." and ".hidden" nothing is left
        asked = claimed(args.output_dir) if args.chose_output_dir else claimed_next(f"outputs/{name}-{args.constraint}")
        try:
            # Not even a claim is written into a folder that is somebody else's.
            if args.chose_output_dir and not args.resume_from_checkpoint and not is_claimed(args.output_dir):
                refuse_taken(args.output_dir)
            told[0] = str(held.enter_context(asked))
        except OSError as error:
            told[1] = error
    broadcast_object_list(told, from_process=0)
    args.output_dir, fault = told
    if fault is not None:
        raise fault


def _train(options: "PairArguments", args: "RunConfig", policy: "PolicyConfig", held: ExitStack) -> Path:
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from transformers import PrinterCallback, ProgressCallback
    from trl import get_peft_config, get_quantization_config

    from ..engine.resume.checkpoints import clean_up, is_fresh, read_state
    from ..files.outputs import refuse_taken
    from ..logs.run_log import RunLog
    from ..trainer import CPOConstrainedTrainer

    state, started = PartialState(), time.monotonic()

    def say(text: str) -> None:
        if state.is_main_process:
            print(text, flush=True)

    there = [args.chose_output_dir and Path(args.output_dir).is_dir()]
    broadcast_object_list(there, from_process=0)
    if args.resume_from_checkpoint and not there[0]:
        checkpoint_of(args)  # nothing to go on with is said before a folder is made
    _claim(options, args, held, state.is_main_process)
    if args.chose_output_dir and args.resume_from_checkpoint and state.is_local_main_process:
        clean_up(args.output_dir)
    state.wait_for_everyone()
    checkpoint = checkpoint_of(args)
    begun = args.resume_from_checkpoint and args.chose_output_dir and is_fresh(args.output_dir)
    if args.chose_output_dir and checkpoint is None and not begun:
        refuse_taken(args.output_dir)
    state.wait_for_everyone()
    output_dir = Path(args.output_dir)
    if begun and checkpoint is None:
        say(f"{output_dir} holds no whole checkpoint yet: starting from the beginning")

    say(f"[1/4] Reading pairs: {options.dataset_name}")
    with state.main_process_first():
        train_set, test_set, reports, held_out, learned = load_sets(options)
    if not options.dataset_streaming:
        say_reports(reports, say)
    if held_out is not None:
        say(f"      no test split: held {held_out} pairs out")
    left_out = learned["trained_on_left_out"]
    if left_out:
        say(f"      left {left_out} evaluation pairs out, which are trained on too")

    say(f"[2/4] Loading the model: {policy.model_name_or_path}")
    with state.main_process_first():
        model = source_of(policy.model_name_or_path)
    read_config(
        model,
        revision=policy.model_revision,
        trust_remote_code=args.trust_remote_code,
        option="--model_name_or_path",
    )
    loading = dict(revision=policy.model_revision, attn_implementation=policy.attn_implementation, dtype=policy.dtype)
    args.model_init_kwargs = {**loading, **(args.model_init_kwargs or {})}
    args.eval_on_start = checkpoint is None
    kept = args.keep((read_state(checkpoint) or {}).get("settings", {})) if checkpoint is not None else []
    if kept:
        say(f"      {' and '.join(kept)}, as in {checkpoint}: not given here")
    run_log = RunLog(output_dir / LOG)
    trainer = CPOConstrainedTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=test_set,
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
    decided = Decided(trainer, test_set, say)
    if checkpoint is None:
        decided.count_start()
    trainer.train(resume_from_checkpoint=checkpoint)
    starts = [r for r in trainer.state.log_history if r["step"] == 0 and "eval_cpo/gap" in r]
    before = starts[0] if starts else None
    after = trainer.evaluate()
    decisions = decided.document()
    if options.dataset_streaming:
        say_reports(reports, say)

    say(f"[4/4] Saving to {output_dir}")
    trainer.save_model(str(output_dir))
    trainer.create_model_card(model_name=output_dir.name)
    if state.is_main_process:
        finished = Finished(
            options,
            args,
            policy,
            trainer,
            before,
            after,
            decisions=decisions,
            data=reports,
            trained_on=trained_on,
            learned=learned,
            split=options.dataset_test_split if held_out is None else "held out",
        )
        summary = finished.write(output_dir, time.monotonic() - started)
        say(
            f"\n{summary}\n\nmodel    {output_dir}\nmetrics  {output_dir / METRICS}\nlog      {run_log.file}\n"
            f"took {time.monotonic() - started:.0f} s"
        )
    trainer.end()
    return output_dir
