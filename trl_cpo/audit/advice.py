"""What the audit's numbers justify, in words: each piece of advice is one case with the numbers it rests on."""

import math

#: Misaligned pairs are few where the interval's upper end is below this.
FEW = 0.05
#: DPO is as fast where it takes less than this many times clip's time on nine misaligned pairs of ten.
AS_FAST = 2.0
#: An interval wider than this to each side is too wide to decide on.
WIDE = 0.06
#: Below this rank correlation of δ_ref with the difference in length, misalignment is taken for length.
MOSTLY_LENGTH = -0.6
#: Answers of at most so many tokens, their end among them, are decisions: the likelier one is the behaviour.
DECISION = 6
#: Answers cut, labels contradicted by scores, and pairs in U are worth a word from here on.
WORTH_A_WORD = 0.02


def advise(audited: dict, settings: dict) -> list[dict[str, str]]:
    """The advice for one audited set, `{"case", "says"}` each, in the order in which it should be read.

    Args:
        audited: what `document.audited_set` makes: its "preflight", "all" and "slices".
        settings: "beta", "gamma", "reduction".
    """
    numbers = audited["all"]
    pieces = [
        _faults(audited["preflight"]),
        _cut(audited["preflight"]),
        _sample(numbers, settings),
        _main(numbers, settings),
        _trust(numbers, settings),
        _policy(numbers),
        _length(numbers, settings),
        _scores(numbers),
        *_slices(audited, settings),
        _repeated(numbers),
    ]
    return [{"case": case, "says": says} for case, says in filter(None, pieces)]


def percent(value: float) -> str:
    """A fraction as a percentage with one digit."""
    return f"{100 * value:.1f} %"


def interval(fraction: dict) -> str:
    """A fraction with its interval: `12.0 % [8.1 to 17.0]`."""
    if fraction["value"] is None:
        return "-"
    if fraction["low"] is None:
        return percent(fraction["value"])
    return f"{percent(fraction['value'])} [{100 * fraction['low']:.1f} to {100 * fraction['high']:.1f}]"


def times(value: float) -> str:
    """A ratio of times to two digits: more would be false, as its interval is wide."""
    if value >= 1e6:
        return f"10^{math.floor(math.log10(value))}"
    if value < 9.95:
        return f"{value:.1f}"
    power = max(math.floor(math.log10(value)) - 1, 0)
    return f"{round(value / 10**power) * 10**power:,}"


def _faults(preflight: dict):
    faults = [found for found in preflight["findings"] if found["fault"]]
    if faults:
        listed = "; ".join(f"{f['count']} of {f['of']} pairs {f['says'].split(':')[0]}" for f in faults)
        return "faults", f"First mend the pairs or the template, for the numbers and any training rest on them: {listed}."


def _cut(preflight: dict):
    cut = {f["finding"]: f["count"] / f["of"] for f in preflight["findings"] if f["finding"].startswith("cut_")}
    dropped = preflight["dropped"] / preflight["given"]
    worst = max([dropped, *cut.values()])
    if worst > WORTH_A_WORD:
        return "cut", (
            f"max_length={preflight['max_length']} drops {percent(dropped)} of the pairs and cuts "
            f"{percent(cut.get('cut_chosen', 0.0))} of the chosen and {percent(cut.get('cut_rejected', 0.0))} of the rejected "
            "answers: a gap between a whole answer and a cut one is not about the answers. Raise max_length if memory allows."
        )


def _sample(numbers: dict, settings: dict):
    one = numbers["misaligned"][settings["reduction"]]
    if (one["high"] - one["low"]) / 2 > WIDE:
        # For ±5 points: n = p(1 − p)(1.96/0.05)², at the p nearest to a half that the interval allows.
        p = min(max(0.5, one["low"]), one["high"])
        enough = math.ceil(p * (1 - p) * (1.96 / 0.05) ** 2 / 10) * 10
        return "few_pairs", (
            f"{one['n']} pairs are few: the misaligned fraction may be anything from {percent(one['low'])} to "
            f"{percent(one['high'])}. About {enough} pairs would give it to within 5 points."
        )


