"""The seam: everything that this project knows about the inside of TRL's DPOTrainer.

What it rests on, in TRL 1.16, and the identity tests hold (tests/test_identity.py):

- `compute_loss` calls its `model` argument once (and once more, afterwards, for `return_outputs=True`) with
  `fused_lm_head=True` and reads per-token values off what comes back;
- where `precompute_ref_logps` is true it takes the reference's log-probabilities from `inputs`, and only after that call;
- `compute_ref_log_probs(model, inputs)` gives the numbers it would have computed itself;
- `_metrics[mode]` holds one number per logged name and call, averaged in `log`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, Features, Value, concatenate_datasets
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import AutoConfig, AutoProcessor, PreTrainedTokenizerBase
from transformers.trainer_utils import seed_worker
from trl import DPOTrainer
from trl import __version__ as trl_version
from trl.data_utils import _tokenize
from trl.models.utils import prepare_deepspeed
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .pairs import PairLogps, completion_lengths, sequence_logps
from .precision import float32_products

#: The versions of TRL whose DPOTrainer the identity tests were run against.
SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")

#: What each of DPOTrainer's loss types reads: the difference of summed log-ratios ("sum") or of their means per token
#: ("mean"), one side's log-ratio by itself ("one side"), or no reference at all ("no reference").
LOSS_READS = {
    "sigmoid": "sum",
    "hinge": "sum",
    "exo_pair": "sum",
    "robust": "sum",
    "discopop": "sum",
    "aot": "sum",
    "sigmoid_norm": "mean",
    "ipo": "mean",
    "sft": "no reference",
    "nca_pair": "one side",
    "bco_pair": "one side",
    "sppo_hard": "one side",
    "apo_zero": "one side",
    "apo_down": "one side",
    "aot_unpaired": "one side",
}

#: The loss type that is `sigmoid` over means per token instead of sums.
MEAN_OF = {"sigmoid": "sigmoid_norm"}

#: Columns that DPOTrainer adds to a dataset of text when it prepares it.
TOKENIZED_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")

#: Columns that it reads precomputed log-probabilities from.
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def check_trl(version: str = trl_version) -> None:
    """Raises `ImportError` if the installed TRL is not one that this package was tested with."""
    if not SUPPORTED_TRL.contains(Version(version).base_version):
        raise ImportError(
            f"trl-cpo works with TRL {SUPPORTED_TRL}, and TRL {version} is installed. It builds on the inside of "
            "DPOTrainer, which changes between releases, so other versions could train on wrong numbers without a "
            f"sign of it. Install a supported one: pip install 'trl{SUPPORTED_TRL}'."
        )


def model_id(model) -> str:
    """The name or folder that a model was loaded from."""
    return getattr(model.config, "_name_or_path", "")


def config_of(model, args):
    """The config of a model, read from its name or folder where it is not loaded yet."""
    if not isinstance(model, str):
        return model.config
    init = args.model_init_kwargs or {}
    return AutoConfig.from_pretrained(
        model, revision=init.get("revision"), trust_remote_code=init.get("trust_remote_code", args.trust_remote_code)
    )


def load_processing_class(model, args):
    """The tokenizer or processor that DPOTrainer would load for `model` itself, so that it can be checked first."""
    path = model if isinstance(model, str) else model_id(model)
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=args.trust_remote_code)


@dataclass(frozen=True)
class Reference:
    """What a trainer's `compute_ref_log_probs` computes with.

    Attributes:
        model: the model, as DPOTrainer has it; sharded and wrapped where it is.
        adapters: names of its PEFT adapters.
        adapter: the one that is switched on for the reference; None: none is.
    """

    model: torch.nn.Module
    adapters: tuple[str, ...]
    adapter: str | None


def reference_of(trainer: DPOTrainer) -> Reference:
    """The reference of a trainer: its reference model, else its model under the "ref" adapter or under none."""
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    bare = trainer.accelerator.unwrap_model(model)
    if not is_peft_model(bare):
        return Reference(model, (), None)
    names = tuple(bare.peft_config)
    if trainer.ref_model is not None:
        return Reference(model, names, bare.active_adapter)
    return Reference(model, names, "ref" if "ref" in names else None)


def reference_engine(trainer: DPOTrainer) -> torch.nn.Module:
    """What `compute_ref_log_probs` takes as its model before training has wrapped it, as DPOTrainer precomputes.

    With DeepSpeed the weights are then not in their place yet, and an inference engine puts them there.
    """
    if trainer.ref_model is not None:
        return trainer.ref_model
    if not trainer.is_deepspeed_enabled:
        return trainer.model
    if trainer.model_wrapped is not trainer.model:
        return trainer.model_wrapped  # training has put them there
    if trainer._precompute_engine is None:
        trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
    return trainer._precompute_engine


def release_reference_engine(trainer: DPOTrainer) -> None:
    """Takes the inference engine of a precomputed reference off the model, before training wraps it in its own.

    DPOTrainer leaves it there. Under ZeRO-3 its hooks would run in every forward of the training beside the training's own,
    and end it with an IndexError where the engine had just begun to record the order of the layers (DeepSpeed 0.19.8:
    wrapping a model again numbers its layers anew).
    """
    engine = getattr(trainer, "_precompute_engine", None)
    if engine is not None:
        engine.destroy()
        trainer._precompute_engine = None


def with_reference_logps(dataset: Dataset, chosen, rejected) -> Dataset:
    """`dataset` with the reference's log-probabilities (N,), float32, in the columns where DPOTrainer looks for them."""
    values = dict(zip(REFERENCE_COLUMNS, (chosen, rejected), strict=True))
    columns = Dataset.from_dict(values, features=Features({name: Value("float32") for name in values}))
    # Already there in a set that was prepared before and is handed over again.
    dataset = dataset.remove_columns([name for name in values if name in dataset.column_names])
    return concatenate_datasets([dataset, columns], axis=1)


