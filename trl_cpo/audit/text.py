"""The audit's document as text for people: about eighty lines, rendered from the document alone."""

import textwrap

from ..quoting import trimmed
from ..units import UNITS
from .advice import interval, percent, times

_WIDTH = 112
_MOST_SLICES = 12


def render(document: dict) -> str:
    """The whole text. Several sets follow one another."""
    settings, lines = document["settings"], []
    unit = f"{UNITS[settings['reduction']]} ({settings['reduction']}s)"
    policy = "" if document["ref_model"] is None else f" against the reference {document['ref_model']}"
    lines += _wrapped(f"Audit of {document['model']}{policy} on {document['dataset']}", "")
    lines += _wrapped(
        f"β = {settings['beta']:g}, γ = {settings['gamma']:g}, δ in {unit}. In brackets: 95 % intervals, Clopper-Pearson for "
        "fractions, bootstrap for shares; rows are counted from 0.",
        "",
    )
    for audited in document["sets"]:
        lines += ["", _title(document, audited)]
        for reason in audited.get("refused_for", ()):
            rows = ", ".join(map(str, reason["rows"])) + (", …" if reason["count"] > len(reason["rows"]) else "")
            lines += _wrapped(f"{reason['count']} {reason['reason']}: {reason['says']} (rows {rows})")
        lines += _preflight(audited["preflight"]) + _judgements(audited.get("judgements"))
        if audited.get("all"):
            lines += _standing(audited["all"]) + _pull(audited["all"], settings) + _length(audited["all"])
            lines += _policy(audited["all"], settings) + _slices(audited, settings) + _groups(audited, settings)
            lines += _worst(audited)
            lines += ["", "Advice"]
            for piece in audited["advice"]:
                lines += _wrapped(piece["says"], "  - ", "    ")
            if audited.get("command"):
                # In one line, so that it can be copied.
                lines += ["", "To train as advised (add --use_peft for LoRA; the summary tells gain and price):"]
                lines.append(f"  {audited['command']}")
    return "\n".join(lines)


def _wrapped(text: str, first: str = "  ", rest: str | None = None) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=first if rest is None else rest, break_on_hyphens=False
    )


def _title(document: dict, audited: dict) -> str:
    given, there = audited["preflight"]["given"], audited["rows"]
    drawn = f"{given} of {there} pairs, drawn at random with seed {document['seed']}" if given < there else f"{given} pairs"
    refused = f"; {audited['refused']} rows refused" if audited["refused"] else ""
    return f"== {audited['set']}: {drawn}{refused} =="


def _judgements(found: dict | None) -> list[str]:
    """Pairs that were judged more than once, and circles; nothing where there are none."""
    if found is None or (found["judgements"] == found["pairs"] and not found["pairs_in_cycles"]):
        return []
    again = found["pairs"] - found["judged_once"]
    said = f"{again} pairs were judged more than once, {found['contested']} of them both ways. " if again else ""
    if found["pairs_in_cycles"]:
        said += (
            f"{found['pairs_in_cycles']} pairs of {found['prompts_with_cycles']} prompts lie in circles (A over B over C over "
            "A), which no reward explains. "
        )
    advice = "Count them as votes: trl-cpo votes IN OUT" if again else ""
    return ["Repeated judgements", *_wrapped(f"{said}{advice}".strip())]


def _preflight(seen: dict) -> list[str]:
    lines = ["What the model sees (▶ the answer begins)"]
    for pair in seen["seen"]:
        lines.append(f"  row {pair['row']}: {trimmed(pair['prompt'], 150, 100)}")
        lines += [f"    {name:>8} ▶ {trimmed(pair[name], 96, 30)}" for name in ("chosen", "rejected")]
    tokens = seen["tokens"]
    lengths = ", ".join(f"{name} {one['median']} (longest {one['longest']})" for name, one in tokens.items())
    cut = {found["finding"]: found["count"] for found in seen["findings"]}
    bos = "no BOS token" if seen["bos_token"] is None else f"{seen['bos_token']} in front: {_times_seen(seen['leading_bos'])}"
    ends = f"{' or '.join(seen['end_tokens'])} in an answer: {_times_seen(seen['ends_an_answer'])}"
    lines += _wrapped(f"tokens, median: {lengths}; {bos}; {ends}")
    lines += _wrapped(
        f"max_length {seen['max_length']}: {seen['dropped']} of {seen['given']} pairs dropped, chosen answer cut in "
        f"{cut.get('cut_chosen', 0)}, rejected in {cut.get('cut_rejected', 0)}"
    )
    told = [found for found in seen["findings"] if not found["finding"].startswith("cut_")]
    for found in told:
        mark, share = "FAULT" if found["fault"] else "note", percent(found["count"] / found["of"])
        tail = f", such as {found['left_out']!r}" if "left_out" in found else ""
        if "tokens" in found:
            tail = f": {found['tokens']} of their {found['of_tokens']} tokens ({percent(found['tokens'] / found['of_tokens'])})"
        rows = ", ".join(map(str, found["rows"]))
        lines += _wrapped(f"{mark}: {found['count']} of {found['of']} ({share}) {found['says']}{tail} (rows {rows})")
    if not any(found["fault"] for found in told):
        lines.append("  no fault found in templates, BOS, end tokens, prompts and answers")
    return lines


