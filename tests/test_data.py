"""data.py: labels, network input, what a tree holds, crops and their loader, its command line."""
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import show
import torch
from conftest import as_nobody, call, user, watch

import data
import models

LAYOUTS = {  # path of a file of a patch, which sensor has its codes, split, id, scene
    "release": ("ROIs1158_spring/{s}_{scene}/ROIs1158_spring_{s}_{scene}_p{patch}.tif", "lc", "spring",
                "ROIs1158_spring_{scene}_p{patch}", "ROIs1158_spring_{scene}"),
    "archive": ("ROIs2017_winter_{s}/{s}_{scene}/ROIs2017_winter_{s}_{scene}_p{patch}.tif", "lc",
                "winter", "ROIs2017_winter_{scene}_p{patch}", "ROIs2017_winter_{scene}"),
    "dfc release": ("ROIs0000_test/{s}_{scene}/ROIs0000_test_{s}_{scene}_p{patch}.tif", "dfc", "test",
                    "ROIs0000_test_{scene}_p{patch}", "ROIs0000_test_{scene}"),
    "dfc split": ("{s}_validation/ROIs0000_validation_{s}_{scene}_p{patch}.tif", "dfc", "validation",
                  "ROIs0000_validation_{scene}_p{patch}", "ROIs0000_validation_{scene}"),
    "dfc flat": ("{s}/ROIs0000_test_{s}_{scene}_p{patch}.tif", "dfc", "test",
                 "ROIs0000_test_{scene}_p{patch}", "ROIs0000_test_{scene}"),
    "plain": ("{s}/place {scene} é {patch}.tif", "classes", "",
              "place {scene} é {patch}", "place {scene} é {patch}"),
    "plain split": ("train/{s}/{scene}.{patch}.tiff", "classes", "train",
                    "train/{scene}.{patch}", "train/{scene}.{patch}"),
    "scenes": ("{s}/river {scene}/{patch}.tif", "classes", "",
               "river {scene}/{patch}", "river {scene}"),
    "scenes split": ("test/{s}/river {scene}/{patch}.tif", "classes", "test",
                     "test/river {scene}/{patch}", "test/river {scene}"),
    "split below": ("{s}/Val/river {scene}/{patch}.TIF", "classes", "validation",
                    "Val/river {scene}/{patch}", "Val/river {scene}"),
}
OF_CODE = np.full(256, 255)  # class of each code of DFC2020
OF_CODE[[1, 2, 4, 5, 6, 7, 9, 10]] = range(8)


GRID = rasterio.Affine(10, 0, 500_000, 0, -10, 4_000_000)


