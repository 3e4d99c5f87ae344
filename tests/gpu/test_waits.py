"""Where the CPU waits for the device in training, as CUDA's own debug mode says; on a fake device tests/engine/forward does."""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer
from trl_cpo.engine.forward import varlen

from helpers.on_gpu import DEVICE, ON_GPU, REHEARSAL, on_device
from helpers.tiny import make_lora, make_model, make_tokenizer, pair_rows

pytestmark = [*ON_GPU, pytest.mark.usefixtures("no_model_cards")]

#: Packages that a wait is put down to, by the innermost frame in one of them.
PACKAGES = {
    str(Path(import_module(name).__file__).parent): name for name in ("trl_cpo", "trl", "transformers", "peft", "accelerate")
}
WARNED = "called a synchronizing CUDA operation"
#: At the end of a step: its pairs' numbers, in one copy.
AT_A_STEPS_END = {"trl_cpo/engine/guards.py:_on_cpu": 1}
#: At the end of training: whether the weights are finite.
AT_THE_END = {"trl_cpo/engine/guards.py:_look"}
#: In the rehearsal, also what lies on the CPU in any case, and the emulated kernel.
_FORWARD = "trl_cpo/engine/forward/varlen.py"
ON_THE_CPU = {f"{_FORWARD}:{name}" for name in ("layout_of", "_read", "_call")} | {"trl_cpo/engine/guards.py:of"}


def place_of(stack) -> str:
    """File and function of the innermost frame in one of the packages."""
    for frame in reversed(stack):
        for folder, name in PACKAGES.items():
            if frame.filename.startswith(f"{folder}/"):
                return f"{name}/{Path(frame.filename).relative_to(folder)}:{frame.name}"
    return "elsewhere"


def warning(method):
    """The method, which warns as CUDA does."""

    def asked(*args, **kwargs):
        warnings.warn(WARNED, stacklevel=1)
        return method(*args, **kwargs)

    return asked


@contextmanager
def debug_mode() -> Iterator[None]:
    """CUDA warns of each wait. In the rehearsal a tensor's ways to Python do."""
    if not REHEARSAL:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu"):
            patch.setattr(torch.Tensor, name, warning(getattr(torch.Tensor, name)))
        yield


@contextmanager
def waits() -> Iterator[Counter]:
    """Within the block, the waits by place."""
    found: Counter[str] = Counter()

    def note(message, *_, **__):
        if WARNED in str(message):
            found[place_of(traceback.extract_stack())] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        with debug_mode():
            yield found


def ours(found: Counter) -> dict[str, int]:
    found = {place: count for place, count in found.items() if place.startswith("trl_cpo/")}
    if not REHEARSAL:
        return found
    return {place: AT_A_STEPS_END.get(place, count) for place, count in found.items() if place not in ON_THE_CPU}


def by_package(found: Counter) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for place, count in found.items():
        counts[place.partition("/")[0]] += count
    return dict(counts)


class EachStep(TrainerCallback):
    """The waits of each step, its log and its data left out."""

    def __init__(self):
        self.steps: list[Counter] = []
        self.found = self.before = Counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = Counter(self.found)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.found - self.before)


def trainer_in(folder, callbacks=(), **options) -> CPOConstrainedTrainer:
    """With groups, labels, multipliers and a floor."""
    rows = [{**row, "sure": 0.6 + 0.1 * (i % 4), "kind": "ab"[i % 2], "better": 1.0} for i, row in enumerate(pair_rows(24))]
    given = dict(
        constraint="lagrangian",
        gamma=0.5,
        chosen_floor=0.5,
        group_column="kind",
        gamma_by_group={"a": 0.5, "b": 1.0},
        probability_column="sure",
        margin_column="better",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        dataloader_pin_memory=not REHEARSAL,
        max_steps=3,
        narrate=False,
        learning_rate=1e-3,
    )
    return CPOConstrainedTrainer(
        model=make_model(),
        args=CPOConstrainedConfig(**on_device(folder, **{**given, **options})),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        peft_config=make_lora(),
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def warm(tmp_path_factory, device):
    """A trainer that has trained, so that nothing happens for the first time."""
    trainer = trainer_in(tmp_path_factory.mktemp("run"))
    trainer.train()
    trainer.model.train()
    assert trainer._sharing.verdict(trainer.model).attention == "varlen"
    return trainer


def micro_batch(trainer, last: bool, batch) -> Counter:
    trainer.accelerator.gradient_state._set_sync_gradients(last)
    with waits() as found:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model_wrapped, batch)
        loss.backward()
    return found


def fresh_batch(trainer):
    """Of pairs that were in no batch before: layouts are kept for a few batches."""
    varlen._layout.cache_clear()
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].device.type == DEVICE.type
    return batch


def test_a_packed_micro_batch_waits_for_nothing_of_ours(warm, record):
    first, last = (micro_batch(warm, last, fresh_batch(warm)) for last in (False, True))
    record(first=dict(first), last=dict(last))
    assert ours(first) == {}
    assert ours(last) == AT_A_STEPS_END
    if not REHEARSAL:
        # TRL waits for each number of its log, and twice in the backward of its head, where no frame of it is on the stack.
        assert by_package(first).keys() <= {"trl", "elsewhere"}, first
        assert first["elsewhere"] == 2, first


def test_a_wait_in_the_packed_forward_is_seen(warm, monkeypatch):
    def slow(tensors, device):
        sent = [tensor.to(device) for tensor in tensors]
        return [tensor for tensor in sent if tensor.sum().item() is not None]

    monkeypatch.setattr(varlen, "sent", slow)
    assert "trl_cpo/engine/forward/varlen.py:_layout" in ours(micro_batch(warm, False, fresh_batch(warm)))


def test_a_steps_waits_in_training(tmp_path, record):
    """Counted from the second step on: the first checks that policy and reference agree."""
    counted = {}
    for sharing in (True, False):
        each = EachStep()
        trainer = trainer_in(tmp_path / str(sharing), callbacks=[each], prefix_sharing=sharing, max_steps=4)
        with waits() as found:
            each.found = found
            trainer.train()
        step = each.steps[-1]
        counted[sharing] = step
        name = "packed" if sharing else "padded"
        record(path=name, step=dict(step), packages=by_package(step), training=by_package(found))
        assert ours(step) == AT_A_STEPS_END, step
        if not REHEARSAL:
            assert ours(found).keys() <= {*AT_A_STEPS_END, *AT_THE_END, *ours(each.steps[0])}, found
    if not REHEARSAL:
        assert sum(counted[True].values()) <= sum(counted[False].values())
