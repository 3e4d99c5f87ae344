"""The log in words: how training moves the two log-probabilities, and the share of pairs in the undesirable region U."""

import math
import re
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..quoting import quoted
from ..units import UNITS

#: A mean log-probability that moved by less than this, in nats, counts as unmoved: rebatching alone can cause that much
#: rounding.
_UNMOVED = 1e-3

_CHOSEN, _REJECTED = "cpo/chosen_logps_shift", "cpo/rejected_logps_shift"
_IN_U, _PREFERS = "cpo/in_undesirable_region", "cpo/prefers_chosen"
_NEEDED, _PAIRS = (_CHOSEN, _REJECTED, _IN_U, _PREFERS), "cpo/pairs"


def sentence(
    before: Mapping[str, Any] | None, after: Mapping[str, Any], unit: str = UNITS["sum"], prefix: str | None = None
) -> str | None:
    """One line about displacement and U, from one or two logs; None if `after` holds no pairs.

    Two evaluations are over the same pairs, and are compared: "both log-probs fall, chosen less (-4.6 and -40.8 nats per
    response); 7 % of 60 held-out pairs in U, down from 21 %; the policy prefers chosen on 52 %, up from 18 %". Where the
    first is of the reference itself, which has no pair in U, the share in U stands alone. Two training logs are over
    different pairs, and stand side by side: "…; 75 % of 4 training pairs in U, 0 % of 4 others in the first log; …".

    With groups, the one that is furthest from its bound, or from its γ where there is no bound, follows: "…; of 3 groups,
    harmless is furthest from its bound (slack -0.31)".

    Args:
        before: an earlier log with the `cpo/*` metrics, for comparison, or None.
        after: the log to describe; shifts are relative to the reference.
        unit: unit of the log-probabilities, one of `trl_cpo.units.UNITS`.
        prefix: of the metrics' names in evaluations of held-out pairs, such as "eval_"; None: training logs.
    """
    now = _metrics(after, prefix or "")
    if now is None:
        return None
    earlier = None if before is None else _metrics(before, prefix or "")
    if prefix is None:
        said = f"{_share(_IN_U, now, 'training pairs')} in U"
        if earlier is not None:
            said += f", {_share(_IN_U, earlier, 'others')} in the first log"
        said += f"; the policy prefers chosen on {_percent(now[_PREFERS])}"
        if earlier is not None:
            said += f", and on {_percent(earlier[_PREFERS])} in the first log"
    else:
        than = dict.fromkeys((_IN_U, _PREFERS), "")
        if earlier is not None and earlier.get(_PAIRS) == now.get(_PAIRS):
            than = {name: _than(now[name], earlier[name]) for name in than}
            if max(abs(earlier[_CHOSEN]), abs(earlier[_REJECTED])) < _UNMOVED:
                than[_IN_U] = ""  # no pair of a policy that is its reference is in U
        said = f"{_share(_IN_U, now, 'held-out pairs')} in U{than[_IN_U]}; "
        said += f"the policy prefers chosen on {_percent(now[_PREFERS])}{than[_PREFERS]}"
    return f"{_displacement(now[_CHOSEN], now[_REJECTED], unit)}; {said}{_furthest_group(after, prefix or '', unit)}"


def _metrics(log: Mapping[str, Any], prefix: str) -> dict[str, float] | None:
    """The metrics that the sentence is made of. None for a run that diverged: they may be missing or not finite."""
    found = {name: log[prefix + name] for name in (*_NEEDED, _PAIRS) if prefix + name in log}
    return found if all(name in found and math.isfinite(found[name]) for name in _NEEDED) else None


def _share(name: str, metrics: Mapping[str, float], of: str) -> str:
    # A log of an earlier version does not say how many.
    return f"{_percent(metrics[name])} of {f'{metrics[_PAIRS]:,.0f} ' if _PAIRS in metrics else ''}{of}"


