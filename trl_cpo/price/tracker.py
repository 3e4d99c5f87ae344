"""The price in a trainer's evaluations: when it is measured, what is said of it, its file, and the limit `max_kl`."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files.atomic import write_json
from ..files.outputs import next_free
from ..files.run_files import PRICE
from .damage import in_words
from .document import FORMAT, Price
from .fields import LIMITED
from .meter import PriceMeter
from .of_trainer import meter_of


class Limit:
    """Whether a run went beyond `max_kl`; kept in checkpoints, so that a resumed run knows that it is over."""

    starts_anew = ""

    def __init__(self):
        self.beyond = False

    @property
    def ended(self) -> bool:
        return self.beyond

    def begin(self) -> None:
        pass

    def reset(self) -> None:
        self.beyond = False

    def state_dict(self) -> dict[str, Any]:
        return {"beyond": self.beyond}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state.get("beyond"), bool):
            raise ValueError(f"beyond must be true or false; got {state.get('beyond')!r}")
        self.beyond = state["beyond"]


class PriceTracker:
    """Measures at a trainer's evaluations, tells it, and keeps the file price.json in its output folder.

    Args:
        trainer: whose state and arguments are read.
        meter: of its model.
        max_kl: nats per token on general prompts; None: no limit.
        limit: where it is noted that the limit was passed.
        narrate: whether to tell each measurement in a line of words.
    """

    @classmethod
    def of(cls, trainer: Any, limit: Limit) -> "PriceTracker":
        """By the trainer's own arguments, on the first of its evaluation sets.

        Raises:
            ValueError: there is a limit, and nothing that could be held against it.
        """
        args, sets = trainer.args, trainer.eval_dataset
        name = next(iter(sets), None) if isinstance(sets, Mapping) else None
        meter = meter_of(
            trainer,
            pairs=sets if name is None else sets[name],
            prompts=args.price_prompts,
            max_new_tokens=args.price_tokens,
            share=args.price_share,
            text=args.price_text,
        )
        if args.max_kl is not None and meter.unable is not None:
            raise ValueError(f"max_kl={args.max_kl:g} would never act: {meter.unable} Leave max_kl out.")
        tracker = cls(trainer, meter, max_kl=args.max_kl, limit=limit, narrate=args.narrate)
        tracker.prefix = "eval" if name is None else f"eval_{name}"
        return tracker

    def __init__(self, trainer: Any, meter: PriceMeter, *, max_kl: float | None, limit: Limit, narrate: bool):
        self._trainer, self.meter, self._max_kl, self._limit, self._narrate = trainer, meter, max_kl, limit, narrate
        self._written: list[dict[str, Any]] | None = None
        self._told_missing: set[str] = set()
        #: The metric prefix of the evaluation set whose evaluations are measured.
        self.prefix = "eval"

    def at_evaluation(self, prefix: str) -> dict[str, float]:
        """Measures if it is due, and gives the metrics; every process calls it."""
        if prefix != self.prefix:
            return {}
        step, training = self._trainer.state.global_step, self._trainer.is_in_train
        if training and step and self._max_kl is None and not self.meter.affordable():
            return {}
        price = self.meter.measure(step)
        if self._trainer.is_world_process_zero():
            self._write(price)
            self._tell(price)
        if training and self._max_kl is not None:
            self._hold(price)
        return price.metrics()

    def summary(self, seconds: float) -> dict[str, Any]:
        """For metrics.json: the last measurement in words, what is wrong, and what all measurements took.

        Args:
            seconds: that the run took.
        """
        last = self.meter.measured[-1] if self.meter.measured else Price(self._trainer.state.global_step)
        return {
            "words": in_words(last.sets, self.meter.before, last.damage),
            "damage": last.damage,
            "missing": last.missing,
            "seconds": round(self.meter.seconds, 1),
            "share": round(self.meter.seconds / max(seconds, 1e-9), 3),
        }

    def within(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation found the policy within `max_kl`."""
        found = [value for name, value in metrics.items() if name.endswith(LIMITED)]
        return self._max_kl is None or (bool(found) and found[0] <= self._max_kl)

    def _hold(self, price: Price) -> None:
        kl = price.metrics().get(LIMITED)
        if kl is None or self._max_kl is None or kl <= self._max_kl:
            return
        self._limit.beyond = self._trainer.control.should_training_stop = True
        kept = self._trainer.state.best_model_checkpoint
        what = f"{Path(kept).name} is loaded" if kept else "no checkpoint was within it, so this model is what is left"
        self._say(
            price.step,
            f"{kl:.3g} nats a token on general prompts is beyond max_kl = {self._max_kl:g}: training stops, and {what}",
        )

    def _tell(self, price: Price) -> None:
        for reason in price.missing:
            if reason not in self._told_missing:
                self._told_missing.add(reason)
                warnings.warn(reason, stacklevel=2)
        words = in_words(price.sets, self.meter.before, price.damage)
        if words is not None and self._narrate and price.step:
            self._say(price.step, words)

    def _say(self, step: int, words: str) -> None:
        if self._trainer.is_world_process_zero():
            tqdm.write(f"[price, step {step}] {words}")

    def _write(self, price: Price) -> None:
        folder = Path(self._trainer.args.output_dir)
        if self._written is None:
            self._written = self._earlier(folder / PRICE, price.step)
        # A measurement of a step replaces the earlier one.
        self._written = [*(each for each in self._written if each["step"] != price.step), price.to_dict()]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PRICE, {"format": FORMAT, "measurements": self._written})

    @staticmethod
    def _earlier(file: Path, step: int) -> list[dict[str, Any]]:
        """What the file holds of the run that is resumed; another run's file is moved aside."""
        if not file.exists():
            return []
        if step:
            try:
                kept = json.loads(file.read_text(encoding="utf-8"))["measurements"]
                return [each for each in kept if each["step"] <= step]
            except (OSError, ValueError, LookupError, TypeError):
                pass
        file.rename(next_free(file.with_name(f"earlier-{file.name}")))
        return []
