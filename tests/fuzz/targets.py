"""What must hold of any input, as functions of a random generator and a number of draws; each raises where it does not.

`python tests/fuzz/run.py --draws 1000000` runs them all; test_fuzz.py runs a share of it in the test suite.
"""

import math
import random
import string
from dataclasses import Field, fields
from pathlib import Path

import torch
import trl

from trl_cpo import CPOConstrainedConfig
from trl_cpo.constraint_fields import HYPERPARAMETERS
from trl_cpo.constraints import CONSTRAINTS, Constraint
from trl_cpo.constraints.dual_rule import DualRule
from trl_cpo.data.hh import DialogueError, Reason, parse_dialogue, split_pair
from trl_cpo.metrics import COLUMNS, METRICS, PairView, per_pair
from trl_cpo.objective import pair_loss
from trl_cpo.pairs import PairLogps

from helpers.formulas import gap_from_loss
from helpers.hh_text import render_dialogue

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Pairs in one tensor; one draw is one pair.
CHUNK = 2_000
#: Log-probabilities, in nats, for which finite in, finite out is promised: sums over a hundred thousand tokens.
LARGEST = 1e6


def chunks(rng: random.Random, draws: int):
    """Generators and sizes for tensors that make up so many draws."""
    while draws > 0:
        yield torch.Generator().manual_seed(rng.getrandbits(48)), min(draws, CHUNK)
        draws -= CHUNK


def magnitudes(generator, n: int, largest: float, dtype) -> torch.Tensor:
    """n numbers ≥ 0 from every order of magnitude of a dtype up to `largest`, zeros and the largest among them."""
    info = torch.finfo(dtype)
    low, high = math.log(info.tiny), math.log(min(largest, float(info.max)))
    values = torch.exp(low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64))
    choice = torch.rand(n, generator=generator)
    values = torch.where(choice < 0.05, 0.0, values)
    values = torch.where(choice > 0.97, math.exp(high) * (1 - 1e-3), values)
    ordinary = 300 * torch.rand(n, generator=generator, dtype=torch.float64)
    return torch.where((choice > 0.4) & (choice < 0.7), ordinary.clamp(max=math.exp(high)), values).to(dtype)


def pairs_of(generator, n: int, dtype) -> PairLogps:
    """Log-probabilities ≤ 0; a third of the pairs at a gap of nearly nothing, where signs are decided."""
    columns = [-magnitudes(generator, n, LARGEST, dtype) for _ in range(4)]
    close = torch.rand(n, generator=generator) < 0.3
    info = torch.finfo(dtype)
    columns[1] = torch.where(close, (columns[0] * (1 + info.eps)).clamp(min=info.min), columns[1])
    return PairLogps(*columns)


def log_uniform(rng, low, high):
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def made(name: str, values: dict) -> Constraint:
    """The form at those of the values that it has a field for."""
    form = CONSTRAINTS[name]
    return form(**{each.name: values[each.name] for each in fields(form)})


def value_of(rng: random.Random, declared: Field):
    """A value that a user may set, the corners more often than chance; numbers within 1e6 of the lowest."""
    about = declared.metadata
    if about["choices"]:
        return rng.choice(about["choices"])
    if declared.default is None and rng.random() < 0.3:
        return None
    if declared.type is int:
        return about["at_least"] + rng.randrange(4)
    lowest = [] if about["at_least"] is None else [about["at_least"]]
    base = about["at_least"] if about["above"] is None else about["above"]
    return rng.choice([declared.default or 1.0, *lowest, base + log_uniform(rng, 1e-6, 1e6)])


def values_of(rng: random.Random) -> dict:
    """Hyperparameters of all forms, with γ up to 1e5 nats."""
    values = {name: value_of(rng, declared) for name, declared in HYPERPARAMETERS.items()}
    values["gamma"] = rng.choice([0.0, 1.0, log_uniform(rng, 1e-12, 1e5)])
    return values | {"beta": rng.choice([0.01, 0.1, 1.0, log_uniform(rng, 1e-4, 1e3)]), "logps_reduction": "mean"}


def hold(condition: torch.Tensor | bool, what: str, *shown) -> None:
    """Raises `AssertionError` with the first numbers for which a condition does not hold."""
    if isinstance(condition, bool):
        assert condition, (what, *shown)
        return
    if not condition.all():
        at = (~condition).nonzero()[0].item()
        values = [x[at].item() if isinstance(x, torch.Tensor) and x.dim() else x for x in shown]
        raise AssertionError((what, *values))


