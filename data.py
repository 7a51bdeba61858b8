"""Sentinel-1/Sentinel-2 patches: find, check, pack, show, crop, and scale them to network input.

    python data.py check TREE          # counts against the published ones, bad files by name, value ranges
    python data.py pack TREE STORE     # GeoTIFFs to plain .npy: parallel, resumable, safe to kill
    python data.py show DATA OUT.png   # pairs side by side, with their labels

A TREE is a folder of GeoTIFFs: SEN12MS or DFC2020 in any of their layouts (patches are found by file name), or plain
pairs `s1/NAME.tif`, `s2/NAME.tif` and, where there are labels, `classes/NAME.tif` with DFC2020 codes; for plain pairs
a folder `train`, `validation` or `test` above `s1` gives the split. A STORE is what `pack` writes: `s1.npy` int16
(N, 2, H, W) in 1/100 dB, `s2.npy` uint16 (N, 13, H, W) reflectance x 10,000, `classes.npy` uint8 (N, H, W) and
`index.json`. Every script takes either as DATA, and both give the same numbers. This file can be copied alone.
"""
import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import struct
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

os.environ.setdefault("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")  # else GDAL lists the whole folder for every file
logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # a bad file is reported once, by us
warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)

CLASSES = ("Forest", "Shrubland", "Grassland", "Wetland", "Cropland", "Urban", "Barren", "Water")
COLOURS = ("#1b7837", "#a6a04c", "#a6d96a", "#5aae9e", "#f2c14e", "#c0392b", "#b9a596", "#2b6cb0")  # for the pictures
IGNORE = 255  # class of a pixel that is none of the eight; label of a patch that has none
S1_BANDS = ("VV", "VH")
S2_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12")
L2A_BANDS = tuple(band for band in S2_BANDS if band != "B10")  # atmospheric correction drops the cirrus band
MISSING = -32768  # in s1.npy
SCALES = ("patch-max", "fixed", "standard")
SPLITS = {"train": "validation", "validation": "validation", "test": "test"}  # DFC2020 trains on its "validation" part
PUBLISHED = {"SEN12MS": 180_662, "validation": 986, "test": 5_128}  # patches
STORE_FORMAT = 1
HEADER = 128  # bytes before the data in our .npy files
CHUNK = 16  # patches per job of a packing worker
HOW_TO_GET = ("SEN12MS: mediaTUM, doi 10.14459/2019mp1474000. DFC2020: IEEE DataPort or Copernicus-Bench. The README's "
              "section 'Data' says how; `python tests/simulate.py OUT` makes simulated data to try the scripts on.")

DFC_TO_CLASS = np.full(256, IGNORE, np.uint8)
DFC_TO_CLASS[[1, 2, 4, 5, 6, 7, 9, 10]] = range(8)  # savanna (3) and snow (8) are not used
IGBP_TO_DFC = np.zeros(256, np.uint8)
IGBP_TO_DFC[1:18] = (1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10)


class DataError(Exception):
    """The data or an option is not as it must be. The text is one line: what, where, and the mend."""


class BadPatch(Exception):
    """A patch that cannot be used; the text is the reason."""


def run(main, *errors):
    """Run a script's `main`; a DataError, or one of `errors`, ends it with one line and exit status 2."""
    try:
        main()
    except (DataError, *errors) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------- labels

def classes_from_dfc(codes):
    """DFC2020 codes (simplified IGBP, 1-10), any shape -> uint8 classes 0-7 in the order of CLASSES, else 255."""
    codes = np.asarray(codes)
    return DFC_TO_CLASS[np.where((codes >= 0) & (codes < 256), codes, 0).astype(np.uint8)]


def classes_from_igbp(codes):
    """IGBP codes (1-17, layer 1 of SEN12MS `lc`), any shape -> uint8 classes 0-7 in the order of CLASSES, else 255."""
    codes = np.asarray(codes)
    return DFC_TO_CLASS[IGBP_TO_DFC[np.where((codes >= 0) & (codes < 256), codes, 0).astype(np.uint8)]]


def class_counts(classes):
    """(N, h, w) classes -> (N, 9) int64 pixels per class, the last column for 255."""
    return torch.stack([(classes == c).flatten(1).sum(1) for c in (*range(len(CLASSES)), IGNORE)], 1)


def single_label(classes):
    """(N, h, w) uint8 tensor or array -> (N,) int64 of the same kind: the most frequent class (of equals the first),
    or 255 where that is 255."""
    label = class_counts(torch.as_tensor(classes)).argmax(1)
    label = torch.where(label == len(CLASSES), IGNORE, label)
    return label.numpy() if isinstance(classes, np.ndarray) else label


