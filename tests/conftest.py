"""Fixtures: simulated trees, a finished pretraining, the shared reference data, scripts run as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import simulate

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))


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


def user(script, *args, cwd=ROOT, **kwargs):
    """Run a script of the project in a process of its own -> CompletedProcess with text output."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, text=True, check=False,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600, **kwargs)


def call(monkeypatch, module, *args):
    """Run a script's main() in this process, which spares the seconds that importing torch takes."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    return module.main()