def objective(rng: random.Random, draws: int) -> None:
    """ℓ ≥ 0 and finite; ℓ falls with the gap, up to rounding; ℓ ≤ log 2 exactly where δ ≥ t; the inverse gives the gap back."""
    for generator, n in chunks(rng, draws):
        dtype, beta = rng.choice(DTYPES), log_uniform(rng, 1e-4, 1e3)
        signs = torch.randint(0, 2, (2, n), generator=generator) * 2 - 1
        gap, target = (sign.to(dtype) * magnitudes(generator, n, LARGEST, dtype) for sign in signs)
        near = torch.rand(n, generator=generator) < 0.3
        gap = torch.where(near, target + torch.randn(n, generator=generator).to(dtype), gap)
        loss = pair_loss(gap, target, beta=beta)
        hold(loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), "float32 at least", loss.dtype)
        hold(loss.isfinite() & (loss >= 0), "finite and ≥ 0", loss, gap, target, beta)
        wider = pair_loss(gap + magnitudes(generator, n, LARGEST, dtype), target, beta=beta)
        # The last digit of log σ depends on where in the tensor a number stands: vectorised or not.
        rounding = 1 + 4 * torch.finfo(loss.dtype).eps
        hold(wider <= loss * rounding, "falls with the gap", wider, loss, gap, target, beta)
        difference = gap.to(loss.dtype) - target.to(loss.dtype)
        # Within the rounding of log 2 itself the two sides of the certificate cannot be told apart.
        clear = (beta * difference).abs() > 4 * torch.finfo(loss.dtype).eps
        hold(~clear | ((loss <= math.log(2)) == (difference >= 0)), "ℓ ≤ log 2 ⇔ δ ≥ t", loss, gap, target, beta)
        gap, target = difference.double().clamp(-30 / beta, 30 / beta), torch.zeros(n, dtype=torch.float64)
        back = gap_from_loss(pair_loss(gap, target, beta=beta), target, beta=beta)
        hold((back - gap).abs() * beta <= 1e-2, "the inverse", back, gap, beta)  # e^−30 leaves 3 digits of 16


def constraints(rng: random.Random, draws: int) -> None:
    """Targets and added losses are finite, on the promised side of δ_ref and γ, and monotone where that is promised."""
    for generator, n in chunks(rng, draws):
        dtype, values = rng.choice(DTYPES), values_of(rng)
        pairs = pairs_of(generator, n, dtype)
        ref, gamma = pairs.ref_gap, torch.tensor(values["gamma"], dtype=pairs.ref_gap.dtype)
        targets = {}
        for name in CONSTRAINTS:
            form = made(name, values)
            multiplier = 0.0 if form.dual_rule is None else rng.choice([0.0, form.dual_rule.cap])
            target, added = form.target(pairs), form.added_loss(pairs, multiplier)
            targets[name] = target
            hold(target.shape == ref.shape and target.dtype == ref.dtype, "shape and dtype", form)
            hold(target.isfinite(), "finite target", target, ref, form)
            if not form.moves_target:
                hold(torch.equal(target, ref), "the target of DPO", form)
            if added is not None:
                hold(added.isfinite() & (added >= 0), "finite added loss ≥ 0", added, pairs.gap, form)
                hold((added == 0) | (pairs.gap < gamma), "nothing is added to a pair at γ", added, pairs.gap, form)
            loss = pair_loss(pairs.gap, target, beta=form.beta)
            hold(loss.isfinite(), "finite loss at the target", loss, pairs.gap, target, form)
        clip, softplus = targets["clip"], targets["softplus"]
        hold(torch.equal(clip, torch.maximum(ref, gamma)), "clip is the maximum", values)
        if values["alpha"] <= 1:
            hold((softplus >= clip), "softplus ≥ clip for α ≤ 1", softplus, clip, ref, values)
        else:
            rounding = 8 * torch.finfo(ref.dtype).eps * torch.maximum(ref.abs(), gamma)
            hold(softplus >= ref - rounding, "softplus ≥ δ_ref", softplus, ref, values)
        hold(targets["inverse_logp"] <= ref, "the release's form relaxes", targets["inverse_logp"], ref, values)
        hold(targets["inverse_prob"] >= ref, "inverse_prob raises", targets["inverse_prob"], ref, values)
        # Monotone in δ_ref: through the chosen side alone.
        higher = PairLogps(pairs.policy_chosen, pairs.policy_rejected, pairs.ref_chosen * 0.5, pairs.ref_rejected)
        hold(made("clip", values).target(higher) >= clip, "clip rises with δ_ref", clip, ref, values)


