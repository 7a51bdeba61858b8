"""Fixtures: simulated trees and stores, the shared reference data, scripts run as a user does."""
import contextlib
import functools
import io
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import simulate
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

import data

if not any("test_gpu.py" in word and "=" not in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bits and processes are compared on the CPU
BACKGROUND = ThreadPoolExecutor(1)
CONTEXT = multiprocessing.get_context("forkserver")  # imports torch once for all that tests start
CONTEXT.set_forkserver_preload(["torch", "torchvision.transforms.v2", "matplotlib.pyplot",
                                "rasterio", "torch._dynamo"])
torch.set_num_threads(1)  # a second one gains little on small crops, and other processes are at work


def pytest_configure(config):
    """PNGs and small test files lie nowhere, as rasterio warns."""
    config.addinivalue_line("filterwarnings", "ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.fixture
def tmp_path():
    """Removed after each test: a run writes some 10 GB of checkpoints, of which pytest keeps three runs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def shared():
    """Folder of golden values and real pairs; tests that need it are skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared here")
    return SHARED


@functools.cache
def folder():
    """For what lasts as long as the tests."""
    return Path(tempfile.mkdtemp())


@functools.cache
def simulated():
    """Trees sen12ms (64 pairs of 40 px in 4 scenes) and dfc2020 (32 + 24 labelled) -> their folder."""
    simulate.simulate_sen12ms(folder() / "sen12ms", scenes=4, patches=16, size=40, seed=1)
    simulate.simulate_dfc2020(folder() / "dfc2020", train=32, test=24, size=40, seed=1)
    return folder()


@pytest.fixture(scope="session")
def trees():
    return simulated()


@pytest.fixture(scope="session")
def labelled(trees):
    """The tree dfc2020, packed."""
    data.pack(trees / "dfc2020", trees / "labelled")
    return trees / "labelled"


@pytest.fixture(scope="session")
def pairs(trees):
    """The tree sen12ms, packed."""
    data.pack(trees / "sen12ms", trees / "pairs")
    return trees / "pairs"


def pytest_collection_finish(session):
    """Begin what takes long in other processes, one at a time, unless only a few tests are run."""
    modules = dict.fromkeys(item.module for item in session.items)
    with contextlib.redirect_stderr(io.StringIO()):  # pytest does not yet hide progress bars
        for module in modules if len(session.items) > 100 else ():
            getattr(module, "begin", int)()


def pytest_unconfigure():
    BACKGROUND.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.kill()
    if folder.cache_info().currsize:
        shutil.rmtree(folder(), ignore_errors=True)


def as_main(script, args, folder):
    """In a process of its own: the script, its output into files of the folder."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.argv = [script, *map(str, args)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def as_nobody(function):
    """Run a function in a process that may read and write only what everybody may."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            function()
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def user(script, *args):
    """Run a script of the project in a process of its own -> CompletedProcess with text output."""
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=as_main, args=(script, args, folder))
        process.start()
        process.join(600)
        said = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(args, process.exitcode, *said)


def call(monkeypatch, module, *args):
    """Run a script's main() in this process, which spares the seconds that importing torch takes."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    return module.main()


def watch(monkeypatch, module, name):
    """-> list that fills with (arguments, result) of every call of a module's function."""
    calls, function = [], getattr(module, name)

    def watched(*args, **options):
        result = function(*args, **options)
        calls.append((args, result))
        return result

    monkeypatch.setattr(module, name, watched)
    return calls
