"""Pairs of Sentinel-1 and Sentinel-2 patches: packed once, then cropped from the store.

    python data.py pack TREE STORE     # GeoTIFFs to plain .npy: parallel, resumable, safe to kill
    python data.py check STORE         # counts beside the published ones, bad files, value ranges

A TREE is a folder of GeoTIFFs: SEN12MS or DFC2020 in any of their layouts (found by file name), or
plain pairs, see README. A STORE holds `s1.npy` (N, C1, H, W) in 1/100 dB, `s2.npy` (N, C2, H, W)
reflectance x 10,000, perhaps `classes.npy` (N, H, W), `patches.npy` (N,) records, `index.json`.
"""
import argparse
import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import math
import os
import re
import sys
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rasterio
import torch
from tqdm import tqdm

os.environ.setdefault("GDAL_DISABLE_READDIR_ON_OPEN", "EMPTY_DIR")  # else a listing per file
os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB, else a twentieth of the machine's memory
logging.getLogger("rasterio").setLevel(logging.CRITICAL)  # a bad file is reported once, by us

S1_BANDS = ["VV", "VH"]
S2_BANDS = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"]
L2A_BANDS = [band for band in S2_BANDS if band != "B10"]  # atmospheric correction drops cirrus
DFC_CODES = {"1": "Forest", "2": "Shrubland", "4": "Grassland", "5": "Wetland", "6": "Cropland",
             "7": "Urban", "9": "Barren", "10": "Water"}  # savanna (3) and snow (8) are not used
CLASSES = list(DFC_CODES.values())
IGNORE = 255  # class of a pixel that is none of the classes; label of a patch that has none
STORE_FORMAT = 3
SETTLE = 256  # patches between two flushes of a packing
ROI_FILE = re.compile(r".*/(ROIs\d+_([a-z]+))_(s1|s2|dfc)_(\d+)_(p\d+)\.tif")
PLAIN_FILE = re.compile(r".*?/(?:(train|validation|test)/)?(s1|s2|classes)/([^.].*)\.tiff?")


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


def classes_from_codes(codes, legend=DFC_CODES):
    """Label codes of any shape and integer type -> uint8 classes, numbered in the order of the
    names in the legend, {code: name}; 255 for a code that it lacks."""
    names = list(dict.fromkeys(legend.values()))
    classes = np.full(np.shape(codes), IGNORE, np.uint8)
    for code, name in legend.items():
        classes[np.equal(codes, int(code))] = names.index(name)
    return classes


def find_pairs(tree):
    """-> list of {"id", "split", "scene", and the paths "s1", "s2", "classes" that are there}."""
    found = defaultdict(dict)
    names = glob.iglob("**/*.tif*", root_dir=tree, recursive=True)
    for name in tqdm(names, desc="looking for files", delay=1):
        path = f"{tree}/{name}"
        if match := ROI_FILE.fullmatch(f"/{name}"):
            season, split, sensor, scene, number = match.groups()
            scene = f"{season}_{scene}"
            patch, sensor = f"{scene}_{number}", sensor.replace("dfc", "classes")
        elif match := PLAIN_FILE.fullmatch(f"/{name}"):
            split, sensor, patch = match.groups("")
            split = split.replace("train", "validation")  # as DFC2020 names it
            patch = f"{split}/{patch}".lstrip("/")
            scene = os.path.dirname(patch) if "/" in match[3] else patch
        else:
            continue
        if sensor in found[patch]:
            raise DataError(f"{found[patch][sensor]}, {path}: the same patch: remove one")
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
            legend |= json.loads(path.read_text(), object_pairs_hook=list)
        named = legend["s1"] + (legend["s2"] or S2_BANDS)
        named += [int(code) for code, _ in legend["classes"]]
        legend["classes"] = dict(legend["classes"])
        count = len(set(legend["classes"].values()))
        if len(legend) > 3 or len(set(named)) < len(named) or not 2 <= count < IGNORE:
            raise ValueError("another key, a band or code twice, or not 2 to 254 classes")
    except (ValueError, TypeError) as error:
        raise DataError(f'{path}: {error}. It may hold "s1" and "s2", lists of band names, and '
                        '"classes", {"CODE": "NAME", ...}') from None
    return legend


