"""One answer everywhere: DDP, ZeRO-1/2/3 and FSDP2 in two processes, launched with the files of deepspeed_configs/.

Every training is set beside the same one in one process and in double precision. Float32 may leave the latter by no more than
a few times what it does in one process, where only the order of sums is another (docs/scaling.md derives it).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.launching import WRAPPINGS
from helpers.parallel_jobs import JSON_RUN, SCALING

#: Of a launch, which comes here and not where test_packed_parallel.py looks at the rest of it. It follows that of one process.
SECONDS = {"ddp": 50, "zero1": 20, "zero2": 58, "zero3": 110, "fsdp2": 60}
STEPS = 4
TOKEN_MEANS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")

#: How much further from double precision than one process's float32 a run may be, and what is taken as its least distance:
#: roundings of the largest number summed (log-probabilities, nats) or of a weight.
FACTOR, ROUNDINGS, UNIT = 4, 4, 2.0**-24


@pytest.fixture
def one_process(parallel) -> dict[str, tuple[dict, dict]]:
    """By name of the run: in float32, and in float64 with the reference on the fly, which is the same in exact numbers."""
    (seen,) = parallel("one")["scaling"]["seen"]
    firsts = [run[0] for run in seen]
    pairs = zip(firsts[: len(SCALING)], firsts[len(SCALING) : 2 * len(SCALING)], strict=True)
    return {**dict(zip(SCALING, pairs, strict=True)), "qlora clip": (firsts[-1], None)}


def weights(run: dict) -> dict[str, torch.Tensor]:
    (path,) = Path(run["trained"]).glob("*.safetensors")
    tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
    # Some ways of saving write tied weights twice.
    tensors.pop("lm_head.weight", None)
    return tensors


def numbers(run: dict, at_reference: bool) -> dict[str, list[float]]:
    """By name, what was logged at each step, and what the evaluation gave."""
    found = {}
    for step, record in enumerate([*run["logs"], run["evaluated"]]):
        for key, value in record.items():
            # While the policy is the reference still, which of two equal numbers is larger is chance.
            chance = key in ("cpo/beats_reference", "cpo/in_undesirable_region", "rewards/accuracies")
            if not (step == 0 and at_reference and chance):
                found.setdefault(key, []).append(value)
    return found


def assert_as_exact(run: dict, single: dict, double: dict, at_reference: bool, apart: tuple[str, ...] = ()) -> None:
    """`run` is about as far from `double` as `single` is, in all but the metrics `apart`."""
    assert len(run["logs"]) == len(double["logs"]) == STEPS and len(run["evaluated"]) > 12
    ours, theirs, exact = (
        {name: values for name, values in numbers(each, at_reference).items() if name not in apart}
        for each in (run, single, double)
    )
    assert ours.keys() == theirs.keys() == exact.keys()
    largest = max(abs(value) for key in ("logps/chosen", "logps/rejected") for value in exact[key])
    for key, values in exact.items():
        # Of one number the rounding is chance; of all steps together it is a size.
        seen = max(abs(a - b) for a, b in zip(theirs[key], values, strict=True))
        size = max(largest, *map(abs, values))
        allowed = FACTOR * max(seen, ROUNDINGS * UNIT * size)
        for step, (value, expected) in enumerate(zip(ours[key], values, strict=True)):
            assert abs(value - expected) <= allowed, (key, step, value, expected, allowed)
    ours, theirs, exact = weights(run), weights(single), weights(double)
    assert ours.keys() == theirs.keys() == exact.keys() and exact
    seen = max((theirs[key] - value).abs().max().item() for key, value in exact.items())
    allowed = FACTOR * max(seen, ROUNDINGS * UNIT)
    for key, value in exact.items():
        assert (ours[key] - value).abs().max().item() <= allowed, (key, allowed)


def assert_alike_in_bfloat16(run: dict, single: dict) -> None:
    """`run` starts as `single` does and stays about there."""
    ours, theirs = run["logs"], single["logs"]
    assert len(ours) == len(theirs) == 3 and run["quantized"] == single["quantized"] == 14
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.keys() == other.keys()
        # Before any update the forward is as exact as elsewhere; the gradient is in bfloat16.
        bounds = dict(rel=1e-5, abs=1e-4) if step == 0 else dict(rel=1e-2, abs=5e-2)
        assert mine.pop("grad_norm") == pytest.approx(other.pop("grad_norm"), rel=2e-2)
        assert mine == pytest.approx(other, **bounds)
    ours, theirs = weights(run), weights(single)
    assert ours.keys() == theirs.keys() and ours
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-2)


def assert_resumed(whole: dict, resumed: dict) -> None:
    """Gone on with from its second step, a run is bit for bit the one that was not interrupted."""
    assert len(resumed["logs"]) == STEPS - 2
    assert resumed["logs"] == whole["logs"][2:] and resumed["evaluated"] == whole["evaluated"]
    ours, theirs = weights(resumed), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def assert_priced(price: dict, single: dict, kind: str, run: dict) -> None:
    """Likelihoods are those of one process; samples are others. Sharded models are not measured, and trained all the same."""
    if not run.get("options", {}).get("price") or kind in ("zero3", "fsdp2"):
        assert not price
        return
    assert price.keys() == single.keys()
    assert price["eval_cpo/chosen_nll"] == pytest.approx(single["eval_cpo/chosen_nll"], rel=1e-4)
    assert price["eval_cpo/kl"] > 0 and price["eval_cpo/answer_tokens"] == single["eval_cpo/answer_tokens"]


EXPECTED = {
    **WRAPPINGS,
    "zero1": {"distributed_type": "DEEPSPEED", "wrapper": "DeepSpeedEngine", "zero_stage": 1},
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow(seconds)) for kind, seconds in SECONDS.items()])
def test_two_processes_give_what_one_gives(parallel, one_process, kind):
    runs, ranks = parallel(kind)["scaling"].values()
    for seen in ranks:
        for run, results in zip(runs, seen, strict=True):
            name = JSON_RUN if run["name"].endswith("json") else run["name"]
            for result in results:
                assert result["processes"] == 2
                assert {key: result[key] for key in EXPECTED[kind]} == EXPECTED[kind]
                assert (result["partitioned"] > 0) == (kind == "zero3")
                assert (result["dtensors"] > 0) == (kind == "fsdp2")
                assert result["offloaded"] == (run["name"] == "zero3_offload json")
                # Sized by the model's width of 32: it was the JSON file that was read.
                assert (result["bucket"] == 32 * 32) == run["name"].endswith("json")
            if run.get("nf4"):
                # The logs are changed by it: a copy for each process.
                assert_alike_in_bfloat16(*(json.loads(json.dumps(each)) for each in (results[0], one_process[name][0])))
                continue
            # The adapters are not the usual zeros.
            at_reference = not (run.get("lora") or run.get("ref_model"))
            # TRL's means over tokens are over those of all processes, and then over micro-batches.
            apart = TOKEN_MEANS if run.get("rounds") else ()
            assert_as_exact(results[0], *one_process[name], at_reference, apart)
            assert_priced(results[0]["price"], one_process[name][0]["price"], kind, run)
            if run.get("resume"):
                assert_resumed(*results)
    # λ and every other number that is not a process's own is the same on both, to the last bit.
    for first, second in zip(*ranks, strict=True):
        for ours, theirs in zip(first, second, strict=True):
            assert [log["cpo/gap"] for log in ours["logs"]] == [log["cpo/gap"] for log in theirs["logs"]]
            assert ours["evaluated"] == theirs["evaluated"] and ours["price"] == theirs["price"]
            lambdas = [log.get("cpo/lambda") for log in ours["logs"]]
            assert lambdas == [log.get("cpo/lambda") for log in theirs["logs"]]
            if lambdas[0] is not None:
                # It moves, and does not stand at its cap.
                assert len(set(lambdas)) == len(lambdas) and max(lambdas) < 5