def metrics(rng: random.Random, draws: int) -> None:
    """Every metric is finite; conditions are 0 or 1 and imply what their definitions imply."""
    for generator, n in chunks(rng, draws):
        dtype, clip = rng.choice(DTYPES), made("clip", values_of(rng))
        pairs = pairs_of(generator, n, dtype)
        rows = per_pair(PairView(pairs, clip.target(pairs), clip.gamma))
        hold(rows.shape == (n, len(METRICS)), "a column a metric", rows.shape)
        hold(rows.isfinite().all(dim=1), "finite", rows[:, 0])
        of = {name: rows[:, column] for name, column in COLUMNS.items()}
        conditions = (
            "prefers_chosen",
            "beats_reference",
            "in_undesirable_region",
            "violation_rate",
            "reference_misaligned",
            "escaped",
        )
        for name in conditions:
            hold((of[name] == 0) | (of[name] == 1), "0 or 1", name, of[name])
        hold(of["in_undesirable_region"] <= of["beats_reference"], "U beats the reference")
        hold(of["in_undesirable_region"] <= of["reference_misaligned"], "U needs δ_ref < 0")
        hold(of["escaped"] <= of["reference_misaligned"] * of["prefers_chosen"], "escaped")
        hold(of["in_undesirable_region"] * of["escaped"] == 0, "U and escaped exclude each other")
        hold((of["violation"] > 0) == (of["violation_rate"] == 1), "violation", of["violation"], of["gap"], clip.gamma)
        hold(of["violation"] >= 0, "violation ≥ 0", of["violation"])


