"""Pairs of Sentinel-1 and Sentinel-2 patches: packed once, cropped from the store, scaled to input.

    python data.py pack TREE STORE     # GeoTIFFs to plain .npy: parallel, resumable, safe to kill
    python data.py check STORE         # counts beside the published ones, bad files, value ranges
    python data.py show STORE OUT.png  # pairs side by side, with their labels

A TREE is a folder of GeoTIFFs: SEN12MS or DFC2020 in any of their layouts (patches are found by file
name), or plain pairs `s1/NAME.tif` and `s2/NAME.tif` with labels in `classes/NAME.tif`. Of these a
folder below (`s1/SCENE/NAME.tif`) is a scene, a folder `train`, `validation` or `test` above a split,
and `legend.json` names other bands and classes. A STORE is what `pack` writes and every script reads:
`s1.npy` (N, C1, H, W) in 1/100 dB, `s2.npy` (N, C2, H, W) reflectance x 10,000, `classes.npy`
(N, H, W), `patches.npy` (N,) records, `index.json`. This file can be copied alone.
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
SETTLE = 64  # patches between two flushes of a packing
ROI_FILE = re.compile(r".*/((ROIs\d+_([a-z]+))_(s1|s2|dfc)_(\d+)_p(\d+))\.tif")
PLAIN_FILE = re.compile(
    r".*?(?:/(train|validation|test))?/(s1|s2|classes)/((?:[^/]+/)?[^/.][^/]*)\.tiff?")
HOW_TO_GET = ("The README says how to get SEN12MS and DFC2020; `python tests/simulate.py OUT` makes "
              "simulated data")


class DataError(Exception):
    """The data or an option is not as it must be: one line that says what, where, and the mend."""


def run(main, *errors):
    """Run a script's `main`; a DataError, an OSError or one of `errors` ends it with one line and
    exit status 2. Any other error is a bug and keeps its traceback."""
    try:
        return main()
    except (DataError, OSError, *errors) as error:
        line = str(error).strip().splitlines()[-1]
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)  # main's bars are gone here
    sys.exit(2)


def positive(text):
    """For argparse: an integer above 0."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


# ---------------------------------------------------------------------------------------- labels

def classes_from_codes(codes, legend=DFC_CODES):
    """Label codes, any shape and integer type -> uint8 classes, numbered in the order of the names in
    the legend, {code: name}; 255 for a code that it lacks."""
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
    """(N, h, w) uint8 of `count` classes -> (N,) int64 tensor: the most frequent class (of equals the
    first), or 255 where that is 255."""
    label = class_counts(classes, count).argmax(1)
    return torch.where(label == count, IGNORE, label)


def multi_label(classes, share=0.1, count=8):
    """(N, h, w) uint8 of `count` classes -> (N, count) float32 tensor: 1 for each class on at least
    `share` of all pixels, the unlabelled ones counted in."""
    needed = share * math.prod(classes.shape[1:]) - 1e-6
    return (class_counts(classes, count)[:, :count] >= needed).float()


# --------------------------------------------------------------------------------- network input

def to_input(s1, s2, scale, stats=None, bands=None, names=None, s2_offset=0):
    """Patches to network input, on the device where they are. Tensors or arrays.

    s1: (N, c1, h, w) int16 in 1/100 dB, -32768 missing, or float in dB, NaN or infinite missing.
    s2: (N, c2, h, w) reflectance x 10,000 + s2_offset: 1,000 in products of processing baseline 04.00
        (2022) and later, 0 in a store.
    scale: `patch-max`, every channel of every patch by its own maximum after clipping (as published);
        `fixed`, (dB + 25) / 25 and reflectance, clipped to 0..1; `standard`, per-band mean and standard
        deviation from stats = {"s1": {"mean": [dB], "std": [dB]}, "s2": {...}}, one a channel.
    bands: {"s1": names, "s2": names} of the channels that must be there, as load_encoders gives them.
    names: the same of those that are there, where you know them, checked against bands.
    -> two float32 tensors of the same shapes, finite for any input. Raises DataError for other bands,
    another order of them or an unknown scale.
    """
    s1, s2 = torch.as_tensor(s1), torch.as_tensor(s2)
    for sensor, x in (("s1", s1), ("s2", s2)) if bands else ():
        needed = list(bands[sensor])
        given = list(names[sensor]) if names else f"{x.shape[1]} channels"
        if x.shape[1] != len(needed) or names and given != needed:
            raise DataError(f"{sensor}: {given} given, the encoder takes {len(needed)}: {needed}")
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
    """(N, c, h, w) float -> zero mean, unit variance per channel; one that never varies is centred."""
    numbers = torch.tensor([stats["mean"], stats["std"]], dtype=torch.float32)
    mean, std = numbers.to(x.device, non_blocking=True)[..., None, None]
    return (x - mean) / torch.where(std > 0, std, 1)


