"""The probe among several processes: equally many forwards, one verdict, and no silence when memory runs out."""

import logging

import pytest
import torch
from accelerate import PartialState

from trl_cpo.engine import processes
from trl_cpo.engine.forward import PackedPairForward, probe
from trl_cpo.engine.forward import adapter as adapter_module
from trl_cpo.engine.forward.plan import plan_pairs
from trl_cpo.engine.forward.probing import probe as probing
from trl_cpo.engine.forward.sharing import PrefixSharing

from helpers.families import tiny_model
from helpers.forward_checks import ATTENTIONS
from helpers.plan_mistakes import first_answer_token_from_the_branch, rejected_sees_chosen, running_positions


def forwards_of(model, **options):
    """The probe's verdict, and how many forwards it ran."""
    count = []
    hook = model.model.register_forward_hook(lambda *_: count.append(1))
    verdict = probe(model, **options)
    hook.remove()
    return verdict, len(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_as_many_forwards_whatever_they_give(attention, dtype, monkeypatch):
    options = dict(attention=attention, max_length=40)
    verdict, expected = forwards_of(tiny_model("mistral").to(dtype), **options)
    assert verdict.ok
    # The last is seen by the tree mask alone.
    mistakes = [running_positions, first_answer_token_from_the_branch, rejected_sees_chosen]
    for mistake in mistakes[: 3 if attention == "dense" else 2]:
        monkeypatch.setattr(adapter_module, "plan_pairs", lambda *a, mistake=mistake, **k: mistake(plan_pairs(*a, **k)))
        verdict, count = forwards_of(tiny_model("mistral").to(dtype), **options)
        assert not verdict.ok and count == expected
    monkeypatch.undo()
    monkeypatch.setattr(probing, "mean_gap", lambda *_: 0.0)
    verdict, count = forwards_of(tiny_model("mistral").to(dtype), **options)
    assert "ignores position_ids" in verdict.reason and count == expected


class Others:
    """What another process says at each agreement: empty where it found no fault."""

    def __init__(self, *says):
        self.says, self.heard = iter(says), []

    def __call__(self, reason):
        self.heard.append(reason)
        return reason or next(self.says)


def test_a_fault_that_another_process_found_refuses_here_too():
    others = Others("", "", "")
    assert probe(tiny_model("llama"), agree=others).attention == "segments"
    assert others.heard == ["", ""]  # after the padded runs, and after segments
    verdict = probe(tiny_model("llama"), agree=Others("", "off by a nat", ""))
    assert verdict.ok and verdict.attention == "dense"
    model = tiny_model("llama")
    verdict = probe(model, agree=Others("", "off by a nat", "off by two"))
    assert (verdict.ok, verdict.reason) == (False, "off by two") and model.config._attn_implementation == "sdpa"
    verdict, forwards = forwards_of(tiny_model("llama"), agree=Others("fails there"))
    assert (verdict.ok, verdict.reason, forwards) == (False, "fails there", 1)


def test_nobody_is_left_waiting_for_an_agreement():
    """A process that finds a fault agrees as often as one that is told of it."""
    told = Others("", "off by a nat", "off by two")
    probe(tiny_model("llama"), agree=told)
    finds = Others("", "", "")
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    assert not probe(model, agree=finds).ok
    assert len(finds.heard) == len(told.heard) == 3 and all(finds.heard[1:])


@pytest.mark.parametrize(
    ("reasons", "rank", "expected"),
    [
        (["", ""], 0, ""),
        (["off", "off by more"], 1, "off by more"),
        (["", "off"], 0, "off (on process 1 of 2; others found no fault)"),
        (["off", ""], 1, "off (on process 0 of 2; others found no fault)"),
    ],
)
def test_the_reason_of_one_process_is_that_of_all(reasons, rank, expected, monkeypatch):
    state = PartialState()
    monkeypatch.setattr(state, "num_processes", 2)
    monkeypatch.setattr(processes, "PartialState", lambda: state)
    monkeypatch.setattr(processes, "gather_object", lambda mine: reasons if mine == [reasons[rank]] else None)
    assert processes.agreed_refusal(reasons[rank]) == expected


def test_one_process_asks_nobody(monkeypatch):
    monkeypatch.setattr(processes, "gather_object", lambda mine: pytest.fail("gathered"))
    assert processes.agreed_refusal("off") == "off"


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("forward", [0, 1, 2, 3])
def test_running_out_of_memory_is_raised(forward, error):
    """In the padded runs (short, then long) and in the packed ones."""
    model, count = tiny_model("mistral"), []

    def run_out(*_):
        count.append(1)
        if len(count) > forward:
            raise error

    model.model.register_forward_hook(run_out)
    with pytest.raises(type(error)) as raised:
        probe(model, max_length=40)
    assert len(count) == forward + 1
    assert "shorten max_length" in raised.value.__notes__[-1]


def test_other_errors_of_a_model_are_a_reason_and_no_more():
    model = tiny_model("llama")
    model.model.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("a kernel is missing")))
    assert "a kernel is missing" in probe(model).reason


def test_the_probe_runs_under_the_autocast_that_training_will_use(caplog):
    sharing = PrefixSharing(None, 40, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    seen = []
    model = tiny_model("llama")
    model.model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with caplog.at_level(logging.INFO):
        assert isinstance(sharing.of(model), PackedPairForward)
    assert seen and all(seen)
    assert "prefix sharing on, segments attention: sdpa, bfloat16" in caplog.text
