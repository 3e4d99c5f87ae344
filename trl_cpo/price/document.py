"""One measurement of the price, and how it is written: metrics for the log, a document for price.json."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FORMAT = 1
#: The sets of prompts that are measured: the pairs' own, and general ones that have nothing to do with them.
SETS = ("pairs", "general")
_RESAMPLES = 2000


@dataclass(frozen=True)
class AnswerRecord:
    """One prompt: its greedy answer, and a sampled one with its KL.

    Attributes:
        index: of the prompt in its set.
        prompt, greedy: as text.
        repeated, grams: 3-grams of the greedy answer that occurred in it before, and all.
        tokens, ended: length of the greedy answer, and whether it ended by itself.
        kl: KL to the reference summed over the sampled answer, nats.
        sampled_tokens: the sampled answer's length.
    """

    index: int
    prompt: str
    greedy: str
    repeated: int
    grams: int
    tokens: int
    ended: bool
    kl: float
    sampled_tokens: int


@dataclass(frozen=True)
class Estimate:
    """A value with a percentile bootstrap interval over prompts (95 %, fixed seed)."""

    value: float
    low: float
    high: float

    @classmethod
    def ratio(cls, tops: Sequence[float], bottoms: Sequence[float]) -> "Estimate":
        """`Σ tops / Σ bottoms` over prompts; 0 where the bottoms are."""
        top, bottom = np.asarray(tops, dtype=float), np.asarray(bottoms, dtype=float)
        drawn = np.random.default_rng(0).integers(len(top), size=(_RESAMPLES, len(top)))
        below = bottom[drawn].sum(1)
        values = np.divide(top[drawn].sum(1), below, out=np.zeros(_RESAMPLES), where=below > 0)
        low, high = np.quantile(values, [0.025, 0.975])
        value = top.sum() / bottom.sum() if bottom.sum() > 0 else 0.0
        return cls(float(value), float(low), float(high))

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class SetPrice:
    """The price on one set of prompts.

    Attributes:
        kl: nats per token, on the policy's samples: `Σ KL / Σ tokens` over prompts.
        kl_response: nats per response, of at most so many tokens as were sampled.
        repetition: share of 3-grams of greedy answers that occurred in the answer before.
        tokens: mean length of greedy answers.
        ended: share of greedy answers that ended by themselves.
        samples: prompt and greedy answer, as text.
    """

    prompts: int
    kl: Estimate
    kl_response: Estimate
    repetition: Estimate
    tokens: Estimate
    ended: Estimate
    samples: list[dict[str, str]]

    @classmethod
    def of(cls, records: Sequence[AnswerRecord]) -> "SetPrice":
        records, ones = sorted(records, key=lambda record: record.index), [1.0] * len(records)
        return cls(
            prompts=len(records),
            kl=Estimate.ratio([r.kl for r in records], [r.sampled_tokens for r in records]),
            kl_response=Estimate.ratio([r.kl for r in records], ones),
            repetition=Estimate.ratio([r.repeated for r in records], [r.grams for r in records]),
            tokens=Estimate.ratio([r.tokens for r in records], ones),
            ended=Estimate.ratio([r.ended for r in records], ones),
            samples=[{"prompt": r.prompt, "greedy": r.greedy} for r in records],
        )


@dataclass(frozen=True)
class Price:
    """What training did to the model, at one step.

    Attributes:
        step: the optimizer step.
        sets: by name, those of `SETS` that could be measured.
        nll: negative log-likelihood in nats per token, by name of the text: "chosen", held-out chosen answers; "text", a
            text of the user's.
        seconds: that the measurement took.
        missing: what was not measured, and why, a sentence each.
        damage: what is wrong with the model, a sentence each; empty where nothing is.
    """

    step: int
    sets: dict[str, SetPrice] = field(default_factory=dict)
    nll: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    missing: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """For the log: `cpo/kl` and others on the pairs' prompts, with `_general` on general ones."""
        found: dict[str, float] = {}
        for name, part in self.sets.items():
            ending = "" if name == "pairs" else f"_{name}"
            for key in ("kl", "kl_response", "repetition"):
                found[f"cpo/{key}{ending}"] = getattr(part, key).value
            found[f"cpo/answer_tokens{ending}"] = part.tokens.value
            found[f"cpo/answers_ended{ending}"] = part.ended.value
        found.update({f"cpo/{name}_nll": value for name, value in self.nll.items()})
        return found

    def to_dict(self) -> dict[str, Any]:
        """A measurement in price.json."""
        estimates = ("kl", "kl_response", "repetition", "tokens", "ended")
        sets = {
            name: {
                "prompts": part.prompts,
                **{key: getattr(part, key).to_dict() for key in estimates},
                "samples": part.samples,
            }
            for name, part in self.sets.items()
        }
        return {
            "step": self.step,
            "seconds": round(self.seconds, 2),
            "sets": sets,
            "nll": self.nll,
            "missing": self.missing,
            "damage": self.damage,
        }
