"""Every option of DPOConfig about the loss: under each constraint and loss type it changes the loss, or is refused or told."""

import pytest
from trl import DPOConfig

from trl_cpo import CPOConstrainedConfig, CPOConstrainedTrainer, engine
from trl_cpo._trl.loss import LOSS_READS
from trl_cpo._trl.loss_options import ACTS_WHERE

from helpers.tiny import make_model, pairs_dataset, training_options

#: Another value than the default for each option about the loss; `loss_type` and `max_length` aside, which are tested for
#: themselves.
VALUES = {
    "beta": 0.7,
    "label_smoothing": 0.3,
    "label_smoothing_factor": 0.3,
    "discopop_tau": 0.5,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.8,
    "ld_alpha": 0.4,
    "use_weighting": True,
    "loss_weights": [0.5],
}
#: Options that change what the reference is over steps; they show in no first loss.
OVER_STEPS = {"ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}
#: What a loss type needs to run at all.
NEEDS = {"exo_pair": {"label_smoothing": 0.1}}


@pytest.fixture(scope="module")
def models():
    return make_model(), make_model(1)


@pytest.fixture
def loss_of(tmp_path, tokenizer, models):
    def loss(**options):
        args = CPOConstrainedConfig(**training_options(tmp_path, prefix_sharing=False, **options))
        trainer = CPOConstrainedTrainer(*models, args=args, processing_class=tokenizer, train_dataset=pairs_dataset(6))
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        batch = trainer.data_collator([{name: row[name] for name in names} for row in trainer.train_dataset])
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch).item()
        return loss, args.cautions(), trainer._metrics["train"]["rewards/chosen"]

    return loss


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("constraint", ["none", "clip", "penalty"])
@pytest.mark.parametrize("loss_type", LOSS_READS)
def test_an_option_acts_or_is_refused_or_warned_of(loss_of, constraint, loss_type):
    base = {"constraint": constraint, "loss_type": [loss_type], "gamma": 2.0, **NEEDS.get(loss_type, {})}
    if constraint == "clip" and LOSS_READS[loss_type] != "sum":
        with pytest.raises(ValueError, match=loss_type):
            loss_of(**base)
        return
    before, notes, rewards = loss_of(**base)
    assert notes == []
    for name, value in VALUES.items():
        options = base | {name: value}
        if reason := refused(options):
            with pytest.raises(ValueError, match=reason):
                loss_of(**options)
            continue
        after, notes, rewards_after = loss_of(**options)
        told = any(note.startswith(f"{name}=") and "changes nothing" in note for note in notes)
        if name == "beta" and loss_type == "sft":
            # Of the loss no part; of the rewards that are logged a factor.
            assert before == after and rewards != rewards_after and not told
        else:
            assert told == (after == before), f"{name}={value!r}: loss {before} and {after}, cautions {notes}"


def refused(options):
    """The words of a refusal, TRL's or ours, or None."""
    (loss_type,) = options["loss_type"]
    if options.get("use_weighting") and loss_type in ("aot", "aot_unpaired", "sft"):
        return "use_weighting=True weighs each pair's loss"
    if options.get("f_divergence_type"):
        if options["constraint"] == "clip":
            return "f_divergence_type='reverse_kl' alone"
        if loss_type in ("nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"):
            return "f_divergence_type='js_divergence'"
    return None


def test_the_coefficient_of_alpha_divergence_acts_there(loss_of):
    base = {"f_divergence_type": "alpha_divergence", "constraint": "none"}
    (before, *_), (after, notes, _) = loss_of(**base), loss_of(**base, f_alpha_divergence_coef=0.8)
    assert before != after and notes == []


@pytest.mark.parametrize("name, value", OVER_STEPS.items())
def test_options_of_a_synchronised_reference_act_only_there(tmp_path, name, value):
    idle = CPOConstrainedConfig(**training_options(tmp_path, **{name: value}))
    assert [note for note in idle.cautions() if note.startswith(f"{name}=")]
    used = CPOConstrainedConfig(**training_options(tmp_path, sync_ref_model=True, **{name: value}))
    assert used.cautions() == []


def test_the_table_names_fields_of_trls(tmp_path):
    assert ACTS_WHERE.keys() <= DPOConfig.__dataclass_fields__.keys() and ACTS_WHERE.keys() <= VALUES.keys() | OVER_STEPS.keys()


@pytest.mark.parametrize("kind", [CPOConstrainedTrainer, engine.DPOTrainer])
def test_the_trainer_warns(tmp_path, tokenizer, models, kind):
    config = CPOConstrainedConfig if kind is CPOConstrainedTrainer else engine.DPOConfig
    args = config(**training_options(tmp_path, label_smoothing=0.3))
    with pytest.warns(UserWarning, match="label_smoothing=0.3 changes nothing: only a loss_type of 'exo_pair', 'robust'"):
        kind(*models, args=args, processing_class=tokenizer, train_dataset=pairs_dataset(6))


def test_a_weight_for_each_loss(tmp_path):
    with pytest.raises(ValueError, match="loss_weights has 1 values for 2 loss types"):
        CPOConstrainedConfig(**training_options(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0]))
