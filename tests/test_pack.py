"""data.py pack: what kills, full disks and wrong files do to a store, and what a store says of itself."""
import errno
import fcntl
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import as_nobody
from test_data import BAD, LAYOUTS, as_stored, by_hand, rewrite, same, spoil, write_tree

import data
import models


def contents(store):
    return {path.name: path.read_bytes() for path in sorted(Path(store).iterdir())}


CHILDREN = set()


def fork(function, *args):
    """Run a function in a child process -> its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            data.tqdm.set_lock(threading.RLock())  # its own is shared: who is killed with it holds it for ever
            function(*args)
            code = 0
        except (data.DataError, OSError) as error:  # of which run() makes one line
            print(error, flush=True)
            code = 2
        except Exception:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(code)
    CHILDREN.add(pid)
    return pid


def wait(pid):
    """-> exit code, or minus the signal that ended it."""
    CHILDREN.remove(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(autouse=True)
def no_child_is_left():
    yield
    for pid in list(CHILDREN):
        os.kill(pid, signal.SIGKILL)
        wait(pid)


def pack_with(before, tree, store):
    """pack(); before each patch is read, another function is called."""
    read = data.read_patch
    data.read_patch = lambda *args: (before(), read(*args))[1]
    data.pack(tree, store, 2, max_bad=0.5)


def slowly(tree, store):
    pack_with(lambda: time.sleep(0.01), tree, store)


def refused_at_once(tree, store):
    """pack() that must end before a patch is read."""
    pack_with(None, tree, store)


def killed_at_patch(number, tree, store):
    reads = itertools.count()
    pack_with(lambda: next(reads) < number or os.kill(os.getpid(), signal.SIGKILL), tree, store)


def held(tree, store):
    """pack() that says when it begins to read and goes on when it is told."""
    def pause():
        (store.parent / "reading").touch()
        while not (store.parent / "go on").exists():
            time.sleep(0.01)

    pack_with(pause, tree, store)


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """60 patches, one of them bad in each way."""
    folder, rng = tmp_path_factory.mktemp("pack"), np.random.default_rng(5)
    spoil(write_tree(folder / "tree", rng, 60), rng)
    return folder / "tree"


@pytest.fixture(scope="module")
def packed(tree):
    """The bytes of its store, never interrupted."""
    data.pack(tree, tree.parent / "store", 1, max_bad=0.5)
    return contents(tree.parent / "store")


def some_missing(image):
    image[:, 3:5, 2:9] = 0
    return image


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """10 patches, two of them bad, their files, their store and its bytes."""
    folder, rng = tmp_path_factory.mktemp("few"), np.random.default_rng(6)
    written = write_tree(folder / "tree", rng, 10)
    for files, sensor in zip(written.values(), ("s1", "s2", "s1")):
        rewrite(some_missing)(files[sensor])
    spoil(written, rng, ["NaN", "partner"])
    data.pack(folder / "tree", folder / "store", max_bad=0.5)
    return SimpleNamespace(tree=folder / "tree", written=written, store=folder / "store",
                           packed=contents(folder / "store"))


# ------------------------------------------------------------------------------ what a store holds

def test_store(tree, packed):
    assert sorted(packed) == ["classes.npy", "index.json", "packing.json", "patches.npy", "s1.npy", "s2.npy"]
    index, rows = json.loads(packed["index.json"]), 60
    arrays = {name: np.load(tree.parent / f"store/{name}.npy") for name in ("s1", "s2", "classes")}
    assert arrays["s1"].shape == (rows, 2, 16, 16) and arrays["s1"].dtype == np.int16
    assert arrays["s2"].shape == (rows, 13, 16, 16) and arrays["s2"].dtype == np.uint16
    assert arrays["classes"].shape == (rows, 16, 16) and arrays["classes"].dtype == np.uint8
    assert len(index["left_out"]) == len(BAD) and len(index["ids"]) == len(index["splits"]) == rows
    assert index["bands"] == {"s1": data.S1_BANDS, "s2": data.S2_BANDS} and index["size"] == [16, 16]
    assert index["classes"] == data.CLASSES and index["labelled"] and not index["simulated"]
    assert len(np.load(tree.parent / "store/patches.npy")) == rows


def test_records_are_of_the_arrays(tree, packed):
    patches = data.Patches(tree.parent / "store")
    records, rows = patches.records[patches.rows], patches.rows
    s1, s2, classes = (array[rows] for array in patches.arrays)
    values = np.concatenate((s1 / 100, s2), 1)
    for name, function in (("mean", np.mean), ("variance", np.var), ("lowest", np.min), ("highest", np.max)):
        np.testing.assert_allclose(records[name], function(values, (2, 3)), rtol=1e-12)
    assert (records["state"] == 1).all() and not records["offset"].any()
    for number, column in zip([*range(8), 255], records["pixels"].T, strict=True):
        assert (column == (classes == number).sum((1, 2, 3))).all()
    assert patches.labels[rows].tolist() == models.single_label(classes[:, 0]).tolist()


def test_stats_are_of_the_rows_asked_for_alone(tree, packed):
    rng = np.random.default_rng(0)
    for bands, count in ((None, 1), (["B12", "VH", "B4"], 7), (["B8"], 60 - len(BAD))):
        patches = data.Patches(tree.parent / "store", bands)
        rows = rng.permutation(patches.rows)[:count]
        stats = patches.stats(rows)
        for sensor, array, pick in zip(("s1", "s2"), patches.arrays, patches.picks):
            values = array[rows][:, pick] / (100 if sensor == "s1" else 1)
            assert isinstance(stats[sensor]["mean"], list)
            np.testing.assert_allclose(stats[sensor]["mean"], values.mean((0, 2, 3)), rtol=1e-10)
            np.testing.assert_allclose(stats[sensor]["std"], values.std((0, 2, 3)), rtol=1e-10)


def test_statistics_of_bands_that_hardly_vary(tmp_path):
    rng = np.random.default_rng(0)
    for files in write_tree(tmp_path / "t", rng, 20, (64, 48), labels=False, layout="release").values():
        s2 = 65_535 - rng.integers(0, 2, (13, 64, 48)).astype(np.uint16)
        s2[3], s2[10] = 10, 0
        data.rasterio.open(files["s2"], "r+").write(s2)
        s1 = rng.choice([-11.98, -11.99], (2, 64, 48)).astype(np.float32)
        s1[1] = -12.37
        data.rasterio.open(files["s1"], "r+").write(s1)
    patches = data.pack(tmp_path / "t", tmp_path / "store", s2_offset=0)
    stats = patches.stats(patches.rows)
    for sensor, values in (("s1", patches.arrays[0] / 100), ("s2", patches.arrays[1])):
        assert np.allclose(stats[sensor]["mean"], values.mean((0, 2, 3)), rtol=1e-9)
        assert np.allclose(stats[sensor]["std"], values.std((0, 2, 3)), rtol=1e-6, atol=1e-12)
    assert stats["s2"]["std"][3] == stats["s2"]["std"][10] == 0
    a, b = models.to_input(*(array[:4] for array in patches.arrays), "standard", stats)
    assert a[:, 1].abs().max() < 1e-5 and b[:, 3].abs().max() == 0  # bands that never vary


@pytest.mark.parametrize("threads", [2, 5, None])
def test_bytes_do_not_depend_on_threads(tree, packed, tmp_path, threads):
    data.pack(tree, tmp_path / "store", threads, max_bad=0.5)
    assert contents(tmp_path / "store") == packed


def one_pixel(image):
    image = image.copy()
    image.flat[35] = 1 + image.flat[35] % 2 if image.dtype == np.uint8 else image.flat[35] - 1
    return image


def turned(image):
    """Upside down: no statistic changes."""
    return image[:, ::-1]


def test_identity(few, tmp_path):
    """The same wherever a tree and its store lie and however it was packed; another where one pixel
    or the meaning of a band or class is another."""
    first = data.Patches(few.store).identity
    assert len(first) == 12 and int(first, 16) >= 0
    shutil.copytree(few.tree, tmp_path / "tree")
    shutil.copytree(few.store, tmp_path / "copy")
    again = data.pack(tmp_path / "tree", tmp_path / "store", 1, max_bad=0.5)
    assert again.identity == data.Patches(tmp_path / "copy", ["B4", "VV"]).identity == first
    seen, sensors = {first}, ("s1", "s2", "dfc")
    for sensor, change in itertools.product(sensors, (one_pixel, turned)):
        path = few.written[again.ids[again.rows[-1]]][sensor]
        copy = tmp_path / "tree" / path.relative_to(few.tree)
        rewrite(change)(copy)
        other = data.pack(tmp_path / "tree", tmp_path / f"{sensor} {change.__name__}", max_bad=0.5)
        differ = [(a != b).sum() for a, b in zip(other.arrays, again.arrays)]
        assert [name for name, count in zip(sensors, differ) if count] == [sensor]
        assert change is turned or sum(differ) == 1
        seen.add(other.identity)
        shutil.copy(path, copy)
    for legend in ({"s1": ["VH", "VV"]}, {"classes": {"1": "a", "2": "b"}}, {"classes": {"1": "a", "2": "c"}}):
        (tmp_path / "tree/legend.json").write_text(json.dumps(legend))
        seen.add(data.pack(tmp_path / "tree", tmp_path / str(legend), max_bad=0.5).identity)
    assert len(seen) == 10
    (tmp_path / "tree/legend.json").unlink()
    names = {path: path.with_name(path.name.replace("_test_", "_train_")) for path in (tmp_path / "tree").rglob("*_test_*.tif")}
    for path, moved in names.items():  # of the same pixels other ones are tested on
        path.rename(moved)
    assert names and data.pack(tmp_path / "tree", tmp_path / "moved", max_bad=0.5).identity not in seen


@pytest.mark.parametrize("seed", range(10))
def test_random_trees(tmp_path, seed):
    """Any layout, size and number of bands, bad files mixed in: left out is what was spoiled, and no
    more; the store holds what the files do, and crops of it are slices."""
    rng = np.random.default_rng(seed)
    layout, size = list(LAYOUTS)[seed % len(LAYOUTS)], tuple(map(int, rng.integers(7, 30, 2)))
    legend = {"s1": list("abc")[:rng.integers(1, 4)], "s2": list("defgh")[:rng.integers(1, 6)]}
    own = seed % 3 == 0
    bands = tuple(map(len, legend.values())) if own else (2, int(rng.integers(12, 14)))
    written = write_tree(tmp_path / "tree", rng, 24, size, layout, bands)
    if own:
        (tmp_path / "tree/legend.json").write_text(json.dumps(legend))
    kinds = [kind for kind, (sensor, *_) in BAD.items()
             if not (sensor == "dfc" and LAYOUTS[layout][1] == "lc" or own and "bands" in kind)]
    expected = spoil(written, rng, rng.permutation(kinds)[:5])
    patches = data.pack(tmp_path / "tree", tmp_path / "store", int(rng.integers(1, 4)), max_bad=0.5)
    assert patches.left_out.keys() == expected.keys() and list(patches.size) == list(size)
    good = [patch for patch in written if patch not in expected]
    assert [patches.ids[row] for row in patches.rows] == good
    for row, patch in zip(patches.rows, good):
        for array, values in zip(patches.arrays, as_stored(written[patch]), strict=True):
            assert (array[row] == values).all()
    side = int(rng.integers(1, min(size) + 1))
    for batches in (data.random_crops(patches.rows, size, side, 7, seed, 0),
                    data.grid_crops(patches.rows[:4], size, side, 7)):
        same(list(data.loader(patches, batches, side, classes=patches.labels is not None)),
             list(by_hand(patches, batches, side, patches.labels is not None)))


def test_marker_of_simulated_data(tmp_path):
    for number, place in enumerate(("t/SIMULATED", "SIMULATED", "t/train/SIMULATED", "none")):
        folder = tmp_path / str(number)
        write_tree(folder / "t", np.random.default_rng(0), 3, layout="plain split")
        (folder / place).touch()
        assert data.pack(folder / "t", folder / "store").simulated == (place != "none")


# ------------------------------------------------------------------------------ killed

@pytest.mark.parametrize("moment", range(10))
def test_killed_at_any_moment(tree, packed, tmp_path, moment):
    store, rng = tmp_path / "store", np.random.default_rng(moment)
    for _ in range(3):  # killed again while it goes on from there
        pid = fork(slowly, tree, store)
        time.sleep(rng.uniform(0, 0.35))
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == 0:
            break
        if not (store / "index.json").exists():
            with pytest.raises(data.DataError, match="not a whole store .* finishes what broke off"):
                data.Patches(store)
    data.pack(tree, store, max_bad=0.5)
    assert contents(store) == packed


CRUCIAL = ((os, "fsync"), (os, "unlink"), (os, "open"), (os, "pwrite"), (os, "mkdir"), (os, "rename"), (os, "replace"),
           (Path, "write_text"), (np.lib.format, "open_memmap"), (data.fcntl, "flock"), (json, "dumps"))


def die_at(moment, tree, store):
    """pack(), killed just after a crucial call."""
    passed = itertools.count()

    def watched(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if next(passed) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call

    for module, name in CRUCIAL:
        setattr(module, name, watched(getattr(module, name)))
    data.pack(tree, store, 2, max_bad=0.5)


def test_killed_at_each_crucial_call(tmp_path):
    spoil(write_tree(tmp_path / "tree", np.random.default_rng(6), 4), np.random.default_rng(6), ["NaN"])
    data.pack(tmp_path / "tree", tmp_path / "never killed", max_bad=0.5)
    for moment in itertools.count():
        store = tmp_path / str(moment)
        ended = wait(fork(die_at, moment, tmp_path / "tree", store))
        data.pack(tmp_path / "tree", store, max_bad=0.5)
        assert contents(store) == contents(tmp_path / "never killed"), moment
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert moment > 25  # arrays made, five writes for each of 3 rows, index written


def test_a_finished_store_whose_plan_is_damaged_is_left_alone(few, tmp_path):
    for damage in (lambda path: path.write_bytes(b""), lambda path: path.unlink()):
        store = tmp_path / "store"
        shutil.copytree(few.store, store)
        damage(store / "packing.json")
        whole = {name: content for name, content in contents(store).items() if name != "packing.json"}
        with pytest.raises(data.DataError, match="options or by another version: choose another folder"):
            data.pack(few.tree, store, max_bad=0.5)
        assert contents(store).items() >= whole.items()
        shutil.rmtree(store)


def test_files_mended_after_the_end_are_taken(few, tmp_path):
    tree, store = tmp_path / "tree", tmp_path / "store"
    shutil.copytree(few.tree, tree)
    before = data.pack(tree, store, max_bad=0.5)
    patch, = (patch for patch, reason in before.left_out.items() if "half" in reason)
    path = tree / few.written[patch]["s1"].relative_to(few.tree)
    rewrite(lambda image: np.full_like(image, -9))(path)
    after = data.pack(tree, store, max_bad=0.5)
    assert len(after.rows) == len(before.rows) + 1 and patch not in after.left_out and after.identity != before.identity
    data.pack(tree, tmp_path / "fresh", max_bad=0.5)
    assert contents(store) == contents(tmp_path / "fresh")


def test_killed_while_the_plan_is_written(few, tmp_path):
    with pytest.raises(data.DataError):
        data.pack(few.tree, tmp_path / "begun")  # too many are bad
    plan, = (path for path in (tmp_path / "begun").iterdir() if path.suffix == ".json")
    for length in (0, 1, len(plan.read_bytes()) // 2, len(plan.read_bytes()) - 1):
        store = tmp_path / str(length)
        store.mkdir()
        (store / plan.name).write_bytes(plan.read_bytes()[:length])
        data.pack(few.tree, store, max_bad=0.5)
        assert contents(store) == few.packed


def test_a_power_cut_loses_no_row_of_which_the_state_or_the_index_tells(few, tmp_path, monkeypatch):
    """Written is synced at once, in this order: the pixels, their record, its state; at last the
    index, whole before it has its name."""
    store, states, order = tmp_path / "store", [], []
    whole = {name: np.load(few.store / f"{name}.npy") for name in ("s1", "s2", "classes", "patches")}
    pwrite, fsync, replace = os.pwrite, os.fsync, os.replace

    def written(file, content, start):
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DSYNC
        count = pwrite(file, content, start)
        now = {name: np.load(store / f"{name}.npy") for name in whole}
        done = np.flatnonzero(now["patches"]["state"])
        for name in whole if len(done) else ():
            assert np.array_equal(now[name][done], whole[name][done])
        states.append(len(done))
        order.append(Path(os.readlink(f"/proc/self/fd/{file}")).stem)
        return count

    def synced(file):
        order.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    def renamed(source, target):
        assert order[-1] == Path(source).name and Path(source).read_bytes() == few.packed["index.json"]
        order.append(target.name)
        return replace(source, target)

    for name, function in (("pwrite", written), ("fsync", synced), ("replace", renamed)):
        monkeypatch.setattr(os, name, function)
    data.pack(few.tree, store, 1, max_bad=0.5)
    row = ["s1", "s2", "classes", "patches", "patches"]
    assert order == ["packing.json", *row * 8, "index.part", "index.json"] and states == [k // 5 for k in range(1, 41)]
    assert contents(store) == few.packed


def test_what_is_done_is_not_read_again(tree, packed, tmp_path, monkeypatch):
    store, judged, read = tmp_path / "store", [], data.read_patch
    assert wait(fork(killed_at_patch, 30, tree, store)) == -signal.SIGKILL
    done = np.load(store / "patches.npy")["state"] == 1
    monkeypatch.setattr(data, "read_patch", lambda pair, plan: (judged.append(pair["id"]), read(pair, plan))[1])
    ids = data.pack(tree, store, max_bad=0.5).ids
    assert done.sum() > 10 and sorted(judged) == sorted(np.array(ids)[~done])
    assert contents(store) == packed


def test_two_packings_into_one_store(tree, packed, tmp_path):
    pid = fork(held, tree, tmp_path / "store")
    wait_for(tmp_path / "reading")
    for _ in range(2):
        with pytest.raises(data.DataError, match="another run writes there"):
            data.pack(tree, tmp_path / "store", max_bad=0.5)
    (tmp_path / "go on").touch()
    assert wait(pid) == 0 and contents(tmp_path / "store") == packed


# ------------------------------------------------------------------------------ disks

def limited(size, tree, store):
    """Where no file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    refused_at_once(tree, store)


