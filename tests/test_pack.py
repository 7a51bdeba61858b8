"""data.py pack: what kills, full disks and wrong files do to a store."""
import json
import os
import resource
import shutil
import signal
import subprocess
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import BAD, LAYOUTS, spoil, write_tree

import data


def contents(store):
    return {path.name: path.read_bytes() for path in sorted(Path(store).iterdir())}


def fork(function):
    """Run a function in a child process -> its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            torch.set_num_threads(1)
            function()
            code = 0
        except data.DataError as error:
            print(error, flush=True)
            code = 2
        except Exception:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def wait(pid):
    """-> exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def slowly(tree, store, workers=0, seconds=0.01):
    """pack() with a pause before each patch."""
    read = data.read_patch
    data.read_patch = lambda *args: (time.sleep(seconds), read(*args))[1]
    data.pack(tree, store, workers, max_bad=0.5)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """60 patches, of which 14 are bad."""
    folder, rng = tmp_path_factory.mktemp("pack"), np.random.default_rng(5)
    spoil(write_tree(folder / "tree", rng, 60), rng)
    return folder / "tree"


@pytest.fixture(scope="module")
def packed(tree):
    """The bytes of its store, never interrupted."""
    data.pack(tree, tree.parent / "store", 0, max_bad=0.5)
    return contents(tree.parent / "store")


def test_store(tree, packed):
    store = tree.parent / "store"
    index = json.loads(packed["index.json"])
    assert sorted(packed) == ["classes.npy", "index.json", "s1.npy", "s2.npy"]
    s1, s2, classes = (np.load(store / f"{name}.npy") for name in ("s1", "s2", "classes"))
    assert s1.shape == (46, 2, 16, 16) and s1.dtype == np.int16 and s2.shape == (46, 13, 16, 16) and s2.dtype == np.uint16
    assert classes.shape == (46, 16, 16) and len(index["left_out"]) == len(BAD) and len(index["ids"]) == 46
    values = np.concatenate((s1 / 100, s2), 1)
    for key, function in (("mean", np.mean), ("std", np.std), ("lowest", np.min), ("highest", np.max)):
        assert np.allclose(index[key], function(values, (0, 2, 3)), rtol=1e-6, atol=1e-6)


def test_statistics_of_bands_that_hardly_vary(tmp_path):
    rng = np.random.default_rng(0)
    s1 = rng.integers(-1200, -1198, (50, 2, 64, 64)).astype(np.int16)
    s2 = np.full((50, 13, 64, 64), 65_535, np.uint16) - rng.integers(0, 2, (50, 13, 64, 64)).astype(np.uint16)
    s2[:, 3] = 10
    sums = None
    for a, b in zip(s1, s2):
        sums = data.add_sums(sums, data.band_sums(a, b))
    found = data.statistics(sums, 50 * 64 * 64)
    values = np.concatenate((s1 / 100, s2), 1)
    assert np.allclose(found["mean"], values.mean((0, 2, 3)), rtol=1e-6)
    assert np.allclose(found["std"], values.std((0, 2, 3)), rtol=1e-6, atol=1e-12) and found["std"][5] == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_workers(tree, packed, tmp_path, workers):
    data.pack(tree, tmp_path / "store", workers, max_bad=0.5)
    assert contents(tmp_path / "store") == packed


@pytest.mark.parametrize("moment", range(10))
def test_killed_at_any_moment(tree, packed, tmp_path, moment):
    store, rng = tmp_path / "store", np.random.default_rng(moment)
    for _ in range(3):  # killed again while it goes on from there
        pid = fork(lambda: slowly(tree, store))
        time.sleep(rng.uniform(0, 0.45))
        os.kill(pid, signal.SIGKILL)
        if wait(pid) == 0:
            break
        if not (store / "index.json").exists() and (store / "progress.jsonl").exists():
            with pytest.raises(data.DataError, match="not finished: run the same"):
                data.open_data(store)
    data.pack(tree, store, 0, max_bad=0.5)
    assert contents(store) == packed


