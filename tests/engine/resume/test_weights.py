"""Weights that a checkpoint does not hold are not trained on in silence."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from trl_cpo.engine.resume.checkpoints import CheckpointError
from trl_cpo.engine.resume.weights import load_as_saved, not_loaded

from helpers.checkpoint_runs import trainer_of
from helpers.tiny import make_model


def test_tied_weights_are_loaded_under_one_name():
    tied, apart = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert not_loaded(tied, ["lm_head.weight"]) == []
    assert not_loaded(tied, ["lm_head.weight", "model.embed_tokens.weight"]) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert not_loaded(apart, ["lm_head.weight"]) == ["lm_head.weight"]
    apart._keys_to_ignore_on_save = ["lm_head.weight"]
    assert not_loaded(apart, ["lm_head.weight"]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_to_the_bit(tmp_path, dtype):
    saved, other = make_model(seed=1).to(dtype), make_model(seed=2).to(dtype)
    saved.save_pretrained(tmp_path)
    load_as_saved(other, tmp_path)
    theirs = saved.state_dict()
    assert all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in other.state_dict().items()
    )


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, tokenizer, small_model):
    """Renamed in the file: transformers would warn, and train on from weights that were never saved."""
    options = dict(constraint="clip")
    trainer_of(tmp_path, small_model, tokenizer, stop=2, **options).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    size, weights = file.stat().st_size, load_file(file)
    weights["model.norm.weighs"] = weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    assert file.stat().st_size == size  # so that the checkpoint is still whole
    with pytest.raises(CheckpointError, match="checkpoint-2 holds no weights for model.norm.weight, which the model has"):
        trainer_of(tmp_path, small_model, tokenizer, **options).train(resume_from_checkpoint=True)
