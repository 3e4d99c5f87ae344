"""The multiplier λ of a constrained objective, updated once per optimizer step."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor
from transformers import TrainerCallback

from .constraints.dual_rule import DualRule

_EMPTY: dict[str, float] = {"violation": 0.0, "pairs": 0, "steps": 0, "held": 0}


class Multiplier:
    """λ, and the violations that it has not been updated by yet.

    `observe` takes the signal of each pair of a micro-batch, gathered over all processes, so that every process comes to
    the same λ; `step` updates it. The window counts what was seen since the last `flush`, for the log.
    """

    #: Said where a checkpoint that is resumed from holds no multiplier.
    starts_anew = "the multiplier starts from dual_init"

    def __init__(self, rule: DualRule, name: str = "cpo/"):
        self.rule = rule
        #: What its numbers are logged under.
        self.name = name
        #: Pairs of a mean step, where steps hold different numbers of pairs.
        self.mean_pairs: float | None = None
        self.reset()

    def reset(self) -> None:
        """Back to the start: λ is `rule.start`, and nothing was observed."""
        #: λ, in 1/nats.
        self.value = self.rule.start
        self._steps = 0
        self._seen: list[Tensor] = []
        self._window = dict(_EMPTY)

    def begin(self) -> None:
        """Start of training: drop violations left from a run interrupted mid-step."""
        self._seen = []

    def observe(self, signal: Tensor) -> None:
        """Takes the signal of the pairs trained on, (B,), of all processes; does not wait for the device."""
        self._seen.append(signal.detach())

    def step(self) -> None:
        """End of an optimizer step: moves λ by the mean over the pairs observed since the last one."""
        if not self._seen:
            return
        # float64 on the CPU, in the order seen: the same number on every process.
        values = [signal.cpu().double() for signal in self._seen]
        self._seen = []
        pairs, total = sum(map(len, values)), sum(value.sum().item() for value in values)
        violation = total / pairs
        if self._steps >= self.rule.warmup_steps:
            share = 1.0 if self.mean_pairs is None else pairs / self.mean_pairs
            self.value = self.rule.updated(self.value, violation, share)
        self._steps += 1
        window = self._window
        window["violation"] += total
        window["pairs"] += pairs
        window["steps"] += 1
        window["held"] += violation <= self.rule.epsilon

    def flush(self) -> dict[str, float]:
        """`lambda`, `slack` and `holds` of the window under `name`, which starts anew; empty if no step was made in it."""
        window, self._window = self._window, dict(_EMPTY)
        if not window["steps"]:
            return {}
        return {
            f"{self.name}lambda": self.value,
            f"{self.name}slack": self.rule.epsilon - window["violation"] / window["pairs"],
            f"{self.name}holds": window["held"] / window["steps"],
        }

    def state_dict(self) -> dict[str, float]:
        """All that the next step depends on, and the window, as plain numbers."""
        return {"multiplier": self.value, "dual_steps": self._steps, **self._window}

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
        self.value = float(state["multiplier"])
        self._steps = int(state["dual_steps"])
        self._seen = []
        self._window = {name: state[name] for name in self._window}


class Steps(Protocol):
    """What `DualAscent` steps."""

    def begin(self) -> None: ...

    def step(self) -> None: ...


class DualAscent(TrainerCallback):
    """Steps a `Multiplier`, or several as one, when the optimizer has stepped, before anything is logged or saved."""

    def __init__(self, multiplier: Steps):
        self._multiplier = multiplier

    def on_train_begin(self, args, state, control, **kwargs):
        self._multiplier.begin()

    def on_step_end(self, args, state, control, **kwargs):
        self._multiplier.step()