def write_tif(path, array, names=None, mask=None, scale=None, offset=None, **profile):
    """names: of the bands. mask: where there is data. scale, offset: of all bands, as tags."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"driver": "GTiff", "count": len(array), "height": array.shape[1], "width": array.shape[2],
                "dtype": array.dtype, "transform": GRID, **profile}
    with rasterio.open(path, "w", **settings) as tif:
        tif.write(array)
        if names:
            tif.descriptions = names
        if mask is not None:
            tif.write_mask(mask)
        if scale:
            tif.scales = [scale] * len(array)
        if offset:
            tif.offsets = [offset] * len(array)
    return path


def read(path):
    with rasterio.open(path) as tif:
        return tif.read()


def write_tree(tree, rng, count=12, size=(16, 16), layout="dfc release", bands=(2, 13), labels=True):
    """Random patches in a layout -> {id: {sensor: path}}. bands: how many of S1, of S2."""
    form, codes, _, name, _ = LAYOUTS[layout]
    written = {}
    for k in range(count):
        place = {"scene": 1 + k % 3, "patch": 9 + k // 3}  # as text p10 comes before p9
        images = {"s1": rng.normal(-12, 5, (bands[0], *size)).astype(np.float32),
                  "s2": rng.integers(1, 12_000, (bands[1], *size)).astype(np.uint16)}
        if bands[1] == 13:
            images["s2"][10] = images["s2"][10] % 900 + 1  # B10, without the offset of 2022
        if labels:
            layers = rng.integers(0, 11, (4 if codes == "lc" else 1, size[0] // 4, size[1]))
            images[codes] = np.resize(layers.repeat(4, 1), (len(layers), *size)).astype(np.uint8)
        files = {sensor: Path(tree) / form.format(s=sensor, **place) for sensor in images}
        for sensor, image in images.items():
            told = sensor == "s2" and len(image) != 13  # without B10 a tag says that nothing was added
            write_tif(files[sensor], image, scale=1e-4 if told else None)
        written[name.format(**place)] = files
    return dict(sorted(written.items()))


def as_stored(files):
    """-> s1, s2 and classes that a store must hold of a patch, straight from its files."""
    codes = [read(path) for sensor, path in files.items() if sensor in ("dfc", "classes")]
    s1 = np.rint(read(files["s1"]) * 100).astype(np.int16)
    return [s1, read(files["s2"]), *(OF_CODE[code].astype(np.uint8) for code in codes)]


def rewrite(change, **settings):
    return lambda path: write_tif(path, change(read(path)), **settings)


def with_value(value, dtype=None):
    def change(array):
        array = array.astype(dtype or array.dtype)
        array[0, 3, 5] = value
        return array
    return rewrite(change)


def seen_below(array, share=0.6):
    """0 in all bands of this share of the lines."""
    array[:, :math.ceil(share * array.shape[1])] = 0
    return array


def named(names, **settings):
    return rewrite(lambda array: array, names=names, **settings)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
BAD = {  # how to spoil a file -> the sensor, what is done to it, words of the reason
    "bands": ("s2", rewrite(lambda a: a[:11]), "11 bands, .*needed are B1 .* B12"),
    "s1 bands": ("s1", rewrite(lambda a: a[:1]), "1 bands, None; needed are VV VH: .*legend.json"),
    "bands of another mode": ("s1", named(["HH", "HV"]), "2 bands, HH HV; needed are VV VH"),
    "bands of one name": ("s1", named(["VV", "vv"]), "VV vv; needed are VV VH"),
    "bands half named": ("s1", named(["VV", None]), "VV None; needed are VV VH"),
    "size": ("s1", rewrite(lambda a: a[:, :-2]), r"\(14, 16\) px, most are \[16, 16\]"),
    "label size": ("dfc", rewrite(lambda a: a[:, :, 1:]), r"\(16, 15\) px, most are \[16, 16\]"),
    "complex": ("s1", rewrite(lambda a: a * np.complex64(1 + 1j)), "complex64"),
    "truncated": ("s2", lambda p: os.truncate(p, p.stat().st_size // 2), "cannot be read, is it cut off"),
    "empty": ("s1", lambda p: p.write_bytes(b""), "cannot be read"),
    "no TIFF": ("s1", lambda p: p.write_text("<html>please log in</html>"), "cannot be read"),
    "LFS": ("s2", lambda p: p.write_text(LFS), "Git LFS pointer"),
    "NaN": ("s1", rewrite(lambda a: a * np.nan), "more than half of it is missing"),
    "mostly missing": ("s2", rewrite(seen_below), "more than half of it is missing"),
    "untagged no data": ("s1", with_value(-9999), "-9999 to .*, float32, is not dB.*a_nodata"),
    "linear": ("s1", rewrite(lambda a: 10 ** (a / 10)), "is not dB, 10 log10 of power"),
    "linear, no data": ("s1", lambda p: write_tif(p, seen_below(10 ** (read(p) / 10), 0.1), nodata=0), "is not dB"),
    "zero": ("s2", rewrite(np.zeros_like), "more than half of it is missing"),
    "negative": ("s2", with_value(-1, np.int32), "-1 to .*is not reflectance x 10,000"),
    "large": ("s2", with_value(65_536, np.uint32), "to 65536, uint32, is not reflectance x 10,000"),
    "8 bit": ("s2", rewrite(lambda a: (a // 64 + 1).astype(np.uint8)), "uint8, is not reflectance x 10,000"),
    "0 to 1": ("s2", rewrite(lambda a: a / np.float32(10_000)), "float32, is not reflectance x 10,000: mend"),
    "moved": ("s1", rewrite(np.copy, transform=GRID @ rasterio.Affine.translation(3, 0)), "on one grid: .*3 px apart"),
    "dangling": ("s2", lambda p: (p.unlink(), p.symlink_to("gone")), "cannot be read"),
    "partner": ("s2", Path.unlink, "no s2 file"),
}


def spoil(written, rng, kinds=BAD):
    """Spoil one patch in each way, at random places -> {id: (file, words of the reason)}."""
    expected = {}
    for patch, kind in zip(rng.permutation(list(written)), kinds):
        sensor, damage, words = BAD[kind]
        path = written[patch].get(sensor) or written[patch]["classes"]
        damage(path)
        expected[patch] = ("" if words.startswith("no ") else path.name), words
    return expected


@pytest.fixture
def rng(request):
    return np.random.default_rng(len(request.node.name))


def same(a, b):
    """Lists of batches hold the same bits."""
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for one, other in zip(x, y, strict=True):
            assert type(one) is type(other) and (one is None or one.dtype == other.dtype)
            assert one is None or np.array_equal(one, other)


# ------------------------------------------------------------------------------ labels and input

def test_golden_labels(shared):
    golden = np.load(shared / "golden/labels.npz")
    classes = data.classes_from_codes(golden["dfc_raw"])
    assert classes.dtype == np.uint8 and (classes == golden["classes"]).all()
    assert models.single_label(classes).tolist() == golden["single"].tolist()
    assert (models.multi_label(classes).numpy() == golden["multi"]).all()


def test_golden_input(shared):
    golden = np.load(shared / "golden/preprocess.npz")
    s1 = np.rint(golden["s1_raw"] * 100).astype(np.int16)[None]
    x1, x2 = models.to_input(s1, golden["s2_raw"][None], "patch-max")
    rounding = 2 * 0.00501 / (golden["s1_raw"].max((1, 2)).min() + 25)
    assert (x1[0] - torch.from_numpy(golden["s1"])).abs().max() <= rounding
    assert torch.allclose(x2[0], torch.from_numpy(golden["s2"]), rtol=1e-6, atol=0)


def test_codes_of_any_integer_type():
    for dtype in (np.int8, np.uint8, np.int16, np.uint16, np.int64):
        lowest = -1 if np.dtype(dtype).kind == "i" else 99
        codes = np.array([*range(12), 100, lowest]).astype(dtype)
        expected = [255, 0, 1, 255, 2, 3, 4, 5, 255, 6, 7, 255, 255, 255]
        assert data.classes_from_codes(codes).tolist() == expected
        named = data.classes_from_codes(codes, {"10": "wet", "0": "dry", "7": "wet", "3000": "sky"})
        assert named.tolist() == [1, *[255] * 6, 0, 255, 255, 0, 255, 255, 255]
    assert (data.classes_from_codes(np.array([-1, 255, 256, 266, 65_535])) == 255).all()


@pytest.mark.parametrize("seed", range(20))
def test_labels_by_counting(seed):
    rng = np.random.default_rng(seed)
    count = (2, 8, 254)[seed % 3]
    share = rng.dirichlet(np.full(count + 1, 0.4))
    h, w = rng.integers(1, 30, 2)
    classes = rng.choice([*range(count), 255], (5, h, w), p=share).astype(np.uint8)
    single, multi = models.single_label(classes, count), models.multi_label(classes, count=count)
    assert single.dtype == torch.int64
    assert multi.dtype == torch.float32 and multi.shape == (5, count)
    for patch, label, several in zip(classes, single.tolist(), multi.tolist()):
        found = Counter(patch.ravel().tolist())
        assert label == min(c for c in found if found[c] == max(found.values()))
        assert several == [float(10 * found[c] >= h * w) for c in range(count)]
    assert torch.equal(models.single_label(torch.from_numpy(classes), count), single)
    assert torch.equal(models.multi_label(torch.from_numpy(classes), count=count), multi)


def test_a_class_on_exactly_a_tenth_counts():
    classes = np.zeros((2, 10, 10), np.uint8)
    classes[0, 0], classes[1, 0, 1:], classes[:, 5:] = 3, 3, 255
    assert models.multi_label(classes)[:, 3].tolist() == [1, 0]
    assert models.single_label(classes).tolist() == [255, 255]


@pytest.mark.parametrize("seed", range(5))
def test_to_input(seed):
    rng = np.random.default_rng(seed)
    s1 = rng.integers(-4000, 1500, (4, 2, 9, 7)).astype(np.int16)
    s2 = rng.integers(0, 20_000, (4, 13, 9, 7)).astype(np.uint16)
    s1[0, 0], s1[1, 1], s1[2], s2[0, 0], s2[1, 5] = models.MISSING, -700, 0, 0, 1234
    offset = (0, 1000)[seed % 2]
    db = torch.from_numpy(s1).double() / 100
    reflectance = (torch.from_numpy(s2).double() - offset).clamp(0)
    clipped = db.clamp(-25, 0) + 25, reflectance.clamp(0, 10_000)
    stats = {"s1": {"mean": [-12.5, -19], "std": [4.0, 1e-15]},  # the second, all but rounding, 0
             "s2": {"mean": [*range(900, 913)], "std": [*range(12), 0]}}
    expected = {"patch-max": [x / (x.amax((2, 3), keepdim=True) + 1e-5) for x in clipped],
                "fixed": [clipped[0] / 25, clipped[1] / 10_000], "standard": []}
    for x, of in ((db, stats["s1"]), (reflectance, stats["s2"])):
        channels = [(x[:, c] - of["mean"][c]) / (of["std"][c] if of["std"][c] > 1e-6 else 1) for c in range(x.shape[1])]
        expected["standard"].append(torch.stack(channels, 1))
    expected["standard"][0][torch.from_numpy(s1 == models.MISSING)] = 0
    for scale in models.SCALING:
        found = models.to_input(torch.from_numpy(s1), torch.from_numpy(s2), scale, stats,
                              s2_offset=offset)
        for x, y in zip(found, expected[scale], strict=True):
            assert x.dtype == torch.float32 and x.isfinite().all()
            assert torch.allclose(x.double(), y, rtol=1e-5, atol=1e-5)
        for x, y in zip(models.to_input(s1, s2, scale, stats, s2_offset=offset), found, strict=True):
            assert torch.equal(x, y)  # arrays as well
    with pytest.raises(ValueError, match="patch-max, fixed, standard"):
        models.to_input(s1, s2, "minmax")


def test_what_is_not_finite_is_missing():
    s1, s2 = (torch.full((1, bands, 3, 3), value, dtype=torch.float64) for bands, value in ((2, -12), (13, 700)))
    stats = {"s1": {"mean": [-12.5, -19], "std": [0.1, 0.1]},
             "s2": {"mean": [900] * 13, "std": [0.1] * 13}}
    for value in (float("nan"), float("inf"), float("-inf"), 1e39):  # the last is not finite in float32
        s1[0, 0, 0, 0] = s2[0, 4, 1, 1] = value
        for scale in models.SCALING:
            a, b = models.to_input(s1, s2, scale, stats)
            assert a.isfinite().all() and b.isfinite().all() and a[0, 0, 0, 0] == 0


def test_masked_arrays_are_refused():
    s1, s2 = np.ma.masked_less(np.zeros((1, 2, 4, 4)), 1), np.zeros((1, 13, 4, 4))
    for pair in ((s1, s2), (s1.data, np.ma.masked_array(s2))):
        with pytest.raises(ValueError, match="masked arrays: fill them"):
            models.to_input(*pair, "fixed")


def test_the_number_of_bands_is_checked():
    bands = {"s1": data.S1_BANDS, "s2": data.S2_BANDS}
    s1, s2 = torch.zeros(1, 2, 3, 3), torch.zeros(1, 13, 3, 3)
    models.to_input(s1, s2, "fixed", bands=bands)
    with pytest.raises(ValueError, match="s2: 12 channels, not B1 .* B12"):
        models.to_input(s1, s2[:, 1:], "fixed", bands=bands)


# ------------------------------------------------------------------------------ what a tree holds

@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path, rng):
    written = write_tree(tmp_path / "t", rng, 7, layout=layout)
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    _, codes, split, _, scene = LAYOUTS[layout]
    labelled = codes != "lc"  # MODIS is too coarse for a label
    assert patches.ids == list(written) and set(patches.splits) == {split} and not patches.simulated
    assert Counter(patches.scenes) == Counter(
        scene.format(scene=1 + k % 3, patch=9 + k // 3) for k in range(7))
    assert list(patches.size) == [16, 16] and (patches.labels is not None) == labelled
    assert patches.bands == {"s1": data.S1_BANDS, "s2": data.S2_BANDS}
    assert patches.classes == data.CLASSES and len(patches.arrays) == 2 + labelled
    for row, files in enumerate(written.values()):
        for array, expected in zip(patches.arrays, as_stored(files), strict=True):
            assert array.dtype == expected.dtype and (array[row] == expected).all()
    if labelled:
        assert patches.labels.dtype == np.int64
        assert patches.labels.tolist() == models.single_label(patches.arrays[2][:, 0].copy()).tolist()
    else:
        assert patches.labels is None and not (tmp_path / "store/classes.npy").exists()


def test_splits(tmp_path, rng):
    for layout in ("release", "archive"):
        write_tree(tmp_path / "t", rng, 9, layout=layout)
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    assert set(patches.splits[patches.rows_of("winter")]) == {"winter"}
    assert len(patches.rows_of("spring", "winter")) == 18 and len(patches.rows_of("test")) == 0
    copy = tmp_path / "t/copy/ROIs1158_spring_s1_1_p9.tif"
    copy.parent.mkdir()
    copy.write_bytes(b"")
    with pytest.raises(data.DataError, match=r"/ROIs1158_spring_s1_1_p9.tif, .*/ROIs1158_spring_s1_1_p9.tif: both "
                                             "s1 of ROIs1158_spring_1_p9") as error:
        data.pack(tmp_path / "t", tmp_path / "other")
    assert "remove" not in str(error.value) and not (tmp_path / "other").exists()


@pytest.mark.parametrize("seed", range(3))
def test_bad_files_by_name(seed, tmp_path):
    rng = np.random.default_rng(seed)
    written = write_tree(tmp_path / "t", rng, 60)
    expected = spoil(written, rng)
    patches = data.pack(tmp_path / "t", tmp_path / "store", max_bad=0.5)
    assert patches.left_out.keys() == expected.keys()
    for patch, (name, words) in expected.items():
        reason = patches.left_out[patch]
        assert reason.startswith(name) and data.re.search(words, reason) and "\n" not in reason
    good = [patches.ids[row] for row in patches.rows]
    assert good == [patch for patch in written if patch not in expected]
    assert np.array_equal(patches.rows_of("validation", "test"), patches.rows)  # bad ones are in no split, nor held out
    assert sorted(np.concatenate(data.split_scenes(patches, 0.3))) == patches.rows.tolist()
    empty = np.setdiff1d(np.arange(len(patches.ids)), patches.rows)
    assert len(empty) == len(BAD)
    assert (patches.labels[empty] == 255).all() and not any(array[empty].any() for array in patches.arrays)
    assert not any(patches.records[empty].tobytes())
    for row in patches.rows:
        for array, values in zip(patches.arrays, as_stored(written[patches.ids[row]]), strict=True):
            assert (array[row] == values).all()


def test_bands_and_size_are_those_of_files_that_open(tmp_path, rng):
    written = list(write_tree(tmp_path / "t", rng, 12).values())
    written[0]["s2"].unlink()
    patches = data.pack(tmp_path / "t", tmp_path / "store", max_bad=0.1)
    assert len(patches.rows) == 11 and len(patches.bands["s2"]) == 13 and list(patches.size) == [16, 16]
    written[1]["s2"].write_bytes(b"")
    written[2]["s2"].unlink()
    written[2]["s2"].symlink_to("gone")
    assert len(data.pack(tmp_path / "t", tmp_path / "other", max_bad=0.3).rows) == 9
    for files in written[1:]:
        files["s2"].unlink()
        files["s2"].write_bytes(b"")
    with pytest.raises(data.DataError, match=r"_p\d+.tif: cannot be read"):
        data.pack(tmp_path / "t", tmp_path / "no such")
    assert not (tmp_path / "no such").exists()


def test_linked_folders_are_looked_into_and_hidden_files_are_not(tmp_path, rng):
    written = write_tree(tmp_path / "elsewhere", rng, 6, layout="plain")
    (tmp_path / "t").mkdir()
    for sensor in ("s1", "s2", "classes"):
        (tmp_path / "t" / sensor).symlink_to(tmp_path / "elsewhere" / sensor)
    (tmp_path / "elsewhere/s1/._place.tif").write_bytes(b"of a Mac")
    assert data.pack(tmp_path / "t", tmp_path / "store").ids == list(written)


def test_lc_files_are_no_labels(tmp_path, rng):
    written = write_tree(tmp_path / "t", rng, 12)
    for files in list(written.values())[:2]:
        files["dfc"].rename(files["dfc"].with_name(files["dfc"].name.replace("dfc", "lc")))
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    assert patches.labels[:2].tolist() == [255, 255] and (patches.arrays[2][:2] == 255).all()
    assert patches.ids == list(written) and not patches.left_out
    assert (patches.arrays[2][2:] < 255).any((1, 2, 3)).all()


def test_labels_of_one_split_do_not_bind_another(tmp_path, rng):
    write_tree(tmp_path / "t", rng, 6, layout="dfc release")
    write_tree(tmp_path / "t", rng, 6, layout="release")  # its lc files are no labels
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    spring = patches.rows_of("spring")
    assert len(patches.rows) == 12 and len(spring) == 6 and not patches.left_out
    assert (patches.labels[spring] == 255).all() and (patches.arrays[2][spring] == 255).all()
    assert (patches.arrays[2][patches.rows_of("test")] < 8).any()


def test_bands_by_name_in_any_order(tmp_path, rng):
    written = write_tree(tmp_path / "t", rng, 6, bands=(2, 12), labels=False)  # L2A has no B10
    store = data.pack(tmp_path / "t", tmp_path / "store").path
    whole = data.Patches(store)
    assert whole.bands["s2"] == [band for band in data.S2_BANDS if band != "B10"]
    with pytest.raises(data.DataError, match="no band B10.*VV.*VH.*B1.*B12"):
        data.Patches(store, ["VV", "B10"])
    s1, s2 = as_stored(list(written.values())[4])
    for bands, radar, optical in ((["B12", "VH", "B4"], [1], [11, 3]), (["VH", "VV"], [1, 0], []),
                                  (["B2"], [], [1]), (data.L2A_BANDS[::-1], [], range(11, -1, -1))):
        some = data.Patches(store, bands)
        assert some.bands["s1"] + some.bands["s2"] == sorted(bands, key=lambda b: b in data.L2A_BANDS)
        batch = np.array([4]), np.array([2]), np.array([1])
        (a, b, classes, _), = data.loader(some, [batch], 9)
        assert (a[0].numpy() == s1[radar, 2:11, 1:10]).all() and a.shape[1] == len(radar)
        assert (b[0].numpy() == s2[optical, 2:11, 1:10]).all() and b.shape[1] == len(optical)
        assert classes is None


# ------------------------------------------------------------------------------ processing baseline

@pytest.mark.parametrize("name", ["sen12ms", "dfc2020"])
def test_offset_of_real_pairs_is_found_and_removed(shared, name, tmp_path, monkeypatch, capsys):
    tree = shared / "real" / name
    call(monkeypatch, data, "pack", tree, tmp_path / "store")
    packed = capsys.readouterr().out
    call(monkeypatch, data, "check", tmp_path / "store")
    assert capsys.readouterr().out == packed and "left out: 0" in packed
    patches = data.Patches(tmp_path / "store")
    since_2022 = np.array([scene[-1] in "134" for scene in patches.scenes])
    assert (patches.records["offset"] == 1000 * since_2022).all()
    said, = (line for line in packed.splitlines() if "offset" in line)
    assert said.endswith(f": {since_2022.sum()}") and since_2022.sum() == (12, 48)[name == "dfc2020"]
    raw = data.pack(tree, tmp_path / "raw", s2_offset=0)
    removed = data.pack(tree, tmp_path / "removed", s2_offset=1000, max_bad=1)  # to those that show that it was added
    assert sorted(removed.left_out) == [patches.ids[row] for row in np.flatnonzero(~since_2022)]
    assert all("but --s2-offset says that 1,000 was added: say 0" in reason for reason in removed.left_out.values())
    assert not raw.records["offset"].any() and (removed.records["offset"][since_2022] == 1000).all()
    assert (removed.arrays[1][since_2022] == raw.arrays[1][since_2022] - 1000).all()
    assert (patches.arrays[1][since_2022] == removed.arrays[1][since_2022]).all()
    assert (patches.arrays[1][~since_2022] == raw.arrays[1][~since_2022]).all()
    stats = patches.stats(patches.rows)
    for scale in models.SCALING:
        for row in (np.argmax(since_2022), len(since_2022) - 1):
            s1, s2 = (x[[row]] for x in raw.arrays[:2])
            offset = int(patches.records["offset"][row])
            once = models.to_input(s1, s2, scale, stats, s2_offset=offset)
            stored = models.to_input(s1, patches.arrays[1][[row]], scale, stats)
            assert all(map(torch.equal, once, stored))


def test_offset_of_data_without_cirrus_is_asked_for(tmp_path, rng):
    paths = [files["s2"] for files in write_tree(tmp_path / "t", rng, 4, bands=(2, 12)).values()]
    for path in paths:
        rewrite(lambda a: a + 1000)(path)
    words = r"\d.tif: without B10 .* it cannot be told if 1,000 was added, .*--s2-offset .*0 or 1000"
    with pytest.raises(data.DataError, match=words):
        data.pack(tmp_path / "t", tmp_path / "asked")
    raster = data.Raster(paths[0], "s2", ["B4", "B3"])
    for window in (None, rasterio.windows.Window(0, 0, 5, 5), rasterio.windows.Window(5, 5, 5, 5)):  # who goes on is asked again
        with pytest.raises(data.DataError, match=words):
            raster.values(window)
    assert len(data.pack(tmp_path / "t", tmp_path / "asked", s2_offset=0).rows) == 4  # as the line says, into the same store
    packed = {offset: data.pack(tmp_path / "t", tmp_path / str(offset), s2_offset=offset) for offset in (0, 1000)}
    assert (packed[0].arrays[1] - 1000 == packed[1000].arrays[1]).all()
    assert (packed[1000].records["offset"] == 1000).all() and not packed[0].records["offset"].any()
    for path in paths:  # a file that says that nothing was added
        write_tif(path, read(path), scale=1e-4)
    assert (data.pack(tmp_path / "t", tmp_path / "told").records == packed[0].records).all()


@pytest.mark.parametrize("window", [None, rasterio.windows.Window(0, 0, 10, 12)])
@pytest.mark.parametrize("sensor, scale, added, found", [
    ("s2", 1e-4, None, 0), ("s2", 1e-4, -0.1, 1000), ("s2", 0.01, None, "scale 0.01, offset 0,"), ("s2", None, -0.1, "offset -0.1"),
    ("s2", 1e-4, -0.2, "offset -0.2"), ("s2", None, -1000, 1000), ("s2", 2.75e-5, -0.2, "scale 2.75e-05"),
    ("s1", 0.1, None, "scale 0.1"), ("s1", None, -83, "offset -83"), ("s1", 1e-4, None, "scale 0.0001"), ("s1", None, -1000, "offset")])
def test_scale_and_offset_that_a_file_says_are_believed_or_refused(sensor, scale, added, found, window, tmp_path, rng):
    image = dict(zip(("s1", "s2"), clean(rng)))[sensor]
    if sensor == "s2":
        image = np.delete(image, 10, 0) + np.uint16(1000)  # no B10
    path = write_tif(tmp_path / "x.tif", image, scale=scale, offset=added)
    raster = data.Raster(path, sensor, data.S1_BANDS if sensor == "s1" else ["B4", "B3", "B2"])
    if found == 1000:
        with pytest.raises(data.DataError, match="x.tif: its tags say that 1,000 was added, --s2-offset says 0"):
            data.Raster(path, sensor, ["B4"], 0).values(window)
    if isinstance(found, int):
        assert np.array_equal(raster.values(window), image[[3, 2, 1]] - np.float32(found)) and raster.offset == found
    else:
        with pytest.raises(data.DataError, match=f"x.tif: .*{found}.* is not (dB|reflectance)"):
            raster.values(window)


@pytest.mark.parametrize("share, value, found", [
    (0, 0, 1000), (0.03, 250, 1000), (0.03, 999, 1000), (0.09, 700, None), (0.11, 20, None), (0.6, 20, 0), (1, 899, 0),
    (1, 1500, None), (0.97, 1500, None), (1, 0, None)])
def test_cirrus_tells_the_offset_if_it_is_clear_somewhere(share, value, found, tmp_path, rng):
    """An edge of 0 that was warped mixes some pixels with it; thick clouds all over, or a B10 of nothing but 0, tell nothing."""
    files, = write_tree(tmp_path / "t", rng, 1, (40, 40)).values()
    s2 = read(files["s2"]).clip(1, 9000) + np.uint16(1000)
    b10 = rng.integers(1004, 1040, 1600)
    b10[:round(share * 1600)] = value
    s2[10] = rng.permutation(b10).reshape(40, 40)
    write_tif(files["s2"], s2)
    if found is None:
        with pytest.raises(data.DataError, match="without B10 where it is clear it cannot be told if 1,000 was added"):
            data.pack(tmp_path / "t", tmp_path / "store")
        found = 1000
        patches = data.pack(tmp_path / "t", tmp_path / "store", s2_offset=1000)
    else:
        patches = data.pack(tmp_path / "t", tmp_path / "store")
    assert patches.records["offset"].tolist() == [found]
    assert np.array_equal(patches.arrays[1][0], np.where(s2, (s2.astype(int) - found).clip(1), 0))


# ------------------------------------------------------------------------------ what a file says of itself

def clean(rng, size=(12, 10), s2_bands=13):
    """-> S1 and S2 of a patch on which nothing is missing."""
    s1 = rng.normal(-12, 5, (2, *size)).clip(-40, -1).round(2).astype(np.float32)
    s1[1] -= 6  # VH is the darker
    s2 = rng.integers(1, 12_000, (s2_bands, *size)).astype(np.uint16)
    s2[10] = s2[10] % 900 + 1  # cirrus, wherever it is looked at
    return s1, s2


def as_values(path, sensor, bands):
    return data.Raster(path, sensor, bands).values()


def packed_alone(tmp, s1, s2, **options):
    """A tree of this pair of files, packed -> its store."""
    for sensor, path in (("s1", s1), ("s2", s2)):
        (tmp / "alone" / sensor).mkdir(parents=True, exist_ok=True)
        for ending in ("", ".aux.xml", ".msk"):
            if Path(f"{path}{ending}").exists():
                Path(tmp, "alone", sensor, f"a{path.suffix}{ending}").symlink_to(f"{path}{ending}")
    return data.pack(tmp / "alone", tmp / "alone.store", **options)


S12 = [f"B{number:02}" for number in range(1, 13)]
NAMES = {  # of a file's bands, in its order; its bands in our names, - for others
    "VH first": ("s1", ["VH", "VV"], "VH VV"),
    "small": ("s1", ["vh", "vv"], "VH VV"),
    "SNAP": ("s1", ["Sigma0_VH_db", "Sigma0_VV_db"], "VH VV"),
    "gamma": ("s1", ["Gamma0_VH", "Gamma0_VV"], "VH VV"),
    "stack": ("s1", ["Sigma0_VH_mst_28Nov2026_db", "Sigma0_VV_mst_28Nov2026_db"], "VH VV"),
    "Earth Engine": ("s1", ["VV", "VH", "angle"], "VV VH -"),
    "angle first": ("s1", ["angle", "VH", "VV"], "- VH VV"),
    "numbers": ("s1", ["Band 1", "Band 2"], "VV VH"),
    "layers": ("s1", ["layer_1", "LAYER 2"], "VV VH"),
    "B8A last": ("s2", [*S12, "B8A"], " ".join([*[f"B{k}" for k in range(1, 13)], "B8A"])),
    "small letters": ("s2", [name.lower() for name in [*S12, "B8a"]], " ".join([*[f"B{k}" for k in range(1, 13)], "B8A"])),
    "SNAP's S2": ("s2", [f"{name}, central wavelength {k} nm" for k, name in enumerate(data.S2_BANDS[::-1], 400)],
                  " ".join(data.S2_BANDS[::-1])),
    "with masks": ("s2", ["QA60", *data.S2_BANDS, "MSK_CLDPRB", "SCL"], " ".join(["-", *data.S2_BANDS, "-", "-"])),
    "L2A and SCL": ("s2", [*data.L2A_BANDS, "SCL"], " ".join([*data.L2A_BANDS, "-"])),
    "openEO": ("s2", ["SCL", *sorted(f"B{name[1:]:0>2}" for name in data.L2A_BANDS)],
               "- " + " ".join([*[f"B{k}" for k in (*range(1, 10), 11, 12)], "B8A"])),
    "numbered": ("s2", [f"Band {k}" for k in range(1, 14)], " ".join(data.S2_BANDS)),
}


@pytest.mark.parametrize("name", NAMES)
def test_bands_are_found_by_their_names(name, tmp_path, rng):
    sensor, texts, order = NAMES[name]
    order = order.split()
    bands = {"s1": data.S1_BANDS, "s2": data.S2_BANDS if "B10" in order else data.L2A_BANDS}
    if sensor == "s1":
        bands["s2"] = data.S2_BANDS
    images = dict(zip(("s1", "s2"), clean(rng, s2_bands=len(bands["s2"]))))
    image, paths = images[sensor], {key: write_tif(tmp_path / f"{key}.tif", images[key]) for key in images}
    junk = rng.integers(0, 200, image.shape[1:]).astype(image.dtype)
    layers = [junk if band == "-" else image[bands[sensor].index(band)] for band in order]
    write_tif(paths[sensor], np.stack(layers), texts, scale=None if "B10" in bands["s2"] else 1e-4)
    assert np.array_equal(as_values(paths[sensor], sensor, bands[sensor]), image)
    some = [*rng.permutation(bands[sensor])][:2]
    assert np.array_equal(as_values(paths[sensor], sensor, some), image[[bands[sensor].index(band) for band in some]])
    patches = packed_alone(tmp_path, paths["s1"], paths["s2"])
    assert patches.bands == bands
    for array, key in zip(patches.arrays, images):
        assert np.array_equal(array[0], np.rint(images[key] * (100 if key == "s1" else 1)))


@pytest.mark.parametrize("seed", range(10))
def test_any_order_of_named_bands(seed, tmp_path):
    rng = np.random.default_rng(seed)
    legend = {"s1": [*rng.permutation(["HH", "VV", "VH"])], "s2": [*rng.permutation(["red", "B8A", "pan", "B11", "θ"])]}
    images = [rng.normal(-12, 5, (3, 9, 8)).clip(-60, -1).astype(np.float32), rng.integers(1, 9000, (5, 9, 8)).astype(np.uint16)]
    for (sensor, names), image in zip(legend.items(), images):
        order = rng.permutation(len(names))
        write_tif(tmp_path / f"t/{sensor}/a.tif", image[order], [names[k] for k in order])
    (tmp_path / "t/legend.json").write_text(json.dumps(legend))
    patches = data.pack(tmp_path / "t", tmp_path / "store", s2_offset=0)
    assert np.array_equal(patches.arrays[0][0], np.rint(images[0] * 100)) and np.array_equal(patches.arrays[1][0], images[1])


@pytest.mark.parametrize(("sensor", "texts"), [
    ("s1", ["HH", "HV"]), ("s1", ["VV", "VV"]), ("s1", ["VV", "Sigma0_VV_db"]), ("s1", ["VV", None]),
    ("s1", ["VV", "Band 2"]), ("s1", ["Intensity", "Coherence"]), ("s1", ["VV"]), ("s1", [None]),
    ("s1", ["Sigma0_VV_mst", "Sigma0_VH_mst", "Sigma0_VV_slv", "Sigma0_VH_slv"]), ("s1", ["VV_VH", "VH_VV"]),
    ("s2", [*data.S2_BANDS[:-1], "B1"]), ("s2", [*data.S2_BANDS[:-1], None]), ("s2", ["red"] * 13), ("s2", [None] * 14),
    ("s2", ["blue", "green", "red"]), ("s2", [*data.L2A_BANDS])])
def test_bands_that_cannot_be_told_are_refused_with_both_lists(sensor, texts, tmp_path, rng):
    image = np.resize(clean(rng)[sensor == "s2"], (len(texts), 12, 10))
    write_tif(tmp_path / "x.tif", image, texts if any(texts) else None)
    needed = data.S1_BANDS if sensor == "s1" else data.S2_BANDS
    with pytest.raises(data.DataError) as error:
        data.Raster(tmp_path / "x.tif", sensor, needed)
    line = str(error.value)
    assert line.startswith("x.tif: ") and " ".join(needed) in line and " ".join(map(str, texts)) in line and "\n" not in line


def side_car(path, nodata, count):
    bands = "".join(f'<PAMRasterBand band="{k}"><NoDataValue>{nodata}</NoDataValue></PAMRasterBand>' for k in range(1, count + 1))
    Path(f"{path}.aux.xml").write_text(f"<PAMDataset>{bands}</PAMDataset>")


def write_vrt(path, sources, size, nodata=None, kind="Float32", names=None):
    """sources: (file, band) of each band. nodata: of each band."""
    height, width = size
    bands = []
    for k, (file, band) in enumerate(sources):
        said = f"<Description>{names[k]}</Description>" if names else ""
        said += f"<NoDataValue>{nodata[k]}</NoDataValue>" if nodata else ""
        bands.append(f'<VRTRasterBand dataType="{kind}" band="{k + 1}">{said}<ComplexSource><SourceFilename relativeToVRT="0">'
                     f"{file}</SourceFilename><SourceBand>{band}</SourceBand></ComplexSource></VRTRasterBand>")
    Path(path).write_text(f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}"><GeoTransform>{", ".join(map(str, GRID.to_gdal()))}'
                          f'</GeoTransform>{"".join(bands)}</VRTDataset>')
    return Path(path)


def tagged(value, untagged=False, bands=slice(None), dtype=None, **profile):
    """Where nothing was seen, this value in these bands, and the file says so."""
    def write(path, image, there):
        image = image.astype(dtype or image.dtype)
        image[bands] = np.where(there, image[bands], value)
        return write_tif(path, image, **(profile if untagged else {"nodata": value, **profile}))
    return write


def masked(internal, **profile):
    def write(path, image, there):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
            write_tif(path, image, mask=there, **profile)
        assert Path(f"{path}.msk").exists() == (not internal)
        return path
    return write


def beside(value):
    def write(path, image, there):
        write_tif(path, np.where(there, image, image.dtype.type(value)))
        side_car(path, value, len(image))
        return path
    return write


def as_vrt(path, image, there):
    """Each band has a nodata value of its own."""
    values = [float(-9999 + k) if image.dtype.kind == "f" else 65_535 - k for k in range(len(image))]
    image = np.stack([np.where(there, band, band.dtype.type(value)) for band, value in zip(image, values)])
    write_tif(path.with_suffix(".source.tif"), image)
    kind = "Float32" if image.dtype.kind == "f" else "UInt16"
    sources = [(path.with_suffix(".source.tif"), k + 1) for k in range(len(image))]
    return write_vrt(path.with_suffix(".vrt"), sources, there.shape, values, kind)


HOLES = {  # how a file says what was not seen
    "s1": {"-9999": tagged(-9999), "0": tagged(0), "-32768": tagged(-32768), "NaN": tagged(np.nan),
           "lowest float": tagged(float(np.finfo(np.float32).min)), "0 untagged": tagged(0, True), "NaN untagged": tagged(np.nan, True),
           "-inf": tagged(-np.inf, True), "inf in a band": tagged(np.inf, True, slice(1)), "NaN in a band": tagged(np.nan, True, slice(1, 2)),
           "-9999 in a band": tagged(-9999, bands=slice(1)), "64 bit": tagged(-9999, dtype=np.float64), "int": tagged(-32768, dtype=np.int16),
           "8 bit": tagged(-128, dtype=np.int8), "internal": masked(True), ".msk": masked(False), ".aux.xml": beside(-9999), "VRT": as_vrt},
    "s2": {"0": tagged(0), "65535": tagged(65_535), "-9999": tagged(-9999, dtype=np.int16), "0 untagged": tagged(0, True),
           "65535 untagged": tagged(65_535, True), "32767 untagged": tagged(32_767, True, dtype=np.int16),
           "65535 in floats": tagged(65_535, True, dtype=np.float32),
           "float": tagged(np.nan, dtype=np.float32), "float -9999": tagged(-9999, dtype=np.float64), "float untagged": tagged(np.nan, True, dtype=np.float32),
           "internal": masked(True), ".msk": masked(False), "mask and nodata 0": masked(True, nodata=0), ".aux.xml": beside(65_535), ".aux.xml 0": beside(0), "VRT": as_vrt},
}


@pytest.mark.parametrize(("sensor", "how"), [(sensor, how) for sensor in HOLES for how in HOLES[sensor]])
def test_what_was_not_seen_is_missing_in_all_and_in_no_statistic(sensor, how, tmp_path, rng, capsys):
    s1, s2 = clean(rng)
    if "int" == how or "8 bit" == how:
        s1 = s1.round()
    s2[3, 2:5] = 0  # one dark band is data
    holes = {"s1": rng.random(s1.shape[1:]) > 0.3, "s2": rng.random(s1.shape[1:]) > 0.3}
    images, paths = {"s1": s1, "s2": s2}, {}
    for key, image in images.items():
        write = HOLES[key][how] if key == sensor else lambda path, image, there: write_tif(path, image)
        paths[key] = write(tmp_path / f"{key}.tif", image, holes[key])
        holes[key] |= key != sensor
    bands = {"s1": data.S1_BANDS, "s2": data.S2_BANDS}
    for key, image in images.items():
        expected = np.where(holes[key], image, np.float32(np.nan))
        assert np.array_equal(as_values(paths[key], key, bands[key]), expected, equal_nan=True)
        window = rasterio.windows.Window(3, 2, 5, 7)
        raster = data.Raster(paths[key], key, bands[key])
        assert np.array_equal(raster.values(window), expected[:, 2:9, 3:8], equal_nan=True)
    patches = packed_alone(tmp_path, paths["s1"], paths["s2"])
    assert np.array_equal(patches.arrays[0][0], np.where(holes["s1"], np.rint(s1 * 100), -32768))
    assert np.array_equal(patches.arrays[1][0], np.where(holes["s2"], s2, 0))
    seen = [*(s1.astype(float)[:, holes["s1"]]), *(s2[:, holes["s2"]])]
    record = patches.records[0]
    for name, function in (("count", len), ("mean", np.mean), ("variance", np.var), ("lowest", np.min), ("highest", np.max)):
        np.testing.assert_allclose(record[name], [function(band) for band in seen], rtol=1e-6)
    stats = patches.stats(patches.rows)
    np.testing.assert_allclose(stats["s1"]["mean"] + stats["s2"]["std"], [*map(np.mean, seen[:2]), *map(np.std, seen[2:])], rtol=1e-6)
    x1, x2 = models.to_input(*(array[:1] for array in patches.arrays[:2]), "standard", stats)
    for x, there in ((x1, holes["s1"]), (x2, holes["s2"])):
        assert (x[0][:, torch.from_numpy(~there)] == 0).all() and (x[0][:, torch.from_numpy(there)] != 0).any()
    data.check(patches)
    said = capsys.readouterr().out
    line, = (line for line in said.splitlines() if line.startswith("VV " if sensor == "s1" else "B8A "))
    assert line.endswith(f" {1 - holes[sensor].mean():.2%}") and "patches with missing pixels: 1" in said


@pytest.mark.parametrize("seed", range(8))
def test_statistics_of_patches_with_other_pixels_missing(seed, tmp_path):
    """Weighted by what each of them has."""
    rng, seen = np.random.default_rng(seed), [[], []]
    for patch in "abcde":
        for k, (sensor, image) in enumerate(zip(("s1", "s2"), clean(rng))):
            there = rng.random(image.shape[1:]) > rng.uniform(0, 0.45)
            how = rng.choice([how for how, write in HOLES[sensor].items() if how not in ("int", "8 bit", "VRT")])
            HOLES[sensor][how](tmp_path / f"t/{sensor}/{patch}.tif", image, there)
            seen[k].append(image.astype(float)[:, there])
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    stats = patches.stats(patches.rows)
    for sensor, values in zip(("s1", "s2"), seen):
        values = np.concatenate(values, 1)
        np.testing.assert_allclose(stats[sensor]["mean"], values.mean(1), rtol=1e-6)
        np.testing.assert_allclose(stats[sensor]["std"], values.std(1), rtol=1e-6)


UNITS = {  # sensor, what the file holds, words of the refusal or None
    "dB as integers": ("s1", lambda s1, s2: s1.round().astype(np.int16), None),
    "dB as 8 bit": ("s1", lambda s1, s2: s1.round().astype(np.int8), None),
    "dB as double": ("s1", lambda s1, s2: s1.astype(np.float64), None),
    "dB x 100": ("s1", lambda s1, s2: (s1 * 100).astype(np.int16), "int16, is not dB"),
    "power": ("s1", lambda s1, s2: 10 ** (s1 / 10), "is not dB"),
    "power, 8 bit": ("s1", lambda s1, s2: (s1 * 5 + 255).clip(1, 255).astype(np.uint8), "is not dB"),
    "complex": ("s1", lambda s1, s2: s1 * np.complex64(1 + 1j), "complex64"),
    "log10 of power": ("s1", lambda s1, s2: s1 / 10, "is not dB"),
    "untagged": ("s1", lambda s1, s2: np.where(s1 < -20, np.float32(-9999), s1), "-9999 to .*a_nodata"),
    "untagged -99": ("s1", lambda s1, s2: np.where(s1 < -20, np.float32(-99), s1), "-99 to .*a_nodata"),
    "untagged 99": ("s1", lambda s1, s2: np.where(s1[0] < -15, np.float32(99), s1), "to 99, .*a_nodata"),
    "float x 10,000": ("s2", lambda s1, s2: s2.astype(np.float32), None),
    "int32": ("s2", lambda s1, s2: s2.astype(np.int32), None),
    "dark": ("s2", lambda s1, s2: s2 // 100 + 1, None),
    "0 to 1": ("s2", lambda s1, s2: s2 / np.float32(10_000), "is not reflectance x 10,000"),
    "0 to 1, one glint": ("s2", lambda s1, s2: np.where(s2 == s2.max(), np.float32(2.4), s2 / np.float32(10_000)), "2.4, float32, is not"),
    "0 to 1, double": ("s2", lambda s1, s2: s2 / 10_000, "is not reflectance x 10,000"),
    "S2 8 bit": ("s2", lambda s1, s2: (s2 // 47).astype(np.uint8), "uint8, is not reflectance x 10,000"),
    "S2 complex": ("s2", lambda s1, s2: s2 * np.complex64(1 + 1j), "complex64"),
}


@pytest.mark.parametrize("name", UNITS)
def test_units_are_judged_by_the_values(name, tmp_path, rng):
    sensor, change, words = UNITS[name]
    s1, s2 = clean(rng)
    images = {"s1": s1, "s2": s2, sensor: change(s1, s2)}
    paths = {key: write_tif(tmp_path / f"{key}.tif", image) for key, image in images.items()}
    bands = {"s1": data.S1_BANDS, "s2": data.S2_BANDS}[sensor]
    if words:
        with pytest.raises(data.DataError, match=f"{sensor}.tif: .*{words}"):
            as_values(paths[sensor], sensor, bands)
        with pytest.raises(data.DataError, match=f"1 of 1 patches cannot be used.* a.tif: .*{words}|a.tif: .*{words}"):
            packed_alone(tmp_path, paths["s1"], paths["s2"])
        return
    assert np.array_equal(as_values(paths[sensor], sensor, bands), images[sensor])
    patches = packed_alone(tmp_path, paths["s1"], paths["s2"])
    assert np.array_equal(patches.arrays[0][0], np.rint(images["s1"] * 100.0))
    assert np.array_equal(patches.arrays[1][0], images["s2"])


def test_missing_pixels_judge_no_unit(tmp_path, rng):
    s1, s2 = clean(rng)
    there = np.ones(s1.shape[1:], bool)
    there[4, 4] = False
    for how, write in HOLES["s1"].items():
        if how not in ("int", "8 bit"):
            with pytest.raises(data.DataError, match="is not dB"):
                as_values(write(tmp_path / f"{how}.tif", 10 ** (s1 / 10), there), "s1", data.S1_BANDS)
    for how in ("0", "0 untagged", "internal", ".msk", "float"):
        path = HOLES["s2"][how](tmp_path / f"{how}.tif", s2, there)
        image = read(path) / np.float32(10_000)
        profile = {"nodata": rasterio.open(path).nodata}
        with pytest.raises(data.DataError, match="is not reflectance"):
            as_values(write_tif(path, image, **profile), "s2", data.S2_BANDS)


@pytest.mark.parametrize("how", HOLES["s2"])
def test_offset_where_the_edge_of_a_swath_is_missing(how, tmp_path, rng):
    s1, s2 = clean(rng)
    s2[10] = rng.integers(1, 30, s2.shape[1:])
    there = np.add.outer(np.arange(12), np.arange(10)) > 5
    write_tif(tmp_path / "s1.tif", s1)
    path = HOLES["s2"][how](tmp_path / "s2.tif", s2 + np.uint16(1000), there)
    expected = np.where(there, s2, np.float32(np.nan))
    assert np.array_equal(as_values(path, "s2", data.S2_BANDS), expected, equal_nan=True)
    patches = packed_alone(tmp_path, tmp_path / "s1.tif", path)
    assert patches.records["offset"].tolist() == [1000] and np.array_equal(patches.arrays[1][0], np.where(there, s2, 0))


@pytest.mark.parametrize(("missing", "good"), [(0.5, True), (0.55, False)])
@pytest.mark.parametrize("sensor", ["s1", "s2"])
def test_more_than_half_missing_is_left_out(sensor, missing, good, tmp_path, rng):
    written = write_tree(tmp_path / "t", rng, 4, (20, 20), "plain")
    patch, files = next(iter(written.items()))
    rewrite(lambda a: seen_below(a, missing))(files[sensor])
    patches = data.pack(tmp_path / "t", tmp_path / "store", max_bad=0.3)
    assert (patch not in patches.left_out) == good
    assert good or data.re.search(f"{files[sensor].name}: .*missing", patches.left_out[patch])


UTM, DEGREES = "EPSG:32633", rasterio.Affine(8.96e-5, 0, 12, 0, -8.96e-5, 51)
MOVED = rasterio.Affine.translation
GRIDS = {  # CRS and transform of S2, of S1; words of the refusal or None
    "the same": (UTM, GRID, UTM, GRID, None),
    "3 px": (UTM, GRID, UTM, GRID @ MOVED(3, 0), "3 px"),
    "a tenth of a pixel": (UTM, GRID, UTM, GRID @ MOVED(0.1, 0), "0.1 px"),
    "half a pixel": (UTM, GRID, UTM, GRID @ MOVED(0, 0.5), "0.5 px"),
    "1e-5 px": (UTM, GRID, UTM, GRID @ MOVED(1e-5, -1e-5), None),
    "50 km": (UTM, GRID, UTM, GRID @ MOVED(5000, 0), "5000 px"),
    "zone": (UTM, GRID, "EPSG:32634", GRID, "EPSG:32634 and EPSG:32633"),
    "20 m": (UTM, GRID, UTM, GRID @ rasterio.Affine.scale(2), "px apart"),
    "south-up": (UTM, GRID, UTM, GRID @ MOVED(0, 64) @ rasterio.Affine.scale(1, -1), "64 px"),
    "both south-up": (UTM, GRID @ rasterio.Affine.scale(1, -1), UTM, GRID @ rasterio.Affine.scale(1, -1), None),
    "turned": (UTM, GRID, UTM, GRID @ rasterio.Affine.rotation(1), "px apart"),
    "degrees": ("EPSG:4326", DEGREES, "EPSG:4326", rasterio.Affine(9.04e-5, 0, 12, 0, -9.04e-5, 51), "px apart"),
    "the same degrees": ("EPSG:4326", DEGREES, "EPSG:4326", DEGREES, None),
    "degrees and metres": (UTM, GRID, "EPSG:4326", DEGREES, "EPSG:4326 and EPSG:32633"),
    "far south": ("EPSG:32733", rasterio.Affine(10, 0, 399_960, 0, -10, 9_999_980), "EPSG:32733",
                  rasterio.Affine(10, 0, 399_960, 0, -10, 9_999_980), None),
    "one says nothing": (UTM, GRID, None, None, None),
    "other says nothing": (None, None, UTM, GRID, None),
    "no CRS": (None, GRID, None, GRID @ MOVED(3, 0), "3 px"),
    "one without CRS": (UTM, GRID, None, GRID @ MOVED(0, 3), "3 px"),
    "SNAP's CRS": (UTM, GRID, ('PROJCS["WGS 84 / Auto UTM",GEOGCS["WGS 84",DATUM["World Geodetic System 1984",SPHEROID["WGS 84",6378137,'
                   '298.257223563]],PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],PARAMETER['
                   '"central_meridian",15],PARAMETER["latitude_of_origin",0],PARAMETER["scale_factor",0.9996],PARAMETER["false_easting",'
                   '500000],PARAMETER["false_northing",0],UNIT["m",1]]'), GRID, None),
}


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("sensor", ["s1", "classes"])
@pytest.mark.parametrize("name", GRIDS)
def test_grids(name, sensor, tmp_path, rng):
    crs, transform, other_crs, other, words = GRIDS[name]
    size = (64, 48)
    images = dict(zip(("s1", "s2"), clean(rng, size)), classes=np.ones((1, *size), np.uint8))
    for patch in "abcd":
        for key, image in images.items():
            away = key == sensor and patch == "b"
            write_tif(tmp_path / f"t/{key}/{patch}.tif", image, crs=other_crs if away else crs, transform=other if away else transform)
    patches = data.pack(tmp_path / "t", tmp_path / "store", max_bad=0.3)
    assert list(patches.left_out) == (["b"] if words else [])
    if words:
        assert words in patches.left_out["b"] and "not on one grid" in patches.left_out["b"] and "b.tif WARPED.tif" in patches.left_out["b"]
        with pytest.raises(data.DataError, match="1 of 4 patches cannot be used"):
            data.pack(tmp_path / "t", tmp_path / "strict")


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_classes_lie_where_s1_does_even_if_s2_does_not_say_where(tmp_path, rng):
    s1, s2 = clean(rng)
    for patch in "abcd":
        write_tif(tmp_path / f"t/s1/{patch}.tif", s1, crs=UTM)
        write_tif(tmp_path / f"t/s2/{patch}.tif", s2, transform=None)
        classes = np.ones((1, *s1.shape[1:]), np.uint8)
        write_tif(tmp_path / f"t/classes/{patch}.tif", classes, crs=UTM, transform=GRID @ MOVED(3 * (patch == "b"), 0))
    patches = data.pack(tmp_path / "t", tmp_path / "store", max_bad=0.3)
    assert list(patches.left_out) == ["b"] and "b.tif, b.tif: not on one grid: " in patches.left_out["b"]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_side_cars_say_where_a_file_lies(tmp_path, rng):
    s1, s2 = clean(rng)
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="TRUE"):
        for patch in "abcd":
            for sensor, image in (("s1", s1), ("s2", s2)):
                path = write_tif(tmp_path / f"t/{sensor}/{patch}.tif", image, transform=None)
                north = 4_000_000 + 30 * (sensor == "s1" and patch == "b")
                path.with_suffix(".tfw").write_text(f"10\n0\n0\n-10\n500005\n{north - 5}\n")
                zone = 34 if sensor == "s1" and patch == "c" else 33
                Path(f"{path}.aux.xml").write_text(f"<PAMDataset><SRS>EPSG:326{zone}</SRS></PAMDataset>")
    patches = data.pack(tmp_path / "t", tmp_path / "store", max_bad=0.6)
    assert list(patches.left_out) == ["b", "c"]
    assert "3 px" in patches.left_out["b"] and "EPSG:32634" in patches.left_out["c"]


@pytest.mark.parametrize("ending", ["tif", "TIF", "tiff", "TIFF", "Tif", "vrt", "VRT"])
def test_endings_in_any_case(ending, tmp_path, rng):
    s1, s2 = clean(rng)
    for sensor, image in (("S1", s1), ("s2", s2)):
        path = write_tif(tmp_path / f"t/{sensor}/a.{ending}", image)
        if ending.lower() == "vrt":
            path.rename(tmp_path / f"{sensor}.source.tif")
            kind = "Float32" if sensor == "S1" else "UInt16"
            write_vrt(path, [(tmp_path / f"{sensor}.source.tif", k + 1) for k in range(len(image))], image.shape[1:], kind=kind)
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    assert patches.ids == ["a"] and np.array_equal(patches.arrays[1][0], s2)


NAMED_FILES = {"SAFE": "T32TNS_20200101T102421_{}.tif", "BigEarthNet": "S2A_MSIL2A_20170613T101031_87_48_{}.tif", "SSL4EO": "{}.tif",
               "resolutions": "T32TNS_20200101T102421_{}_60m.tif"}


@pytest.mark.parametrize("form", NAMED_FILES)
@pytest.mark.parametrize("tool", ["text", "gdalbuildvrt"])
def test_vrt_of_files_of_one_band_each(form, tool, tmp_path, rng):
    """In the order of their names, B8A last, and VH before VV."""
    s1, s2 = clean(rng)
    command = shutil.which("gdalbuildvrt")
    if tool == "gdalbuildvrt" and not command:
        pytest.skip("no gdalbuildvrt here")
    for sensor, image, bands in (("s1", s1, data.S1_BANDS), ("s2", s2, data.S2_BANDS)):
        (tmp_path / "t" / sensor).mkdir(parents=True)
        files = []
        for band, layer in zip(bands, image):
            long = band if sensor == "s1" or form == "SSL4EO" else f"B{band[1:]:0>2}"
            files.append(write_tif(tmp_path / f"B5 {sensor}_VV" / NAMED_FILES[form].format(long), layer[None], crs=UTM))
        files.sort()
        path = tmp_path / f"t/{sensor}/a.vrt"
        if tool == "text":
            write_vrt(path, [(file, 1) for file in files], image.shape[1:], kind="Float32" if sensor == "s1" else "UInt16")
        else:
            subprocess.run([command, "-q", "-separate", path, *files], check=True)
        assert np.array_equal(as_values(path, sensor, bands), image)
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    assert np.array_equal(patches.arrays[0][0], np.rint(s1 * 100)) and np.array_equal(patches.arrays[1][0], s2)


def test_names_in_a_vrt_come_before_those_of_its_files(tmp_path, rng):
    s1, _ = clean(rng)
    for name, band in zip(("x_VV.tif", "x_VH.tif"), s1):
        write_tif(tmp_path / name, band[None])
    path = write_vrt(tmp_path / "a.vrt", [(tmp_path / "x_VH.tif", 1), (tmp_path / "x_VV.tif", 1)], s1.shape[1:], names=["VV", "VH"])
    assert np.array_equal(as_values(path, "s1", data.S1_BANDS), s1[::-1])
    path = write_vrt(tmp_path / "b.vrt", [(tmp_path / "x_VH.tif", 1), (tmp_path / "x_VV.tif", 1)], s1.shape[1:], names=["Band 1", "Band 2"])
    assert np.array_equal(as_values(path, "s1", data.S1_BANDS), s1)
    both = write_tif(tmp_path / "x_VV_VH.tif", s1)
    path = write_vrt(tmp_path / "c.vrt", [(both, 1), (both, 2)], s1.shape[1:])  # a name of two bands names none
    assert np.array_equal(as_values(path, "s1", data.S1_BANDS), s1)


def test_bands_may_be_asked_for_as_files_write_them(tmp_path, rng):
    _, s2 = clean(rng)
    for names in (None, data.S2_BANDS):
        path = write_tif(tmp_path / "x.tif", s2, names)
        assert np.array_equal(as_values(path, "s2", ["B08", "b8a", "B02"]), s2[[7, 8, 1]])


def test_what_is_beyond_the_unit_is_refused_in_the_window_that_has_it(tmp_path, rng):
    """-9999, -1 or netCDF's 9.97e36 without a tag, where the lines by which a scene is judged have none."""
    s1, s2 = clean(rng, (80, 10))
    for sensor, image, value, unit in (("s1", s1, -9999, "dB"), ("s2", s2.astype(np.int16), -1, "reflectance"),
                                       ("s1", s1, 9.96921e36, "dB"), ("s2", s2.astype(np.float32), 70_000, "reflectance")):
        image[:, 41, 3] = value
        raster = data.Raster(write_tif(tmp_path / "x.tif", image), sensor, data.S1_BANDS if sensor == "s1" else data.S2_BANDS)
        raster.values(rasterio.windows.Window(0, 0, 10, 40))
        said = f"{value} to .*" if value < 0 else rf"to {value:g}, .*".replace("+", r"\+")
        with pytest.raises(data.DataError, match=f"{said} is not {unit}"):
            raster.values(rasterio.windows.Window(0, 40, 10, 40))


