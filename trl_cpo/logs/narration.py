"""The log in words: what training does to the two log-probabilities, and to the pairs in the undesirable region U."""

import math
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..units import UNITS

#: Below this, in nats, a mean log-probability counts as not moved: float rounding of another batching moves it this far.
_UNMOVED = 1e-3

_CHOSEN, _REJECTED = "cpo/chosen_logps_shift", "cpo/rejected_logps_shift"
_IN_U, _PREFERS = "cpo/in_undesirable_region", "cpo/prefers_chosen"
_NEEDED = (_CHOSEN, _REJECTED, _IN_U, _PREFERS)


def sentence(before: Mapping[str, Any] | None, after: Mapping[str, Any], unit: str = UNITS["sum"]) -> str | None:
    """What two logs say about displacement and U, in one line; None where `after` holds no pairs.

    For example: "both log-probs fall, chosen less (-4.6 and -40.8 nats per response); 7 % of pairs in U, down from 21 %; the
    policy prefers chosen on 52 %, up from 18 %".

    Args:
        before: an earlier log with the `cpo/*` metrics, for comparison, or None.
        after: the log to tell of; shifts are against the reference.
        unit: of the log-probabilities, one of `trl_cpo.units.UNITS`.
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
    # A run that diverged has other things to say than this.
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
    # A rounding must not say "none" or "all" where it is not so.
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
    """Prints the sentence at the first training log and at the end of training, from the first process alone.

    It keeps nothing: the logs it compares are the trainer's own history, which a resumed run has too.
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
        # Evaluations have the same names under their set's prefix.
        return [log for log in state.log_history if all(key in log for key in _NEEDED)]

    @staticmethod
    def _say(when: str, words: str | None) -> None:
        if words is not None:
            # Above the progress bar, where there is one.
            tqdm.write(f"[{when}] {words}")
