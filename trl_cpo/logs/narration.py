"""The log in words: how training moves the two log-probabilities, and the share of pairs in the undesirable region U."""

import math
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..units import UNITS

#: A mean log-probability that moved by less than this, in nats, counts as unmoved: rebatching alone can cause that much
#: rounding.
_UNMOVED = 1e-3

_CHOSEN, _REJECTED = "cpo/chosen_logps_shift", "cpo/rejected_logps_shift"
_IN_U, _PREFERS = "cpo/in_undesirable_region", "cpo/prefers_chosen"
_NEEDED = (_CHOSEN, _REJECTED, _IN_U, _PREFERS)


def sentence(before: Mapping[str, Any] | None, after: Mapping[str, Any], unit: str = UNITS["sum"]) -> str | None:
    """One line about displacement and U, from one or two logs; None if `after` holds no pairs.

    For example: "both log-probs fall, chosen less (-4.6 and -40.8 nats per response); 7 % of pairs in U, down from 21 %; the
    policy prefers chosen on 52 %, up from 18 %".

    Args:
        before: an earlier log with the `cpo/*` metrics, for comparison, or None.
        after: the log to describe; shifts are relative to the reference.
        unit: unit of the log-probabilities, one of `trl_cpo.units.UNITS`.
    """
    if not _told(after):
        return None
    earlier = before if before is not None and _told(before) else {}
    fractions = (
        f"{_percent(after[_IN_U])} of pairs in U{_than(after[_IN_U], earlier.get(_IN_U))}; "
        f"the policy prefers chosen on {_percent(after[_PREFERS])}{_than(after[_PREFERS], earlier.get(_PREFERS))}"
    )
    return f"{_displacement(after[_CHOSEN], after[_REJECTED], unit)}; {fractions}"


def _told(log: Mapping[str, Any]) -> bool:
    # Not for a run that diverged: its metrics may be missing or not finite.
    return all(key in log and math.isfinite(log[key]) for key in _NEEDED)


def _displacement(chosen: float, rejected: float, unit: str) -> str:
    moved = {side: shift for side, shift in (("chosen", chosen), ("rejected", rejected)) if abs(shift) >= _UNMOVED}
    if not moved:
        return f"neither log-prob has moved by {_UNMOVED:g} {unit}"
    ways = {side: "rises" if shift > 0 else "falls" for side, shift in moved.items()}
    if len(moved) == 1:
        (side, way), other = *ways.items(), "rejected" if "chosen" in moved else "chosen"
        words = f"{side} log-prob {way}, {other} stays"
    elif len(set(ways.values())) == 2:
        words = f"chosen log-prob {ways['chosen']}, rejected {ways['rejected']}"
    else:
        amounts = f"{abs(chosen):.3g}", f"{abs(rejected):.3g}"
        how = "as far" if amounts[0] == amounts[1] else "less" if abs(chosen) < abs(rejected) else "more"
        words = f"both log-probs {'rise' if chosen > 0 else 'fall'}, chosen {how}"
    return f"{words} ({chosen:+.3g} and {rejected:+.3g} {unit})"


def _percent(fraction: float) -> str:
    # Rounding must not turn "a few" into 0 %, or "nearly all" into 100 %.
    if 0 < fraction < 0.005:
        return "under 1 %"
    if 0.995 < fraction < 1:
        return "over 99 %"
    return f"{100 * fraction:.0f} %"


def _than(now: float, before: float | None) -> str:
    if before is None:
        return ""
    if _percent(now) == _percent(before):
        return ", as before"
    return f", {'up' if now > before else 'down'} from {_percent(before)}"


class Narrator(TrainerCallback):
    """Prints the sentence at the first training log and at the end of training, on process 0.

    It has no state: it compares logs of the trainer's own history, which a resumed run has too.
    """

    def __init__(self, reduction: str):
        self._unit = UNITS[reduction]

    def on_log(self, args, state, control, logs=None, **kwargs):
        told = self._training_logs(state)
        if logs and state.is_world_process_zero and len(told) == 1 and all(key in logs for key in _NEEDED):
            self._say(f"first log, step {state.global_step}", sentence(None, told[0], self._unit))

    def on_train_end(self, args, state, control, **kwargs):
        told = self._training_logs(state)
        if state.is_world_process_zero and len(told) > 1:
            self._say(f"end, step {state.global_step}", sentence(told[0], told[-1], self._unit))

    @staticmethod
    def _training_logs(state) -> list[dict[str, Any]]:
        # Evaluation logs have prefixed names, so they do not match.
        return [log for log in state.log_history if all(key in log for key in _NEEDED)]

    @staticmethod
    def _say(when: str, words: str | None) -> None:
        if words is not None:
            # tqdm.write prints above a progress bar, if there is one.
            tqdm.write(f"[{when}] {words}")