def _times_seen(counts: dict[str, int]) -> str:
    shown = sorted(counts.items(), key=lambda item: -item[1])[:3]
    rest = len(counts) - len(shown)
    all_of_them = "all " if len(counts) == 1 else ""
    return ", ".join(f"{number}× in {all_of_them}{count}" for number, count in shown) + (
        f", another number in {rest} more ways" if rest else ""
    )


def _spread(spread: dict) -> str:
    return f"{spread['10%']:+.3g} / {spread['50%']:+.3g} / {spread['90%']:+.3g}"


def _standing(numbers: dict) -> list[str]:
    low = numbers["misaligned"]
    lines = [
        "",
        f"Where the reference stands ({numbers['pairs']} pairs scored)",
        f"  misaligned, δ_ref < 0      sum {interval(low['sum'])}   mean {interval(low['mean'])}   "
        f"both {interval(low['both'])}",
        f"  δ_ref, 10 % / median / 90 %   sum {_spread(numbers['ref_gap']['sum'])} nats   "
        f"mean {_spread(numbers['ref_gap']['mean'])} nats per token",
    ]
    assumption = numbers["assumption"]
    if assumption["from"] == "scores":
        lines += _wrapped(
            f"Assumption 3.1 violated (δ_ref <= -Δr/β, Δr from the scores): {interval(assumption['violated'])} of "
            f"{assumption['violated']['n']} pairs; scores contradict the label on {interval(assumption['contradict_label'])}"
        )
        return lines
    cells = {(cell["reward_gap"], cell["beta"]): cell for cell in assumption["cells"]}
    lines.append("  Assumption 3.1 violated (δ_ref <= -Δr/β), in %, for reward gaps Δr that are not known here:")
    lines.append("    " + " " * 8 + "".join(f"{f'β = {beta:g}':>20}" for beta in assumption["betas"]))
    for reward in assumption["reward_gaps"]:
        lines.append(f"    Δr = {reward:<3g}" + "".join(f"{_short(cells[reward, beta]):>20}" for beta in assumption["betas"]))
    return lines


def _short(fraction: dict) -> str:
    return f"{100 * fraction['value']:.1f} [{100 * fraction['low']:.1f} to {100 * fraction['high']:.1f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _pull(numbers: dict, settings: dict) -> list[str]:
    dpo, clip, escape = numbers["gradient"]["dpo"], numbers["gradient"]["clip"], numbers["escape"]
    against = f"clip, γ = {settings['gamma']:g}"
    lines = [
        "",
        "What a loss does about it (pull of a pair on its gap, σ(-β(δ - t)), in units of β)",
        f"  {'':44}{'DPO':>26}{against:>26}",
    ]
    for label, moment in (("now", "now"), ("once they are at δ = 0", "at_zero")):
        pulls = [_number(one[moment]["misaligned_pull"]) for one in (dpo, clip)]
        shares = [interval(one[moment]["misaligned_share"]) for one in (dpo, clip)]
        lines.append(f"  {f'mean pull of misaligned pairs, {label}':<52}{pulls[0]:>18}{pulls[1]:>26}")
        lines.append(f"  {'  their share of the pull of all pairs':<44}{shares[0]:>26}{shares[1]:>26}")
    if not escape["pairs"]:
        return [*lines, "  No pair with a misaligned reference has δ < 0: there is nothing to escape."]
    ratio, depth = escape["ratio"], escape["beta_depth"]
    longer = ", ".join(f"{interval(one)} more than {one['times']:g}" for one in escape["longer"])
    lines += _wrapped(
        f"time to δ = 0, DPO's over clip's, on the {escape['pairs']} such pairs (gradient flow on each alone): median "
        f"{_times(ratio['50%'])}, 90 % {_times(ratio['90%'])}; {longer}. It depends on βD, D = -δ_ref: median "
        f"{depth['50%']['value']:.2g}, 90 % {depth['90%']['value']:.2g}"
    )
    return lines


def _times(one: dict) -> str:
    ends = [times(one[end]) if one[end] is not None else "?" for end in ("low", "high")]
    return f"{times(one['value'])} [{ends[0]} to {ends[1]}]"


