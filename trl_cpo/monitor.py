"""PairMonitor: what is seen of pairs and of the price, for any trainer."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .data.loading import to_conversational
from .data.reading import read_pairs
from .data.rows import first_pairs
from .faults import is_finite
from .files.atomic import write_json
from .files.masking import masked
from .files.outputs import next_free
from .files.run_files import LOG, METRICS, PAIRS, PRICE
from .logs.run_log import RunLog
from .logs.summary import before_after, gain_and_price
from .metrics import MetricLedger, PairView, per_pair
from .pairs import REDUCTIONS, PairLogps
from .price import FORMAT, Price, PriceMeter, in_words, meter_of
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
        trainer: Any,
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
        gamma = getattr(args, "gamma", 0.0) if gamma is None else gamma
        reduction = logps_reduction or getattr(args, "logps_reduction", "sum")
        if not isinstance(gamma, (int, float)) or not is_finite(gamma) or gamma < 0:
            raise ValueError(f"gamma must be a finite number ≥ 0 (nats); got {gamma!r}.")
        if reduction not in REDUCTIONS:
            raise ValueError(f"logps_reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
        self._folder = None if folder is None else Path(folder)
        self._watch: _Watch | None = None
        self._run: _RunFolder | None = None
        unable = unable_to_score(trainer)
        if unable is not None:
            warnings.warn(f"PairMonitor scores no pairs: {unable}. Training goes on without it.", stacklevel=2)
            return
        scorer = Scorer(
            max_length=getattr(args, "max_length", 1024) if max_length is None else max_length,
            truncation_mode=truncation_mode or getattr(args, "truncation_mode", None) or "keep_start",
            batch_size=batch_size,
            assistant_turns_only=getattr(args, "assistant_turns_only", False),
        )
        prepared = scorer.prepare(_read(pairs, split, max_pairs), trainer.processing_class, "monitored")
        live = LiveScorer(trainer, prepared, scorer)
        meter = None
        if price:
            meter = meter_of(
                trainer,
                pairs=prepared.dataset,
                prompts=price_prompts,
                max_new_tokens=price_tokens,
                share=price_share,
                text=price_text,
                from_start=True,
            )
        in_memory = not isinstance(pairs, (str, Path))
        self._about = {
            "dataset_name": "a dataset in memory" if in_memory else str(pairs),
            "split": "held out" if in_memory else split,
        }
        # Now, while the model is at its start; a training that is resumed has left it.
        self._watch = _Watch(trainer, live, meter, gamma, reduction, live.score(reduction))

    # Events

    def on_train_begin(self, args, state, control, **kwargs):
        if self._watch is None:
            return
        if self._folder is None:
            default = Path(args.output_dir) / "pairs"
            self._folder = default if state.global_step else next_free(default)
        self._run = _RunFolder(self._folder, self._watch, self._about)
        self._run.log.on_train_begin(args, state, control)
        if state.global_step == 0:
            self._run.look()

    def on_evaluate(self, args, state, control, **kwargs):
        if self._run is not None and not self._run.has(state.global_step):
            self._run.look(only_if_affordable=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._run is None or not logs or any(name.startswith(_PREFIX) for name in logs):
            return
        # A trainer of ours logs the same names of its own evaluation sets.
        others = {name: value for name, value in logs.items() if not (name.startswith("eval_") and "cpo/" in name)}
        if others and state.is_world_process_zero:
            self._run.log.append({"step": state.global_step, **others})

    def on_train_end(self, args, state, control, **kwargs):
        if self._run is None:
            return
        # The best model may have been loaded since the last step was looked at.
        if args.load_best_model_at_end or not self._run.has(state.global_step, priced=True):
            self._run.look()
        if state.is_world_process_zero:
            self._run.finish()


def _read(source: "str | Path | Dataset", split: str, count: int | None) -> "Dataset":
    if isinstance(source, (str, Path)):
        pairs, _ = read_pairs(str(source), split, number_as=ROW)
    else:
        pairs, _ = to_conversational(source.add_column(ROW, list(range(len(source)))))
    return first_pairs(pairs, count)


@dataclass(frozen=True)
class _Look:
    """What was seen at a step: metrics, the log-probabilities of every pair, and the price where it was measured."""

    step: int
    metrics: dict[str, float]
    pairs: PairLogps
    price: Price | None


@dataclass(frozen=True)
class _Watch:
    """Looks at a trainer's model, and tells its trackers; every process calls it.

    Attributes:
        reference: log-probabilities of the chosen and rejected answers at the start, (n,) each.
    """

    trainer: Any
    scorer: LiveScorer
    meter: PriceMeter | None
    gamma: float
    reduction: str
    reference: tuple[Tensor, Tensor]

    def look(self, only_if_affordable: bool = False) -> _Look:
        """Scores the pairs, and measures the price unless that is not affordable."""
        step = self.trainer.state.global_step
        chosen, rejected = self.reference if step == 0 else self.scorer.score(self.reduction)
        pairs = PairLogps(chosen, rejected, *self.reference)
        finite, degenerate = pairs.rows().isfinite().all(dim=1), self.scorer.degenerate
        counted = PairLogps.from_rows(pairs.rows()[finite & ~degenerate])
        ledger = MetricLedger()
        ledger.add(per_pair(PairView(counted, counted.ref_gap, self.gamma)))
        lost = {"nonfinite_pairs": int((~finite).sum()), "incomparable_pairs": int((finite & degenerate).sum())}
        ledger.left_out.update({name: count for name, count in lost.items() if count})
        metrics = {"cpo/pairs": ledger.count, **ledger.flush()}
        price = None
        if self.meter is not None and (not only_if_affordable or self.meter.affordable()):
            price = self.meter.measure(step)
            metrics |= price.metrics()
            if len(self.meter.measured) == 1 and self.trainer.is_world_process_zero():
                for reason in price.missing:
                    warnings.warn(reason, stacklevel=2)
        self._to_trackers(metrics)
        return _Look(step, metrics, pairs, price)

    def _to_trackers(self, metrics: Mapping[str, float]) -> None:
        # TRL's trainers add to a log what they have gathered in the mode that the model is in; nothing is gathered in this.
        model = self.trainer.model
        was, model.training = model.training, False
        try:
            self.trainer.log({f"{_PREFIX}{name}": value for name, value in metrics.items()})
        finally:
            model.training = was


class _RunFolder:
    """The run folder: the log as it grows, and at the end what `trl-cpo report` and `trl-cpo certify` read."""

    def __init__(self, folder: Path, watch: _Watch, about: Mapping[str, str]):
        self.folder, self.log = folder, RunLog(folder / LOG)
        self._watch, self._about = watch, about
        self._looks: dict[int, _Look] = {}

    def has(self, step: int, priced: bool = False) -> bool:
        """Whether this step was looked at; with `priced`, and its price measured, if there is to be one."""
        return step in self._looks and not (priced and self._watch.meter is not None and self._looks[step].price is None)

    def look(self, only_if_affordable: bool = False) -> None:
        """Looks, and writes it down; every process calls it."""
        look = self._watch.look(only_if_affordable)
        self._looks.pop(look.step, None)
        self._looks[look.step] = look
        if self._watch.trainer.is_world_process_zero():
            self.log.append({"step": look.step, **_as_evaluation(look)})
            prices = [each.price.to_dict() for each in self._looks.values() if each.price is not None]
            if prices:
                write_json(self.folder / PRICE, {"format": FORMAT, "measurements": prices})

    def finish(self) -> None:
        """Writes pairs.json and metrics.json of the last look, and prints the summary."""
        watch, trainer = self._watch, self._watch.trainer
        args, last = trainer.args, list(self._looks.values())[-1]
        before = _as_evaluation(self._looks[0]) if 0 in self._looks else None
        after = _as_evaluation(last)
        # The loss has a β and a target like ours only where it is DPO's.
        is_dpo = hasattr(args, "precompute_ref_log_probs") and getattr(args, "loss_type", None) in ("sigmoid", ["sigmoid"])
        constraint = getattr(args, "constraint", "none" if is_dpo else None)
        beta = getattr(args, "beta", None) if constraint is not None else None
        loss: dict[str, Any] = {"constraint": constraint, "beta": beta, "gamma": watch.gamma}
        document = pairs_document(
            last.pairs,
            degenerate=watch.scorer.degenerate,
            reduction=watch.reduction,
            split=self._about["split"],
            start_is_reference=True,
            tokens=(watch.scorer.tokens[0].tolist(), watch.scorer.tokens[1].tolist()),
            **loss,
        )
        record: dict[str, Any] = {
            "held_out_pairs": last.metrics["cpo/pairs"],
            "before": before,
            "after": after,
            "trainer": type(trainer).__name__,
            "pairs": {"dataset_name": self._about["dataset_name"]},
            "model": getattr(trainer.model.config, "_name_or_path", None),
            "seed": args.seed,
            "versions": versions(),
            "config": {**args.to_dict(), **loss, "logps_reduction": watch.reduction},
        }
        words = None
        if last.price is not None and watch.meter is not None:
            words = in_words(last.price.sets, watch.meter.before, last.price.damage)
            record["price"] = {"words": words, "damage": last.price.damage, "missing": last.price.missing}
        write_json(self.folder / PAIRS, document)
        write_json(self.folder / METRICS, masked(record))
        table = before_after(
            before,
            after,
            pairs=int(last.metrics["cpo/pairs"]),
            gamma=watch.gamma,
            reduction=watch.reduction,
            constraint=constraint or type(trainer).__name__,
        )
        sentence = gain_and_price(before, after, words)
        tqdm.write(f"\n{table}" + (f"\n\n{sentence}" if sentence else "") + f"\n\npairs    {self.folder}")


def _as_evaluation(look: _Look) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in look.metrics.items()}