def multi_label(classes, share=0.1):
    """(N, h, w) uint8 tensor or array -> (N, 8) float32 of the same kind: 1 for each class on at least `share` of all
    pixels, the unlabelled ones counted in."""
    counts = class_counts(torch.as_tensor(classes))[:, :len(CLASSES)]
    label = (counts >= share * math.prod(classes.shape[1:]) - 1e-6).float()
    return label.numpy() if isinstance(classes, np.ndarray) else label


# ---------------------------------------------------------------------------------------------- network input

def to_input(s1, s2, scale, stats=None):
    """Integers of a store to network input, on the device where they are.

    s1: (N, c1, h, w) int16, 1/100 dB, -32768 missing. s2: (N, c2, h, w) uint16, reflectance x 10,000.
    scale: `patch-max`, every channel of every patch by its own maximum after clipping (as published);
    `fixed`, (dB + 25) / 25 and reflectance, clipped to 0..1; `standard`, per-band mean and standard deviation from
    stats = {"s1": {"mean": [dB], "std": [dB]}, "s2": {"mean": [...], "std": [...]}} in the order of the channels.
    -> two float32 tensors of the same shapes, finite for any input. Raises DataError for an unknown scale.
    """
    missing = s1 == MISSING
    s1, s2 = s1.float() / 100, s2.float()
    if scale == "standard":
        return standardise(s1, stats["s1"]).masked_fill(missing, 0), standardise(s2, stats["s2"])
    s1, s2 = s1.clamp(-25, 0) + 25, s2.clamp(0, 10_000)
    if scale == "fixed":
        return s1 / 25, s2 / 10_000
    if scale == "patch-max":
        return tuple(x / (x.amax((2, 3), keepdim=True) + 1e-5) for x in (s1, s2))
    raise DataError(f"scale {scale!r}: it is one of {', '.join(SCALES)}")


def standardise(x, stats):
    """(N, c, h, w) float -> zero mean and unit variance per channel; a band that never varies is only centred."""
    mean, std = (torch.tensor(stats[key], dtype=torch.float32).to(x.device)[:, None, None] for key in ("mean", "std"))
    return (x - mean) / torch.where(std > 0, std, 1)


# ---------------------------------------------------------------------------------------------- files

class Place(NamedTuple):
    """One place on the ground and its files."""
    id: str
    split: str  # season, or `validation` or `test`
    s1: str
    s2: str
    classes: str | None  # dfc or lc


NAME = re.compile(r"(ROIs\d+_[a-z]+)_(s1|s2|lc|dfc)_(\d+)_p(\d+)\.tif")


def scene_of(patch_id):
    """Scene of a patch: neighbours share it. A plain pair is a scene of its own."""
    match = re.fullmatch(r"(ROIs\d+_[a-z]+_\d+)_p\d+", patch_id)
    return match[1] if match else patch_id


def find_patches(tree, seasons=None, limit=None):
    """Patches by file name, in whatever folders -> (Places sorted by season, scene and patch; {id: reason} of those
    without a partner). seasons: only these, e.g. ("spring", "winter"). limit: so many, spread over all scenes.
    Raises DataError where there are none, or one twice."""
    if not Path(tree).is_dir():
        raise DataError(f"{tree}: no such folder. {HOW_TO_GET}")
    found = {}  # (season or split, scene, patch, name of a plain pair) -> {sensor: path}
    for folder, _, names in os.walk(tree, followlinks=True):
        above, kind = Path(folder).absolute().parts[-2:]
        for name in names:
            if match := NAME.fullmatch(name):
                season, sensor, scene, patch = match.groups()
                key = season, int(scene), int(patch), ""
            elif kind in ("s1", "s2", "classes") and name.endswith((".tif", ".tiff")) and name[0] != ".":
                key, sensor = (SPLITS.get(above, ""), 0, 0, name.rsplit(".", 1)[0]), kind
            else:
                continue
            files = found.setdefault(key, {})
            if sensor in files:
                raise DataError(f"{files[sensor]} and {folder}/{name} are the same patch: remove one of them")
            files[sensor] = os.path.join(folder, name)
    label = {key: files.get("dfc") or files.get("classes") or files.get("lc") for key, files in found.items()}
    labelled = {key[0] for key in found if label[key]}  # a season with labels has them for every patch
    places, left_out = [], {}
    for key, files in sorted(found.items()):
        season, scene, patch, name = key
        split = season.rpartition("_")[2]
        if seasons and split not in seasons or not files.keys() & {"s1", "s2"}:
            continue
        patch_id = "/".join(filter(None, (season, name))) if name else f"{season}_{scene}_p{patch}"
        lacking = [s for s in ("s1", "s2") if s not in files] + ["label"] * (season in labelled and not label[key])
        if lacking:
            left_out[patch_id] = f"no {' and no '.join(lacking)} file"
        else:
            places.append(Place(patch_id, split, files["s1"], files["s2"], label[key]))
    if not places:
        raise DataError(f"{tree}: no patches found{' with all their files' if left_out else ''}. Expected files like "
                        "ROIs1158_spring_s1_1_p30.tif, or s1/NAME.tif beside s2/NAME.tif")
    step = max(1, len(places) / (limit or len(places)))
    return [places[int(k * step)] for k in range(round(len(places) / step))], left_out


