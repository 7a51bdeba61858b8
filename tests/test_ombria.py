"""tests/ombria.py: a clone of OMBRIA, here a made-up one in its layout, as two trees that pack."""
import shutil
from collections import Counter

import numpy as np
import ombria
import pytest
import rasterio
from conftest import call, user

import data


def write_8_bit(path, image, driver="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver=driver, count=len(image), height=image.shape[1], width=image.shape[2],
                       dtype="uint8") as file:
        file.write(image)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """6 places of OMBRIA's own split and 2 of each country of 2021, 16 px -> (folder, images by file)."""
    folder, rng, images = tmp_path_factory.mktemp("OMBRIA"), np.random.default_rng(0), {}

    def add(path, bands=1, levels=256):
        grey = rng.integers(0, levels, (bands, 16, 16), dtype=np.uint8)
        images[path] = grey * np.uint8(255 // (levels - 1))
        write_8_bit(folder / path, images[path])

    for number in range(6):
        part, name = "test" if number > 3 else "train", f"{number:04}"
        for date in ("before", "after"):
            add(f"OmbriaS1/{part}/{date.upper()}/S1_{date}_{name}.png", 1)
            add(f"OmbriaS2/{part}/{date.upper()}/S2_{date}_{name}.png", 3)
        add(f"OmbriaS1/{part}/MASK/S1_mask_{name}.png", levels=2)
    for country in ("ALBANIA", "FRANCE", "GUYANA", "TIMOR"):
        for number in (1, 2):
            for date in ("before", "after"):
                add(f"2021/{country}/Sentinel1/{date.upper()}/im{date}_{number}.png", 1)
                add(f"2021/{country}/Sentinel2/{date.upper()}/im{date}_{number}.png", 3)
            add(f"2021/{country}/Sentinel1/MASK/gt_{number}.png", levels=2)
    return folder, images


def test_two_trees_that_pack(clone, tmp_path, monkeypatch, capsys):
    folder, images = clone
    call(monkeypatch, ombria, folder, tmp_path / "out")
    said = capsys.readouterr().out
    assert "12 places" in said and "GUYANA" in said
    pairs, flood = (data.pack(tmp_path / "out" / name, tmp_path / name, max_bad=0.1) for name in ("pairs", "flood"))
    for patches in (pairs, flood):
        assert patches.bands == {"s1": ["VV"], "s2": ["B12", "B8", "B4"]} and patches.classes == ["dry", "flooded"]
        assert len(patches.rows_of("test")) == 6 and len(patches.rows) == 12 and not patches.left_out
        assert {patches.scenes[row].split("/")[-1] for row in patches.rows_of("test")} == {"ALBANIA", "FRANCE", "TIMOR"}
    assert pairs.labels is None and len(flood.rows_of("train")) == 6
    row = next(row for row, patch in enumerate(flood.ids) if patch.endswith("0004"))
    grey = images["OmbriaS1/test/AFTER/S1_after_0004.png"]
    np.testing.assert_allclose(flood.arrays[0][row] / 100, grey / 255 * 25 - 25, atol=0.006)
    assert np.array_equal(flood.arrays[1][row], 39 * images["OmbriaS2/test/AFTER/S2_after_0004.png"].astype(int))
    assert np.array_equal(flood.arrays[2][row], images["OmbriaS1/test/MASK/S1_mask_0004.png"] > 127)
    row = next(row for row, patch in enumerate(pairs.ids) if patch.endswith("FRANCE/2"))
    grey = images["2021/FRANCE/Sentinel1/BEFORE/imbefore_2.png"]
    np.testing.assert_allclose(pairs.arrays[0][row] / 100, grey / 255 * 25 - 25, atol=0.006)


def test_both_dates_and_regions_held_out(clone, tmp_path, monkeypatch):
    folder, _ = clone
    (tmp_path / "regions.csv").write_text("number,region\n" + "".join(f"{k:04},R{k % 2}\n" for k in range(6)))
    call(monkeypatch, ombria, folder, tmp_path / "out", "--dates", "both", "--regions", tmp_path / "regions.csv",
         "--test-regions", "R1")
    pairs = data.pack(tmp_path / "out/pairs", tmp_path / "pairs", max_bad=0.1)
    assert len(pairs.rows) == 24 and len(pairs.rows_of("train")) == 6  # three places, two dates
    scenes = {split: {pairs.scenes[row].split("/")[-1] for row in pairs.rows_of(split)} for split in ("train", "test")}
    assert scenes == {"train": {"R0"}, "test": {"R1", "ALBANIA", "FRANCE", "TIMOR"}}


def test_a_clone_that_lacks_parts_and_files(clone, tmp_path, monkeypatch, capsys):
    _, images = clone
    for path, image in images.items():
        if path.startswith("Ombria") and not path.endswith(("S2_before_0001.png", "S1_mask_0002.png")):
            write_8_bit(tmp_path / "clone" / path, image)
    (tmp_path / "clone/OmbriaS1/train/AFTER/S1_after_0003.png").write_bytes(b"no image")
    call(monkeypatch, ombria, tmp_path / "clone", tmp_path / "out")
    said = capsys.readouterr().out
    for file in ("2021/FRANCE", "S2_before_0001.png", "S1_mask_0002.png"):
        assert f"{file}: not there" in said
    assert "0003 after: " in said
    counts = {name: len(list((tmp_path / "out" / name).glob("train/s1/*/*.tif"))) for name in ("pairs", "flood")}
    assert counts == {"pairs": 5, "flood": 4}


def test_what_is_no_clone_or_region_and_a_full_folder_are_refused(clone, tmp_path, monkeypatch, capsys):
    (tmp_path / "regions.csv").write_text("number,region\n0000,R0\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for words, args in (("is it a clone", (tmp_path / "full", tmp_path / "out")),
                        ("is not empty", (clone[0], tmp_path / "full")),
                        ("R7: no such region", (clone[0], tmp_path / "out", "--regions", tmp_path / "regions.csv",
                                                "--test-regions", "R7"))):
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, ombria, *args)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_real_thing_has_484_places_to_train_on_and_210_to_test_on(shared, tmp_path, monkeypatch):
    seen = Counter()

    def convert(place, date, split, out, **kwargs):
        out.mkdir(exist_ok=True)
        seen[date, split] += 1

    monkeypatch.setattr(ombria, "convert", convert)
    call(monkeypatch, ombria, shared / "real/ombria", tmp_path, "--regions", shared / "real/ombria/regions.csv",
         "--test-regions", "R10")
    assert seen == {(date, split): count for date in ("before", "after") for split, count in (("train", 484), ("test", 210))}


