"""The self-test says no to edits of upstream that would make training wrong. Each is made in the code that is installed."""

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import pytest

from trl_cpo.selftest import by_hand, checks, materials

DPO = "trl.trainer.dpo_trainer:DPOTrainer"
COLLATOR = "trl.trainer.dpo_trainer:DataCollatorForPreference"
LOOP = "transformers:Trainer"


@dataclass(frozen=True)
class Edit:
    """A change of upstream's source: in these methods of a class, `old` (a pattern) becomes `new`."""

    what: str
    changes: tuple[tuple[str, str, str, str], ...]
    #: The check that has to see it, where another one may be blind.
    seen_by: str | None = None


def edit(what: str, *changes: tuple[str, str, str, str], seen_by: str | None = None) -> Edit:
    return Edit(what, changes, seen_by)


SIDES = r"(\w*)chosen_(\w+), (\w*)rejected_(\w+) = (.+)\.chunk\(2, dim=0\)"
SWAPPED = (
    *(
        (COLLATOR, "torch_call", rf"{one} \+ {other}", f"{other} + {one}")
        for one, other in (
            ("prompt_chosen_ids", "prompt_rejected_ids"),
            ("chosen_attention_mask", "rejected_attention_mask"),
            ("chosen_mask", "rejected_mask"),
        )
    ),
    (DPO, "_compute_loss", SIDES, r"\3rejected_\4, \1chosen_\2 = \5.chunk(2, dim=0)"),
    (DPO, "compute_ref_log_probs", r"return ref_logps\.chunk\(2, dim=0\)", "return ref_logps.chunk(2, dim=0)[::-1]"),
)

EDITS = [
    edit(
        "calls the model twice",
        (DPO, "_compute_loss", r"(outputs = model\(.+\))", r"\1; \1"),
    ),
    edit("calls the model's forward by name", (DPO, "_compute_loss", r"outputs = model\(", "outputs = model.forward(")),
    edit("calls its own model, not the argument", (DPO, "_compute_loss", r"outputs = model\(", "outputs = self.model(")),
    edit(
        "renames the reference's keys in a batch",
        (DPO, "_compute_loss", r'inputs\["ref_(chosen|rejected)_logps"\]', r'inputs["reference_\1_logps"]'),
    ),
    edit(
        "renames the reference's columns everywhere",
        (DPO, "_compute_loss", r'"ref_(chosen|rejected)_logps"', r'"reference_\1_logps"'),
        (DPO, "_precompute_ref_logps", r'"ref_(chosen|rejected)_logps"', r'"reference_\1_logps"'),
        (COLLATOR, "torch_call", r'"ref_(chosen|rejected)_logps"', r'"reference_\1_logps"'),
    ),
    edit(
        "renames _metrics",
        *((DPO, method, r"self\._metrics", "self._stats") for method in ("__init__", "_compute_loss", "log")),
    ),
    edit("logs a reward under another name", (DPO, "_compute_loss", r'"rewards/accuracies"', '"rewards/accuracy"')),
    edit(
        "logs a reward twice",
        (DPO, "_compute_loss", r'(self\._metrics\[mode\]\["rewards/rejected"\]\.append\(.+\))', r"\1; \1"),
    ),
    edit(
        "averages over tokens in place of summing",
        (DPO, "_compute_loss", r"per_token_logps\.sum\(dim=1\)", "per_token_logps.mean(dim=1)"),
        (DPO, "compute_ref_log_probs", r"per_token_logps\.sum\(dim=1\)", "per_token_logps.mean(dim=1)"),
    ),
    edit("sums the loss over pairs", (DPO, "_compute_loss", r"per_sequence_loss\.mean\(\)", "per_sequence_loss.sum()")),
    edit("puts the rejected rows first, everywhere", *SWAPPED),
    edit(
        "reads args in place of the attribute",
        (DPO, "_compute_loss", r"self\.precompute_ref_logps", "self.args.precompute_ref_log_probs"),
    ),
    edit(
        "hands the reference's log-probs back in the other order",
        (DPO, "compute_ref_log_probs", r"return ref_logps\.chunk\(2, dim=0\)", "return ref_logps.chunk(2, dim=0)[::-1]"),
    ),
    edit(
        "takes the inputs first",
        (DPO, "compute_ref_log_probs", r"self, model, inputs", "self, inputs, model"),
        (DPO, "_precompute_ref_logps", r"\(model, padded_batch\)", "(padded_batch, model)"),
    ),
    edit(
        "weighs the tail of an answer otherwise", (DPO, "_compute_loss", r"self\.ld_alpha \* tail", "self.ld_alpha**2 * tail")
    ),
    edit(
        "smooths labels by default",
        (
            DPO,
            "_compute_loss",
            r"-F\.logsigmoid\(self\.beta \* delta_score\)",
            "-0.9 * F.logsigmoid(self.beta * delta_score) - 0.1 * F.logsigmoid(-self.beta * delta_score)",
        ),
    ),  # fmt: skip
    edit(
        "leaves beta out of the loss",
        (DPO, "_compute_loss", r"F\.logsigmoid\(self\.beta \* delta_score\)", "F.logsigmoid(delta_score)"),
    ),  # fmt: skip
    edit(
        "cuts the gradient",
        (
            DPO,
            "_compute_loss",
            r"chosen_logps, rejected_logps = logps\.chunk",
            "chosen_logps, rejected_logps = logps.detach().requires_grad_().chunk",
        ),
    ),  # fmt: skip
    edit(
        "counts the prompt as the answer",
        (COLLATOR, "torch_call", r"\[0\] \* len\(example\[\"prompt_ids\"\]\)", '[1] * len(example["prompt_ids"])'),
    ),
    edit(
        "leaves out the end of an answer",
        (
            COLLATOR,
            "torch_call",
            r"\[1\] \* len\(example\[\"(chosen|rejected)_ids\"\]\)",
            r'[1] * (len(example["\1_ids"]) - 1) + [0]',
        ),
    ),  # fmt: skip
    edit("cuts the start of a text", (COLLATOR, "torch_call", r"slice\(None, self\.max_length\)", "slice(1, self.max_length)")),
    edit(
        "divides by the accumulated steps twice",
        (DPO, "compute_loss", r"return (self\._compute_loss\(.+\))", r"return \1 / self.args.gradient_accumulation_steps"),
    ),  # fmt: skip
    edit("logs the sum of a metric", (DPO, "log", r"sum\(val\) / len\(val\)", "sum(val)")),
    edit("keeps the metrics of earlier steps", (DPO, "log", r"self\._metrics\[mode\]\.clear\(\)", "pass")),
    edit("renames the epoch's method", (LOOP, "_inner_training_loop", r"self\._run_epoch", "self._train_epoch")),
    edit(
        "draws other pairs after a resume",
        (LOOP, "_run_epoch", r"skip_first_batches\((\w+), (\w+)\)", r"skip_first_batches(\1, 0)"),
        seen_by="resume",
    ),
    edit(
        "does not load the optimizer's state",
        (LOOP, "_load_optimizer_and_scheduler", r"if checkpoint is None:", "if True:"),
        seen_by="resume",
    ),
]


