"""Makes margin_forms.json: targets, losses and gradients of the margin forms, by mpmath and without the package.

    python tests/golden/make_margin_forms.py              # every expected value of the file again, from its own inputs
    python tests/golden/make_margin_forms.py --seed 1     # other inputs, drawn from a seed, and their values

A pair has the mean log-probabilities per token (nats) s_θ(w), s_θ(l) of the policy and s_ref(w), s_ref(l) of the reference,
for the chosen answer w and the rejected answer l. Gaps: δ_θ = s_θ(w) − s_θ(l), δ_ref = s_ref(w) − s_ref(l).

Targets t of the forms:

    none           δ_ref
    clip           max(δ_ref, γ)
    clip_release   max(δ_ref, 0)
    softplus       δ_ref + log(1 + e^{τ(γ − δ_ref)}) / (τα)
    inverse_prob   δ_ref + (γ/β)(e^{−s_ref(w)} + e^{−s_ref(l)}), for π_ref = e^{s_ref}
    inverse_logp   δ_ref + (γ/β)(1/s_ref(w) + 1/s_ref(l))

Loss and gradients, with z = β(δ_θ − t), in which t is a constant of the policy:

    ℓ = −log σ(z) = log(1 + e^{−z})
    dℓ/dz = −e^{−z} / (1 + e^{−z}) = −1 / (1 + e^z)
    dz/ds_θ(w) = β, dz/ds_θ(l) = −β, so dℓ/ds_θ(w) = −β / (1 + e^z) and dℓ/ds_θ(l) is its negative

Everything is computed with 50 digits from the exact values of the doubles in the file, and rounded once.
"""

import argparse
import json
import random
from pathlib import Path

from mpmath import exp, log1p, mp, mpf

FILE = Path(__file__).with_name("margin_forms.json")
SIDES = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
#: Hyperparameters are drawn from these.
VALUES = {
    "beta": (0.1, 0.5, 2.5, 10.0),
    "gamma": (0.0, 0.05, 0.3, 0.5, 1.0),
    "tau": (0.5, 2.0, 20.0),
    "alpha": (0.25, 0.5, 1.0),
}


def expected(case: dict[str, float]) -> dict[str, dict[str, float]]:
    """Target, loss and both gradients of every form, for the inputs of a case."""
    with mp.workdps(50):
        beta, gamma, tau, alpha = (mpf(case[name]) for name in VALUES)
        policy_chosen, policy_rejected, chosen, rejected = (mpf(case[side]) for side in SIDES)
        gap, ref_gap = policy_chosen - policy_rejected, chosen - rejected
        targets = {
            "none": ref_gap,
            "clip": max(ref_gap, gamma),
            "clip_release": max(ref_gap, mpf(0)),
            "softplus": ref_gap + log1p(exp(tau * (gamma - ref_gap))) / (tau * alpha),
            "inverse_prob": ref_gap + gamma / beta * (exp(-chosen) + exp(-rejected)),
            "inverse_logp": ref_gap + gamma / beta * (1 / chosen + 1 / rejected),
        }
        found = {}
        for name, target in targets.items():
            z = beta * (gap - target)
            pull = beta / (1 + exp(z))
            numbers = {"target": target, "loss": log1p(exp(-z)), "grad_chosen": -pull, "grad_rejected": pull}
            found[name] = {key: float(value) for key, value in numbers.items()}
        return found


def inputs(document: dict) -> list[dict[str, float]]:
    """The cases of a file without what is expected of them."""
    return [{name: case[name] for name in (*VALUES, *SIDES)} for case in document["cases"]]


def drawn(seed: int, count: int = 64) -> list[dict[str, float]]:
    """Other cases: hyperparameters from VALUES, log-probabilities around −1.5 nats a token."""
    rng = random.Random(seed)
    return [
        {name: rng.choice(values) for name, values in VALUES.items()}
        | {side: min(rng.gauss(-1.5, 0.5), -0.05) for side in SIDES}
        for _ in range(count)
    ]


def document_of(cases: list[dict[str, float]]) -> dict:
    return {
        "units": "nats, mean log-probability per response token",
        "source": "tests/golden/make_margin_forms.py: mpmath, 50 digits",
        "cases": [{**case, "expect": expected(case)} for case in cases],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes margin_forms.json.")
    parser.add_argument("--seed", type=int, help="draw other inputs instead of keeping the file's")
    options = parser.parse_args()
    cases = inputs(json.loads(FILE.read_text())) if options.seed is None else drawn(options.seed)
    FILE.write_text(json.dumps(document_of(cases), indent=1) + "\n")