def read_tif(path, count, kinds, window=None):
    """-> (count, h, w) array of a GeoTIFF whose data type is one of numpy's `kinds`; raises BadPatch."""
    try:
        with rasterio.open(path) as tif:
            if tif.count != count and not (tif.count > count and "_lc_" in Path(path).name):  # layers 2-4 of lc: LCCS
                raise BadPatch(f"{Path(path).name}: {tif.count} bands, not {count}")
            if np.dtype(tif.dtypes[0]).kind not in kinds:
                raise BadPatch(f"{Path(path).name}: wrong data type {tif.dtypes[0]}")
            return tif.read(range(1, count + 1), window=window)
    except rasterio.errors.RasterioError:
        reason = "truncated or not a TIFF" if os.path.getsize(path) else "empty file"
        raise BadPatch(f"{Path(path).name}: {reason}") from None


def read_patch(place, shape, window=None):
    """-> s1 int16 (2, h, w), s2 uint16 (bands, h, w), classes uint8 (h, w); raises BadPatch with the reason.
    shape: (S2 bands, height, width) of the tree. window: of a patch that was judged before."""
    s1, s2 = read_tif(place.s1, len(S1_BANDS), "f", window), read_tif(place.s2, shape[0], "iu", window)
    if place.classes:
        to_classes = classes_from_igbp if "_lc_" in Path(place.classes).name else classes_from_dfc
        classes = to_classes(read_tif(place.classes, 1, "iu", window)[0])
    else:
        classes = np.full(s1.shape[1:], IGNORE, np.uint8)
    if window is None:
        judge(place, shape, s1, s2, classes)
    s1 = np.rint(s1 * 100).clip(MISSING + 1, -MISSING - 1).astype(np.int16)
    return s1, s2.astype(np.uint16, copy=False), classes


def judge(place, shape, s1, s2, classes):
    """Raise BadPatch where a patch that could be read cannot be used."""
    for path, array in ((place.s1, s1), (place.s2, s2), (place.classes, classes)):
        if array.shape[-2:] != tuple(shape[1:]):
            size, expected = ("{} x {}".format(*s) for s in (array.shape[-2:], shape[1:]))
            raise BadPatch(f"{Path(path).name}: {size} px, not {expected}")
    for path, array in ((place.s1, s1), (place.s2, s2)):
        if not np.isfinite(array).all():
            raise BadPatch(f"{Path(path).name}: NaN or infinite values")
        if not array.any():
            raise BadPatch(f"{Path(path).name}: all zero (nodata)")
    if s2.min() < 0 or s2.max() > 65535:
        raise BadPatch(f"{Path(place.s2).name}: values outside 0..65535")


def tree_shape(places):
    """(S2 bands, height, width) of a tree: the most frequent of up to 25 files spread over it."""
    shapes = Counter()
    for place in places[::math.ceil(len(places) / 25)]:
        try:
            with rasterio.open(place.s2) as tif:
                shapes[tif.count, tif.height, tif.width] += tif.count in (len(S2_BANDS), len(L2A_BANDS))
        except rasterio.errors.RasterioError:
            continue
    if not any(shapes.values()):
        raise DataError(f"{places[0].s2}: neither it nor the others tried are Sentinel-2 TIFFs of 13 bands (L1C) or 12 "
                        "(L2A, without B10)")
    return max(sorted(shapes), key=shapes.get)


# ---------------------------------------------------------------------------------------------- scan and pack

class Scan(Dataset):
    """Job k reads and judges CHUNK places, writes the good ones to their rows of `files`, and returns a report."""

    def __init__(self, places, shape, files=()):
        self.places, self.shape, self.files = places, shape, files

    def __getitem__(self, job):
        report = {"job": job, "bad": {}, "label": {}, "sums": {}}
        with contextlib.ExitStack() as stack:
            handles = [stack.enter_context(open(path, "r+b", buffering=0)) for path in self.files]
            self.read(job, report, handles)
            for handle in handles:
                os.fsync(handle.fileno())  # the report must never say more than the disk holds
        return json.dumps(report)

    def read(self, job, report, handles):
        for row in range(job * CHUNK, min((job + 1) * CHUNK, len(self.places))):
            place = self.places[row]
            try:
                s1, s2, classes = read_patch(place, self.shape)
            except BadPatch as reason:
                report["bad"][place.id] = str(reason)
                continue
            report["label"][place.id] = int(single_label(classes[None])[0])
            report["sums"][place.split] = add_sums(report["sums"].get(place.split), band_sums(s1, s2))
            for handle, array in zip(handles, (s1, s2, classes)):
                try:
                    write_at(handle, HEADER + row * array.nbytes, array.tobytes())
                except OSError as error:  # a copy-on-write disk can be full in spite of the reservation
                    report["failed"] = f"{handle.name}: {error.strerror}"