def patched(function: Callable, module: ModuleType, owner: str, changes: list[tuple[str, str]]) -> Callable:
    """The function with its source changed; each pattern has to be found."""
    source = textwrap.dedent(inspect.getsource(function)).replace("super()", f"super({owner}, self)")
    for old, new in changes:
        source, found = re.subn(old, new, source)
        assert found, f"upstream no longer has {old!r} in {function.__qualname__}: write the edit for what it has"
    scope: dict = {}
    exec(compile(source, inspect.getsourcefile(function) or "", "exec"), vars(module), scope)
    return scope[function.__name__]


def apply(monkeypatch, wanted: Edit) -> None:
    places: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for owner, method, old, new in wanted.changes:
        places.setdefault((owner, method), []).append((old, new))
    for (owner, method), changes in places.items():
        cls = getattr(import_module(owner.partition(":")[0]), owner.partition(":")[2])
        home = next(base for base in cls.__mro__ if method in vars(base))
        module = import_module(home.__module__)
        monkeypatch.setattr(home, method, patched(vars(home)[method], module, home.__name__, changes))


@pytest.fixture(autouse=True)
def quiet(capfd):
    """Trainings print."""


def test_the_installed_libraries_pass_and_so_do_harmless_edits(monkeypatch):
    """Every method that is edited below is compiled anew, without a change: what is seen there is the edit."""
    places = {change[:2] for wanted in EDITS for change in wanted.changes}
    apply(monkeypatch, Edit("nothing", tuple((owner, method, r"(?s)\A(.*)\Z", r"\1") for owner, method in places)))
    assert checks.run() == {}


def test_the_pairs_are_telling():
    """Targets that clip moves and such that it does not; answers of unlike lengths; gaps on both sides of gamma."""
    no_loss = by_hand.clip(1.0, checks.GAMMA)
    models = materials.model(0), materials.model(1)
    gaps = [by_hand.expected(*models, [pair], no_loss, beta=1.0, gamma=checks.GAMMA).metrics for pair in checks.PAIRS]
    for name in ("cpo/gap", "cpo/ref_gap"):
        assert {gap[name] > checks.GAMMA for gap in gaps} == {True, False}
    lengths = [[len(pair[side].split()) for side in ("chosen", "rejected")] for pair in checks.PAIRS]
    assert {(chosen > rejected) - (chosen < rejected) for chosen, rejected in lengths} >= {1, -1}


@pytest.mark.parametrize("wanted", EDITS, ids=lambda edit: edit.what.replace(" ", "-"))
def test_a_harmful_edit_is_seen(monkeypatch, wanted):
    apply(monkeypatch, wanted)
    failed = checks.run(first=wanted.seen_by is None)
    assert failed
    if wanted.seen_by:
        assert wanted.seen_by in failed