def multiplier(rng: random.Random, draws: int) -> None:
    """λ stays within [0, cap], rises with the violation, and no violation, finite or not, breaks it."""
    for _ in range(max(1, draws // 100)):
        cap = log_uniform(rng, 1e-6, 1e6)
        rule = DualRule(
            epsilon=rng.choice([0.0, math.inf, log_uniform(rng, 1e-6, 1e4)]),
            step_size=rng.choice([0.0, log_uniform(rng, 1e-12, 1e12)]),
            cap=cap,
        )
        start = rng.choice([0.0, cap, rng.uniform(0, cap)])
        last = 0.0
        for violation in (0.0, log_uniform(rng, 1e-9, 1e30), 1e300, math.inf, math.nan):
            got = rule.updated(start, violation)
            hold(0.0 <= got <= cap, "within [0, cap]", got, rule, start, violation)
            if math.isfinite(violation):
                hold(got >= last or violation == 0.0, "rises with the violation", got, last, rule, start, violation)
                last = got
            else:
                hold(got == start, "left alone", got, start, violation)


PIECES = (
    "\n\nHuman: ",
    "\n\nAssistant: ",
    "\n\nHuman:",
    "\n\nAssistant:",
    "Human: ",
    "\n\n",
    "\n",
    "\r\n",
    "\r",
    " ",
    "\0",
    "\ud800",
    "\udfff",
    "\u2028",
    "\x85",
    "\x0b",
    "\x1c",
    "\ufeff",
    "é",
    "e\u0301",
    "𝔸",
    "\u202e",
    "a",
    "Hi there",
    "",
)


def any_text(rng: random.Random) -> str:
    """Turns in order, as a rule, of arbitrary pieces; or pieces alone."""
    pieces = [rng.choice(PIECES) if rng.random() < 0.8 else chr(rng.randrange(0x110000)) for _ in range(rng.randrange(8))]
    if rng.random() < 0.3:
        return "".join(pieces)
    turns = []
    for i in range(rng.choice([1, 2, 2, 2, 3, 4])):
        content = "".join(rng.choice(PIECES[5:]) for _ in range(rng.randrange(1, 4)))
        turns.append(("\n\nHuman: ", "\n\nAssistant: ")[i % 2] + content)
    if rng.random() < 0.2:
        turns.insert(rng.randrange(len(turns) + 1), rng.choice(PIECES))
    return "".join(turns)


def dialogues(rng: random.Random, draws: int) -> int:
    """No text raises anything but DialogueError, and what is parsed renders back to itself; gives how many were parsed."""
    parsed = 0
    for _ in range(draws):
        text = any_text(rng)
        try:
            turns = parse_dialogue(text)
        except DialogueError as error:
            hold(error.reason in Reason, "a known reason", error)
            continue
        parsed += 1
        hold(render_dialogue(turns) == text, "renders back to itself", text)
        hold(turns[-1].role == "assistant" and bool(turns[-1].content.strip()), "ends in an answer", text)
    return parsed


def rows(rng: random.Random, draws: int) -> int:
    """No row raises anything but DialogueError; a kept one renders back to its two texts; gives how many were kept."""
    kept = 0
    for _ in range(draws):
        head = any_text(rng) if rng.random() < 0.4 else "\n\nHuman: " + "".join(rng.choices(PIECES[5:], k=3))
        answers = ["".join(rng.choices(PIECES[5:], k=rng.randrange(4))) for _ in range(2)]
        row = {
            column: rng.choice([head + "\n\nAssistant: " + answer] * 30 + [any_text(rng), None, 3, b"\n\nHuman: x", [], {}])
            for column, answer in zip(("chosen", "rejected"), answers, strict=True)
        }
        try:
            got = split_pair(**row)
        except DialogueError as error:
            hold(error.reason in Reason, "a known reason", error)
            continue
        kept += 1
        for column in ("chosen", "rejected"):
            turns = [(message["role"], message["content"]) for message in [*got["prompt"], *got[column]]]
            hold(render_dialogue(turns) == row[column], "not a byte is lost", row)
    return kept


def any_value(rng: random.Random):
    """A value that an option may be given by mistake, in a program or a file."""
    return rng.choice(
        [
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            10**400,
            -0.0,
            0.5,
            1e308,
            5e-324,
            math.inf,
            -math.inf,
            math.nan,
            "",
            " ",
            "none",
            "clip",
            "sum",
            "mean",
            "1e-6",
            "nan",
            "violation",
            "\0",
            "\ud800",
            "é" * 40,
            [],
            [1],
            ["sigmoid"],
            {},
            {"a": 1},
            (1, 2),
            b"x",
            1j,
            object(),
            torch.tensor(1.0),
            torch.tensor([1.0, 2.0]),
            "".join(rng.choices(string.printable, k=5)),
            rng.uniform(-3, 3),
            rng.randrange(-3, 4),
            log_uniform(rng, 1e-300, 1e300),
        ]
    )


OWN_FIELDS = tuple(
    field.name for field in fields(CPOConstrainedConfig) if field.init and field.name not in trl.DPOConfig.__dataclass_fields__
)


def configs(rng: random.Random, draws: int, output_dir: str) -> int:
    """Any value of any own field makes a config, or a ValueError or TypeError that names one; gives how many were made."""
    made = 0
    for _ in range(draws):
        changed = {name: any_value(rng) for name in rng.sample(OWN_FIELDS, rng.randrange(1, 4))}
        if rng.random() < 0.5:
            changed.setdefault("constraint", rng.choice(sorted(CONSTRAINTS)))
        if changed.get("constraint", "none") != "none" and rng.random() < 0.2:
            changed["beta"] = any_value(rng)  # DPO's own, and read by the constraints
        try:
            config = CPOConstrainedConfig(output_dir, use_cpu=True, bf16=False, report_to="none", **changed)
        except (ValueError, TypeError) as error:
            hold(any(name in str(error) for name in changed), "the message names a field", str(error), changed)
            continue
        made += 1
        form = config.form
        hold(form.gamma >= 0 and type(form) is CONSTRAINTS[config.constraint], "what was made is sound", changed)
        if (rule := form.dual_rule) is not None:
            hold(rule.step_size >= 0 and rule.start <= rule.cap, "its multiplier", changed)
    return made


def recipes(rng: random.Random, draws: int, folder: str) -> int:
    """A recipe file of any text is read, or refused with the words for people; gives how many were read."""
    from trl_cpo.cli.errors import UserError
    from trl_cpo.cli.options import checked, read_config, run_parser

    parser, read = run_parser("fuzz"), 0
    file = Path(folder) / "recipe.yaml"
    known = [action.dest for action in parser._actions]
    tokens = (
        ": ",
        "\n",
        "- ",
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "!!python/object/apply:os.getcwd []",
        "!!binary x",
        "<<: ",
        "#",
        "'",
        '"',
        "|",
        ">",
        "\t",
        "---\n",
        "%YAML 9.9\n",
        "2026-11-21",
        "0x1F",
        "1_000",
        "~",
        ".inf",
        ".nan",
        "\x85",
        "é",
        "\0",
        "constraint",
        "gamma",
        "beta",
        "clip",
        "1e-6",
        "no",
        "null",
        "true",
        "true: 1\n",
    )
    for _ in range(draws):
        if rng.random() < 0.5:
            sane = ("gamma: 0.5", "constraint: clip", "beta: 1e-1", "max_steps: 3", "report_to: none", "use_peft: true")
            lines = rng.sample(sane, rng.randrange(4)) + [f"{rng.choice(known)}: {any_value(rng)!r}"] * rng.randrange(2)
            text = "\n".join(lines)
        else:
            text = "".join(rng.choice(tokens) for _ in range(rng.randrange(12)))
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            values = read_config(str(file))
            taken = checked(values, parser, "recipe.yaml")
        except UserError as error:
            hold(bool(str(error).strip()), "says something", text)
            continue
        read += 1
        hold(set(taken) == set(values), "no key is lost", text)
    return read


#: Name to (function, which share of the asked draws it makes: what is slow makes fewer).
TARGETS = {
    "objective": (objective, 1.0),
    "constraints": (constraints, 1.0),
    "metrics": (metrics, 1.0),
    "multiplier": (multiplier, 1.0),
    "dialogues": (dialogues, 1.0),
    "rows": (rows, 1.0),
    "configs": (configs, 0.1),
    "recipes": (recipes, 0.02),
}