def _main(numbers: dict, settings: dict):
    misaligned, escape = numbers["misaligned"][settings["reduction"]], numbers["escape"]
    gamma, beta = settings["gamma"], settings["beta"]
    if misaligned["high"] < FEW:
        return "dpo_as_good", (
            f"DPO is as good here: {interval(misaligned)} of pairs start misaligned, at most one in twenty, and on all others "
            "DPO's target is not below 0. constraint='none' is plain DPO and logs the same metrics; watch "
            "cpo/in_undesirable_region stay as small."
        )
    if misaligned["low"] < FEW:
        return "undecided", (
            f"{interval(misaligned)} of pairs start misaligned: these pairs cannot tell whether that is more than the "
            f"{percent(FEW)} below which DPO is as good. Score more pairs, or train with constraint='none' and watch "
            "cpo/in_undesirable_region."
        )
    if not escape["pairs"]:
        return "nothing_to_escape", (
            f"{interval(misaligned)} of pairs have a misaligned reference, but the policy prefers the chosen answer on all of "
            "them already: no constraint has anything to push."
        )
    half, tenth, depth = escape["ratio"]["50%"], escape["ratio"]["90%"], escape["beta_depth"]
    tokens = numbers["length"]["tokens"]
    if tokens <= DECISION:
        return "decisions", (
            f"{interval(misaligned)} of pairs start misaligned, and answers are decisions (median {tokens:g} tokens): the "
            "likelier one is what the model does. Constrain, with beta 1 and gamma 1: beta then says how near to stay, gamma "
            "how much to mend. A small model that was wrong on a slice got far more right than with DPO at equal KL, and as "
            "much as with cross-entropy on the chosen answers (docs/evidence.md); the demo's decisions did not repeat it. "
            "Train also with constraint='none', and with TRL's SFTTrainer where chosen answers are right, and compare."
        )
    if settings["reduction"] == "sum" and _is_length(numbers):
        return "length_not_preference", (
            f"{interval(misaligned)} of pairs start misaligned, but by sums this is length (rank correlation "
            f"{numbers['length']['sum']['correlation']['value']:+.2f}). A constraint on sums would ask for the long answer to "
            f"be as likely as the short one: on the worst tenth of pairs {depth['90%']['value'] / beta:.0f} nats or more. "
            "Do not constrain here, by sums or by means: of sampled answers with a known reward, both got less of it than DPO "
            "at equal KL (docs/evidence.md)."
        )
    if tenth["value"] < AS_FAST:
        return "dpo_as_fast", (
            f"{interval(misaligned)} of pairs start misaligned, but not deeply for β = {beta:g} "
            f"(βD is {depth['50%']['value']:.2g} at the median, {depth['90%']['value']:.2g} on the worst tenth): "
            f"DPO takes about {times(half['value'])} times clip's time to δ = 0 on the median of them, "
            f"at most {times(tenth['value'])} times on nine of ten. In speed DPO is as good. What it lacks is "
            "the meaning of its loss: at its target these pairs still prefer the rejected answer. Train with "
            "constraint='none', and if cpo/in_undesirable_region does not fall, use constraint='clip'."
        )
    needs = (
        f"{interval(misaligned)} of pairs start misaligned, and DPO aims below 0 on them. On the median one DPO needs about "
        f"{times(half['value'])} times as long to δ = 0 as clip with γ = {gamma:g}, on the worst tenth at least "
        f"{times(tenth['value'])} times"
    )
    pull = [numbers["gradient"][name]["at_zero"]["misaligned_pull"] for name in ("dpo", "clip")]
    by_means = "" if settings["reduction"] == "sum" else f", logps_reduction='mean', beta={beta:g}"
    return "constrain", (
        f"{needs}: its pull falls to {pull[0]:.2g} β by δ = 0, where clip's is {pull[1]:.2g} β. Use constraint='clip', "
        f"gamma={gamma:g}{by_means}; on the {interval(numbers['same_target'])} of pairs with δ_ref ≥ γ its target is DPO's."
    )


