"""Pairs of Sentinel-1 and Sentinel-2 patches: packed once, cropped from the store, scaled to input.

    python data.py pack TREE STORE     # GeoTIFFs to plain .npy: parallel, resumable, safe to kill
    python data.py check STORE         # counts beside the published ones, bad files, value ranges
    python data.py show STORE OUT.png  # pairs side by side, with their classes

A TREE is a folder of GeoTIFFs: SEN12MS or DFC2020 in any of their layouts (found by file name), or
plain pairs `s1/NAME.tif`, `s2/NAME.tif` with labels in `classes/NAME.tif`: a folder below, as in
`s1/SCENE/NAME.tif`, is a scene, one above named `train`, `validation` or `test` a split, and
`legend.json` names other bands and classes. A STORE is what `pack` writes: `s1.npy` (N, C1, H, W)
in 1/100 dB, `s2.npy` (N, C2, H, W) reflectance x 10,000, `classes.npy` (N, H, W), `patches.npy`
(N,) records, `index.json`. This file can be copied alone.
"""
import argparse
import contextlib
import fcntl
import glob
import hashlib
import itertools
import json
import logging
import math
import os
import re
import sys
import warnings
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rasterio
import torch
from tqdm import tqdm

os.environ.setdefault("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")  # else a listing per file
logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # a bad file is reported once, by us
warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)

S1_BANDS = ["VV", "VH"]
S2_BANDS = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"]
L2A_BANDS = [band for band in S2_BANDS if band != "B10"]  # atmospheric correction drops cirrus
DFC_CODES = {"1": "Forest", "2": "Shrubland", "4": "Grassland", "5": "Wetland", "6": "Cropland",
             "7": "Urban", "9": "Barren", "10": "Water"}  # savanna (3) and snow (8) are not used
CLASSES = list(DFC_CODES.values())
COLOURS = ["#1b7837", "#a6a04c", "#a6d96a", "#5aae9e", "#f2c14e", "#c0392b", "#b9a596", "#2b6cb0"]
IGNORE = 255  # class of a pixel that is none of the classes; label of a patch that has none
MISSING = -32768  # in S1 as integers
SCALES = ("patch-max", "fixed", "standard")
STORE_FORMAT = 2
HOW_TO_GET = ("SEN12MS: mediaTUM, doi 10.14459/2019mp1474000, see README; "
              "`python tests/simulate.py OUT` makes simulated data")
SETTLE = 64  # patches between two flushes of a packing
ROI_FILE = re.compile(r".*/(ROIs\d+_([a-z]+))_(s1|s2|dfc)_(\d+)_(p\d+)\.tif")
PLAIN_FILE = re.compile(
    r".*?(?:/(train|validation|test))?/(s1|s2|classes)/((?:[^/]+/)?[^/.][^/]*)\.tiff?")


class DataError(Exception):
    """The data or an option is not as it must be: one line that says what, where, and the mend."""


def run(main, *errors):
    """Run a script's `main`; a DataError, an OSError or one of `errors` ends it with one line and
    exit status 2. Any other error is a bug and keeps its traceback."""
    try:
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


# ----------------------------------------------------------------------- labels, and network input

def classes_from_codes(codes, legend=DFC_CODES):
    """Label codes of any shape and integer type -> uint8 classes, numbered in the order of the
    names in the legend, {code: name}; 255 for a code that it lacks."""
    names = list(dict.fromkeys(legend.values()))
    classes = np.full(np.shape(codes), IGNORE, np.uint8)
    for code, name in legend.items():
        classes[np.equal(codes, int(code))] = names.index(name)
    return classes


def class_counts(classes, count):
    """(N, h, w) classes -> (N, count + 1) int64 pixels per class, the last column for 255."""
    classes = torch.as_tensor(classes)
    return torch.stack([(classes == c).sum((1, 2)) for c in (*range(count), IGNORE)], 1)


def single_label(classes, count=8):
    """(N, h, w) uint8 of `count` classes -> (N,) int64 tensor: the most frequent class (of equals
    the first), or 255 where that is 255."""
    label = class_counts(classes, count).argmax(1)
    return torch.where(label == count, IGNORE, label)


