"""Pictures to look at: pairs of a store, how a pretraining went, a map.

    python tests/show.py STORE OUT.png                   # pairs side by side, with their classes
    python tests/show.py runs/d-simclr OUT.png           # loss and held-out retrieval over epochs
    python tests/show.py MAP.tif OUT.png --s2 S2.tif     # what finetune.py --map made of a scene
"""
import argparse
import contextlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import rasterio
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rasterio.enums import ColorInterp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import finetune
import linear_eval
import models


def draw_pairs(patches):
    """-> figure of up to eight pairs spread over a store: Sentinel-2 with its class, Sentinel-1."""
    rows = patches.rows[::math.ceil(len(patches.rows) / 8)]
    s1, s2 = (np.concatenate(array[rows], 2) for array in patches.arrays[:2])  # side by side
    picture, title = linear_eval.composite(s2, patches.bands["s2"])
    figure = Figure((2 * len(rows) + 1, 5), layout="constrained")
    above, below = figure.subplots(2, subplot_kw={"xticks": [], "yticks": []})
    above.imshow(picture)
    below.imshow(s1[0], cmap="gray", vmin=-2500, vmax=0)
    if patches.labels is not None:
        names = [*patches.classes, *["no label"] * data.IGNORE]
        middles = (np.arange(len(rows)) + 0.5) * patches.size[1]
        above.set_xticks(middles, [names[label] for label in patches.labels[rows]])
    figure.suptitle(f"{'SIMULATED ' * patches.simulated}Sentinel-2 {title}, Sentinel-1")
    return figure


def draw_run(folder):
    """-> figure of the log.jsonl of a pretraining."""
    content = models.load_checkpoint(folder / "last.pt")
    entries = []
    for line in (folder / "log.jsonl").read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):  # what a power cut spoilt
            entries.append(json.loads(line))
    figure = Figure((9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(entry["epoch"], entry["loss"]) for entry in entries if "loss" in entry]
    left.plot(*zip(*losses), ".-")
    left.set(xlabel="epoch", ylabel="loss", title=content["method"])
    found = [entry for entry in entries if "retrieval" in entry]
    ways = dict.fromkeys(way for entry in found for way in entry["retrieval"] if way != "candidates")
    for way in ways:  # of SimCLR older versions looked up others
        top1 = [(entry["epoch"], entry["retrieval"][way]["top1"]) for entry in found if way in entry["retrieval"]]
        right.plot(*zip(*top1), "o-", label=way)
        right.legend()
    right.set(xlabel="epoch", ylabel="held-out retrieval, top-1", ylim=(0, 1))
    figure.suptitle("SIMULATED data" * content["simulated"])
    return figure


def small(raster, numbers):
    """-> bands of a raster, at most some 1,500 px a side."""
    shrink = max(1, *(side / 1500 for side in raster.shape))
    height, width = (math.ceil(side / shrink) for side in raster.shape)
    return raster.read(numbers, out_shape=(len(numbers), height, width), masked=True)


def open_scene(path, sensor):
    """-> data.Raster of the bands to draw: VV, or those of true colour, else the first three."""
    wanted, product = {"s1": (["VV"], data.S1_BANDS), "s2": (models.RGB, data.S2_BANDS)}[sensor]
    try:
        return data.Raster(path, sensor, wanted, order=product)
    except data.DataError:  # it has others, or without names none of a product
        with rasterio.open(path) as tif:
            of_vrt = tif.driver == "VRT"
            names = [data.band_name(text) or of_vrt and data.band_of_file(tif, 1 + k) or f"#{1 + k}"
                     for k, text in enumerate(tif.descriptions)
                     if tif.colorinterp[k] != ColorInterp.alpha]
        return data.Raster(path, sensor, names[:3], order=names)


def draw_scene(axis, path, sensor, s2_offset, grid):
    """Sentinel-2 in colours, or Sentinel-1 in grey, as the open raster `grid` lies."""
    raster = open_scene(path, sensor)
    data.refuse_other_grid(raster.tif, grid)
    black = -25 if sensor == "s1" else 0  # also where there is no data
    image = np.nan_to_num(small(raster.tif, raster.numbers).astype("float32").filled(black), nan=black)
    image[:, ~image.any(0)] = black
    if sensor == "s1":
        axis.imshow(image[0], "gray", vmin=-25, vmax=0)  # dB
        return axis.set_title(f"{raster.bands[0]} of Sentinel-1")
    picture, colours = linear_eval.composite(image - s2_offset, raster.bands)
    axis.imshow(picture)
    return axis.set_title(f"Sentinel-2, {colours}")


def draw_map(path, scene):
    """-> figure of a map with its legend, of several labels the most probable one; beside it the
    scene. scene: {sensor: path}, of those that the classifier looks at."""
    tif = rasterio.open(path)
    values, tags = small(tif, tif.indexes).data, tif.tags()
    if "class_1" not in tags:
        raise data.DataError(f"{path}: not a map of finetune.py --map")
    for sensor in scene:
        if not linear_eval.sees(tags["method"], sensor):
            raise data.DataError(f"--{sensor}: {tags['method']} did not look at it: leave it out")
    count = sum(key.startswith("class_") for key in tags)
    names = [tags[f"class_{number}"] for number in range(count)]
    classes = values[0]
    if len(values) > 1:
        classes = np.where(classes == 255, 255, values.argmax(0))
    figure = Figure((6 + 5 * len(scene), 5), layout="constrained")
    plain = {"xticks": [], "yticks": []}
    *left, right = figure.subplots(1, 1 + len(scene), squeeze=False, subplot_kw=plain)[0]
    for axis, (sensor, file) in zip(left, scene.items()):
        draw_scene(axis, file, sensor, float(tags["s2_offset"]), tif)
    colours = [f"#{colour}" for colour in finetune.COLOURS * len(names)]
    colours = ListedColormap(colours[:len(names)])
    drawn = right.imshow(np.ma.masked_equal(classes, 255), colours, vmin=-0.5,
                         vmax=len(names) - 0.5, interpolation="nearest")
    figure.colorbar(drawn, ticks=range(len(names))).set_ticklabels(names)
    simulated = "SIMULATED data " * (tags["simulated"] == "True")
    right.set_title(simulated + models.METHODS[tags["method"]]["title"])
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", type=Path, help="a store, a run of pretrain.py, or a map")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--s1", help="GeoTIFF to draw beside a map")
    parser.add_argument("--s2", help="the same")
    args = parser.parse_args()
    scene = {sensor: path for sensor, path in (("s1", args.s1), ("s2", args.s2)) if path}
    if args.out.suffix.lower() != ".png":
        parser.error(f"{args.out}: choose a name that ends in .png")
    if scene and args.what.is_dir():
        parser.error(f"{args.what}: is not a map: leave --s1 and --s2 out")
    if args.what.is_file() or scene:
        figure = draw_map(args.what, scene)
    elif (args.what / "log.jsonl").exists():
        figure = draw_run(args.what)
    else:
        figure = draw_pairs(data.Patches(args.what))
    part = args.out.with_suffix(".part")
    try:
        figure.savefig(part, format="png", dpi=110)
        part.replace(args.out)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    data.run(main, models.CheckpointError, rasterio.errors.RasterioError)
