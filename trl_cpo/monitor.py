"""PairMonitor: what is seen of pairs and of the price, for any trainer."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from .data.loading import to_conversational
from .data.reading import first_pairs, read_pairs
from .faults import is_finite
from .files.atomic import write_json
from .files.outputs import next_free
from .files.run_files import LOG, METRICS, PAIRS, PRICE
from .logs.run_log import RunLog
from .logs.summary import before_after, gain_and_price
from .metrics import MetricLedger, PairView, per_pair
from .pairs import REDUCTIONS, PairLogps
from .price import FORMAT, Price, in_words, meter_of
from .run.record import pairs_document, versions
from .scoring.live import LiveScorer, unable_to_score
from .scoring.scorer import ROW, Scorer

if TYPE_CHECKING:
    from datasets import Dataset

#: How the trainer's own trackers know these metrics from those of its evaluation sets.
_PREFIX = "eval_pairs_"


class PairMonitor(TrainerCallback):
    """
    Callback that follows held-out preference pairs through any training of a causal language model.

    At the start, at each evaluation and at the end it scores the pairs and measures the price. It logs `cpo/*` to the
    trainer's own trackers (as `eval_pairs_cpo/*`), and writes a run folder that `trl-cpo report` and `trl-cpo certify` read.
    The reference is the model at the start; there is no second model. Weights and random states are not changed.

    Works with stock [`~trl.DPOTrainer`] and any of its losses, TRL's SFT, KTO and ORPO trainers, transformers' own, and
    [`CPOConstrainedTrainer`]. Whatever cannot be measured is said in a warning; training goes on.

    Args:
        trainer: before `train` is called, so that its model is at its start.
        pairs: held-out pairs: a source that the command line takes, or a dataset in TRL's form or HH-RLHF's.
        split: of a source.
        folder: where the run folder goes; by default `pairs`, numbered if taken, in the trainer's output folder.
        gamma: γ in nats, for violations; by default the trainer's own `gamma`, else 0.
        logps_reduction: "sum" or "mean"; by default the trainer's own, else "sum".
        max_length, truncation_mode: how pairs are cut; by default as the trainer cuts its own.
        max_pairs: score the first so many pairs only.
        batch_size: pairs a forward.
        price: whether to measure the price.
        price_prompts, price_tokens, price_share, price_text: as in [`CPOConstrainedConfig`].

    Raises:
        SourceError: the pairs cannot be read or used.
        ValueError: an option is not allowed, or the pairs or the tokenizer lack something.

    Example:

    ```python
    >>> trainer = DPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", train_dataset=dataset)
    >>> trainer.add_callback(PairMonitor(trainer, "held-out.jsonl", split="train"))
    >>> trainer.train()
    ```
    """

    def __init__(
        self,
        trainer: Trainer,
        pairs: "str | Path | Dataset",
        *,
        split: str = "test",
        folder: str | Path | None = None,
        gamma: float | None = None,
        logps_reduction: str | None = None,
        max_length: int | None = None,
        truncation_mode: str | None = None,
        max_pairs: int | None = 1000,
        batch_size: int = 8,
        price: bool = True,
        price_prompts: int = 16,
        price_tokens: int = 48,
        price_share: float = 0.1,
        price_text: str | None = None,
    ):
        args = trainer.args
        self._trainer, self._source, self._split = trainer, pairs, split
        self._gamma = getattr(args, "gamma", 0.0) if gamma is None else gamma
        self._reduction = logps_reduction or getattr(args, "logps_reduction", "sum")
        if not isinstance(self._gamma, (int, float)) or not is_finite(self._gamma) or self._gamma < 0:
            raise ValueError(f"gamma must be a finite number ≥ 0 (nats); got {self._gamma!r}.")
        if self._reduction not in REDUCTIONS:
            raise ValueError(f"logps_reduction must be one of {', '.join(REDUCTIONS)}; got {self._reduction!r}.")
        self._folder = None if folder is None else Path(folder)
        self._log: RunLog | None = None
        self._before: dict[str, float] | None = None
        self._prices: list[dict[str, Any]] = []
        self._at: int | None = None
        self._seen: tuple[dict[str, float], PairLogps] | None = None
        self._scorer = self._meter = self._reference = None
        unable = unable_to_score(trainer)
        if unable is not None:
            warnings.warn(f"PairMonitor scores no pairs: {unable}. Training goes on without it.", stacklevel=2)
            return
        scorer = Scorer(
            max_length=getattr(args, "max_length", 1024) if max_length is None else max_length,
            truncation_mode=truncation_mode or getattr(args, "truncation_mode", "keep_start"),
            batch_size=batch_size,
        )
        prepared = scorer.prepare(self._read(max_pairs), trainer.processing_class, "monitored")
        self._scorer = LiveScorer(trainer, prepared, scorer)
        # Now, while the model is at its start; a training that is resumed has left it.
        self._reference = self._scorer.score(self._reduction)
        if price:
            self._meter = meter_of(
                trainer,
                pairs=prepared.dataset,
                prompts=price_prompts,
                max_new_tokens=price_tokens,
                share=price_share,
                text=price_text,
                from_start=True,
            )

    def _read(self, count: int | None) -> "Dataset":
        if isinstance(self._source, (str, Path)):
            pairs, _ = read_pairs(str(self._source), self._split, number_as=ROW)
        else:
            numbered = self._source.add_column(ROW, list(range(len(self._source))))
            pairs, _ = to_conversational(numbered)
        return first_pairs(pairs, count)

    # Events

    def on_train_begin(self, args, state, control, **kwargs):
        if self._scorer is None:
            return
        if self._folder is None:
            default = Path(args.output_dir) / "pairs"
            self._folder = default if state.global_step else next_free(default)
        self._log = RunLog(self._folder / LOG)
        self._log.on_train_begin(args, state, control)
        if state.global_step == 0:
            self._look()

    def on_evaluate(self, args, state, control, **kwargs):
        if self._log is not None and state.global_step != self._at:
            self._look()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._log is None or not logs or any(name.startswith(_PREFIX) for name in logs):
            return
        # A trainer of ours logs the same names of its own evaluation sets.
        others = {name: value for name, value in logs.items() if not (name.startswith("eval_") and "cpo/" in name)}
        if others and state.is_world_process_zero:
            self._log.append({"step": state.global_step, **others})

    def on_train_end(self, args, state, control, **kwargs):
        if self._log is None:
            return
        priced = self._meter is None or (self._meter.measured and self._meter.measured[-1].step == state.global_step)
        # The best model may have been loaded since the last step was looked at.
        known = self._seen is not None and self._at == state.global_step and priced and not args.load_best_model_at_end
        after, pairs = self._seen if known else self._look(last=True)
        if state.is_world_process_zero:
            self._write(after, pairs)

    # What is seen

    def _look(self, last: bool = False) -> tuple[dict[str, float], PairLogps]:
        """Scores and measures, and logs it; every process calls it."""
        step = self._at = self._trainer.state.global_step
        chosen, rejected = self._reference if step == 0 else self._scorer.score(self._reduction)
        pairs = PairLogps(chosen, rejected, *self._reference)
        counted = ~self._scorer.degenerate & pairs.rows().isfinite().all(dim=1)
        ledger = MetricLedger()
        kept = PairLogps.from_rows(pairs.rows()[counted])
        ledger.add(per_pair(PairView(kept, kept.ref_gap, self._gamma)))
        lost = {
            "nonfinite_pairs": int((~pairs.rows().isfinite().all(dim=1)).sum()),
            "incomparable_pairs": int(self._scorer.degenerate.sum()),
        }
        ledger.left_out.update({name: count for name, count in lost.items() if count})
        count, metrics = ledger.count, ledger.flush()
        metrics["cpo/pairs"] = count
        if self._meter is not None and (last or step == 0 or self._meter.affordable()):
            price = self._meter.measure(step)
            metrics |= price.metrics()
            self._tell(price)
            self._prices = [*(each for each in self._prices if each["step"] != step), price.to_dict()]
        if step == 0:
            self._before = {f"eval_{name}": value for name, value in metrics.items()}
        if self._trainer.is_world_process_zero():
            self._log.append({"step": step, **{f"eval_{name}": value for name, value in metrics.items()}})
            if self._prices:
                write_json(self._folder / PRICE, {"format": FORMAT, "measurements": self._prices})
        self._to_trackers(metrics)
        self._seen = {f"eval_{name}": value for name, value in metrics.items()}, pairs
        return self._seen

    def _to_trackers(self, metrics: Mapping[str, float]) -> None:
        # TRL's trainers add to a log what they have gathered in the mode that the model is in; nothing is gathered in this.
        model = self._trainer.model
        was, model.training = model.training, False
        try:
            self._trainer.log({f"{_PREFIX}{name}": value for name, value in metrics.items()})
        finally:
            model.training = was

    def _tell(self, price: Price) -> None:
        if self._trainer.is_world_process_zero() and len(self._meter.measured) == 1:
            for reason in price.missing:
                warnings.warn(reason, stacklevel=2)

    def _write(self, after: dict[str, float], pairs: PairLogps) -> None:
        args, model = self._trainer.args, self._trainer.model
        losses = getattr(args, "loss_type", None)
        is_dpo = hasattr(args, "precompute_ref_log_probs") and losses in ("sigmoid", ["sigmoid"])
        constraint = getattr(args, "constraint", "none" if is_dpo else None)
        beta = getattr(args, "beta", None) if constraint is not None else None
        about = {"constraint": constraint, "beta": beta, "gamma": self._gamma, "logps_reduction": self._reduction}
        source = str(self._source) if isinstance(self._source, (str, Path)) else "a dataset in memory"
        document = pairs_document(
            pairs,
            degenerate=self._scorer.degenerate,
            reduction=self._reduction,
            gamma=self._gamma,
            beta=beta,
            constraint=constraint,
            split=self._split if source != "a dataset in memory" else "held out",
            start_is_reference=True,
            tokens=self._scorer.tokens,
        )
        record: dict[str, Any] = {
            "held_out_pairs": after["eval_cpo/pairs"],
            "before": self._before,
            "after": after,
            "trainer": type(self._trainer).__name__,
            "pairs": {"dataset_name": source},
            "model": getattr(model.config, "_name_or_path", None),
            "seed": args.seed,
            "versions": versions(),
            "config": {**args.to_dict(), **about},
        }
        words = None
        if self._meter is not None and self._meter.measured:
            price = self._meter.measured[-1]
            words = in_words(price.sets, self._meter.before, price.damage)
            record["price"] = {"words": words, "damage": price.damage, "missing": price.missing}
        write_json(self._folder / PAIRS, document)
        write_json(self._folder / METRICS, record)
        table = before_after(
            self._before,
            after,
            pairs=after["eval_cpo/pairs"],
            gamma=self._gamma,
            reduction=self._reduction,
            constraint=constraint or type(self._trainer).__name__,
        )
        sentence = gain_and_price(self._before, after, words)
        tqdm.write(f"\n{table}" + (f"\n\n{sentence}" if sentence else "") + f"\n\npairs    {self._folder}")
