"""
Labels by noisy annotators, and two groups that pull against each other, on a policy small enough to repeat in a minute.

    python -m benchmarks.annotators run --out benchmarks/annotators.json
    python -m benchmarks.annotators table benchmarks/annotators.json

The policy gives each of 4 answers a logit linear in 8 features of the prompt; KL to the reference is exact. Utilities are
linear too; the reference follows another direction, and prefers the worse answer of 35 to 45 % of pairs. The loss is the
package's own (`LabelledForm`, `Bounds`), full batches, Adam.

**annotators**: 300 pairs, each judged by five annotators who are right with probability 0.55, 0.65, 0.75, 0.85 and 0.95. hard:
the majority's answer is chosen. votes: p from the counts, (k + 1/2)/6 (Jeffreys). weighted: p from the annotators' known
quality, the posterior's log odds being the sum of theirs. Scored: how often the policy prefers the answer that is truly better,
on 2,000 new pairs.

**groups**: 300 pairs, two in three of a group that wants one utility, the others of a group that wants the opposite on half of
the features. Scored: each group's share of new pairs that are right.

Learning rate and steps are those of the first try, the same for all arms. β was lowered from 1 to 0.3 after it, as half of the
arms did not get to the KL at which they are compared; the two arms of the groups with a higher cap were added then, as both
multipliers had ended at their cap, which is β.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_cpo.constraints import CONSTRAINTS
from trl_cpo.labels.bounds import Bounds
from trl_cpo.labels.form import LabelledForm, PairLabels
from trl_cpo.metrics import PairView, per_pair
from trl_cpo.objective import pair_loss
from trl_cpo.pairs import PairLogps

FEATURES, ANSWERS, PAIRS, TEST, STEPS = 8, 4, 300, 2_000, 400
MEASURED = (*range(0, 100, 10), *range(100, STEPS + 1, 100))
LEARNING_RATE = 0.02
QUALITY = torch.tensor([0.55, 0.65, 0.75, 0.85, 0.95])
SEEDS = range(10)
#: KL at which arms are compared, nats a prompt.
EQUAL_KL = 0.1

#: Of the arms of the groups that bound the mean violation.
BOUNDED: dict[str, Any] = {"labels": "truth", "constraint": "lagrangian", "beta": 0.3, "gamma": 0.5, "epsilon": 0.2}
#: How labels are made, and the constraint with its fields.
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "annotators": {
        "hard": {"labels": "hard", "constraint": "none", "beta": 0.3},
        "hard, clip": {"labels": "hard", "constraint": "clip", "beta": 0.3, "gamma": 0.5},
        "hard, lagrangian": {"labels": "hard", "constraint": "lagrangian", "beta": 0.3, "gamma": 0.5, "epsilon": 0.1},
        "votes": {"labels": "votes", "constraint": "none", "beta": 0.3},
        "votes, clip": {"labels": "votes", "constraint": "clip", "beta": 0.3, "gamma": 0.5},
        "votes, lagrangian": {"labels": "votes", "constraint": "lagrangian", "beta": 0.3, "gamma": 0.5, "epsilon": 0.1},
        "weighted": {"labels": "weighted", "constraint": "none", "beta": 0.3},
        "weighted, clip": {"labels": "weighted", "constraint": "clip", "beta": 0.3, "gamma": 0.5},
        "weighted, lagrangian": {"labels": "weighted", "constraint": "lagrangian", "beta": 0.3, "gamma": 0.5, "epsilon": 0.1},
    },
    "groups": {
        "dpo": {"labels": "truth", "constraint": "none", "beta": 0.3},
        "clip": {"labels": "truth", "constraint": "clip", "beta": 0.3, "gamma": 0.5},
        "lagrangian, one multiplier": BOUNDED,
        "lagrangian, one a group": BOUNDED | {"by_group": True},
        "lagrangian, one multiplier, cap 3": BOUNDED | {"dual_max": 3.0},
        "lagrangian, one a group, cap 3": BOUNDED | {"dual_max": 3.0, "by_group": True},
    },
}


def two_of(count: int, generator: torch.Generator) -> Tensor:
    """Two different answers for each pair, (count, 2)."""
    return torch.stack([torch.randperm(ANSWERS, generator=generator)[:2] for _ in range(count)])


class World:
    """Prompts, utilities and the reference of a seed."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.utility = torch.randn(FEATURES, ANSWERS, generator=self.random)
        # The other group's utility: opposed on half of the features, of its own on the others.
        other = torch.randn(FEATURES, ANSWERS, generator=self.random)
        other[: FEATURES // 2] = -self.utility[: FEATURES // 2]
        self.utilities = torch.stack([self.utility, other])
        self.reference = 0.3 * self.utility + 0.5 * torch.randn(FEATURES, ANSWERS, generator=self.random)

    def pairs(self, count: int, groups: bool) -> dict[str, Tensor]:
        """Pairs with the truly better answer first."""
        x = torch.randn(count, FEATURES, generator=self.random)
        answers = two_of(count, self.random)
        group = (torch.arange(count) % 3 == 2).long() if groups else torch.zeros(count, dtype=torch.long)
        utility = torch.einsum("nf,nfa->na", x, self.utilities[group]).gather(1, answers)
        order = utility.argsort(dim=1, descending=True)
        return {"x": x, "answers": answers.gather(1, order), "group": group}

    def judged(self, pairs: dict[str, Tensor], labels: str) -> tuple[Tensor, Tensor]:
        """Answers as annotators chose them, (N, 2), and p of the chosen one, (N,)."""
        right = (torch.rand(len(pairs["x"]), len(QUALITY), generator=self.random) < QUALITY).float()
        if labels == "truth":
            return pairs["answers"], torch.ones(len(right))
        votes = right.sum(dim=1)
        p = (votes + 0.5) / (len(QUALITY) + 1)
        if labels == "weighted":
            p = torch.sigmoid(((2 * right - 1) * torch.logit(QUALITY)).sum(dim=1))
        flipped = (p < 0.5) if labels == "weighted" else votes < len(QUALITY) / 2
        answers = torch.where(flipped.unsqueeze(1), pairs["answers"].flip(1), pairs["answers"])
        return answers, torch.ones(len(right)) if labels == "hard" else torch.maximum(p, 1 - p)


def trained(experiment: str, arm: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """One run: shares that are right and KL to the reference, every few steps."""
    settings = {"gamma": 0.0, **ARMS[experiment][arm]}
    groups = experiment == "groups"
    world = World(seed)
    data, test = world.pairs(PAIRS, groups), world.pairs(TEST, groups)
    answers, p = world.judged(data, settings["labels"])
    named = {k: v for k, v in settings.items() if k not in ("labels", "constraint", "by_group")}
    constraint = CONSTRAINTS[settings["constraint"]](**named)
    by_group = settings.get("by_group", False)
    bounds = Bounds(constraint.dual_rule, groups=("majority", "minority") if by_group else ())
    group = data["group"] if by_group else None
    soft = settings["labels"] in ("votes", "weighted")
    form = LabelledForm(constraint, PairLabels(p if soft else None, None, group), None, [("sigmoid", 1.0)])
    reference, policy = world.reference, world.reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([policy], lr=LEARNING_RATE)

    def logps(weights: Tensor, x: Tensor, answers: Tensor) -> Tensor:
        return (x @ weights).log_softmax(dim=1).gather(1, answers)

    starts, curve = logps(reference, data["x"], answers), []
    for step in range(steps + 1):
        if step in MEASURED:
            with torch.no_grad():
                better = (test["x"] @ policy).gather(1, test["answers"])
                right = better[:, 0] > better[:, 1]
                ours, theirs = ((test["x"] @ weights).log_softmax(dim=1) for weights in (policy, reference))
                shares = [right[test["group"] == each].float().mean().item() for each in range(1 + groups)]
                kl = (ours.exp() * (ours - theirs)).sum(dim=1).mean().item()
                curve.append({"step": step, "right": [round(share, 4) for share in shares], "kl": round(kl, 5)})
        own = logps(policy, data["x"], answers)
        pairs = PairLogps(own[:, 0], own[:, 1], starts[:, 0], starts[:, 1])
        target = form.target(pairs.detach()) if form.moves_target else pairs.ref_gap
        loss = pair_loss(pairs.gap, target, beta=constraint.beta)
        added = bounds.added_loss(form, pairs)
        loss = (loss if added is None else loss + added).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bounds.observe(per_pair(PairView(pairs.detach(), target, form.gamma)), form)
        bounds.step()
    return {"experiment": experiment, "arm": arm, "seed": seed, "settings": settings, "curve": curve}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval over seeds, by Student's t."""
    from scipy.stats import t

    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, float(t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))


def at_kl(curve: list[dict[str, Any]], which: int) -> float:
    """The share right where KL first reaches `EQUAL_KL`; NaN if it never does."""
    for before, after in zip(curve, curve[1:], strict=False):
        if before["kl"] < EQUAL_KL <= after["kl"]:
            part = (EQUAL_KL - before["kl"]) / (after["kl"] - before["kl"])
            return before["right"][which] + part * (after["right"][which] - before["right"][which])
    return math.nan


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: of each experiment and arm, what was reached at the end and at equal KL, beside the first arm seed by seed."""
    lines = []
    for experiment in ARMS:
        groups = ("",) if experiment == "annotators" else (" of the majority", " of the minority")
        names = [f"right{each}, {where}" for each in groups for where in ("end", f"at KL {EQUAL_KL:g}")]
        head = ("arm", *names, f"difference to the first arm{groups[-1]}, end", "KL, end")
        lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        first: list[float] = []
        for arm in ARMS[experiment]:
            found = [run for run in runs if (run["experiment"], run["arm"]) == (experiment, arm)]
            if not found:
                continue
            cells = [arm]
            for which in range(len(groups)):
                ends = [run["curve"][-1]["right"][which] for run in found]
                equal = [at_kl(run["curve"], which) for run in found]
                cells += [_percent(ends), "–" if any(map(math.isnan, equal)) else _percent(equal)]
            first = first or ends
            cells.append(_percent([100 * (one - other) / 100 for one, other in zip(ends, first, strict=True)], signed=True))
            mean, half = interval([run["curve"][-1]["kl"] for run in found])
            lines.append(f"| {' | '.join(cells)} | {mean:.2f} ± {half:.2f} |")
    return "\n".join(lines[1:])


def _percent(values: list[float], *, signed: bool = False) -> str:
    mean, half = interval(values)
    return f"{100 * mean:{'+' if signed else ''}.1f} ± {100 * half:.1f}" + ("" if signed else " %")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.annotators", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="train every arm with every seed")
    run.add_argument("--out", type=Path, default=Path("annotators.json"))
    run.add_argument("--seeds", type=int, default=len(SEEDS))
    verbs.add_parser("table", help="print what was measured").add_argument("file", type=Path)
    options = parser.parse_args()
    if options.verb == "table":
        print(table(json.loads(options.file.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    runs = [trained(experiment, arm, seed) for experiment in ARMS for arm in ARMS[experiment] for seed in range(options.seeds)]
    options.out.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n", encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
