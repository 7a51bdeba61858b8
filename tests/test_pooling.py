"""tests/pooling.py: each of the four trials trains; `vgg maps` is MMA."""
import json

import pooling
import pytest
import torch
from conftest import call

import models
import pretrain


@pytest.mark.parametrize("encoder", ["vgg", "resnet"])
@pytest.mark.parametrize("compared", ["maps", "averages"])
def test_trials(encoder, compared, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "VGG", models.VGG)  # put back at the end
    options = ("--data", pairs, "--epochs", 1, "--batch-size", 24, "--crop", 32, "--holdout", 0.25, "--precision", "float32")
    call(monkeypatch, pooling, encoder, compared, *options, "--out", tmp_path / "trial")
    lines = [json.loads(line) for line in (tmp_path / "trial/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "retrieval" in line] == [0, 2]
    side = {"averages": 1, "maps": {"vgg": 4, "resnet": 1}[encoder]}[compared]
    assert models.VGG(2).eval()(torch.zeros(1, 2, 32, 32)).shape == (1, models.VGG(2).features, side, side)
    if (encoder, compared) == ("vgg", "maps"):
        call(monkeypatch, pretrain, "--method", "mma", *options, "--out", tmp_path / "mma")
        trial, mma = (models.load_checkpoint(tmp_path / name / "last.pt")["encoders"]["s1"] for name in ("trial", "mma"))
        assert all(torch.equal(trial[name], mma[name]) for name in mma)
