"""The README's snippet, run as it stands."""
import re
import runpy

import numpy as np
import rasterio
import torch
from conftest import ROOT

import models


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