# ---------------------------------------------------------------------------------------- a tree

def parse(path):
    """Path of a file in a tree -> (sensor, season or split, scene, patch id), or None."""
    if match := ROI_FILE.fullmatch(path):
        _, season, split, sensor, scene, patch = match.groups()
        scene = f"{season}_{scene}"
        return sensor.replace("dfc", "classes"), split, scene, f"{scene}_p{patch}"
    if match := PLAIN_FILE.fullmatch(path):
        split, sensor, name = match.groups("")
        split = split.replace("train", "validation")  # as DFC2020 names it
        patch = f"{split}/{name}".lstrip("/")
        return sensor, split, os.path.dirname(patch) if "/" in name else patch, patch
    return None


def find_pairs(tree, limit=None):
    """Pairs of a tree by file name, in whatever folders -> (list of {"id", "split", "scene", "s1",
    "s2", "classes"}, the last three paths; {id: reason} of those without a partner or, where others of
    their split have one, a label). limit: so many, spread over all scenes.
    Raises DataError where there are none, or one twice."""
    found, left_out = defaultdict(dict), {}
    files = glob.iglob(f"{glob.escape(str(tree))}/**/*.tif*", recursive=True)
    for path in tqdm(files, desc="looking for files", unit="file", delay=1):
        if parts := parse(path.removeprefix(str(tree).rstrip("/"))):
            sensor, split, scene, patch = parts
            if sensor in found[patch]:
                raise DataError(f"{path} and {found[patch][sensor]} are the same patch: remove one")
            found[patch] |= {"id": patch, "split": split, "scene": scene, sensor: path}
    labelled = {pair["split"] for pair in found.values() if "classes" in pair}
    for patch, pair in found.items():
        needed = {"s1", "s2"} | ({"classes"} if pair["split"] in labelled else set())
        if lacking := sorted(needed - pair.keys()):
            left_out[patch] = f"no {' and no '.join(lacking)} file"
    pairs = [found[patch] for patch in sorted(found.keys() - left_out.keys())]
    if not pairs:
        raise DataError(f"{tree}: no pairs of files such as ROIs1158_spring_s1_1_p30.tif and "
                        f"ROIs1158_spring_s2_1_p30.tif, or s1/NAME.tif and s2/NAME.tif. {HOW_TO_GET}")
    if limit and limit < len(pairs):
        return [pairs[k * len(pairs) // limit] for k in range(limit)], {}
    return pairs, dict(sorted(left_out.items()))


def read_legend(tree):
    """-> {"s1": bands, "s2": bands, or None for 13 (L1C) or 12 (L2A), "classes": {code: name}}: what
    the legend.json of a tree says, else as in SEN12MS and DFC2020. Several codes may be one class."""
    def once(entries):
        if len(dict(entries)) < len(entries):
            raise ValueError("a band or code stands twice")
        return dict(entries)

    legend, path = {"s1": S1_BANDS, "s2": None, "classes": DFC_CODES}, Path(tree, "legend.json")
    if path.exists():
        try:
            legend |= json.loads(path.read_text(), object_pairs_hook=once)
            once([(band, "") for band in legend["s1"] + (legend["s2"] or S2_BANDS)])
            names = once([(int(code), name) for code, name in legend["classes"].items()]).values()
            if len(legend) > 3 or not 2 <= len(set(names)) < IGNORE:
                raise ValueError("another key, or not 2 to 254 classes")
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f'{path}: {error}. It may hold "s1" and "s2", lists of band names, and '
                            '"classes", {"CODE": "NAME", ...}') from None
    return legend


def read_tif(path, count, kinds, size):
    """-> (count, h, w) array of a GeoTIFF of that many bands, one of numpy's data type `kinds` and
    size [h, w]; raises DataError with the reason why not."""
    name = Path(path).name
    try:
        with rasterio.open(path) as tif:
            if tif.count != count:
                raise DataError(f"{name}: {tif.count} bands, not {count}")
            if not tif.dtypes[0].startswith(kinds):
                raise DataError(f"{name}: wrong data type {tif.dtypes[0]}")
            if list(tif.shape) != size:
                raise DataError(f"{name}: {tif.height} x {tif.width} px, not {size[0]} x {size[1]}")
            return tif.read()
    except rasterio.errors.RasterioError:
        reason = "truncated or not a TIFF" if os.access(path, os.R_OK) else "cannot be opened"
        raise DataError(f"{name}: {reason}") from None


def read_patch(pair, plan):
    """-> s1 int16 (C1, H, W) in 1/100 dB, s2 uint16 (C2, H, W) reflectance x 10,000, classes uint8
    (H, W) and the offset that was subtracted from s2; raises DataError for a bad patch."""
    bands, size, offset = plan["bands"], plan["size"], plan["s2_offset"]
    s1 = read_tif(pair["s1"], len(bands["s1"]), "float", size)
    s2 = read_tif(pair["s2"], len(bands["s2"]), ("int", "uint"), size)
    codes = read_tif(pair["classes"], 1, ("int", "uint"), size)[0] if "classes" in pair else np.full(size, -1)
    for sensor, bad, reason in (
            ("s1", not np.isfinite(s1).all(), "NaN or infinite values"),
            ("s1", s1.min() >= 0, "never below 0, so not in dB: 10 log10 of power is"),
            ("s2", s2.min() < 0 or s2.max() > 65535, "values outside 0..65535"),
            ("s2", not s2.any(), "all zero (nodata)")):
        if bad:
            raise DataError(f"{Path(pair[sensor]).name}: {reason}")
    if offset is None:  # products since 2022 hold reflectance x 10,000 + 1,000, cirrus else almost 0
        cirrus = s2[bands["s2"].index("B10")] if "B10" in bands["s2"] else np.zeros(1)
        offset = 1000 if cirrus.min() >= 1000 else 0
    s1 = np.rint(s1 * 100).clip(MISSING + 1, -MISSING - 1).astype(np.int16)
    s2 = (s2.astype(np.int32).clip(offset) - offset).astype(np.uint16)
    return s1, s2, classes_from_codes(codes, plan["codes"]), offset


# --------------------------------------------------------------------------------------- packing

def make_plan(tree, pairs, s2_offset=None):
    """What a packing is to hold: the same at every start of it, and in the end in index.json."""
    legend, root, shapes = read_legend(tree), Path(tree).resolve(), Counter()
    for pair in pairs[::math.ceil(len(pairs) / 25)]:
        with contextlib.suppress(rasterio.errors.RasterioError), rasterio.open(pair["s2"]) as tif:
            shapes[tif.count, tif.shape] += 1
    count, size = max(shapes, key=shapes.get, default=(0, ()))  # the most frequent
    bands = legend["s2"] or (L2A_BANDS if count == len(L2A_BANDS) else S2_BANDS)
    if count != len(bands):
        raise DataError(f"{pairs[0]['s2']} and others: {count} readable bands, not {bands}: mend them, "
                        "or name theirs in legend.json")
    near = (root, *root.parents, *root.glob("*/"))
    return {"format": STORE_FORMAT, "bands": {"s1": legend["s1"], "s2": bands}, "size": list(size),
            "classes": list(dict.fromkeys(legend["classes"].values())), "codes": legend["classes"],
            "labelled": any("classes" in pair for pair in pairs), "s2_offset": s2_offset,
            "simulated": any((folder / "SIMULATED").exists() for folder in near),  # tests/simulate.py
            **{f"{key}s": [pair[key] for pair in pairs] for key in ("id", "split", "scene")}}


def layout(plan):
    """-> {file name: (data type, shape)} of a store's arrays."""
    count, size, s1, s2 = len(plan["ids"]), plan["size"], *map(len, plan["bands"].values())
    record = [("state", "u1"),  # 1: the row is whole; 0: not yet, or bad
              ("offset", "<u2"),  # subtracted from S2
              ("pixels", "<u4", len(plan["classes"]) + 1),  # per class, the last for 255
              *((key, "<f8", s1 + s2) for key in ("mean", "variance", "lowest", "highest"))]  # in dB
    arrays = {"s1.npy": ("<i2", (count, s1, *size)), "s2.npy": ("<u2", (count, s2, *size)),
              "classes.npy": ("u1", (count, *size)), "patches.npy": (record, (count,))}
    return {name: arrays[name] for name in arrays if plan["labelled"] or name != "classes.npy"}


def begin(store, plan, progress):
    """Make the arrays, all zero, with their place on the disk: a full one would kill whoever writes to
    the map. The open file `progress` holds the plan, and a last newline once they are made."""
    text = json.dumps(plan) + "\n"
    progress.seek(0)
    begun = progress.read()
    if not text.startswith(begun):  # a kill may have cut it off
        raise DataError(f"{store}: the tree or the options changed since this packing began: remove it")
    if not begun and len(os.listdir(store)) > 1:
        os.unlink(progress.name)
        raise DataError(f"{store}: holds other files: choose another folder")
    if begun != text:
        try:
            os.write(progress.fileno(), text[len(begun):-1].encode())
            for name, (dtype, shape) in layout(plan).items():
                array = np.lib.format.open_memmap(store / name, "w+", dtype, shape)
                with open(store / name, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
        except OSError:
            for file in store.iterdir():
                file.unlink()
            raise
        print(file=progress, flush=True)


def fill(store, pairs, plan, left_out, threads, max_bad):
    """Read, judge and write the pairs whose rows are not whole yet; adds the bad ones to left_out."""
    *images, records = [np.load(store / name, mmap_mode="r+") for name in layout(plan)]
    numbers, total = [*range(len(plan["classes"])), IGNORE], len(pairs) + len(left_out)

    def pack_row(row):
        try:
            s1, s2, classes, offset = read_patch(pairs[row], plan)
        except DataError as reason:
            return row, str(reason)
        for image, values in zip(images, (s1, s2, classes)):
            image[row] = values
        bands, pixels = np.concatenate((s1 / 100, s2)), np.bincount(classes.ravel(), minlength=256)
        records[row] = (0, offset, pixels[numbers], bands.mean((1, 2)), bands.var((1, 2)),
                        bands.min((1, 2)), bands.max((1, 2)))
        return row, None

    rows = np.flatnonzero(records["state"] == 0)
    packed = ahead(pack_row, rows, threads, SETTLE)
    with tqdm(total=len(pairs), initial=len(pairs) - len(rows), desc="packing", unit="patch") as bar:
        some = True
        while some:  # the last time around flushes the last states
            some = list(itertools.islice(packed, SETTLE))
            for name in layout(plan):  # rows before states: a power cut leaves no state without its row
                with open(store / name) as file:
                    os.fsync(file.fileno())  # unlike a map's flush() it lets the threads read on
            records["state"][[row for row, reason in some if not reason]] = 1
            left_out |= {pairs[row]["id"]: reason for row, reason in some if reason}
            if len(left_out) > max_bad * total or len(left_out) == total:
                bad = "; ".join(f"{patch} ({reason})" for patch, reason in [*left_out.items()][:5])
                raise DataError(f"{store}: {len(left_out)} of {total} patches cannot be used, --max-bad "
                                f"allows {max_bad:.1%}: {bad}. Mend them and start again, or allow more")
            bar.update(len(some))


def ahead(function, items, threads=None, depth=2):
    """Yield function(item) in the order of the items, computed by threads, which run at most `depth`
    results ahead. threads: None for one per core, at most 8."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
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


def pack(tree, store, threads=None, limit=None, max_bad=0.01, s2_offset=None):
    """Write the good patches of a tree to a store -> its Patches. Killed and started again, it goes on
    from what is done and ends in the same bytes. s2_offset: what to subtract from S2; None: 1,000 where
    B10 shows it. Raises DataError where the tree, the disk or the folder do not allow it."""
    store, (pairs, left_out) = Path(store), find_pairs(tree, limit)
    plan = make_plan(tree, pairs, s2_offset)
    try:
        store.mkdir(parents=True, exist_ok=True)
        if not (store / "index.json").exists() or (store / "packing.json").exists():
            with open(store / "packing.json", "a+") as progress:
                fcntl.flock(progress, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
                begin(store, plan, progress)
                fill(store, pairs, plan, left_out, threads, max_bad)
                with open(store / "index.part", "w") as index:
                    json.dump({**plan, "left_out": left_out}, index)
                    index.flush()
                    os.fsync(index.fileno())
                os.replace(index.name, store / "index.json")
                os.unlink(progress.name)
    except BlockingIOError:
        raise DataError(f"{store}: another packing is writing it: wait, or choose another") from None
    except OSError as error:
        size = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in layout(plan).values())
        raise DataError(f"{store}: {error.strerror} (the store takes {size:,} bytes): mend that, or choose "
                        "another folder") from None
    patches = Patches(store)
    if any(patches.index[key] != value for key, value in plan.items()):
        raise DataError(f"{store}: holds another packing (other tree or options): choose another folder")
    return patches


# -------------------------------------------------------------------------------- a store, and crops

class Patches:
    """N co-registered patches of one size in a store; a bad one has a row, but is in no list of rows.

    ids, scenes: lists of str. splits: (N,) a season, `validation`, `test` or "". rows: of the good
    patches. labels: (N,) most frequent class of the patch, 255 for none; None without class maps.
    size: [H, W]. bands: {"s1": names, "s2": names} as selected. classes: names. simulated: bool.
    """

    def __init__(self, path, bands=None):
        """bands: only these, by name and in this order. Raises DataError."""
        if not Path(path, "index.json").exists():
            raise DataError(f"{path}: not a store, or not finished: `python data.py pack {path} STORE` "
                            f"makes one of a folder of GeoTIFFs, or goes on with it. {HOW_TO_GET}")
        try:
            self.index = json.loads(Path(path, "index.json").read_text())
            if self.index["format"] != STORE_FORMAT:
                raise ValueError(f"format {self.index['format']}, this version has {STORE_FORMAT}")
            arrays = [np.load(Path(path, name), mmap_mode="r") for name in layout(self.index)]
            if any(x.shape != shape for x, (_, shape) in zip(arrays, layout(self.index).values())):
                raise ValueError("an array is not the one that index.json describes")
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error}): copy it again, or pack again") from None
        vars(self).update(self.index)  # ids, splits, scenes, size, classes, labelled, simulated
        self.path, self.splits = str(path), np.array(self.splits)
        self.files = [os.open(array.filename, os.O_RDONLY) for array in arrays[:-1]]
        *self.arrays, self.records = [array.view(np.ndarray) for array in arrays]  # a memmap is slow
        self.arrays[2:] = [classes[:, None] for classes in self.arrays[2:]]  # all (N, c, H, W)
        large = sum(array.nbytes for array in arrays) > memory_limit()
        self.rows = np.flatnonzero(self.records["state"])
        self.cold = math.inf if large else len(self.rows)  # crops to come that the disk is asked for
        label = self.records["pixels"].argmax(1)
        known = (label < len(self.classes)) & (self.records["state"] == 1)
        self.labels = np.where(known, label, IGNORE) if self.labelled else None
        self.select(bands or self.bands["s1"] + self.bands["s2"])

    def select(self, bands):
        """Read only these bands; DataError for one that is not there. -> self"""
        every = self.index["bands"]
        if unknown := [band for band in bands if band not in every["s1"] + every["s2"]]:
            raise DataError(f"{self.path}: no band {' '.join(unknown)}; there are {every}")
        self.bands = {sensor: [band for band in bands if band in every[sensor]] for sensor in every}
        self.picks = [[every[sensor].index(band) for band in self.bands[sensor]] for sensor in every]
        self.picks += [[0]] * self.labelled  # the class map
        self.held = None
        return self

    def rows_of(self, *splits):
        """Good rows of these splits."""
        return self.rows[np.isin(self.splits[self.rows], splits)]

    def identity(self):
        """12 hexadecimal digits: which patches these are and what they hold, wherever they lie."""
        text = json.dumps([self.ids, self.index["splits"], self.index["bands"], self.classes])
        return hashlib.sha256(text.encode() + self.records.tobytes()).hexdigest()[:12]

    def stats(self, rows):
        """Mean and standard deviation of each selected band over all pixels of some rows, as to_input
        takes them: {"s1": {"mean", "std"}, "s2": ...}, S1 in dB, S2 reflectance x 10,000."""
        mean, variance = self.records["mean"][rows], self.records["variance"][rows]
        std, first, stats = np.sqrt(variance.mean(0) + mean.var(0)), 0, {}
        for sensor, pick in zip(self.bands, self.picks):
            at = [first + k for k in pick]
            stats[sensor] = {"mean": mean.mean(0)[at].tolist(), "std": std[at].tolist()}
            first = len(self.index["bands"]["s1"])  # S2's bands follow in the records
        return stats

    def cut(self, rows, tops, lefts, crops):
        """Fill tensors (B, c, size, size), of s1, s2 and perhaps classes, with crops of the rows."""
        size, order = crops[0].shape[-1], np.argsort(rows, kind="stable")  # as they lie on the disk
        for file, array, pick, tensor in zip(self.files, self.arrays, self.picks, crops):
            if self.cold > 0:
                read_ahead(file, array, pick, rows[order], tops[order], size)
            pick = slice(None) if pick == list(range(array.shape[1])) else pick
            filled = tensor.numpy()
            for k in order:
                patch, top, left = array[rows[k]], tops[k], lefts[k]
                filled[k] = patch[pick, top:top + size, left:left + size]
        self.cold -= len(rows)

    def hold(self, device):
        """Keep the selected bands on the device, where a batch of crops is one operation. -> self"""
        picked = [array[:, pick] for array, pick in zip(self.arrays, self.picks)]
        signed = [array.view(f"i{array.itemsize}") for array in picked]  # torch dislikes unsigned ones
        self.held = [torch.from_numpy(array).to(device) for array in signed]
        return self


def read_ahead(file, array, pick, rows, tops, size):
    """Ask the system for all that a batch needs, at once: page by page a disk is slow, and the
    system's own guess reads too much."""
    header, (of_row, of_band, of_line, _) = os.fstat(file).st_size - array.nbytes, array.strides
    for (row, top), band in itertools.product(zip(rows, tops), pick):
        start = header + row * of_row + band * of_band + top * of_line
        os.posix_fadvise(file, start, size * of_line, os.POSIX_FADV_WILLNEED)


def memory_limit():
    """Bytes that this process may use: of the machine, or of its container or job (control group)."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    group = Path("/proc/self/cgroup").read_text().rpartition(":")[2].strip("/\n")
    for name in (f"{group}/memory.max", "memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits)


def split_scenes(patches, share):
    """Rows to train on and rows held out: the split `test` where there is one, else that share of the
    scenes, whole ones, the same in every run."""
    held, scenes = patches.rows_of("test"), np.array(patches.scenes)[patches.rows]
    if not len(held):
        names = np.random.default_rng(0).permutation(np.unique(scenes))
        held = patches.rows[np.isin(scenes, names[:min(math.ceil(share * len(names)), len(names) - 1)])]
    return np.setdiff1d(patches.rows, held), held


def room(size, crop):
    """How far down and right a crop can lie; DataError where it is too large."""
    if crop > min(size):
        raise DataError(f"--crop {crop}: the patches are {size[0]} x {size[1]} px: choose a smaller one")
    return [side - crop for side in size]


def random_crops(rows, size, crop, batch_size, seed, epoch, drop_last=False):
    """One epoch as a list of (rows, tops, lefts), arrays of equal length: every row once in a new
    order, each cropped at a new place; a pure function of (seed, epoch).
    rows: repeats allowed. size: (H, W) of the patches. drop_last: all batches of `batch_size`, the rest
    unused; else the epoch is cut into equal batches of at most that size."""
    rng, farthest = np.random.default_rng((seed, epoch)), room(size, crop)
    steps = len(rows) // batch_size if drop_last else math.ceil(len(rows) / batch_size)
    order = rng.permutation(rows)[:steps * batch_size]
    places = [rng.integers(0, last + 1, len(order)) for last in farthest]
    return list(zip(*(np.array_split(values, steps or 1) for values in (order, *places))))[:steps]


def grid_crops(rows, size, crop, batch_size):
    """The fewest evenly spread crops that leave no pixel out, patch by patch. -> as random_crops()."""
    spread = [np.linspace(0, last, math.ceil(side / crop)) for last, side in zip(room(size, crop), size)]
    return in_batches(rows, [places.round().astype(int) for places in spread], batch_size)


def centre_crops(rows, size, crop, batch_size):
    """The middle of each patch. -> as random_crops()."""
    return in_batches(rows, [[last // 2] for last in room(size, crop)], batch_size)


def in_batches(rows, places, batch_size):
    """Every row at every place (tops, lefts). -> as random_crops()."""
    every = [values.ravel() for values in np.meshgrid(rows, *places, indexing="ij")]
    starts = range(0, len(every[0]), batch_size)
    return [tuple(values[k:k + batch_size] for values in every) for k in starts]


def loader(patches, batches, crop, device="cpu", threads=None, classes=False):
    """Crops for batches of (rows, tops, lefts), cut ahead of their use by threads, of whose number
    order and content do not depend. Yields fresh s1 int16 (B, c1, crop, crop), s2 uint16 (B, c2, crop,
    crop), classes uint8 (B, crop, crop) or None if not asked for, on the device; and the rows."""
    stream = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
    kinds = list(zip((torch.int16, torch.uint16, torch.uint8), patches.picks))[:2 + classes]

    def cut(batch):
        crops = [torch.empty(len(batch[0]), len(pick), crop, crop, dtype=dtype, pin_memory=bool(stream))
                 for dtype, pick in kinds]  # torch uses pinned memory again, once it was copied
        patches.cut(*batch, crops)
        with torch.cuda.stream(stream):  # copies run beside the computing
            crops = [tensor.to(device, non_blocking=True) for tensor in crops]
        return batch[0], crops, stream and stream.record_event()

    def cut_held(batch):
        at = torch.from_numpy(np.stack(batch))
        at = at.pin_memory().to(device, non_blocking=True) if stream else at
        places = [tensor.unfold(2, crop, 1).unfold(3, crop, 1) for tensor in patches.held]
        crops = [place[at[0], :, at[1], at[2]].view(kind) for place, (kind, _) in zip(places, kinds)]
        return batch[0], crops, None

    for rows, crops, copied in map(cut_held, batches) if patches.held else ahead(cut, batches, threads):
        if copied:
            computing = torch.cuda.current_stream(device)
            computing.wait_event(copied)
            for tensor in crops:
                tensor.record_stream(computing)  # so that it is not free before its use
        yield crops[0], crops[1], crops[2][:, 0] if classes else None, rows


# -------------------------------------------------------------------------------------- command line

def composite(s2, bands):
    """S2 (c, h, w) of the named bands -> picture (h, w, 3) in 0..1, and its title: true colour, white at
    3,000, where B4, B3, B2 are there, else the first three bands as false colour."""
    shown, white, title = ["B4", "B3", "B2"], 3000, "true colour"
    if not set(shown) <= set(bands):
        shown = (bands * 3)[:3]
        white, title = np.percentile(s2, 98) + 1, f"false colour {' '.join(shown)}"
    picture = s2[[bands.index(band) for band in shown]].transpose(1, 2, 0)
    return np.clip(picture / white, 0, 1), title


def new_figure(rows, columns, **kwargs):
    """-> matplotlib figure and (rows, columns) axes, to be saved to a file."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt.subplots(rows, columns, squeeze=False, layout="constrained", **kwargs)


def show(patches, out, count):
    """Picture of pairs spread over a store: Sentinel-2, Sentinel-1 and, where there are, classes."""
    from matplotlib.colors import ListedColormap
    rows = patches.rows[::math.ceil(len(patches.rows) / count)]
    s1, s2, *maps = (np.concatenate(array[rows], 2) for array in patches.arrays)  # (c, H, count * W)
    picture, title = composite(s2, patches.index["bands"]["s2"])
    size = 1.7 * len(rows) + 2, 1.8 * (2 + len(maps)) + 1
    figure, axes = new_figure(2 + len(maps), 1, figsize=size, subplot_kw={"xticks": (), "yticks": ()})
    axes[0, 0].imshow(picture)
    axes[1, 0].imshow(s1[0], cmap="gray", vmin=-2500, vmax=0)
    for axis, classes in zip(axes[2:, 0], maps):
        names = patches.classes
        colours = ListedColormap(COLOURS) if names == CLASSES else "turbo"
        image = axis.imshow(np.ma.masked_equal(classes[0], IGNORE), colours, vmin=-0.5, vmax=len(names) - 0.5)
        figure.colorbar(image, ticks=range(len(names))).set_ticklabels(names)
    figure.suptitle(f"{'SIMULATED ' * patches.simulated}Sentinel-2 {title}, Sentinel-1, classes")
    figure.savefig(out, dpi=110)


def check(patches):
    """Print what a store holds, beside what was published, and what was left out."""
    print("published: SEN12MS 180,662 patches in four seasons; DFC2020 986 validation, 5,128 test")
    for split, count in Counter(patches.splits[patches.rows]).items():
        print(f"{split or 'patches':<16}{count:>8,}")
    names = dict(enumerate(patches.classes)) | {IGNORE: "no usable label"}
    for number, count in sorted(Counter(patches.labels[patches.rows] if patches.labelled else ()).items()):
        print(f"{names[number]:<16}{count:>8,}")
    records = patches.records[patches.rows]
    print("band      lowest   highest      mean   (S1 in dB, S2 reflectance x 10,000)")
    for band in zip(patches.bands["s1"] + patches.bands["s2"], records["lowest"].min(0),
                    records["highest"].max(0), records["mean"].mean(0)):
        print("{:<6}{:>10.2f}{:>10.2f}{:>10.2f}".format(*band))
    print(f"S2 offset subtracted (baseline 04.00 and later): {np.count_nonzero(records['offset']):,}")
    print(f"left out: {len(patches.index['left_out'])}")
    for patch, reason in patches.index["left_out"].items():
        print(f"  {patch}: {reason}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("pack").add_argument
    add("tree", help="folder of GeoTIFFs")
    add("store", help="folder to write")
    add("--limit", type=positive, help="only so many patches, spread over all scenes")
    add("--threads", type=positive, help="that read (default: one per core, at most 8)")
    add("--max-bad", type=float, default=0.01, help="share that may be bad (default %(default)s)")
    add("--s2-offset", type=int, choices=(0, 1000), help="subtract it from S2 (default: see B10)")
    commands.add_parser("check").add_argument("store")
    add = commands.add_parser("show").add_argument
    add("store")
    add("out", help="picture to write")
    add("--count", type=positive, default=8, help="of pairs (default %(default)s)")
    args = vars(parser.parse_args())
    command = args.pop("command")
    patches = pack(**args) if command == "pack" else Patches(args["store"])
    if command == "show":
        return show(patches, args["out"], args["count"])
    return check(patches)

open_store = Patches

if __name__ == "__main__":
    run(main)