def test_quota_is_said_before_the_work(tree, packed, tmp_path, capfd):
    for size in (1000, 100_000):  # the plan does not fit, an array does not
        assert wait(fork(limited, size, tree, tmp_path / "store")) == 2
        said, = capfd.readouterr().out.splitlines()
        assert "File too large" in said
        assert not (tmp_path / "store/index.json").exists()
    data.pack(tree, tmp_path / "store", max_bad=0.5)
    assert contents(tmp_path / "store") == packed


@pytest.fixture
def disk(tmp_path):
    """Folder on a file system of 300 kB, and a function that mounts it with other options."""
    folder, mount = tmp_path / "disk", shutil.which("mount")
    folder.mkdir()
    command = [mount, "-t", "tmpfs", "-o", "size=300k", "none", folder]
    if not mount or subprocess.run(command, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder, lambda options: subprocess.run([mount, "-o", f"remount,{options}", folder], check=True)
    subprocess.run(["umount", "--lazy", folder], check=True)


def states_of(store):
    return np.load(store / "patches.npy")["state"] == 1


def slowly_judged(judged, read):
    return lambda pair, plan: (judged.append(pair["id"]), read(pair, plan))[1]


def test_full_disk_is_one_line_and_the_same_command_goes_on(tree, packed, disk, capfd, monkeypatch):
    folder, remount = disk
    assert wait(fork(slowly, tree, folder / "store")) == 2
    said, = capfd.readouterr().out.splitlines()
    assert data.re.search("No space left on device|disk is full", said)
    done, judged = states_of(folder / "store"), []
    assert 0 < done.sum() < 60 - len(BAD) and not (folder / "store/index.json").exists()
    remount("size=2m")
    monkeypatch.setattr(data, "read_patch", slowly_judged(judged, data.read_patch))
    ids = data.pack(tree, folder / "store", max_bad=0.5).ids
    assert sorted(judged) == sorted(np.array(ids)[~done])  # what was done is not done again
    remount("ro")
    assert contents(folder / "store") == packed
    patches = data.Patches(folder / "store")
    batches = data.grid_crops(patches.rows[:5], patches.size, 16, 5, middle=True)
    same(list(data.loader(patches, batches, 16)), list(by_hand(patches, batches, 16)))
    with pytest.raises(OSError, match="Read-only file system"):
        data.pack(tree, folder / "other", max_bad=0.5)


@pytest.mark.parametrize("written", [0, 1, 17])
def test_a_write_that_fails_is_one_line_and_the_same_command_goes_on(few, tmp_path, monkeypatch, written):
    """At each of the writes in turn, before, or with some bytes written: a full disk says so, or takes a part."""
    pwrite = os.pwrite
    for moment in range(9):
        store, passed = tmp_path / str(moment), itertools.count()

        def write(file, content, start, passed=passed, moment=moment):
            if next(passed) != moment:
                return pwrite(file, content, start)
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return pwrite(file, content[:written], start)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", write)
            with pytest.raises((data.DataError, OSError), match="No space left on device|disk is full") as error:
                data.pack(few.tree, store, 1, max_bad=0.5)
        assert "\n" not in str(error.value) and str(store) in str(error.value)
        assert not (store / "index.json").exists()
        for name in ("s1", "s2", "classes", "patches"):
            found, whole = (np.load(folder / f"{name}.npy")[states_of(store)] for folder in (store, few.store))
            assert np.array_equal(found, whole)
        data.pack(few.tree, store, max_bad=0.5)
        assert contents(store) == few.packed


def test_disk_that_is_full_at_the_end(tree, packed, disk):
    folder, remount = disk
    remount("size=2m")
    (folder / "other").write_bytes(b"x")

    def fill_the_disk(pair, plan):
        with pytest.raises(OSError, match="No space left"), open(folder / "other", "ab", 0) as other:
            while other.write(b"x" * 4096):
                pass
        return read(pair, plan)

    read, data.read_patch = data.read_patch, fill_the_disk
    try:
        with pytest.raises((data.DataError, OSError), match="No space left on device|disk is full"):
            data.pack(tree, folder / "store", max_bad=0.5)
    finally:
        data.read_patch = read
    assert not (folder / "store/index.json").exists()
    remount("size=4m")
    data.pack(tree, folder / "store", max_bad=0.5)
    assert contents(folder / "store") == packed


def test_read_only_tree_and_store():
    with tempfile.TemporaryDirectory(prefix="only readable ä ") as folder:
        folder = Path(folder)
        write_tree(folder / "tree", np.random.default_rng(0), 9)
        data.pack(folder / "tree", folder / "store")
        (folder / "out").mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777 if path.name == "out" else 0o555)

        def run():
            os.chdir("/")
            data.pack(folder / "tree", folder / "out/store")
            assert contents(folder / "out/store") == contents(folder / "store")
            patches = data.Patches(folder / "store")
            batches = data.grid_crops(patches.rows, patches.size, 16, 5, middle=True)
            same(list(data.loader(patches, batches, 16)), list(by_hand(patches, batches, 16)))
            with pytest.raises(OSError, match="Permission denied"):
                data.pack(folder / "tree", folder / "tree/store")

        as_nobody(run)