def multi_label(classes, share=0.1, count=8):
    """(N, h, w) uint8 of `count` classes -> (N, count) float32 tensor: 1 for each class on at least
    `share` of all pixels, the unlabelled ones counted in."""
    needed = share * math.prod(classes.shape[1:]) - 1e-6
    return (class_counts(classes, count)[:, :count] >= needed).float()


def to_input(s1, s2, scale, stats=None, bands=None, s2_offset=0):
    """Patches to network input, on the device where they are. Tensors or arrays.

    s1: (N, c1, h, w) int16 in 1/100 dB, -32768 missing, or float in dB, NaN or infinite missing.
    s2: (N, c2, h, w) reflectance x 10,000 + s2_offset: 1,000 in products of processing baseline
        04.00 (2022) and later, 0 in a store.
    scale: `patch-max`, each channel of each patch by its own maximum after clipping (as published);
        `fixed`, (dB + 25) / 25 and reflectance, clipped to 0..1; `standard`, by mean and standard
        deviation, one a channel: stats = {"s1": {"mean": [dB], "std": [dB]}, "s2": {...}}.
    bands: {"s1": names, "s2": names} that the channels must be, as load_encoders gives them.
    -> two float32 tensors, finite for any input. DataError for other bands or an unknown scale.
    """
    s1, s2 = torch.as_tensor(s1), torch.as_tensor(s2)
    for sensor, x in (("s1", s1), ("s2", s2)) if bands else ():
        if x.shape[1] != len(bands[sensor]):
            raise DataError(f"{sensor}: {x.shape[1]} channels, not {' '.join(bands[sensor])}")
    missing = ~s1.isfinite() if s1.is_floating_point() else s1 == MISSING
    s1 = (s1 if s1.is_floating_point() else s1 / 100).float().masked_fill(missing, -99)
    s2 = (s2.float().nan_to_num(0, posinf=0, neginf=0) - s2_offset).clamp(0)
    if scale == "standard":
        return standardise(s1, stats["s1"]).masked_fill(missing, 0), standardise(s2, stats["s2"])
    s1, s2 = s1.clamp(-25, 0) + 25, s2.clamp(max=10_000)
    if scale == "fixed":
        return s1 / 25, s2 / 10_000
    if scale == "patch-max":
        return tuple(x / (x.amax((2, 3), keepdim=True) + 1e-5) for x in (s1, s2))
    raise DataError(f"scale {scale!r}: it is one of {', '.join(SCALES)}")


def standardise(x, stats):
    """(N, c, h, w) float -> mean 0, variance 1 per channel; one that never varies is centred."""
    numbers = torch.tensor([stats["mean"], stats["std"]], dtype=torch.float32)
    mean, std = numbers.to(x.device, non_blocking=True)[..., None, None]
    return (x - mean) / torch.where(std > 0, std, 1)


# ----------------------------------------------------------------------------- a tree, and packing

def parse(path):
    """Path of a file in a tree -> (sensor, season or split, scene, patch id), or None."""
    if match := ROI_FILE.fullmatch(path):
        season, split, sensor, scene, patch = match.groups()
        scene = f"{season}_{scene}"
        return sensor.replace("dfc", "classes"), split, scene, f"{scene}_{patch}"
    if match := PLAIN_FILE.fullmatch(path):
        split, sensor, name = match.groups("")
        split = split.replace("train", "validation")  # as DFC2020 names it
        patch = f"{split}/{name}".lstrip("/")
        return sensor, split, os.path.dirname(patch) if "/" in name else patch, patch


