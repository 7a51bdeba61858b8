"""The README's snippet, run as it stands, and its scripts one after another."""
import functools
import re
import runpy

import numpy as np
import rasterio
import torch
from conftest import BACKGROUND, ROOT, folder, user
from test_map import write_classifier, write_scene

import data
import models


def as_a_user():
    """-> folder of what the scripts write, each run in a process of its own on a tiny simulated tree."""
    out = folder() / "a user"
    encoders, labelled = ("--checkpoint", out / "run/last.pt"), ("--data", out / "labelled")
    small = ("--crop", 16, "--seeds", 1, "--results", out / "results")
    for command in (
            ("tests/simulate.py", out, "--size", 16, "--scenes", 4, "--patches", 6, "--dfc-train", 24, "--dfc-test", 16),
            ("data.py", "pack", out / "dfc2020", out / "labelled"),
            ("data.py", "pack", out / "sen12ms", out / "store", "--threads", 1),
            ("data.py", "check", out / "labelled"),
            ("tests/show.py", out / "labelled", out / "pairs.png"),
            ("pretrain.py", "--method", "mma", "--data", out / "store", "--out", out / "run",
             "--epochs", 1, "--batch-size", 8, "--crop", 16, "--holdout", 0.25),
            ("tests/show.py", out / "run", out / "curve.png"),
            ("linear_eval.py", *encoders, *labelled, *small, "--task", "single", "multi"),
            ("finetune.py", "--method", "only-s2", *labelled, *small, "--epochs", 1, "--precision", "float32"),
            ("finetune.py", "--report", out / "results"),
            ("linear_eval.py", *encoders, *labelled, "--embed", out / "embeddings.npz"),
            ("linear_eval.py", *encoders, *labelled, "--retrieve", out / "retrieval.png"),
            ("models.py", "export", out / "run/last.pt", out / "exported")):
        done = user(*command)
        assert done.returncode == 0, (command, done.stderr)
    return out


@functools.cache
def begin():
    return BACKGROUND.submit(as_a_user)


def test_the_scripts_one_after_another():
    out = begin().result()
    for name in ("store/index.json", "pairs.png", "curve.png", "retrieval.png",
                 "exported/s1.pt", "exported/card.json"):
        assert (out / name).exists(), name
    text = (out / "results/tables.md").read_text()
    assert "| OnlySen-2 |" in text and "| MMA | single | 100 % |" in text and "SIMULATED" in text
    with np.load(out / "embeddings.npz") as arrays:
        assert arrays["s1"].shape == (40, 256)


def test_snippet_goes_from_two_geotiffs_to_an_embedding(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?load_encoders.*?)```", readme, re.DOTALL)[1]
    assert len(snippet.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    bands = {"s1": models.S1_BANDS, "s2": models.S2_BANDS}
    stats = {sensor: {"mean": [0.0] * len(names), "std": [1.0] * len(names)} for sensor, names in bands.items()}
    model = models.Contrastive("d-simclr", bands)
    (tmp_path / "runs/d-simclr").mkdir(parents=True)
    models.save_checkpoint(tmp_path / "runs/d-simclr/last.pt", model, method="d-simclr", arch="resnet18", bands=bands,
                           scale="fixed", stats=stats, simulated=True, args={})
    rng = np.random.default_rng(0)
    images = {"s1.tif": rng.uniform(-30, 5, (2, 64, 48)).astype(np.float32),
              "s2.tif": rng.integers(0, 12_000, (13, 64, 48), dtype=np.uint16)}
    images["s1.tif"][1] -= 3  # VH is the darker
    images["s2.tif"][10] %= 100  # cirrus
    for name, image in images.items():
        with rasterio.open(name, "w", driver="GTiff", count=len(image), height=64, width=48, dtype=image.dtype) as tif:
            tif.write(image)
    (tmp_path / "snippet.py").write_text(snippet)
    found = runpy.run_path("snippet.py")
    s1 = torch.from_numpy(images["s1.tif"]).clamp(-25, 0)[None] / 25 + 1
    s2 = torch.from_numpy(images["s2.tif"].astype(np.float32)).clamp(0, 10_000)[None] / 10_000
    with torch.no_grad():
        expected = torch.cat((model.eval().encoders["s1"](s1), model.encoders["s2"](s2)), 1)
    assert found["embedding"].shape == (1, 1024)
    torch.testing.assert_close(found["embedding"], expected, rtol=1e-5, atol=1e-5)


def test_snippet_goes_from_two_geotiffs_to_a_class(tmp_path, monkeypatch, capsys):
    snippet = re.search(r"```python\n(classifier.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(snippet.strip().splitlines()) <= 5
    monkeypatch.chdir(tmp_path)
    s1, s2 = write_scene(tmp_path, 64, 64)
    (tmp_path / "S1.tif").rename(tmp_path / "s1.tif")
    (tmp_path / "S2.tif").rename(tmp_path / "s2.tif")
    write_classifier(tmp_path / "DIR/late-fusion_single_1_seed0.pt", crop=64, scale="standard")
    exec(snippet, {"models": models, "data": data, "torch": torch, "rasterio": rasterio})  # noqa: S102
    model, scaling, names = models.load_classifier(tmp_path / "DIR/late-fusion_single_1_seed0.pt")
    label = model(*models.to_input(s1[None], s2[None].astype(np.float32), **scaling)).argmax()
    assert capsys.readouterr().out.strip() == names[label]
