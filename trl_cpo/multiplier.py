"""The multiplier of a constrained objective: dual ascent on the violation, once per optimizer step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import TrainerCallback

#: What can drive the multiplier, metrics of `trl_cpo.metrics`: the mean hinge max(0, γ − δ_θ), nats, or the fraction of
#: pairs with δ_θ < γ. What is differentiated is the hinge in both cases.
SIGNALS = ("violation", "violation_rate")


@dataclass(frozen=True)
class DualRule:
    """How λ moves: `λ ← clip(λ + η (v − ε), 0, cap)`, v the mean of `signal` over all pairs of an optimizer step.

    ε (`epsilon`) and v are in nats for "violation" and fractions for "violation_rate"; λ, its start and its cap in 1/nats;
    η (`step_size`) in 1/nats per unit of v. No update is made in the first `warmup_steps` optimizer steps.
    """

    epsilon: float
    step_size: float
    cap: float
    start: float = 0.0
    warmup_steps: int = 0
    signal: str = "violation"

    def updated(self, multiplier: float, violation: float, share: float = 1.0) -> float:
        """λ after one step at a mean violation; a violation that is not finite leaves it as it is.

        `share` multiplies η: the pairs of the step over those of a mean step, where steps differ, so that every pair moves
        λ alike.
        """
        if self.step_size == 0.0 or not math.isfinite(violation):  # 0 · ∞ is no number
            return multiplier
        return min(max(multiplier + share * self.step_size * (violation - self.epsilon), 0.0), self.cap)


class DualState:
    """λ, and the violations that it has not been updated by yet.

    `observe` takes the signal of each pair of a micro-batch, gathered over all processes, so that every process comes to
    the same λ; `step` updates it. The rest counts for the log: the window is what was seen since the last `flush`.
    """

    #: Said where a checkpoint that is resumed from holds no multiplier.
    starts_anew = "the multiplier starts from dual_init"

    def __init__(self, rule: DualRule):
        self.rule = rule
        #: Pairs of a mean step, where steps hold different numbers of pairs.
        self.mean_pairs: float | None = None
        self.reset()

    def reset(self) -> None:
        """Back to the start: λ is `rule.start`, and nothing was observed."""
        #: λ, in 1/nats.
        self.multiplier = self.rule.start
        self._steps = 0
        self._seen: list[Tensor] = []
        self._window = {"violation": 0.0, "pairs": 0, "steps": 0, "held": 0}

    def begin(self) -> None:
        """Start of training: drop violations left from a run interrupted mid-step."""
        self._seen = []

    def observe(self, signal: Tensor) -> None:
        """Takes the signal of pairs that were trained on, (B,), of all processes; no wait for the device."""
        self._seen.append(signal.detach())

    def step(self) -> None:
        """Ends an optimizer step: moves λ by the mean over the pairs observed since the last one."""
        if not self._seen:
            return
        # float64 on the CPU, in the order seen: the same number on every process.
        values = [signal.cpu().double() for signal in self._seen]
        self._seen = []
        pairs = sum(len(value) for value in values)
        total = sum(value.sum().item() for value in values)
        violation = total / pairs
        if self._steps >= self.rule.warmup_steps:
            share = 1.0 if self.mean_pairs is None else pairs / self.mean_pairs
            self.multiplier = self.rule.updated(self.multiplier, violation, share)
        self._steps += 1
        window = self._window
        window["violation"] += total
        window["pairs"] += pairs
        window["steps"] += 1
        window["held"] += violation <= self.rule.epsilon

    def flush(self) -> dict[str, float]:
        """What is logged of the window, as `cpo/lambda`, `cpo/slack`, `cpo/holds`; empty if no step was made in it."""
        window, self._window = self._window, {"violation": 0.0, "pairs": 0, "steps": 0, "held": 0}
        if not window["steps"]:
            return {}
        return {
            "cpo/lambda": self.multiplier,
            "cpo/slack": self.rule.epsilon - window["violation"] / window["pairs"],
            "cpo/holds": window["held"] / window["steps"],
        }

    def state_dict(self) -> dict[str, float]:
        """All that the next step depends on, and the window, as plain numbers."""
        return {"multiplier": self.multiplier, "dual_steps": self._steps, **self._window}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes up what `state_dict` gave. Raises `ValueError` if a number is missing or λ lies outside [0, cap]."""
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"The saved state of the multiplier lacks {', '.join(missing)}. Resume from another checkpoint.")
        if not 0.0 <= state["multiplier"] <= self.rule.cap:
            raise ValueError(
                f"The saved multiplier is {state['multiplier']!r}, outside [0, {self.rule.cap:g}]. Raise dual_max to go on "
                "with it, or resume from another checkpoint."
            )
        self.multiplier = float(state["multiplier"])
        self._steps = int(state["dual_steps"])
        self._seen = []
        self._window = {name: state[name] for name in self._window}


class DualAscent(TrainerCallback):
    """Steps a `DualState` when the optimizer has stepped, before anything is logged or saved."""

    def __init__(self, dual: DualState):
        self._dual = dual

    def on_step_end(self, args, state, control, **kwargs):
        self._dual.step()
