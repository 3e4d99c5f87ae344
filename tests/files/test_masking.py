"""No secret of the settings is written or shown."""

import json

import pytest

from trl_cpo import CPOConstrainedConfig
from trl_cpo.files.masking import MASK, masked
from trl_cpo.report import make_report, style

from helpers.run_folders import make_run

SECRET = "hf_" + "aB3" * 10


@pytest.mark.parametrize(
    "name", ["token", "hub_token", "api_key", "apikey", "HF_TOKEN", "client-secret", "password", "use_auth_token"]
)
def test_masked_by_name(name):
    given = {"a": [{name: "plain words"}], name: {"inner": 1}}
    assert masked(given) == {"a": [{name: MASK}], name: {"inner": 1}}
    assert given["a"][0][name] == "plain words", "what is given stays as it is"


@pytest.mark.parametrize("text", [SECRET, f"--header {SECRET}", "sk-" + "a1" * 12, "ghp_" + "a1" * 12])
def test_masked_by_its_looks(text):
    assert MASK in masked({"note": text})["note"] and text[-20:] not in masked({"note": text})["note"]


def test_masked_in_an_address():
    assert masked("https://me:hunter2@hub.example/x") == f"https://me:{MASK}@hub.example/x"


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_token": "<|endoftext|>", "eos_token": "</s>", "tokens_per_step": 4096, "token": None, "use_auth_token": True},
        {
            "hub_token": "<HUB_TOKEN>",
            "gamma": 1.0,
            "loss_type": ["sigmoid"],
            "model": "me/hf_model",
            "digests": "0123abcd" * 40,
        },
    ],
)
def test_everything_else_stays(settings):
    assert masked(settings) == settings


def test_a_configs_settings_hold_none():
    """Checkpoints, trackers and metrics.json are written from them."""
    config = CPOConstrainedConfig(
        "out", use_cpu=True, bf16=False, report_to="none", hub_token=SECRET, model_init_kwargs={"token": "t0p", "dtype": "auto"}
    )
    assert SECRET not in json.dumps(config.to_dict(), default=str)
    assert config.to_dict()["model_init_kwargs"] == {"token": MASK, "dtype": "auto"}
    assert "t0p" not in config.to_json_string() and "t0p" not in str(config.to_sanitized_dict())
    assert config.model_init_kwargs["token"] == "t0p" and config.hub_token == SECRET


def test_a_report_of_a_record_that_holds_one_shows_none(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "DPI", 24)
    first, second = (make_run(tmp_path / n, steps=5, model_init_kwargs={"token": n * 9}, note=SECRET) for n in "ab")
    page = make_report([first, second]).page.read_text()
    assert "a" * 9 not in page and "b" * 9 not in page and SECRET not in page
