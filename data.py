"""Pairs of Sentinel-1 and Sentinel-2 patches: packed once, then cropped from the store.

    python data.py pack TREE STORE     # GeoTIFFs to plain .npy: parallel, resumable, safe to kill
    python data.py check STORE         # counts beside the published ones, bad files, value ranges

A TREE holds SEN12MS, DFC2020 or plain pairs, see README. A STORE holds `s1.npy` (N, C1, H, W) in
1/100 dB, `s2.npy` (N, C2, H, W) reflectance x 10,000, perhaps `classes.npy` (N, H, W), and of each
patch a record in `patches.npy`; `index.json` is written last.
"""
import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import re
import sys
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.windows import Window
from tqdm import tqdm

os.environ.setdefault("GDAL_DISABLE_READDIR_ON_OPEN", "TRUE")  # side-cars by name, no listing
os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB, else a twentieth of the machine's memory
logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # a bad file is reported once, by us

S1_BANDS = ["VV", "VH"]
S2_BANDS = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"]
L2A_BANDS = [band for band in S2_BANDS if band != "B10"]  # atmospheric correction drops cirrus
DFC_CODES = {"1": "Forest", "2": "Shrubland", "4": "Grassland", "5": "Wetland", "6": "Cropland",
             "7": "Urban", "9": "Barren", "10": "Water"}  # savanna (3) and snow (8) are not used
CLASSES = list(DFC_CODES.values())
IGNORE = 255  # class of a pixel that is none of the classes; label of a patch that has none
MISSING = -32768  # S1 where nothing was seen; of S2 that is 0 in all bands
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
TRAINED_ON = ["train", "validation"]  # DFC2020's training part is called validation
STATISTICS = ["count", "mean", "variance", "lowest", "highest"]  # of the pixels that are there
STORE_FORMAT = 5
# Scale and offset that S2 is tagged with, and what they say was added to it; 0 unless B10 shows
# otherwise; None: as B10 shows, or else the user is asked.
ADDED = {(1, 0): None, (1e-4, 0): 0, (1e-4, -0.1): 1000, (1, -1000): 1000}
# Bands of which the first is brighter than the second by nature, so that their order is wrong where
# it is not; the third must be there, too, since Landsat's B10 is heat. Last, for the mend, the
# order in which SNAP, or a VRT of files by name, has them.
BRIGHTER = {"s1": ("VV", "VH", "VV", "'VH', 'VV'"),
            "s2": ("B9", "B10", "B8A", "'B1', ..., 'B8A'")}
POSSIBLE = {"s1": (-90, 60), "s2": (0, 65_535)}  # beyond: no data, or another unit
SURVEY = 32  # a scene is judged by one of so many lines, a low one by at least so many
ROI = re.compile(r"(?:.*/)?(ROIs\d+_([a-z]+))_(s1|s2|dfc)_(\d+)_(p\d+)\.(?:tiff?|vrt)",
                 re.IGNORECASE)
PLAIN = re.compile(r"(?:(.*?)/)??(s1|s2|classes)/(.*)\.(?:tiff?|vrt)", re.IGNORECASE)
BAND = re.compile(r"(?<![A-Z0-9])(VV|VH|HH|HV|B\d+A?)(?![A-Z0-9])")


class DataError(Exception):
    """The data or an option is not as it must be: one line that says what, where, and the mend."""


def run(main, *errors):
    """Run a script's `main`; a DataError, an OSError or one of `errors` ends it with one line and
    exit status 2. Any other error is a bug and keeps its traceback."""
    try:
        if sys.platform != "linux":
            raise DataError("needs Linux, whose file functions it calls: a container will do")
        return main()
    except (DataError, OSError, *errors) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)  # main's bars are gone here
    sys.exit(2)


def positive(text):
    """For argparse: an integer above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def lock(file, folder):
    """Keep an open file from other processes until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{folder}: another run writes there: wait for it, or choose another "
                        "folder") from None
    except OSError as error:  # some network drives
        raise DataError(f"{folder}: cannot be locked ({error.strerror}): mount it with flock, or "
                        "choose another folder") from None


def band_name(text):
    """The band that a text holds as a word, as `B02`, `B8a` or `Sigma0_VV_db` do; else the text in
    capitals; "" for none and for `Band 1`."""
    text = (text or "").upper()
    words = {word.replace("B0", "B") for word in BAND.findall(text)}
    return words.pop() if len(words) == 1 else re.sub(r"^(BAND|LAYER)[ _]?\d+$", "", text)


def band_of_file(vrt, number):
    """The band in the name of the file behind a band of a VRT, or "" for none or several."""
    source = str(vrt.tags(number, ns="vrt_sources"))
    name = band_name(" ".join(re.findall("([^/>]*)</SourceFilename", source)))
    return name if BAND.fullmatch(name) else ""


@contextlib.contextmanager
def reading(name):
    """What GDAL says of a file that it cannot read becomes a DataError."""
    try:
        yield
    except rasterio.errors.RasterioError as error:
        raise DataError(f"{name}: cannot be read, is it cut off, or a Git LFS pointer? "
                        f"{error.__cause__ or error}") from None


