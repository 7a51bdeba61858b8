"""What only a GPU can show: python -m pytest tests/test_gpu.py"""
import numpy as np
import pytest
import torch
from test_linear_eval import made_up

import data
import linear_eval

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or hidden")


def test_batches_on_a_gpu_are_those_of_the_cpu(labelled):
    """Pinned memory is used again, copies run on another stream, long after they were asked for, and
    computing lags behind both: a batch that was not yet there, or overwritten too early, shows."""
    patches = data.Patches(labelled)
    batches = [batch for epoch in range(20)
               for batch in data.random_crops(patches.rows, patches.size, 32, 8, 0, epoch)]
    expected = list(data.loader(patches, batches, 32, classes=True))
    for threads in (1, 4):
        with torch.cuda.stream(data.copy_stream("cuda")):
            torch.cuda._sleep(10**9)  # half a second
        found = []
        for *tensors, rows in data.loader(patches, batches, 32, "cuda", threads, classes=True):
            assert all(tensor.is_cuda for tensor in tensors)
            torch.cuda._sleep(10**7)
            found.append([*(tensor.float() for tensor in tensors), rows])
        for (*tensors, rows), (*others, other_rows) in zip(found, expected, strict=True):
            assert (rows == other_rows).all()
            for tensor, other in zip(tensors, others):
                assert torch.equal(tensor.cpu(), other.float())


@pytest.mark.parametrize("n", [16, 200])
def test_a_probe_finds_the_same_on_a_gpu(n):
    """With fewer crops than features and with more; noise makes half of the crops hard."""
    rng = np.random.default_rng(2)
    (train, labels), (test, _) = made_up(n, 0, d=128), made_up(400, 1, d=128)
    for crops in (train, test):
        crops["x"] += rng.normal(0, 4, crops["x"].shape).astype(np.float32)
    one, other = (linear_eval.probe("single", train, test, list(range(n)), labels, 0, device)
                  for device in ("cpu", "cuda"))
    assert one[1] == other[1]
    assert one[0]["average"] == pytest.approx(other[0]["average"], abs=2e-3)
