"""A clone of the public OMBRIA data set as two trees for data.py pack: real pairs without a login.

    git clone https://github.com/geodrak/OMBRIA
    python tests/ombria.py OMBRIA OUT        # OUT/pairs to pretrain on, OUT/flood with labels

OMBRIA (Drakonakis et al. 2022, "OmbriaNet") shows some 840 places of 256 px before and after a flood:
Sentinel-1 as one grey channel, Sentinel-2 as false colour (B12, B8, B4 by its look), and a flood mask.
`pairs` holds the pairs before the flood, `flood` those after it with the classes dry and flooded; the
places of 2021, other countries and events, are the split `test`. Its 8 bits are stretched back to the
range of the real thing, which calibrates nothing: grey 0..255 becomes -25..0 dB, a colour 39 times
itself. The data set has no licence file: use it, but do not pass it on.
"""
import argparse
import csv
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import rasterio
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data

warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)  # PNGs lie nowhere

LEGEND = {"s1": ["VV"], "s2": ["B12", "B8", "B4"], "classes": {"1": "dry", "2": "flooded"}}
GUYANA = "2021/GUYANA: its two sensors could not be shown to match"


def read(path):
    """PNG -> (channels, h, w) uint8."""
    with rasterio.open(path) as image:
        return image.read()


def rows_of(path, *columns):
    """Lines of a CSV with these columns -> list of dicts."""
    rows = []
    if Path(path).is_file():
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    if not rows or not {*columns} <= {*rows[0]}:
        raise data.DataError(f"{path}: not there, or without lines under {', '.join(columns)}")
    return rows


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="GTiff", count=len(array), height=array.shape[1],
                       width=array.shape[2], dtype=array.dtype, compress="deflate") as file:
        file.write(array)
        if array.dtype == np.uint16:
            file.scales = [1e-4] * len(array)  # reflectance x 10,000, nothing added


def write_pair(folder, name, radar, optical, classes=None):
    """8 bits (c, h, w) of both sensors, and perhaps codes (1, h, w), as FOLDER/{s1,s2,classes}/NAME."""
    db, s2 = radar[:1] * np.float32(25 / 255) - 25, 39 * optical[:3].astype(np.uint16)
    images = {"s1": db.clip(max=-0.004), "s2": np.where(s2.any(0), s2, np.uint16(1))}  # 0 is no data
    if classes is not None:
        images["classes"] = classes
    for sensor, image in images.items():
        write(folder / sensor / name, image)


def find_places(clone, regions):
    """-> (list of {"scene", "name", "test", "before", "after": (S1, S2) paths, "mask"}, what is missing).
    regions: {name: scene} of the 694 places that have no country, or {}."""
    parts = []  # name, folders of S1 and S2, file names, whether other countries and events
    for part in ("train", "test"):  # OMBRIA's own split, whose patches abut
        parts.append((f"OmbriaS1/{part}", clone / "OmbriaS1" / part, clone / "OmbriaS2" / part,
                      "S1_{}_{}.png", "S2_{}_{}.png", "S1_mask_{}.png", None))
    for country in ("ALBANIA", "FRANCE", "TIMOR"):
        folder = clone / "2021" / country
        parts.append((f"2021/{country}", folder / "Sentinel1", folder / "Sentinel2",
                      "im{}_{}.png", "im{}_{}.png", "gt_{}.png", country))
    places, missing = [], [GUYANA]
    for part, radar, optical, s1_name, s2_name, mask, country in parts:
        found = sorted((radar / "BEFORE").glob(s1_name.format("before", "*")))
        missing += [] if found else [f"{part}: not there"]
        for name in (path.stem.rpartition("_")[2] for path in found):
            dates = {date: (radar / date.upper() / s1_name.format(date, name),
                            optical / date.upper() / s2_name.format(date, name))
                     for date in ("before", "after")}
            places.append({"scene": country or regions.get(name, "OMBRIA"), "name": name, **dates,
                           "test": bool(country), "mask": radar / "MASK" / mask.format(name)})
    return places, missing


def convert(place, date, split, out, suffix="", mask=False):
    """Write one pair, and its mask as classes, under OUT/SPLIT/{s1,s2,classes}/SCENE; -> what is
    missing, or None."""
    files = [*place[date], *([place["mask"]] if mask else [])]
    for file in files:
        if not file.exists():
            return f"{file}: not there"
    try:
        radar, optical, *flood = map(read, files)
    except rasterio.errors.RasterioError as error:
        return f"{place['name']} {date}: {error}"
    codes = np.where(flood[0][:1] > 127, 2, 1).astype(np.uint8) if mask else None
    write_pair(out / split, f"{place['scene']}/{place['name']}{suffix}.tif", radar, optical, codes)
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="folder with OmbriaS1, OmbriaS2 and 2021")
    parser.add_argument("out", type=Path, help="folder of the two trees")
    parser.add_argument("--dates", choices=("before", "both"), default="before",
                        help="of OUT/pairs; both: with the pairs after the flood, clouded and days apart")
    parser.add_argument("--regions", type=Path, metavar="CSV",
                        help="columns number and region: which places may not be split")
    parser.add_argument("--test-regions", nargs="+", default=[], metavar="REGION",
                        help="these regions are in the split `test`, too")
    args = parser.parse_args()
    regions = {}
    if args.regions:
        regions = {row["number"]: row["region"] for row in rows_of(args.regions, "number", "region")}
    if unknown := set(args.test_regions) - set(regions.values()):
        parser.error(f"--test-regions {' '.join(sorted(unknown))}: no such region in --regions")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out}: is not empty: remove it or choose another folder")
    places, missing = find_places(args.clone, regions)
    if not places:
        parser.error(f"{args.clone}: neither OmbriaS1/ nor 2021/ with PNG files are in it: is it a clone "
                     "of https://github.com/geodrak/OMBRIA?")
    if empty := set(args.test_regions) - {place["scene"] for place in places}:
        parser.error(f"--test-regions {' '.join(sorted(empty))}: none of its places is there: numbers have four digits, 0001")
    for place in tqdm(places, desc="converting", unit="place"):
        split = "test" if place["test"] or place["scene"] in args.test_regions else "train"
        missing.append(convert(place, "before", split, args.out / "pairs"))
        if args.dates == "both":
            missing.append(convert(place, "after", split, args.out / "pairs", "_after"))
        missing.append(convert(place, "after", split, args.out / "flood", mask=True))
    for tree in ("pairs", "flood"):
        (args.out / tree).mkdir(parents=True, exist_ok=True)
        (args.out / tree / "legend.json").write_text(json.dumps(LEGEND))
        count = len([*(args.out / tree).glob("*/s2/**/*.tif")])
        print(f"wrote {count} pairs of {len(places)} places into {args.out / tree}")
    print("left out:", *filter(None, missing), sep="\n")


if __name__ == "__main__":
    data.run(main)
