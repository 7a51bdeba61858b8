"""data.py: labels, network input, finding and judging files, crops, its command line."""
import json
import math
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from conftest import call, user

import data

LAYOUTS = {  # files of the place (scene, patch): their path, the codes' sensor, split and the id that comes out
    "release": ("ROIs1158_spring/{s}_{scene}/ROIs1158_spring_{s}_{scene}_p{patch}.tif", "lc", "spring"),
    "archive": ("ROIs2017_winter_{s}/{s}_{scene}/ROIs2017_winter_{s}_{scene}_p{patch}.tif", "lc", "winter"),
    "dfc release": ("ROIs0000_test/{s}_{scene}/ROIs0000_test_{s}_{scene}_p{patch}.tif", "dfc", "test"),
    "dfc split": ("{s}_validation/ROIs0000_validation_{s}_{scene}_p{patch}.tif", "dfc", "validation"),
    "dfc flat": ("{s}/ROIs0000_test_{s}_{scene}_p{patch}.tif", "dfc", "test"),
    "plain": ("{s}/place {scene} é {patch}.tif", "classes", ""),
    "plain split": ("train/{s}/{scene}.{patch}.tiff", "classes", "validation"),
}


def write_tif(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="GTiff", count=len(array), height=array.shape[1], width=array.shape[2],
                       dtype=array.dtype, transform=rasterio.Affine(10, 0, 500_000, 0, -10, 4_000_000)) as tif:
        tif.write(array)