def test_killed_at_each_write(tree, packed, tmp_path):
    """Before and after what is brought to the disk as well as at the renaming: there a kill does the most harm."""
    names = [name for name in ("flush", "replace") for _ in range(2)]
    for calls in (0, 1, 2, 3, 4, 5, 18, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36):
        store = tmp_path / str(calls)

        def die(calls=calls, store=store):
            left = [calls]

            def counted(function):
                def call(*args):
                    for step in (lambda: None, lambda: function(*args)):
                        step()
                        left[0] -= 1
                        if left[0] < 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                return call
            for name in set(names):
                setattr(data, name, counted(getattr(data, name)))
            data.pack(tree, store, 0, max_bad=0.5)

        assert wait(fork(die)) in (0, -signal.SIGKILL)
        data.pack(tree, store, 0, max_bad=0.5)
        assert contents(store) == packed


def test_killed_with_workers_and_started_again_at_once(tree, packed, tmp_path):
    pid = fork(lambda: slowly(tree, tmp_path / "store", 2, 0.1))
    while not (tmp_path / "store/progress.jsonl").exists():
        time.sleep(0.01)
    time.sleep(1.2)
    os.kill(pid, signal.SIGKILL)  # its workers live on for some seconds
    assert wait(pid) == -signal.SIGKILL
    data.pack(tree, tmp_path / "store", 0, max_bad=0.5)
    assert contents(tmp_path / "store") == packed
    os.killpg(pid, signal.SIGKILL)


def test_a_line_of_progress_that_was_cut_off(tree, packed, tmp_path):
    with pytest.raises(data.DataError):
        data.pack(tree, tmp_path / "store", 0)
    with open(tmp_path / "store/progress.jsonl", "a") as log:
        log.write('{"bad": {}, "label": {"ROIs1158')
    data.pack(tree, tmp_path / "store", 0, max_bad=0.5)
    assert contents(tmp_path / "store") == packed


def test_two_packings_into_one_store(tree, packed, tmp_path):
    pid = fork(lambda: slowly(tree, tmp_path / "store"))
    while not (tmp_path / "store/progress.jsonl").exists():
        time.sleep(0.01)
    with pytest.raises(data.DataError, match="another packing is writing it"):
        data.pack(tree, tmp_path / "store", 0, max_bad=0.5)
    assert wait(pid) == 0 and contents(tmp_path / "store") == packed


# ---------------------------------------------------------------------------------------------- disks

def limited(size, function):
    """A function that runs where no file may grow beyond so many bytes."""
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        function()
    return run


def test_full_disk_is_said_before_the_work(tree, packed, tmp_path, capfd):
    needed = 60 * 16 * 16 * (2 * 15 + 1) - 2 * 16 * 16 * 31 + 3 * 128  # the two without partner are never read
    assert wait(fork(limited(100_000, lambda: slowly(tree, tmp_path / "store")))) == 2
    said = capfd.readouterr().out
    assert f"needs {needed:,} bytes" in said and "are free" in said and len(said.splitlines()) == 1
    assert list((tmp_path / "store").iterdir()) == []
    data.pack(tree, tmp_path / "store", 0, max_bad=0.5)
    assert contents(tmp_path / "store") == packed


def test_small_tmpfs(tree, packed, tmp_path):
    (tmp_path / "disk").mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=300k", "none", tmp_path / "disk"], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(data.DataError, match="needs .* bytes, 30.,... are free"):
            data.pack(tree, tmp_path / "disk/store", 0, max_bad=0.5)
        assert list((tmp_path / "disk/store").iterdir()) == []
        subprocess.run([mount, "-o", "remount,size=2m", tmp_path / "disk"], check=True)
        data.pack(tree, tmp_path / "disk/store", 0, max_bad=0.5)
        subprocess.run([mount, "-o", "remount,ro", tmp_path / "disk"], check=True)
        assert contents(tmp_path / "disk/store") == packed
        store = data.open_data(tmp_path / "disk/store")  # on a read-only mount
        assert store.crops([5], [0], [0], 16)[0].shape == (1, 2, 16, 16)
        del store
        with pytest.raises(data.DataError, match="Read-only file system: .* choose another folder"):
            data.pack(tree, tmp_path / "disk/other", 0, max_bad=0.5)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=True)