def test_the_order_of_a_whole_file_without_names_is_doubted_as_that_of_a_scene(tmp_path, rng):
    """As README's snippets read it: SNAP writes VH first."""
    s1, _ = clean(rng)
    s1[0] += 10
    assert np.array_equal(as_values(write_tif(tmp_path / "a.tif", s1), "s1", data.S1_BANDS), s1)
    with pytest.raises(data.DataError, match="b.tif: by position VH is brighter than VV"):
        as_values(write_tif(tmp_path / "b.tif", s1[::-1]), "s1", data.S1_BANDS)


# ------------------------------------------------------------------------------ splits, doubles, what cannot be reached

@pytest.mark.parametrize(("folder", "split"), [
    ("train/{}", "train"), ("Train/{}", "train"), ("{}/TRAIN", "train"), ("a/val/{}", "validation"), ("{}/x/Validation", "validation"),
    ("VAL/{}/river", "validation"), ("TEST/{}", "test"), ("{}/Test/river", "test"), ("testing/{}", ""), ("training/{}", ""), ("my test/{}", "")])
def test_splits_in_any_case_and_place(folder, split, tmp_path, rng):
    for sensor, image in zip(("s1", "s2"), clean(rng)):
        write_tif(tmp_path / "t" / folder.format(sensor) / "a.tif", image)
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    assert patches.splits.tolist() == [split] and patches.ids == [f"{folder.format('')}/a".replace("//", "/").strip("/")]


