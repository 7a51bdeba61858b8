"""What only a GPU can show: python -m pytest tests/test_gpu.py"""
import pytest
import torch

import data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or hidden")


def test_batches_on_a_gpu_are_those_of_the_cpu(labelled):
    """Pinned memory is used again and copies run on another stream, here long after they were asked
    for: a batch that was overwritten or not yet there shows."""
    patches = data.Patches(labelled)
    batches = [batch for epoch in range(20)
               for batch in data.random_crops(patches.rows, patches.size, 32, 8, 0, epoch)]
    expected = list(data.loader(patches, batches, 32, classes=True))
    for threads in (1, 4):
        with torch.cuda.stream(data.copy_stream("cuda")):
            torch.cuda._sleep(10**9)  # half a second
        found = data.loader(patches, batches, 32, "cuda", threads, classes=True)
        for (*tensors, rows), (*others, other_rows) in zip(found, expected, strict=True):
            assert (rows == other_rows).all()
            for tensor, other in zip(tensors, others):
                assert tensor.is_cuda and torch.equal(tensor.cpu(), other)
