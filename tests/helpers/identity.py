"""The installed DPOTrainer and ours train the same; losses, gradients, metrics and weights are compared with `==`."""

from types import SimpleNamespace

import torch
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

from helpers.comparisons import without_timings
from helpers.tiny import training_options


class GradientRecorder(TrainerCallback):
    """Keeps a copy of every gradient before each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.steps.append(grads)


def run(trainer_class, config_class, output_dir, build, options, config_extra):
    torch.manual_seed(0)
    args = config_class(**training_options(output_dir, **options), **config_extra)
    recorder = GradientRecorder()
    trainer = trainer_class(args=args, callbacks=[recorder], **build())
    trainer.train()
    evaluated = trainer.evaluate() if trainer.eval_dataset is not None else {}
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return SimpleNamespace(
        logs=trainer.state.log_history, gradients=recorder.steps, weights=weights, evaluated=evaluated, trainer=trainer
    )


def comparable(record: dict) -> dict:
    return {k: v for k, v in without_timings(record).items() if "cpo/" not in k}


def assert_same_run(theirs, ours):
    assert len(theirs.logs) == len(ours.logs) > 0
    for a, b in zip(theirs.logs, ours.logs, strict=True):
        assert comparable(a) == comparable(b)
    assert comparable(theirs.evaluated) == comparable(ours.evaluated)
    assert len(theirs.gradients) == len(ours.gradients) > 0
    for a, b in zip(theirs.gradients, ours.gradients, strict=True):
        assert a.keys() == b.keys() and a
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert theirs.weights.keys() == ours.weights.keys()
    assert all(torch.equal(theirs.weights[name], ours.weights[name]) for name in theirs.weights)
    # The run must have moved something, or equality would say little.
    assert any(torch.count_nonzero(g) for g in theirs.gradients[-1].values())


def check(tmp_path, build, options=None, ours_only=None, theirs_only=None):
    options = options or {}
    theirs = run(DPOTrainer, DPOConfig, tmp_path / "theirs", build, options, theirs_only or {})
    ours = run(
        CPOConstrainedTrainer,
        CPOConstrainedConfig,
        tmp_path / "ours",
        build,
        options,
        {"constraint": "none", **(ours_only or {})},
    )
    assert_same_run(theirs, ours)
    return theirs, ours