def test_control_points_are_no_grid(tmp_path, rng):
    corners = [rasterio.control.GroundControlPoint(y, x, 12 + x / 1e4, 50 - y / 1e4) for x in (0, 10) for y in (0, 12)]
    path = write_tif(tmp_path / "x.tif", clean(rng)[0], gcps=corners, crs="EPSG:4326", transform=None)
    with pytest.raises(data.DataError, match="x.tif: placed by control points"):
        data.Raster(path, "s1", data.S1_BANDS)


def test_the_order_of_bands_without_names_is_asked_for_where_there_are_two(tmp_path, rng):
    """A legend may name all the bands of a product in an order of its own."""
    alphabet = sorted(data.L2A_BANDS)
    image = np.arange(1, 13, dtype=np.uint16)[:, None, None] * np.ones((12, 4, 5), np.uint16) * 100
    path = write_tif(tmp_path / "x.tif", image)
    with pytest.raises(data.DataError, match="x.tif: its bands have no names: .*order="):
        data.Raster(path, "s2", alphabet, 0)
    for order in (alphabet, data.L2A_BANDS):
        values = data.Raster(path, "s2", alphabet, 0, order).values()[:, 0, 0]
        assert values.tolist() == [100 * (1 + order.index(band)) for band in alphabet]
    numbered = write_tif(tmp_path / "y.tif", image[:4], ["b1", "b2", "b3", "b4"])  # which are not B1 to B4
    with pytest.raises(data.DataError, match="y.tif: 4 bands, b1 b2 b3 b4; needed are B4 B3 B2: name them"):
        data.Raster(numbered, "s2", models.RGB, 0)
    with pytest.raises(data.DataError, match="y.tif: 4 bands, b1 b2 b3 b4; needed are B3 B2: name them"):
        data.Raster(numbered, "s2", ["B3", "B2"], 0, ["B3", "B2"])  # a legend that does not say so
    legend = ["b2", "b1", "b4", "b3"]  # which says that they are names
    assert data.Raster(numbered, "s2", legend, 0, legend).values()[:, 0, 0].tolist() == [200, 100, 400, 300]


