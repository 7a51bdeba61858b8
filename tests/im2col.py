"""Runs a script with the convolutions of small maps as matrix products, on a CPU in half the time.

    python tests/im2col.py pretrain.py --method d-simclr --crop 64 ...      # and finetune.py

To sum the gradient of a convolution's weights, oneDNN reads and writes all of them once for each
image of a batch: with ResNet18's 512 x 512 x 3 x 3 on maps of 2 px that is most of a step. Here it
is one matrix product of the whole batch (Chellapilla et al. 2006). The numbers are the same but
for rounding, and so is what a checkpoint holds.
"""
import runpy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

LARGEST = 4  # px of a map's sides; above it oneDNN is faster
convolve = nn.Conv2d.forward


class MatrixProduct(torch.autograd.Function):
    """Maps (N, C, h, w) * weights (O, C, k, k) -> (N, O, h', w'), like F.conv2d without a bias."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding, padding, padding, padding))
        windows = padded.unfold(1, weight.shape[2], stride).unfold(2, weight.shape[3], stride)
        columns = windows.permute(0, 1, 2, 4, 5, 3)  # (N, h', w', k, k, C)
        matrix = weight.permute(0, 2, 3, 1).flatten(1)  # (O, k k C), no copy if channels_last
        rows = columns.reshape(-1, matrix.shape[1])
        ctx.save_for_backward(rows, matrix)
        ctx.shapes = padded.shape, columns.shape, weight.shape, stride, padding
        return (rows @ matrix.T).unflatten(0, columns.shape[:3]).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient):
        rows, matrix = ctx.saved_tensors
        padded, columns, (_, channels, k, _), stride, padding = ctx.shapes
        gradient = gradient.permute(0, 2, 3, 1).flatten(0, 2)
        of_weight = (gradient.T @ rows).unflatten(1, (k, k, channels)).permute(0, 3, 1, 2)
        of_windows = (gradient @ matrix).view(columns)
        of_x = of_windows.new_zeros(padded, dtype=torch.float32)
        for i in range(k):
            for j in range(k):
                of_x[:, i:i + stride * columns[1]:stride, j:j + stride * columns[2]:stride] += (
                    of_windows[:, :, :, i, j])
        of_x = of_x[:, padding:padded[1] - padding, padding:padded[2] - padding]
        return of_x.to(gradient.dtype).permute(0, 3, 1, 2), of_weight, None, None


def forward(self, x):
    """Conv2d.forward; square kernels and strides, padding by zeros, one group: those of models.py."""
    if max(x.shape[-2:]) > LARGEST or self.kernel_size == (1, 1) or not torch.is_grad_enabled():
        return convolve(self, x)
    weight = self.weight
    if torch.is_autocast_enabled("cpu"):
        x, weight = x.bfloat16(), weight.bfloat16()
    y = MatrixProduct.apply(x, weight, self.stride[0], self.padding[0])
    return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)


if __name__ == "__main__":
    if sys.argv[1:2] not in (["pretrain.py"], ["linear_eval.py"], ["finetune.py"]):
        print("im2col.py: name pretrain.py, linear_eval.py or finetune.py first", file=sys.stderr)
        sys.exit(2)
    nn.Conv2d.forward = forward
    script = Path(__file__).resolve().parents[1] / sys.argv[1]
    sys.path.insert(0, str(script.parent))
    sys.argv = sys.argv[1:]
    runpy.run_path(str(script), run_name="__main__")
