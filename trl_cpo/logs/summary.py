"""The table printed at the end of training: the preference gap on held-out pairs, before and after."""

from collections.abc import Mapping

from ..quoting import quoted
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

#: The rows of the price, if it was measured; plain numbers, in nats per token, or fractions.
PRICE_ROWS = (
    ("KL to the reference, pairs' prompts", "cpo/kl", "per token"),
    ("KL to the reference, general prompts", "cpo/kl_general", "per token"),
    ("3-grams repeated, pairs' prompts", "cpo/repetition", "%"),
    ("3-grams repeated, general prompts", "cpo/repetition_general", "%"),
    ("answers that end, pairs' prompts", "cpo/answers_ended", "%"),
    ("answers that end, general prompts", "cpo/answers_ended_general", "%"),
    ("chosen answers' negative log-likelihood", "cpo/chosen_nll", "per token"),
    ("the given text's negative log-likelihood", "cpo/text_nll", "per token"),
)

_MORE_ROWS = (("chosen answers below their floor by", "cpo/chosen_floor_violation", "nats*"), *PRICE_ROWS)


def _group_rows(after: Mapping[str, float], prefix: str) -> list[tuple[str, str, str]]:
    """Rows of each group of pairs, if there are groups."""
    metric = "/prefers_chosen"
    keys = [key.removeprefix(prefix) for key in after if key.startswith(f"{prefix}cpo/") and key.endswith(metric)]
    rows = []
    for place in (key.removesuffix(metric) for key in keys if key != f"cpo{metric}"):
        name = quoted(place.removeprefix("cpo/"), 16, 4)
        rows.append((f"{name}: prefers chosen", f"{place}{metric}", "%"))
        rows.append((f"{name}: violations (δ < γ of the group)", f"{place}/violation_rate", "%"))
        rows.append((f"{name}: the bound holds (slack)", f"{place}/slack", "slack"))
    return [row for row in rows if f"{prefix}{row[1]}" in after]


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
    rows = [*ROWS, *(row for row in _MORE_ROWS if f"{prefix}{row[1]}" in after)]
    priced = any(row in PRICE_ROWS for row in rows)
    rows += _group_rows(after, prefix)
    for label, key, form in rows:
        cells = []
        for values, is_start in ((before, True), (after, False)):
            value = (values or {}).get(f"{prefix}{key}")
            if value is None or (is_start and form.endswith("*")):
                cells.append("-")
            elif form.startswith("%"):
                cells.append(f"{100 * value:.1f} %")
            elif form == "slack":
                cells.append(f"{'yes' if value >= 0 else 'no'} ({value:+.3f})")
            elif form == "per token":
                cells.append(f"{value:.3f}")
            else:
                cells.append(f"{value:+.3f}")
        width = 14 if form == "slack" else 10
        lines.append(f"{label:<{64 - 2 * width}}{cells[0]:>{width}}{cells[1]:>{width}}")
    lines.append(f"(gaps and log-probs in {unit}; - : policy and reference are still the same model, or not known)")
    if priced:
        lines.append("(KL and likelihood in nats per token; docs/price.md says how they are measured)")
    return "\n".join(lines)


def gain_and_price(
    before: Mapping[str, float] | None, after: Mapping[str, float], price: str | None, prefix: str = "eval_"
) -> str | None:
    """What training gained and what it cost, as one sentence; None without a price.

    Args:
        before, after: as in `before_after`.
        price: the price in words.
    """
    now = after.get(f"{prefix}cpo/prefers_chosen")
    if price is None or now is None:
        return price
    then = (before or {}).get(f"{prefix}cpo/prefers_chosen")
    earlier = "" if then is None else f", {100 * then:.0f} % before training"
    return f"{100 * now:.0f} % of held-out pairs preferred{earlier}; {price}."