def test_train_and_val_are_said_and_one_name_in_two_splits_is_two_patches(tmp_path, rng, capsys):
    for folder in ("train", "Val", "test"):
        for patch in "ab":
            for sensor, image in zip(("s1", "s2"), clean(rng)):
                write_tif(tmp_path / f"t/{folder}/{sensor}/{patch}.tif", image)
    for sensor in ("s1", "s2"):
        shutil.copy(tmp_path / f"t/train/{sensor}/b.tif", tmp_path / f"t/test/{sensor}/b.tif")
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    assert patches.ids == ["Val/a", "Val/b", "test/a", "test/b", "train/a", "train/b"]
    assert len(patches.rows_of(*data.TRAINED_ON)) == 4
    data.check(patches)
    said = capsys.readouterr().out
    assert "train: 2\n" in said and "validation: 2\n" in said and "test: 2\n" in said
    assert data.re.search(".*train and validation.*\n", said)
    assert data.re.search("same pixels.*test/b.*train/b\n", said) and said.count("same pixels") == 1 and "train/a" not in said


def test_what_only_one_user_may_read(tmp_path, rng):
    """Of a folder nothing is packed; a file is left out by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        written = write_tree(folder / "t", rng, 5, layout="scenes", labels=False)
        patch, files = next(iter(written.items()))
        files["s1"].chmod(0)

        def a_file():
            with tempfile.TemporaryDirectory() as out:
                left_out = data.pack(folder / "t", Path(out) / "store", 1, max_bad=0.3).left_out
            assert list(left_out) == [patch] and "Permission denied" in left_out[patch]

        def a_folder():
            with pytest.raises(OSError, match="Permission denied.*river 2"):
                data.pack(folder / "t", folder / "store")

        as_nobody(a_file)
        (folder / "t/s2/river 2").chmod(0)
        as_nobody(a_folder)
        (folder / "t/s2/river 2").chmod(0o755)


def test_a_name_that_is_not_utf_8(tmp_path, rng, monkeypatch, capsys):
    write_tree(tmp_path / "t", rng, 3, layout="plain")
    name = os.fsdecode(b"b\xe9.tif")
    for sensor in ("s1", "s2"):
        shutil.copy(next((tmp_path / "t" / sensor).iterdir()), tmp_path / "t" / sensor / name)
    assert data.re.search(r"b\\udce9.tif.*UTF-8: rename", refused(monkeypatch, capsys, "pack", tmp_path / "t", tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_file_of_a_product_with_more_bands_is_taken_by_its_number_of_bands(tmp_path, rng):
    written = list(write_tree(tmp_path / "t", rng, 4, layout="plain").values())
    for files in written[:3]:
        rewrite(lambda a: np.delete(a, data.S2_BANDS.index("B10"), 0))(files["s2"])
    patches = data.pack(tmp_path / "t", tmp_path / "store", s2_offset=0)
    assert patches.bands["s2"] == data.L2A_BANDS and not patches.left_out
    assert np.array_equal(patches.arrays[1][3], np.delete(read(written[3]["s2"]), data.S2_BANDS.index("B10"), 0))


SHIFTED = {  # what is done to B10 of an L1C file + 1,000: the offset that is found
    "as it is": (lambda b10: None, 1000),
    "0 at its edge": (lambda b10: b10.__setitem__(np.s_[:4], 0), 1000),
    "nothing but 0": (lambda b10: b10.fill(0), None),
    "below 1,000": (lambda b10: b10.fill(20), 0)}


@pytest.mark.parametrize("names", [None, data.S2_BANDS])
@pytest.mark.parametrize("bands", [data.S2_BANDS, data.L2A_BANDS, ["B4", "B3", "B2"]])
@pytest.mark.parametrize("how", SHIFTED)
@pytest.mark.parametrize("scene", [False, True])
def test_cirrus_shows_the_offset_where_it_is_not_asked_for_and_nothing_else(names, bands, how, scene, tmp_path, rng):
    """What is there is a matter of the bands asked for."""
    image = rng.integers(1200, 9000, (13, 64, 10)).astype(np.uint16)
    image[9:11] = rng.integers(1110, 1200, (64, 10)), rng.integers(1001, 1100, (64, 10))  # B9, B10
    change, offset = SHIFTED[how]
    change(image[data.S2_BANDS.index("B10")])
    numbers = [data.S2_BANDS.index(band) for band in bands]
    if "B10" not in bands:
        image[numbers, 60:] = 0
    expected = (image[numbers].astype(float) - (offset or 0)).clip(0)
    if "B10" not in bands:
        expected[:, 60:] = np.nan
    path = write_tif(tmp_path / "x.tif", image, names)
    window = rasterio.windows.Window(0, 0, 10, 64) if scene else None
    assert data.Raster(path, "s2", bands, 0).values(window)[0, 10, 0] == image[numbers[0], 10, 0]
    raster = data.Raster(path, "s2", bands)
    if offset is None:
        with pytest.raises(data.DataError, match="x.tif: without B10 where it is clear it cannot be told"):
            raster.values(window)
    else:
        assert np.array_equal(raster.values(window), expected, equal_nan=True) and raster.offset == offset


def test_cirrus_that_cannot_be_read_is_said(tmp_path, rng):
    """Cut off behind the bands that are asked for."""
    path = write_tif(tmp_path / "x.tif", rng.integers(1001, 9000, (13, 64, 10)).astype(np.uint16), interleave="band")
    os.truncate(path, path.stat().st_size * 8 // 13)
    with pytest.raises(data.DataError, match=r"x.tif: cannot be read"):
        data.Raster(path, "s2", ["B4", "B3", "B2"]).values()


def test_band_10_of_landsat_is_not_cirrus(tmp_path, rng):
    path = write_tif(tmp_path / "x.tif", rng.integers(1500, 9000, (5, 12, 10)).astype(np.uint16), ["B2", "B3", "B4", "B5", "B10"])
    with pytest.raises(data.DataError, match="x.tif: without B10 .* it cannot be told"):
        data.Raster(path, "s2", ["B4", "B3", "B2"]).values()
    two = write_tif(tmp_path / "two.tif", rng.integers(1500, 9000, (2, 12, 10)).astype(np.uint16))  # of which B10 is none
    with pytest.raises(data.DataError, match="two.tif: without B10 .* it cannot be told"):
        data.Raster(two, "s2", ["B8", "B4"]).values()


def test_dark_water_below_the_offset_is_not_missing(tmp_path, rng):
    """It is 1, since 0 in all bands, or in all that are asked for, would be. What is 0 in the file is 0 to all."""
    s2 = rng.integers(1100, 3000, (3, 12, 10)).astype(np.uint16)
    s2[:, :4], s2[:, 5], s2[:2, 6], s2[:2, 7], s2[2, 8] = 990, 0, 1000, 0, 0
    for sensor, image in (("s1", clean(rng)[0]), ("s2", s2)):
        write_tif(tmp_path / f"t/{sensor}/a.tif", image)
    (tmp_path / "t/legend.json").write_text('{"s2": ["B8", "B11", "B12"]}')
    patches = data.pack(tmp_path / "t", tmp_path / "store", s2_offset=1000)
    expected = np.where(s2, s2.clip(1001) - 1000, 0)
    assert np.array_equal(patches.arrays[1][0], expected) and (patches.records["count"][0, 2:] == 110).all()
    read = data.Raster(tmp_path / "t/s2/a.tif", "s2", ["B8", "B11"], 1000, ["B8", "B11", "B12"]).values()
    a_map, trained_on = (models.to_input(np.zeros((1, 1, 12, 10)), image[None], "standard", {
        "s1": {"mean": [0], "std": [1]}, "s2": {"mean": [900, 900], "std": [600, 600]}})[1] for image in (read, expected[:2]))
    assert torch.equal(a_map, trained_on) and (a_map == 0).all(1).sum() == 20  # both missing where both bands are 0


@pytest.mark.parametrize("first", range(3))
def test_size_and_bands_are_those_that_most_have(first, tmp_path, rng):
    written = list(write_tree(tmp_path / "t", rng, 8, (16, 16), "plain").items())
    for _, files in written[first:first + 3]:
        for path in files.values():
            rewrite(lambda a: a[:, :12, :12])(path)
    patches = data.pack(tmp_path / "t", tmp_path / "store", max_bad=0.4)
    assert list(patches.size) == [16, 16] and list(patches.left_out) == [patch for patch, _ in written[first:first + 3]]
    assert all("(12, 12) px, most are [16, 16]" in reason for reason in patches.left_out.values())


@pytest.mark.parametrize("how", ["link", "copy", "folder"])
def test_a_file_that_is_there_twice(how, tmp_path, rng):
    written = write_tree(tmp_path / "t", rng, 3, layout="dfc release")
    path = next(iter(written.values()))["s1"]
    if how == "folder":
        (tmp_path / "t/again").symlink_to(path.parent)
    else:
        (tmp_path / "t/again").mkdir()
        {"link": os.symlink, "copy": shutil.copy}[how](path, tmp_path / "t/again" / path.name)
    words = "again is .*s1_1|s1_1 is .*again: the same folder" if how == "folder" else "both s1 of ROIs0000_test_1_p9"
    with pytest.raises(data.DataError, match=words) as error:
        data.pack(tmp_path / "t", tmp_path / "store")
    assert "remove" not in str(error.value)


def test_a_link_to_a_folder_above(tmp_path, rng):
    write_tree(tmp_path / "t", rng, 3, layout="plain")
    (tmp_path / "t/s1/up").symlink_to(tmp_path / "t")
    with pytest.raises(data.DataError, match="up is .*/t: the same folder"):
        data.pack(tmp_path / "t", tmp_path / "store")


def test_finished_before_is_said(tmp_path, rng, monkeypatch, capsys):
    write_tree(tmp_path / "t", rng, 3, layout="plain")
    call(monkeypatch, data, "pack", tmp_path / "t", tmp_path / "store")
    assert "packed before" not in capsys.readouterr().out
    call(monkeypatch, data, "pack", tmp_path / "t", tmp_path / "store")
    assert data.re.search("store: 3 of 3 patches were packed before; remove it", capsys.readouterr().out)


# ------------------------------------------------------------------------------ own bands and classes

FLOOD = {"s1": ["VV"], "s2": ["B12", "B8", "B4"], "classes": {"1": "dry", "2": "flooded"}}


def legend_tree(tree, rng, legend, bands, layout="plain", count=6):
    written = write_tree(tree, rng, count, layout=layout, bands=bands)
    (tree / "legend.json").write_text(json.dumps(legend))
    return written


@pytest.mark.parametrize("left_out", [(), ("s1",), ("s2",), ("classes",), ("s1", "s2", "classes")])
def test_legend(left_out, tmp_path, rng):
    legend = {key: value for key, value in FLOOD.items() if key not in left_out}
    bands = {"s1": data.S1_BANDS, "s2": data.S2_BANDS, **legend}
    written = legend_tree(tmp_path / "t", rng, legend, (len(bands["s1"]), len(bands["s2"])))
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    assert patches.bands == {"s1": bands["s1"], "s2": bands["s2"]} and len(patches.rows) == 6
    assert patches.classes == (data.CLASSES if "classes" in left_out else ["dry", "flooded"])
    for row, files in enumerate(written.values()):
        s1, s2, classes = as_stored(files)
        if "classes" not in left_out:
            classes[classes > 1] = 255
        for array, values in zip(patches.arrays, (s1, s2, classes)):
            assert (array[row] == values).all()
    assert set(patches.labels) <= {*range(len(patches.classes)), 255}


def test_codes_that_are_not_dfc2020s_are_asked_for(tmp_path, rng):
    """As of ESA WorldCover, where 10 is trees; 255 is none, as anywhere, and so is what the file says."""
    files, = write_tree(tmp_path / "t", rng, 1, layout="plain").values()
    write_tif(files["classes"], rng.choice([10, 30, 40], (1, 16, 16)).astype(np.uint8))
    with pytest.raises(data.DataError, match="9.tif: holds codes above 10, .*legend.json"):
        data.pack(tmp_path / "t", tmp_path / "store")
    for code, nodata in ((255, None), (99, 99)):
        write_tif(files["classes"], rng.choice([10, code], (1, 16, 16)).astype(np.uint8), nodata=nodata)
        patches = data.pack(tmp_path / "t", tmp_path / f"store{code}")
        assert {*np.unique(patches.arrays[2])} == {data.CLASSES.index("Water"), 255}
    (tmp_path / "t/legend.json").write_text('{"classes": {"10": "trees", "30": "grass"}}')
    write_tif(files["classes"], np.full((1, 16, 16), 20.5, np.float32))
    with pytest.raises(data.DataError, match="9.tif: holds fractions: resample classes by nearest"):
        data.pack(tmp_path / "t", tmp_path / "legend")
    write_tif(files["classes"], rng.choice([10, 30, 40], (1, 16, 16)).astype(np.uint8))
    assert {*np.unique(data.pack(tmp_path / "t", tmp_path / "legend").arrays[2])} == {0, 1, 255}


@pytest.mark.parametrize("legend", [{"0": "dry", "255": "wet"}, {"-1": "land", "0": "dry", "255": "wet"}])
@pytest.mark.parametrize("dtype, nodata, mask", [("uint8", 99, False), ("uint8", None, True), ("int16", 99, False), ("float32", 99, False)])
def test_classes_that_are_missing_are_none_whatever_the_legend_names(legend, dtype, nodata, mask, tmp_path, rng):
    files, _ = write_tree(tmp_path / "t", rng, 2, layout="plain").values()
    codes = rng.choice([0, 99, 255], (1, 16, 16)).astype(dtype)
    hidden = codes[0] == 99
    if mask:
        codes[:, hidden] = 0
    write_tif(files["classes"], codes, mask=~hidden if mask else None, nodata=nodata)
    list((tmp_path / "t/classes").glob("*.tif"))[files["classes"].name.endswith("10.tif")].touch()
    (tmp_path / "t/legend.json").write_text(json.dumps({"classes": legend}))
    patches = data.pack(tmp_path / "t", tmp_path / "store", max_bad=0.5)
    names = np.array([*legend.values(), *["none"] * 256])[patches.arrays[2][patches.rows[0], 0]]
    expected = np.where(codes[0] == 255, "wet", "dry")
    expected[hidden] = "none"[:3]
    assert np.array_equal(names == "none", hidden) and (names[~hidden] == expected[~hidden]).all()


def test_alpha_is_a_mask_and_no_band(tmp_path, rng):
    """As `gdalwarp -dstalpha` adds it, to bands with and without names."""
    for number, names in enumerate((None, data.S2_BANDS)):
        _, s2 = clean(rng)
        alpha = np.where(rng.random((1, 12, 10)) < 0.2, 0, 65_535).astype(np.uint16)
        path = write_tif(tmp_path / f"{number}.tif", np.concatenate((s2, alpha)), names and [*names, None])
        with rasterio.open(path, "r+") as tif:
            tif.colorinterp = [*tif.colorinterp[:13], rasterio.enums.ColorInterp.alpha]
        values = as_values(path, "s2", data.S2_BANDS)
        assert np.array_equal(values, np.where(alpha > 0, s2, np.float32(np.nan)), equal_nan=True)


def test_the_order_that_a_legend_gives_says_where_cirrus_is(tmp_path, rng):
    """Thirteen bands without names are not always those of L1C: here the eleventh is SCL."""
    files = list(write_tree(tmp_path / "t", rng, 2, layout="plain").values())
    for legend, found in (([*data.L2A_BANDS, "SCL"], None), (data.S2_BANDS[::-1], 1000)):
        (tmp_path / "t/legend.json").write_text(json.dumps({"s2": legend}))
        for path in (pair["s2"] for pair in files):
            s2 = rng.integers(2000, 9000, (13, 16, 16)).astype(np.uint16)
            s2[2] = rng.integers(1004, 1040, (16, 16))  # B10, counted from the end
            write_tif(path, s2)
        if found is None:
            with pytest.raises(data.DataError, match="without B10"):
                data.pack(tmp_path / "t", tmp_path / "none")
        else:
            assert (data.pack(tmp_path / "t", tmp_path / "store").records["offset"] == found).all()
            raster = data.Raster(path, "s2", ["B4", "B3"], order=legend)
            assert raster.values().min() >= 1000 and raster.offset == found
        if found is None:  # nor where the bands are all that is told of their order
            with pytest.raises(data.DataError, match="without B10"):
                data.Raster(path, "s2", legend).values()


def test_power_that_resampling_made_negative_here_and_there_is_not_db(tmp_path, rng):
    ringing = 10 ** (rng.normal(-12, 5, (2, 20, 20)) / 10)
    ringing[:, 3, 4:9] = -0.01
    for power in (ringing, rng.normal(0.01, 0.012, (2, 20, 20))):  # warped; sea, its noise subtracted
        power[1] /= 4
        with pytest.raises(data.DataError, match="is not dB"):
            as_values(write_tif(tmp_path / "x.tif", power.astype(np.float32)), "s1", data.S1_BANDS)


def test_bands_of_several_scales_are_refused(tmp_path, rng):
    path = write_tif(tmp_path / "x.tif", np.delete(clean(rng)[1], 10, 0) + np.uint16(1000), scale=1e-4)
    with rasterio.open(path, "r+") as tif:
        tif.offsets = [0] * 3 + [-0.1] * 9
    assert data.Raster(path, "s2", ["B3", "B2"]).values().min() >= 1000
    for bands, found in ((["B3", "B2"], 0), (["B8", "B4"], 1000)):
        raster = data.Raster(path, "s2", bands)
        assert raster.values().min() >= 0 and raster.offset == found
    with pytest.raises(data.DataError, match="x.tif: .*several scales and offsets"):
        data.Raster(path, "s2", ["B4", "B3"]).values()


def test_no_data_that_a_legend_names_is_refused(tmp_path, rng):
    files, = write_tree(tmp_path / "t", rng, 1, layout="plain").values()
    (tmp_path / "t/legend.json").write_text('{"classes": {"0": "dry", "1": "wet"}}')
    write_tif(files["classes"], rng.choice([0, 1], (1, 16, 16)).astype(np.uint8), nodata=0)
    with pytest.raises(data.DataError, match="9.tif: 0 is no data there and a class here: gdal_edit.py -unsetnodata"):
        data.pack(tmp_path / "t", tmp_path / "store")


def test_check_counts_patches_whose_bands_are_odd(tmp_path, rng, capsys):
    for number, files in enumerate(write_tree(tmp_path / "t", rng, 9).values()):
        s1, s2 = clean(rng, (16, 16))
        s2[9] = 900 + s2[10]
        if number < 2:
            s1 = s1[::-1]
        if number < 3:
            s2[9], s2[10] = s2[10], s2[9].copy()
        write_tif(files["s1"], s1)
        write_tif(files["s2"], s2 if number < 5 else (s2 % 200) + 3)
    data.check(data.pack(tmp_path / "t", tmp_path / "store", s2_offset=0))
    said = capsys.readouterr().out
    assert "in 2 patches VH is brighter than VV" in said and "in 4 patches S2 is never above 255" in said
    assert data.re.search("in [3-7] patches B10 is brighter than B9", said)


def test_bands_of_another_sensor_and_several_codes_of_one_class(tmp_path, rng):
    legend = {"s1": ["HH", "HV", "γ"], "s2": ["nir 865", "red", "B4", "pan"],
              "classes": {"7": "tree", "0": "other", "3": "tree", "11": "sea ice", "-4": "other"}}
    written = legend_tree(tmp_path / "t", rng, legend, (3, 4))
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    assert patches.classes == ["tree", "other", "sea ice"]
    number = np.full(256, 255)
    number[[7, 0, 3, 11]] = 0, 1, 0, 2
    for row, files in enumerate(written.values()):
        assert (patches.arrays[2][row, 0] == number[read(files["classes"])[0]]).all()
    assert (patches.records["pixels"].sum(1) == 256).all()
    some = data.Patches(patches.path, ["pan", "HV"])
    assert some.bands == {"s1": ["HV"], "s2": ["pan"]}
    stats = some.stats(patches.rows)
    assert math.isclose(stats["s2"]["mean"][0], patches.arrays[1][:, 3].mean(), rel_tol=1e-12)


@pytest.mark.parametrize("count", [2, 254])
def test_fewest_and_most_classes(count, tmp_path, rng):
    legend = {"classes": {str(code): f"class {code}" for code in range(count)}}
    written = legend_tree(tmp_path / "t", rng, legend, (2, 13))
    codes = rng.integers(0, 256, (1, 16, 16)).astype(np.uint8)
    write_tif(next(iter(written.values()))["classes"], codes)
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    assert (patches.arrays[2][0] == np.where(codes < count, codes, 255)).all()
    assert (patches.labels == models.single_label(patches.arrays[2][:, 0].copy(), count).numpy()).all()


WRONG_LEGENDS = {
    "unknown key": ('{"s3": ["a"]}', "key"),
    "band twice": ('{"s1": ["VV", "VV"]}', "twice"),
    "band of both sensors": ('{"s1": ["VV", "B4"]}', "twice"),
    "cirrus of both sensors": ('{"s1": ["VV", "B10"]}', "twice"),
    "code twice": ('{"classes": {"1": "a", "2": "b", "1": "c"}}', "twice"),
    "code twice in other words": ('{"classes": {"1": "a", "2": "b", "01": "c"}}', "twice"),
    "code that is none": ('{"classes": {"1": "a", "two": "b"}}', "two"),
    "one class": ('{"classes": {"1": "a", "2": "a"}}', "2 to 254 classes"),
    "255 classes": (json.dumps({"classes": {str(k): str(k) for k in range(255)}}), "2 to 254 classes"),
    "broken": ('{"s1": ["VV"', "legend.json"),
    "not UTF-8": (b"\xff\xfe{", "legend.json"),
    "a list": ('["VV", "VH"]', "legend.json"),
    "bands not a list": ('{"s1": "VV"}', "legend.json"),
    "classes not an object": ('{"classes": ["dry", "flooded"]}', "legend.json"),
    "no name": ('{"s1": [null, "VV"]}', "legend.json: .*an empty name"),
    "a number": ('{"s2": ["B2", 3]}', "legend.json: .*an empty name"),
    "no band": ('{"s1": []}', "legend.json: .*an empty name"),
    "no band of S2": ('{"s2": []}', "legend.json: .*an empty name"),
    "two dates": ('{"s1": ["VV_asc", "VV_desc"]}', "twice"),
    "a class that is a number": ('{"classes": {"1": 5, "2": "b"}}', "legend.json: .*an empty name"),
}


@pytest.mark.parametrize("name", WRONG_LEGENDS)
def test_wrong_legends_are_one_line(name, tmp_path, rng):
    write_tree(tmp_path / "t", rng, 3, layout="plain")
    text, words = WRONG_LEGENDS[name]
    path = tmp_path / "t/legend.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(data.DataError, match=words) as error:
        data.pack(tmp_path / "t", tmp_path / "store")
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"s2": ["B4", "B3", "B2"]}, r"place \d é \d+.tif: 13 bands, .*needed are B4 B3 B2: .*legend.json"),
    ({"s2": ["B4", "pan"]}, r"place \d é \d+.tif: 13 bands, .*needed are B4 pan: .*legend.json"),
    ({"s1": ["pol"]}, r"[0-9] of 6 patches cannot be used.*place 1 é 10.tif: 2 bands, None None; needed are pol")])
def test_bands_that_the_files_do_not_have(change, words, tmp_path, rng):
    legend_tree(tmp_path / "t", rng, change, (2, 13))
    with pytest.raises(data.DataError, match=words) as error:
        data.pack(tmp_path / "t", tmp_path / "store")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("layout", "counts"), [  # so many of 16 patches in 3 scenes, or in 16
    ("scenes", {0: 0, 0.01: 1, 0.34: 2, 1: 2}), ("release", {0.02: 1}), ("plain", {0.34: 6, 1: 15})])
def test_whole_scenes_are_held_out(layout, counts, tmp_path, rng):
    write_tree(tmp_path / "t", rng, 16, layout=layout)
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    scenes = np.array(patches.scenes)
    for share, count in counts.items():
        train, held = data.split_scenes(patches, share)
        assert sorted([*train, *held]) == patches.rows.tolist()
        assert len(set(scenes[held])) == count and not set(scenes[held]) & set(scenes[train])
        again = data.split_scenes(data.Patches(patches.path), share)
        assert all(map(np.array_equal, (train, held), again))


def test_what_is_held_out_is_the_same_in_every_version():
    """A checkpoint says what share, not which: `--retrieve` must not look among scenes that it was trained on (nor with another numpy)."""
    patches = SimpleNamespace(rows=np.arange(16), scenes=[f"scene {k:02}" for k in range(16)], rows_of=lambda split: [])
    assert data.split_scenes(patches, 0.25)[1].tolist() == [2, 3, 10, 11]


def test_a_split_named_test_is_what_is_held_out(tmp_path, rng):
    for layout in ("scenes", "scenes split"):
        write_tree(tmp_path / "t", rng, 9, layout=layout)
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    train, held = data.split_scenes(patches, 0.02)
    assert held.tolist() == patches.rows_of("test").tolist() and len(held) == len(train) == 9
    assert train.tolist() == patches.rows_of("").tolist()


# ------------------------------------------------------------------------------ crops

ROWS = np.array([5, 7, 7, 0, 22, 11, 13, 14, 15, 21, 3])


def test_random_crops_are_a_function_of_seed_and_epoch():
    draw = functools.partial(data.random_crops, ROWS, (16, 12), 9, 4)
    for seed, epoch in itertools.product((0, 3), (0, 1, 7)):
        crops = draw(seed, epoch)
        np.random.default_rng(0).random()
        np.random.seed(seed + 1)
        torch.manual_seed(seed + 1)
        same(draw(seed, epoch), crops)
        assert sorted(np.concatenate([rows for rows, *_ in crops])) == sorted(ROWS)
        assert [len(rows) for rows, *_ in crops] == [4, 4, 3]
        assert all(len(rows) == len(tops) == len(lefts) for rows, tops, lefts in crops)
        full = draw(seed, epoch, drop_last=True)
        assert [len(rows) for rows, *_ in full] == [4, 4]
    distinct = {tuple(np.concatenate([np.concatenate(batch) for batch in draw(seed, epoch)]).tolist())
                for seed, epoch in itertools.product(range(4), range(4))}
    assert len(distinct) == 16
    orders = {tuple(np.concatenate([rows for rows, *_ in draw(seed, epoch)])) for seed, epoch in itertools.product(range(4), range(4))}
    assert len(orders) == 16  # not only other places in rows of one order
    assert ROWS.tolist() == [5, 7, 7, 0, 22, 11, 13, 14, 15, 21, 3]  # left as it was


def test_batches_of_an_epoch_differ_by_one_at_most():
    for count, batch_size in itertools.product(range(1, 30), range(1, 12)):
        crops = data.random_crops(np.arange(count), (8, 8), 3, batch_size, 0, 0)
        lengths = [len(rows) for rows, *_ in crops]
        assert sum(lengths) == count and len(lengths) == math.ceil(count / batch_size)
        assert max(lengths) - min(lengths) <= 1 and max(lengths) <= batch_size


@pytest.mark.parametrize(("size", "crop"), [((16, 16), 1), ((16, 16), 16), ((16, 12), 11), ((7, 30), 7)])
def test_every_place_occurs(size, crop):
    seen = Counter()
    for epoch in range(200):
        (_, tops, lefts), = data.random_crops(np.arange(23), size, crop, 23, 0, epoch)
        seen.update(zip(tops.tolist(), lefts.tolist()))
    places = set(itertools.product(range(size[0] - crop + 1), range(size[1] - crop + 1)))
    expected = 4600 / len(places)
    assert set(seen) == places
    assert max(seen.values()) < expected + 6 * expected ** 0.5  # as even as chance has it


@pytest.mark.parametrize("size", [(16, 16), (16, 9), (5, 23)])
def test_grid_covers_every_pixel(size):
    for crop in range(1, min(size) + 1):
        batches = data.grid_crops([4, 0, 22], size, crop, 7)
        rows, tops, lefts = map(np.concatenate, zip(*batches))
        count = math.ceil(size[0] / crop) * math.ceil(size[1] / crop)
        assert rows.tolist() == np.repeat([4, 0, 22], count).tolist()
        assert all(len(batch[0]) == 7 for batch in batches[:-1]) and len(batches[-1][0]) <= 7
        assert min(*tops, *lefts) >= 0 and max(tops) <= size[0] - crop and max(lefts) <= size[1] - crop
        for row in (4, 0, 22):
            covered = np.zeros(size, bool)
            for top, left in zip(tops[rows == row], lefts[rows == row]):
                covered[top:top + crop, left:left + crop] = True
            assert covered.all()


def test_centre_crops():
    batches = data.grid_crops([4, 0, 22], (16, 9), 5, 2, middle=True)
    assert [[values.tolist() for values in batch] for batch in batches] == [
        [[4, 0], [5, 5], [2, 2]], [[22], [5], [2]]]


def test_crops_larger_than_the_patches_are_said():
    for function in (data.random_crops, data.grid_crops):
        seeds = (0, 0) if function is data.random_crops else ()
        with pytest.raises(data.DataError, match="--crop 13: the patches are 16 x 12 px"):
            function(np.arange(5), (16, 12), 13, 2, *seeds)


# ------------------------------------------------------------------------------ loader

@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of 23 patches of 16 x 12 px with labels."""
    folder = tmp_path_factory.mktemp("crops")
    write_tree(folder / "tree", np.random.default_rng(7), 23, (16, 12))
    return data.pack(folder / "tree", folder / "store").path