# ------------------------------------------------------------------------------ refusals

def test_every_file_bad(tmp_path):
    written = write_tree(tmp_path / "tree", np.random.default_rng(0), 6)
    for files in written.values():
        BAD["NaN"][1](files["s1"])
    for max_bad in (0.01, 1):
        with pytest.raises(data.DataError, match="[1-6] of 6 patches cannot be used.*more than half of it is missing"):
            data.pack(tmp_path / "tree", tmp_path / f"store {max_bad}", max_bad=max_bad)


def test_too_many_bad_stop_early_and_max_bad_goes_on(tree, packed, tmp_path, monkeypatch):
    read, judged = data.read_patch, []
    monkeypatch.setattr(data, "read_patch", lambda pair, plan: (judged.append(pair["id"]), read(pair, plan))[1])
    words = r"of 60 patches cannot be used, --max-bad allows 1.0%: .*ROIs0000_test_.*"
    with pytest.raises(data.DataError, match=words) as error:
        data.pack(tree, tmp_path / "store", 2)
    assert len(judged) <= 2 + 2 + 2 + 10 and "\n" not in str(error.value)
    data.pack(tree, tmp_path / "store", max_bad=0.5)
    assert contents(tmp_path / "store") == packed
    assert len(judged) < 58 + len(BAD)  # the good ones once