def test_a_clone_without_one_sensor_tells_how_little_was_written(clone, tmp_path, monkeypatch, capsys):
    shutil.copytree(clone[0], tmp_path / "clone")
    for path in [*(tmp_path / "clone").glob("OmbriaS2/*/*/*.png"), *(tmp_path / "clone").glob("2021/*/Sentinel2/*/*.png")]:
        if not path.name.endswith("_0001.png"):
            path.unlink()
    call(monkeypatch, ombria, tmp_path / "clone", tmp_path / "out")
    assert "wrote 1 pairs of 12 places into" in capsys.readouterr().out


def test_numbers_of_regions_that_lost_their_zeros_hold_nothing_out_in_silence(clone, tmp_path):
    (tmp_path / "regions.csv").write_text("number,region\n" + "".join(f"{k},R{k % 2}\n" for k in range(6)))  # as Excel saves them
    result = user("tests/ombria.py", clone[0], tmp_path / "out", "--regions", tmp_path / "regions.csv", "--test-regions", "R1")
    assert result.returncode == 2 and "R1: none of its places is there: numbers have four digits" in result.stderr
    assert not (tmp_path / "out").exists()


def test_regions_without_their_columns_are_refused(clone, tmp_path):
    (tmp_path / "regions.csv").write_text("place,region\n0001,R1\n")
    result = user("tests/ombria.py", clone[0], tmp_path / "out", "--regions", tmp_path / "regions.csv")
    assert result.returncode == 2 and "without lines under number, region" in result.stderr
