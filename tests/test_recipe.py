"""tests/recipe.py: every trial trains, is judged and stands in the table."""
import json

import pytest
import recipe
import torch


@pytest.mark.parametrize("trial", recipe.TRIALS)
def test_trials(labelled, tmp_path, monkeypatch, capsys, trial):
    for name in ("pairs", "flood"):
        (tmp_path / name).symlink_to(labelled)
    monkeypatch.setattr(recipe, "USUAL", recipe.USUAL | {"crop": 24, "batch_size": 8})
    monkeypatch.setitem(recipe.TRIALS, trial, {**recipe.TRIALS[trial], "batch_size": 8})
    threads = torch.get_num_threads()
    line = recipe.run(trial, tmp_path, 0, 5)
    torch.set_num_threads(threads)
    assert line["places"] == 24 and 0 <= line["top1"] <= line["top5"] <= 1 and line["simulated"]
    recipe.print_table([{**line, "trial": "poster", "top1": 0.1, "top5": 0.2}, {**line, "top1": 0.2, "top5": 0.3}])
    table = capsys.readouterr().out
    assert "SIMULATED" in table and (trial == "poster" or f"| {trial} | 1 | 20.0 | 30.0 | 2.00 / 1.50 |" in table)
    assert json.dumps(line)