@pytest.mark.parametrize("share", [-1, 1.5, math.nan])
def test_a_share_of_bad_patches_that_is_none_is_refused(few, tmp_path, share):
    with pytest.raises(data.DataError, match=f"--max-bad {share}: a share, 0 to 1"):
        data.pack(few.tree, tmp_path / "store", max_bad=share)


def test_max_bad_counts_what_has_no_partner_at_every_start(tmp_path):
    written = write_tree(tmp_path / "tree", np.random.default_rng(0), 10)
    spoil(written, np.random.default_rng(0), ["partner"])
    for _ in range(3):
        with pytest.raises(data.DataError, match="1 of 10 patches cannot be used.*no s2 file"):
            data.pack(tmp_path / "tree", tmp_path / "store", max_bad=0.05)
    assert len(data.pack(tmp_path / "tree", tmp_path / "store", max_bad=0.1).rows) == 9


def test_mended_files_are_taken(tmp_path):
    written = write_tree(tmp_path / "tree", np.random.default_rng(0), 10)
    path = written["ROIs0000_test_2_p10"]["s2"]
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(data.DataError, match="ROIs0000_test_2_p10.*Mend them and start again"):
        data.pack(tmp_path / "tree", tmp_path / "store")
    path.write_bytes(content)
    data.pack(tmp_path / "tree", tmp_path / "store")
    data.pack(tmp_path / "tree", tmp_path / "fresh")
    assert contents(tmp_path / "store") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["s1.npy", "mine.txt", "index.part", "folder/x"])
