"""The table that a training run ends with: the preference gap on held-out pairs, before and after."""

from collections.abc import Mapping

from ..units import UNITS

#: The rows: label, metric, and how it is written: "%" for a fraction, "nats" for a log-probability. A starred one
#: compares policy and reference, so that before training, where they are the same model, it says nothing.
ROWS = (
    ("prefers chosen itself (δ > 0)", "cpo/prefers_chosen", "%"),
    ("in the undesirable region U (δ_ref < δ < 0)", "cpo/in_undesirable_region", "%*"),
    ("violations (δ < γ)", "cpo/violation_rate", "%"),
    ("escaped (δ_ref < 0 < δ)", "cpo/escaped", "%"),
    ("mean gap δ", "cpo/gap", "nats"),
    ("mean reference gap δ_ref", "cpo/ref_gap", "nats"),
    ("mean target t", "cpo/target", "nats"),
    ("reward accuracy (δ > δ_ref)", "cpo/beats_reference", "%*"),
    ("chosen log-prob moved by", "cpo/chosen_logps_shift", "nats*"),
    ("rejected log-prob moved by", "cpo/rejected_logps_shift", "nats*"),
)


def before_after(
    before: Mapping[str, float] | None,
    after: Mapping[str, float],
    *,
    pairs: int,
    gamma: float,
    reduction: str,
    constraint: str,
    prefix: str = "eval_",
) -> str:
    """The table as text, from two evaluations of one set of pairs.

    Args:
        before, after: what `trainer.evaluate()` returned, keys beginning with `prefix`; before may be unknown.
        pairs: how many pairs were evaluated.
        gamma: γ, nats.
        reduction: "sum" or "mean", which sets the unit.
        constraint: name of the constraint that was trained with.
    """
    unit = UNITS[reduction]
    lines = [
        f"{pairs} held-out pairs, constraint {constraint}, γ = {gamma:g} {unit}",
        f"{'':44}{'before':>10}{'after':>10}",
    ]
    for label, key, form in ROWS:
        cells = []
        for values, is_start in ((before, True), (after, False)):
            value = (values or {}).get(f"{prefix}{key}")
            if value is None or (is_start and form.endswith("*")):
                cells.append("-")
            elif form.startswith("%"):
                cells.append(f"{100 * value:.1f} %")
            else:
                cells.append(f"{value:+.3f}")
        lines.append(f"{label:<44}{cells[0]:>10}{cells[1]:>10}")
    lines.append(f"(gaps and log-probs in {unit}; - : policy and reference are still the same model, or not known)")
    return "\n".join(lines)