class Raster:
    """A patch or scene of Sentinel-1 (`s1`) or Sentinel-2 (`s2`), read by what it says of itself.

    bands: names of those to read, in their order; None: the only one, of a class map, for read()
    alone. offset: of S2, beside reflectance x 10,000; None: judge() finds it. order: the bands of a
    file that names none, as a legend.json (Patches.stored) says; of a product, or None: those of
    the product that has as many; with None perhaps `bands`, refused where they would differ. tif:
    the open file. numbers: of the bands in it. Raises DataError.
    """

    def __init__(self, path, sensor, bands, offset=None, order=None):
        self.name, self.sensor, self.bands = Path(path).name, sensor, bands
        self.offset = offset if sensor == "s2" else 0
        self.judged = False
        with reading(self.name):
            self.tif = rasterio.open(path)  # closed when nobody holds the Raster any more
        # A mask behind the bands:
        self.alpha = self.tif.count > 1 and self.tif.colorinterp[-1] == ColorInterp.alpha
        self.count = self.tif.count - self.alpha
        if not bands and self.count > 1:
            some = "a class map has one" if bands is None else f"no band of {sensor} is asked for"
            raise DataError(f"{self.name}: {self.count} bands: {some}")
        if self.tif.gcps[0] and self.tif.transform.is_identity:
            raise DataError(f"{self.name}: placed by control points: terrain-correct or warp it")
        products = [S1_BANDS, S2_BANDS, L2A_BANDS]
        if order is None:
            products.append(bands)
        elif order not in products:  # a legend's
            products = [order]
        self.numbers = self.find_bands(products) if bands else [1]

    def find_bands(self, products):
        """-> their numbers, from 1 on: by the names of the bands; where none has one, by those of a
        VRT's files; where these tell nothing, by position in a product of as many bands."""
        texts = self.tif.descriptions[:self.count]
        names = [band_name(text) for text in texts]
        numbered = texts == tuple(f"b{1 + k}" for k in range(len(texts)))  # any stack, not B1, B2
        if not any(names) and self.tif.driver == "VRT":
            names = texts = [band_of_file(self.tif, 1 + k) for k in range(self.count)]
        self.named = any(names)
        wanted = [band_name(band) for band in self.bands]
        products = [[band_name(band) for band in product] for product in products]
        fits = [product for product in products
                if len(product) == len(names) and {*wanted} <= {*product}]
        if fits and not self.named:
            names = fits[0]
            if any(fit != names for fit in fits):
                raise DataError(f"{self.name}: its bands have no names: are they in the order of a "
                                "product? Name them, or say order=, as Patches.stored has it")
        self.names = names
        unclear = "" in names or any(names.count(name) != 1 for name in wanted)
        if unclear or (numbered and not {*self.bands} <= {*texts}):
            raise DataError(f"{self.name}: {len(texts)} bands, {' '.join(map(str, texts))}; needed "
                            f"are {' '.join(self.bands)}: name them, or see legend.json in README")
        return [names.index(name) + 1 for name in wanted]

    def read(self, window=None):
        """-> (c, h, w) as in the file; (h, w) bool: which pixels are there. A pixel is missing if
        the nodata value or a mask says so of any band, if a band is not finite or, of images, if
        all are 0, 32,767 or 65,535; of classes 0 is one."""
        tif = self.tif
        # Nodata 0 of S2 would take a pixel with one dark band for missing; a true mask would not.
        zero_is_dark = self.sensor == "s2" and tif.nodata == 0
        use_mask = not zero_is_dark or MaskFlags.nodata not in tif.mask_flag_enums[0]
        with reading(self.name):
            image = tif.read(self.numbers, window=window, masked=use_mask)
            alpha = tif.read(tif.count, window=window) if self.alpha else 1
        image, mask = np.ma.getdata(image), np.ma.getmaskarray(image)
        there = ~mask.any(0) & (alpha > 0)  # GDAL minds alpha in pictures alone
        if self.bands:
            there &= image.any(0)  # the edge of many products is 0, often untagged
            there &= ((image != 32_767) & (image != 65_535)).any(0)  # the highest of 16 bits
        if image.dtype.kind == "f":
            there &= np.isfinite(image).all(0)
        return image, there

    def judge(self, image, there):
        """DataError for what is not in its unit; else set self.offset, that of S2, as a tag of the
        file or cirrus shows it: from baseline 04.00 (2022) on products hold 1,000 more."""
        if not there.any():
            return
        seen = image.reshape(len(image), -1) if there.all() else image[:, there]  # a view is fast
        low, high = seen.min(), seen.max()
        pairs = np.round([self.tif.scales, self.tif.offsets], 8).T  # some were float32
        tag, *more = {tuple(pairs[number - 1].tolist()) for number in self.numbers}
        if self.sensor == "s1":  # resampling of power makes a few values negative
            unit, tags = "dB, 10 log10 of power", [(1, 0)]
            plausible = np.mean(seen < -3) > 0.1
        else:
            unit, tags = "reflectance x 10,000", ADDED
            # The mean, since a glint alone lifts reflectance that is not x 10,000 above 2.
            plausible = seen.mean() > 2
        lowest, highest = POSSIBLE[self.sensor]
        plausible &= lowest <= low and high <= highest
        stretched_or_complex = seen.dtype == np.uint8 or seen.dtype.kind == "c"
        if stretched_or_complex or not plausible or tag not in tags or more:
            said = " bands of several scales and offsets," if more else ""
            if tag not in tags:
                said = f" scale {tag[0]:g}, offset {tag[1]:g},"
            raise DataError(f"{self.name}: {low:g} to {high:g}, {seen.dtype},{said} is not {unit}: "
                            "mend it, or tag what stands for no data: gdal_edit.py -a_nodata")
        if self.sensor == "s2" and ADDED[tag]:
            if self.offset == 0:
                raise DataError(f"{self.name}: its tags say that 1,000 was added, --s2-offset says "
                                "0: gdal_edit.py -offset 0 where the tags are wrong")
            self.offset = ADDED[tag]
        elif self.offset is None:
            self.offset = self.told_by_cirrus(seen, ADDED[tag])
        elif self.offset and np.mean((seen > 0) & (seen < 800)) > 0.05:
            raise DataError(f"{self.name}: much of it is between 0 and 800, but --s2-offset says "
                            "that 1,000 was added: say 0 for files like this")
        self.judged = True

    def told_by_cirrus(self, seen, offset):
        """-> the offset as B10 shows it, be it among the bands or in the file alone: clear air
        sends some 10 of 10,000 back. offset: what holds where it shows nothing; None: the user
        must say."""
        cirrus = np.zeros(0)
        if "B10" in self.bands:
            cirrus = seen[self.bands.index("B10")]
        elif {"B8A", "B10"} <= {*self.names}:  # Landsat, whose B10 is heat, has no B8A
            image, there = Raster(self.tif.name, "s2", ["B10"], 0, self.names).survey()
            cirrus = image[0, there]
        cirrus = cirrus[cirrus > 0]  # 0 tells nothing: its edge is not that of other bands
        if cirrus.size:
            low, middle = np.quantile(cirrus, (0.05, 0.5))
            if middle < 900:
                return 0
            if 950 <= low <= 1100:  # clouds, or an edge of 0 that was warped, are no clear air
                return 1000
        if offset is None:
            raise DataError(f"{self.name}: without B10 where it is clear it cannot be told if 1,000"
                            " was added, as from baseline 04.00 (2022) on, unless harmonised: say "
                            "--s2-offset (offset=) 0 or 1000, for all files")
        return offset

    def doubt(self, image, there):
        """Say what is odd about a scene; DataError where its bands have no names and cannot be in
        the order in which they are taken: SNAP writes VH first, and B8A is often last (of 13: the
        12 of L2A show nothing)."""
        if self.sensor == "s2" and there.any() and image[:, there].max() <= 255:
            print(f"{self.name}: S2 is never above 255: is it reflectance x 10,000?")
        bright, dark, needed, order = BRIGHTER[self.sensor]
        if self.named or not {bright, dark, needed} <= {*self.names}:
            return
        image, there = Raster(self.tif.name, self.sensor, [bright, dark], 0, self.names).survey()
        if there.any() and np.diff(image[:, there].mean(1)) > 0:
            mend = f"rasterio.open({self.tif.name!r}, 'r+').descriptions = {order}"
            raise DataError(f"{self.name}: by position {dark} is brighter than {bright}: name "
                            f"its bands: {mend}")

    def survey(self):
        """read() of some lines, see SURVEY."""
        step = max(1, min(SURVEY, self.tif.height // SURVEY))
        tops = range(0, self.tif.height, step)
        lines = [self.read(Window(0, top, self.tif.width, 1)) for top in tops]
        return [np.concatenate(parts, -2) for parts in zip(*lines)]

    def values(self, window=None, in_tree=False):
        """-> (c, h, w) float32, dB or reflectance x 10,000, NaN where nothing was seen, as
        models.to_input() takes it. window: of a scene, which is judged by lines all over it.
        in_tree: one patch of many may be odd, so that check() doubts in the place of doubt()."""
        image, there = self.read(window)
        if not self.judged and not in_tree:
            lines = self.survey() if window else (image, there)
            self.doubt(*lines)
            self.judge(*lines)
        lowest, highest = POSSIBLE[self.sensor]
        # Perhaps nothing is there in those lines, or they lack what this window has: -9999, 1e36.
        if not (self.judged and np.min(image, where=there, initial=0) >= lowest
                and np.max(image, where=there, initial=0) <= highest):
            self.judge(image, there)
        image = image.astype(np.float32)
        if self.sensor == "s2":
            black = image == 0  # missing where it is all that is asked for, of a file or a store
            image -= self.offset or 0  # None: nothing is there
            np.rint(image, out=image).clip(1, out=image)[black] = 0
        image[:, ~there] = np.nan
        return image


def refuse_other_grid(one, other):
    """DataError where two open rasters say that they do not lie on one grid, and how to warp the
    first. One that says nothing is believed to lie where the other does."""
    apart, differ = 0, ""
    if not (one.transform.is_identity or other.transform.is_identity):
        corners = [[0, one.width, 0], [0, 0, one.height], [1, 1, 1]]  # (x, y, 1) of three, in px
        moved = np.reshape(np.subtract(one.transform, other.transform), (3, 3)) @ corners
        pixel = math.sqrt(abs(other.transform.determinant) or 1)  # its side, in units of the map
        apart = np.abs(moved).max() / pixel
    if one.crs and other.crs and one.crs != other.crs:
        differ = f"{one.crs} and {other.crs}"
    elif one.shape != other.shape or apart > 1e-3:
        differ = (f"{one.width} x {one.height} and {other.width} x {other.height} px, their "
                  f"corners up to {apart:.4g} px apart")
    if differ:
        raise DataError(f"{Path(one.name).name}, {Path(other.name).name}: not on one grid: {differ}"
                        f": classes by nearest, images: rio warp {one.name} WARPED.tif --like "
                        f"{other.name} --resampling bilinear")


def place_of(name):
    """Path of a file in a tree -> id, split and scene of its patch, and the sensor `s1`, `s2` or
    `classes`; None where it is of neither layout."""
    if match := ROI.fullmatch(name):
        season, split, sensor, scene, number = match.groups()
        scene = f"{season}_{scene}"
        return f"{scene}_{number}", split.lower(), scene, sensor.lower().replace("dfc", "classes")
    if match := PLAIN.fullmatch(name):
        above, sensor, below = match.groups("")
        patch = os.path.join(above, below)
        folders = patch.split("/")[:-1]
        splits = [SPLITS[folder.lower()] for folder in folders if folder.lower() in SPLITS]
        scene = os.path.dirname(patch) if len(folders) > len(splits) else patch
        return patch, "".join(splits[:1]), scene, sensor.lower()
    return None


def find_pairs(tree):
    """-> list of {"id", "split", "scene", and the paths "s1", "s2", "classes" that are there}."""
    found, seen = defaultdict(dict), {}

    def refuse(error):
        raise error

    for folder, _, names in tqdm(os.walk(tree, onerror=refuse, followlinks=True), delay=1):
        first = seen.setdefault(os.path.realpath(folder), folder)
        if first != folder:
            raise DataError(f"{folder} is {first}: the same folder by a link: move the link away")
        for path in [f"{folder}/{name}" for name in names if not name.startswith(".")]:
            if not (place := place_of(os.path.relpath(path, tree))):
                continue
            patch, split, scene, sensor = place
            if sensor in found[patch]:
                raise DataError(f"{found[patch][sensor]}, {path}: both {sensor} of {patch}: is one "
                                "a link or a copy? Move it elsewhere")
            if path.encode(errors="replace") != os.fsencode(path):
                raise DataError(f"{path!a}: a name that is not UTF-8: rename it")
            found[patch] |= {"id": patch, "split": split, "scene": scene, sensor: path}
    if not any(pair.keys() >= {"s1", "s2"} for pair in found.values()):
        raise DataError(f"{tree}: no pairs of files such as ROIs1158_spring_s1_1_p30.tif and ROIs"
                        "1158_spring_s2_1_p30.tif, or s1/NAME.tif and s2/NAME.tif: see README")
    return [found[patch] for patch in sorted(found)]


def read_legend(tree):
    """-> {"s1": bands, "s2": bands or None for SEN12MS's, "classes": {code: name}}: what the
    legend.json of a tree says, else as in SEN12MS and DFC2020. Several codes may be one class."""
    legend = {"s1": S1_BANDS, "s2": None, "classes": DFC_CODES.items()}
    path = Path(tree, "legend.json")
    try:
        if path.exists():
            pairs = json.loads(path.read_text(), object_pairs_hook=list)  # shows a code given twice
            legend |= pairs
        names = legend["s1"] + (legend["s2"] or S2_BANDS)
        codes = [int(code) for code, _ in legend["classes"]]
        legend["classes"] = dict(legend["classes"])
        classes = set(legend["classes"].values())
        texts = all(isinstance(name, str) and name for name in [*names, *classes])
        twice = texts and len({*map(band_name, names), *codes}) < len(names + codes)
        unfit = len(legend) > 3 or twice or not texts or not legend["s1"] or legend["s2"] == []
        if unfit or not 2 <= len(classes) < IGNORE:
            raise ValueError("another key, an empty name, two names of one band, a code twice, or "
                             "not 2 to 254 classes")
    except (ValueError, TypeError) as error:
        raise DataError(f'{path}: {error}. It may hold "s1" and "s2", lists of band names, and '
                        '"classes", {"CODE": "NAME", ...}') from None
    return legend


def make_plan(tree, pairs, s2_offset):
    """What a packing is to hold: the same at every start of it, and in the end in index.json."""
    legend, root, kinds = read_legend(tree), Path(tree).resolve(), Counter()
    products = [legend["s2"]] if legend["s2"] else [S2_BANDS, L2A_BANDS]
    paths = [pair["s2"] for pair in pairs if "s2" in pair]
    for path in paths[::math.ceil(len(paths) / 100)]:
        for bands in products:
            with contextlib.suppress(DataError):
                kinds[Raster(path, "s2", bands, order=bands).tif.shape, tuple(bands)] += 1
                break
    if not kinds:
        Raster(paths[0], "s2", products[0], order=products[0])  # says what is wrong
    (size, bands), _ = kinds.most_common(1)[0]  # of some hundred files
    near = root, *root.parents, *root.glob("*/")  # simulate.py marks the folder of both its trees
    return {"format": STORE_FORMAT,
            "bands": {"s1": legend["s1"], "s2": list(bands)},
            "size": list(size),
            "s2_offset": s2_offset,
            "codes": legend["classes"],
            "classes": list(dict.fromkeys(legend["classes"].values())),
            "labelled": any("classes" in pair for pair in pairs),
            "simulated": any((folder / "SIMULATED").exists() for folder in near),
            "ids": [pair["id"] for pair in pairs],
            "splits": [pair["split"] for pair in pairs],
            "scenes": [pair["scene"] for pair in pairs]}


def classes_from_codes(codes, legend=DFC_CODES):
    """Label codes of any shape, NaN for none -> uint8 classes, numbered in the order of the
    names in the legend, {code: name}; 255 for a code that it lacks."""
    names = list(dict.fromkeys(legend.values()))
    classes = np.full(np.shape(codes), IGNORE, np.uint8)
    for code, name in legend.items():
        classes[np.equal(codes, int(code))] = names.index(name)
    return classes


def read_classes(raster, legend):
    """-> (H, W) uint8 classes of a class map, 255 for none. DataError where it is not of the
    legend."""
    (codes,), there = raster.read()
    nodata = raster.tif.nodata
    if nodata in map(int, legend):
        raise DataError(f"{raster.name}: {nodata:g} is no data there and a class here: "
                        "gdal_edit.py -unsetnodata, or take it out of legend.json")
    if np.any(codes[there] % 1):
        raise DataError(f"{raster.name}: holds fractions: resample classes by nearest")
    codes = np.where(there, codes, np.nan)
    if legend == DFC_CODES and np.any((codes > 10) & (codes != IGNORE)):
        raise DataError(f"{raster.name}: holds codes above 10, which are not DFC2020's: "
                        "name the classes in legend.json, see README")
    return classes_from_codes(codes, legend)


def read_patch(pair, plan):
    """-> s1 int16 (C1, H, W) in 1/100 dB, s2 uint16 (C2, H, W) reflectance x 10,000, classes uint8
    (H, W), and the offset that was subtracted from s2. A pixel that is not there is MISSING in s1,
    0 in s2. DataError for a bad patch: a file is not there or cannot be read, has another size or
    grid, not the bands or not their unit, or lacks more than half of the pixels."""
    if lacking := {"s1", "s2"} - pair.keys():
        raise DataError(f"no {min(lacking)} file")
    rasters, images = {}, {}
    for sensor in [sensor for sensor in ("s2", "s1", "classes") if sensor in pair]:
        bands = plan["bands"].get(sensor)
        raster = Raster(pair[sensor], sensor, bands, plan["s2_offset"], order=bands)
        rasters[sensor] = raster
        if list(raster.tif.shape) != plan["size"]:
            raise DataError(f"{raster.name}: {raster.tif.shape} px, most are {plan['size']}")
        for other in rasters.values():  # not S2's alone: it may not say where it lies
            refuse_other_grid(raster.tif, other.tif)
    for sensor in ("s2", "s1"):
        images[sensor] = rasters[sensor].values(in_tree=True)
        if np.isnan(images[sensor][0]).mean() > 0.5:
            raise DataError(f"{rasters[sensor].name}: more than half of it is missing")
    s1, s2 = images["s1"] * 100, images["s2"]
    s1[:, np.isnan(s1[0])] = MISSING
    s2[:, np.isnan(s2[0])] = 0
    if s2.max() <= 1:
        raise DataError(f"{rasters['s2'].name}: nothing is above the offset")
    classes = np.full(plan["size"], IGNORE, np.uint8)
    if "classes" in rasters:
        classes = read_classes(rasters["classes"], plan["codes"])
    return np.rint(s1).astype(np.int16), s2.astype(np.uint16), classes, rasters["s2"].offset


def layout(plan):
    """-> {file name: (data type, shape)} of a store's arrays."""
    count, size = len(plan["ids"]), plan["size"]
    s1, s2 = len(plan["bands"]["s1"]), len(plan["bands"]["s2"])
    record = [("state", "u1"),  # 1: the row is whole; 0: not yet, or bad
              ("sum", "<u4"),  # CRC-32 of the row in all arrays: other pixels, other identity
              ("offset", "<u2"),  # subtracted from S2
              ("pixels", "<u4", len(plan["classes"]) + 1)]  # per class, the last for 255
    record += [(name, "<f8", s1 + s2) for name in STATISTICS]  # per band, S1's first
    arrays = {"s1.npy": ("<i2", (count, s1, *size)), "s2.npy": ("<u2", (count, s2, *size))}
    if plan["labelled"]:
        arrays["classes.npy"] = "u1", (count, *size)
    return arrays | {"patches.npy": (record, (count,))}


def open_arrays(store, plan):
    """-> read-only maps of a store's arrays, the records last; DataError where one is not whole."""
    try:
        return [np.load(Path(store, name), mmap_mode="r") for name in layout(plan)]
    except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
        raise DataError(f"{store}: not a whole store ({error}): remove it and pack again") from None


def statistics(image, unit):
    """(c, h, w) integers of a store -> STATISTICS of each band, in the unit."""
    there = image[0] != MISSING if image.dtype == np.int16 else image.any(0)
    rows = []
    for band in image:
        band = band.ravel() if there.all() else band[there]
        floats = band.astype(float)  # of one band: the processor's cache holds it
        squares = int(np.einsum("i,i", floats, floats))  # BLAS would wait for its own threads
        count, total = len(band), int(floats.sum())
        variance = (count * squares - total**2) / count**2  # of integers: nothing is rounded
        values = total / count / unit, variance / unit**2, band.min() / unit, band.max() / unit
        rows.append((count, *values))
    return rows


def write_row(array, row, values):
    """Put a row into the file of an array, on the disk at the end of it: a power cut leaves no
    state without its row."""
    file, reason = os.open(array.filename, os.O_WRONLY | os.O_DSYNC), "the disk is full"
    try:
        start = array.offset + row * values.nbytes
        if os.pwrite(file, values.tobytes(), start) == values.nbytes:
            return
    except OSError as error:
        reason = error.strerror
    finally:
        os.close(file)
    raise DataError(f"{array.filename}: cannot be written ({reason}): mend it, start again")


def pack_row(pair, plan, store, arrays, row):
    """Read, judge and write one patch, its state last -> "", or why it is bad."""
    try:
        s1, s2, classes, offset = read_patch(pair, plan)
    except DataError as reason:
        return str(reason)
    (store / "index.json").unlink(missing_ok=True)  # an old one, which lacks this patch
    *images, records = arrays
    checksum = 0
    for array, image in zip(images, (s1, s2, classes)):  # images: two where none has a class map
        write_row(array, row, image)
        checksum = zlib.crc32(image, checksum)
    pixels = np.bincount(classes.ravel(), minlength=256)
    pixels = pixels[[*range(len(plan["classes"])), IGNORE]]
    bands = np.transpose(statistics(s1, 100) + statistics(s2, 1))
    for state in (0, 1):  # a power cut between may not leave state 1 with half a record
        write_row(records, row, np.array((state, checksum, offset, pixels, *bands), records.dtype))
    return ""


def ahead(function, items, threads=None, depth=2):
    """Yield function(item) in the order of the items, computed by threads, `depth` items ahead of
    what they compute now. threads: None for one per core (of each process of torchrun), at most
    8."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = threads or max(1, min(cores, 8))
    pool, running = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) >= threads + depth:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def fill(store, pairs, plan, threads, max_bad):
    """Pack the pairs whose rows are not whole, and write index.json at last."""
    arrays, left_out = open_arrays(store, plan), {}
    rows = np.flatnonzero(arrays[-1]["state"] == 0).tolist()
    if len(rows) < len(pairs):
        print(f"{store}: {len(pairs) - len(rows)} of {len(pairs)} patches were packed before; "
              "remove it to pack files that have changed since")
    threads = threads or min(2 * len(os.sched_getaffinity(0)), 16)  # half of them wait for the disk
    work = ahead(lambda row: pack_row(pairs[row], plan, store, arrays, row), rows, threads)
    allowed = min(max_bad * len(pairs), len(pairs) - 1)
    with contextlib.closing(work):  # no thread writes after an error
        for row, reason in tqdm(zip(rows, work), "packing", len(rows), unit="patch"):
            if reason:
                left_out[pairs[row]["id"]] = reason
            if len(left_out) > allowed:
                if not arrays[-1]["state"].any():  # no plan to keep to: other options may follow
                    (store / "packing.json").write_text("")
                raise DataError(f"{store}: {len(left_out)} of {len(pairs)} patches cannot be used, "
                                f"--max-bad allows {max_bad:.1%}: {[*left_out.items()][:5]}. Mend "
                                "them and start again, or allow more")
    content = json.dumps(plan).encode() + arrays[-1].tobytes()
    index = {**plan, "left_out": left_out, "identity": hashlib.sha256(content).hexdigest()[:12]}
    with open(store / "index.part", "w") as part:
        part.write(json.dumps(index))
        part.flush()
        os.fsync(part.fileno())
    os.replace(part.name, store / "index.json")


def pack(tree, store, threads=None, max_bad=0.01, s2_offset=None):
    """Write the good patches of a tree to a store -> its Patches. Killed and started again, it goes
    on from what is done and ends in the same bytes. s2_offset: what to subtract from S2; None:
    as B10 or a tag shows. Raises DataError, and OSError where the disk does not allow it."""
    if not 0 <= max_bad <= 1:
        raise DataError(f"--max-bad {max_bad}: a share, 0 to 1")
    store, pairs = Path(store), find_pairs(tree)
    plan = make_plan(tree, pairs, s2_offset)
    other = DataError(f"{store}: holds other files, or was packed from another tree, with other "
                      "options or by another version: choose another folder, or remove it")
    store.mkdir(parents=True, exist_ok=True)
    packing, text = store / "packing.json", json.dumps(plan) + "\n"
    if any(store.iterdir()) and not packing.exists():
        raise other
    with open(packing, "a+") as file:  # a lock, and the plan, a line, once the arrays are there
        lock(file, store)
        begun = packing.read_text()
        finished = (store / "index.json").exists()  # never made anew, even if its plan is damaged
        if not finished and not begun.endswith("\n"):  # a first start, or one killed right here
            for name, (dtype, shape) in layout(plan).items():
                np.lib.format.open_memmap(store / name, "w+", dtype, shape)  # takes no room yet
            file.truncate(0)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        elif begun != text:
            raise other
        fill(store, pairs, plan, threads, max_bad)
    return Patches(store)


class Patches:
    """N co-registered patches of one size in a store; a bad one has a row that no list of rows has.

    ids, scenes: lists of str. splits: (N,) a season, `train`, `validation`, `test` or "". rows: of
    the good patches. labels: (N,) most frequent class of the patch, 255 if none is more frequent,
    or for a bad patch; None without class maps. size: [H, W]. bands: {"s1": names, "s2": names} as
    selected. classes: names. left_out: {id: reason}. identity: 12 hexadecimal digits, others for
    other patches, pixels or options of packing.
    """

    def __init__(self, path, bands=None):
        """bands: only these, by name and in this order. Raises DataError."""
        try:
            index = json.loads(Path(path, "index.json").read_text())
            if index["format"] != STORE_FORMAT:
                raise ValueError(f"format {index['format']}, this version has {STORE_FORMAT}")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path}: not a whole store ({error}): of a folder of GeoTIFFs `python "
                            f"data.py pack {path} STORE` makes one, and finishes what broke off; "
                            "README says where SEN12MS is, and how to simulate data") from None
        maps = open_arrays(path, index)
        self.path, self.identity, self.simulated = str(path), index["identity"], index["simulated"]
        self.ids, self.scenes, self.left_out = index["ids"], index["scenes"], index["left_out"]
        self.splits, self.size = np.array(index["splits"]), index["size"]
        self.classes, self.stored = index["classes"], index["bands"]
        *images, self.records = map(np.asarray, maps)  # np.memmap is slow to index
        self.arrays = [image.reshape(len(image), -1, *self.size) for image in images]
        self.files = [open(array.filename, "rb") for array in maps]  # noqa: SIM115
        self.starts = [array.offset for array in maps]  # of the first row in its file
        self.rows = np.flatnonzero(self.records["state"])
        label = self.records["pixels"].argmax(1)
        label[(label == len(self.classes)) | (self.records["state"] == 0)] = IGNORE
        self.labels = label if index["labelled"] else None
        known = self.stored["s1"] + self.stored["s2"]
        wanted = bands or known
        if unknown := [band for band in wanted if band not in known]:
            raise DataError(f"{path}: no band {' '.join(unknown)}, see --bands; it has "
                            f"{self.stored}")
        self.bands, self.picks = {}, []  # picks: their numbers in each array
        for sensor, stored in self.stored.items():
            self.bands[sensor] = [band for band in wanted if band in stored]
            self.picks.append([stored.index(band) for band in self.bands[sensor]])
        self.picks.append([0])  # of the class maps

    def rows_of(self, *splits):
        """Good rows of these splits."""
        return self.rows[np.isin(self.splits[self.rows], splits)]

    def stats(self, rows):
        """Mean and standard deviation of each selected band over the pixels of some rows that are
        there, for to_input: {"s1": {"mean", "std"}, "s2": ...}, dB and reflectance x 10,000."""
        count, mean, variance = (self.records[key][rows] for key in STATISTICS[:3])
        average = np.average(mean, 0, count)
        std = np.sqrt(np.average(variance + (mean - average) ** 2, 0, count))
        recorded, stats = self.stored["s1"] + self.stored["s2"], {}
        for sensor, bands in self.bands.items():
            at = [recorded.index(band) for band in bands]
            stats[sensor] = {"mean": average[at].tolist(), "std": std[at].tolist()}
        return stats


def split_scenes(patches, share):
    """Rows to train on and rows held out: the split `test` where there is one, else that share of
    the scenes, whole ones, the same in every run."""
    held, scenes = patches.rows_of("test"), np.array(patches.scenes)[patches.rows]
    if not len(held):
        names = np.random.default_rng(0).permutation(np.unique(scenes))
        count = min(math.ceil(share * len(names)), len(names) - 1)
        held = patches.rows[np.isin(scenes, names[:count])]
    return np.setdiff1d(patches.rows, held), held


def room(size, crop):
    """How far down and right a crop can lie; DataError where it is too large."""
    if crop > min(size):
        raise DataError(f"--crop {crop}: the patches are {size[0]} x {size[1]} px: choose less")
    return [side - crop for side in size]


def random_crops(rows, size, crop, batch_size, seed, epoch, drop_last=False):
    """One epoch as a list of (rows, tops, lefts), arrays of equal length: every row once in a new
    order, each cropped at a new place; a pure function of (seed, epoch). size: (H, W) of a patch.
    drop_last: all batches of `batch_size`, else equal ones of at most that size."""
    rng = np.random.default_rng((seed, epoch))
    steps = len(rows) // batch_size if drop_last else math.ceil(len(rows) / batch_size)
    order = rng.permutation(rows)[:steps * batch_size]
    places = [rng.integers(0, last + 1, len(order)) for last in room(size, crop)]
    return list(zip(*(np.array_split(values, steps) for values in (order, *places))))


def grid_crops(rows, size, crop, batch_size, middle=False):
    """The fewest evenly spread crops that leave no pixel out, patch by patch; middle: only the one
    in the middle. -> as random_crops()."""
    farthest = room(size, crop)
    places = [np.linspace(0, last, 1 + math.ceil(last / crop)).round() for last in farthest]
    if middle:
        places = [[last // 2] for last in farthest]
    every = [values.astype(int).ravel() for values in np.meshgrid(rows, *places, indexing="ij")]
    starts = range(0, len(every[0]), batch_size)
    return [tuple(values[k:k + batch_size] for values in every) for k in starts]


copy_stream = functools.cache(torch.cuda.Stream)  # one a GPU: torch keeps memory for each


def cut(patches, batch, crop, kinds, pin_memory):
    """Crops at (rows, tops, lefts) -> (B, c, crop, crop) tensors, one of each kind of data."""
    crops, (rows, tops, _) = [], batch
    stored = zip(kinds, patches.arrays, patches.picks, patches.files, patches.starts)
    for kind, array, picks, file, start in stored:
        row_bytes, band_bytes, line_bytes, _ = array.strides
        first_lines = start + (rows * row_bytes + tops * line_bytes)[:, None]
        offsets = first_lines + np.multiply(picks, band_bytes)  # (B, c)
        for offset in offsets.ravel().tolist():  # read ahead: page by page, disks are slow
            os.posix_fadvise(file.fileno(), offset, crop * line_bytes, os.POSIX_FADV_WILLNEED)
        shape = len(rows), len(picks), crop, crop
        crops.append(torch.empty(shape, dtype=kind, pin_memory=pin_memory))
        all_bands = picks == list(range(array.shape[1]))
        bands = slice(None) if all_bands else picks  # a list makes a copy between
        for image, row, top, left in zip(crops[-1].numpy(), *batch):
            image[:] = array[row, bands, top:top + crop, left:left + crop]
    return crops


def loader(patches, batches, crop, device="cpu", threads=None, classes=False):
    """Crops for batches of (rows, tops, lefts), cut ahead of their use by threads, of whose number
    order and content do not depend. Yields fresh s1 int16 (B, c1, crop, crop), s2 uint16 (B, c2,
    crop, crop), classes uint8 (B, crop, crop) or None if not asked for, on the device; the rows."""
    stream = copy_stream(device) if torch.device(device).type == "cuda" else None
    kinds = (torch.int16, torch.uint16, torch.uint8)[:2 + classes]

    def deliver(batch):
        if not stream:
            return batch[0], cut(patches, batch, crop, kinds, False), None
        torch.cuda.set_device(stream.device)  # each thread begins with the first GPU
        crops = cut(patches, batch, crop, kinds, True)
        with torch.cuda.stream(stream):  # beside the computing
            crops = [tensor.to(device, non_blocking=True) for tensor in crops]
        return batch[0], crops, stream.record_event()

    for rows, crops, copied in ahead(deliver, batches, threads):
        if copied:
            computing = torch.cuda.current_stream(device)
            computing.wait_event(copied)
            for tensor in crops:
                tensor.record_stream(computing)  # so that it is not free before its use
        yield crops[0], crops[1], crops[2][:, 0] if classes else None, rows


def check(patches):
    """Print what a store holds, beside what was published, and what was left out."""
    print("published: SEN12MS 180,662 patches in four seasons; DFC2020 986 validation, 5,128 test")
    records, splits = patches.records[patches.rows], patches.splits[patches.rows]
    for split, count in Counter(splits).items():
        print(f"{split or 'in no split'}: {count:,}")
    if {*splits} >= {*TRAINED_ON}:
        print("classifiers learn from train and validation; move away what they should not see")
    labels = [] if patches.labels is None else patches.labels[patches.rows].tolist()
    for number, count in sorted(Counter(labels).items()):
        name = "no label" if number == IGNORE else patches.classes[number]
        print(f"{count:>8,} {name}")

    print("band      lowest   highest      mean   missing   (S1 in dB, S2 reflectance x 10,000)")
    bands, s1_count = patches.bands["s1"] + patches.bands["s2"], len(patches.bands["s1"])
    lowest, highest = records["lowest"].min(0), records["highest"].max(0)
    means = [mean for sensor in patches.stats(patches.rows).values() for mean in sensor["mean"]]
    missing = 1 - records["count"] / math.prod(patches.size)
    for band in zip(bands, lowest, highest, means, missing.mean(0)):
        print("{:<6}{:>10.2f}{:>10.2f}{:>10.2f}{:>10.2%}".format(*band))
    print(f"patches with missing pixels: {np.count_nonzero(missing.any(1)):,}")
    if dark := np.count_nonzero(records["highest"][:, s1_count:].max(1) <= 255):
        print(f"in {dark} patches S2 is never above 255: is it reflectance x 10,000?")
    for bright, dark, needed, _ in BRIGHTER.values():
        if {bright, dark, needed} <= {*bands}:
            one, other = (records["mean"][:, bands.index(band)] for band in (bright, dark))
            if odd := np.count_nonzero(one < other):
                print(f"in {odd} patches {dark} is brighter than {bright}: is their order right?")
    offsets = np.count_nonzero(records["offset"])
    print(f"S2 offset subtracted (baseline 04.00 and later): {offsets}")

    first, twins = {}, []
    for row, mean in zip(patches.rows, records["mean"]):
        other = first.setdefault(mean.tobytes(), row)
        if patches.splits[other] != patches.splits[row]:
            twins.append(f"{patches.ids[other]} and {patches.ids[row]}")
    if twins:
        print(f"the same pixels in two splits: {len(twins)} patches, {', '.join(twins[:3])}")
    print(f"left out: {len(patches.left_out)}", *map(": ".join, patches.left_out.items()), sep="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("pack").add_argument
    add("tree")
    add("store")
    add("--threads", type=positive, help="that read (default: two per core, at most 16)")
    add("--max-bad", type=float, default=0.01, help="share that may be bad (default %(default)s)")
    add("--s2-offset", type=int, choices=(0, 1000), help="default: as B10 or a tag shows")
    commands.add_parser("check").add_argument("store")
    args = vars(parser.parse_args())
    command = args.pop("command")
    check(pack(**args) if command == "pack" else Patches(args["store"]))


if __name__ == "__main__":
    run(main)