def test_files_that_are_not_of_a_packing_are_left_alone(few, tmp_path, name):
    path = tmp_path / "store" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    for _ in range(2):
        with pytest.raises(data.DataError, match="holds other files.*choose another folder"):
            data.pack(few.tree, tmp_path / "store", max_bad=0.5)
        assert [p for p in (tmp_path / "store").rglob("*") if p.is_file()] == [path]
        assert path.read_bytes() == b"mine"


def test_other_tree_or_options(tree, packed, tmp_path):
    store, other = tmp_path / "store", tmp_path / "other"
    write_tree(other, np.random.default_rng(1), 7)
    data.pack(tree, store, max_bad=0.9)
    done = contents(store)
    for folder, offset in ((other, None), (tree, 0)):
        with pytest.raises(data.DataError, match="holds other files, or was packed from another tree"):
            data.pack(folder, store, max_bad=0.9, s2_offset=offset)
    data.pack(tree, store, max_bad=0.9)  # and the same again changes nothing
    assert contents(store) == done
    assert wait(fork(killed_at_patch, 20, tree, tmp_path / "half")) == -signal.SIGKILL
    half = contents(tmp_path / "half")
    for folder, offset in ((other, None), (tree, 0)):
        with pytest.raises(data.DataError, match="with other options"):
            data.pack(folder, tmp_path / "half", max_bad=0.9, s2_offset=offset)
    assert contents(tmp_path / "half") == half
    data.pack(tree, tmp_path / "half", max_bad=0.5)
    assert contents(tmp_path / "half") == packed