def find_pairs(tree):
    """-> list of {"id", "split", "scene", "s1", "s2"} and, where there are labels, "classes", the
    last three paths; {id: reason} of the patches that lack a file."""
    files_of, pairs, left_out = defaultdict(dict), [], {}
    files = glob.iglob("**/*.tif*", root_dir=tree, recursive=True)
    for path in tqdm(files, desc="looking for files", unit="file", delay=1):
        if parts := parse(f"/{path}"):
            sensor, split, scene, patch = parts
            if sensor in files_of[patch]:
                raise DataError(f"{files_of[patch][sensor]} and {path} are the same patch: "
                                "remove one")
            files_of[patch] |= {"id": patch, "split": split, "scene": scene,
                                sensor: f"{tree}/{path}"}
    labelled = {pair["split"] for pair in files_of.values() if "classes" in pair}
    for patch, pair in sorted(files_of.items()):
        needed = ["classes"] * (pair["split"] in labelled) + ["s1", "s2"]
        if lacking := [sensor for sensor in needed if sensor not in pair]:
            left_out[patch] = f"no {' and no '.join(lacking)} file"
        else:
            pairs.append(pair)
    if not pairs:
        raise DataError(f"{tree}: no pairs of files such as ROIs1158_spring_s1_1_p30.tif and "
                        "ROIs1158_spring_s2_1_p30.tif, or s1/NAME.tif and s2/NAME.tif. "
                        + HOW_TO_GET)
    return pairs, left_out


def read_legend(tree):
    """-> {"s1": bands, "s2": bands or None for SEN12MS's, "classes": {code: name}}: what the
    legend.json of a tree says, else as in SEN12MS and DFC2020. Several codes may be one class."""
    legend = {"s1": S1_BANDS, "s2": None, "classes": DFC_CODES.items()}
    path = Path(tree, "legend.json")
    try:
        if path.exists():
            legend |= json.loads(path.read_text(), object_pairs_hook=list)
        codes = [int(code) for code, _ in legend["classes"]]
        named = legend["s1"] + (legend["s2"] or S2_BANDS) + codes
        if len(set(named)) < len(named):
            raise ValueError("a band or code stands twice")
        legend["classes"] = dict(legend["classes"])
        names = [*legend["s1"], *(legend["s2"] or ()), *legend["classes"].values()]
        if not legend["s1"] or not all(isinstance(name, str) for name in names):
            raise ValueError("a name is no text, or s1 has no band")
        if len(legend) > 3 or not 2 <= len(set(legend["classes"].values())) < IGNORE:
            raise ValueError("another key, or not 2 to 254 classes")
    except (ValueError, TypeError) as error:
        raise DataError(f'{path}: {error}. It may hold "s1" and "s2", lists of band names, and '
                        '"classes", {"CODE": "NAME", ...}') from None
    return legend


def read_tif(path, kind, *shape):
    """-> array of this kind and (bands, height, width); DataError: why this file is none."""
    try:
        with rasterio.open(path) as tif:
            pixels = tif.read()
    except rasterio.errors.RasterioError:
        raise DataError(f"{Path(path).name}: cannot be read, truncated or not a TIFF") from None
    if pixels.shape != shape or not pixels.dtype.name.startswith(kind):
        raise DataError(f"{Path(path).name}: {pixels.dtype} {pixels.shape} of bands, height, width;"
                        f" not {kind[-1]} {shape}")
    return pixels


def read_patch(pair, plan):
    """-> s1 int16 (C1, H, W) in 1/100 dB, s2 uint16 (C2, H, W) reflectance x 10,000, classes uint8
    (H, W) and the offset that was subtracted from s2; raises DataError for a bad patch."""
    names, size, offset = plan["bands"]["s2"], plan["size"], plan["s2_offset"]
    s1 = read_tif(pair["s1"], ("float",), len(plan["bands"]["s1"]), *size)
    s2 = read_tif(pair["s2"], ("uint", "int"), len(names), *size)
    codes = np.full((1, *size), -1)
    if "classes" in pair:
        codes = read_tif(pair["classes"], ("uint", "int"), 1, *size)
    for sensor, bad, reason in (
            ("s1", not np.isfinite(s1).all(), "NaN or infinite values"),
            ("s1", s1.min() >= 0, "never below 0, so not in dB: 10 log10 of power is"),
            ("s2", s2.min() < 0 or s2.max() > 65535, "values outside 0..65535"),
            ("s2", not s2.any(), "all zero (nodata)")):
        if bad:
            raise DataError(f"{Path(pair[sensor]).name}: {reason}")
    if offset is None:  # products since 2022 hold reflectance x 10,000 + 1,000, cirrus else near 0
        shifted = "B10" in names and s2[names.index("B10")].min() >= 1000
        offset = 1000 if shifted else 0
    s1 = np.rint(s1 * 100).clip(-32767, 32767).astype(np.int16)
    s2 = np.maximum(s2.astype(np.uint16), offset) - offset
    return s1, s2, classes_from_codes(codes[0], plan["codes"]), offset


