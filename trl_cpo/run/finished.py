"""What a finished run leaves beside its model: pairs.json, metrics.json, the model card, and the summary that is printed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..decisions import in_words
from ..files.atomic import write_json
from ..files.masking import masked
from ..files.run_files import METRICS, PAIRS
from ..logs.summary import before_after, gain_and_price
from .card import add_results
from .length import by_length
from .length import in_words as length_in_words
from .pair_columns import answer_tokens, slice_columns
from .record import pairs_document, versions


@dataclass(frozen=True)
class Finished:
    """A run that has trained and evaluated; process 0 writes it down.

    Attributes:
        options, args, policy: the run's options.
        trainer: its trainer.
        before, after: the first and the last evaluation; before may be None.
        decisions: what `trl_cpo.decisions` counted, where rows list their options.
        data: by split, the report on rows refused.
        trained_on: how many pairs were trained on, or "streamed".
        learned: which pairs were trained on.
        split: of the held-out pairs.
    """

    options: Any
    args: Any
    policy: Any
    trainer: Any
    before: Mapping[str, float] | None
    after: Mapping[str, float]
    decisions: Mapping[str, Any] | None
    data: Mapping[str, Any]
    trained_on: int | str
    learned: Mapping[str, Any]
    split: str

    def write(self, folder: Path, seconds: float) -> str:
        """Writes everything into the run's folder, and returns the summary.

        Args:
            seconds: that the run took.
        """
        args, price = self.args, None if self.trainer.price is None else self.trainer.price.summary(seconds)
        sentence = None if price is None else gain_and_price(self.before, self.after, price["words"])
        table = before_after(
            self.before,
            self.after,
            pairs=int(self.after["eval_cpo/pairs"]),
            gamma=args.gamma,
            reduction=args.logps_reduction,
            constraint=args.constraint,
        )
        if self.decisions is not None:
            table += f"\n\n{in_words(self.decisions)}"
        pairs = self._pairs()
        write_json(folder / PAIRS, pairs)
        length = by_length(pairs)
        if length is not None:
            table += f"\n{length_in_words(length)}"
        loss = {name: getattr(args, name) for name in ("gamma", "beta", "logps_reduction", "learning_rate")}
        about = {
            "base model": self.policy.model_name_or_path,
            "pairs": self.options.dataset_name,
            "constraint": args.constraint,
            **loss,
        }
        add_results(folder / "README.md", settings=masked(about), table=table, sentence=sentence)
        # Last, so that a folder with a metrics.json is a finished run.
        write_json(folder / METRICS, masked(self._record(price, length, seconds)))
        left_out = self.learned["trained_on_left_out"]
        return "\n".join(
            [
                table,
                *([f"{left_out} evaluation pairs were trained on, and are not counted"] if left_out else []),
                *(["", sentence, f"Measuring the price took {price['seconds']:.0f} s."] if sentence and price else []),
            ]
        )

    def _pairs(self) -> dict[str, Any]:
        args, trainer = self.args, self.trainer
        return pairs_document(
            trainer.evaluated_pairs["eval"],
            degenerate=trainer.evaluated_degenerate["eval"],
            reduction=args.logps_reduction,
            gamma=args.gamma,
            beta=args.beta,
            constraint=args.constraint,
            split=self.split,
            # No reference is given here, so it is the policy at the start, unless it has followed the policy since.
            start_is_reference=not args.sync_ref_model,
            trained_on=self.learned["trained_on_left_out"],
            tokens=answer_tokens(trainer.eval_dataset, args.max_length, args.truncation_mode),
            slices=slice_columns(trainer.eval_dataset),
        )

    def _record(self, price: Mapping[str, Any] | None, length: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
        return {
            "held_out_pairs": self.after["eval_cpo/pairs"],
            "before": self.before,
            "after": self.after,
            **({} if price is None else {"price": price}),
            **({} if length is None else {"length": length}),
            **({} if self.decisions is None else {"decisions": self.decisions}),
            "seconds": round(seconds, 1),
            "data": {split: report.to_dict() for split, report in self.data.items() if report is not None},
            "pairs": {"dataset_name": self.options.dataset_name, "trained_on": self.trained_on, **self.learned},
            "model": self.policy.model_name_or_path,
            "seed": self.args.seed,
            "versions": versions(),
            # As text, an infinite option can be read back; JSON has no number for it.
            # What was looked at before is in `before`, also of a run that was resumed.
            "config": {
                name: str(value) if value in (math.inf, -math.inf) else value
                for name, value in self.args.to_dict().items()
                if name != "eval_on_start"
            },
        }
