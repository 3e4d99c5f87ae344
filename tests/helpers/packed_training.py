"""Short trainings of test_packed_parallel.py in a process that was launched, which say whether every forward was packed."""

import dataclasses
import gc
import logging
import os
from contextlib import nullcontext
from unittest.mock import patch

from accelerate.state import AcceleratorState
from datasets import load_dataset
from transformers import set_seed

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine.forward import PackedPairForward, segments
from trl_cpo.engine.forward.backends import BACK_ENDS
from trl_cpo.engine.forward.probing import probe

from helpers.parallel_runs import forget_the_launchers_choices, nf4, wrapping
from helpers.tiny import make_lora, make_tokenizer, training_options

# Steps of plain gradient descent without clipping: its weights tell the size of the gradients, which Adam hides.
OPTIONS = dict(optim="sgd", learning_rate=0.02, max_grad_norm=0.0, constraint="clip", gamma=0.3)


def attend_in_first_layer_only(module, *args, attend=segments.segment_attention, **kwargs):
    """A model that fails on tables of segments, and only in the middle of its forward."""
    if module.layer_idx and segments.is_segment_table(args[3]):
        raise NotImplementedError("this layer attends in another way")
    return attend(module, *args, **kwargs)


class Differing:
    """In place of the probe's measure: in its first use it finds no effect of wrong positions, as no other process does."""

    def __init__(self):
        self.measure, self.uses = probe.mean_gap, 0

    def __call__(self, *args):
        self.uses += 1
        return 0.0 if self.uses == 2 else self.measure(*args)


class Calls(logging.Handler):
    """What the packed forward was called with and what was said about it, while entered."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.packed, self.padded, self.lines = 0, 0, []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        call = self._call = PackedPairForward.__call__

        def counted(forward, **inputs):
            outputs = call(forward, **inputs)
            self.packed += forward.last_plan is not None
            self.padded += forward.last_plan is None
            return outputs

        PackedPairForward.__call__ = counted
        logger = logging.getLogger("trl_cpo.engine.forward")
        self._level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, *_):
        PackedPairForward.__call__ = self._call
        logger = logging.getLogger("trl_cpo.engine.forward")
        logger.setLevel(self._level)
        logger.removeHandler(self)


def train(job: dict, run: dict) -> dict:
    """One training, and an evaluation after it.

    Args:
        job: folder; model; data, files by split; batch, of a process.
        run: name; packed; lora; nf4; segments_fail; refused_in, a process; evaluate; options of the configuration;
            accumulate, how many micro-batches make a step.
    """
    place = os.path.join(job["folder"], f"{run['name']}-{'packed' if run['packed'] else 'padded'}")
    # Read from files with a cache of its own, beside which the tokenized set is kept.
    data = load_dataset("json", data_files=job["data"], cache_dir=os.path.join(place, "cache"))
    accumulate = run.get("accumulate", 1)
    options = dict(
        OPTIONS,
        per_device_train_batch_size=job["batch"] // accumulate,
        per_device_eval_batch_size=job["batch"],
        gradient_accumulation_steps=accumulate,
        prefix_sharing=run["packed"],
        **run.get("options", {}),
    )
    if "deepspeed" in options:
        forget_the_launchers_choices()
    AcceleratorState._reset_state()
    set_seed(0)
    broken = nullcontext()
    if run.get("segments_fail"):
        failing = dataclasses.replace(BACK_ENDS["segments"], attend=attend_in_first_layer_only)
        broken = patch.dict(BACK_ENDS, segments=failing)
    elif run.get("refused_in") == int(os.environ.get("RANK", 0)):
        broken = patch.object(probe, "mean_gap", Differing())
    with Calls() as calls, broken:
        trainer = CPOConstrainedTrainer(
            model=job["model"],
            args=CPOConstrainedConfig(**training_options(place, **options)),
            processing_class=make_tokenizer(),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            quantization_config=nf4() if run.get("nf4") else None,
            peft_config=make_lora() if run.get("lora") else None,
        )
        trainer.train()
        seen = wrapping(trainer)
        evaluated = trainer.evaluate() if run.get("evaluate", True) else {}
    trainer.save_model(os.path.join(place, "trained"))
    gc.collect()
    steps = [record for record in trainer.state.log_history if "loss" in record]
    return {
        "logs": [{key: value for key, value in step.items() if isinstance(value, float)} for step in steps],
        # Over pairs: the other numbers of an evaluation count the pairs that fill up the last batch.
        "evaluated": {key: value for key, value in evaluated.items() if "cpo/" in key},
        "trained": os.path.join(place, "trained"),
        "attention": [verdict.attention for verdict in trainer._sharing._known.values() if verdict.ok],
        "packed_calls": calls.packed,
        "padded_calls": calls.padded,
        "lines": calls.lines,
        **seen,
    }