def _length(numbers: dict) -> list[str]:
    length = numbers["length"]
    lines = ["", "Length (tokens of the chosen answer minus the rejected's: 10 % / median / 90 % "]
    lines[-1] += f"{_spread(length['longer_by'])})"
    correlations = [_correlation(length[name]["correlation"]) for name in ("sum", "mean")]
    lines.append(f"  rank correlation of δ_ref with it: sum {correlations[0]}, mean {correlations[1]}")
    for group, label in (("longer", "chosen longer"), ("same", "as long"), ("shorter", "chosen shorter")):
        by = [length[name]["misaligned_where_chosen_is"][group] for name in ("sum", "mean")]
        lines.append(f"  {label:<15}{by[0]['n']:>7} pairs   misaligned by sum {interval(by[0]):<24} by mean {interval(by[1])}")
    return lines


def _correlation(one: dict) -> str:
    if one["value"] is None:
        return "-"
    ends = "" if one["low"] is None else f" [{one['low']:+.2f} to {one['high']:+.2f}]"
    return f"{one['value']:+.2f}{ends}"


def _policy(numbers: dict, settings: dict) -> list[str]:
    policy = numbers["policy"]
    if policy is None:
        return []
    labels = {
        "prefers_chosen": "prefers chosen itself (δ > 0)",
        "beats_reference": "reward accuracy (δ > δ_ref)",
        "in_undesirable_region": "in the undesirable region U (δ_ref < δ < 0)",
        "escaped": "escaped (δ_ref < 0 < δ)",
        "violation_rate": f"violations (δ < γ = {settings['gamma']:g})",
    }
    lines = ["", "The policy against the reference"]
    lines += [f"  {label:<46}{interval(policy[name])}" for name, label in labels.items()]
    lines.append(
        f"  mean gap {policy['gap']:+.3g}; moved from the reference: chosen {policy['chosen_logps_shift']:+.3g}, "
        f"rejected {policy['rejected_logps_shift']:+.3g}"
    )
    return lines


def _slices(audited: dict, settings: dict) -> list[str]:
    if not audited["slices"]:
        return []
    header = f"  {'':34}{'pairs':>7}{'misaligned by sum':>25}{'by mean':>25}{'DPO/clip':>10}"
    region = audited["all"]["policy"] is not None
    lines = ["", "Slices (DPO/clip: median of the times to δ = 0)", header + (f"{'in U':>9}" if region else "")]
    for one in audited["slices"][:_MOST_SLICES]:
        name = trimmed(f"{one['column']} = {one['value']}", 34)
        low, ratio = one["misaligned"], one["escape"]["ratio"]["50%"]["value"]
        line = f"  {name:<34}{one['pairs']:>7}{interval(low['sum']):>25}{interval(low['mean']):>25}"
        line += f"{'-' if ratio is None else times(ratio):>10}"
        lines.append(line + (f"{percent(one['policy']['in_undesirable_region']['value']):>9}" if region else ""))
    if (rest := len(audited["slices"]) - _MOST_SLICES) > 0:
        lines.append(f"  … and {rest} more with --json")
    return lines


def _groups(audited: dict, settings: dict) -> list[str]:
    """The groups of `--by`, those with the most misaligned pairs first."""
    found = audited.get("groups")
    if not found:
        return []
    reduction = settings["reduction"]
    lines = ["", f"Groups by {found['column']} (deficit: median of γ - δ_ref where δ_ref < γ, {UNITS[reduction]})"]
    lines.append(f"  {'':34}{'pairs':>7}{'misaligned by sum':>25}{'by mean':>25}{'deficit':>23}")
    each = sorted(found["each"], key=lambda one: (-one["misaligned"][reduction]["value"], one["group"]))
    for one in each[:_MOST_SLICES]:
        low = one["misaligned"]
        line = f"  {trimmed(one['group'], 34):<34}{one['pairs']:>7}{interval(low['sum']):>25}{interval(low['mean']):>25}"
        lines.append(f"{line}{_deficit(one['deficit']['50%']):>23}")
    if (rest := len(each) - _MOST_SLICES) > 0:
        lines.append(f"  … and {rest} more with --json")
    return lines


def _deficit(one: dict) -> str:
    if one["value"] is None:
        return "-"
    low, high = ("?" if one[end] is None else f"{one[end]:.3g}" for end in ("low", "high"))
    return f"{one['value']:.3g} [{low} to {high}]"


def _worst(audited: dict) -> list[str]:
    if not audited["worst"]:
        return []
    lines = ["", "The worst pairs, by δ_ref"]
    for pair in audited["worst"]:
        gap, tokens = pair["ref_gap"], pair["tokens"]
        lines.append(
            f"  row {pair['row']}: δ_ref {gap['sum']:+.1f} nats ({gap['mean']:+.2f} per token), {tokens['chosen']} and "
            f"{tokens['rejected']} tokens"
        )
        prompt = pair["prompt"] if len(pair["prompt"]) <= 96 else "…" + pair["prompt"][-95:]
        lines.append(f"      prompt   {prompt}")
        lines += [f"      {name:<8} {trimmed(pair[name], 96)}" for name in ("chosen", "rejected")]
    return lines
