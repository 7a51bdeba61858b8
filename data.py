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
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
import zlib
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import rasterio
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
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
SEASONS = ("spring", "summer", "fall", "winter")
PUBLISHED = {"SEN12MS": 180_662, "validation": 986, "test": 5_128}  # patches
STORE_FORMAT = 1
HEADER = 128  # bytes before the data in our .npy files
CHUNK = 8  # patches per job of a packing worker
RING = 4  # batches in memory per process that reads: two under way, one in use, one to spare
HOW_TO_GET = ("SEN12MS: mediaTUM, doi 10.14459/2019mp1474000. DFC2020: IEEE DataPort or Copernicus-Bench. The README's "
              "section 'Data' says how; `python tests/simulate.py OUT` makes simulated data to try the scripts on.")

DFC_TO_CLASS = np.full(256, IGNORE, np.uint8)
DFC_TO_CLASS[[1, 2, 4, 5, 6, 7, 9, 10]] = range(8)  # savanna (3) and snow (8) are not used
IGBP_TO_DFC = np.zeros(256, np.uint8)
IGBP_TO_DFC[1:18] = (1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 6, 8, 9, 10)


class DataError(Exception):
    """The data or an option is not as it must be. The text is one line: what, where, and the mend."""


class BadPatch(DataError):
    """A patch that cannot be used; the text is the reason."""


def run(main, *errors):
    """Run a script's `main`; a DataError, an OSError or one of `errors` ends it with one line and exit status 2."""
    try:
        return main()
    except (DataError, OSError, *errors) as error:
        line = str(error).strip().splitlines()[-1]  # an error of a worker process comes with its traceback before it
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        line = f"{error}".splitlines()[0] + " Give it more (shared) memory, or less to do with --workers"
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)  # here main's progress bars are gone
    sys.exit(2)


