"""Tiles of SEN1-2 with a land class as a tree for data.py pack: what the test fold is, whole groups.

    python tests/sen12.py ../shared/real/sen12 OUT --test-fold 0            # the others are trained on
    python tests/sen12.py ../shared/real/sen12 OUT --test-fold 0 --tune 0   # to choose settings on

The folder holds CLASS/sar_N.jpg (Sentinel-1 VV) and CLASS/op_N.jpg (Sentinel-2), both grey, 256 px of
SEN1-2 (Schmitt, Hughes, Zhu 2018, CC BY 4.0), and places.csv: class, number, group (tiles that
overlap), fold. Tiles of the test fold are the split `test`, those of all others `train`; groups
without a fold are in neither: they have no class maps and are for pretraining only. With --tune a
fifth of the training groups is `test` in place of the test fold, which is left out altogether.
A group is a scene; a class map is the tile's class all over. 8 bits become dB and reflectance as in
ombria.py, which calibrates nothing.
"""
import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import rasterio
from ombria import data, read, rows_of, write_pair
from tqdm import tqdm

CLASSES = ["agriculture", "forest", "gorge", "resident", "river"]
CODES = {str(code): name for code, name in enumerate(CLASSES, 1)}
LEGEND = {"s1": ["VV"], "s2": ["grey"], "classes": CODES}


def fifth_of(places, number):
    """Names of the groups of a fifth: those of each class, its most frequent one, dealt out in turn."""
    classes = defaultdict(Counter)
    for place in places:
        classes[place["group"]][place["class"]] += 1
    order = []
    for group, counts in classes.items():
        order.append((max(counts, key=lambda name: (counts[name], name)), int(group)))
    return {str(group) for _, group in sorted(order)[number::5]}


def splits_of(places, test_fold, tune):
    """-> the split of each place: `train`, `test`, "" for neither, None for left out."""
    training = [place for place in places if place["fold"] not in ("", test_fold)]
    held = set() if tune is None else fifth_of(training, tune)
    splits = []
    for place in places:
        split = "train" if place["fold"] else ""
        if place["fold"] == test_fold:
            split = "test" if tune is None else None
        elif place["group"] in held:
            split = "test"
        splits.append(split)
    return splits


def convert(place, split, folder, out):
    """Write one tile and, if it has a split, its class -> what is missing, or None."""
    files = [folder / place["class"] / f"{sensor}_{place['number']}.jpg" for sensor in ("sar", "op")]
    try:
        radar, optical = map(read, files)
    except rasterio.errors.RasterioError as error:
        return str(error)
    code = np.uint8(1 + CLASSES.index(place["class"]))
    codes = np.full_like(radar[:1], code) if split else None
    name = f"{place['group']}/{place['class']}_{place['number']}.tif"
    write_pair(out / split, name, radar, optical, codes)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with places.csv")
    parser.add_argument("out", type=Path, help="folder of the tree")
    parser.add_argument("--test-fold", required=True, help="of places.csv, 0 or 1: the others are trained on")
    parser.add_argument("--tune", type=int, choices=range(5), metavar="FIFTH",
                        help="0 to 4: test on that fifth of the training groups, not on the test fold")
    args = parser.parse_args()
    places = rows_of(args.folder / "places.csv", "class", "number", "group", "fold")
    if unknown := {place["class"] for place in places} - {*CLASSES}:
        parser.error(f"places.csv: classes {', '.join(sorted(unknown))}: they are {', '.join(CLASSES)}")
    folds = {place["fold"] for place in places} - {""}
    if args.test_fold not in folds or len(folds) == 1:
        parser.error(f"--test-fold {args.test_fold}: places.csv has the folds {sorted(folds)}: "
                     "choose one, and another must be there to train on")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out}: is not empty: remove it or choose another folder")
    counts, missing = Counter(), []
    splits = splits_of(places, args.test_fold, args.tune)
    for place, split in tqdm([*zip(places, splits)], desc="converting", unit="tile"):
        if split is None:
            continue
        lacks = convert(place, split, args.folder, args.out)
        missing += [lacks] if lacks else []
        counts[split or "neither"] += not lacks
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "legend.json").write_text(json.dumps(LEGEND))
    print(f"wrote {dict(counts)} into {args.out}; left out: {missing or 'none'}")


if __name__ == "__main__":
    data.run(main)
