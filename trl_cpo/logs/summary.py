"""The table printed at the end of training: the preference gap on held-out pairs, before and after."""

from collections.abc import Mapping

from ..units import UNITS

#: The rows: label, metric, and format ("%" for a fraction, "nats" for a log-probability). A star marks metrics that compare
#: policy and reference; they are meaningless before training, when the two are the same model.
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
        before, after: results of `trainer.evaluate()`, whose keys begin with `prefix`; `before` may be None.
        pairs: number of pairs evaluated.
        gamma: γ, nats.
        reduction: "sum" or "mean"; determines the unit.
        constraint: name of the constraint used in training.
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