def write_tree(tree, rng, count=12, size=16, layout="release", bands=13, labels=True):
    """Random patches in a layout -> {(scene, patch): {sensor: path}}. size: a side or (height, width)."""
    form, codes, _ = LAYOUTS[layout]
    high, wide = size if isinstance(size, tuple) else (size, size)
    written = {}
    for k in range(count):
        scene, patch = 1 + k % 3, 9 + k // 3  # p9 comes before p10
        images = {"s1": rng.normal(-12, 5, (2, high, wide)).astype(np.float32),
                  "s2": rng.integers(1, 12_000, (bands, high, wide)).astype(np.uint16)}
        if labels:
            images[codes] = np.repeat(rng.integers(0, 12, (4 if codes == "lc" else 1, high // 4, wide)), 4, 1).astype(np.uint8)
        written[scene, patch] = {s: Path(tree) / form.format(s=s, scene=scene, patch=patch) for s in images}
        for sensor, image in images.items():
            write_tif(written[scene, patch][sensor], image)
    return written


def rewrite(path, change):
    with rasterio.open(path) as tif:
        array = tif.read()
    write_tif(path, change(array))


def with_value(value):
    def change(array):
        array[0, 3, 5] = value
        return array
    return change


BAD = {  # how to spoil a file -> the sensor, what is done to it, words of the reason
    "bands": ("s2", lambda p: rewrite(p, lambda a: a[:11]), "11 bands, not 13"),
    "size": ("s1", lambda p: rewrite(p, lambda a: a[:, :-2]), "14 x 16 px, not 16 x 16"),
    "label size": ("lc", lambda p: rewrite(p, lambda a: a[:, :, 1:]), "16 x 15 px, not 16 x 16"),
    "type": ("s2", lambda p: rewrite(p, lambda a: a.astype(np.float32)), "wrong data type float32"),
    "truncated": ("s2", lambda p: os.truncate(p, p.stat().st_size // 2), "truncated"),
    "empty": ("s1", lambda p: p.write_bytes(b""), "empty file"),
    "no TIFF": ("s1", lambda p: p.write_text("<html>please log in</html>"), "not a TIFF"),
    "NaN": ("s1", lambda p: rewrite(p, with_value(np.nan)), "NaN or infinite"),
    "infinite": ("s1", lambda p: rewrite(p, with_value(-np.inf)), "NaN or infinite"),
    "zero": ("s2", lambda p: rewrite(p, np.zeros_like), "all zero (nodata)"),
    "negative": ("s2", lambda p: rewrite(p, lambda a: with_value(-1)(a.astype(np.int32))), "outside 0..65535"),
    "dangling": ("s2", lambda p: (p.unlink(), p.symlink_to("gone")), "cannot be opened"),
    "partner": ("s1", lambda p: p.unlink(), "no s1 file"),
    "label": ("lc", lambda p: p.unlink(), "no label file"),
}


def spoil(written, rng):
    """One patch of each kind of BAD, at random places -> {id: words of the reason}."""
    places, expected = list(written), {}
    for (scene, patch), (sensor, damage, words) in zip(rng.permutation(places), BAD.values()):
        damage(written[scene, patch][sensor])
        expected[f"ROIs1158_spring_{scene}_p{patch}"] = words
    return expected


@pytest.fixture
def rng(request):
    return np.random.default_rng(len(request.node.name))


def clones(batches):
    return [[tensor.clone() for tensor in batch] for batch in batches]


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(x, y, strict=True))


# ---------------------------------------------------------------------------------------------- labels and input

def test_golden_labels(shared):
    golden = np.load(shared / "golden/labels.npz")
    classes = data.classes_from_dfc(golden["dfc_raw"])
    assert classes.dtype == np.uint8 and (classes == golden["classes"]).all()
    assert data.single_label(classes).tolist() == golden["single"].tolist()
    assert (data.multi_label(classes) == golden["multi"]).all()


def test_golden_input(shared):
    golden = np.load(shared / "golden/preprocess.npz")
    s1 = torch.from_numpy(np.rint(golden["s1_raw"] * 100).astype(np.int16))[None]
    x1, x2 = data.to_input(s1, torch.from_numpy(golden["s2_raw"])[None], "patch-max")
    assert (x1[0] - torch.from_numpy(golden["s1"])).abs().max() <= 2 * 0.00501 / (golden["s1_raw"].max((1, 2)).min() + 25)
    assert torch.allclose(x2[0], torch.from_numpy(golden["s2"]), rtol=1e-6, atol=0)


def test_codes():
    assert data.classes_from_dfc(np.arange(12)).tolist() == [255, 0, 1, 255, 2, 3, 4, 5, 255, 6, 7, 255]
    expected = [255, 0, 0, 0, 0, 0, 1, 1, 255, 255, 2, 3, 4, 5, 4, 255, 6, 7, 255]  # IGBP 0..18
    assert data.classes_from_igbp(np.arange(19, dtype=np.uint16)).tolist() == expected
    for function in (data.classes_from_dfc, data.classes_from_igbp):
        assert (function(np.array([-1, 255, 256, 266, 65535])) == 255).all()


@pytest.mark.parametrize("seed", range(20))
def test_labels_by_counting(seed):
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(9, 0.4))
    h, w = rng.integers(1, 30, 2)
    classes = rng.choice([*range(8), 255], (5, h, w), p=share).astype(np.uint8)
    single, multi = data.single_label(classes), data.multi_label(classes)
    assert single.dtype == np.int64 and multi.dtype == np.float32 and multi.shape == (5, 8)
    for patch, label, several in zip(classes, single, multi):
        counts = Counter(patch.ravel().tolist())
        assert counts[label] == max(counts.values())
        assert several.tolist() == [float(10 * counts[c] >= h * w) for c in range(8)]
    assert torch.equal(data.single_label(torch.from_numpy(classes)), torch.from_numpy(single))
    assert torch.equal(data.multi_label(torch.from_numpy(classes)), torch.from_numpy(multi))


def test_a_class_on_exactly_a_tenth_counts():
    classes = np.zeros((2, 10, 10), np.uint8)
    classes[0, 0], classes[1, 0, 1:], classes[:, 5:] = 3, 3, 255
    assert data.multi_label(classes)[:, 3].tolist() == [1, 0] and data.single_label(classes).tolist() == [255, 255]


@pytest.mark.parametrize("seed", range(5))
def test_to_input(seed):
    rng = np.random.default_rng(seed)
    s1 = torch.from_numpy(rng.integers(-4000, 1500, (4, 2, 9, 7)).astype(np.int16))
    s2 = torch.from_numpy(rng.integers(0, 20_000, (4, 13, 9, 7)).astype(np.uint16))
    s1[0, 0], s1[1, 1], s1[2] = data.MISSING, -700, 0
    s2.view(torch.int16)[0, 0], s2.view(torch.int16)[1, 5] = 0, 1234
    db, reflectance = s1.double() / 100, s2.double()
    clipped = db.clamp(-25, 0) + 25, reflectance.clamp(0, 10_000)
    stats = {"s1": {"mean": [-12.5, -19], "std": [4.0, 0]}, "s2": {"mean": [*range(900, 913)], "std": [*range(12), 0]}}
    expected = {"patch-max": [x / (x.amax((2, 3), keepdim=True) + 1e-5) for x in clipped],
                "fixed": [clipped[0] / 25, clipped[1] / 10_000]}
    expected["standard"] = [
        torch.stack([(x[:, c] - s["mean"][c]) / (s["std"][c] or 1) for c in range(x.shape[1])], 1)
        for x, s in ((db, stats["s1"]), (reflectance, stats["s2"]))]
    expected["standard"][0][s1 == data.MISSING] = 0
    for scale in data.SCALES:
        for x, y in zip(data.to_input(s1, s2, scale, stats), expected[scale], strict=True):
            assert x.dtype == torch.float32 and x.isfinite().all()
            assert torch.allclose(x.double(), y, rtol=1e-5, atol=1e-5)
    with pytest.raises(data.DataError, match="patch-max, fixed, standard"):
        data.to_input(s1, s2, "minmax")


def test_what_is_not_finite_is_missing():
    s1, s2 = torch.full((1, 2, 3, 3), -12.0), torch.full((1, 13, 3, 3), 700.0)
    stats = {"s1": {"mean": [-12.5, -19], "std": [0.1, 0.1]}, "s2": {"mean": [900] * 13, "std": [0.1] * 13}}
    for value in (float("nan"), float("inf"), float("-inf")):
        s1[0, 0, 0, 0] = s2[0, 4, 1, 1] = value
        for scale in data.SCALES:
            a, b = data.to_input(s1, s2, scale, stats)
            assert a.isfinite().all() and b.isfinite().all() and a[0, 0, 0, 0] == 0


def test_bands_and_their_order_are_checked():
    bands = {"s1": data.S1_BANDS, "s2": data.S2_BANDS}
    s1, s2 = torch.zeros(1, 2, 3, 3), torch.zeros(1, 13, 3, 3)
    data.to_input(s1, s2, "fixed", bands=bands, names=bands)
    with pytest.raises(data.DataError, match="s2 has 12 channels, not 13: B1 B2"):
        data.to_input(s1, s2[:, 1:], "fixed", bands=bands)
    with pytest.raises(data.DataError, match="s1 has VH VV, the encoder takes VV VH: reorder"):
        data.to_input(s1, s2, "fixed", bands=bands, names={**bands, "s1": ["VH", "VV"]})


# ---------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path, rng):
    written = write_tree(tmp_path / "t", rng, 7, layout=layout)
    patches, (form, codes, split) = data.open_data(tmp_path / "t", workers=0), LAYOUTS[layout]
    assert len(patches) == 7 and set(patches.splits) == {split} and patches.size == (16, 16) and not patches.simulated
    for row, key in enumerate(sorted(written, key=lambda key: str(written[key]) if "plain" in layout else key)):
        name = Path(form.format(s="s1", scene=key[0], patch=key[1])).name
        stem = name.replace("_s1_", "_").rpartition(".")[0]
        assert patches.ids[row] == (f"{split}/{stem}".lstrip("/") if "plain" in layout else stem)
        with rasterio.open(written[key]["s1"]) as tif:
            s1 = np.rint(tif.read() * 100).astype(np.int16)
        with rasterio.open(written[key]["s2"]) as tif:
            s2 = tif.read()
        with rasterio.open(written[key][codes]) as tif:
            classes = (data.classes_from_igbp if codes == "lc" else data.classes_from_dfc)(tif.read(1))
        for x, y in zip(patches.window(row, slice(2, 9), slice(0, 16)), (s1, s2, classes), strict=True):
            assert x.dtype == y.dtype and (x == y[..., 2:9, :]).all()
        assert patches.labels[row] == data.single_label(classes[None])[0]


def test_scenes_and_seasons(tmp_path, rng):
    for layout in ("release", "archive"):
        write_tree(tmp_path, rng, 9, layout=layout)
    places, _ = data.find_patches(tmp_path, seasons=["winter"])
    assert {place.split for place in places} == {"winter"} and len(places) == 9
    places, _ = data.find_patches(tmp_path, limit=6)
    assert Counter(data.scene_of(place.id) for place in places) == {
        f"{season}_{scene}": 1 for season in ("ROIs1158_spring", "ROIs2017_winter") for scene in (1, 2, 3)}
    with pytest.raises(data.DataError, match="no pairs found of sumer"):
        data.find_patches(tmp_path, seasons=["sumer"])
    copy = tmp_path / "copy/ROIs1158_spring_s1_1_p9.tif"
    copy.parent.mkdir()
    copy.write_bytes(b"")
    with pytest.raises(data.DataError, match="same patch"):
        data.find_patches(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_bad_files_by_name(seed, tmp_path):
    rng = np.random.default_rng(seed)
    expected = spoil(write_tree(tmp_path / "t", rng, 40), rng)
    with pytest.raises(data.DataError, match="--max-bad allows 1.0%"):
        data.open_data(tmp_path / "t", workers=0)
    tree = data.open_data(tmp_path / "t", workers=0, max_bad=0.5)
    assert tree.index["left_out"].keys() == expected.keys()
    for patch, words in expected.items():
        assert words in tree.index["left_out"][patch]
    data.pack(tmp_path / "t", tmp_path / "store", workers=0, max_bad=0.5)
    store = data.open_data(tmp_path / "store")
    assert store.ids == tree.ids and len(store) == 40 - len(BAD) and store.index["left_out"] == tree.index["left_out"]
    assert store.labels.tolist() == tree.labels.tolist() and store.stats({"spring"}) == tree.stats({"spring"})
    for patches in (tree, store, data.open_data(tmp_path / "store", cache="ram"),
                    data.open_data(tmp_path / "t", cache="device", workers=0, max_bad=0.5)):
        crops = data.RandomCrops(patches, np.arange(len(patches)), 9, 5, seed)
        batches = clones(crops[step] for step in range(2 * crops.steps))
        if patches is tree:
            reference = batches
        same(batches, reference)


def test_wrong_input_is_said(tmp_path, rng):
    with pytest.raises(data.DataError, match="no such folder.*mediaTUM"):
        data.open_data(tmp_path / "missing")
    with pytest.raises(data.DataError, match="no pairs found"):
        data.open_data(tmp_path)
    write_tree(tmp_path / "four", rng, 5, bands=4)
    with pytest.raises(data.DataError, match="13 bands .* or 12"):
        data.open_data(tmp_path / "four")
    write_tree(tmp_path / "t", rng, 5)
    patches = data.open_data(tmp_path / "t", workers=0)
    for crops in (data.RandomCrops, data.GridCrops):
        with pytest.raises(data.DataError, match="--crop 17: .* 16 x 16 px"):
            crops(patches, range(5), 17, 2, *[0] * (crops is data.RandomCrops))


def test_bands(tmp_path, rng):
    write_tree(tmp_path, rng, 6, bands=12, labels=False)  # L2A has no B10
    patches = data.open_data(tmp_path, workers=0)
    assert patches.labels is None and patches.bands["s2"] == [band for band in data.S2_BANDS if band != "B10"]
    with pytest.raises(data.DataError, match="no band B10; it has VV VH B1 .* B12"):
        data.open_data(tmp_path, ["VV", "B10"], workers=0)
    whole = [slice(0, 16)] * 2
    s1, s2, _ = patches.window(4, *whole)
    stats = patches.stats({"spring"})
    data.pack(tmp_path, tmp_path / "store", 0)
    for path, cache in ((tmp_path, None), (tmp_path / "store", None), (tmp_path / "store", "ram"), (tmp_path, "device")):
        some = data.open_data(path, ["B12", "VH", "B4"], cache, workers=0)
        assert some.bands == {"s1": ["VH"], "s2": ["B12", "B4"]}
        a, b, classes = some.crops([4], [0], [0], 16)
        assert (a[0].numpy() == s1[1:]).all() and (b[0].numpy() == s2[[11, 3]]).all() and (classes == 255).all()
        assert some.stats({"spring"})["s2"]["mean"] == [stats["s2"]["mean"][k] for k in (11, 3)]


# ---------------------------------------------------------------------------------------------- crops

@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of 23 patches of 16 px with labels."""
    folder = tmp_path_factory.mktemp("crops")
    write_tree(folder / "tree", np.random.default_rng(7), 23, layout="dfc release")
    data.pack(folder / "tree", folder / "store", 0)
    return folder / "store"


def test_crops_are_a_function_of_seed_and_step(store):
    def draw(seed, steps, **parts):
        crops = data.RandomCrops(data.open_data(store), np.arange(23), 11, 5, seed, **parts)
        return clones(crops[step] for step in steps)

    forwards = draw(3, range(12))
    same(draw(3, reversed(range(12)))[::-1], forwards)  # resuming in the middle of an epoch is a special case of this
    assert not any(torch.equal(a[3], b[3]) for a, b in zip(draw(4, range(12)), forwards))
    for batches in (forwards[:5], forwards[5:10]):  # two epochs, each of them every patch once, in another order
        assert torch.cat([batch[3] for batch in batches]).sort().values.tolist() == list(range(23))
    assert not torch.equal(forwards[0][3], forwards[5][3])
    assert data.RandomCrops(data.open_data(store), np.arange(23), 11, 5, 0, drop_last=True).steps == 4
    assert all(len(batch[3]) == 5 for batch in draw(3, range(8), drop_last=True))
    for step in range(8):
        parts = [draw(3, [step], drop_last=True, rank=rank, world=3)[0] for rank in range(3)]
        same([[torch.cat(part) for part in zip(*parts)]], draw(3, [step], drop_last=True))


@pytest.mark.parametrize("size", [1, 15, 16])
def test_every_offset_occurs(store, size):
    patches, seen = data.open_data(store), Counter()
    patches.crops = lambda rows, tops, lefts, size: seen.update(zip(tops.tolist(), lefts.tolist())) or ()
    crops = data.RandomCrops(patches, np.arange(23), size, 23, 0)
    for step in range(200):
        crops[step]
    side = 17 - size
    assert set(seen) == {(y, x) for y in range(side) for x in range(side)}
    assert max(seen.values()) < 4600 / side**2 + 6 * (4600 / side**2) ** 0.5  # as even as chance has it


@pytest.mark.parametrize("size", range(1, 17))
def test_grid_covers_every_pixel(store, size):
    patches = data.open_data(store)
    rows = np.array([4, 0, 22])
    grid = data.GridCrops(patches, rows, size, 7)
    covered = np.zeros((16, 16), int)
    for top, left in grid.places:
        assert 0 <= top <= 16 - size and 0 <= left <= 16 - size
        covered[top:top + size, left:left + size] += 1
    assert covered.all() and len(grid.places) == math.ceil(16 / size) ** 2
    batches = clones(grid[k] for k in range(len(grid)))
    s2, row = (torch.cat([batch[k] for batch in batches]).numpy() for k in (1, 3))
    assert row.tolist() == np.repeat(rows, len(grid.places)).tolist()
    k = len(s2) - 2
    top, left = grid.places[k % len(grid.places)]
    assert (s2[k] == patches.window(row[k], slice(top, top + size), slice(left, left + size))[1]).all()


def test_worker_counts_and_caches_agree(store):
    for make in (lambda p: data.RandomCrops(p, np.arange(23), 11, 5, 1), lambda p: data.GridCrops(p, np.arange(23), 10, 6)):
        reference = None
        for workers, cache, path in ((0, None, store), (1, None, store), (3, None, store), (2, "ram", store),
                                     (2, "device", store), (3, None, store.parent / "tree")):
            dataset = make(data.open_data(path, cache=cache, workers=0))
            batches = clones(data.loader(dataset, range(2, 15), workers, torch.device("cpu")))
            reference = reference or batches
            same(batches, reference)
    assert len(reference) == 13


def test_a_batch_outlives_the_next(store):
    """Buffers are used again: nobody may be surprised sooner than documented."""
    crops = data.RandomCrops(data.open_data(store), np.arange(23), 11, 5, 1)
    for workers in (0, 1, 2):
        expected, recent = clones(crops[step] for step in range(20)), []
        for step, batch in enumerate(data.loader(crops, range(20), workers)):
            recent = [*recent, batch][-2:]
            same(recent, expected[max(0, step - 1):step + 1])


def test_a_store_larger_than_memory_is_read_ahead(store, monkeypatch):
    expected = clones([data.open_data(store).crops([3, 1], [2, 0], [0, 5], 11)])
    sysconf, asked = os.sysconf, []
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else sysconf(name))
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *where: asked.append((os.readlink(f"/proc/self/fd/{file}"), *where)))
    same([data.open_data(store).crops([3, 1], [2, 0], [0, 5], 11)], expected)
    for name, bands, size in (("s1", 2, 2), ("s2", 13, 2), ("classes", 1, 1)):
        starts = [128 + ((row * bands + band) * 16 + top) * 16 * size for row, top in ((1, 0), (3, 2)) for band in range(bands)]
        assert [where for file, *where in asked if file.endswith(f"/{name}.npy")] == [
            [start, 11 * 16 * size, os.POSIX_FADV_WILLNEED] for start in starts]


def test_cache_that_does_not_fit(store, monkeypatch):
    read_text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: "MemAvailable: 12 kB\n" if str(path) == "/proc/meminfo" else
                        read_text(path))
    with pytest.raises(data.DataError, match="--cache ram: .* GB are free"):
        data.open_data(store, cache="ram")


# ---------------------------------------------------------------------------------------------- as a user

def test_commands(tmp_path, rng, monkeypatch, capsys):
    tree, out = tmp_path / "my pairs ü", tmp_path / "the store"
    write_tree(tree, rng, 9, layout="plain split")
    (tree / "SIMULATED").touch()
    call(monkeypatch, data, "pack", tree, out, "--workers", 0)
    packed = capsys.readouterr().out
    call(monkeypatch, data, "check", tree, "--workers", 0)
    assert capsys.readouterr().out in packed and "9 of 986 published" in packed
    read, calls = data.read_patch, []
    monkeypatch.setattr(data, "read_patch", lambda *args: (calls.append(1), read(*args))[1])
    call(monkeypatch, data, "show", tree, tmp_path / "p.png", "--workers", 0, "--count", 2)
    assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG" and len(calls) == 4  # to judge and to draw two of nine
    os.truncate(tree / "train/s1/1.9.tiff", 100)
    with pytest.raises(data.DataError, match="1 of 9 patches cannot be used"):
        call(monkeypatch, data, "check", tree, "--workers", 0)
    assert "validation/1.9: 1.9.tiff: truncated" in capsys.readouterr().out


class Dying(torch.utils.data.Dataset):
    def __getitem__(self, item):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_reader_that_dies_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        data.run(lambda: list(data.make_loader(Dying(), range(4), 1)))
    said = capsys.readouterr().err
    assert "DataLoader worker" in said and "--workers" in said and said.count("\n") == 1


def test_codes_of_any_integer_type():
    for dtype in (np.int8, np.uint8, np.int16, np.int64):
        codes = np.array([1, 10, 3, 0, 100, -1 if np.dtype(dtype).kind == "i" else 99]).astype(dtype)
        assert data.classes_from_dfc(codes).tolist() == [0, 7, 255, 255, 255, 255]
        assert data.classes_from_igbp(codes).tolist() == [0, 2, 0, 255, 255, 255]  # 3 is a forest there, 10 grassland


def test_error_in_one_line(tmp_path):
    done = user("data.py", "check", tmp_path)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"data.py: error: {tmp_path}: no pairs found")


@pytest.mark.parametrize("name", ["sen12ms", "dfc2020"])
def test_real_pairs(shared, name, tmp_path, monkeypatch, capsys):
    call(monkeypatch, data, "check", shared / "real" / name, "--workers", 0)
    checked = capsys.readouterr().out
    assert "left out: 0" in checked and checked.count("no usable label in any") == (2 if name == "dfc2020" else 0)
    if name == "dfc2020":
        assert "ROIs0000_test_4: no usable label" in checked and "40 of 5,128" in checked
    call(monkeypatch, data, "pack", shared / "real" / name, tmp_path / "store", "--workers", 1)
    assert checked in capsys.readouterr().out
    assert json.loads((tmp_path / "store/index.json").read_text())["patches"] == (80 if name == "dfc2020" else 36)
    call(monkeypatch, data, "show", tmp_path / "store", tmp_path / "p.png", "--count", 3)
    assert (tmp_path / "p.png").stat().st_size > 10_000
