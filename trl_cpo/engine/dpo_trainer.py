"""TRL's DPOTrainer with exact resume, packing and guards."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from .._trl.datasets import (
    TOKENIZED_COLUMNS,
    ColumnsBeside,
    hide_helper_columns,
    naming_rows,
    show_helper_columns,
    train_dataloader,
    with_reference_logps,
    without_padding,
)
from .._trl.lora_layers import spare_casts
from .._trl.loss import LOSS_READS, observed_loss, policy_logps, reference_logps
from .._trl.models import config_of, drifting_parameters, model_id, reference_origin
from .._trl.turns import of_assistant_turns, refuse_collator, with_turn_masks
from .._trl.upstream import check_kernels, check_upstream
from ..data import validation
from ..data.rows import TURN_MASKS
from ..pairs import PairLogps
from .batching import BalancedSampler, TokenBudget, pair_tokens
from .config import DPOConfig
from .forward.sharing import PlansBeside, PrefixSharing
from .guards import BatchGuard, GatheredBatch
from .model_state import evaluation_mode, keep_trainable
from .precision import in_half_precision
from .preflight import preflight
from .reference import ReferenceTables
from .resume.trainer import ResumableTrainer
from .shutdown import pause_at_exit
from .slow_steps import SlowSteps
from .start_check import StartCheck, drift_message, exemption, likely_causes

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class Carried:
    """What a method makes of the data.

    Attributes:
        columns: of numbers, of the prepared datasets, that batches hold beside the tokens.
        callbacks: to add after the user's.
    """

    columns: tuple[str, ...] = ()
    callbacks: Sequence[TrainerCallback] = ()


class DPOTrainer(ResumableTrainer):
    """
    TRL's DPOTrainer with exact resume, a packed forward, and guards. It knows no constraint.

    With the fields of [`DPOConfig`] at their defaults it is TRL's, bit for bit. A method built on it overrides:

    - `compute_loss`, to call `guarded_loss` with its own target and added term;
    - `set_up` and `constructed`, to prepare its state and callbacks;
    - `on_batch`, to update counters and metrics;
    - `data_given`, to check and name columns of its own, and `with_columns`, to make them;
    - `stateful`, to put that state into checkpoints.

    `trl_cpo._trl.upstream` lists what is overridden of TRL and transformers, and why.

    Args: those of [`~trl.DPOTrainer`], with `args` a [`DPOConfig`].

    Raises:
        ImportError: the installed TRL or transformers is not supported.
        TypeError: `args` is TRL's own config, or `ref_model` is not a model.
        ProcessesDisagree: the processes of a distributed run were started with different settings or data.
        ValueError: the dataset is empty or lacks a column, the tokenizer cannot pad or end a text, or `ref_model` has
            another vocabulary; or parameters outside the adapter are trained and the reference would follow them.
    """

    #: The class that `args` must be an instance of, and the suffix of the default output folder.
    config_class: type[DPOConfig] = DPOConfig
    run_suffix = "DPO"
    #: Start of the sentence in a warning that says who leaves degenerate pairs out; None: nobody does.
    leaves_out_degenerate: str | None = None

    args: DPOConfig

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
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
        check_upstream()
        args = self._config(args, model)
        check_kernels(args.device.type)
        if args.assistant_turns_only:
            refuse_collator(data_collator)
        # Not passed on as `callbacks`, because the user's come first.
        own_callbacks = self.set_up(args)
        processing_class = preflight(
            args,
            model=model,
            ref_model=ref_model,
            datasets={"train_dataset": train_dataset, "eval_dataset": eval_dataset},
            processing_class=processing_class,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        carried = self.data_given(args, {"train_dataset": train_dataset, "eval_dataset": eval_dataset})
        self._carried, own_callbacks = carried.columns, [*carried.callbacks, *own_callbacks]
        pause_at_exit()
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if isinstance(tokenizer, PreTrainedTokenizerBase):  # DPOTrainer refuses anything else
            self._fit = validation.VocabularyFit(tokenizer, config_of(model, args))
        self._order: BalancedSampler | TokenBudget | None = None
        self._sharing = PrefixSharing(
            args.packs,
            args.max_length,
            verbose=args.process_index == 0,
            compiled=args.torch_compile,
            autocast=lambda: self.accelerator.autocast(),
        )
        #: Tables that `precompute_ref_log_probs` computed or found; `trl_cpo.engine.reference.table_of` reads them.
        self.reference_tables = ReferenceTables()
        #: Log-probabilities of every pair in the latest evaluation of each set, by metric prefix ("eval", or "eval_<name>"
        #: with several sets): gathered over processes, each pair once, in evaluation order, on the CPU. Beside them, which
        #: of these pairs are degenerate, (n,), bool.
        self.evaluated_pairs: dict[str, PairLogps] = {}
        self.evaluated_degenerate: dict[str, Tensor] = {}
        self._evaluated: list[tuple[Tensor, Tensor]] = []
        self._adapter = peft_config
        self._reads_reference = any(LOSS_READS[loss_type] != "no reference" for loss_type in args.loss_type)
        exempt = exemption(
            wanted=args.check_reference,
            reference_given=ref_model is not None,
            reads_reference=self._reads_reference,
            adapter=peft_config,
        )
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
        if args.assistant_turns_only:
            self.data_collator = of_assistant_turns(self.data_collator)
        if self._carried:
            self.data_collator = ColumnsBeside(self.data_collator, self._carried)
        if self._sharing.wanted is not False:
            self.data_collator = PlansBeside(self.data_collator)
            spare_casts(self.model)
        self._check_reference_stays()
        self.reference_tables.weights_may_change()
        self._guard = BatchGuard(self.accelerator, lambda ids: self.processing_class.decode(ids))
        self._start_check = StartCheck(exempt, in_half_precision(self.model, self.accelerator))
        if args.device.type == "cuda" and args.process_index == 0:
            own_callbacks.append(SlowSteps())
        for callback in own_callbacks:
            self.add_callback(callback)
        if args.tokens_per_step is not None:
            self.get_train_dataloader()  # raises now if the budget is too small
        keep_trainable(self.model)
        # Sharded models cannot run before training wraps them; they are probed at the first batch.
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._sharing.of(self.model)
        self.constructed()

    @classmethod
    def _config(cls, args, model) -> DPOConfig:
        if args is None:
            name = model if isinstance(model, str) else model_id(model)
            return cls.config_class(f"{name.split('/')[-1]}-{cls.run_suffix}")
        if not isinstance(args, cls.config_class):
            ours, theirs = cls.config_class, type(args).__name__
            raise TypeError(
                f"args must be a {ours.__name__}, got {theirs}. Replace `{theirs}` by `{ours.__name__}` (from "
                f"{ours.__module__.rpartition('.')[0]} import {ours.__name__}): it takes the same fields, and its own."
            )
        return args

    # Hooks for a method built on this trainer

    def set_up(self, args: DPOConfig) -> list[TrainerCallback]:
        """Prepares the method's state; called once, before anything is loaded. Returns callbacks to add after the user's."""
        self.warn_of(args.cautions(), args)
        return []

    @staticmethod
    def warn_of(notes: list[str], args: DPOConfig) -> None:
        """Warns of each, in the first process alone."""
        if args.process_index == 0:
            for note in notes:
                warnings.warn(note, stacklevel=4)

    def data_given(self, args: DPOConfig, datasets: Mapping[str, Any]) -> "Carried":
        """Checks columns that the method reads, before anything is loaded.

        `datasets` are "train_dataset" and "eval_dataset", each a dataset, a dictionary of datasets, or None.
        """
        return Carried()

    def with_columns(self, dataset: Any, name: str) -> Any:
        """A dataset, called `name` in messages, with the columns to carry; called before it is tokenized."""
        return dataset

    def constructed(self) -> None:
        """Called once, at the end of construction: the model is where training starts, or was started that is resumed."""

    def on_batch(self, batch: GatheredBatch) -> None:
        """Called with every training and evaluation batch, gathered over all processes: in training at the end of a step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss with the guards, through the packed forward if it is in use."""
        return self.guarded_loss(model, inputs, return_outputs, num_items_in_batch)

    def guarded_loss(
        self,
        model,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        *,
        reduction: str = "sum",
        target_of: Callable[[PairLogps], Tensor] | None = None,
        added_loss: Callable[[PairLogps], Tensor | None] | None = None,
        beside: Tensor | None = None,
    ):
        """DPO's loss of a batch at a target margin, plus an added term; checked on all processes.

        `mean_i ℓ(δ_i; t_i) + mean_i added_i`, in nats; the arguments are those of `trl_cpo._trl.loss.observed_loss`. WPO
        weights and `loss_weights` apply to the first term only. Under `tokens_per_step` the training loss is multiplied by
        this micro-batch's number of pairs over the mean number. `beside`, (B, K), reaches `on_batch` gathered.

        Raises:
            FloatingPointError: in training, a log-probability or the loss is not finite.
            ValueError: on the first micro-batch of a run, the policy differs from its reference.
        """
        with self._sharing.batch(inputs) as inputs:
            observed = observed_loss(
                self,
                super().compute_loss,
                model,
                inputs,
                forward=self._sharing.of(model),
                reduction=reduction,
                target_of=target_of,
                added_loss=added_loss,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
            loss, training, step = observed.loss, self.model.training, self.state.global_step
            if not training:
                batch = self._guard.evaluated(observed, beside)
                self.on_batch(batch)
                self._evaluated.append((batch.logps, batch.degenerate))
            else:
                self._guard.take(observed, inputs, step=step + 1, beside=beside)
                if isinstance(self._order, TokenBudget):
                    loss = loss * (len(observed.target) / self._order.mean_pairs)
                # At the end of a step, before its last backward pass: each look waits for the device.
                if self.accelerator.sync_gradients or self._start_check.is_open:
                    batches = self._guard.settle()
                    for batch in batches:
                        self.on_batch(batch)
                    if batches[-1].sound and self._start_check.due(step):
                        self._check_start(model, inputs, observed.pairs, reduction)
        return (loss, *observed.outputs) if return_outputs else loss

    def train(self, *args, **kwargs):
        """[`ResumableTrainer.train`], refused if nothing is trained, or if the reference would follow the policy."""
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "No parameter is trained: all have requires_grad=False. Load an adapter to be trained further with "
                "PeftModel.from_pretrained(model, folder, is_trainable=True), add a new one with peft_config=LoraConfig(...), "
                "or unfreeze the model with model.requires_grad_(True), before the trainer is made."
            )
        self._check_reference_stays()  # parameters may have been unfrozen since
        self._guard.begin()
        return super().train(*args, **kwargs)

    def _check_reference_stays(self) -> None:
        if self._reads_reference and (names := drifting_parameters(self)):
            raise ValueError(drift_message(names))

    def _check_start(self, model, inputs, pairs: PairLogps, reduction: str) -> None:
        """Raises `ValueError`, on all processes, if the policy does not start at its reference."""
        mask = inputs["completion_mask"]
        deviation = self.accelerator.gather(self._start_check.deviation(pairs.detach(), mask, reduction))
        if not (deviation > 1).any():
            return
        # In training mode, dropout and embedding noise alone make the two differ.
        with evaluation_mode(model, self.ref_model):
            logps = policy_logps(self, self._sharing.of(model), inputs), reference_logps(self, inputs)
        deviation = self._start_check.deviation(PairLogps(*logps[0], *logps[1]), mask, "sum")
        deviation = self.accelerator.gather(deviation)
        if (deviation > 1).any():
            causes = likely_causes(adapter=self._adapter, **reference_origin(self))
            raise ValueError(self._start_check.message(deviation, causes))

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """TRL's evaluation loop; also stores the log-probabilities of every pair in `evaluated_pairs`."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluated:
            logps, degenerate = (torch.cat(parts).cpu() for parts in zip(*self._evaluated, strict=True))
            self.evaluated_pairs[metric_key_prefix] = PairLogps.from_rows(logps)
            self.evaluated_degenerate[metric_key_prefix] = degenerate
            self._evaluated = []
        return output

    # The reference, and the forward

    def compute_ref_log_probs(self, model, inputs):
        """The reference's log-probabilities of a batch, through the packed forward if it is in use."""
        keep_trainable(model)  # a precomputed reference runs before __init__ gets to its own call
        with self._sharing.batch(inputs) as inputs:
            return super().compute_ref_log_probs(self._sharing.of(model), inputs)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        # From the setting, not from a probe: sharded models cannot be probed before they are wrapped.
        packed = self._sharing.wanted is not False
        as_dpo_trainer = not packed and self.args.is_plain_dpo
        table = self.reference_tables.table(self, dataset, name, batch_size, packed=packed, as_dpo_trainer=as_dpo_trainer)
        return with_reference_logps(dataset, table.chosen_logps, table.rejected_logps)

    # The data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # Datasets passed to `evaluate` were not checked before.
        validation.check_preference_dataset(
            dataset, f"the {dataset_name} dataset", prompt_needed=not args.is_plain_dpo, warns=False
        )
        if args.assistant_turns_only:
            validation.check_has_turns(dataset, f"the {dataset_name} dataset")
        given = dataset
        dataset = self.with_columns(dataset, f"the {dataset_name} dataset")
        if isinstance(dataset, IterableDataset):
            dataset = validation.sound_stream(dataset, f"the {dataset_name} dataset")
        dataset, hidden = hide_helper_columns(without_padding(dataset))
        with naming_rows(dataset, processing_class, f"the {dataset_name} dataset"):
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        dataset = show_helper_columns(dataset, hidden)
        dataset = self._fit.checked(dataset, dataset_name)
        validation.check_not_all_dropped(dataset, dataset_name, args.max_length)
        if args.assistant_turns_only:
            dataset = with_turn_masks(dataset, processing_class, f"the {dataset_name} dataset")
        # Streamed datasets cannot be scanned; `guarded_loss` counts their degenerate pairs.
        if isinstance(dataset, Dataset) and args.process_index == 0:
            message = validation.degenerate_message(
                validation.degenerate_rows(dataset, args.max_length, args.truncation_mode),
                name=dataset_name,
                total=len(given),
                dropped=len(given) - len(dataset),
                max_length=args.max_length,
                left_out_by=self.leaves_out_degenerate,
            )
            twice_ended = validation.doubled_end_message(given, self._tokenizer.eos_token, dataset_name)
            turns = None if args.assistant_turns_only else validation.several_turns_message(dataset, dataset_name)
            for text in (message, twice_ended, turns):
                if text:
                    warnings.warn(text, stacklevel=2)
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        carried = (*self._carried, *(TURN_MASKS if self.args.assistant_turns_only else ()))
        self._signature_columns += [name for name in carried if name not in self._signature_columns]

    def _get_train_sampler(self, train_dataset=None):
        if not self.args.balance_tokens:
            return super()._get_train_sampler(train_dataset)
        costs, micro_batch = self._costs(train_dataset), self.args.train_batch_size
        self._order = BalancedSampler(costs, micro_batch=micro_batch, **self._dealing())
        return self._order

    def get_train_dataloader(self):
        """TRL's data loader, or one over the micro-batches of `TokenBudget` under `tokens_per_step`."""
        if self.args.tokens_per_step is None:
            return super().get_train_dataloader()
        self._order = TokenBudget(self._costs(), tokens=self.args.tokens_per_step, **self._dealing())
        return train_dataloader(self, self._order)

    def _get_dataloader(self, dataset, *args, is_training: bool = False, **options):
        # `dataloader_drop_last` is about training: an evaluation without its last pairs would be of other pairs.
        asked, collator = self.args.dataloader_drop_last, self.data_collator
        self.args.dataloader_drop_last = asked and is_training
        if isinstance(dataset, IterableDataset) and isinstance(collator, PlansBeside):
            # Accelerate cuts and joins the batches of a stream, and a plan is of one batch.
            self.data_collator = collator.collator
        try:
            return super()._get_dataloader(dataset, *args, is_training=is_training, **options)
        finally:
            self.args.dataloader_drop_last, self.data_collator = asked, collator

    @property
    def mean_pairs(self) -> float | None:
        """Mean number of pairs in an optimizer step, over all processes, if steps differ in it; else None."""
        order = self._order
        return order.mean_pairs * order.micro_batches if isinstance(order, TokenBudget) else None

    def _costs(self, train_dataset: Dataset | None = None) -> list[int]:
        """The cost of every training pair, in tokens."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = zip(*(map(len, dataset[name]) for name in TOKENIZED_COLUMNS), strict=True)
        cut = dict(max_length=self.args.max_length, truncation_mode=self.args.truncation_mode)
        return [pair_tokens(*parts, **cut) for parts in lengths]

    def _dealing(self) -> dict[str, int]:
        args = self.args
        return {
            "micro_batches": args.world_size * args.gradient_accumulation_steps,
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }

    def _run_epoch(self, *args, **kwargs):
        if self._order is not None:
            # Accelerate does not reach the sampler when a resumed epoch of several processes skips batches.
            self._order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)