def make_plan(tree, pairs, s2_offset=None):
    """What a packing is to hold: the same at every start of it, and in the end in index.json."""
    legend, root, count, size = read_legend(tree), Path(tree).resolve(), 0, ()
    for pair in pairs:  # the first S2 that can be opened decides
        with contextlib.suppress(rasterio.errors.RasterioError), rasterio.open(pair["s2"]) as tif:
            count, size = tif.count, tif.shape
            break
    bands = legend["s2"] or (L2A_BANDS if count == len(L2A_BANDS) else S2_BANDS)
    if count != len(bands):
        raise DataError(f"{pair['s2']}: {count} readable bands, not {bands}: mend it, or name its "
                        "bands in legend.json")
    near = (root, *root.parents, *root.glob("*/"))
    return {"format": STORE_FORMAT, "bands": {"s1": legend["s1"], "s2": bands},
            "size": list(size), "classes": list(dict.fromkeys(legend["classes"].values())),
            "codes": legend["classes"], "labelled": any("classes" in pair for pair in pairs),
            "s2_offset": s2_offset,
            "simulated": any((folder / "SIMULATED").exists() for folder in near),  # simulate.py's
            "ids": [pair["id"] for pair in pairs],
            "splits": [pair["split"] for pair in pairs],
            "scenes": [pair["scene"] for pair in pairs]}


def layout(plan):
    """-> {file name: (data type, shape)} of a store's arrays."""
    count, size, s1, s2 = len(plan["ids"]), plan["size"], *map(len, plan["bands"].values())
    record = [("state", "u1"),  # 1: the row is whole; 0: not yet, or bad
              ("offset", "<u2"),  # subtracted from S2
              ("pixels", "<u4", len(plan["classes"]) + 1),  # per class, the last for 255
              *((key, "<f8", s1 + s2) for key in ("mean", "variance", "lowest", "highest"))]
    arrays = {"s1.npy": ("<i2", (count, s1, *size)), "s2.npy": ("<u2", (count, s2, *size))}
    if plan["labelled"]:
        arrays["classes.npy"] = "u1", (count, *size)
    return arrays | {"patches.npy": (record, (count,))}


