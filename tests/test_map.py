"""finetune.py --save and --map: trained classifiers kept, and maps of whole scenes made with them."""
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import show
import torch
from click.testing import CliRunner
from conftest import CONTEXT, as_main, call, folder, user, watch
from rasterio.enums import ColorInterp
from rasterio.rio.main import main_group
from test_data import GRIDS
from test_data import write_tif as write_tif_there
from test_finetune import tune

import data
import finetune
import linear_eval
import models

CRS, TRANSFORM = "EPSG:32633", rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
BANDS = {"s1": data.S1_BANDS, "s2": data.S2_BANDS}


write_tif = functools.partial(write_tif_there, crs=CRS, transform=TRANSFORM)


def make_scene(height=150, width=170, bands=BANDS, seed=0):
    """-> random images of both sensors with fields of 8 px."""
    rng = np.random.default_rng(seed)

    def smooth(count):
        coarse = rng.normal(size=(count, height // 8 + 2, width // 8 + 2))
        fine = np.kron(coarse, np.ones((8, 8)))[:, :height, :width]
        return fine + rng.normal(0, 0.3, fine.shape)

    s1 = (smooth(len(bands["s1"])) * 4 - 12).astype(np.float32)
    s1[1:] -= 6  # VH is the darker
    s2 = (smooth(len(bands["s2"])) * 400 + 2000).clip(1, 9000).astype(np.uint16)
    if "B10" in bands["s2"]:
        s2[bands["s2"].index("B10")] = rng.integers(1, 30, s2.shape[1:])  # and B9 is far above
    return s1, s2


def write_scene(tmp, *args, **kwargs):
    """make_scene() as files S1.tif and S2.tif -> the arrays."""
    images = make_scene(*args, **kwargs)
    for name, image in zip(("S1", "S2"), images):
        write_tif(tmp / f"{name}.tif", image)
    return images


@pytest.fixture
def scene(tmp_path):
    """S1.tif and S2.tif of 150 x 170 px and an untrained classifier, c.pt -> the arrays."""
    write_classifier(tmp_path / "c.pt")
    return write_scene(tmp_path)


def write_classifier(path, method="late-fusion", task="single", bands=BANDS, classes=data.CLASSES,
                     crop=32, scale="fixed"):
    """A classifier that was never trained, its last layer such that all classes occur."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return shutil.copy(classifier(method, task, json.dumps(bands), tuple(classes), crop, scale), path)


@functools.cache
def classifier(method, task, bands, classes, crop, scale):
    """-> its file, which lasts as long as the tests."""
    torch.manual_seed(0)
    bands, name = json.loads(bands), f"classifier{len(list(folder().glob('classifier*')))}.pt"
    model = models.Classifier(models.make_encoders(method, bands), len(classes)).eval()
    stats = {sensor: {"mean": [-12.0 if sensor == "s1" else 2000.0] * len(names),
                      "std": [4.0 if sensor == "s1" else 400.0] * len(names)} for sensor, names in bands.items()}
    images = [torch.from_numpy(image.astype(np.float32)) for image in make_scene(bands=bands, seed=9)]
    with torch.no_grad():
        crops = [torch.stack([image[:, k:k + crop, k:k + crop] for k in range(0, 150 - crop, 4)]) for image in images]
        logits = model(*models.to_input(*crops, scale, stats))
        model.fc.weight.div_(logits.std(0)[:, None])
        model.fc.bias.sub_(logits.mean(0)).div_(logits.std(0))
    models.save_checkpoint(folder() / name, model, method=method, arch="resnet18", bands=bands, scale=scale,
                           stats=stats, classes=list(classes), simulated=True, task=task, crop=crop, args={})
    return folder() / name


def map_options(tmp, *options, out="map.tif", **scene):
    """What makes a map of S1.tif and S2.tif, or of the files s1=, s2=, None for none."""
    files = {"map": out, "classifier": "c.pt", "s1": "S1.tif", "s2": "S2.tif", **scene}
    named = ((f"--{option}", tmp / name) for option, name in files.items() if name)
    return (*itertools.chain(*named), "--precision", "float32", *options)


def make_map(monkeypatch, tmp, *options, out="map.tif", **scene):
    call(monkeypatch, finetune, *map_options(tmp, *options, out=out, **scene))
    with rasterio.open(tmp / out) as tif:
        return tif.read()


def expected(tmp, s1, s2, top, left):
    """What the classifier says of one crop, as a user would ask it."""
    model, scaling, _ = models.load_classifier(tmp / "c.pt")
    crop = models.load_checkpoint(tmp / "c.pt")["crop"]
    a, b = (image[None, :, top:top + crop, left:left + crop] for image in (s1, s2))
    return model(*models.to_input(a, b.astype(np.float32), **scaling))[0]


# -------------------------------------------------------------------------------------- the pixels

@pytest.mark.parametrize(("step", "method", "scale"), [(16, "late-fusion", "fixed"), (7, "early-fusion", "standard"),
                                                       (32, "mma", "patch-max"), (16, "only-s2", "standard")])
def test_pixels_are_what_the_classifier_says_of_their_windows(tmp_path, monkeypatch, step, method, scale):
    s1, s2 = write_scene(tmp_path)
    write_classifier(tmp_path / "c.pt", method, scale=scale)
    labels, = make_map(monkeypatch, tmp_path, "--step", step)
    assert labels.shape == s1.shape[1:] and len(np.unique(labels)) > 2 and labels.max() < 8
    rng, seen = np.random.default_rng(1), set()
    for top in rng.choice(range(0, 150 - 32, step), 3):
        for left in rng.choice(range(0, 170 - 32, step), 3):
            label = expected(tmp_path, s1, s2, top, left).argmax()
            m = (32 - step) // 2
            assert (labels[top + m:top + m + step, left + m:left + m + step] == label.item()).all()
            seen.add(label.item())
    assert len(seen) > 1


def test_margins_are_of_the_windows_at_the_edge(tmp_path, monkeypatch):
    s1, s2 = write_scene(tmp_path, 85, 100)
    write_classifier(tmp_path / "c.pt")
    labels, = make_map(monkeypatch, tmp_path)
    for rows, top in ((slice(0, 24), 0), (slice(72, 85), 53)):
        for columns, left in ((slice(0, 24), 0), (slice(88, 100), 68)):
            assert (labels[rows, columns] == expected(tmp_path, s1, s2, top, left).argmax().item()).all()


def test_the_height_of_a_strip_changes_no_pixel(scene, tmp_path, monkeypatch):
    usual = make_map(monkeypatch, tmp_path)
    for strip in (1, 50):
        monkeypatch.setattr(finetune, "STRIP", strip)
        assert np.array_equal(make_map(monkeypatch, tmp_path, "--batch-size", 7), usual)


def test_windows_cover_every_pixel_once():
    for length, step in itertools.product(range(32, 80, 5), (1, 5, 16, 31, 32)):
        starts, bounds = finetune.windows(length, 32, step)
        assert bounds[0] == 0 and bounds[-1] == length and (np.diff(bounds) > 0).all()
        assert len(bounds) == len(starts) + 1
        assert starts[0] == 0 and starts[-1] == length - 32
        for start, first, end in zip(starts, bounds, bounds[1:]):
            assert start <= first and end <= start + 32  # what a window is asked for, it sees
        assert (np.diff(bounds)[1:-2] == step).all()


def test_several_labels_are_a_band_each_in_percent(tmp_path, monkeypatch):
    s1, s2 = write_scene(tmp_path)
    write_classifier(tmp_path / "c.pt", task="multi")
    shares = make_map(monkeypatch, tmp_path)
    assert shares.shape == (8, 150, 170) and shares.max() <= 100
    percent = 100 * expected(tmp_path, s1, s2, 16, 32).sigmoid().numpy()
    assert np.abs(shares[:, 32, 48] - percent).max() < 0.51
    with rasterio.open(tmp_path / "map.tif") as tif:
        assert tif.descriptions == tuple(f"{name}, %" for name in data.CLASSES) and tif.nodata == 255


# ---------------------------------------------------------------------------------- what the file says

def test_a_map_has_the_grid_the_colours_and_the_names(scene, tmp_path, monkeypatch):
    make_map(monkeypatch, tmp_path)
    with rasterio.open(tmp_path / "map.tif") as tif:
        assert tif.crs == CRS and tif.transform == TRANSFORM and tif.dtypes == ("uint8",) and tif.nodata == 255
        assert [tif.tags()[f"class_{k}"] for k in range(8)] == data.CLASSES and tif.tags()["simulated"] == "True"
        assert tif.colormap(1)[7] == (0x2b, 0x6c, 0xb0, 255)  # water
    assert sorted(path.name for path in tmp_path.iterdir()) == ["S1.tif", "S2.tif", "c.pt", "map.tif"]


@pytest.mark.parametrize("task, classes, beside", [
    ("single", data.CLASSES, ["s2"]), ("multi", data.CLASSES, ["s1", "s2"]), ("single", [*"abcdefghij"], [])])
def test_a_picture_has_the_values_names_and_colours_of_its_map(task, classes, beside, tmp_path, monkeypatch):
    write_scene(tmp_path)
    write_classifier(tmp_path / "c.pt", task=task, classes=classes)
    values = make_map(monkeypatch, tmp_path)
    scene = {sensor: tmp_path / f"{sensor.upper()}.tif" for sensor in beside}
    figure = show.draw_map(tmp_path / "map.tif", scene)
    *left, right, legend = figure.axes
    expected = np.where(values[0] == 255, 255, values.argmax(0)) if task == "multi" else values[0]
    assert (right.images[0].get_array().filled(255) == expected).all()
    assert [text.get_text() for text in legend.get_yticklabels()] == list(classes)
    assert right.get_title() == "SIMULATED data LateFusion"
    titles = {"s1": "VV of Sentinel-1", "s2": "Sentinel-2, true colour"}
    assert [axis.get_title() for axis in left] == [titles[sensor] for sensor in beside]
    if task == "single":  # the picture has the colours of the file
        with rasterio.open(tmp_path / "map.tif") as tif:
            table = [tif.colormap(1)[number] for number in range(len(classes))]
        drawn = right.images[0].cmap(range(len(classes)), bytes=True)
        assert drawn.tolist() == list(map(list, table))
    call(monkeypatch, show, tmp_path / "map.tif", tmp_path / "map.png",
         *itertools.chain(*((f"--{sensor}", path) for sensor, path in scene.items())))
    assert (tmp_path / "map.png").read_bytes()[1:4] == b"PNG"


def test_a_picture_of_a_scene_believes_its_file_and_overwrites_no_scene(tmp_path, monkeypatch):
    _, s2 = write_scene(tmp_path)
    write_classifier(tmp_path / "c.pt")
    make_map(monkeypatch, tmp_path)
    true_colour = show.draw_map(tmp_path / "map.tif", {"s2": tmp_path / "S2.tif"}).axes[0].images[0].get_array()
    alpha = np.full((1, *s2.shape[1:]), 65535, s2.dtype)
    write_tif(tmp_path / "alpha.tif", np.concatenate((s2, alpha)))  # as gdalwarp -dstalpha does
    with rasterio.open(tmp_path / "alpha.tif", "r+") as tif:
        tif.colorinterp = [*tif.colorinterp[:-1], ColorInterp.alpha]
    axis = show.draw_map(tmp_path / "map.tif", {"s2": tmp_path / "alpha.tif"}).axes[0]
    assert axis.get_title() == "Sentinel-2, true colour" and np.array_equal(axis.images[0].get_array(), true_colour)
    write_tif(tmp_path / "two.tif", s2[:2])
    assert show.draw_map(tmp_path / "map.tif", {"s2": tmp_path / "two.tif"}).axes[0].get_title() == (
        "Sentinel-2, false colour #1 #2 #1")
    write_tif(tmp_path / "three.tif", s2[:3])  # nameless: not B4 B3 B2 because these are asked for
    assert show.draw_map(tmp_path / "map.tif", {"s2": tmp_path / "three.tif"}).axes[0].get_title() == (
        "Sentinel-2, false colour #1 #2 #3")
    for name, band in zip(("B02", "B08", "B12"), s2):
        write_tif(tmp_path / f"x_{name}.tif", band[None])
    bands = [f'<VRTRasterBand dataType="UInt16" band="{k}"><SimpleSource><SourceFilename relativeToVRT="1">x_{name}.tif'
             "</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
             for k, name in enumerate(("B02", "B08", "B12"), 1)]
    (tmp_path / "x.vrt").write_text(f'<VRTDataset rasterXSize="170" rasterYSize="150">{"".join(bands)}</VRTDataset>')
    assert show.draw_map(tmp_path / "map.tif", {"s2": tmp_path / "x.vrt"}).axes[0].get_title() == (
        "Sentinel-2, false colour B2 B8 B12")
    write_tif(tmp_path / "small.tif", s2[:, :40])
    with pytest.raises(data.DataError, match="not on one grid"):
        show.draw_map(tmp_path / "map.tif", {"s2": tmp_path / "small.tif"})
    before = (tmp_path / "S2.tif").read_bytes()
    result = user("tests/show.py", tmp_path / "map.tif", tmp_path / "S2.tif")
    assert result.returncode == 2 and "ends in .png" in result.stderr and (tmp_path / "S2.tif").read_bytes() == before


# ------------------------------------------------------------------------------------------ no data

def test_what_either_sensor_did_not_see_is_255(scene, tmp_path, monkeypatch):
    (s1, s2), usual = scene, make_map(monkeypatch, tmp_path)
    s1[:, 10:20, 10:30], s1[0, 40:45, :5], s2[:, 60:70, 100:] = np.nan, -np.inf, 0
    s1[:, 100:110, 90:100] = -9999
    write_tif(tmp_path / "S1.tif", s1, nodata=-9999)
    s2[3, 80:90] = 0  # one dark band is data, also where 0 stands for none
    write_tif(tmp_path / "S2.tif", s2, nodata=0)
    labels, = make_map(monkeypatch, tmp_path)
    holes = np.zeros((150, 170), bool)
    holes[10:20, 10:30] = holes[40:45, :5] = holes[60:70, 100:] = holes[100:110, 90:100] = True
    assert ((labels == 255) == holes).all() and (labels[142:] == usual[0, 142:]).all()
    write_tif(tmp_path / "S2.tif", np.zeros_like(s2))  # no data at all
    assert (make_map(monkeypatch, tmp_path) == 255).all()


def test_the_tip_of_a_swath_over_a_town_is_not_taken_for_power(scene, tmp_path, monkeypatch):
    s1, _ = scene
    s1[:, 5:] = np.nan
    s1[0, :5], s1[1, :5] = 3, -4
    write_tif(tmp_path / "S1.tif", s1)
    labels, = make_map(monkeypatch, tmp_path)
    assert (labels[:5] < 255).all() and (labels[5:] == 255).all()


# -------------------------------------------------------------------------------- bands and offset

def test_offset_of_baseline_0400_is_found_by_the_cirrus_band(scene, tmp_path, monkeypatch, capsys):
    _, s2 = scene
    usual = make_map(monkeypatch, tmp_path)
    assert "S2.tif: B1 B2" in (said := capsys.readouterr().out) and said.count(" 0 was subtracted\n") == 2
    write_tif(tmp_path / "S2.tif", np.where(np.arange(170) < 9, 0, s2 + 1000).astype(np.uint16))  # and no data
    shifted = make_map(monkeypatch, tmp_path)
    assert data.re.search("S2.tif: .* 1,000 was subtracted\n", capsys.readouterr().out)
    assert np.array_equal(shifted[:, :, 60:], usual[:, :, 60:]) and (shifted[:, :, :9] == 255).all()
    other = make_map(monkeypatch, tmp_path, "--s2-offset", 0)
    assert not np.array_equal(other[:, :, 60:], usual[:, :, 60:])


def test_twelve_bands_out_of_thirteen_and_in_another_order(tmp_path, monkeypatch):
    s1, s2 = write_scene(tmp_path)
    bands = {"s1": ["VH"], "s2": data.L2A_BANDS}
    write_classifier(tmp_path / "c.pt", bands=bands)
    usual = make_map(monkeypatch, tmp_path)
    write_tif(tmp_path / "S1.tif", s1[1:])
    write_tif(tmp_path / "S2.tif", np.delete(s2, 10, 0))
    with pytest.raises(data.DataError, match="S2.tif: without B10 .* it cannot be told if 1,000 was added"):
        make_map(monkeypatch, tmp_path)
    assert np.array_equal(make_map(monkeypatch, tmp_path, "--s2-offset", 0), usual)
    layers = np.stack([s1[1], s1[0] * 0 + 3, s1[0]])
    write_tif(tmp_path / "S1.tif", layers, ["VH", "angle", "VV"])  # the file says which is which
    write_tif(tmp_path / "S2.tif", s2[::-1], data.S2_BANDS[::-1])
    assert np.array_equal(make_map(monkeypatch, tmp_path), usual)


def test_radar_bands_without_names_whose_second_is_the_brighter_are_asked_for(scene, tmp_path, monkeypatch):
    s1, _ = scene
    usual = make_map(monkeypatch, tmp_path)
    write_tif(tmp_path / "S1.tif", s1[::-1])  # as SNAP writes them
    words = "S1.tif: by position VH is brighter than VV: name its bands: "
    with pytest.raises(data.DataError, match=words) as error:
        make_map(monkeypatch, tmp_path)
    subprocess.run([sys.executable, "-c", f"import rasterio; {str(error.value).split('bands: ')[1]}"], check=True)  # its mend
    assert np.array_equal(make_map(monkeypatch, tmp_path), usual)
    write_tif(tmp_path / "S1.tif", s1[::-1], ["VV", "VH"])  # a name is believed
    assert not np.array_equal(make_map(monkeypatch, tmp_path), usual)


def test_radar_of_one_band_out_of_two_without_names_is_doubted_alike(tmp_path, monkeypatch):
    s1, _ = write_scene(tmp_path)
    write_classifier(tmp_path / "c.pt", "only-s1", bands={"s1": ["VV"], "s2": []})
    write_tif(tmp_path / "S1.tif", s1[::-1])
    with pytest.raises(data.DataError, match="S1.tif: by position VH is brighter than VV"):
        make_map(monkeypatch, tmp_path, s2=None)


def test_bands_of_which_b8a_was_last_before_their_names_were_lost_are_asked_for(scene, tmp_path, monkeypatch):
    """gdal_translate makes such a file of the README's VRT."""
    _, s2 = scene
    s2[9] = s2[10] + 300  # water vapour
    last = [band for band in range(13) if band != 8] + [8]
    write_tif(tmp_path / "S2.tif", s2)
    usual = make_map(monkeypatch, tmp_path)
    write_tif(tmp_path / "S2.tif", s2[last])
    with pytest.raises(data.DataError, match="S2.tif: by position B10 is brighter than B9: name its bands"):
        make_map(monkeypatch, tmp_path)
    write_tif(tmp_path / "S2.tif", s2[last], [data.S2_BANDS[band] for band in last])
    assert np.array_equal(make_map(monkeypatch, tmp_path), usual)


def test_a_scene_that_is_never_above_255_is_doubted(scene, tmp_path, monkeypatch, capsys):
    _, s2 = scene
    dark = s2 // 36 + 3
    dark[:, :9] = 65_535
    for image, doubted in ((s2, False), (dark, True)):
        write_tif(tmp_path / "S2.tif", image, nodata=65_535)
        make_map(monkeypatch, tmp_path)
        assert ("S2.tif: S2 is never above 255: is it reflectance x 10,000?" in capsys.readouterr().out) == doubted


def test_bands_and_classes_of_ones_own(tmp_path, monkeypatch):
    bands = {"s1": ["HH"], "s2": ["red", "nir"]}
    s1, s2 = write_scene(tmp_path, bands=bands)
    write_classifier(tmp_path / "c.pt", bands=bands, classes=["dry", "flooded"])
    labels, = make_map(monkeypatch, tmp_path, "--s2-offset", 0)
    assert set(np.unique(labels)) <= {0, 1}
    assert labels[40, 40] == expected(tmp_path, s1, s2, 24, 24).argmax()
    with rasterio.open(tmp_path / "map.tif") as tif:
        assert tif.tags()["class_1"] == "flooded"


def test_a_classifier_of_one_sensor_needs_no_other(tmp_path, monkeypatch):
    write_scene(tmp_path)
    for method, kept, bands in (("only-s1", "s1", BANDS), ("simclr-rgb", "s2", {"s1": [], "s2": models.RGB})):
        write_classifier(tmp_path / "c.pt", method, bands=bands, scale="standard")
        both = make_map(monkeypatch, tmp_path)
        other = {"s1": "s2", "s2": "s1"}[kept]
        assert np.array_equal(make_map(monkeypatch, tmp_path, **{other: None}), both)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("name", [name for name, (*_, words) in GRIDS.items() if not words])
def test_a_map_lies_where_one_of_its_scenes_says(name, tmp_path, monkeypatch):
    crs, transform, other_crs, other, _ = GRIDS[name]
    write_classifier(tmp_path / "c.pt")
    s1, s2 = make_scene(64, 48)
    write_tif(tmp_path / "S2.tif", s2, crs=crs, transform=transform)
    write_tif(tmp_path / "S1.tif", s1, crs=other_crs, transform=other)
    assert make_map(monkeypatch, tmp_path).shape == (1, 64, 48)
    with rasterio.open(tmp_path / "map.tif") as tif:
        assert tif.crs == (crs or other_crs)
        assert tif.transform.almost_equals(transform or other or rasterio.Affine.identity(), 1e-3)


def test_a_sliver_in_the_first_lines_judges_no_scene(tmp_path, monkeypatch):
    """Few pixels at its tip, over a town and below a cloud: neither power nor an offset."""
    s1, s2 = write_scene(tmp_path, 600, 40)
    write_classifier(tmp_path / "c.pt")
    usual = make_map(monkeypatch, tmp_path)
    s1[:, :500], s2[:, :500] = np.nan, 0
    s1[:, 200, :5], s2[:, 200, :5] = 3, 2500
    write_tif(tmp_path / "S1.tif", s1)
    write_tif(tmp_path / "S2.tif", s2)
    labels = make_map(monkeypatch, tmp_path)
    assert np.array_equal(labels[:, 540:], usual[:, 540:])


# --------------------------------------------------------------------------------------- wrong input

def test_wrong_input_is_one_line(scene, tmp_path, monkeypatch):
    s1, s2 = scene
    write_tif(tmp_path / "moved.tif", s1, transform=TRANSFORM @ rasterio.Affine.translation(0.5, 0))
    write_tif(tmp_path / "larger.tif", np.pad(s1, ((0, 0), (0, 9), (0, 0))))
    write_tif(tmp_path / "three.tif", s2[:3])
    write_tif(tmp_path / "small1.tif", s1[:, :31])
    write_tif(tmp_path / "small2.tif", s2[:, :31])
    write_tif(tmp_path / "power.tif", 10 ** (s1 / 10))
    (tmp_path / "text.tif").write_text("no image")
    whole = (tmp_path / "S2.tif").read_bytes()
    (tmp_path / "half.tif").write_bytes(whole[:len(whole) // 2])
    grid = f"moved.tif WARPED.tif --like {tmp_path}/S2.tif --resampling bilinear"
    windows = "31 px, --step 16: the windows of the classifier are 32 x 32"
    for words, changes, options in (
            (grid, {"s1": "moved.tif"}, ()),
            ("not on one grid: 170 x 159 and 170 x 150 px", {"s1": "larger.tif"}, ()),
            ("dB, 10 log10 of power", {"s1": "power.tif"}, ()),
            ("three.tif: 3 bands", {"s2": "three.tif"}, ()),
            ("--s1: ", {"s1": None}, ()),
            ("--s2: ", {"s2": None}, ()),
            (windows, {"s1": "small1.tif", "s2": "small2.tif"}, ()),
            ("--step 33", {}, ("--step", 33)),
            ("text.tif", {"s1": "text.tif"}, ()),
            ("half.tif: cannot be read, is it cut off", {"s2": "half.tif"}, ("--s2-offset", 0)),
            ("nowhere.tif", {"s2": "nowhere.tif"}, ())):
        with pytest.raises((data.DataError, OSError)) as error:
            make_map(monkeypatch, tmp_path, *options, **changes)
        assert words in str(error.value) and "\n" not in str(error.value)
        assert not list(tmp_path.glob("map*"))
    encoders = torch.load(tmp_path / "c.pt", weights_only=True)
    for key in ("fc", "crop", "task"):
        encoders.pop(key)
    torch.save(encoders, tmp_path / "c.pt")
    with pytest.raises(models.CheckpointError, match="encoders without a classifier"):
        make_map(monkeypatch, tmp_path)


def test_warping_as_the_error_says_makes_one_grid(scene, tmp_path, monkeypatch):
    write_tif(tmp_path / "moved.tif", scene[0], transform=TRANSFORM @ rasterio.Affine.translation(-20, 3))
    with pytest.raises(data.DataError) as error:
        make_map(monkeypatch, tmp_path, s1="moved.tif")
    command = str(error.value).split("rio warp ")[1].replace("WARPED.tif", str(tmp_path / "warped.tif")).split()
    done = CliRunner().invoke(main_group, ["warp", *command])
    assert done.exit_code == 0, done.output
    labels, = make_map(monkeypatch, tmp_path, s1="warped.tif")
    assert (labels != 255).any()


def test_a_map_in_place_of_its_scene_is_refused_and_endings_may_be_capital(tmp_path, monkeypatch):
    write_scene(tmp_path, 40, 50)
    write_classifier(tmp_path / "c.pt")
    usual, before = make_map(monkeypatch, tmp_path), (tmp_path / "S2.tif").read_bytes()
    (tmp_path / "link.tif").symlink_to("S2.tif")
    rasterio.shutil.copy(tmp_path / "S2.tif", tmp_path / "S2.vrt", driver="VRT")
    for out, s2 in (("S2.tif", "S2.tif"), ("S1.tif", "S2.tif"), ("link.tif", "S2.tif"), ("S2.tif", "link.tif"),
                    ("S2.tif", "S2.vrt")):
        with pytest.raises(data.DataError, match="--map .*would overwrite"):
            make_map(monkeypatch, tmp_path, out=out, s2=s2)
        assert (tmp_path / "S2.tif").read_bytes() == before
    shutil.copy(tmp_path / "S2.tif", tmp_path / "x.part.tif")
    with pytest.raises(data.DataError, match="--map .*x.tif: would overwrite .*x.part.tif"):
        make_map(monkeypatch, tmp_path, out="x.tif", s2="x.part.tif")
    assert (tmp_path / "x.part.tif").read_bytes() == before
    for out in ("out.TIF", "out.tiff", "new/out.TIFF"):
        assert np.array_equal(make_map(monkeypatch, tmp_path, out=out), usual)


def with_little_room(args, tmp):
    """A map in a process that can write no file of more than 4,000 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))
    as_main("finetune.py", args, tmp)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    write_scene(tmp_path)
    write_classifier(tmp_path / "c.pt", task="multi")
    process = CONTEXT.Process(target=with_little_room, args=(map_options(tmp_path, "--step", 4), tmp_path))
    process.start()
    process.join()
    said = (tmp_path / "err").read_text().splitlines()[-1]
    assert process.exitcode == 2 and "map.tif: " in said and "free space" in said
    assert not list(tmp_path.glob("map*"))


def test_killed_in_the_middle_there_is_no_map(tmp_path):
    write_scene(tmp_path, 600, 600)
    write_classifier(tmp_path / "c.pt")
    process = CONTEXT.Process(target=as_main, args=("finetune.py", map_options(tmp_path, "--step", 4), tmp_path))
    process.start()
    while not list(tmp_path.glob("map.part*")):
        assert process.is_alive()
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "map.tif").exists()


# ------------------------------------------------------------------------------------ kept classifiers

@pytest.mark.parametrize("stored, numbers", [(["B2", "B3", "B4"], [3, 2, 1]), (["B3", "B4", "B2"], [2, 1, 3])])
def test_a_scene_without_names_has_the_bands_of_the_files_that_were_learnt_from(stored, numbers, tmp_path):
    write_scene(tmp_path, bands={"s1": data.S1_BANDS, "s2": ["B2", "B3", "B4"]})
    content = {"method": "only-s2", "bands": {"s1": [], "s2": ["B4", "B3", "B2"]}, "stored": {"s1": data.S1_BANDS, "s2": stored}}
    args = SimpleNamespace(s2=tmp_path / "S2.tif", s2_offset=None)
    assert finetune.open_scene(args, content)["s2"].numbers == numbers
    content["stored"]["s2"] = data.L2A_BANDS  # of files of twelve: which three these are, nobody knows
    with pytest.raises(data.DataError, match="S2.tif: 3 bands, None None None; needed are B4 B3 B2: name them"):
        finetune.open_scene(args, content)


def test_save_keeps_each_classifier_and_trains_none_again(tmp_path, labelled, monkeypatch):
    options = ("--method", "early-fusion", "--task", "single", "multi", "--scale", "standard",
               "--precision", "float32", "--save", tmp_path / "kept")
    extractions = watch(monkeypatch, linear_eval, "extract")
    lines = tune(monkeypatch, labelled, tmp_path, *options)
    files = [tmp_path / f"kept/early-fusion_{task}_0.5_seed0.pt" for task in ("single", "multi")]
    assert sorted(files) == sorted((tmp_path / "kept").iterdir())
    patches = data.Patches(labelled)
    rows = patches.rows_of("test")
    for path, line, (_, before) in zip(files, lines, extractions):
        model, scaling, names = models.load_classifier(path)
        content = models.load_checkpoint(path)
        assert not model.training and names == line["classes"] and content["task"] == line["task"]
        assert content["crop"] == 32 and content["simulated"] and content["stored"] == patches.stored
        assert content["scores"]["average"] == pytest.approx(line["average"], abs=1e-5)
        crops = data.grid_crops(rows, patches.size, 32, 16)
        s1, s2, *_ = next(iter(data.loader(patches, crops, 32)))
        got = model(*models.to_input(s1, s2, **scaling))
        np.testing.assert_allclose(got.numpy(), before["x"][:16], rtol=1e-3, atol=1e-4)
    bytes_before = files[0].read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train", None)  # nothing is trained
        assert tune(patch, labelled, tmp_path, *options) == lines
    files[0].unlink()  # a file that is lost comes back, without a second line
    assert tune(monkeypatch, labelled, tmp_path, *options) == lines
    assert files[0].read_bytes() == bytes_before
    (tmp_path / "results.jsonl").unlink()  # as a kill between the two leaves it: the line comes, too
    assert tune(monkeypatch, labelled, tmp_path, *options) == lines
    with pytest.raises(data.DataError, match=r"seed0.pt: has other settings: choose another --save"):
        tune(monkeypatch, labelled, tmp_path, *options, "--lr", 1e-3)


def test_exported_classifier(tmp_path):
    write_classifier(tmp_path / "c.pt", "early-fusion", "multi")
    models.export(tmp_path / "c.pt", tmp_path / "out")
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert (card["classes"], card["task"], card["crop"]) == (data.CLASSES, "multi", 32)
    assert card["inputs"] == {"s1+s2": data.S1_BANDS + data.S2_BANDS} and card["network"] == "resnet18"
    fc = torch.load(tmp_path / "out/fc.pt", weights_only=True)
    model, _, _ = models.load_classifier(tmp_path / "c.pt")
    assert torch.equal(fc["weight"], model.fc.weight)


def test_last_layers_that_do_not_fit_are_named(tmp_path):
    content = torch.load(write_classifier(tmp_path / "c.pt"), weights_only=True)
    for change, words in (({"classes": ["a", "b"]}, "its encoders and 2 classes"), ({"fc": 3}, "its encoders")):
        torch.save({**content, **change}, tmp_path / "bad.pt")
        with pytest.raises(models.CheckpointError, match=f"does not fit {words}"):
            models.load_classifier(tmp_path / "bad.pt")


def test_a_process_makes_a_map_which_has_no_overviews_of_the_one_before(scene, tmp_path):
    for ending in (".ovr", ".aux.xml"):
        Path(f"{tmp_path}/map.tif{ending}").write_text("of another map")
    done = user("finetune.py", *map_options(tmp_path))
    assert done.returncode == 0 and "wrote" in done.stdout
    assert not [*tmp_path.glob("map.tif.*")]
