"""The checks of the self-test. Each gives the reasons against the installed TRL, in words; none: it passed."""

import math
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from .._trl.upstream import missing_upstream
from ..config import CPOConstrainedConfig
from ..trainer import CPOConstrainedTrainer
from . import by_hand, materials

BETA, GAMMA, WEIGHT, RATE = 0.3, 0.5, 0.7, 0.05
PAIRS, HELD_OUT = materials.rows(4, seed=1), materials.rows(3, seed=2)
#: Of a formula in float64 and a run in float32: relative, and absolute beside values of about 1.
CLOSE = {"rel_tol": 3e-4, "abs_tol": 3e-4}
# Means of micro-batches, which differ from the mean over their tokens.
_BY_TOKEN = ("logits/", "entropy", "mean_token_accuracy")


class _Gradients(TrainerCallback):
    """Keeps every gradient before each optimizer step."""

    def __init__(self):
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({name: weight.grad.detach().clone() for name, weight in named if weight.grad is not None})


@dataclass
class _Run:
    """What a run left behind."""

    trainer: Any
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    logs: list[dict[str, float]] = field(default_factory=list)


def _train(cls: type, config: type, folder: Path, *, resume: str | None = None, parts: dict | None = None, **options) -> _Run:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": len(PAIRS),
        "per_device_eval_batch_size": len(HELD_OUT),
        "max_length": 64,
        "max_steps": 1,
        "max_grad_norm": 1e6,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "beta": BETA,
        "seed": 3,
        **({"narrate": False} if config is CPOConstrainedConfig else {}),
    }
    given = {"model": materials.model(0), "ref_model": materials.model(1)} if parts is None else parts
    recorder = _Gradients()
    trainer = cls(
        args=config(**settings | options),
        processing_class=materials.tokenizer(),
        train_dataset=materials.dataset(PAIRS),
        eval_dataset=materials.dataset(HELD_OUT),
        callbacks=[recorder],
        **given,
    )
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    return _Run(trainer, recorder.steps, weights, list(trainer.state.log_history))


def _without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.endswith(("_runtime", "_per_second"))}


def _differ(one: _Run, other: _Run, *, shared_names: bool = False) -> Iterator[str]:
    """Where two runs differ in a bit; with `shared_names`, of what both log."""
    for number, (a, b) in enumerate(zip(one.logs, other.logs, strict=False), start=1):
        a, b = _without_times(a), _without_times(b)
        names = [name for name in {**a, **b} if not (shared_names and name.startswith("cpo/"))]
        for name in names:
            if a.get(name) != b.get(name):
                yield f"log {number}: {name} is {b.get(name)}, not {a.get(name)}"
    if len(one.logs) != len(other.logs) or not one.logs:
        yield f"{len(other.logs)} logs, not {len(one.logs)}"
    for name, weight in one.weights.items():
        if name not in other.weights or not torch.equal(weight, other.weights[name]):
            yield f"another {name} after training"


def names(folder: Path) -> Iterator[str]:
    """Every method that is overridden is there and called, every private name that is read exists."""
    for name in missing_upstream():
        yield f"{name} is missing, or nothing calls it"


def identity(folder: Path) -> Iterator[str]:
    """constraint="none" equals DPOTrainer bit for bit: full fine-tuning, and LoRA with dropout and ld_alpha."""

    def lora() -> dict[str, Any]:
        adapter = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return {"model": materials.model(0, dropout=0.3), "peft_config": adapter}

    cases: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any] | None]]] = {
        "full": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, lambda: None),
        "LoRA": ({"disable_dropout": False, "ld_alpha": 0.4}, lora),
    }
    arms: tuple[tuple[type, type, dict[str, Any]], ...] = (
        (trl.DPOTrainer, trl.DPOConfig, {}),
        (CPOConstrainedTrainer, CPOConstrainedConfig, {"constraint": "none", "check_reference": False}),
    )
    for name, (options, parts) in cases.items():
        common: dict[str, Any] = dict(max_steps=2, optim="adamw_torch", **options)
        runs: list[_Run] = []
        for cls, config, own in arms:
            torch.manual_seed(0)
            given = parts()
            torch.manual_seed(0)
            runs.append(_train(cls, config, folder / f"{name}-{len(runs)}", parts=given, **common, **own))
        for reason in _differ(*runs, shared_names=True):
            yield f"{name}: {reason}"
        for number, (a, b) in enumerate(zip(runs[0].gradients, runs[1].gradients, strict=True), start=1):
            if a.keys() != b.keys() or not all(torch.equal(a[each], b[each]) for each in a):
                yield f"{name}: other gradients at step {number}"


