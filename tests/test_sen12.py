"""tests/sen12.py: tiles with a class as a tree that packs, here made-up ones in that folder's layout."""
import csv
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import sen12
from conftest import call, user
from test_data import read
from test_ombria import write_8_bit

import data

PLACES = [("river", "7", 1097, ""), ("gorge", "7", 3000, "")]  # class, group, number of the tile, fold
for _group in range(20):  # of two tiles each, in turn of both folds and of each class
    for _tile in range(2):
        PLACES.append((sen12.CLASSES[_group // 2 % 5], str(10 + _group), 2 * _group + _tile, str(_group % 2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """42 tiles of 16 px: two without a fold, 20 in each fold."""
    folder, rng = tmp_path_factory.mktemp("sen12"), np.random.default_rng(0)
    lines = ["class,number,group,fold"]
    for name, group, number, fold in PLACES:
        lines.append(f"{name},{number},{group},{fold}")
        for sensor in ("sar", "op"):
            image = rng.integers(0, 256, (1, 16, 16), dtype=np.uint8)
            write_8_bit(folder / name / f"{sensor}_{number}.jpg", image, "JPEG")
    (folder / "places.csv").write_text("\n".join(lines))
    return folder


def convert_and_pack(monkeypatch, folder, out, *options):
    call(monkeypatch, sen12, folder, out / "tree", *options)
    return data.pack(out / "tree", out / "store")


def places_of(folder):
    with open(folder / "places.csv", newline="") as file:
        return list(csv.DictReader(file))


def check_tiles(patches, folder, split_of):
    """All tiles of a folder are in a store, in the split of their fold, with a class if they have a fold."""
    places = places_of(folder)
    assert len(places) == len(patches.rows) and not patches.left_out
    for place in places:
        split = split_of[place["fold"]]
        row = patches.ids.index(f"{split}/{place['group']}/{place['class']}_{place['number']}".strip("/"))
        assert patches.splits[row] == split and patches.scenes[row].split("/")[-1] == place["group"]
        radar, optical = (read(folder / place["class"] / f"{sensor}_{place['number']}.jpg") for sensor in ("sar", "op"))
        np.testing.assert_allclose(patches.arrays[0][row] / 100, radar / 255 * 25 - 25, atol=0.006)
        assert np.array_equal(patches.arrays[1][row], np.maximum(39 * optical.astype(int), 1))
        code = patches.classes.index(place["class"]) if split else data.IGNORE
        assert (patches.arrays[2][row] == code).all() and patches.labels[row] == code


def groups_of(patches, split):
    return {patches.scenes[row].split("/")[-1] for row in patches.rows_of(split)}


def test_a_tree_that_packs(folder, tmp_path, monkeypatch):
    patches = convert_and_pack(monkeypatch, folder, tmp_path, "--test-fold", "1")
    assert patches.bands == {"s1": ["VV"], "s2": ["grey"]} and patches.classes == sen12.CLASSES
    check_tiles(patches, folder, {"": "", "0": "train", "1": "test"})
    assert groups_of(patches, "test") == {str(group) for group in range(11, 30, 2)}
    assert groups_of(patches, "train") == {str(group) for group in range(10, 30, 2)}
    assert groups_of(patches, "") == {"7"}


def test_a_fifth_of_the_training_groups_in_place_of_the_test_fold(folder, tmp_path, monkeypatch):
    training, held = {str(group) for group in range(10, 30, 2)}, []
    for fifth in range(5):
        out = tmp_path / str(fifth)
        patches = convert_and_pack(monkeypatch, folder, out, "--test-fold", "1", "--tune", str(fifth))
        held.append(groups_of(patches, "test"))
        assert groups_of(patches, "train") == training - held[-1] and len(patches.rows) == 22
        assert groups_of(patches, "") == {"7"}
    assert set.union(*held) == training and {len(groups) for groups in held} == {2}


def test_what_is_missing_is_said(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "folder")
    (tmp_path / "folder/agriculture/sar_0.jpg").unlink()
    (tmp_path / "folder/agriculture/op_1.jpg").write_bytes(b"no image")
    call(monkeypatch, sen12, tmp_path / "folder", tmp_path / "out", "--test-fold", "1")
    said = capsys.readouterr().out
    assert "'train': 18" in said and "sar_0.jpg" in said and "op_1.jpg" in said
    for words, args in (("is not empty", (folder, tmp_path / "out", "--test-fold", "1")),
                        ("--tune", (folder, tmp_path / "new", "--test-fold", "1", "--tune", "5")),
                        ("the folds ['0', '1']", (folder, tmp_path / "new", "--test-fold", "2"))):
        with pytest.raises(SystemExit) as stop:
            call(monkeypatch, sen12, *args)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_any_fold_is_tested_on_with_the_labels_of_all_others():
    places = [{"class": "river", "group": str(number), "fold": fold} for number, fold in enumerate(["", *"012"])]
    assert sen12.splits_of(places, "2", None) == ["", "train", "train", "test"]
    assert sen12.splits_of(places, "2", 0) == ["", "test", "train", None]


@pytest.fixture(scope="module")
def real(shared):
    """-> the folder."""
    folder = shared / "real/sen12"
    if not folder.is_dir():
        pytest.skip("no ../shared/real/sen12 here")
    return folder


def groups_by_split(places, *options):
    groups, counts = defaultdict(set), Counter()
    for place, split in zip(places, sen12.splits_of(places, *options)):
        groups[split].add(place["group"])
        counts[split] += 1
    assert len(set.union(*groups.values())) == sum(map(len, groups.values()))  # whole groups
    return groups, counts


@pytest.mark.parametrize("fold", "01")
def test_splits_of_the_real_thing(real, fold):
    """Whole groups, the large ones in neither split; a fifth has every class and nothing of the test fold."""
    places = places_of(real)
    other = str(1 - int(fold))
    tiles = {name: sum(place["fold"] == name for place in places) for name in ("", "0", "1")}
    assert tiles == {"": 1097, "0": 328, "1": 279}
    groups, counts = groups_by_split(places, fold, None)
    assert counts == {"": 1097, "test": tiles[fold], "train": tiles[other]}
    assert groups[""] == {"0", "3", "55"} and not groups[None]
    test, training, seen = groups["test"], groups["train"], set()
    for fifth in range(5):
        groups, counts = groups_by_split(places, fold, fifth)
        assert counts[None] == tiles[fold] and counts[""] == 1097
        assert groups[None] == test and groups["test"] | groups["train"] == training
        held = [place for place in places if place["group"] in groups["test"]]
        assert len({place["class"] for place in held}) == 5 and not groups["test"] & seen
        assert len(groups["test"]) in (27, 28)
        seen |= groups["test"]
    assert seen == training


def test_tiles_of_the_real_thing(real, tmp_path, monkeypatch):
    """Every 20th, read back from the store."""
    some = tmp_path / "some"
    some.mkdir()
    for name in sen12.CLASSES:
        (some / name).symlink_to(real / name)
    lines = (real / "places.csv").read_text().splitlines()
    (some / "places.csv").write_text("\n".join(lines[:1] + lines[1::20]))
    patches = convert_and_pack(monkeypatch, some, tmp_path, "--test-fold", "0")
    check_tiles(patches, some, {"": "", "0": "test", "1": "train"})


@pytest.mark.parametrize("change, said", [
    (lambda text: text.replace("class,number", "name,number"), "without lines under class, number, group, fold"),
    (lambda text: text.replace("river,1097", "lake,1097"), "classes lake"), (lambda text: "", "without lines"),
    (lambda text: text.replace(",1\n", ",\n").removesuffix("1"), "the folds ['0']")])
def test_places_that_say_something_else_are_refused_before_a_tile_is_written(change, said, folder, tmp_path):
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles/places.csv").write_text(change((folder / "places.csv").read_text()))
    result = user("tests/sen12.py", tmp_path / "tiles", tmp_path / "tree", "--test-fold", 0)
    assert result.returncode == 2 and said in result.stderr and not (tmp_path / "tree").exists()


def test_a_folder_without_places(tmp_path):
    result = user("tests/sen12.py", tmp_path, tmp_path / "new", "--test-fold", 0)
    assert result.returncode == 2 and "places.csv: not there" in result.stderr and not (tmp_path / "new").exists()


def test_places_that_excel_saved(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "tiles")
    text = (folder / "places.csv").read_text()
    (tmp_path / "tiles/places.csv").write_text(text, encoding="utf-8-sig")
    assert len(convert_and_pack(monkeypatch, tmp_path / "tiles", tmp_path, "--test-fold", 0).rows) == 42
