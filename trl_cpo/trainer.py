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

from ._trl.datasets import TOKENIZED_COLUMNS, train_dataloader, with_reference_logps
from ._trl.loss import LOSS_READS, observed_loss, policy_logps, reference_logps
from ._trl.models import (
    config_of,
    how_the_reference_is_had,
    in_half_precision,
    load_processing_class,
    model_id,
    release_reference_engine,
)
from ._trl.training_loop import saving_weights_on_each_node
from ._trl.upstream import check_trl
from .config import CPOConstrainedConfig
from .data import validation as checks
from .engine import guards
from .engine import processes as parallel
from .engine.batching import BalancedSampler, TokenBudget, pair_tokens
from .engine.forward.sharing import PrefixSharing
from .engine.interruption import Interruption, left_to_us
from .engine.quantized import keep_trainable
from .engine.reference import ReferenceTables
from .engine.resume.resumption import Resumption
from .engine.shutdown import end_gently
from .logs.narration import Narrator
from .metrics import COLUMNS, MetricLedger, PairView, per_pair
from .multiplier import DualAscent, Multiplier
from .pairs import PairLogps

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
    `compute_ref_log_probs` (to go through the packed forward), `_precompute_ref_logps` (for the reference table),
    `_prepare_dataset` (to refuse datasets in words), `_get_train_sampler` (for `balance_tokens`), `get_train_dataloader`
    (for `tokens_per_step`), `log` and `evaluation_loop` (both for the `cpo/*` metrics), `train`, `_save_checkpoint`, `_save`,
    `_init_training_state`, `_run_epoch`, `_evaluate` and `_finalize_training` (so that a resumed run is the uninterrupted one).

    Raises:
        ImportError: the installed TRL is not one of those supported.
        TypeError: `args` is a plain `DPOConfig`.
        ProcessesDisagree: the processes of a distributed run were started with other settings or data.
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
        check_trl()
        if args is None:
            model_name = model if isinstance(model, str) else model_id(model)
            args = CPOConstrainedConfig(f"{model_name.split('/')[-1]}-CPO")
        elif not isinstance(args, CPOConstrainedConfig):
            raise TypeError(
                f"args must be a CPOConstrainedConfig, got {type(args).__name__}, which has no constraint. Replace "
                "`DPOConfig` by `CPOConstrainedConfig` (from trl_cpo import CPOConstrainedConfig): it takes the same "
                "fields, and those of the constraint."
            )
        self._check_processes(
            args,
            model,
            ref_model,
            quantization_config,
            peft_config,
            dict(train_dataset=train_dataset, eval_dataset=eval_dataset),
        )
        end_gently()
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                checks.check_preference_dataset(dataset, name)
        if ref_model is not None:
            checks.check_vocabularies(config_of(model, args), ref_model)
        if processing_class is None:
            processing_class = load_processing_class(model, args)
        if isinstance(train_dataset, (Dataset, IterableDataset)) and isinstance(processing_class, PreTrainedTokenizerBase):
            checks.check_tokenizer(processing_class, is_conversational(next(iter(train_dataset))))

        for option in ("balance_tokens", "tokens_per_step"):
            if getattr(args, option):
                checks.check_lengths_known(train_dataset, option)

        self._constraint = args.form
        self._order: BalancedSampler | TokenBudget | None = None
        rule = self._constraint.dual_rule
        self._dual = None if rule is None else Multiplier(rule)
        self._ledgers = {"train": MetricLedger(), "eval": MetricLedger()}
        #: By metric prefix ("eval", or "eval_<name>" with several sets), the log-probabilities of every pair of that set's
        #: latest evaluation: gathered over processes, each pair once, in the order in which the set was gone through (its
        #: own, unless train_sampling_strategy="group_by_length" shuffles it), on the CPU.
        self.evaluated_pairs: dict[str, PairLogps] = {}
        #: The same: which of these pairs compare two answers (`guards.comparable`), (n,), bool.
        self.evaluated_comparable: dict[str, torch.Tensor] = {}
        self._evaluated: list[torch.Tensor] = []
        # With the constraint off the trainer is DPOTrainer bit for bit, so packing has to be asked for.
        wanted = False if args.prefix_sharing is None and args.constraint == "none" else args.prefix_sharing
        self._sharing = PrefixSharing(wanted, args.max_length, speaks=args.process_index == 0, compiled=args.torch_compile)
        #: What `precompute_ref_log_probs` computed or found; `trl_cpo.engine.reference.table_of` reads it.
        self.reference_tables = ReferenceTables()
        if args.process_index == 0:
            self._say_cautions(args)
        self._adapter = peft_config
        excuse = guards.excuse(
            wanted=args.check_reference,
            reference_given=ref_model is not None,
            reads_reference=any(LOSS_READS[loss_type] != "no reference" for loss_type in args.loss_type),
            adapter=peft_config,
        )
        self._unsound = 0  # micro-batches in a row

        with left_to_us(args):
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
        self.reference_tables.weights_may_change()
        if self._dual is not None:
            self.add_callback(DualAscent(self._dual))
        if args.narrate:
            self.add_callback(Narrator(args.logps_reduction))
        self._interruption = Interruption(self.accelerator, args.enable_jit_checkpoint)
        self.add_callback(self._interruption)
        self._resumption = Resumption(self)
        self.add_callback(self._resumption)
        self._finite_weights = guards.FiniteWeights(self.accelerator.gather, self.accelerator.device)
        self.add_callback(self._finite_weights)
        if args.tokens_per_step is not None:
            self.get_train_dataloader()  # says now what is wrong with the budget
        self._start_check = guards.StartCheck(excuse, half_precision=in_half_precision(self))
        keep_trainable(self.model)
        # Sharded models can run only once training has wrapped them; the first batch probes those.
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self._sharing.of(self.model)

    @staticmethod
    def _check_processes(args, model, ref_model, quantization_config, peft_config, datasets) -> None:
        parallel.check_launch(args)
        configs = {
            "model": lambda: config_of(model, args),
            "ref_model": getattr(ref_model, "config", None),
            "peft_config": peft_config,
            "quantization_config": quantization_config,
        }
        # First of all: what is the same on every process passes or fails the checks that follow on every process.
        parallel.check_agreement(lambda: parallel.facts_of(args, configs=configs, datasets=datasets))

    def _say_cautions(self, args: CPOConstrainedConfig) -> None:
        for note in args.cautions():
            warnings.warn(note, stacklevel=3)

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """DPOTrainer's training. Resumed from a checkpoint of this trainer it is, number for number, what was interrupted.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or `True` for the newest whole one in `args.output_dir`.
            trial, ignore_keys_for_eval: as in [`~transformers.Trainer.train`].

        Raises:
            CheckpointError: the checkpoint is not whole, or there is none; before the model is touched.
            TrainingInterrupted: SIGTERM came, under `enable_jit_checkpoint`, and a checkpoint was written.
        """
        checkpoint = self._resumption.prepare(resume_from_checkpoint)
        release_reference_engine(self)
        with self._interruption.listening(more_follows=trial is not None):
            return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _save_checkpoint(self, model, trial):
        # Not in a callback: an epoch's end, or a best evaluation, asks for a checkpoint after those of the step have run.
        if self._resumption.puts_off():
            return
        self._finite_weights.before_saving(model, self.state.global_step)
        checkpoint = self._resumption.save(lambda: super(CPOConstrainedTrainer, self)._save_checkpoint(model, trial), trial)
        self._interruption.saved(checkpoint)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if not self._interruption.due:
            return
        # Not asked for in a callback: under save_strategy="best" an evaluation has the last word there.
        if self._interruption.checkpoint is None and not self._resumption.puts_off():
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        # Stopped early, the training is over; resumed, it would forget that and go on.
        stopped_early = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        if self._interruption.checkpoint is not None and not stopped_early:
            self._interruption.end(self.state.global_step)

    def _save(self, output_dir=None, state_dict=None):
        with saving_weights_on_each_node(self):
            super()._save(output_dir, state_dict)

    def _init_training_state(self, *args, **kwargs):
        return self._resumption.place_in_stream(*super()._init_training_state(*args, **kwargs))

    def _run_epoch(self, *args, **kwargs):
        # Resumed from a run's last checkpoint, in the middle of an epoch, transformers would train a step too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._order is not None:
            # Where a resumed epoch skips batches and there are several processes, Accelerate does not reach the sampler.
            self._order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        # Skips the scheduler at the start of `train` alone; a resumed run was evaluated there before it was interrupted.
        if skip_scheduler and self.state.global_step > 0:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)

    def _finalize_training(self, trial, num_train_samples, start_time):
        # The summary is of the whole run, and so is its time.
        return super()._finalize_training(trial, num_train_samples, start_time - self._resumption.earlier_seconds)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # Evaluation sets given to `evaluate` are seen here first.
        checks.check_preference_dataset(dataset, f"the {dataset_name} dataset")
        given = dataset
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        checks.check_not_all_dropped(dataset, dataset_name, args.max_length)
        # A streamed set is seen row by row; `compute_loss` counts there.
        if isinstance(dataset, Dataset) and args.process_index == 0:
            message = checks.incomparable_message(
                checks.incomparable_rows(dataset, args.max_length, args.truncation_mode),
                name=dataset_name,
                total=len(given),
                dropped=len(given) - len(dataset),
                max_length=args.max_length,
                constrained=args.constraint != "none",
            )
            if message:
                warnings.warn(message, stacklevel=2)
        return dataset

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        # Asked for, and not found: sharded models cannot be probed before they are wrapped.
        packed = self._sharing.wanted is not False
        table = self.reference_tables.table(
            self, dataset, name, batch_size, packed=packed, as_dpo_trainer=not packed and self.args.constraint == "none"
        )
        return with_reference_logps(dataset, table.chosen_logps, table.rejected_logps)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """DPOTrainer's loss at the constraint's target margin, plus what the constraint adds.

        `mean_i ℓ(δ_θ,i; t_i) + mean_i added_i`, in nats. WPO weights and `loss_weights` act on the first term alone.
        Pairs that compare no two answers (`guards.comparable`) keep DPO's target, and nothing is added to them. Under
        `tokens_per_step` what is trained on is this times the pairs here over those of a mean micro-batch.

        Raises:
            FloatingPointError: in training, a log-probability or the loss is not finite (`guards.BatchCheck`).
            ValueError: on the first micro-batch of a run, the policy is not its reference (`guards.StartCheck`).
        """
        comparable = guards.comparable(inputs["input_ids"], inputs["completion_mask"])

        def target_of(pairs):
            return torch.where(comparable, self._constraint.target(pairs), pairs.ref_gap)

        result, pairs, target = observed_loss(
            self,
            super().compute_loss,
            model,
            inputs,
            forward=self._sharing.of(model),
            reduction=self.args.logps_reduction,
            target_of=target_of if self._constraint.moves_target else None,
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        loss, *outputs = result if return_outputs else (result,)
        added = self._constraint.added_loss(pairs, 0.0 if self._dual is None else self._dual.value)
        if added is not None:
            loss = loss + torch.where(comparable, added, 0.0).mean()
        check = self._count(pairs, target, comparable, loss, inputs)
        if self.model.training and isinstance(self._order, TokenBudget):
            loss = loss * (len(comparable) / self._order.mean_pairs)
        if self.model.training and check.sound and self._start_check.due(self.state.global_step):
            self._check_start(model, inputs, pairs)
        return (loss, *outputs) if return_outputs else loss

    def _get_train_sampler(self, train_dataset=None):
        if not self.args.balance_tokens:
            return super()._get_train_sampler(train_dataset)
        self._order = BalancedSampler(self._costs(train_dataset), micro_batch=self.args.train_batch_size, **self._dealing())
        return self._order

    def get_train_dataloader(self):
        """DPOTrainer's, or under `tokens_per_step` one whose micro-batches `TokenBudget` forms."""
        if self.args.tokens_per_step is None:
            return super().get_train_dataloader()
        self._order = TokenBudget(self._costs(), tokens=self.args.tokens_per_step, **self._dealing())
        if self._dual is not None:
            self._dual.mean_pairs = self._order.mean_pairs * self._order.micro_batches
        return train_dataloader(self, self._order)

    def _costs(self, train_dataset: Dataset | None = None) -> list[int]:
        """Tokens that every training pair costs."""
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

    def compute_ref_log_probs(self, model, inputs):
        """The reference's log-probabilities of a batch, through the packed forward where it is in use."""
        keep_trainable(model)  # a precomputed reference runs before the trainer is whole
        return super().compute_ref_log_probs(self._sharing.of(model), inputs)

    def _count(self, pairs, target, comparable, loss, inputs) -> guards.BatchCheck:
        pairs, training = pairs.detach(), self.model.training
        rows = per_pair(PairView(pairs, target, self._constraint.gamma))
        marks = torch.stack([comparable, loss.detach().expand(len(rows))], dim=1)
        # One gather for the metrics of each pair, the log-probabilities that they were made of, and what is checked.
        # Examples repeated to fill the last batch are trained on, so there they count.
        gather = self.accelerator.gather if training else self.accelerator.gather_for_metrics
        rows, logps, marks = gather(torch.cat([rows, pairs.rows(), marks], dim=1)).split([len(COLUMNS), 4, 2], dim=1)
        check = guards.BatchCheck.of(logps, *marks.unbind(dim=1))
        if training:
            self._stop_unless_sound(check, inputs)
        ledger, counted = self._ledgers["train" if training else "eval"], check.counted(rows)
        ledger.add(counted)
        ledger.left_out.update(check.left_out())
        if not training:
            self._evaluated.append(torch.cat([logps, marks[:, :1]], dim=1))
        elif self._dual is not None and len(counted):
            self._dual.observe(counted[:, COLUMNS[self._dual.rule.signal]])
        return check

    def _stop_unless_sound(self, check, inputs) -> None:
        self._unsound = 0 if check.sound else self._unsound + 1
        if check.sound or guards.is_patient(self._unsound, self.accelerator.mixed_precision, check):
            return
        raise FloatingPointError(
            guards.not_finite_message(
                check,
                step=self.state.global_step + 1,
                per_process=len(inputs["input_ids"]) // 2,
                beginning=guards.texts(inputs["input_ids"], inputs.get("attention_mask"), self.processing_class.decode),
                rank=self.accelerator.process_index,
            )
        )

    def _check_start(self, model, inputs, pairs) -> None:
        """Raises `ValueError`, on all processes, if the policy does not start at its reference."""
        mask, reduction = inputs["completion_mask"], self.args.logps_reduction
        apart = self.accelerator.gather(self._start_check.apart(pairs.detach(), mask, reduction))
        if not (apart > 1).any():
            return
        # Live dropout and noise on embeddings make the two differ in training alone.
        with guards.at_rest(model, self.ref_model):
            logps = policy_logps(self, self._sharing.of(model), inputs), reference_logps(self, inputs)
        pairs = PairLogps(*logps[0], *logps[1])
        apart = self.accelerator.gather(self._start_check.apart(pairs, mask, "sum"))
        if (apart > 1).any():
            causes = guards.causes_of_another_start(adapter=self._adapter, **how_the_reference_is_had(self))
            raise ValueError(self._start_check.message(apart, causes))

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._ledgers["eval"].clear()
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluated:
            logps, comparable = torch.cat(self._evaluated).cpu().split([4, 1], dim=1)
            self.evaluated_pairs[metric_key_prefix] = PairLogps.from_rows(logps)
            self.evaluated_comparable[metric_key_prefix] = comparable[:, 0].bool()
            self._evaluated = []
        # Under the set's own prefix: with several sets, DPOTrainer's metrics all come under "eval_".
        pairs = self._ledgers["eval"].count
        output.metrics.update(self._ledgers["eval"].flush(f"{metric_key_prefix}_"))
        output.metrics[f"{metric_key_prefix}_cpo/pairs"] = pairs
        if self._dual is not None and pairs:
            slack = self._dual.rule.epsilon - output.metrics[f"{metric_key_prefix}_cpo/{self._dual.rule.signal}"]
            output.metrics[f"{metric_key_prefix}_cpo/slack"] = slack
            output.metrics[f"{metric_key_prefix}_cpo/holds"] = float(slack >= 0)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # A training's log may come right after an evaluation, which leaves the model as it evaluates.
        if self.model.training or "loss" in logs:
            logs.update(self._ledgers["train"].flush())
            if self._dual is not None:
                logs.update(self._dual.flush())
        super().log(logs, start_time)
