"""CPOConstrainedTrainer: DPOTrainer with a constraint on the preference gap."""

import textwrap
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from trl import DPOTrainer
from trl.data_utils import is_conversational

from . import _trl, checks
from .config import CPOConstrainedConfig, unused_knobs
from .constraints import CONSTRAINTS
from .forward.balance import BalancedSampler, pair_tokens
from .forward.sharing import PrefixSharing
from .metrics import MetricLedger, PairView, per_pair
from .quantized import keep_trainable

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class CPOConstrainedTrainer(DPOTrainer):
    """
    Trainer for Constrained Preference Optimization: DPO with a constraint on the policy's own preference gap.

    DPO lowers `−log σ(β(δ_θ − δ_ref))`, which rewards beating the reference; where the reference prefers the rejected
    response the loss can fall while the policy still does. This trainer moves the target, `−log σ(β(δ_θ − t))`, or adds
    a penalty on `max(0, γ − δ_θ)`, as `args.constraint` says. With `constraint="none"` it is DPOTrainer bit for bit.

    Method: [Conditional Equivalence of DPO and RLHF](https://huggingface.co/papers/2605.20834), ICML 2026. Not to be
    taken for `trl.experimental.cpo.CPOTrainer`, which is *Contrastive* Preference Optimization (arXiv 2401.08417).

    Takes the arguments of [`~trl.DPOTrainer`], with `args` a [`CPOConstrainedConfig`]. Overridden are `compute_loss`,
    `compute_ref_log_probs` (to go through the packed forward), `_precompute_ref_logps` (to cache by all that changes the
    numbers), `_prepare_dataset` (to refuse datasets in words), `_get_train_sampler` (for `balance_tokens`), `log` and
    `evaluation_loop` (both for the `cpo/*` metrics).

    Raises:
        ImportError: the installed TRL is not one of those supported.
        TypeError: `args` is a plain `DPOConfig`.
        ValueError: the dataset is empty or lacks a column, the tokenizer cannot pad or end a text, or `ref_model` has
            another vocabulary or is no model.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer

    >>> trainer = CPOConstrainedTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=CPOConstrainedConfig("Qwen2.5-0.5B-CPO", constraint="clip"),
    ...     train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    ... )
    >>> trainer.train()
    ```
    """

    # "cpo" alone is the tag of the contrastive method's models.
    _tag_names = ["trl", "dpo", "constrained-preference-optimization", "trl-cpo"]
    _name = "Constrained Preference Optimization"
    _paper = {
        "title": "Conditional Equivalence of DPO and RLHF: Implicit Assumption, Failure Modes, and Provable Alignment",
        "id": "2605.20834",
        "citation": textwrap.dedent("""\
            @inproceedings{yang2026conditional,
                title     = {{Conditional Equivalence of DPO and RLHF: Implicit Assumption, Failure Modes, and Provable Alignment}},
                author    = {Zhiqin Yang and Yonggang Zhang and Wei Xue and Dong Fang and Bo Han and Yike Guo},
                year      = 2026,
                booktitle = {International Conference on Machine Learning},
                eprint    = {arXiv:2605.20834},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: CPOConstrainedConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
    ):
        _trl.check_trl()
        if args is None:
            model_name = model if isinstance(model, str) else _trl.model_id(model)
            args = CPOConstrainedConfig(f"{model_name.split('/')[-1]}-CPO")
        elif not isinstance(args, CPOConstrainedConfig):
            raise TypeError(
                f"args must be a CPOConstrainedConfig, got {type(args).__name__}, which has no constraint. Replace "
                "`DPOConfig` by `CPOConstrainedConfig` (from trl_cpo import CPOConstrainedConfig): it takes the same "
                "fields, and constraint, gamma, tau, alpha, penalty_weight and logps_reduction."
            )
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                checks.check_preference_dataset(dataset, name)
        if ref_model is not None:
            checks.check_vocabularies(_trl.config_of(model, args), ref_model)
        if processing_class is None:
            processing_class = _trl.load_processing_class(model, args)
        if isinstance(train_dataset, (Dataset, IterableDataset)) and isinstance(processing_class, PreTrainedTokenizerBase):
            checks.check_tokenizer(processing_class, is_conversational(next(iter(train_dataset))))

        if args.balance_tokens:
            checks.check_lengths_known(train_dataset)

        self._constraint = CONSTRAINTS[args.constraint]
        self._knobs = args.knobs
        self._ledgers = {"train": MetricLedger(), "eval": MetricLedger()}
        # With the constraint off the trainer is DPOTrainer bit for bit, so packing has to be asked for.
        wanted = False if args.prefix_sharing is None and args.constraint == "none" else args.prefix_sharing
        self._sharing = PrefixSharing(
            wanted, args.max_length, speaks=args.process_index == 0, compiled=args.torch_compile
        )
        if args.process_index == 0:
            self._say_cautions(args)

        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        keep_trainable(self.model)
        # Sharded models can run only once training has wrapped them; the first batch probes those.
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._sharing.of(self.model)

    def _say_cautions(self, args: CPOConstrainedConfig) -> None:
        unused = unused_knobs(args)
        notes = [f"constraint={args.constraint!r} does not use {', '.join(unused)}."] if unused else []
        for note in notes + self._constraint.cautions(self._knobs):
            warnings.warn(note, stacklevel=3)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # Evaluation sets given to `evaluate` are seen here first.
        checks.check_preference_dataset(dataset, f"the {dataset_name} dataset")
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        checks.check_not_all_dropped(dataset, dataset_name, args.max_length)
        return dataset

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if isinstance(dataset, Dataset):
            # Asked for, and not found: sharded models cannot be probed before they are wrapped.
            args, packed = self.args, self._sharing.wanted is not False
            precision = args.bf16, args.fp16, str(self.model.dtype)
            dataset = _trl.keyed(
                dataset, packed, args.ld_alpha, args.max_length, args.truncation_mode, *precision, args.disable_dropout
            )
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """DPOTrainer's loss at the constraint's target margin, plus what the constraint adds.

        `mean_i ℓ(δ_θ,i; t_i) + mean_i added_i`, in nats. WPO weights and `loss_weights` act on the first term alone.
        """
        result, pairs, target = _trl.observed_loss(
            self,
            super().compute_loss,
            model,
            inputs,
            forward=self._sharing.of(model),
            reduction=self.args.logps_reduction,
            target_of=self._target if self._constraint.moves_target else None,
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        self._count(pairs, target)
        added = self._constraint.added_loss(pairs, self._knobs)
        if added is None:
            return result
        if return_outputs:
            loss, outputs = result
            return loss + added.mean(), outputs
        return result + added.mean()

    def _get_train_sampler(self, train_dataset=None):
        if not self.args.balance_tokens:
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = zip(*(map(len, dataset[name]) for name in _trl.TOKENIZED_COLUMNS), strict=True)
        return BalancedSampler(
            [pair_tokens(*parts, max_length=self.args.max_length) for parts in lengths],
            micro_batch=self.args.train_batch_size,
            micro_batches=self.args.world_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def compute_ref_log_probs(self, model, inputs):
        """The reference's log-probabilities of a batch, through the packed forward where it is in use."""
        keep_trainable(model)  # a precomputed reference runs before the trainer is whole
        return super().compute_ref_log_probs(self._sharing.of(model), inputs)

    def _target(self, pairs):
        return self._constraint.target(pairs, self._knobs)

    def _count(self, pairs, target) -> None:
        rows = per_pair(PairView(pairs.detach(), target, self._knobs.gamma))
        if self.model.training:
            # Examples repeated to fill the last batch are trained on, so they count.
            self._ledgers["train"].add(self.accelerator.gather(rows))
        else:
            self._ledgers["eval"].add(self.accelerator.gather_for_metrics(rows))

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._ledgers["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Under the set's own prefix: with several sets, DPOTrainer's metrics all come under "eval_".
        pairs = self._ledgers["eval"].count
        output.metrics.update(self._ledgers["eval"].flush(f"{metric_key_prefix}_"))
        output.metrics[f"{metric_key_prefix}_cpo/pairs"] = pairs
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(self._ledgers["train"].flush())
        super().log(logs, start_time)