def write_at(handle, offset, data):
    handle.seek(offset)
    while data:  # an unbuffered write may be partial
        data = data[handle.write(data):]


def band_sums(s1, s2):
    """[sum, sum of squares, lowest, highest], each over the bands, as integers: exact in any order of adding."""
    bands = [band.ravel().astype(np.float64) for array in (s1, s2) for band in array]  # exact for sums below 2^53
    return [[int(f(band)) for band in bands] for f in (np.sum, lambda band: band @ band, np.min, np.max)]


def add_sums(a, b):
    return [[f(x, y) for x, y in zip(*rows)] for f, *rows in zip((int.__add__, int.__add__, min, max), a, b)] if a else b


def statistics(sums, pixels):
    """band_sums over so many pixels -> per band mean, standard deviation, lowest and highest, in dB for S1 and
    reflectance x 10,000 for S2."""
    unit = [100] * len(S1_BANDS) + [1] * (len(sums[0]) - len(S1_BANDS))
    total, square, lowest, highest = sums
    return {"mean": [s / pixels / u for s, u in zip(total, unit)],
            "std": [math.sqrt(pixels * q - s * s) / pixels / u for s, q, u in zip(total, square, unit)],
            "lowest": [v / u for v, u in zip(lowest, unit)], "highest": [v / u for v, u in zip(highest, unit)]}


def scan(places, shape, workers=None, files=(), skip=()):
    """Read and judge all places but the jobs in `skip`, in processes; yields a report per job, in their order."""
    jobs = [job for job in range(math.ceil(len(places) / CHUNK)) if job not in skip]
    with tqdm(total=len(places), initial=len(skip) * CHUNK, unit="patch", desc="reading", delay=1) as bar:
        for report in map(json.loads, loader(Scan(places, shape, files), jobs, workers)):
            if "failed" in report:
                raise DataError(report["failed"])
            bar.update(len(report["label"]) + len(report["bad"]))
            yield report


def make_index(tree, places, shape, left_out, reports, max_bad):
    """-> (index of the good patches, as in index.json; their rows among `places`). DataError where too many are bad."""
    left_out, label, sums = dict(left_out), {}, {}
    for report in sorted(reports, key=lambda report: report["job"]):
        left_out.update(report["bad"])
        label.update(report["label"])
        sums.update({split: add_sums(sums.get(split), part) for split, part in report["sums"].items()})
    count = len(label) + len(left_out)
    if len(left_out) > max_bad * count or not label:
        names = "; ".join(f"{patch} ({reason})" for patch, reason in list(left_out.items())[:5])
        raise DataError(f"{tree}: {len(left_out)} of {count} patches cannot be used, --max-bad allows {max_bad:.1%}: "
                        f"{names}{'; ...' if len(left_out) > 5 else ''}")
    tail = (row for row in range(len(places) - 1, len(label) - 1, -1) if places[row].id in label)
    rows = [row if places[row].id in label else next(tail) for row in range(len(label))]  # few bytes move: the last
    total = None                                                       # good patches take the places of the bad ones
    for part in sums.values():
        total = add_sums(total, part)
    return {"format": STORE_FORMAT, "patches": len(rows), "shape": list(shape),
            "bands": [*S1_BANDS, *(S2_BANDS if shape[0] == len(S2_BANDS) else L2A_BANDS)],
            **statistics(total, len(rows) * shape[1] * shape[2]), "sums": sums,
            "simulated": any((Path(tree).resolve() / up / "SIMULATED").exists() for up in (".", "..")),
            "ids": [places[row].id for row in rows], "splits": [places[row].split for row in rows],
            "labels": [label[places[row].id] for row in rows] if any(place.classes for place in places) else None,
            "left_out": left_out}, rows


def store_files(store, patches, shape, labelled):
    """-> {path: (header, bytes per patch, bytes in all)} of a store's arrays."""
    arrays = {"s1.npy": ("<i2", len(S1_BANDS), *shape[1:]), "s2.npy": ("<u2", *shape), "classes.npy": ("|u1", *shape[1:])}
    files = {}
    for name, (dtype, *dims) in list(arrays.items())[:2 + labelled]:
        text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {(patches, *dims)}, }}"
        header = b"\x93NUMPY\x01\x00" + struct.pack("<H", HEADER - 10) + text.ljust(HEADER - 11).encode() + b"\n"
        size = math.prod(dims) * int(dtype[2])
        files[Path(store) / name] = header, size, HEADER + patches * size
    return files