def test_a_tree_that_grew(few, tmp_path):
    shutil.copytree(few.tree, tmp_path / "tree")
    shutil.copytree(few.store, tmp_path / "store")
    write_tree(tmp_path / "tree", np.random.default_rng(0), 3, layout="dfc split")
    with pytest.raises(data.DataError, match="holds other files, or was packed from another tree"):
        data.pack(tmp_path / "tree", tmp_path / "store", max_bad=0.5)


def reindexed(change):
    def write(store):
        index = json.loads((store / "index.json").read_text())
        (store / "index.json").write_text(json.dumps(change(index)))
    return write


SPOILED = {  # a store that was hurt -> words of what is said
    "newer": (reindexed(lambda index: {**index, "format": 99}), "format 99, this version has "),
    "no format": (reindexed(lambda index: {k: v for k, v in index.items() if k != "format"}), "format"),
    "a list": (reindexed(list), "not a whole store"),
    "index cut off": (lambda store: os.truncate(store / "index.json", 900), "not a whole store"),
    "array cut off": (lambda store: os.truncate(store / "s2.npy", 20_000), "not a whole store"),
    "array empty": (lambda store: os.truncate(store / "s2.npy", 0), "not a whole store"),
    "array missing": (lambda store: (store / "classes.npy").unlink(), "classes.npy"),
    "records missing": (lambda store: (store / "patches.npy").unlink(), "patches.npy"),
    "no array": (lambda store: (store / "s1.npy").write_text("<html>"), "not a whole store"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_stores_that_are_refused(few, tmp_path, name):
    store = tmp_path / "store"
    shutil.copytree(few.store, store)
    hurt, words = SPOILED[name]
    hurt(store)
    with pytest.raises(data.DataError, match=words) as error:
        data.Patches(store)
    assert str(error.value).startswith(f"{store}: ") and "\n" not in str(error.value)
    assert "pack" in str(error.value)