def test_disk_that_fills_in_spite_of_the_reservation(tree, packed, tmp_path, capfd):
    def run():
        data.reserve = lambda store, files, *progress: (data.replace(*progress), [path.touch() for path in files])
        data.pack(tree, tmp_path / "store", 0, max_bad=0.5)
    assert wait(fork(limited(200_000, run))) == 2
    assert "File too large: mend that" in capfd.readouterr().out and not (tmp_path / "store/index.json").exists()
    data.pack(tree, tmp_path / "store", 0, max_bad=0.5)
    assert contents(tmp_path / "store") == packed


def test_read_only_tree_and_store(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "only readable ä"
    write_tree(folder / "tree", np.random.default_rng(0), 9)
    data.pack(folder / "tree", folder / "store", 0)
    expected = contents(folder / "store")
    (folder / "out").mkdir()
    os.chmod(folder / "out", 0o777)
    paths = [folder / "tree", folder / "store", *(folder / "tree").rglob("*"), *(folder / "store").iterdir()]
    above = [path for path in folder.parents if path.stat().st_uid == os.getuid() and not path.stat().st_mode & 0o001]
    modes = {path: path.stat().st_mode for path in (*above, *paths)}
    for path, mode in modes.items():
        os.chmod(path, mode | 0o111 if path in above else 0o555)

    def run():
        if os.getuid() == 0:  # root may write anywhere
            os.setgid(65534)
            os.setuid(65534)
        os.chdir("/")
        data.pack(folder / "tree", folder / "out/store", 0)
        assert contents(folder / "out/store") == expected
        patches = data.open_data(folder / "store")
        assert len(patches) == 9 and patches.crops([8], [0], [0], 16)[2].shape == (1, 16, 16)
        assert len(data.open_data(folder / "tree", workers=0)) == 9
        with pytest.raises(data.DataError, match="Permission denied"):
            data.pack(folder / "tree", folder / "tree/store", 0)

    try:
        assert wait(fork(run)) == 0
    finally:
        for path, mode in modes.items():
            os.chmod(path, mode)


# ---------------------------------------------------------------------------------------------- refusals

def test_every_file_bad(tmp_path):
    written = write_tree(tmp_path / "tree", np.random.default_rng(0), 6)
    for files in written.values():
        BAD["NaN"][1](files["s1"])
    for max_bad in (0.01, 1):
        with pytest.raises(data.DataError, match="6 of 6 patches cannot be used.*NaN or infinite"):
            data.pack(tmp_path / "tree", tmp_path / f"store {max_bad}", 0, max_bad=max_bad)
    for files in written.values():
        BAD["no TIFF"][1](files["s2"])
    with pytest.raises(data.DataError, match="s2_1_p9.tif: neither it nor the others"):
        data.pack(tmp_path / "tree", tmp_path / "store", 0)
    assert not (tmp_path / "store").exists()


def test_too_many_bad_stop_early_and_max_bad_goes_on(tree, packed, tmp_path, monkeypatch):
    read, judged = data.read_patch, []
    monkeypatch.setattr(data, "read_patch", lambda place, shape: (judged.append(place.id), read(place, shape))[1])
    with pytest.raises(data.DataError, match=r"of 60 patches cannot be used, --max-bad allows 1.0%: ROIs1158_spring_"):
        data.pack(tree, tmp_path / "store", 0)
    data.pack(tree, tmp_path / "store", 0, max_bad=0.5)
    assert contents(tmp_path / "store") == packed and len(judged) == len(set(judged)) == 58


@pytest.mark.parametrize("seed", range(8))
def test_random_trees(tmp_path, seed):
    """Any layout, size and number of bands, bad files mixed in: left out is what was spoiled, and no more; tree and
    store agree bit for bit."""
    rng = np.random.default_rng(seed)
    layout, size = list(LAYOUTS)[seed % len(LAYOUTS)], (4 * int(rng.integers(2, 8)), int(rng.integers(7, 30)))
    written = write_tree(tmp_path / "tree", rng, 24, size, layout, bands=int(rng.integers(12, 14)))
    spoilt = rng.permutation(len(written))[:5]
    for k, kind in zip(spoilt, rng.permutation(list(BAD))):
        sensor, do, _ = BAD[kind]
        do(list(written.values())[k][LAYOUTS[layout][1] if sensor == "lc" else sensor])
    index = data.pack(tmp_path / "tree", tmp_path / "store", int(rng.integers(3)), max_bad=0.5)
    assert index["patches"] == 19 and len(index["left_out"]) == 5 and tuple(index["shape"][1:]) == size
    tree, store = (data.open_data(tmp_path / name, workers=0, max_bad=0.5) for name in ("tree", "store"))
    assert {key: value for key, value in index.items() if key != "key"} == tree.index == {
        key: value for key, value in store.index.items() if key != "key"}
    side = int(rng.integers(1, min(size) + 1))
    for make in (lambda p: data.RandomCrops(p, range(19), side, 7, seed), lambda p: data.GridCrops(p, range(19), side, 7)):
        for step in range(3):
            for x, y in zip(make(tree)[step], make(store)[step], strict=True):
                assert torch.equal(x, y)


def test_files_that_are_not_of_a_packing_are_left_alone(tree, tmp_path):
    (tmp_path / "s1.npy").write_bytes(b"mine")
    with pytest.raises(data.DataError, match="s1.npy: there is such a file, but no packing began here"):
        data.pack(tree, tmp_path, 0, max_bad=0.5)
    assert (tmp_path / "s1.npy").read_bytes() == b"mine" and not (tmp_path / "progress.jsonl").exists()


def test_unicode_and_spaces(tmp_path):
    tree, store = tmp_path / "Daten – ähm [1]", tmp_path / "a b" / "ç %20"
    write_tree(tree, np.random.default_rng(0), 5, layout="plain")
    index = data.pack(tree, store, 1)
    assert index["ids"][0] == "place 1 é 10" and data.open_data(store).ids == index["ids"]


def test_other_tree_or_options(tree, packed, tmp_path):
    store = tmp_path / "store"
    data.pack(tree, store, 0, limit=20, max_bad=0.9)
    done = contents(store)
    for options in ({}, {"limit": 21}):
        with pytest.raises(data.DataError, match="holds another packing"):
            data.pack(tree, store, 0, max_bad=0.9, **options)
    assert contents(store) == done  # and the same again changes nothing
    data.pack(tree, store, 0, limit=20, max_bad=0.9)
    assert contents(store) == done
    pid = fork(lambda: slowly(tree, tmp_path / "half", seconds=0.05))
    time.sleep(0.6)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    with pytest.raises(data.DataError, match="changed since this packing began"):
        data.pack(tree, tmp_path / "half", 0, limit=20, max_bad=0.9)


def test_stores_that_are_refused(tree, packed, tmp_path):
    def spoiled(name, change):
        store = tmp_path / name
        store.mkdir()
        for file, content in packed.items():
            (store / file).write_bytes(content)
        change(store)
        with pytest.raises(data.DataError) as caught:
            data.open_data(store)
        return str(caught.value)

    def reindex(**entries):
        return lambda store: (store / "index.json").write_text(json.dumps({**json.loads(packed["index.json"]), **entries}))

    assert "store format 2, this version reads 1" in spoiled("newer", reindex(format=2))
    assert "store format None" in spoiled("none", reindex(format=None))
    size = len(packed["s2.npy"])
    said = spoiled("short", lambda store: os.truncate(store / "s2.npy", size - 1))
    assert "s2.npy" in said and f"{size - 1:,} bytes where the index says {size:,}" in said
    assert "classes.npy: 0 bytes" in spoiled("missing", lambda store: (store / "classes.npy").unlink())
    assert "s1.npy: not the array" in spoiled("swapped", lambda store: shutil.copy(store / "s2.npy", store / "s1.npy"))
    assert "index.json cannot be read" in spoiled("cut", lambda store: os.truncate(store / "index.json", 900))