def some_batches(crop=9, count=13):
    epochs = (data.random_crops(np.arange(23), (16, 12), crop, 5, 1, epoch) for epoch in itertools.count())
    return list(itertools.islice(itertools.chain.from_iterable(epochs), count))


def by_hand(patches, batches, crop, classes=False):
    """What the loader must yield, one slice after another."""
    for rows, tops, lefts in batches:
        crops = []
        for array, pick in zip(patches.arrays[:2 + classes], [*patches.picks[:2], [0]]):
            cut = [array[row][pick, top:top + crop, left:left + crop]
                   for row, top, left in zip(rows, tops, lefts)]
            crops.append(torch.from_numpy(np.stack(cut)))
        yield crops[0], crops[1], crops[2][:, 0] if classes else None, rows


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("bands", [None, ["B8", "VH", "B1"]])
def test_batches_do_not_depend_on_threads_or_where_they_are_cut(store, classes, bands):
    for batches, crop in ((some_batches(), 9), (data.grid_crops(np.arange(23), (16, 12), 7, 6), 7),
                          (data.grid_crops([3, 3, 9], (16, 12), 12, 100, middle=True), 12)):
        expected = list(by_hand(data.Patches(store, bands), batches, crop, classes))
        for threads in (1, 2, 5, None):
            found = list(data.loader(data.Patches(store, bands), batches, crop, "cpu", threads, classes))
            same(found, expected)  # all of them kept: none shares its pixels with another