def positive(text):
    """For argparse: an integer above 0."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


# ---------------------------------------------------------------------------------------------- labels

def classes_from_dfc(codes):
    """DFC2020 codes (simplified IGBP, 1-10), any shape -> uint8 classes 0-7 in the order of CLASSES, else 255."""
    return DFC_TO_CLASS[np.clip(np.asarray(codes, np.int64), 0, 255)]


def classes_from_igbp(codes):
    """IGBP codes (1-17, layer 1 of SEN12MS `lc`), any shape -> uint8 classes 0-7 in the order of CLASSES, else 255."""
    return DFC_TO_CLASS[IGBP_TO_DFC[np.clip(np.asarray(codes, np.int64), 0, 255)]]


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

def to_input(s1, s2, scale, stats=None, bands=None, names=None):
    """Patches to network input, on the device where they are. Tensors or arrays.

    s1: (N, c1, h, w) int16 in 1/100 dB, -32768 missing, or float in dB, NaN or infinite missing. s2: (N, c2, h, w)
    reflectance x 10,000. scale: `patch-max`, every channel of every patch by its own maximum after clipping (as
    published); `fixed`, (dB + 25) / 25 and reflectance, clipped to 0..1; `standard`, per-band mean and standard deviation from
    stats = {"s1": {"mean": [dB], "std": [dB]}, "s2": {"mean": [...], "std": [...]}} in the order of the channels.
    bands: {"s1": names, "s2": names} of the channels that must be there, as models.load_encoders gives them. names: the
    same of those that are there, where you know them, checked against bands.
    -> two float32 tensors of the same shapes, finite for any input. Raises DataError for other bands, another order of
    them or an unknown scale.
    """
    s1, s2 = torch.as_tensor(s1), torch.as_tensor(s2)
    for sensor, x in (("s1", s1), ("s2", s2)):
        if bands and x.shape[1] != len(bands[sensor]):
            raise DataError(f"{sensor} has {x.shape[1]} channels, not {len(bands[sensor])}: {' '.join(bands[sensor])}")
        if bands and names and tuple(names[sensor]) != tuple(bands[sensor]):
            raise DataError(f"{sensor} has {' '.join(names[sensor])}, the encoder takes {' '.join(bands[sensor])}: reorder")
    if s1.is_floating_point():
        missing = ~s1.isfinite()
        s1 = s1.float().masked_fill(missing, MISSING / 100)
    else:
        missing, s1 = s1 == MISSING, s1.float() / 100
    s2 = s2.float().nan_to_num(0, posinf=0, neginf=0) if s2.is_floating_point() else s2.float()
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
    mean, std = (torch.tensor(stats[key], dtype=torch.float32).to(x.device, non_blocking=True)[:, None, None]
                 for key in ("mean", "std"))
    return (x - mean) / torch.where(std > 0, std, 1)


# ---------------------------------------------------------------------------------------------- files

Place = namedtuple("Place", "id split s1 s2 classes")  # split: or season; s1, s2, classes: paths; classes: dfc, lc or None
NAME = re.compile(r"(ROIs\d+_[a-z]+)_(s1|s2|lc|dfc)_(\d+)_p(\d+)\.tif")
PLAIN = re.compile(r".*?(?:/(train|validation|test))?/(s1|s2|classes)/([^/.][^/]*)\.tiff?")


def scene_of(patch_id):
    """Scene of a patch: neighbours share it. A plain pair is a scene of its own."""
    return patch_id.rpartition("_p")[0] if patch_id.startswith("ROIs") else patch_id


def find_files(tree):
    """{(season or split, scene, patch, id): {sensor: path}} by file name; DataError where a file is there twice."""
    found = defaultdict(dict)
    for folder, _, names in tqdm(os.walk(tree, followlinks=True), desc="looking for files", unit="folder", delay=1):
        for name in names:
            path = os.path.join(folder, name)
            if match := NAME.fullmatch(name):
                season, sensor, scene, patch = match.groups()
                key = season, int(scene), int(patch), f"{season}_{int(scene)}_p{int(patch)}"
            elif match := PLAIN.fullmatch("/" + os.path.relpath(path, tree)):
                split, sensor, stem = match.groups()
                split = SPLITS.get(split, "")
                key = split, 0, 0, f"{split}/{stem}".lstrip("/")
            else:
                continue
            if sensor in found[key]:
                raise DataError(f"{found[key][sensor]} and {path} are the same patch: remove one of them")
            found[key][sensor] = path
    return found


def find_patches(tree, seasons=None, limit=None):
    """Patches by file name, in whatever folders -> (Places sorted by season, scene and patch; {id: reason} of those
    without a partner). seasons: only these, e.g. ("spring", "winter"). limit: so many, spread over all scenes.
    Raises DataError where there are none, or one twice."""
    if not Path(tree).is_dir():
        raise DataError(f"{tree}: no such folder. {HOW_TO_GET}")
    places, left_out, found = [], {}, find_files(tree)
    labels = {key: files.get("dfc") or files.get("classes") or files.get("lc") for key, files in found.items()}
    labelled = {season for (season, *_), path in labels.items() if path}  # then every patch of the season must have them
    for key, files in sorted(found.items()):
        season, patch_id = key[0], key[-1]
        split = season.rpartition("_")[2]
        if seasons and split not in seasons or not files.keys() & {"s1", "s2"}:
            continue
        lacking = [sensor for sensor in ("s1", "s2") if sensor not in files]
        if season in labelled and not labels[key]:
            lacking.append("label")
        if lacking:
            left_out[patch_id] = f"no {' and no '.join(lacking)} file"
        else:
            places.append(Place(patch_id, split, files["s1"], files["s2"], labels[key]))
    if not places:
        raise DataError(f"{tree}: no pairs found{' of ' + ' '.join(seasons) if seasons else ''}. Expected files like "
                        "ROIs1158_spring_s1_1_p30.tif and ROIs1158_spring_s2_1_p30.tif, or s1/NAME.tif and s2/NAME.tif")
    count = min(limit or len(places), len(places))
    return [places[k * len(places) // count] for k in range(count)], {} if limit else left_out


def read_tif(path, count, kinds, window=None):
    """-> (count, h, w) array of a GeoTIFF whose data type is one of numpy's `kinds`; raises BadPatch."""
    name = Path(path).name
    try:
        with rasterio.open(path) as tif:
            if tif.count != count and not ("_lc_" in name and tif.count > count):  # layers 2-4 of lc: other legends
                raise BadPatch(f"{name}: {tif.count} bands, not {count}")
            if np.dtype(tif.dtypes[0]).kind not in kinds:
                raise BadPatch(f"{name}: wrong data type {tif.dtypes[0]}")
            return tif.read(range(1, count + 1), window=window)
    except rasterio.errors.RasterioError:
        if not os.access(path, os.R_OK):
            raise BadPatch(f"{name}: cannot be opened") from None
        raise BadPatch(f"{name}: {'truncated or not a TIFF' if os.path.getsize(path) else 'empty file'}") from None


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
        with contextlib.suppress(rasterio.errors.RasterioError), rasterio.open(place.s2) as tif:
            if tif.count in (len(S2_BANDS), len(L2A_BANDS)):
                shapes[tif.count, tif.height, tif.width] += 1
    if not shapes:
        raise DataError(f"{places[0].s2}: neither it nor the others tried are Sentinel-2 TIFFs of 13 bands (L1C) or 12 "
                        "(L2A, without B10)")
    return max(sorted(shapes), key=shapes.get)


