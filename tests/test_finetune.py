"""The seven rows, trained for a step or two on simulated trees."""
import argparse
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import CONTEXT, as_main, call, user

import data
import finetune
import linear_eval
import models

QUICK = ("--epochs", 1, "--batch-size", 16, "--crop", 32, "--seeds", 1, "--workers", 0, "--label-fraction", 0.5)


def tune(monkeypatch, tree, results, *options):
    call(monkeypatch, finetune, "--data", tree, "--results", results, *QUICK, *options)
    return linear_eval.Results(results).read()


def save(path, patches, method, **change):
    model = models.Contrastive(method, patches.bands)
    content = {"method": method, "arch": "resnet18", "bands": patches.bands, "scale": "fixed", "stats": None,
               "simulated": True, "args": {"crop": 32}, **change}
    models.save_checkpoint(path, model, **content)


@pytest.mark.parametrize("method", models.METHODS)
def test_each_row_from_scratch(tmp_path, labelled, monkeypatch, method):
    line, = tune(monkeypatch, labelled, tmp_path, "--method", method, "--task", "multi")
    assert line["method"] == method and line["protocol"] == "scratch" and line["simulated"]
    assert line["counts"]["train_patches"] < 32 and 0 <= line["overall"] <= 1 and "confusion" not in line
    assert line["args"]["bands"]["s2"] == (models.RGB if method == "simclr-rgb" else list(data.S2_BANDS))


@pytest.mark.parametrize("method", [name for name, row in models.METHODS.items() if row["pretrained"]])
def test_each_pretrained_row_is_fine_tuned(tmp_path, trees, monkeypatch, method):
    patches = data.open_data(trees / "dfc2020", models.METHODS[method].get("bands"), workers=0)
    save(tmp_path / "last.pt", patches, method)
    line, = tune(monkeypatch, trees / "dfc2020", tmp_path / "a", "--checkpoint", tmp_path / "last.pt")
    assert line["method"] == method and line["protocol"] == "finetune" and line["args"]["scale"] == "fixed"
    assert np.sum(line["confusion"]) == line["counts"]["test_crops"]


def test_run_twice_gives_equal_bits_and_is_not_repeated(tmp_path, labelled, monkeypatch):
    options = ("--method", "only-s1", "--seeds", 2)
    logits, extract = [], linear_eval.extract
    monkeypatch.setattr(linear_eval, "extract", lambda *args: logits.append(extract(*args)) or logits[-1])
    first = tune(monkeypatch, labelled, tmp_path / "a", *options)
    second = tune(monkeypatch, labelled, tmp_path / "b", *options, "--cache", "ram")
    assert len(first) == 2 and len(logits) == 4
    assert all(np.array_equal(a["logits"], b["logits"]) for a, b in zip(logits[:2], logits[2:]))
    assert [line["class"] for line in first] == [line["class"] for line in second]
    assert not np.array_equal(logits[0]["logits"], logits[1]["logits"])  # another seed
    monkeypatch.setattr(finetune, "train", None)
    assert tune(monkeypatch, labelled, tmp_path / "a", *options) == first


def test_killed_and_started_again_nothing_is_lost_or_counted_twice(tmp_path, labelled):
    def command(name):
        return ("--method", "only-s1", "--data", labelled, *QUICK, "--seeds", 3, "--results", tmp_path / name)

    def lines(name):
        return [{key: value for key, value in line.items() if key != "seconds"}
                for line in linear_eval.Results(tmp_path / name).read()]

    assert user("finetune.py", *command("whole")).returncode == 0
    process = CONTEXT.Process(target=as_main, args=("finetune.py", command("killed"), tmp_path))
    process.start()
    while not lines("killed"):
        time.sleep(0.01)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert 1 <= len(lines("killed")) < 3
    assert user("finetune.py", *command("killed")).returncode == 0
    assert lines("killed") == lines("whole") and len(lines("whole")) == 3


@pytest.mark.parametrize("options, message", [
    (("--method", "mma"), "holds method d-simclr, not --method mma"),
    (("--method", "late-fusion"), "holds method d-simclr, not --method late-fusion"),
    (("--arch", "resnet50"), "holds arch resnet18, not --arch resnet50"),
    (("--scale", "patch-max"), "holds scale fixed, not --scale patch-max"),
    (("--bands", "VV", "VH", "B4"), "not --bands VV VH B4"),
])
def test_a_checkpoint_of_something_else_is_one_line(tmp_path, labelled, monkeypatch, options, message):
    save(tmp_path / "last.pt", data.open_data(labelled, workers=0), "d-simclr")
    with pytest.raises(models.CheckpointError, match=message):
        tune(monkeypatch, labelled, tmp_path, "--checkpoint", tmp_path / "last.pt", *options)
    if "mma" in options:
        result = user("finetune.py", "--checkpoint", tmp_path / "last.pt", "--data", labelled, *options)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr


def test_crops_without_a_label_teach_nothing():
    logits = torch.randn(4, 8, requires_grad=True)
    classes = torch.full((4, 10, 10), data.IGNORE, dtype=torch.uint8)
    for task in ("single", "multi"):
        loss = finetune.task_loss(task, logits, classes)
        loss.backward()
        assert loss == 0 and not logits.grad.any()
    classes[0] = 3
    label = torch.nn.functional.one_hot(torch.tensor([3]), 8).float()
    single = torch.nn.functional.cross_entropy(logits[:1], label)
    multi = torch.nn.functional.binary_cross_entropy_with_logits(logits[:1], label)
    assert finetune.task_loss("single", logits, classes).item() == pytest.approx(single.item())
    assert finetune.task_loss("multi", logits, classes).item() == pytest.approx(multi.item())


def fit_some(labelled, rows, **change):
    args = argparse.Namespace(**{"crop": 32, "batch_size": 2, "lr": 1e-5, "classifier_lr": 1e-5, "weight_decay": 0.0,
                                 "epochs": 1, "drop_epoch": 1, "workers": 0, "precision": "float32", "device": "cpu",
                                 "arch": "resnet18", "results": labelled.parent, **change})
    patches = data.open_data(labelled, workers=0)
    model = finetune.make_classifier("only-s2", patches, {}, args, seed=0)
    finetune.train(model, patches, np.array(rows), {"scale": "fixed"}, "single", 0, args, "a run")
    return model


def test_a_batch_of_one_sample(labelled):
    model = fit_some(labelled, [0, 1, 2])  # batches of 2 and 1; the last map of crops of 32 px is 1 x 1
    assert all(p.isfinite().all() for p in model.state_dict().values())


def test_a_loss_that_is_not_finite_is_named(labelled):
    with pytest.raises(data.DataError, match="a run: the loss is nan after epoch 1: try a lower --lr"):
        fit_some(labelled, [0, 1, 2, 3], lr=1e30, classifier_lr=1e30)