def reserve(store, files):
    """Give every file its full size now, so that a full disk is met before the work, not in it."""
    needed = sum(size for *_, size in files.values())
    held = sum(path.stat().st_blocks * 512 for path in files if path.exists())
    free = shutil.disk_usage(store).free + held
    try:
        if needed > free:
            raise OSError
        for path, (*_, size) in files.items():
            with open(path, "ab") as handle:
                os.posix_fallocate(handle.fileno(), 0, size)
    except OSError:
        for path in () if held else files:
            path.unlink(missing_ok=True)
        raise DataError(f"{store}: the store needs {needed:,} bytes, {free:,} are free (a quota may allow less): choose "
                        "another disk, or fewer patches with --seasons or --limit") from None


def write_store(tree, store, places, shape, left_out, key, workers, max_bad):
    """Fill a locked store, from where an interrupted packing stopped, and write its index last."""
    labelled = any(place.classes for place in places)
    files = store_files(store, len(places), shape, labelled)
    progress = store / "progress.jsonl"  # the key of this packing, then the reports of what is safely on disk
    text = progress.read_text() if progress.exists() else ""
    lines = text[:text.rfind("\n") + 1].splitlines() or [key]  # a line without its end was cut off by a kill
    if lines[0] != key:
        raise DataError(f"{store}: the tree or the options changed since this packing began: remove the folder")
    reserve(store, files)
    replace(progress, "\n".join(lines) + "\n")
    reports = [json.loads(line) for line in lines[1:]]
    with open(progress, "a", buffering=1) as log:
        for report in scan(places, shape, workers, list(files), {report["job"] for report in reports}):
            print(json.dumps(report), file=log)
            reports.append(report)
    index, rows = make_index(tree, places, shape, left_out, reports, max_bad)
    for path, (header, size, _) in store_files(store, len(rows), shape, labelled).items():
        with open(path, "r+b", buffering=0) as handle:
            for row, source in enumerate(rows):
                if row != source:
                    write_at(handle, HEADER + row * size, os.pread(handle.fileno(), size, HEADER + source * size))
            write_at(handle, 0, header)
            os.fsync(handle.fileno())
    replace(store / "index.json", json.dumps({"key": key, **index}, indent=0))