# ---------------------------------------------------------------------------------------------- scan and pack

class Scan(Dataset):
    """Job k reads and judges CHUNK places -> its report, and s1, s2, classes of the good patches."""

    def __init__(self, places, shape):
        self.places, self.shape, self.buffers = places, shape, Buffers(len(S1_BANDS), shape[0])

    def __getitem__(self, job):
        report, good = {"bad": {}, "label": {}, "sums": {}, "crc": 0}, 0
        batch = self.buffers.next(CHUNK, *self.shape[1:])
        for place in self.places[job * CHUNK:(job + 1) * CHUNK]:
            try:
                s1, s2, classes = read_patch(place, self.shape)
            except BadPatch as reason:
                report["bad"][place.id] = str(reason)
                continue
            report["label"][place.id] = single_label(classes[None]).item() if place.classes else IGNORE
            report["crc"] += zlib.crc32(classes)
            report["sums"][place.split] = add_sums(report["sums"].get(place.split), band_sums(s1, s2))
            for tensor, array in zip(batch, (s1, s2, classes)):
                tensor[good] = torch.from_numpy(array)
            good += 1
        return report, [tensor[:good] for tensor in batch]


def scan(places, shape, workers=None, done=0):
    """Read and judge all places but those of the first `done` jobs, in processes; yields what Scan gives, in order."""
    jobs = range(done, math.ceil(len(places) / CHUNK))
    reports = make_loader(Scan(places, shape), jobs, workers)
    with tqdm(total=len(places), initial=done * CHUNK, unit="patch", desc="reading", delay=1) as bar:
        for report, batch in reports:
            yield report, batch
            bar.update(len(report["label"]) + len(report["bad"]))


def band_sums(s1, s2):
    """[sum, sum of squares, lowest, highest], each a list over the bands of one patch, as exact integers."""
    sums = [], [], [], []
    for band in itertools.chain(s1, s2):
        exact = band.ravel().astype(np.float64)
        square = np.einsum("i,i->", exact, exact)  # no BLAS: its threads would fight with the other workers
        for values, value in zip(sums, (exact.sum(), square, band.min(), band.max())):
            values.append(int(value))
    return sums


def add_sums(a, b):
    """Two results of band_sums, or None and one -> that of both."""
    joined = (int.__add__, int.__add__, min, max)
    return b if a is None else [list(map(f, *rows)) for f, *rows in zip(joined, a, b)]


def statistics(sums, pixels):
    """band_sums over so many pixels -> per band mean, standard deviation, lowest and highest, in dB for S1 and
    reflectance x 10,000 for S2."""
    values = [(s / pixels, math.sqrt(pixels * q - s * s) / pixels, low, high) for s, q, low, high in zip(*sums)]
    values = [[v / (100 if band < len(S1_BANDS) else 1) for v in own] for band, own in enumerate(values)]
    return dict(zip(("mean", "std", "lowest", "highest"), map(list, zip(*values))))


def refuse_bad(tree, left_out, count, max_bad):
    """DataError where more than the share `max_bad` of `count` patches is left out, or all."""
    if len(left_out) > max_bad * count or len(left_out) == count:
        names = "; ".join(f"{patch} ({reason})" for patch, reason in list(left_out.items())[:5])
        raise DataError(f"{tree}: {len(left_out)} of {count} patches cannot be used, --max-bad allows {max_bad:.1%}: "
                        f"{names}{'; ...' if len(left_out) > 5 else ''}. Mend the files (and remove a store begun with "
                        "them), or allow more")