def test_class_maps_are_read_only_where_asked_for(store, tmp_path, rng):
    patches = data.Patches(store)
    patches.arrays[2] = None
    assert all(classes is None for _, _, classes, _ in data.loader(patches, some_batches(), 9))
    write_tree(tmp_path / "t", rng, 5, labels=False)
    patches = data.pack(tmp_path / "t", tmp_path / "store")
    with pytest.raises(IndexError):  # and not what happened to be in the memory
        list(data.loader(patches, data.grid_crops(patches.rows, (16, 16), 8, 2, middle=True), 8, classes=True))


@pytest.mark.parametrize("threads", [1, 3])
def test_what_runs_ahead_is_bounded(store, threads):
    patches, taken = data.Patches(store), []
    endless = (taken.append(batch) or batch for batch in itertools.cycle(some_batches()))
    feed = data.loader(patches, endless, 9, threads=threads)
    for used in range(1, 30):
        next(feed)
        assert used < len(taken) <= used + threads + 2
    feed.close()
    assert len(taken) <= 29 + threads + 2


def test_an_error_in_a_thread_reaches_the_caller(store):
    before = threading.active_count()
    batches, done = some_batches(), 0
    for rows, *_ in batches:
        rows += 1000 * (22 in rows)
    with pytest.raises(IndexError):
        for _ in data.loader(data.Patches(store), batches, 9, threads=3):
            done += 1
    assert done == [22 in rows for rows, *_ in some_batches()].index(True)  # all before it came
    assert threading.active_count() == before