def begin(store, plan, progress):
    """Make the arrays, all zero, with their place on the disk: a full one would kill whoever writes
    to the map. The open file `progress` holds the plan, and its newline once they are made."""
    text = json.dumps(plan) + "\n"
    progress.seek(0)
    begun = progress.read()
    if begun == text:
        return
    if not text.startswith(begun):  # a kill may have cut it off
        raise DataError(f"{store}: tree or options changed since this packing began: remove it")
    if not begun and len(os.listdir(store)) > 1:
        os.unlink(progress.name)
        raise DataError(f"{store}: holds other files: choose another folder")
    try:
        print(text[len(begun):-1], end="", file=progress, flush=True)
        for name, (dtype, shape) in layout(plan).items():
            array = np.lib.format.open_memmap(store / name, "w+", dtype, shape)
            with open(store / name, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
                os.fsync(file.fileno())
        print(file=progress, flush=True)
    except OSError:
        for file in store.iterdir():
            file.unlink()
        raise


def fill(store, pairs, plan, left_out, threads, max_bad):
    """Read, judge and write the pairs whose rows are not whole; adds the bad ones to left_out.
    -> number of patches with an S2 offset that was subtracted."""
    *images, records = [np.load(store / name, mmap_mode="r+") for name in layout(plan)]
    numbers, total = [*range(len(plan["classes"])), IGNORE], len(pairs) + len(left_out)

    def pack_row(row):
        try:
            s1, s2, classes, offset = read_patch(pairs[row], plan)
        except DataError as reason:
            return row, str(reason)
        for image, values in zip(images, (s1, s2, classes)):
            image[row] = values
        pixels = np.bincount(classes.ravel(), minlength=256)[numbers]
        statistics = zip(moments(s1, 100), moments(s2, 1))
        records[row] = 0, offset, pixels, *map(np.concatenate, statistics)
        return row, None

    rows, some = np.flatnonzero(records["state"] == 0), True
    with contextlib.closing(ahead(pack_row, rows, threads, SETTLE)) as results:
        packed = iter(tqdm(results, "packing", len(rows), unit="patch"))
        while some:  # the last time around flushes the last states
            some = list(itertools.islice(packed, SETTLE))
            for name in layout(plan):  # rows before states: a power cut leaves no state alone
                with open(store / name) as file:
                    os.fsync(file.fileno())  # unlike a map's flush() it lets the threads read on
            for row, reason in some:
                records["state"][row] = reason is None
                if reason:
                    left_out[pairs[row]["id"]] = reason
            if len(left_out) > min(max_bad * total, total - 1):
                bad = [f"{patch} ({reason})" for patch, reason in left_out.items()]
                raise DataError(f"{store}: {len(bad)} of {total} patches cannot be used, --max-bad "
                                f"allows {max_bad:.1%}: {'; '.join(bad[:5])}. Mend them and start "
                                "again, or allow more")
    return int(np.count_nonzero(records["offset"]))


def moments(image, unit):
    """(C, H, W) integers -> mean, variance, lowest and highest of each band, as multiples of the
    unit. The sums of integers and of their squares are exact, so no mean need be known before."""
    x = image.reshape(len(image), -1).astype(float)
    mean = x.mean(1)
    variance = np.einsum("bp,bp->b", x, x) / x.shape[1] - mean ** 2
    return mean / unit, variance / unit ** 2, image.min((1, 2)) / unit, image.max((1, 2)) / unit


def ahead(function, items, threads=None, depth=2):
    """Yield function(item) in the order of the items, computed by threads, of which at most `depth`
    results wait. threads: None for one per core (of each process of torchrun), at most 8."""
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


def pack(tree, store, threads=None, max_bad=0.01, s2_offset=None):
    """Write the good patches of a tree to a store -> its Patches. Killed and started again, it goes
    on from what is done and ends in the same bytes. s2_offset: what to subtract from S2; None:
    1,000 where B10 shows it. Raises DataError where tree, disk or folder do not allow it."""
    store, (pairs, left_out) = Path(store), find_pairs(tree)
    plan = make_plan(tree, pairs, s2_offset)
    try:
        store.mkdir(parents=True, exist_ok=True)
        packing, index = store / "packing.json", store / "index.json"
        if packing.exists() or not index.exists():
            with open(packing, "a+") as progress:
                fcntl.flock(progress, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
                begin(store, plan, progress)
                offsets = fill(store, pairs, plan, left_out, threads, max_bad)
                with open(store / "index.part", "w") as part:
                    json.dump({**plan, "s2_offsets": offsets, "left_out": left_out}, part)
                    part.flush()
                    os.fsync(part.fileno())
                os.replace(part.name, index)
                packing.unlink(missing_ok=True)
    except BlockingIOError:
        raise DataError(f"{store}: another packing is writing it: wait for it") from None
    except OSError as error:
        files = layout(plan).values()
        size = sum(math.prod(shape) * np.dtype(kind).itemsize for kind, shape in files)
        raise DataError(f"{store}: {error.strerror} (the store takes {size:,} bytes): mend that, "
                        "or choose another folder") from None
    patches = Patches(store)
    if not plan.items() <= patches.index.items():
        raise DataError(f"{store}: holds another packing (other tree or options): choose another")
    return patches


# ------------------------------------------------------------------------------ a store, and crops

class Patches:
    """N co-registered patches of one size in a store; a bad one has a row that no list of rows has.

    ids, scenes: lists of str. splits: (N,) a season, `validation`, `test` or "". rows: of the good
    patches. labels: (N,) most frequent class of the patch, 255 for none; None without class maps.
    size: [H, W]. bands: {"s1": names, "s2": names} as selected. classes: names. simulated: bool.
    """

    def __init__(self, path, bands=None):
        """bands: only these, by name and in this order. Raises DataError."""
        try:
            self.index = json.loads(Path(path, "index.json").read_text())
            files = layout(self.index)
            maps = [np.load(Path(path, name), mmap_mode="r") for name in files]
            given = [(array.dtype, array.shape) for array in maps]
            if given != [*files.values()] or self.index["format"] != STORE_FORMAT:
                raise ValueError("an array is not that of index.json, or "
                                 f"format {self.index['format']}, this version has {STORE_FORMAT}")
        except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
            text = f"cannot be read ({error}): copy it again, or pack again"
            if Path(path, "packing.json").exists():
                text = f"its packing is not finished: start `python data.py pack TREE {path}` again"
            elif not Path(path, "index.json").exists():
                text = (f"not a store: `python data.py pack {path} STORE` makes one of a folder of "
                        f"GeoTIFFs. {HOW_TO_GET}")
            raise DataError(f"{path}: {text}") from None
        vars(self).update(self.index)  # ids, scenes, classes, size, left_out, simulated, ...
        *images, self.records = map(np.asarray, maps)  # a memmap is slow
        self.arrays = [image.reshape(len(image), -1, *self.size) for image in images]
        self.files = [open(array.filename, "rb") for array in maps]  # noqa: SIM115
        self.path, self.splits = str(path), np.array(self.splits)
        self.rows = np.flatnonzero(self.records["state"])
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        large = sum(array.nbytes for array in maps) > memory
        self.cold = math.inf if large else len(self.rows)  # patches yet to ask the disk for
        label = self.records["pixels"].argmax(1)
        label[(label == len(self.classes)) | (self.records["state"] == 0)] = IGNORE
        self.labels = label if self.labelled else None
        self.select(bands or self.index["bands"]["s1"] + self.index["bands"]["s2"])

    def select(self, bands):
        """Read only these bands; DataError for one that is not there. -> self"""
        self.bands, self.picks, self.cached = {}, [], None
        every = self.index["bands"]
        for sensor, there in every.items():
            self.bands[sensor] = [band for band in bands if band in there]
            self.picks.append([there.index(band) for band in self.bands[sensor]])
        if unknown := [band for band in bands if band not in every["s1"] + every["s2"]]:
            raise DataError(f"{self.path}: no band {' '.join(unknown)}, see --bands; there are "
                            f"{every}")
        if self.labelled:
            self.picks.append([0])  # the class map
        return self

    def rows_of(self, *splits):
        """Good rows of these splits."""
        return self.rows[np.isin(self.splits[self.rows], splits)]

    def identity(self):
        """12 hexadecimal digits: which patches these are and what they hold, wherever they lie."""
        text = json.dumps([self.ids, self.index["splits"], self.index["bands"], self.classes])
        return hashlib.sha256(text.encode() + self.records.tobytes()).hexdigest()[:12]

    def stats(self, rows):
        """Mean and standard deviation of each selected band over all pixels of some rows, as for
        to_input: {"s1": {"mean", "std"}, "s2": ...}, S1 in dB, S2 reflectance x 10,000."""
        mean, variance = self.records["mean"][rows], self.records["variance"][rows]
        std, stats = np.sqrt(variance.mean(0) + mean.var(0)), {}
        every = self.index["bands"]["s1"] + self.index["bands"]["s2"]
        for sensor, bands in self.bands.items():
            at = [every.index(band) for band in bands]
            stats[sensor] = {"mean": mean.mean(0)[at].tolist(), "std": std[at].tolist()}
        return stats

    def cut(self, rows, tops, lefts, crops):
        """Fill tensors (B, c, size, size) of s1, s2 and perhaps classes with crops of the rows."""
        size, cold = crops[0].shape[-1], self.cold > 0
        for file, array, pick, tensor in zip(self.files, self.arrays, self.picks, crops):
            of_row = array.strides[0]
            header = os.fstat(file.fileno()).st_size - array.nbytes
            for row in rows if cold else ():  # all of a batch at once: page by page disks are slow
                os.posix_fadvise(file.fileno(), header + row * of_row, of_row,
                                 os.POSIX_FADV_WILLNEED)
            pick = slice(None) if pick == list(range(array.shape[1])) else pick
            for crop, row, top, left in zip(tensor.numpy(), rows, tops, lefts):
                crop[:] = array[row][pick, top:top + size, left:left + size]
        self.cold -= len(set(rows.tolist()))

    def hold(self, device):
        """Keep the selected bands on the device, where a batch is one operation. -> self"""
        self.cached = []
        for array, pick in zip(self.arrays, self.picks):
            signed = array[:, pick].view(f"i{array.itemsize}")  # torch lacks unsigned ones
            self.cached.append(torch.from_numpy(signed).to(device))
        return self


def split_scenes(patches, share):
    """Rows to train on and rows held out: the split `test` where there is one, else that share of
    the scenes, whole ones, the same in every run."""
    held = patches.rows_of("test")
    if not len(held):
        scenes = np.array(patches.scenes)[patches.rows]
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
    order, each cropped at a new place; a pure function of (seed, epoch).
    rows: repeats allowed. size: (H, W) of the patches. drop_last: all batches of `batch_size`, the
    rest unused; else the epoch is cut into equal batches of at most that size."""
    rng = np.random.default_rng((seed, epoch))
    steps = len(rows) // batch_size if drop_last else math.ceil(len(rows) / batch_size)
    if not steps:
        return []
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


def centre_crops(rows, size, crop, batch_size):
    """The middle of each patch. -> as random_crops()."""
    return grid_crops(rows, size, crop, batch_size, middle=True)


def loader(patches, batches, crop, device="cpu", threads=None, classes=False):
    """Crops for batches of (rows, tops, lefts), cut ahead of their use by threads, of whose number
    order and content do not depend. Yields fresh s1 int16 (B, c1, crop, crop), s2 uint16 (B, c2,
    crop, crop), classes uint8 (B, crop, crop) or None if not asked for, on the device; the rows."""
    stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
    kinds = (torch.int16, torch.uint16, torch.uint8)[:2 + classes]

    def cut(batch):
        if stream:
            torch.cuda.set_device(stream.device)  # each thread begins with the first GPU
        crops = []
        for pick, kind in zip(patches.picks, kinds):
            shape = len(batch[0]), len(pick), crop, crop
            crops.append(torch.empty(shape, dtype=kind, pin_memory=bool(stream)))
        patches.cut(*batch, crops)
        with torch.cuda.stream(stream):  # beside the computing; torch uses pinned memory again
            crops = [tensor.to(device, non_blocking=True) for tensor in crops]
        return batch[0], crops, stream and stream.record_event()

    def cut_cached(batch):
        at = torch.from_numpy(np.stack(batch))
        rows, tops, lefts = (at.pin_memory() if stream else at).to(device, non_blocking=True)
        windows = [tensor.unfold(2, crop, 1).unfold(3, crop, 1) for tensor in patches.cached]
        crops = [window[rows, :, tops, lefts].view(kind) for window, kind in zip(windows, kinds)]
        return batch[0], crops, None

    cuts = map(cut_cached, batches) if patches.cached else ahead(cut, batches, threads)
    for rows, crops, copied in cuts:
        if copied:
            computing = torch.cuda.current_stream(device)
            computing.wait_event(copied)
            for tensor in crops:
                tensor.record_stream(computing)  # so that it is not free before its use
        yield crops[0], crops[1], crops[2][:, 0] if classes else None, rows


# ------------------------------------------------------------------ pictures, and the command line

def composite(s2, bands):
    """S2 (..., c, h, w) of the named bands -> picture (..., h, w, 3) in 0..1, and its title: true
    colour where B4, B3, B2 are there, else the first three bands as false colour."""
    shown, white, title = ["B4", "B3", "B2"], 3000, "true colour"
    if not set(shown) <= set(bands):
        shown = (bands * 3)[:3]
        white, title = np.percentile(s2, 98) + 1, f"false colour {' '.join(shown)}"
    picture = np.stack([s2[..., bands.index(band), :, :] for band in shown], -1)
    return np.clip(picture / white, 0, 1), title


def new_figure(rows, columns, figsize, **kwargs):
    """-> matplotlib figure and (rows, columns) axes, to be saved to a file."""
    from matplotlib.figure import Figure
    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def class_colours(names):
    """-> matplotlib colormap with a colour for each of these classes."""
    from matplotlib import colormaps, colors
    colours = colors.ListedColormap(COLOURS) if names == CLASSES else colormaps["turbo"]
    return colours.resampled(len(names))


def draw_classes(figure, axis, classes, names):
    """Picture of (h, w) classes, 255 for none, and its legend."""
    last = len(names) - 0.5
    image = axis.imshow(np.ma.masked_equal(classes, IGNORE), class_colours(names), vmin=-0.5,
                        vmax=last, interpolation="nearest")
    figure.colorbar(image, ticks=range(len(names))).set_ticklabels(names)


def show(patches, out, count):
    """Picture of pairs spread over a store: Sentinel-2, Sentinel-1 and, if there are, classes."""
    rows = patches.rows[::math.ceil(len(patches.rows) / count)]
    s1, s2, *maps = (np.concatenate(array[rows], 2) for array in patches.arrays)  # side by side
    picture, title = composite(s2, patches.bands["s2"])
    lines = 2 + len(maps)
    figure, axes = new_figure(lines, 1, figsize=(2 * len(rows) + 1, 2 * lines + 1))
    axes[0, 0].imshow(picture)
    axes[1, 0].imshow(s1[0], cmap="gray", vmin=-2500, vmax=0)
    for classes in maps:
        draw_classes(figure, axes[2, 0], classes[0], patches.classes)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(f"{'SIMULATED ' * patches.simulated}Sentinel-2 {title}, Sentinel-1, classes")
    figure.savefig(out, dpi=110)


def check(patches):
    """Print what a store holds, beside what was published, and what was left out."""
    print("published: SEN12MS 180,662 patches in four seasons; DFC2020 986 validation, 5,128 test")
    for split, count in Counter(patches.splits[patches.rows]).items():
        print(f"{split or 'patches'}: {count:,}")
    labels = Counter(patches.labels[patches.rows].tolist()) if patches.labelled else {}
    for number, count in sorted(labels.items()):
        name = "no usable label" if number == IGNORE else patches.classes[number]
        print(f"{count:>8,} {name}")
    records, bands = patches.records[patches.rows], patches.bands["s1"] + patches.bands["s2"]
    print("band      lowest   highest      mean   (S1 in dB, S2 reflectance x 10,000)")
    for band in zip(bands, records["lowest"].min(0), records["highest"].max(0),
                    records["mean"].mean(0)):
        print("{:<6}{:>10.2f}{:>10.2f}{:>10.2f}".format(*band))
    print(f"S2 offset subtracted (baseline 04.00 and later): {patches.index['s2_offsets']}")
    print(f"left out: {len(patches.left_out)}")
    for patch in patches.left_out.items():
        print("  " + ": ".join(patch))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("pack").add_argument
    add("tree")
    add("store")
    add("--threads", type=positive, help="that read (default: one per core, at most 8)")
    add("--max-bad", type=float, default=0.01, help="share that may be bad (default %(default)s)")
    add("--s2-offset", type=int, choices=(0, 1000), help="default: 1000 where B10 shows it")
    commands.add_parser("check").add_argument("store")
    add = commands.add_parser("show").add_argument
    add("store")
    add("out", help="picture to write")
    add("--count", type=positive, default=8, help="of patches (default %(default)s)")
    args = vars(parser.parse_args())
    command = args.pop("command")
    patches = pack(**args) if command == "pack" else Patches(args["store"])
    if command == "show":
        return show(patches, args["out"], args["count"])
    return check(patches)


if __name__ == "__main__":
    run(main)