def is_its_collator(collator: Any) -> bool:
    """Whether `collator` is DPOTrainer's own, which reads the token ids and nothing else."""
    return type(collator) is DataCollatorForPreference


def prepared(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args, name: str) -> Dataset:
    """`dataset` with the token ids that DPOTrainer would train on, without a trainer or a model.

    Pairs whose prompt alone fills `args.max_length` are left out, as DPOTrainer leaves them out.
    """
    return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, args, name)


def prompt_alone(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[int]:
    """The token ids of a row's prompt by itself, as DPOTrainer makes them before it looks where the answers begin."""
    prompt, tools = row["prompt"], row.get("tools")
    if isinstance(prompt, str):
        return list(_tokenize(tokenizer, prompt)["input_ids"])
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}
    return list(_tokenize(tokenizer, prompt, add_generation_prompt=True, **options)["input_ids"])


class _ObservedModel:
    """Stands in for `model` in DPOTrainer's loss: the first call goes through `forward`, and what it gave is reported."""

    def __init__(self, model: Callable, forward: Callable, report: Callable[[Any], None]):
        self._model = model
        self._forward = forward
        self._report = report
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls > 1:
            return self._model(*args, **kwargs)
        outputs = self._forward(*args, **kwargs)
        self._report(outputs)
        return outputs

    def __getattr__(self, name: str):
        return getattr(self._model, name)


