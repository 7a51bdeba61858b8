"""tests/im2col.py: convolutions as matrix products are those of PyTorch, and a script runs with them."""
import json
import subprocess
import sys
from pathlib import Path

import im2col
import pytest
import torch
from torch import nn

import models


def outcome(convolve, layer, x, weights):
    """-> output, gradients of input, weights and bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = convolve(layer, x)
    (y * weights).sum().backward()
    return [y.detach(), x.grad, *(value.grad.clone() for value in layer.parameters())]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (3, 4), (4, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_is_that_of_pytorch(height, width, stride, bias, monkeypatch):
    torch.manual_seed(height + width)
    layer = nn.Conv2d(5, 7, 3, stride, 1, bias=bias).to(memory_format=torch.channels_last)
    x = torch.randn(6, 5, height, width)
    weights = torch.randn_like(layer(x))
    expected = outcome(im2col.convolve, layer, x, weights)
    monkeypatch.setattr(im2col, "convolve", None)  # it is not called
    for found, value in zip(outcome(im2col.forward, layer, x, weights), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_an_encoder_with_bf16(monkeypatch):
    torch.manual_seed(0)
    encoder, x = models.resnet("resnet18", 2), torch.randn(8, 2, 64, 64)
    gradients = []
    for forward in (im2col.convolve, im2col.forward):
        monkeypatch.setattr(nn.Conv2d, "forward", forward)
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            encoder(x).square().sum().backward()
        gradients.append(torch.cat([value.grad.flatten() for value in encoder.parameters()]))
    assert torch.cosine_similarity(*gradients, 0) > 0.99


def test_a_script_goes_the_same_way(pairs, tmp_path):
    losses = []
    for name, first in (("plain", "pretrain.py"), ("im2col", "tests/im2col.py pretrain.py")):
        command = [sys.executable, *first.split(), "--method", "d-simclr", "--data", pairs, "--epochs", "2", "--batch-size",
                   "24", "--crop", "32", "--holdout", "0.25", "--precision", "float32", "--out", tmp_path / name]
        subprocess.run(command, check=True, cwd=Path(im2col.__file__).parents[1], capture_output=True)
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0] != losses[1]