def read_tif(path, kind, *shape):
    """-> array of this kind and (bands, height, width); DataError: why this file is none."""
    try:
        with rasterio.open(path) as tif:
            dtype, found = tif.dtypes[0], (tif.count, *tif.shape)
            if found == shape and dtype.startswith(kind):
                return tif.read()
    except rasterio.errors.RasterioError:
        raise DataError(f"{Path(path).name}: cannot be read, truncated or not a TIFF") from None
    raise DataError(f"{Path(path).name}: {dtype} {found} of bands, height, width; not {kind[-1]} "
                    f"{shape}")


def read_patch(pair, plan):
    """-> s1 int16 (C1, H, W) in 1/100 dB, s2 uint16 (C2, H, W) reflectance x 10,000, classes uint8
    (H, W) and the offset that was subtracted from s2; raises DataError for a bad patch."""
    names, size, offset = plan["bands"]["s2"], plan["size"], plan["s2_offset"]
    if lacking := [sensor for sensor in ("s1", "s2") if sensor not in pair]:
        raise DataError(f"no {lacking[0]} file")
    s1 = read_tif(pair["s1"], ("float",), len(plan["bands"]["s1"]), *size)
    s2 = read_tif(pair["s2"], ("uint", "int"), len(names), *size)
    codes = np.full((1, *size), -1)  # no label
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
        offset = 1000 if "B10" in names and s2[names.index("B10")].min() >= 1000 else 0
    s1 = np.rint(s1 * 100).clip(-32767, 32767).astype(np.int16)
    s2 = np.maximum(s2.astype(np.uint16), offset) - offset
    return s1, s2, classes_from_codes(codes[0], plan["codes"]), offset


def make_plan(tree, pairs, s2_offset):
    """What a packing is to hold: the same at every start of it, and in the end in index.json."""
    legend, root, count, size = read_legend(tree), Path(tree).resolve(), 0, ()
    for first in [pair["s2"] for pair in pairs if "s2" in pair]:  # that can be opened
        with contextlib.suppress(rasterio.errors.RasterioError), rasterio.open(first) as tif:
            count, size = tif.count, tif.shape
            break
    bands = legend["s2"] or (L2A_BANDS if count == len(L2A_BANDS) else S2_BANDS)
    if count != len(bands):
        raise DataError(f"{first}: {count} bands, not {bands}: see legend.json in the README")
    near = (root, *root.parents, *root.glob("*/"))
    plan = {"format": STORE_FORMAT, "bands": {"s1": legend["s1"], "s2": bands},
            "size": list(size), "classes": list(dict.fromkeys(legend["classes"].values())),
            "codes": legend["classes"], "labelled": any("classes" in pair for pair in pairs),
            "s2_offset": s2_offset,
            "simulated": any((folder / "SIMULATED").exists() for folder in near)}  # simulate.py's
    for key in ("id", "split", "scene"):
        plan[f"{key}s"] = [pair[key] for pair in pairs]
    return plan


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