def _furthest_group(log: Mapping[str, Any], prefix: str, unit: str) -> str:
    """The group furthest from its bound, or from its γ, with "; " in front; empty without two groups."""
    found = {name: _by_group(log, prefix, name) for name in ("slack", "violation")}
    slacks, violations = found["slack"], found["violation"]
    if len(slacks) > 1:
        group = min(slacks, key=lambda name: (slacks[name], name))
        if slacks[group] >= 0:
            return f"; all {len(slacks)} groups are within their bounds"
        return f"; of {len(slacks)} groups, {quoted(group, 40)} is furthest from its bound (slack {slacks[group]:.3g})"
    if len(violations) > 1:
        group = min(violations, key=lambda name: (-violations[name], name))
        if violations[group] <= 0:
            return f"; no pair of the {len(violations)} groups is below gamma"
        below = f"{violations[group]:.3g} {unit} on average"
        return f"; of {len(violations)} groups, {quoted(group, 40)} is furthest below gamma ({below})"
    return ""


def _by_group(log: Mapping[str, Any], prefix: str, name: str) -> dict[str, float]:
    """`<prefix>cpo/<group>/<name>` by group, of those that are numbers."""
    pattern = re.compile(re.escape(f"{prefix}cpo/") + r"([^/]+)/" + re.escape(name), re.DOTALL)
    matched = ((pattern.fullmatch(key), value) for key, value in log.items())
    return {match[1]: value for match, value in matched if match is not None and math.isfinite(value)}


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


def _than(now: float, before: float) -> str:
    if _percent(now) == _percent(before):
        return ", as before"
    return f", {'up' if now > before else 'down'} from {_percent(before)}"


class Narrator(TrainerCallback):
    """Prints the sentence at the first training log and at the end, on process 0.

    At the end it compares evaluations of the held-out pairs: the first and the last, which is the next one where there has
    been one alone. Without evaluations it tells of the training pairs. It compares logs of the trainer's own history, which
    a resumed run has too.
    """

    def __init__(self, reduction: str):
        self._unit = UNITS[reduction]
        self._waits = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        told = _logs(state, "")
        if logs and state.is_world_process_zero and len(told) == 1 and all(key in logs for key in _NEEDED):
            self._say(f"first log, step {state.global_step}", sentence(None, told[0], self._unit))

    def on_train_begin(self, args, state, control, **kwargs):
        self._waits = False

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        told, prefix = _logs(state, ""), _held_out(state)
        evaluations = [] if prefix is None else _logs(state, prefix)
        if len(evaluations) > 1:
            self._say_held_out(evaluations, prefix)
        elif evaluations:
            self._waits = True
        elif len(told) > 1:
            self._say(f"end, step {state.global_step}", sentence(told[0], told[-1], self._unit))

    def on_evaluate(self, args, state, control, **kwargs):
        prefix = _held_out(state)
        if self._waits and prefix is not None:
            self._waits = False
            self._say_held_out(_logs(state, prefix), prefix)

    def _say_held_out(self, evaluations: list[dict[str, Any]], prefix: str | None) -> None:
        self._say(f"end, step {evaluations[-1]['step']}", sentence(evaluations[0], evaluations[-1], self._unit, prefix))

    @staticmethod
    def _say(when: str, words: str | None) -> None:
        if words is not None:
            # tqdm.write prints above a progress bar, if there is one.
            tqdm.write(f"[{when}] {words}")


def _logs(state, prefix: str) -> list[dict[str, Any]]:
    """The logs of one kind; the others' names have other prefixes."""
    return [log for log in state.log_history if all(prefix + key in log for key in _NEEDED)]


def _held_out(state) -> str | None:
    """The prefix of the set that was evaluated first; None where none was."""
    found = (key.removesuffix(_IN_U) for log in state.log_history for key in log if key.endswith(_IN_U))
    return next((prefix for prefix in found if prefix), None)