def make_index(tree, places, shape, left_out, reports, max_bad):
    """Reports of all jobs -> index of the good patches, as in index.json. Raises DataError as soon as too many are bad."""
    left_out, label, sums, total, crc = dict(left_out), {}, {}, None, 0
    count = len(places) + len(left_out)
    for report in reports:
        left_out |= report["bad"]
        label |= report["label"]
        crc += report["crc"]
        refuse_bad(tree, left_out, count, max_bad)
        for split, part in report["sums"].items():
            sums[split], total = add_sums(sums.get(split), part), add_sums(total, part)
    good = [place for place in places if place.id in label]
    return {"format": STORE_FORMAT, "patches": len(good), "shape": list(shape),
            "bands": [*S1_BANDS, *(S2_BANDS if shape[0] == len(S2_BANDS) else L2A_BANDS)],
            **statistics(total, len(good) * shape[1] * shape[2]), "sums": sums, "crc": crc,  # crc: of all class maps
            "simulated": is_simulated(tree),
            "ids": [place.id for place in good], "splits": [place.split for place in good],
            "labels": [label[place.id] for place in good] if any(place.classes for place in places) else None,
            "left_out": left_out}


def is_simulated(tree):
    """Whether tests/simulate.py made a tree, or the folder it lies in, or one directly in it."""
    tree = Path(tree).resolve()
    return any((folder / "SIMULATED").exists() for folder in (tree, *tree.parents, *tree.glob("*/")))


def store_files(store, patches, shape, labelled):
    """-> {path: (header, bytes in all)} of the .npy files of a store."""
    arrays = {"s1.npy": ("<i2", len(S1_BANDS), *shape[1:]), "s2.npy": ("<u2", *shape), "classes.npy": ("|u1", *shape[1:])}
    files = {}
    for name, (dtype, *dims) in list(arrays.items())[:2 + labelled]:
        text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {(patches, *dims)}, }}"
        header = b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"
        files[Path(store) / name] = header, HEADER + patches * math.prod(dims) * np.dtype(dtype).itemsize
    return files


def reserve(store, files, progress, text):
    """Write the text to the file `progress` and give every file its full size now, so that a full disk is met before
    the work, not in it."""
    begun = progress.exists()
    if not begun and (there := [path for path in files if path.exists()]):
        raise DataError(f"{there[0]}: there is such a file, but no packing began here: choose another folder")
    needed = sum(size for _, size in files.values())
    free = shutil.disk_usage(store).free + sum(path.stat().st_blocks * 512 for path in files if path.exists())
    try:
        if needed > free:
            raise OSError(errno.ENOSPC, "")
        replace(progress, text)
        for path, (_, size) in files.items():
            path.touch()
            with open(path, "r+b") as handle:  # to append is not enough where the C library has to write the zeros
                os.posix_fallocate(handle.fileno(), 0, size)
    except OSError as error:
        for path in (*files, progress) if not begun else ():
            path.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(f"{store}: the store needs {needed:,} bytes, {free:,} are free (a quota may allow less): choose "
                        "another disk, or fewer patches with --seasons or --limit") from None


def write_patches(paths, progress, done, batches):
    """Append what scan() yields to the files of a store. Yields the reports: those `done` before, then each when its
    patches, and after them its line in the file `progress`, are on the disk."""
    yield from done
    row = sum(len(report["label"]) for report in done)
    for report, batch in batches:
        for path, tensor in zip(paths, batch):
            with open(path, "r+b") as handle:
                handle.seek(HEADER + row * tensor.stride(0) * tensor.itemsize)
                handle.write(tensor.numpy())
                flush(handle)
        with open(progress, "a") as log:
            print(json.dumps(report), file=log)
            flush(log)
        row += len(report["label"])
        yield report


def write_store(tree, store, places, shape, left_out, key, workers, max_bad):
    """Fill a locked store, from where an interrupted packing stopped, and write its index last."""
    labelled = any(place.classes for place in places)
    files = store_files(store, len(places), shape, labelled)
    progress = store / "progress.jsonl"  # the key of this packing, then the report of each job that is on the disk
    text = progress.read_text() if progress.exists() else ""
    lines = text[:text.rfind("\n") + 1].splitlines() or [key]  # a line without its end was cut off by a kill
    if lines[0] != key:
        raise DataError(f"{store}: the tree or the options changed since this packing began: remove the folder")
    reserve(store, files, progress, "\n".join(lines) + "\n")
    done = [json.loads(line) for line in lines[1:]]
    reports = write_patches(files, progress, done, scan(places, shape, workers, len(done)))
    index = make_index(tree, places, shape, left_out, reports, max_bad)
    for path, (header, size) in store_files(store, index["patches"], shape, labelled).items():
        with open(path, "r+b") as handle:
            handle.write(header)
            handle.truncate(size)  # what was reserved for bad patches
            flush(handle)
    replace(store / "index.json", json.dumps({"key": key, **index}, indent=0))