def _against_formulas(
    folder: Path, constraint: str, loss_of: Callable[[Tensor, Tensor], Tensor], *, ld_alpha: float | None = None, **options
) -> Iterator[str]:
    """Loss, gradients, metrics and weights of two steps, and an evaluation after them."""
    policy, reference = materials.model(0), materials.model(1)
    run = _train(
        CPOConstrainedTrainer,
        CPOConstrainedConfig,
        folder,
        constraint=constraint,
        gamma=GAMMA,
        ld_alpha=ld_alpha,
        max_steps=2,
        **options,
    )
    values: dict[str, Any] = {"beta": BETA, "gamma": GAMMA, "ld_alpha": 1.0 if ld_alpha is None else ld_alpha}
    whole = "gradient_accumulation_steps" not in options
    for step in range(2):
        wanted = by_hand.expected(policy, reference, PAIRS, loss_of, **values)
        counted = wanted.metrics | {"num_tokens": (step + 1) * wanted.metrics["num_tokens"]}
        logged = run.logs[step] if step < len(run.logs) else {}
        told = f"step {step + 1}: "
        yield from (told + reason for reason in _other_numbers(logged, wanted.loss, counted, whole=whole))
        gradients = run.gradients[step] if step < len(run.gradients) else {}
        for name, gradient in wanted.gradients.items():
            scale = max(gradient.abs().max().item(), 1e-3)
            got = gradients.get(name)
            if got is None or not torch.allclose(got.double(), gradient, rtol=1e-3, atol=1e-4 * scale):
                yield f"{told}another gradient of {name}"
            dict(policy.named_parameters())[name].data -= RATE * gradient.to(torch.float32)
    if len(run.gradients) != 2:
        yield f"{len(run.gradients)} steps, not 2"
    for name, weight in policy.named_parameters():
        if not torch.allclose(run.weights[name], weight, rtol=1e-3, atol=1e-4):
            yield f"another {name} after two steps"
    measured = run.trainer.evaluate()
    trained = by_hand.expected(run.trainer.model, reference, HELD_OUT, loss_of, **values)
    del trained.metrics["num_tokens"]  # those trained on
    yield from _other_numbers(measured, trained.loss, trained.metrics, "eval_")


def _other_numbers(
    logged: Mapping[str, Any], loss: float, metrics: Mapping[str, float], prefix: str = "", *, whole: bool = True
) -> Iterator[str]:
    for name, value in {"loss": loss, **metrics}.items():
        if not whole and name.startswith(_BY_TOKEN):
            continue
        found = logged.get(f"{prefix}{name}")
        if not isinstance(found, (int, float)) or not math.isclose(found, value, **CLOSE):
            yield f"{prefix}{name} is {found}, by the formula {value:.6g}"


def clip(folder: Path) -> Iterator[str]:
    """clip agrees with its formula: loss, gradients, TRL's metrics, two steps, an evaluation."""
    yield from _against_formulas(folder, "clip", by_hand.clip(BETA, GAMMA))


def clip_precomputed(folder: Path) -> Iterator[str]:
    """clip with a precomputed reference and ld_alpha agrees with its formula."""
    yield from _against_formulas(folder, "clip", by_hand.clip(BETA, GAMMA), ld_alpha=0.4, precompute_ref_log_probs=True)


def penalty_accumulated(folder: Path) -> Iterator[str]:
    """penalty over accumulated micro-batches agrees with its formula."""
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "penalty_weight": WEIGHT}
    yield from _against_formulas(folder, "penalty", by_hand.penalty(BETA, GAMMA, WEIGHT), **options)


def resume(folder: Path) -> Iterator[str]:
    """A run saved at step 1 and resumed ends as the uninterrupted one, with λ and the optimizer's state."""
    options: dict[str, Any] = dict(
        constraint="lagrangian",
        gamma=GAMMA,
        epsilon=1.0,
        max_steps=3,
        optim="adamw_torch",
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=2,
    )
    whole = _train(CPOConstrainedTrainer, CPOConstrainedConfig, folder, **options)
    again = _train(CPOConstrainedTrainer, CPOConstrainedConfig, folder, resume=str(folder / "checkpoint-1"), **options)
    if len(again.gradients) != 2:
        yield f"{len(again.gradients)} steps after a resume at step 1 of 3"
    yield from _differ(whole, again)


#: In order: what needs the least time comes first.
CHECKS: dict[str, Callable[[Path], Iterator[str]]] = {
    check.__name__: check for check in (names, clip, clip_precomputed, penalty_accumulated, identity, resume)
}


@contextmanager
def _alone() -> Iterator[Path]:
    """A folder for everything that is written, the cache too: no table of an earlier run is read. Nothing is warned of."""
    cache = os.environ.get("TRL_CPO_CACHE")
    with tempfile.TemporaryDirectory(prefix="trl_cpo_selftest_") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["TRL_CPO_CACHE"] = str(Path(folder) / "cache")
        try:
            yield Path(folder)
        finally:
            del os.environ["TRL_CPO_CACHE"]
            if cache is not None:
                os.environ["TRL_CPO_CACHE"] = cache


def run(first: bool = False) -> dict[str, list[str]]:
    """The reasons against the installed TRL, by check; without those that passed. `first`: ends at the first that failed."""
    failed: dict[str, list[str]] = {}
    with _alone() as folder:
        for name, check in CHECKS.items():
            try:
                reasons = list(check(folder / name))
            except (KeyboardInterrupt, MemoryError):
                raise
            except BaseException as error:  # whatever upstream does, even SystemExit, is an answer
                said = "".join(traceback.format_exception_only(error)).strip().replace("\n", " ")
                last = traceback.extract_tb(error.__traceback__)[-1]
                reasons = [f"{said} ({Path(last.filename).name}, line {last.lineno}, in {last.name})"]
            if reasons:
                failed[name] = reasons
                if first:
                    break
    return failed
