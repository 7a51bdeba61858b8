"""Does MMA find more than D-SimCLR because it compares place by place? Four trials of the loss.

    python tests/pooling.py resnet maps --data R10/pairs --out R10/resnet-maps ...   # see evidence.md

The encoder, VGG as MMA has or ResNet18 as D-SimCLR has, without a head, and its last map, as it is
or averaged over the crop, compared by MMA's similarity and loss: for an averaged map that is the
cosine. What follows goes to pretrain.py as it is, `--method mma` after it; `vgg maps` is MMA itself.
The result is in log.jsonl; the checkpoint is of no use but to go on.
"""
import argparse
import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import models
import pretrain


class ResNetMap(nn.Sequential):
    """ResNet18 up to its last map: (N, bands, h, w) -> (N, 512, h/32, w/32)."""
    features = 512

    def __init__(self, bands):
        network = models.resnet("resnet18", bands)
        super().__init__(*list(network.children())[:-2])  # without mean and fc


class Averaged(nn.Sequential):
    """An encoder whose map becomes one of 1 x 1 px."""

    def __init__(self, encoder):
        super().__init__(encoder, nn.AdaptiveAvgPool2d(1))
        self.features = encoder.features


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", choices=("vgg", "resnet"))
    parser.add_argument("compared", choices=("maps", "averages"))
    args, others = parser.parse_known_args()
    encoder = {"vgg": models.VGG, "resnet": ResNetMap}[args.encoder]
    models.VGG = encoder
    if args.compared == "averages":
        models.VGG = lambda bands: Averaged(encoder(bands))
    if not any(word.startswith("--out") for word in others):
        parser.error("--out: where the trial goes")
    if args.encoder == "resnet":
        spoilt = models.spoilt_gradients
        models.spoilt_gradients = lambda method, *settings: spoilt("d-simclr", *settings)
    sys.argv = [sys.argv[0], *others, "--method", "mma"]
    pretrain.main()


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