def test_breaking_off_leaves_no_thread(store):
    before = threading.active_count()
    for k, _ in enumerate(data.loader(data.Patches(store), itertools.cycle(some_batches()), 9, threads=3)):
        assert threading.active_count() > before
        if k == 3:
            break
    assert threading.active_count() == before


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("bands", [None, ["B8", "VH", "B1"]])
def test_the_lines_of_a_batch_are_asked_for_and_no_more(store, monkeypatch, classes, bands):
    asked = []

    def advise(file, start, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((Path(os.readlink(f"/proc/self/fd/{file}")).name, start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    batch = np.array([20, 1, 4, 1]), np.array([2, 0, 7, 5]), np.array([0, 1, 3, 2])
    same(list(data.loader(data.Patches(store, bands), [batch], 9, classes=classes)),
         list(by_hand(data.Patches(store, bands), [batch], 9, classes)))
    picks = {"s1.npy": (2, 2, [1] if bands else range(2)), "s2.npy": (13, 2, [7, 0] if bands else range(13)),
             "classes.npy": (1, 1, [0])}
    expected = []
    for name, (count, size, pick) in [*picks.items()][:2 + classes]:
        for row, top, _ in zip(*batch):
            expected += [(name, 128 + ((row * count + band) * 16 + top) * 12 * size, 9 * 12 * size) for band in pick]
    assert asked == expected


# ------------------------------------------------------------------------------ as a user

def refused(monkeypatch, capsys, *args):
    """Run data.py where it must end with exit status 2 -> its one line."""
    with pytest.raises(SystemExit) as ended:
        data.run(lambda: call(monkeypatch, data, *args))
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(("data.py: error: ", "data.py pack: error: "))
    return line


def test_commands(tmp_path, rng, monkeypatch, capsys):
    tree, out = tmp_path / "my pairs – ü [1]", tmp_path / "a" / "the store %20"
    written = write_tree(tree, rng, 9, layout="plain split")
    (tree / "SIMULATED").touch()
    next(iter(written.values()))["s1"].write_bytes(b"")
    call(monkeypatch, data, "pack", tree, out, "--threads", 1, "--max-bad", 0.2)
    packed = capsys.readouterr().out
    call(monkeypatch, data, "check", out)
    assert capsys.readouterr().out == packed
    patches = data.Patches(out)
    assert patches.simulated and "train: 8\n" in packed
    for published in ("180,662", "986", "5,128", "left out: 1\n", "train/1.10: 1.10.tiff: "):
        assert published in packed
    labels = Counter(patches.labels[patches.rows].tolist())
    for number, count in labels.items():
        name = (*data.CLASSES, *[""] * 247, "no label")[number]
        assert data.re.search(rf" {count} {name}\n", packed)
    stats = patches.stats(patches.rows)
    for sensor, array in zip(("s1", "s2"), patches.arrays):
        values = array[patches.rows] / (100 if sensor == "s1" else 1)
        for band, name in enumerate(patches.bands[sensor]):
            numbers = values[:, band].min(), values[:, band].max(), stats[sensor]["mean"][band]
            line, = (line for line in packed.splitlines() if line.split()[:1] == [name])
            assert [float(text) for text in line.split()[1:4]] == [round(x, 2) for x in numbers]
    call(monkeypatch, show, out, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"


def test_wrong_input_is_one_line_and_exit_status_2(tmp_path, rng, monkeypatch, capsys):
    tree, store, four, empty = (tmp_path / name for name in ("t", "store", "four", "empty"))
    empty.mkdir()
    written = write_tree(tree, rng, 3, layout="plain", bands=(2, 12))
    write_tree(four, rng, 3, layout="plain", bands=(2, 4))
    (tmp_path / "file").touch()
    for words, *command in (
            (f"{tree}: not a whole store.*data.py pack {tree} STORE.*README.*SEN12MS", "check", tree),
            (f"No such file or directory: .*{tmp_path}/none", "pack", tmp_path / "none", store),
            (f"{empty}: no pairs .*README", "pack", empty, store),
            ("9.tif: 4 bands.*legend.json", "pack", four, store),
            ("not above 0", "pack", tree, store, "--threads", 0),
            ("s2-offset", "pack", tree, store, "--s2-offset", -1),
            ("s2-offset", "pack", tree, store, "--s2-offset", 65_536),
            ("File exists", "pack", tree, tmp_path / "file")):
        assert data.re.search(words, refused(monkeypatch, capsys, *command))
        assert not store.exists()
    for files in written.values():
        rewrite(lambda a: a // 64 + 1)(files["s2"])
    assert "cannot be used" in refused(monkeypatch, capsys, "pack", tree, tmp_path / "below", "--s2-offset", 1000)
    for patch, files in enumerate(written.values()):
        rewrite(lambda a, patch=patch: np.full_like(a, 3000 - 2050 * (patch == 0)))(files["s2"])
    patches = data.pack(tree, tmp_path / "store", s2_offset=1000, max_bad=0.4)
    assert [*patches.left_out] == [next(iter(written))] and "nothing is above the offset" in patches.left_out[next(iter(written))]


def test_wrong_input_of_pictures_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "no.tif").write_bytes(b"no")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").touch()
    for words, what in (("not a whole store", tmp_path), ("no.tif", tmp_path / "no.tif"), ("last.pt", tmp_path / "run")):
        with pytest.raises(SystemExit) as ended:
            data.run(lambda what=what: call(monkeypatch, show, what, tmp_path / "out.png"),
                     models.CheckpointError, rasterio.errors.RasterioError)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and words in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out.png").exists()


def test_as_a_process(tmp_path, rng):
    write_tree(tmp_path / "t", rng, 3, layout="plain")
    done = user("data.py", "pack", tmp_path / "t", tmp_path / "store", "--threads", 2)
    assert done.returncode == 0 and "left out: 0" in done.stdout
    assert data.Patches(tmp_path / "store").ids == ["place 1 é 9", "place 2 é 9", "place 3 é 9"]
    done = user("data.py", "check", tmp_path / "t")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"data.py: error: {tmp_path}/t: not a whole store")


@pytest.mark.parametrize(("error", "line"), [
    (data.DataError("what and where"), "what and where"), (OSError(28, "No space left"), "[Errno 28] No space left"),
    (KeyError("mine"), "'mine'")])
def test_expected_errors_are_one_line(error, line, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["/some/where/x.py"])
    with pytest.raises(SystemExit, match="2"):
        data.run(main, KeyError)
    assert capsys.readouterr().err == f"x.py: error: {line}\n"
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        data.run(lambda: 1 / 0)


# ------------------------------------------------------------------------------ pictures

@pytest.mark.parametrize("legend", [None, FLOOD, {"s1": ["HH"], "s2": ["pan"]}])
def test_show_of_any_bands_and_classes(legend, tmp_path, rng, monkeypatch):
    bands = (len(legend["s1"]), len(legend["s2"])) if legend else (2, 13)
    legend_tree(tmp_path / "t", rng, legend or {}, bands)
    (tmp_path / "t/SIMULATED").touch()
    store = data.pack(tmp_path / "t", tmp_path / "store")
    drawn = watch(monkeypatch, show, "draw_pairs")
    call(monkeypatch, show, store.path, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG" and not (tmp_path / "p.part").exists()
    figure = drawn[0][1]
    title = figure.get_suptitle()
    assert "SIMULATED" in title and ("true colour" in title) == (legend is None)
    assert legend is None or legend["s2"][0] in title
    names = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert names == [[*store.classes, *["no label"] * 255][label] for label in store.labels]
