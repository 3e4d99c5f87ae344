"""CPOConstrainedTrainer: DPOTrainer with a constraint on the preference gap."""

import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from .config import CPOConstrainedConfig
from .engine import DPOTrainer
from .engine.dpo_trainer import Carried
from .labels.bounds import FALLEN
from .labels.columns import LabelColumns
from .labels.form import LabelledForm, PairLabels, reach_metrics
from .labels.ledgers import GroupLedgers
from .logs.narration import Narrator
from .metrics import METRICS, PairView, per_pair
from .multiplier import DualAscent
from .price import Limit, PriceTracker, keeps_last_within

logger = logging.get_logger(__name__)


class CPOConstrainedTrainer(DPOTrainer):
    """
    Trainer for Constrained Preference Optimization: DPO with a constraint on the policy's own preference gap.

    DPO minimizes `−log σ(β(δ_θ − δ_ref))`, which rewards beating the reference. Where the reference prefers the rejected
    response, the loss can fall while the policy still prefers it too. This trainer moves the target, `−log σ(β(δ_θ − t))`,
    or adds a penalty on `max(0, γ − δ_θ)`; `args.constraint` selects which. With `constraint="none"` it is DPOTrainer,
    bit for bit.

    Method: [Conditional Equivalence of DPO and RLHF](https://huggingface.co/papers/2605.20834), ICML 2026. Not to be
    confused with `trl.experimental.cpo.CPOTrainer`, which is *Contrastive* Preference Optimization (arXiv 2401.08417).

    Takes the arguments of [`~trl.DPOTrainer`], with `args` a [`CPOConstrainedConfig`]. Raises the same errors as the
    engine's [`~trl_cpo.engine.DPOTrainer`].

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

    args: CPOConstrainedConfig
    config_class, run_suffix = CPOConstrainedConfig, "CPO"

    # Not "cpo", which is the tag of the contrastive method's models.
    _tag_names = ["trl", "dpo", "constrained-preference-optimization", "trl-cpo"]
    _name = "Constrained Preference Optimization"
    _paper = {
        "title": "Conditional Equivalence of DPO and RLHF: Implicit Assumption, Failure Modes, and Provable Alignment",
        "id": "2605.20834",
        "citation": textwrap.dedent("""\
            @inproceedings{yang2026conditional,
                title     = {{Conditional Equivalence of DPO and RLHF: Implicit Assumption, Failure Modes, and
                             Provable Alignment}},
                author    = {Zhiqin Yang and Yonggang Zhang and Wei Xue and Dong Fang and Bo Han and Yike Guo},
                year      = 2026,
                booktitle = {International Conference on Machine Learning},
                eprint    = {arXiv:2605.20834},
            }"""),
    }

    def set_up(self, args: CPOConstrainedConfig) -> list[TrainerCallback]:
        self._form = args.form
        self._limit = Limit()
        #: What training did to the model, by evaluation; None unless `args.price`.
        self.price: PriceTracker | None = None
        self.leaves_out_degenerate = f"The {'' if args.is_plain_dpo else 'constraint and the '}cpo/ metrics leave"
        self.warn_of(args.cautions(), args)
        follows = args.follows()
        if follows and args.process_index == 0:
            logger.warning_once(follows)  # no fault, so no Python warning
        return [Narrator(args.logps_reduction)] if args.narrate else []

    def data_given(self, args: CPOConstrainedConfig, datasets: Mapping[str, Any]) -> Carried:
        self._columns = columns = LabelColumns.of(args, datasets)
        if columns.fitted is not None and args.process_index == 0:
            logger.warning_once(str(columns.fitted))
        gammas = columns.gammas(args.gamma)
        # On the device for the loss, on the CPU for the metrics.
        self._gammas = {} if gammas is None else {each.type: gammas.to(each) for each in (torch.device("cpu"), args.device)}
        self._bounds = args.bounds(columns.groups, columns.epsilons())
        names = [*METRICS, *reach_metrics(self._form), *([] if args.chosen_floor is None else [FALLEN])]
        self._ledgers = {mode: GroupLedgers(names, columns.groups) for mode in ("train", "eval")}
        return Carried(columns.carried, [DualAscent(self._bounds)] if self._bounds.multipliers else [])

    def with_columns(self, dataset, name: str):
        return self._columns.attached(dataset, name)

    def constructed(self) -> None:
        if self.args.price:
            self.price = PriceTracker.of(self, self._limit)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """DPOTrainer's loss at the constraint's target margin, plus what the constraint and other bounds add.

        `mean_i ℓ(δ_θ,i; t_i) + mean_i added_i`, in nats. Degenerate pairs keep DPO's target and get nothing added.
        Raises the same errors as [`~trl_cpo.engine.DPOTrainer.guarded_loss`].
        """
        inputs, labels = self._columns.taken(inputs)
        form = self._labelled(labels)
        return self.guarded_loss(
            model,
            inputs,
            return_outputs,
            num_items_in_batch,
            reduction=self.args.logps_reduction,
            target_of=form.target if form.moves_target else None,
            added_loss=lambda pairs: self._bounds.added_loss(form, pairs),
            beside=labels.rows(),
        )

    def _labelled(self, labels: PairLabels) -> LabelledForm:
        gammas = None if labels.group is None else self._gammas.get(labels.group.device.type)
        return LabelledForm(self._form, labels, gammas, list(zip(self.loss_types, self.loss_weights, strict=True)))

    def on_batch(self, batch) -> None:
        pairs, targets = batch.counted()
        form = self._labelled(PairLabels.from_rows(batch.counted_beside(), self._columns.present))
        rows = self._bounds.metrics(form.metrics(per_pair(PairView(pairs, targets, form.gamma)), pairs), pairs)
        training = self.model.training
        self._ledgers["train" if training else "eval"].add(rows, form.labels.group, batch.left_out())
        self._bounds.observe(rows, form, training)

    def stateful(self):
        limit = {} if self.args.max_kl is None else {"max_kl": self._limit}
        return {**self._ledgers["train"].stateful(), **limit, **self._bounds.stateful()}

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        self._bounds.pairs_of_a_step(self.mean_pairs, self._columns.shares or {})
        return loader

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        ledger = self._ledgers["eval"]
        ledger.clear()
        self._bounds.begin_evaluation()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # With several sets, DPOTrainer logs all its metrics under "eval_"; ours go under the set's own prefix.
        prefix, counts = f"{metric_key_prefix}_", ledger.counts(f"{metric_key_prefix}_")
        output.metrics.update(ledger.flush(prefix) | {f"{prefix}cpo/pairs": 0} | counts)
        output.metrics.update(self._bounds.held(prefix))
        if self.price is not None:
            measured = self.price.at_evaluation(metric_key_prefix)
            output.metrics.update({f"{prefix}{name}": value for name, value in measured.items()})
        return output

    def _determine_best_metric(self, metrics, trial):
        if self.price is not None and not self.price.within(metrics):
            return False
        if not keeps_last_within(self.args):
            return super()._determine_best_metric(metrics, trial)
        self.state.best_global_step = self.state.global_step
        return True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # A training log may follow an evaluation, which leaves the model in evaluation mode.
        if self.model.training or "loss" in logs:
            ledgers = self._ledgers["train"]
            counts = ledgers.counts()
            logs.update(ledgers.flush() | counts | self._bounds.flush())
        super().log(logs, start_time)
