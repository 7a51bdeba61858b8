"""Fixtures: simulated trees, the shared reference data, scripts run as a user runs them."""
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import simulate
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
CONTEXT = multiprocessing.get_context("forkserver")  # imports torch once for all the processes that tests start
CONTEXT.set_forkserver_preload(["torch", "torchvision.transforms.v2", "matplotlib.pyplot", "rasterio", "torch._dynamo"])


def pytest_sessionstart():
    multiprocessing.forkserver.ensure_running()  # imports while the first tests run


@pytest.fixture(scope="session")
def shared():
    """Folder of golden values and real pairs; tests that need it are skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared here")
    return SHARED


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """Small simulated trees: trees/sen12ms (64 pairs of 40 px) and trees/dfc2020 (32 + 48 labelled)."""
    out = tmp_path_factory.mktemp("trees")
    simulate.simulate_sen12ms(out / "sen12ms", scenes=4, patches=16, size=40, seed=1)
    simulate.simulate_dfc2020(out / "dfc2020", train=32, test=48, size=40, seed=1)
    return out


def as_main(script, args, folder):
    """In a process of its own: the script, its output into files of the folder."""
    multiprocessing.set_start_method("fork", force=True)  # for its readers, as in a process that a user starts
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.argv = [script, *map(str, args)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def users(*commands):
    """Run scripts of the project, each (script, *arguments) in a process of its own and all at a time -> a
    CompletedProcess with text output for each."""
    with tempfile.TemporaryDirectory() as folder:
        folders = [tempfile.mkdtemp(dir=folder) for _ in commands]
        processes = [CONTEXT.Process(target=as_main, args=(script, args, place))
                     for (script, *args), place in zip(commands, folders)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(600)
        return [subprocess.CompletedProcess(command, process.exitcode, *(Path(place, n).read_text() for n in ("out", "err")))
                for command, process, place in zip(commands, processes, folders)]


def user(script, *args):
    """One of users()."""
    return users((script, *args))[0]


def call(monkeypatch, module, *args):
    """Run a script's main() in this process, which spares the seconds that importing torch takes."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    return module.main()