def _is_length(numbers: dict) -> bool:
    """Whether the sums' misalignment is mostly that of longer chosen answers, and the means' is not."""
    by_sum, by_mean = (numbers["length"][name]["correlation"] for name in ("sum", "mean"))
    if by_sum["low"] is None:
        return False
    less = by_mean["value"] is None or abs(by_mean["value"]) < abs(by_sum["value"]) / 2
    return by_sum["high"] < MOSTLY_LENGTH and less


def _trust(numbers: dict, settings: dict):
    misaligned = numbers["misaligned"][settings["reduction"]]
    clip, dpo = (numbers["gradient"][name]["now"]["misaligned_share"] for name in ("clip", "dpo"))
    if misaligned["low"] < FEW or clip["value"] is None:
        return None
    return "labels", (
        f"A constraint trusts every label: it would put {percent(clip['value'])} of the first pull on misaligned pairs, where "
        f"DPO puts {percent(dpo['value'])}, and misaligned pairs include mislabelled ones. Read the worst pairs above; if many "
        "labels are wrong, clean them first."
    )


def _policy(numbers: dict):
    policy = numbers["policy"]
    if policy is None:
        return None
    region, accuracy, prefers = (policy[k] for k in ("in_undesirable_region", "beats_reference", "prefers_chosen"))
    if region["low"] > WORTH_A_WORD:
        return "in_region", (
            f"{interval(region)} of pairs are in U: the policy beats the reference on them and still prefers the rejected "
            f"answer. Its reward accuracy of {percent(accuracy['value'])} goes with preferring the chosen answer on "
            f"{percent(prefers['value'])}."
        )
    return "out_of_region", (
        f"{interval(region)} of pairs are in U: there is little or nothing that DPO's loss hides here. The policy prefers the "
        f"chosen answer on {percent(prefers['value'])}, and beats the reference on {percent(accuracy['value'])}."
    )


def _apart(one: dict, other: dict) -> bool:
    if one["low"] is None or other["low"] is None:
        return False
    return one["low"] > other["high"] or other["low"] > one["high"]


def _length(numbers: dict, settings: dict):
    reduction = settings["reduction"]
    groups = numbers["length"][reduction]["misaligned_where_chosen_is"]
    longer, shorter = groups["longer"], groups["shorter"]
    if not _apart(longer, shorter):
        return None
    says = (
        f"Misalignment follows length: {interval(longer)} of pairs whose chosen answer is the longer one start misaligned, "
        f"{interval(shorter)} of those whose chosen answer is the shorter one."
    )
    if reduction == "sum":
        means = numbers["length"]["mean"]["misaligned_where_chosen_is"]
        still = "follows it too" if _apart(means["longer"], means["shorter"]) else "does not show it"
        says += (
            f" The mean per token {still} ({interval(means['longer'])} and {interval(means['shorter'])}). A sum falls "
            "with every token, so part of what a constraint on sums pushes against is length."
        )
    return "length", says


def _scores(numbers: dict):
    assumption = numbers["assumption"]
    if assumption["from"] == "scores" and assumption["contradict_label"]["low"] > WORTH_A_WORD:
        return "scores", (
            f"The scores contradict the label on {interval(assumption['contradict_label'])} of pairs: look at these before "
            "any training."
        )


def _slices(audited: dict, settings: dict):
    everywhere = audited["all"]["misaligned"][settings["reduction"]]
    for column in {one["column"]: None for one in audited["slices"]}:
        some = [one for one in audited["slices"] if one["column"] == column]
        apart = [one for one in some if _apart(one["misaligned"][settings["reduction"]], everywhere)]
        if apart:
            apart.sort(key=lambda one: -one["misaligned"][settings["reduction"]]["value"])
            named = "; ".join(f"{one['value']} {interval(one['misaligned'][settings['reduction']])}" for one in apart[:3])
            yield (
                "slices",
                (f"By {column}, {len(apart)} of {len(some)} slices differ from the whole ({interval(everywhere)}): {named}."),
            )


def _repeated(numbers: dict):
    prompts, pairs = numbers["distinct_prompts"], numbers["pairs"]
    if prompts is not None and prompts < 0.9 * pairs:
        return "repeated_prompts", (
            f"The {pairs} pairs have {prompts} distinct prompts. Intervals take pairs as independent, and pairs of one prompt "
            "are not: read them as too narrow."
        )