def make_arrays(store, plan):
    """All zero, with their place on the disk: a full one would kill whoever writes to the map."""
    arrays = layout(plan).items()
    try:
        for name, (dtype, shape) in arrays:
            array = np.lib.format.open_memmap(store / name, "w+", dtype, shape)
            with open(store / name, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    except OSError as error:
        for file in store.glob("*.npy"):
            file.unlink()
        size = sum(math.prod(shape) * np.dtype(kind).itemsize for _, (kind, shape) in arrays)
        raise DataError(f"{store}: {error.strerror}, and it takes {size:,} bytes: make room, or "
                        "choose another folder") from None


def fill(store, pairs, plan, threads, max_bad):
    """Read, judge and write the pairs whose rows are not whole, and at last index.json."""
    *images, records = arrays = [np.load(store / name, mmap_mode="r+") for name in layout(plan)]
    numbers, left_out, whole = [*range(len(plan["classes"])), IGNORE], {}, []

    def pack_row(row):
        try:
            s1, s2, classes, offset = read_patch(pairs[row], plan)
        except DataError as reason:
            return row, str(reason)
        for image, values in zip(images, (s1, s2, classes)):
            image[row] = values
        x = np.concatenate((s1, s2), dtype=float).reshape(len(s1) + len(s2), -1)
        x[:len(s1)] /= 100  # dB
        pixels = np.bincount(classes.ravel(), minlength=256)[numbers]
        records[row] = 0, offset, pixels, x.mean(1), x.var(1), x.min(1), x.max(1)
        return row, None

    rows = np.flatnonzero(records["state"] == 0)
    with contextlib.closing(ahead(pack_row, rows, threads, SETTLE)) as results:
        for row, reason in tqdm(results, "packing", len(rows), unit="patch"):
            if reason:
                left_out[pairs[row]["id"]] = reason
            else:
                whole.append(row)
            if len(whole) == SETTLE or row == rows[-1]:
                for array in arrays:  # rows before states: a power cut leaves no state alone
                    array.flush()
                records["state"][whole], whole = 1, []
            if len(left_out) > min(max_bad * len(pairs), len(pairs) - 1):
                raise DataError(f"{store}: {len(left_out)} of {len(pairs)} patches cannot be used, "
                                f"--max-bad allows {max_bad:.1%}: {[*left_out.items()][:5]}. Mend "
                                "them and start again, or allow more")
    content = json.dumps(plan).encode() + records.tobytes()
    index = {**plan, "left_out": left_out, "identity": hashlib.sha256(content).hexdigest()[:12],
             "s2_offsets": int(np.count_nonzero(records["offset"]))}
    records.flush()
    with open(store / "index.part", "w") as part:
        part.write(json.dumps(index))
        part.flush()
        os.fsync(part.fileno())
    os.replace(part.name, store / "index.json")


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
    1,000 where B10 shows it. Raises DataError, and OSError where the disk does not allow it."""
    store, pairs = Path(store), find_pairs(tree)
    plan = make_plan(tree, pairs, s2_offset)
    packing, index = store / "packing.json", store / "index.json"
    other = DataError(f"{store}: holds other files, or was packed from another tree or with other "
                      "options: choose another folder, or remove it")
    store.mkdir(parents=True, exist_ok=True)
    if any(store.iterdir()) and not (packing.exists() or index.exists()):
        raise other
    if packing.exists() or not index.exists():
        with open(packing, "a+") as file:  # a lock, and the plan, a line, once the arrays are there
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
            except BlockingIOError:
                raise DataError(f"{store}: another packing writes it: wait for it") from None
            text = json.dumps(plan) + "\n"
            if not (packing.read_text().endswith("\n") or index.exists()):
                make_arrays(store, plan)
                packing.write_text(text)
            if not index.exists():
                if packing.read_text() != text:
                    raise other
                fill(store, pairs, plan, threads, max_bad)
            packing.unlink()
    patches = Patches(store)
    if not plan.items() <= patches.index.items():
        raise other
    return patches


class Patches:
    """N co-registered patches of one size in a store; a bad one has a row that no list of rows has.

    ids, scenes: lists of str. splits: (N,) a season, `validation`, `test` or "". rows: of the good
    patches. labels: (N,) most frequent class of the patch, 255 for none; None without class maps.
    size: [H, W]. bands: {"s1": names, "s2": names} as selected. classes: names. simulated: bool.
    identity: 12 hexadecimal digits, others for other patches, pixels or options of packing.
    """

    def __init__(self, path, bands=None):
        """bands: only these, by name and in this order. Raises DataError."""
        try:
            self.index = json.loads(Path(path, "index.json").read_text())
            if self.index["format"] != STORE_FORMAT:
                raise ValueError(f"format {self.index['format']}, this version has {STORE_FORMAT}")
            maps = [np.load(Path(path, name), mmap_mode="r") for name in layout(self.index)]
        except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
            raise DataError(f"{path}: not a whole store ({error}): of a folder of GeoTIFFs `python "
                            f"data.py pack {path} STORE` makes one, and finishes what broke off; "
                            "README says where SEN12MS is, and how to simulate data") from None
        vars(self).update(self.index)  # ids, scenes, classes, size, left_out, simulated, ...
        *images, self.records = map(np.asarray, maps)  # a memmap is slow
        self.arrays = [image.reshape(len(image), -1, *self.size) for image in images]
        self.files = [open(array.filename, "rb") for array in maps]  # noqa: SIM115
        self.path, self.splits, self.cached = str(path), np.array(self.splits), None
        self.rows = np.flatnonzero(self.records["state"])
        label = self.records["pixels"].argmax(1)
        label[(label == len(self.classes)) | (self.records["state"] == 0)] = IGNORE
        self.labels = label if self.labelled else None
        stored = self.bands
        bands = bands or stored["s1"] + stored["s2"]
        if unknown := [band for band in bands if band not in stored["s1"] + stored["s2"]]:
            raise DataError(f"{path}: no band {' '.join(unknown)}, see --bands; it has {stored}")
        self.bands = {key: [band for band in bands if band in stored[key]] for key in stored}
        self.picks = [[*map(stored[key].index, self.bands[key])] for key in stored]
        self.picks += [[0]] * self.labelled  # the class map

    def rows_of(self, *splits):
        """Good rows of these splits."""
        return self.rows[np.isin(self.splits[self.rows], splits)]

    def stats(self, rows):
        """Mean and standard deviation of each selected band over all pixels of some rows, as for
        to_input: {"s1": {"mean", "std"}, "s2": ...}, S1 in dB, S2 reflectance x 10,000."""
        mean, variance = self.records["mean"][rows], self.records["variance"][rows]
        std, stats = np.sqrt(variance.mean(0) + mean.var(0)), {}
        stored = self.index["bands"]["s1"] + self.index["bands"]["s2"]
        for sensor, bands in self.bands.items():
            at = [stored.index(band) for band in bands]
            stats[sensor] = {"mean": mean.mean(0)[at].tolist(), "std": std[at].tolist()}
        return stats

    def hold(self, device):
        """Keep the selected bands on the device, where a batch is one operation. -> self"""
        self.cached = []
        for array, picks in zip(self.arrays, self.picks):
            signed = array[:, picks].view(f"i{array.itemsize}")  # torch lacks unsigned ones
            self.cached.append(torch.from_numpy(signed).to(device))
        return self


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
        for kind, array, picks, file in zip(kinds, patches.arrays, patches.picks, patches.files):
            of_row, header = array.strides[0], os.fstat(file.fileno()).st_size - array.nbytes
            for start in [header + row * of_row for row in batch[0]]:  # by pages, disks are slow
                os.posix_fadvise(file.fileno(), start, of_row, os.POSIX_FADV_WILLNEED)
            shape = len(batch[0]), len(picks), crop, crop
            crops.append(torch.empty(shape, dtype=kind, pin_memory=bool(stream)))
            if picks == list(range(array.shape[1])):
                picks = slice(None)  # no copy between, as a list makes one
            for image, row, top, left in zip(crops[-1].numpy(), *batch):
                image[:] = array[row, picks, top:top + crop, left:left + crop]
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


def composite(s2, bands):
    """S2 (..., c, h, w) of the named bands -> picture (..., h, w, 3) in 0..1, and its title: true
    colour where B4, B3, B2 are there, else the first three bands as false colour."""
    shown, white, title = ["B4", "B3", "B2"], 3000, "true colour"
    if not set(shown) <= set(bands):
        shown = (bands * 3)[:3]
        white, title = np.percentile(s2, 98) + 1, f"false colour {' '.join(shown)}"
    picture = np.stack([s2[..., bands.index(band), :, :] for band in shown], -1)
    return np.clip(picture / white, 0, 1), title


def check(patches):
    """Print what a store holds, beside what was published, and what was left out."""
    print("published: SEN12MS 180,662 patches in four seasons; DFC2020 986 validation, 5,128 test")
    for split, count in Counter(patches.splits[patches.rows]).items():
        print(f"{split or 'patches'}: {count:,}")
    labels = Counter(patches.labels[patches.rows].tolist() if patches.labelled else ())
    names = [*patches.classes, *["no label"] * IGNORE]
    for number, count in sorted(labels.items()):
        print(f"{count:>8,} {names[number]}")
    print("band      lowest   highest      mean   (S1 in dB, S2 reflectance x 10,000)")
    records, bands = patches.records[patches.rows], patches.bands["s1"] + patches.bands["s2"]
    numbers = records["lowest"].min(0), records["highest"].max(0), records["mean"].mean(0)
    for band in zip(bands, *numbers):
        print("{:<6}{:>10.2f}{:>10.2f}{:>10.2f}".format(*band))
    print(f"S2 offset subtracted (baseline 04.00 and later): {patches.s2_offsets}")
    print(f"left out: {len(patches.left_out)}", *map(": ".join, patches.left_out.items()), sep="\n")


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
    args = vars(parser.parse_args())
    command = args.pop("command")
    check(pack(**args) if command == "pack" else Patches(args["store"]))


if __name__ == "__main__":
    run(main)