def flush(handle):
    """Bring what was written to the disk."""
    handle.flush()
    os.fsync(handle.fileno())


def replace(path, text):
    """Write a file so that it is there whole or not at all."""
    with open(f"{path}.tmp", "w") as handle:
        handle.write(text)
        flush(handle)
    os.replace(f"{path}.tmp", path)


def pack(tree, store, workers=None, seasons=None, limit=None, max_bad=0.01):
    """Write the good patches of a tree to a store -> its index. Killed and started again, it goes on from what is done
    and ends in the same bytes. Raises DataError where the tree, the disk or the folder do not allow it."""
    store = Path(store)
    places, left_out = find_patches(tree, seasons, limit)
    shape = tree_shape(places)
    identity = STORE_FORMAT, CHUNK, shape, is_simulated(tree), [(place.id, place.split, bool(place.classes)) for place in places]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    try:
        store.mkdir(parents=True, exist_ok=True)
        with open(store / "lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by this process alone, not by its workers
            if not os.fstat(lock.fileno()).st_nlink:  # the packing before ended just now
                raise BlockingIOError
            try:
                if (store / "index.json").exists():
                    print(f"{store}: packed before, nothing is written")
                else:
                    write_store(tree, store, places, shape, left_out, key, workers, max_bad)
                index = read_index(store)
                if index["key"] != key:
                    raise DataError(f"{store}: holds another packing (other tree or options): choose another folder")
                (store / "progress.jsonl").unlink(missing_ok=True)
            finally:
                (store / "lock").unlink()
    except BlockingIOError:
        raise DataError(f"{store}: another packing is writing it: wait, or choose another folder") from None
    except OSError as error:
        raise DataError(f"{store}: {error.strerror}: mend that, or choose another folder") from None
    return index


def read_index(store):
    """-> index.json of a store; DataError where it, or a file that it speaks of, is not as it must be."""
    try:
        index = json.loads((Path(store) / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{store}/index.json cannot be read ({error}): pack again") from None
    if index.get("format") != STORE_FORMAT:
        raise DataError(f"{store}: store format {index.get('format')}, this version reads {STORE_FORMAT}: pack again")
    for path, (header, size) in store_files(store, index["patches"], index["shape"], index["labels"] is not None).items():
        found = path.stat().st_size if path.exists() else 0
        if found < size:
            raise DataError(f"{path}: {found:,} bytes where the index says {size:,}: copy it again, or pack again")
        with open(path, "rb") as handle:
            if handle.read(HEADER) != header:
                raise DataError(f"{path}: not the array that index.json describes: copy it again, or pack again")
    return index


# ---------------------------------------------------------------------------------------------- read and crop

class Buffers:
    """Memory for batches of s1, s2, classes, used in turn, since to get new memory from the system takes longer than to
    fill it: a batch is overwritten when RING more have been asked for."""

    def __init__(self, s1_bands, s2_bands):
        self.bands, self.made_for = (s1_bands, s2_bands), None

    def next(self, n, *size):
        """-> uninitialised tensors s1 (n, c1, h, w), s2 (n, c2, h, w), classes (n, h, w). size: h, w."""
        made_for = os.getpid(), *size  # what a worker inherits is not shared
        if self.made_for != made_for or n > len(self.ring[0][0]):
            self.made_for, self.ring = made_for, [empty(n, *self.bands, *size) for _ in range(RING)]
            if get_worker_info():  # the main process reads them where they are
                self.ring = [[tensor.share_memory_() for tensor in batch] for batch in self.ring]
        self.ring.append(self.ring.pop(0))
        return [tensor[:n] for tensor in self.ring[-1]]


def empty(n, s1_bands, s2_bands, *size):
    """Uninitialised tensors of s1, s2, classes for n patches or crops; from numpy, which asks for large pages."""
    shapes = {np.int16: (n, s1_bands, *size), np.uint16: (n, s2_bands, *size), np.uint8: (n, *size)}
    return [torch.from_numpy(np.empty(shape, dtype)) for dtype, shape in shapes.items()]


class Patches:
    """N co-registered patches of one size, from a store or a tree, in the same order from both.

    ids, scenes: lists of str. splits: (N,) a season, `validation` or `test`. labels: (N,) single label of the whole
    patch, or None. size: (H, W). bands: {"s1": names, "s2": names} as selected.
    """

    def __init__(self, path, index, places=None):
        self.path, self.index, self.places = path, index, places
        self.arrays = self.tensors = self.files = ()
        self.ids, self.scenes = index["ids"], [scene_of(patch) for patch in index["ids"]]
        self.splits, self.size = np.array(index["splits"]), tuple(index["shape"][1:])
        self.simulated = index["simulated"]
        self.labels = None if index["labels"] is None else np.array(index["labels"])
        if places is None:
            files = store_files(path, len(self), index["shape"], self.labels is not None)
            self.arrays = [np.load(file, mmap_mode="r").view(np.ndarray) for file in files]  # a memmap's slices are slow
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            on_disk = sum(array.nbytes for array in self.arrays) > memory  # else it is in the page cache, or soon
            self.files = [os.open(file, os.O_RDONLY) for file in files if on_disk]
        self.select(index["bands"])

    def __len__(self):
        return len(self.ids)

    def identity(self):
        """Hash of which patches these are, wherever they lie."""
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:12]

    def select(self, bands):
        """Read only these bands, by name and in this order; DataError for one that is not there. -> self"""
        have = self.index["bands"]
        if unknown := [band for band in bands if band not in have]:
            raise DataError(f"{self.path}: no band {' '.join(unknown)}; it has {' '.join(have)}")
        sensors = {"s1": have[:len(S1_BANDS)], "s2": have[len(S1_BANDS):]}
        self.bands = {sensor: [band for band in bands if band in own] for sensor, own in sensors.items()}
        self.picks = [slice(None) if self.bands[sensor] == own else [own.index(band) for band in self.bands[sensor]]
                      for sensor, own in sensors.items()]
        self.buffers = Buffers(*map(len, self.bands.values()))
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

    def crops(self, rows, tops, lefts, size):
        """Crops of `size` px at (tops, lefts) of the patches `rows` -> tensors: s1 int16 (B, c1, size, size), s2 uint16
        (B, c2, size, size), classes uint8 (B, size, size), all 255 where there are no labels. They are overwritten when
        RING more have been asked for: clone what is to be kept."""
        if self.tensors:
            rows, tops, lefts = (torch.as_tensor(v, device=self.tensors[0].device) for v in (rows, tops, lefts))
            views = [tensor.unfold(2, size, 1).unfold(3, size, 1) for tensor in self.tensors]  # (N, c, H', W', size, size)
            s1, s2, classes = (view[rows, :, tops, lefts] for view in views)
            return [s1, s2.view(torch.uint16), classes[:, 0]]
        rows, tops, lefts = map(np.asarray, (rows, tops, lefts))
        batch = self.buffers.next(len(rows), size, size)
        arrays = [tensor.numpy() for tensor in batch]
        order = np.argsort(rows, kind="stable")  # read in the order of the file, for disks that seek
        self.read_ahead(rows[order], tops[order], size)
        for k in order:
            y, x = slice(tops[k], tops[k] + size), slice(lefts[k], lefts[k] + size)
            for array, values in zip(arrays, self.window(rows[k], y, x)):
                array[k] = values
        return batch

    def read_ahead(self, rows, tops, size):
        """Ask the system for all that a batch needs, at once: page by page a disk is slow, and a guess reads too much."""
        for file, array, pick in zip(self.files, self.arrays, (*self.picks, None)):
            *outer, line, _ = array.strides
            bands = np.arange(array.shape[1])[pick].tolist() if array.ndim == 4 else [0]
            for row, top in zip(rows.tolist(), tops.tolist()):
                for band in bands:
                    start = HEADER + row * outer[0] + band * outer[-1] + top * line
                    os.posix_fadvise(file, start, size * line, os.POSIX_FADV_WILLNEED)

    def hold(self, cache, device):
        """Keep the selected bands in memory: `ram`, or `device`, where a batch of crops is one tensor operation."""
        needed = len(self) * math.prod(self.size) * (2 * sum(map(len, self.bands.values())) + 1)
        if cache == "device" and device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
            free = int(meminfo["MemAvailable"].split()[0]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if needed > free:
            raise DataError(f"--cache {cache}: {self.path} takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                            "leave the option out")
        tensors = s1, s2, classes = empty(len(self), *map(len, self.bands.values()), *self.size)
        arrays, whole = [tensor.numpy() for tensor in tensors], [slice(0, side) for side in self.size]
        for row in tqdm(range(len(self)), desc="into memory", unit="patch", delay=1):
            for array, values in zip(arrays, self.window(row, *whole)):
                array[row] = values
        self.places, self.arrays, self.picks, self.files = None, arrays, [slice(None)] * 2, ()
        if cache == "device":  # torch can do little with uint16: the same bits as int16
            self.tensors, self.arrays = [x.to(device) for x in (s1, s2.view(torch.int16), classes[:, None])], ()
        return self


def open_data(path, bands=None, cache=None, workers=None, device="cpu", max_bad=0.01, seasons=None, limit=None):
    """-> Patches of a store, or of a tree, whose files are all read once to leave out the bad ones.
    bands: only these, by name. cache: None, `ram` or `device`. seasons, limit: of a tree, as for find_patches().
    Raises DataError."""
    if (Path(path) / "index.json").exists():
        patches = Patches(str(path), read_index(path))
    elif (Path(path) / "progress.jsonl").exists():
        raise DataError(f"{path}: a packing that is not finished: run the same `python data.py pack` again")
    else:
        places, left_out = find_patches(path, seasons, limit)
        shape = tree_shape(places)
        reports = (report for report, _ in scan(places, shape, workers))
        index = make_index(path, places, shape, left_out, reports, max_bad)
        patches = Patches(str(path), index, [place for place in places if place.id not in index["left_out"]])
    patches.select(bands or patches.index["bands"])
    return patches.hold(cache, torch.device(device)) if cache else patches


def split_scenes(patches, share):
    """Rows to train on and rows held out, by whole scenes; patches of a `test` split are in neither."""
    rows = np.flatnonzero(patches.splits != "test")
    scenes = np.array(patches.scenes)[rows]
    names = np.unique(scenes)
    count = min(math.ceil(share * len(names)), len(names) - 1)
    held = np.isin(scenes, np.random.default_rng(0).permutation(names)[:count])
    return rows[~held], rows[held]


class Crops(Dataset):
    """Square crops of the patches `rows`; DataError where they are too large."""

    def __init__(self, patches, rows, size):
        if size > min(patches.size):
            raise DataError(f"--crop {size}: the patches of {patches.path} are {patches.size[0]} x {patches.size[1]} px")
        self.patches, self.rows, self.size = patches, np.asarray(rows), size


class RandomCrops(Crops):
    """Batch `step` of a run, a pure function of (seed, step): per epoch every row once, in a new order, each cropped at
    a new place. Several processes take their parts of each batch.

    rows: patches, repeats allowed. drop_last: all batches of `batch_size`, the rest of an epoch unused; else the epoch
    is cut into equal batches of at most that size.
    """

    def __init__(self, patches, rows, size, batch_size, seed, drop_last=False, rank=0, world=1):
        super().__init__(patches, rows, size)
        self.seed, self.rank, self.world, self.epoch = seed, rank, world, None
        self.steps = len(rows) // batch_size if drop_last else math.ceil(len(rows) / batch_size)  # per epoch
        self.used = self.steps * batch_size if drop_last else len(rows)

    def __getitem__(self, step):
        epoch, batch = divmod(step, self.steps)
        if epoch != self.epoch:
            rng, self.epoch = np.random.default_rng((self.seed, epoch)), epoch
            order = rng.permutation(self.rows)[:self.used]
            places = [rng.integers(0, side - self.size + 1, self.used) for side in self.patches.size]
            self.batches = [np.array_split(v, self.steps) for v in (order, *places)]
        rows, tops, lefts = (np.array_split(v[batch], self.world)[self.rank] for v in self.batches)
        return *self.patches.crops(rows, tops, lefts, self.size), torch.from_numpy(rows)


class GridCrops(Crops):
    """The crops that cover the given patches, the same in every run: batch k is crops k * batch_size onwards, patch by
    patch. places: (top, left) of each crop of a patch, evenly spread, the fewest that leave no pixel out."""

    def __init__(self, patches, rows, size, batch_size):
        super().__init__(patches, rows, size)
        tops, lefts = (np.linspace(0, side - size, math.ceil(side / size)).round().astype(int) for side in patches.size)
        self.batch_size, self.places = batch_size, np.array([(top, left) for top in tops for left in lefts])

    def __len__(self):
        return math.ceil(len(self.rows) * len(self.places) / self.batch_size)

    def __getitem__(self, batch):
        last = min((batch + 1) * self.batch_size, len(self.rows) * len(self.places))
        patch, place = np.divmod(np.arange(batch * self.batch_size, last), len(self.places))
        rows, (tops, lefts) = self.rows[patch], self.places[place].T
        return *self.patches.crops(rows, tops, lefts, self.size), torch.from_numpy(rows)


class CentreCrops(GridCrops):
    """The middle of each of the given patches."""

    def __init__(self, patches, rows, size, batch_size):
        super().__init__(patches, rows, size, batch_size)
        self.places = np.array([[(side - size) // 2 for side in patches.size]])


def processes(workers, jobs):
    """Worker processes to start for some jobs. workers: None for one per core, at most 8; 0 for none."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    return max(0, min(max(min(cores, 8), 1) if workers is None else workers, len(jobs) // 2))


def make_loader(dataset, items, workers, **options):
    count = processes(workers, items)
    context = "fork" if count else None  # workers inherit the mapped files instead of getting a copy of them
    return DataLoader(dataset, sampler=items, batch_size=None, num_workers=count, multiprocessing_context=context, **options)


def loader(dataset, items, workers=None, device=None):
    """The given items of Crops, in this order, read ahead in processes, on the device. A batch is overwritten, all but
    its rows, once the second after it is drawn."""
    if dataset.patches.tensors:  # --cache device
        return (dataset[item] for item in items)
    cuda = device is not None and device.type == "cuda"
    batches = make_loader(dataset, items, workers, pin_memory=cuda)
    return ([tensor.to(device, non_blocking=True) for tensor in batch] for batch in batches) if cuda else iter(batches)


# ---------------------------------------------------------------------------------------------- command line

def summarise(index, names=20):
    """Print what a tree or store holds, against what was published, and the names of so many that were left out."""
    splits, labels = np.array(index["splits"]), np.array(index["labels"] or [])
    counts = Counter(index["splits"])
    counts["SEN12MS"] = sum(counts[split] for split in SEASONS)
    for split, count in counts.items():
        published = f" of {PUBLISHED[split]:,} published" if split in PUBLISHED else ""
        if count:
            print(f"{split or 'patches':<12}{count:>8,}{published}")
        found = Counter(labels[splits == split].tolist()) if labels.size else {}
        if found:
            print(" " * 12 + ", ".join(f"{(*CLASSES, 'no usable label')[min(c, 8)]} {n:,}" for c, n in sorted(found.items())))
    scenes = defaultdict(list)
    for patch, label in zip(index["ids"], index["labels"] or []):
        scenes[scene_of(patch)].append(label)
    for scene, found in scenes.items():
        if set(found) == {IGNORE}:
            print(f"{scene}: no usable label in any of its {len(found)} patches")
    print("band      lowest   highest      mean        sd   (S1 in dB, S2 reflectance x 10,000)")
    for band, *values in zip(index["bands"], *(index[key] for key in ("lowest", "highest", "mean", "std"))):
        print(f"{band:<4}" + "".join(f"{value:>10.2f}" for value in values))
    print(f"left out: {len(index['left_out'])}")
    for patch, reason in itertools.islice(index["left_out"].items(), names):
        print(f"  {patch}: {reason}")


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
    parser.add_argument("command", choices=("check", "pack", "show"))
    parser.add_argument("data", help="folder of GeoTIFFs; for check and show also a store")
    parser.add_argument("out", nargs="?", help="pack: folder of the new store; show: picture to write")
    parser.add_argument("--seasons", nargs="+", help="of a tree only these: spring summer fall winter validation test")
    parser.add_argument("--limit", type=positive, help="of a tree only so many patches, spread over all scenes")
    parser.add_argument("--count", type=positive, default=8, help="patches in the picture (default %(default)s)")
    parser.add_argument("--workers", type=int, help="processes that read (default: one per core)")
    parser.add_argument("--max-bad", type=float, default=0.01, help="share of patches that may be bad (default %(default)s)")
    args = parser.parse_args()
    if (args.out is None) != (args.command == "check"):
        parser.error("check DATA, pack TREE STORE, show DATA OUT.png")
    if args.command == "pack":
        summarise(pack(args.data, args.out, args.workers, args.seasons, args.limit, args.max_bad))
    elif args.command == "check":
        index = open_data(args.data, workers=args.workers, max_bad=1, seasons=args.seasons, limit=args.limit).index
        summarise(index, names=None)
        refuse_bad(args.data, index["left_out"], len(index["ids"]) + len(index["left_out"]), args.max_bad)
    else:
        few = args.limit or args.count  # of a tree no more is read than is shown
        show(open_data(args.data, workers=args.workers, max_bad=1, seasons=args.seasons, limit=few), args.out, args.count)
    if args.out:
        print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
