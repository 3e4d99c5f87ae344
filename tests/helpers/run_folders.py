"""Folders of runs for the report's tests: the files that training writes, with numbers made up by a seed."""

import json
from pathlib import Path

import numpy as np

COLUMNS = ["policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "start_chosen", "start_rejected"]


def metrics_of(rows: np.ndarray, gamma: float, policy=("policy_chosen", "policy_rejected")) -> dict[str, float]:
    """The cpo/ metrics of pairs, by their definitions."""
    column = {name: rows[:, place] for place, name in enumerate(COLUMNS)}
    chosen, rejected = column[policy[0]], column[policy[1]]
    gap, ref_gap = chosen - rejected, column["ref_chosen"] - column["ref_rejected"]
    values = {
        "gap": gap,
        "ref_gap": ref_gap,
        "target": np.maximum(ref_gap, gamma),
        "prefers_chosen": gap > 0,
        "beats_reference": gap > ref_gap,
        "in_undesirable_region": (gap < 0) & (gap > ref_gap),
        "violation": np.maximum(0, gamma - gap),
        "violation_rate": gap < gamma,
        "reference_misaligned": ref_gap < 0,
        "escaped": (ref_gap < 0) & (gap > 0),
        "chosen_logps_shift": chosen - column["ref_chosen"],
        "rejected_logps_shift": rejected - column["ref_rejected"],
    }
    return {f"cpo/{name}": float(np.mean(value)) for name, value in values.items()}


def made_up_pairs(count: int, seed: int, scale: float = 40.0, other_start: bool = False) -> np.ndarray:
    """(count, 6): a reference that is misaligned more often than not, and a policy trained away from it."""
    rng = np.random.default_rng(seed)
    reference = np.random.default_rng(1000 + count).normal([-3.5 * scale, -2.7 * scale], 0.9 * scale, (count, 2))
    start = reference + (rng.normal(0, 0.3 * scale, (count, 2)) if other_start else 0.0)
    policy = start + rng.normal([-0.4 * scale, -1.6 * scale], [0.4 * scale, 0.9 * scale], (count, 2))
    return np.concatenate([policy, reference, start], axis=1)


def price_document(
    steps=(0, 60), kl: float = 0.5, damage: tuple[str, ...] = (), prompts=("What is a leek?", "Why rest?")
) -> dict:
    """What price.json holds, with numbers that follow from the step and answers that name it."""

    def estimate(value: float, width: float) -> dict:
        return {"value": value, "low": max(0.0, value - width), "high": value + width}

    def on(kl: float, progress: float, step: int) -> dict:
        return {
            "prompts": 16,
            "kl": estimate(kl * progress, 0.1 * kl * progress),
            "kl_response": estimate(30 * kl * progress, kl * progress),
            "repetition": estimate(0.02 + 0.25 * progress, 0.01),
            "tokens": estimate(40.0 + progress, 5.0),
            "ended": {"value": 1.0, "low": 0.8, "high": 1.0},
            "samples": [{"prompt": prompt, "greedy": f"An answer to {prompt!r} at step {step}."} for prompt in prompts],
        }

    last = max(steps) or 1
    measurements = [
        {
            "step": step,
            "seconds": 7.1,
            "sets": {"pairs": on(kl, step / last, step), "general": on(0.1 * kl, step / last, step)},
            "damage": list(damage) if step == last else [],
        }
        for step in steps
    ]
    return {"format": 1, "measurements": measurements}


def make_run(
    folder: str | Path,
    seed: int = 0,
    pairs: int = 60,
    steps: int = 60,
    every: int = 5,
    constraint: str = "clip",
    gamma: float = 1.0,
    reduction: str = "sum",
    scale: float = 40.0,
    evaluate_every: int | None = None,
    other_start: bool = False,
    kl: float | None = None,
    lengths: bool = False,
    **config,
) -> Path:
    """Writes log.jsonl, metrics.json and pairs.json of a finished run, and gives the folder.

    With `kl`, its evaluations measure a price that ends there, in nats per token. With `lengths`, pairs.json has tokens of
    the answers and columns to slice by.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), made_up_pairs(pairs, seed, scale, other_start)

    def at(progress: float, among: np.ndarray) -> np.ndarray:
        moved = among.copy()
        moved[:, :2] = among[:, 4:] + progress * (among[:, :2] - among[:, 4:])
        return moved

    def evaluation(step: int) -> dict:
        values = {f"eval_{name}": value for name, value in metrics_of(at(step / steps, rows), gamma).items()}
        price = {} if kl is None else {"eval_cpo/kl": kl * (step / steps) ** 2, "eval_cpo/kl_general": 0.1 * kl * step / steps}
        return {"eval_loss": 6.0 - 3.0 * step / steps, **values, **price, "eval_cpo/pairs": pairs}

    lines = [{"step": 0, **evaluation(0), "epoch": 0}]
    for step in range(every, steps + 1, every):
        batch = rows[rng.choice(pairs, size=min(20, pairs), replace=False)]
        logs = {
            "loss": 6.0 - 3.0 * step / steps + rng.normal(0, 0.5),
            "grad_norm": 1.0,
            **metrics_of(at(step / steps, batch), gamma),
        }
        if constraint == "lagrangian":
            logs |= {
                "cpo/lambda": 0.3 * (1 - np.exp(-4 * step / steps)),
                "cpo/slack": 5.0 - logs["cpo/violation"],
                "cpo/holds": 0.0,
            }
        lines.append({"step": step, **logs})
        if evaluate_every and step % evaluate_every == 0 and step < steps:
            lines.append({"step": step, **evaluation(step)})
    lines += [
        {"step": steps, "train_runtime": 493.5, "train_loss": 4.2, "epoch": 1.0},
        {"step": steps, **evaluation(steps)},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "output_dir": str(folder),
        "constraint": constraint,
        "gamma": gamma,
        "tau": 2.0,
        "beta": 0.1,
        "logps_reduction": reduction,
        "learning_rate": 1e-3,
        "max_length": 512,
        "loss_type": ["sigmoid"],
        "seed": seed,
        "dual_signal": "violation",
        **config,
    }
    record = {
        "held_out_pairs": pairs,
        "before": {**evaluation(0), "step": 0},
        "after": evaluation(steps),
        "seconds": 556.2,
        "data": {"test": {"total": pairs, "kept": pairs}},
        "pairs": {"dataset_name": "demo", "trained_on": 240},
        "model": "demo",
        "seed": seed,
        "versions": {"python": "3.11.7", "trl-cpo": "0.1.0", "trl": "1.16.0"},
        "config": settings,
    }
    (folder / "metrics.json").write_text(json.dumps(record, indent=1))
    table = {
        "reduction": reduction,
        "gamma": gamma,
        "beta": 0.1,
        "constraint": constraint,
        "split": "test",
        "columns": COLUMNS,
        "rows": rows.tolist(),
    }
    if lengths:
        counts = np.random.default_rng(pairs).integers(1, 120, (pairs, 2)).tolist()
        table["columns"] = [*COLUMNS, "chosen_tokens", "rejected_tokens"]
        table["rows"] = [[*row, *count] for row, count in zip(table["rows"], counts, strict=True)]
        kinds = ("one", "two", None, "a long name of a source of pairs")
        table["slices"] = {"source": [kinds[at % 4] for at in range(pairs)], "margin": [at / 7 for at in range(pairs)]}
    (folder / "pairs.json").write_text(json.dumps(table))
    return folder
