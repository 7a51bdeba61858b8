"""Pictures to look at: pairs of a store, or how a pretraining went.

    python tests/show.py STORE OUT.png           # eight pairs side by side, with their classes
    python tests/show.py runs/d-simclr OUT.png   # loss and held-out retrieval over epochs
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import models


def draw_pairs(patches):
    """-> figure of eight pairs spread over a store: Sentinel-2 with its class, Sentinel-1."""
    rows = patches.rows[::math.ceil(len(patches.rows) / 8)]
    s1, s2 = (np.concatenate(array[rows], 2) for array in patches.arrays[:2])  # side by side
    picture, title = data.composite(s2, patches.bands["s2"])
    figure = Figure((2 * len(rows) + 1, 5), layout="constrained")
    above, below = figure.subplots(2, subplot_kw={"xticks": [], "yticks": []})
    above.imshow(picture)
    below.imshow(s1[0], cmap="gray", vmin=-2500, vmax=0)
    if patches.labelled:
        names = [*patches.classes, *["no label"] * data.IGNORE]
        middles = (np.arange(len(rows)) + 0.5) * patches.size[1]
        above.set_xticks(middles, [names[label] for label in patches.labels[rows]])
    figure.suptitle(f"{'SIMULATED ' * patches.simulated}Sentinel-2 {title}, Sentinel-1")
    return figure


def draw_run(folder):
    """-> figure of the log.jsonl of a pretraining."""
    content = models.load_checkpoint(folder / "last.pt")
    entries = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    figure = Figure((9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(entry["epoch"], entry["loss"]) for entry in entries if "loss" in entry]
    left.plot(*zip(*losses))
    left.set(xlabel="epoch", ylabel="loss", title=content["method"])
    found = [entry for entry in entries if "retrieval" in entry]
    for way in list(found[0]["retrieval"])[1:] if found else ():
        top1 = [(entry["epoch"], entry["retrieval"][way]["top1"]) for entry in found]
        right.plot(*zip(*top1), "o-", label=way)
        right.legend()
    right.set(xlabel="epoch", ylabel="held-out retrieval, top-1", ylim=(0, 1))
    figure.suptitle("SIMULATED data" * content["simulated"])
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a store, or --out of pretrain.py")
    parser.add_argument("out", help="PNG to write")
    args = parser.parse_args()
    if Path(args.folder, "log.jsonl").exists():
        figure = draw_run(args.folder)
    else:
        figure = draw_pairs(data.Patches(args.folder))
    figure.savefig(args.out, format="png", dpi=110)


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
