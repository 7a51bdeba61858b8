"""Fixtures: simulated trees, the shared reference data, scripts run as a user runs them."""
import multiprocessing.forkserver
import os
import runpy
import shutil
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
torch.set_num_threads(1)  # a second one gains little on small crops, and other processes are at work
CONTEXT.set_forkserver_preload(["torch", "torchvision.transforms.v2", "matplotlib.pyplot", "rasterio", "torch._dynamo"])

@pytest.fixture(scope="session")
def shared():
    """Folder of golden values and real pairs; tests that need it are skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared here")
    return SHARED


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """Small simulated trees: trees/sen12ms (64 pairs of 40 px) and trees/dfc2020 (32 + 24 labelled)."""
    out = tmp_path_factory.mktemp("trees")
    simulate.simulate_sen12ms(out / "sen12ms", scenes=4, patches=16, size=40, seed=1)
    simulate.simulate_dfc2020(out / "dfc2020", train=32, test=24, size=40, seed=1)
    return out


def as_main(script, args, folder):
    """In a process of its own: the script, its output into files of the folder."""
    multiprocessing.set_start_method("fork", force=True)  # for its readers, as in a process that a user starts
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.argv = [script, *map(str, args)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def user(script, *args):
    """Run a script of the project in a process of its own -> CompletedProcess with text output."""
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=as_main, args=(script, args, folder))
        process.start()
        process.join(600)
        said = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(args, process.exitcode, *said)


def pytest_collection_finish(session):
    """The pretrainings of test_sanity.py take a minute: they begin now, in processes of their own."""
    if any("pretrained" in item.fixturenames for item in session.items) and not session.config.option.collectonly:
        out = Path(tempfile.mkdtemp())
        session.config.pretraining = out, [CONTEXT.Process(target=pretrain_for_sanity, args=(out, seed)) for seed in range(2)]
        for process in session.config.pretraining[1]:
            process.start()


def pytest_unconfigure(config):
    if hasattr(config, "pretraining"):
        for process in config.pretraining[1]:
            process.kill()
        shutil.rmtree(config.pretraining[0], ignore_errors=True)


def pretrain_for_sanity(out, seed):
    """D-SimCLR on simulated pairs."""
    simulate.simulate_sen12ms(out / f"tree{seed}", scenes=16, patches=40, size=32, seed=3)
    as_main("pretrain.py", ["--data", out / f"tree{seed}", "--out", out / f"run{seed}", "--epochs", 2, "--batch-size", 16,
                            "--crop", 32, "--lr", 1e-3, "--constant-epochs", 1, "--scale", "fixed", "--holdout", 0.2,
                            "--seed", seed, "--workers", 0], out / f"tree{seed}")


def call(monkeypatch, module, *args):
    """Run a script's main() in this process, which spares the seconds that importing torch takes."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    return module.main()