def observed_loss(
    trainer: DPOTrainer,
    compute_loss: Callable,
    model: Callable,
    inputs: dict[str, Tensor],
    *,
    forward: Callable,
    reduction: str,
    target_of: Callable[[PairLogps], Tensor] | None,
    return_outputs: bool = False,
    **kwargs,
) -> tuple[Any, PairLogps, Tensor]:
    """DPOTrainer's own loss with the reference's gap moved to a target margin, and the log-probabilities it used.

    DPO's loss at the target t is DPO's loss against a reference whose gap is t, so the rejected side of the reference
    is lowered by `(t − δ_ref)` (times the completion's length where the loss averages per token) on the way in, and the
    logged `rewards/*` are put back to the true reference on the way out. No forward is run that DPOTrainer would not
    run, and in its order.

    Args:
        trainer: the trainer whose loss it is.
        compute_loss: the bound `compute_loss` of DPOTrainer.
        model: the policy, wrapped as the training loop has it.
        inputs: a collated batch; it is not changed.
        forward: what computes the policy's log-probabilities in place of `model`; may be `model`.
        reduction: "sum" or "mean", how the returned log-probabilities are reduced over tokens.
        target_of: gives the target margins (B,) of a batch, in nats of `reduction`; None leaves DPO's loss untouched.
        return_outputs: passed on, as are `kwargs`.

    Returns:
        What `compute_loss` returned; the pairs, the policy's with their graph; the targets (B,).

    Raises:
        RuntimeError: DPOTrainer did not call `model` the way this module rests on.
    """
    inputs = dict(inputs)
    mask = inputs["completion_mask"]
    chosen_lengths, rejected_lengths = completion_lengths(mask).chunk(2)
    seen: dict[str, Tensor | PairLogps] = {}

    def reduced(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        return (chosen / chosen_lengths, rejected / rejected_lengths) if reduction == "mean" else (chosen, rejected)

    def report(outputs) -> None:
        # Called after the policy's forward, where DPOTrainer would run the reference: with dropout left on, running it
        # before would draw the random numbers in another order.
        if not precomputed:
            # Not `or`: a compiled model has no truth value.
            reference_model = trainer.model if trainer.ref_model is None else trainer.ref_model
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = trainer.compute_ref_log_probs(reference_model, inputs)
        reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        policy = sequence_logps(outputs.log_probs, mask, trainer.ld_alpha).chunk(2)
        pairs = PairLogps(*reduced(*policy), *reduced(*reference))
        seen["pairs"], seen["target"] = pairs, pairs.ref_gap
        if target_of is None:
            return
        with torch.no_grad():
            seen["target"] = target_of(pairs.detach())
            seen["log_ratios"] = torch.stack([policy[0] - reference[0], policy[1] - reference[1]], dim=1)
            shift = seen["target"] - pairs.ref_gap
            inputs["ref_rejected_logps"] = reference[1] - (shift * rejected_lengths if reduction == "mean" else shift)

    observed = _ObservedModel(model, forward, report)
    precomputed = trainer.precompute_ref_logps
    trainer.precompute_ref_logps = True
    try:
        result = compute_loss(observed, inputs, return_outputs=return_outputs, **kwargs)
    finally:
        trainer.precompute_ref_logps = precomputed
    if observed.calls != 1 + bool(return_outputs):
        raise RuntimeError(
            f"DPOTrainer of TRL {trl_version} called the model {observed.calls} times in one loss, where trl-cpo knows "
            "of one call: it cannot tell which log-probabilities the loss used. Please report this, with the TRL version."
        )
    if "log_ratios" in seen:
        _restore_rewards(trainer, seen["log_ratios"])
    return result, seen["pairs"], seen["target"]


def reference_logps(trainer: DPOTrainer, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The reference's summed log-probabilities of a batch, chosen and rejected, (B,), nats: precomputed or computed now."""
    if trainer.precompute_ref_logps:
        return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
    # Not `or`: a compiled model has no truth value.
    return trainer.compute_ref_log_probs(trainer.model if trainer.ref_model is None else trainer.ref_model, inputs)


def in_half_precision(trainer: DPOTrainer) -> bool:
    """Whether any part of the model is computed in fewer digits than float32's: half precision, TF32, 4 or 8 bits."""
    model = trainer.model
    quantized = getattr(model, "is_quantized", False) or any(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    coarse = float32_products(trainer.accelerator.device.type) != "ieee"
    return trainer.accelerator.mixed_precision != "no" or coarse or quantized or half


def how_the_reference_is_had(trainer: DPOTrainer) -> dict[str, Any]:
    """Whether it was computed beforehand, whether it is the model under another adapter or none, where else it is loaded from."""
    return dict(precomputed=trainer.precompute_ref_logps, is_peft=is_peft_model(trainer.model), source=model_id(trainer.model))


def policy_logps(trainer: DPOTrainer, forward: Callable, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The policy's summed log-probabilities of a batch, chosen and rejected, (B,), nats, by a forward of its own."""
    mask = inputs["completion_mask"]
    others = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    features = {name: value for name, value in inputs.items() if name not in others}
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    with trainer.accelerator.autocast():
        outputs = forward(**features, use_cache=False, labels=labels, fused_lm_head=True)
    return sequence_logps(outputs.log_probs, mask, trainer.ld_alpha).chunk(2)


def _restore_rewards(trainer: DPOTrainer, log_ratios: Tensor) -> None:
    """Sets the `rewards/*` just logged for a moved target to DPO's meaning, β (s_θ − s_ref), from (B, 2) log-ratios."""
    rewards = trainer.beta * log_ratios
    chosen, rejected = trainer.accelerator.gather(rewards).unbind(dim=1)
    logged = trainer._metrics["train" if trainer.model.training else "eval"]
    logged["rewards/rejected"][-1] = rejected.mean().item()
    logged["rewards/accuracies"][-1] = (chosen > rejected).float().mean().item()
    logged["rewards/margins"][-1] = (chosen - rejected).mean().item()


def train_dataloader(trainer: DPOTrainer, batches: Sampler[list[int]]) -> DataLoader:
    """The trainer's loader of training pairs, with these batches, of any sizes, dealt to its processes in turn.

    Args:
        batches: gives the rows of each micro-batch, as many micro-batches as the processes can share evenly.
    """
    args, accelerator = trainer.args, trainer.accelerator
    loader = DataLoader(
        trainer._remove_unused_columns(trainer.train_dataset, description="training"),
        batch_sampler=batches,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )
    # Accelerate fills batches up to one size unless told not to.
    even, accelerator.even_batches = accelerator.even_batches, False
    try:
        return accelerator.prepare(loader)
    finally:
        accelerator.even_batches = even


def run_dir(trainer: DPOTrainer, trial: Any = None) -> str:
    """The folder of a run's checkpoints: `args.output_dir`, or a trial's folder in it."""
    return trainer._get_output_dir(trial)


@contextmanager
def saving_into(trainer: DPOTrainer, folder: str) -> Iterator[None]:
    """Has `_save_checkpoint` write into `folder` in place of the run's own, and push nothing to the hub."""
    trainer._get_output_dir = lambda trial: folder
    trainer._push_from_checkpoint = lambda checkpoint: None
    try:
        yield
    finally:
        del trainer._get_output_dir, trainer._push_from_checkpoint


@contextmanager
def saving_weights_on_each_node(trainer: DPOTrainer) -> Iterator[None]:
    """Has a model that is whole on every process write its weights wherever `args.save_on_each_node` asks for them.

    `save_pretrained` leaves them out on all processes but the very first, and writes the rest.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if sharded or not trainer.args.save_on_each_node or not hasattr(model, "should_save_on_this_rank"):
        yield
        return
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank


def push_checkpoint(trainer: DPOTrainer, folder: str) -> None:
    """Uploads a checkpoint as `args.hub_strategy` says."""
    trainer._push_from_checkpoint(folder)


def loop_state(trainer: DPOTrainer) -> dict[str, Any]:
    """What training has counted on this process and no checkpoint of transformers or TRL holds, as exact plain numbers."""
    return {
        "loss": trainer._tr_loss.item(),
        "loss_logged": trainer._total_loss_scalar,
        "last_logged_step": trainer._globalstep_last_logged,
        "first_step": trainer._initial_global_step,
        "tokens": trainer._total_train_tokens,
        "training": trainer.model.training,
        "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
    }


def load_loop_state(trainer: DPOTrainer, states: Sequence[dict[str, Any]]) -> None:
    """Takes up what `loop_state` gave on each of the processes, once training has set its counters to zero.

    With another number of processes than there were, each takes the mean of the losses and the first one's metrics.
    """
    index, same = trainer.accelerator.process_index, len(states) == trainer.accelerator.num_processes
    mine = states[index if same else 0]
    losses = [mine["loss"]] if same else [state["loss"] for state in states]
    trainer._tr_loss.fill_(sum(losses) / len(losses))
    trainer._total_loss_scalar = mine["loss_logged"]
    trainer._globalstep_last_logged = mine["last_logged_step"]
    trainer._initial_global_step = mine["first_step"]
    trainer._total_train_tokens = mine["tokens"]
    # Which metrics are logged goes by the model's mode, which no step sets where none is left to train.
    trainer.model.train(mine["training"])
    trainer._metrics["train"].clear()
    trainer._metrics["train"].update({name: list(values) for name, values in mine["metrics"].items()})
