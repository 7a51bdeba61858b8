"""tests/pooling.py: each of the four trials trains; `vgg maps` is MMA."""
import json

import pooling
import pytest
import torch
from conftest import call

import data
import models
import pretrain


@pytest.mark.parametrize("encoder", ["vgg", "resnet"])
@pytest.mark.parametrize("compared", ["maps", "averages"])
def test_trials(encoder, compared, pairs, tmp_path, monkeypatch):
    for name in ("VGG", "spoilt_gradients"):
        monkeypatch.setattr(models, name, getattr(models, name))  # put back at the end
    options = ("--data", pairs, "--epochs", 1, "--batch-size", 24, "--crop", 32, "--holdout", 0.25, "--precision", "float32")
    call(monkeypatch, pooling, encoder, compared, "--method", "d-simclr", *options, "--out", tmp_path / "trial")  # it is mma
    lines = [json.loads(line) for line in (tmp_path / "trial/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "retrieval" in line] == [0, 2]
    side = {"averages": 1, "maps": {"vgg": 4, "resnet": 1}[encoder]}[compared]
    assert models.VGG(2).eval()(torch.zeros(1, 2, 32, 32)).shape == (1, models.VGG(2).features, side, side)
    if (encoder, compared) == ("vgg", "maps"):
        call(monkeypatch, pretrain, "--method", "mma", *options, "--out", tmp_path / "mma")
        trial, mma = (models.load_checkpoint(tmp_path / name / "last.pt")["encoders"]["s1"] for name in ("trial", "mma"))
        assert all(torch.equal(trial[name], mma[name]) for name in mma)


@pytest.mark.parametrize("options, said", [
    ((), "--out"), (("--method", "d-simclr", "--out", "OUT", "--crop", 16, "--precision", "bf16"), "bf16 gradients of a ResNet")])
def test_what_would_be_another_trial_is_refused(options, said, pairs, tmp_path, monkeypatch, capsys):
    for name in ("VGG", "spoilt_gradients"):
        monkeypatch.setattr(models, name, getattr(models, name))
    options = [tmp_path / "out" if word == "OUT" else word for word in options]
    with pytest.raises((SystemExit, data.DataError)) as error:
        call(monkeypatch, pooling, "resnet", "maps", "--data", pairs, *options)
    assert said in capsys.readouterr().err + str(error.value)