def replace(path, text):
    """Write a file so that it is there whole or not at all."""
    with open(f"{path}.tmp", "w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(f"{path}.tmp", path)


def pack(tree, store, workers=None, seasons=None, limit=None, max_bad=0.01):
    """Write the good patches of a tree to a store -> its index. Killed and started again, it goes on from what is done
    and ends in the same bytes. Raises DataError where the tree, the disk or the folder do not allow it."""
    store = Path(store)
    places, left_out = find_patches(tree, seasons, limit)
    shape = tree_shape(places)
    identity = STORE_FORMAT, shape, [(place.id, place.split, bool(place.classes)) for place in places]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    try:
        store.mkdir(parents=True, exist_ok=True)
        (store / "lock").touch()
    except OSError as error:
        raise DataError(f"{store}: {error.strerror}: choose a folder that can be written") from None
    with open(store / "lock") as lock:
        for patience in range(80, -1, -1):  # the workers of a packing that was killed hold its lock for some seconds
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not patience:
                    raise DataError(f"{store}: another packing is writing it: wait, or choose another folder") from None
                time.sleep(0.1)
        if not (store / "index.json").exists():
            write_store(tree, store, places, shape, left_out, key, workers, max_bad)
        index = read_index(store)
        if index["key"] != key:
            raise DataError(f"{store}: holds another packing (other tree or options): choose another folder")
        for path, (*_, size) in store_files(store, index["patches"], shape, index["labels"] is not None).items():
            os.truncate(path, size)  # only after the index: a tail that fills a hole must outlive any kill
        for name in ("progress.jsonl", "lock"):
            (store / name).unlink(missing_ok=True)
    return index


def read_index(store):
    """-> index.json of a store; DataError where it, or a file that it speaks of, is not as it must be."""
    try:
        index = json.loads((Path(store) / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{store}/index.json cannot be read ({error}): pack again") from None
    if index.get("format") != STORE_FORMAT:
        raise DataError(f"{store}: store format {index.get('format')}, this version reads {STORE_FORMAT}: pack again")
    for path, (header, _, size) in store_files(store, index["patches"], index["shape"], index["labels"] is not None).items():
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise DataError(f"{path}: {found:,} bytes where the index says {size:,}: copy it again, or pack again")
        with open(path, "rb") as handle:
            if handle.read(HEADER) != header:
                raise DataError(f"{path}: not the array that index.json describes: copy it again, or pack again")
    return index


# ---------------------------------------------------------------------------------------------- read and crop

class Patches:
    """N co-registered patches of one size, from a store or a tree, in the same order from both.

    ids, scenes: lists of str. splits: (N,) a season, `validation` or `test`. labels: (N,) single label of the whole
    patch, or None. size: (H, W). bands: {"s1": names, "s2": names} as selected.
    """

    def __init__(self, path, index, places=None):
        self.path, self.index, self.places, self.tensors = path, index, places, None
        self.ids, self.scenes = index["ids"], [scene_of(patch) for patch in index["ids"]]
        self.splits, self.size = np.array(index["splits"]), tuple(index["shape"][1:])
        self.simulated = index["simulated"]
        self.labels = None if index["labels"] is None else np.array(index["labels"])
        if not places:
            files = store_files(path, len(self), index["shape"], self.labels is not None)
            self.arrays = [np.load(file, mmap_mode="r").view(np.ndarray) for file in files]
        self.select(index["bands"])

    def __len__(self):
        return len(self.ids)

    def select(self, bands):
        """Read only these bands, by name and in this order; DataError for one that is not there. -> self"""
        have = self.index["bands"]
        if unknown := [band for band in bands if band not in have]:
            raise DataError(f"{self.path}: no band {' '.join(unknown)}; it has {' '.join(have)}")
        parts = {"s1": have[:len(S1_BANDS)], "s2": have[len(S1_BANDS):]}
        self.bands = {sensor: [band for band in bands if band in part] for sensor, part in parts.items()}
        self.picks = [slice(None) if self.bands[sensor] == part else [part.index(band) for band in self.bands[sensor]]
                      for sensor, part in parts.items()]
        return self

    def stats(self, splits):
        """Per-band mean and standard deviation of the selected bands over all good patches of some splits, as to_input
        takes them."""
        sums = None
        for split in sorted(set(splits) & self.index["sums"].keys()):
            sums = add_sums(sums, self.index["sums"][split])
        values = statistics(sums, np.isin(self.splits, list(splits)).sum().item() * math.prod(self.size))
        at = {sensor: [self.index["bands"].index(band) for band in bands] for sensor, bands in self.bands.items()}
        return {sensor: {key: [values[key][k] for k in at[sensor]] for key in ("mean", "std")} for sensor in at}

    def window(self, row, y, x):
        """-> s1 (c1, h, w), s2 (c2, h, w), classes (h, w) of one patch, as integers; y, x: slices."""
        if self.places:
            cut = rasterio.windows.Window.from_slices(y, x)
            s1, s2, classes = read_patch(self.places[row], self.index["shape"], cut)
        else:
            s1, s2, *classes = (array[row][..., y, x] for array in self.arrays)
            classes = classes[0] if classes else IGNORE
        return s1[self.picks[0]], s2[self.picks[1]], classes

    def empty(self, n, height, width):
        """Uninitialised s1, s2, classes arrays for n patches or crops."""
        return (np.empty((n, len(self.bands["s1"]), height, width), np.int16),
                np.empty((n, len(self.bands["s2"]), height, width), np.uint16), np.empty((n, height, width), np.uint8))

    def crops(self, rows, tops, lefts, size):
        """Crops of `size` px at (tops, lefts) of the patches `rows` -> tensors: s1 int16 (B, c1, size, size), s2 uint16
        (B, c2, size, size), classes uint8 (B, size, size), all 255 where there are no labels."""
        if self.tensors:
            rows, tops, lefts = (torch.as_tensor(v, device=self.tensors[0].device) for v in (rows, tops, lefts))
            views = [tensor.unfold(2, size, 1).unfold(3, size, 1) for tensor in self.tensors]  # (N, c, H', W', size, size)
            s1, s2, classes = (view[rows, :, tops, lefts] for view in views)
            return s1, s2, classes[:, 0]
        out = self.empty(len(rows), size, size)
        for k in np.argsort(rows, kind="stable"):  # read in the order of the file, for disks that seek
            y, x = slice(tops[k], tops[k] + size), slice(lefts[k], lefts[k] + size)
            for array, values in zip(out, self.window(rows[k], y, x)):
                array[k] = values
        return tuple(torch.from_numpy(array) for array in out)

    def hold(self, cache, device):
        """Keep the selected bands in memory: `ram`, or `device`, where a batch of crops is one tensor operation."""
        needed = len(self) * math.prod(self.size) * (2 * sum(map(len, self.bands.values())) + 1)
        free = torch.cuda.mem_get_info(device)[0] if cache == "device" and device.type == "cuda" else \
            os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > free:
            raise DataError(f"--cache {cache}: {self.path} takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                            "leave the option out")
        arrays, whole = self.empty(len(self), *self.size), [slice(0, side) for side in self.size]
        for row in tqdm(range(len(self)), desc="into memory", unit="patch", delay=1):
            for array, values in zip(arrays, self.window(row, *whole)):
                array[row] = values
        self.places, self.arrays, self.picks = None, arrays, [slice(None)] * 2
        if cache == "device":
            self.tensors = [torch.from_numpy(array).to(device) for array in (*arrays[:2], arrays[2][:, None])]
            self.arrays = None
        return self


def open_data(path, bands=None, cache=None, workers=None, device="cpu", max_bad=0.01):
    """-> Patches of a store, or of a tree, whose files are all read once to leave out the bad ones.
    bands: only these, by name. cache: None, `ram` or `device`. Raises DataError."""
    if (Path(path) / "progress.jsonl").exists():
        raise DataError(f"{path}: a packing that is not finished: run the same `python data.py pack` again")
    if (Path(path) / "index.json").exists():
        patches = Patches(str(path), read_index(path))
    else:
        places, left_out = find_patches(path)
        shape = tree_shape(places)
        index, rows = make_index(path, places, shape, left_out, scan(places, shape, workers), max_bad)
        patches = Patches(str(path), index, [places[row] for row in rows])
    patches.select(bands or patches.index["bands"])
    return patches.hold(cache, torch.device(device)) if cache else patches


class RandomCrops(Dataset):
    """Batch `step` of a run, a pure function of (seed, step): per epoch every row once, in a new order, each cropped at
    a new place. Several processes take their parts of each batch.

    rows: patches, repeats allowed. drop_last: all batches of `batch_size`, the rest of an epoch unused; else the epoch
    is cut into equal batches of at most that size.
    """

    def __init__(self, patches, rows, size, batch_size, seed, drop_last=False, rank=0, world=1):
        if size > min(patches.size):
            raise DataError(f"--crop {size}: the patches of {patches.path} are {patches.size[0]} x {patches.size[1]} px")
        self.patches, self.rows, self.size, self.seed, self.rank, self.world = patches, np.asarray(rows), size, seed, rank, world
        self.steps = len(rows) // batch_size if drop_last else math.ceil(len(rows) / batch_size)  # per epoch
        self.used = self.steps * batch_size if drop_last else len(rows)
        self.epoch = None

    def __getitem__(self, step):
        epoch, batch = divmod(step, self.steps)
        if epoch != self.epoch:
            rng, self.epoch = np.random.default_rng((self.seed, epoch)), epoch
            order = rng.permutation(self.rows)[:self.used]
            places = [rng.integers(0, side - self.size + 1, self.used) for side in self.patches.size]
            self.batches = [np.array_split(v, self.steps) for v in (order, *places)]
        rows, tops, lefts = (np.array_split(v[batch], self.world)[self.rank] for v in self.batches)
        return *self.patches.crops(rows, tops, lefts, self.size), torch.from_numpy(rows)


class GridCrops(Dataset):
    """The crops that cover the given patches, the same in every run: batch k is crops k * batch_size onwards, patch by
    patch. places: (top, left) of each crop of a patch, evenly spread, the fewest that leave no pixel out."""

    def __init__(self, patches, rows, size, batch_size):
        if size > min(patches.size):
            raise DataError(f"--crop {size}: the patches of {patches.path} are {patches.size[0]} x {patches.size[1]} px")
        tops, lefts = (np.linspace(0, side - size, math.ceil(side / size)).round().astype(int) for side in patches.size)
        self.patches, self.size, self.batch_size = patches, size, batch_size
        self.places = [(top, left) for top in tops for left in lefts]
        self.rows = np.repeat(rows, len(self.places))

    def __len__(self):
        return math.ceil(len(self.rows) / self.batch_size)

    def __getitem__(self, batch):
        at = np.arange(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.rows)))
        tops, lefts = np.array(self.places)[at % len(self.places)].T
        return *self.patches.crops(self.rows[at], tops, lefts, self.size), torch.from_numpy(self.rows[at])


def loader(dataset, items, workers=None, device=None):
    """The given items of a dataset, in this order, read ahead in processes, on the device. workers: None for one per
    core, 0 for none."""
    workers = min(os.cpu_count() if workers is None else workers, len(items) // 2)
    pin = device is not None and device.type == "cuda"
    batches = DataLoader(dataset, sampler=items, batch_size=None, num_workers=workers, pin_memory=pin)
    for batch in batches:
        yield batch if device is None else [tensor.to(device, non_blocking=True) for tensor in batch]


# ---------------------------------------------------------------------------------------------- command line

def summarise(index):
    """Print what a tree or store holds, against what was published."""
    splits, labels = np.array(index["splits"]), np.array(index["labels"] or [])
    seasons = sum(split not in PUBLISHED for split in index["splits"])
    for split, count in sorted(Counter(index["splits"]).items()):
        published = f" of {PUBLISHED[split]:,} published" if split in PUBLISHED else ""
        print(f"{split or 'patches':<12}{count:>8,}{published}")
        if labels.size:
            counts = Counter(labels[splits == split].tolist())
            names = dict(enumerate(CLASSES)) | {IGNORE: "no usable label"}
            print("            " + ", ".join(f"{names[c]} {counts[c]:,}" for c in names if counts[c]))
    if seasons:
        print(f"{'SEN12MS':<12}{seasons:>8,} of {PUBLISHED['SEN12MS']:,} published")
    scenes = {}
    for patch, label in zip(index["ids"], index["labels"] or []):
        scenes.setdefault(scene_of(patch), []).append(label)
    for scene, found in sorted(scenes.items()):
        if set(found) == {IGNORE}:
            print(f"{scene}: no usable label in any of its {len(found)} patches")
    print("band      lowest   highest      mean        sd   (S1 in dB, S2 reflectance x 10,000)")
    for band, *values in zip(index["bands"], *(index[key] for key in ("lowest", "highest", "mean", "std"))):
        print(f"{band:<4}" + "".join(f"{value:>10.2f}" for value in values))
    print(f"left out: {len(index['left_out'])}")
    for patch, reason in list(index["left_out"].items())[:20]:
        print(f"  {patch}: {reason}")
    if len(index["left_out"]) > 20:
        print(f"  and {len(index['left_out']) - 20} more")


def true_colour(s2):
    """(13 bands as in S2_BANDS or 12, h, w) uint16 -> (h, w, 3) picture of B4, B3, B2, reflectance 0 to 0.3."""
    return np.clip(s2[[3, 2, 1]].transpose(1, 2, 0) / 3000, 0, 1)


def show(patches, out, count=8):
    """Picture of `count` patches spread over the data: Sentinel-2 true colour, Sentinel-1 VV, classes."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    rows = [k * len(patches) // count for k in range(count)] if count < len(patches) else range(len(patches))
    lines = 2 + (patches.labels is not None)
    figure, axes = plt.subplots(lines, len(rows), figsize=(1.7 * len(rows) + 0.6, 1.75 * lines + 0.9), squeeze=False)
    for row, column in zip(rows, axes.T):
        s1, s2, classes = patches.window(row, *(slice(0, side) for side in patches.size))
        column[0].imshow(true_colour(s2))
        column[1].imshow(s1[0] / 100, cmap="gray", vmin=-25, vmax=0)
        if lines == 3:
            shown = np.where(classes == IGNORE, len(CLASSES), classes)
            column[2].imshow(shown, cmap=ListedColormap([*COLOURS, "white"]), vmin=0, vmax=8, interpolation="nearest")
        column[0].set_title(patches.ids[row].replace("ROIs", "").replace("_p", "\np"), fontsize=7)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[:, 0], ("Sentinel-2\ntrue colour", "Sentinel-1\nVV, -25 to 0 dB", "land cover")):
        axis.set_ylabel(name, fontsize=8)
    if lines == 3:
        figure.legend(handles=[Patch(color=c, label=n) for c, n in zip(COLOURS, CLASSES)], ncol=8, loc="lower center",
                      fontsize=7, frameon=False)
    figure.suptitle("SIMULATED Sentinel-1 and Sentinel-2 pairs" if patches.simulated else "Sentinel-1 and Sentinel-2 pairs")
    figure.tight_layout(rect=(0, 0.04 if lines == 3 else 0, 1, 1))
    figure.savefig(out, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("check", "read and judge every patch of a tree, write nothing"), ("pack", "write a store"),
                       ("show", "a picture of some patches")):
        command = commands.add_parser(name, help=text)
        command.add_argument("data", help="folder of GeoTIFFs" + (", or a store" if name != "pack" else ""))
        if name != "check":
            command.add_argument("out", help="folder of the new store" if name == "pack" else "picture to write")
        if name == "pack":
            command.add_argument("--seasons", nargs="+", help="only these: spring summer fall winter, validation test")
            command.add_argument("--limit", type=int, help="only so many patches, spread over all scenes")
        if name == "show":
            command.add_argument("--count", type=int, default=8, help="patches in the picture")
        command.add_argument("--workers", type=int, help="processes that read; default one per core")
        command.add_argument("--max-bad", type=float, default=0.01, help="share of patches that may be bad")
    args = parser.parse_args()
    if args.command == "pack":
        summarise(pack(args.data, args.out, args.workers, args.seasons, args.limit, args.max_bad))
        print(f"packed into {args.out}")
        return
    patches = open_data(args.data, workers=args.workers, max_bad=args.max_bad)
    if args.command == "check":
        summarise(patches.index)
    else:
        show(patches, args.out, args.count)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
