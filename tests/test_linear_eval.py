"""Metrics, linear probe, results, report, embeddings."""
import argparse
import itertools
import json
import multiprocessing
import os

import numpy as np
import pytest
import simulate
import torch
import torch.nn.functional as F
from conftest import ROOT, call, user

import data
import finetune
import linear_eval
import models
from data import CLASSES, IGNORE

PUBLISHED_COUNTS = (76, 37, 101, 180, 156, 62, 23, 351)  # patches per class of the 986


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, trees):
    """An untrained D-SimCLR checkpoint for crops of 32 px of the simulated trees."""
    torch.manual_seed(0)
    patches = data.open_data(trees / "sen12ms", workers=0)
    path = tmp_path_factory.mktemp("run") / "last.pt"
    models.save_checkpoint(path, models.Contrastive("d-simclr", patches.bands), method="d-simclr", arch="resnet18",
                           bands=patches.bands, scale="standard", stats=patches.stats(set(patches.splits)),
                           simulated=True, args={"crop": 32, "holdout": 0.3, "data": patches.identity()})
    return path


# ---------------------------------------------------------------------------------------------- metrics

def test_metrics_are_those_of_the_released_code(shared):
    golden = np.load(shared / "golden/metrics.npz")
    single = linear_eval.single_scores(golden["single_true"], golden["single_pred"])
    multi = linear_eval.multi_scores(golden["multi_true"], golden["multi_pred"])
    for scores, prefix, name in ((single, "single", "class_accuracy"), (multi, "multi", "class_f1")):
        np.testing.assert_allclose(scores["class"], golden[f"{prefix}_{name}"], atol=1e-6)
        assert scores["average"] == pytest.approx(golden[f"{prefix}_average"], abs=1e-6)
        assert scores["overall"] == pytest.approx(golden[f"{prefix}_overall"], abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_metrics_agree_with_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    n, classes = rng.integers(1, 200), rng.permutation(8)[:rng.integers(1, 9)]  # often not all classes occur
    true, predicted = rng.choice(classes, n), rng.integers(0, 8, n)
    ours = linear_eval.single_scores(true, predicted)
    confusion = metrics.confusion_matrix(true, predicted, labels=range(8))
    there = np.flatnonzero(confusion.sum(1))
    np.testing.assert_allclose(ours["class"][there], confusion.diagonal()[there] / confusion.sum(1)[there])
    assert np.isnan(np.delete(ours["class"], there)).all()
    assert ours["average"] == pytest.approx(metrics.recall_score(true, predicted, labels=there, average="macro"))
    assert ours["overall"] == pytest.approx(metrics.accuracy_score(true, predicted))
    scored = linear_eval.score("single", true, np.eye(8)[predicted])
    np.testing.assert_array_equal(scored["confusion"], confusion)

    true, predicted = (np.float32(rng.random((n, 8)) < rng.random(8) * rng.integers(0, 2, 8)) for _ in range(2))
    ours, there = linear_eval.multi_scores(true, predicted), np.flatnonzero(true.any(0))
    f1 = metrics.f1_score(true, predicted, average=None, zero_division=0)
    np.testing.assert_allclose(ours["class"][there], f1[there])
    assert np.isnan(np.delete(ours["class"], there)).all()
    assert ours["average"] == pytest.approx(f1[there].mean() if len(there) else np.nan, nan_ok=True)
    assert ours["overall"] == pytest.approx(metrics.f1_score(true, predicted, average="micro", zero_division=0))


def test_absent_classes_and_unlabelled_samples_are_left_out():
    scores = linear_eval.single_scores([0, 0, 2, IGNORE], [0, 1, 2, 7])
    np.testing.assert_array_equal(scores["class"], [0.5, np.nan, 1] + [np.nan] * 5)
    assert scores["average"] == 0.75 and scores["overall"] == pytest.approx(2 / 3)


# ---------------------------------------------------------------------------------------------- rows to train on

def test_repeats_are_the_published_ones():
    labels = np.repeat(np.arange(8), PUBLISHED_COUNTS)
    times = linear_eval.repeats(labels)
    assert [set(times[labels == c]) for c in range(8)] == [{n} for n in (4, 9, 3, 2, 2, 5, 15, 1)]
    assert len(linear_eval.training_rows(labels, 1, 0)) == times.sum()


@pytest.mark.parametrize("sampling", ["patches", "rows"])
@pytest.mark.parametrize("seed", range(5))
def test_fractions_are_nested_and_leave_unlabelled_patches_out(seed, sampling):
    labels = np.random.default_rng(seed).permutation(np.repeat([*range(8), IGNORE], (*PUBLISHED_COUNTS, 30)))
    chosen = [linear_eval.training_rows(labels, fraction, seed, sampling) for fraction in (0.01, 0.1, 0.5, 1)]
    for small, large in itertools.pairwise(chosen):
        assert set(small) < set(large)
    assert all((labels[rows] != IGNORE).all() for rows in chosen)
    total = len(chosen[-1])
    if sampling == "rows":
        assert [len(rows) for rows in chosen] == [round(f * total) for f in (0.01, 0.1, 0.5, 1)]
    else:
        for rows, fraction in zip(chosen, (0.01, 0.1, 0.5, 1)):
            distinct = np.unique(rows)
            count = [max(1, round(fraction * n)) for n in PUBLISHED_COUNTS]  # of distinct patches, at least one
            assert np.bincount(labels[distinct], minlength=8).tolist() == count
            np.testing.assert_array_equal(linear_eval.repeats(labels[distinct]), np.unique(rows, return_counts=True)[1])
    assert np.array_equal(chosen[0], linear_eval.training_rows(labels, 0.01, seed, sampling))
    assert not np.array_equal(chosen[1], linear_eval.training_rows(labels, 0.1, seed + 1, sampling))


def test_crops_of_a_patch_share_a_fold_and_folds_are_stratified():
    labels = np.repeat(np.arange(8), 10)
    rows = np.repeat(np.random.default_rng(0).permutation(80), 4)
    fold = linear_eval.folds(rows, labels, 5, seed=3)
    for patch in range(80):
        assert len(set(fold[rows == patch])) == 1
    for k in range(5):
        assert np.bincount(labels[np.unique(rows[fold == k])], minlength=8).tolist() == [2] * 8
    assert not np.array_equal(fold, linear_eval.folds(rows, labels, 5, seed=4))


# ---------------------------------------------------------------------------------------------- linear classifier

def problem(seed, task="single", n=300, d=20, classes=8):
    """Random features (n, d), labels and integer weights of an overlapping problem."""
    rng = np.random.default_rng(seed)
    y, centres = rng.integers(0, classes, n), rng.normal(0, 1, (8, d))
    x = (centres[y] + rng.normal(0, 1.5, (n, d))) * rng.lognormal(0, 1, d)
    if task == "multi":
        y = (rng.random((n, 8)) < 1 / (1 + np.exp(-centres @ x.T / x.std())).T).astype(np.float32)
    return torch.tensor(x), torch.tensor(y), torch.tensor(rng.integers(1, 6, n), dtype=torch.float64)


def objective(x, y, weight, penalty, w, b):
    logits = x @ w + b
    loss = torch.nn.functional.cross_entropy(logits, y, reduction="none") if y.dim() == 1 else \
        torch.nn.functional.binary_cross_entropy_with_logits(logits, y.to(x), reduction="none").sum(1)
    return (loss * weight).sum() / weight.sum() + penalty / 2 * w.square().sum()


@pytest.mark.parametrize("task", ["single", "multi"])
@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-5])
def test_the_fit_is_converged(task, penalty):
    x, y, weight = problem(0, task)
    w, b = (v[..., 0, :].clone().requires_grad_() for v in linear_eval.fit(x, y, weight[None], penalty))
    gradients = torch.autograd.grad(objective(x, y, weight, penalty, w, b), (w, b))
    assert max(g.abs().max() for g in gradients) < 1e-5 and b.abs().max() < 100


@pytest.mark.parametrize("classes", [8, 5])
@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_the_fit_predicts_what_scikit_learn_predicts(penalty, classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    same = []
    for seed in range(2):
        x, y, weight = problem(seed, classes=classes)
        queries = problem(seed + 100, n=1000)[0]
        ours = linear_eval.predict(queries, *linear_eval.fit(x, y, weight[None], penalty))[:, 0].argmax(1)
        theirs = linear_model.LogisticRegression(C=1 / (penalty * weight.sum().item()), tol=1e-6, max_iter=10_000)
        same.append((theirs.fit(x, y, weight).predict(queries) == ours.numpy()).mean())
        x, y, weight = problem(seed, "multi")
        theirs.set_params(solver="newton-cholesky")  # faster, for two classes
        ours = linear_eval.predict(queries, *linear_eval.fit(x, y, weight[None], penalty))[:, 0] > 0
        for c in range(8):
            if 0 < y[:, c].mean() < 1:
                same.append((theirs.fit(x, y[:, c], weight).predict(queries) == ours[:, c].numpy()).mean())
            else:
                assert (ours[:, c] == y[0, c]).all()
    assert np.mean(same) >= 0.995 and min(same) > 0.98


def test_weights_are_repeats_and_fits_side_by_side_are_fits_alone():
    x, y, weight = problem(1, classes=6)
    both = torch.stack((weight, weight * (torch.arange(len(x)) < 200)))
    together = linear_eval.predict(x, *linear_eval.fit(x, y, both, 0.01))
    repeated = torch.arange(len(x)).repeat_interleave(weight.long())
    alone = linear_eval.fit(x[repeated], y[repeated], torch.ones(1, len(repeated), dtype=torch.float64), 0.01)
    part = linear_eval.fit(x[:200], y[:200], weight[None, :200], 0.01)
    assert torch.allclose(together[:, :1, :6], linear_eval.predict(x, *alone)[..., :6], atol=1e-4)
    assert torch.allclose(together[:, 1:, :6], linear_eval.predict(x, *part)[..., :6], atol=1e-4)
    assert (together[..., 6:] < -900).all()  # classes without a sample


def test_labels_that_none_or_all_samples_have_are_predicted_so():
    x, y, weight = problem(2, "multi")
    y[:, 0], y[:, 1] = 0, 1
    logits = linear_eval.predict(x, *linear_eval.fit(x, y, weight[None], 0.1))[:, 0]
    assert (logits[:, 0] < 0).all() and (logits[:, 1] > 0).all() and logits.isfinite().all()


@pytest.mark.parametrize("n", [30, 300])
def test_principal_axes_leave_the_solution_as_it_is(n):
    x, y, weight = problem(3, n=n, d=100)
    axes = linear_eval.principal_axes(x)
    assert axes.shape == (100, min(n, 100)) and torch.allclose(axes.T @ axes, torch.eye(axes.shape[1]).double())
    logits = linear_eval.predict(x, *linear_eval.fit(x, y, weight[None], 0.1, tolerance=1e-9))
    rotated = linear_eval.predict(x @ axes, *linear_eval.fit(x @ axes, y, weight[None], 0.1, tolerance=1e-9))
    assert torch.allclose(logits, rotated, atol=1e-4)


def test_nearest_neighbours_vote():
    x = torch.tensor([[1.0, 0.1]] * 3 + [[0.1, 1.0]] * 3) + 0.01 * torch.arange(6)[:, None]
    y = torch.tensor([2, 2, 2, 5, 5, 5])
    queries = torch.tensor([[5.0, 0.0], [0.0, 0.2]])
    assert linear_eval.knn(x, y, queries, k=3).argmax(1).tolist() == [2, 5]
    votes = torch.nn.functional.one_hot(y, 8).float()
    assert ((linear_eval.knn(x, votes, queries) > 0).int() == votes[[0, 3]]).all()


def made_up(n, seed, d=16):
    """Features of n patches of 4 crops each, as extract() gives them, and the patches' labels."""
    rng, row = np.random.default_rng(seed), np.repeat(np.arange(n), 4)
    labels, centres = rng.integers(0, 8, n), np.random.default_rng(99).normal(0, 1, (8, d))
    features = (centres[labels[row]] + rng.normal(0, 1, (4 * n, d))).astype(np.float32)
    multi = np.eye(8, dtype=np.float32)[labels[row]]
    return {"s1": features, "s2": features[:, ::-1].copy(), "single": labels[row], "multi": multi, "row": row}, labels


@pytest.mark.parametrize("probe", ["linear", "knn"])
@pytest.mark.parametrize("task", ["single", "multi"])
def test_a_test_label_changes_no_prediction(monkeypatch, probe, task):
    (train, labels), (test, _) = made_up(48, 0), made_up(40, 1)
    predictions, score = [], linear_eval.score
    monkeypatch.setattr(linear_eval, "score", lambda *args: predictions.append(args[2]) or score(*args))
    scores = []
    for change in (0, 3):
        changed = {**test, "single": (test["single"] + change) % 8, "multi": np.roll(test["multi"], change, 1)}
        args = argparse.Namespace(device="cpu", probe=probe)
        chosen = linear_eval.training_rows(labels, 1, 0)
        scores.append(linear_eval.probe(train, changed, ("s1", "s2"), task, chosen, labels, 0, args)[0])
    half = len(predictions) // 2
    assert all(np.array_equal(a, b) for a, b in zip(predictions[:half], predictions[half:]))
    assert scores[0]["average"] > 0.5 > scores[1]["average"]


def test_training_and_test_patches_are_disjoint(labelled):
    args = argparse.Namespace(checkpoint=None, method=None, scale=None, bands=None, crop=None, cache=None, workers=0,
                              precision="auto", device="cpu", data=labelled, label_fraction=[1.0], label_sampling="patches")
    patches, train, test, _ = linear_eval.open_labelled(args, {})
    ids = np.array(patches.ids)
    assert len(train) == 32 and len(test) == 24 and not set(ids[train]) & set(ids[test])
    assert all("validation" in name for name in ids[train]) and all("test" in name for name in ids[test])


# ---------------------------------------------------------------------------------------------- results

def run_of(**change):
    return {"method": "d-simclr", "protocol": "finetune", "task": "single", "label_fraction": 1.0, "seed": 0,
            "data": "d", "args": {"lr": 1e-5, "bands": {"s1": ["VV"], "s2": ["B2"]}}, "checkpoint": "c", **change}


SCORES = {"class": np.array([0.5] * 7 + [np.nan]), "average": 0.5, "overall": 0.6}


def add_forty(folder, first):
    results = linear_eval.Results(folder)
    for seed in range(first, first + 40):
        results.add(run_of(seed=seed), SCORES, simulated=False)


def test_processes_that_write_at_once_lose_nothing_and_count_nothing_twice(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_forty, args=(tmp_path, first)) for first in (0, 20, 40)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["seed"] for line in lines) == list(range(80))


@pytest.mark.parametrize("keep", ["{", '"task": "si', '"s2": ["B2"]}', '"overall": 0.6'])  # the third ends in a brace
def test_a_line_that_a_kill_cut_off_is_no_result(tmp_path, keep):
    results = linear_eval.Results(tmp_path)
    results.add(run_of(seed=0), SCORES)
    whole = results.path.read_text()
    line = whole.replace('"seed": 0', '"seed": 1')
    results.path.write_text(whole + line[:line.index(keep) + len(keep)])
    assert results.has(run_of(seed=0)) and not results.has(run_of(seed=1))
    results.add(run_of(seed=1), SCORES)
    results.add(run_of(seed=2), SCORES)
    assert [line["seed"] for line in results.read()] == [0, 1, 2]
    assert results.read()[1]["class"][-1] is None


# ---------------------------------------------------------------------------------------------- report

def result_line(average, overall=0.5, **change):
    line = {**run_of(), "class": [average] * 7 + [None], "average": average, "overall": overall, "simulated": False,
            "confusion": np.diag([3] * 7 + [0]).tolist(), **change}
    line["args"] = {"lr": 1e-5, **change.get("args", {})}
    return line


def write_results(folder, lines):
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def report_of(monkeypatch, folder, *options):
    call(monkeypatch, linear_eval, "--report", folder, *options)
    return (folder / ("tables.csv" if "csv" in options else "tables.md")).read_text()


LINES = [*(result_line(v, 0.7, seed=k) for k, v in enumerate((0.68, 0.70, 0.74))),
         *(result_line(v, 0.6, seed=k, method="late-fusion", protocol="scratch", checkpoint=None)
           for k, v in enumerate((0.60, 0.61, 0.65))),
         result_line(0.3, method="d-simclr", protocol="scratch", checkpoint=None),
         *(result_line(v, method="mma", label_fraction=f) for v, f in ((0.4, 0.01), (0.5, 0.1))),
         result_line(0.55, 0.65, protocol="linear", baseline=None, probe="linear", sensors="both"),
         result_line(0.45, 0.5, protocol="linear", baseline=None, probe="linear", sensors="s1"),
         result_line(0.2, 0.25, protocol="linear", baseline="random", probe="linear", sensors="both", checkpoint=None)]


def test_report(tmp_path, monkeypatch):
    write_results(tmp_path, LINES)
    text = report_of(monkeypatch, tmp_path, "--compare", "d-simclr", "late-fusion")
    single, multi = text.split("## ")[1:3]
    rows = [line for line in single.splitlines() if line.startswith("| ")]
    assert rows[0] == ("|  | " + " | ".join(CLASSES) + " | Average | poster | difference | OA | poster OA | seeds |")
    assert rows[2:] == [
        "| LateFusion | " + "62 ± 3 | " * 7 + "- | 62 ± 3 | 62 | +0 | 60 ± 0 | 65 | 3 |",
        "| D-SimCLR | " + "71 ± 3 | " * 7 + "- | **71 ± 3** | 70 | +1 | 70 ± 0 | 70 | 3 |",
        "| D-SimCLR, from scratch | " + "30 | " * 7 + "- | 30 | - | - | 50 | - | 1 |"]
    assert "Missing: OnlySen-1, OnlySen-2, EarlyFusion, SimCLR (RGB), MMA." in single
    assert "No results." in multi and "|" not in multi and multi.count("D-SimCLR") == 1  # missing, said once
    assert "| D-SimCLR | both | 100% | 55 | 65 | - | - | 1 |" in text
    assert "| D-SimCLR, random weights | both | 100% | 20 | 25 | - | - | 1 |" in text
    assert "| D-SimCLR | s1 | 100% | 45 | 50 | - | - | 1 |" in text.split("One satellite missing")[1]
    # Welch by hand: means 70.667 and 62, variances 9.333 and 7, so df 3.922, t 2.7975, half 2.7975 * 2.3333
    assert "| D-SimCLR | LateFusion | single | +8.7 | +2.1 to +15.2 | 3 and 3 |" in text
    assert "SIMULATED" not in text
    for name in ("label_fraction", "confusion_d_simclr", "confusion_latefusion"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert not (tmp_path / "confusion_d_simclr_from_scratch.png").exists()


def test_report_of_simulated_data_says_so_and_compares_with_nothing(tmp_path, monkeypatch):
    write_results(tmp_path, [{**LINES[0], "simulated": True}, LINES[1]])
    text = report_of(monkeypatch, tmp_path)
    assert text.startswith("# SIMULATED") and "poster" not in text
    assert "| D-SimCLR | " + "69 ± 1 | " * 7 + "- | **69 ± 1** | 70 ± 0 | 2 |" in text


def test_report_keeps_runs_of_different_settings_apart(tmp_path, monkeypatch):
    other = result_line(0.6, args={"lr": 1e-4}), result_line(0.7, args={"crop": 64})
    write_results(tmp_path, [result_line(0.5), *other])
    text = report_of(monkeypatch, tmp_path)
    assert "| D-SimCLR [crop None, lr 1e-05] | 50 " in text and "| D-SimCLR [crop None, lr 0.0001] | 60 " in text
    assert "| D-SimCLR [crop 64, lr 1e-05] | 70 " in text


def test_report_as_csv(tmp_path, monkeypatch):
    write_results(tmp_path, LINES)
    header, *rows = report_of(monkeypatch, tmp_path, "--format", "csv").splitlines()
    assert header == ("method,protocol,baseline,probe,sensors,checkpoint,data,task,label_fraction,seed,simulated,"
                      "metric,value")
    assert len(rows) == 10 * len(LINES)
    assert rows[:2] == [f"d-simclr,finetune,,,,c,d,single,1.0,0,False,{name},0.68" for name in CLASSES[:2]]
    assert "d-simclr,finetune,,,,c,d,single,1.0,1,False,average,0.7" in rows
    assert "d-simclr,linear,random,linear,both,,d,single,1.0,0,False,Water," in rows


def test_t_quantile():
    for df, value in ((1, 12.7062), (2, 4.30265), (3.922, 2.7975), (8, 2.30600), (200, 1.97190)):
        assert linear_eval.t_quantile(df) == pytest.approx(value, rel=5e-4)


def test_report_without_results_is_one_line(tmp_path):
    result = user("linear_eval.py", "--report", tmp_path / "none")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "no results" in result.stderr


# ---------------------------------------------------------------------------------------------- on simulated trees

def test_probe_of_a_checkpoint(tmp_path, trees, checkpoint, monkeypatch, capsys):
    def probe(*options):
        call(monkeypatch, linear_eval, "--checkpoint", checkpoint, "--data", trees / "dfc2020", "--results", tmp_path,
             "--seeds", 2, "--workers", 0, "--task", "single", "multi", *options)
        return linear_eval.Results(tmp_path).read()

    first = probe("--label-fraction", 0.1, 1)
    assert len(first) == 8 and all(line["simulated"] and line["protocol"] == "linear" for line in first)
    assert {line["counts"]["train_patches"] for line in first if line["label_fraction"] == 1} != {0}
    monkeypatch.setattr(linear_eval, "probe", None)
    assert probe("--label-fraction", 0.1, 1) == first  # nothing is repeated
    monkeypatch.undo()
    monkeypatch.setattr(linear_eval, "extract", None)  # knn and one sensor come from the same cached features
    assert len(probe("--probe", "knn")) == 12 and len(probe("--sensors", "s1")) == 16
    monkeypatch.undo()

    before = (tmp_path / "results.jsonl").read_bytes()
    cached = sorted((tmp_path / "features").iterdir())
    assert len(cached) == 2
    for path in cached:
        os.truncate(path, path.stat().st_size // 2)  # as after a power cut
    (tmp_path / "results.jsonl").unlink()
    assert probe("--label-fraction", 0.1, 1) == first
    assert (tmp_path / "results.jsonl").read_bytes() == before[:len((tmp_path / "results.jsonl").read_bytes())]
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_baselines(tmp_path, labelled, monkeypatch):
    for baseline in ("random", "bands"):
        call(monkeypatch, linear_eval, "--baseline", baseline, "--data", labelled, "--results", tmp_path,
             "--crop", 32, "--seeds", 2, "--workers", 0, "--scale", "fixed")
    lines = linear_eval.Results(tmp_path).read()
    assert [line["baseline"] for line in lines] == ["random", "random", "bands", "bands"]
    assert lines[0]["average"] != lines[1]["average"]


def embeddings(monkeypatch, checkpoint, tree, out, *options):
    call(monkeypatch, linear_eval, "--checkpoint", checkpoint, "--data", tree, "--embed", out, "--precision",
         "float32", *options)
    return dict(np.load(out))


def test_embeddings_do_not_depend_on_batches_and_workers(tmp_path, labelled, checkpoint, monkeypatch):
    tree = labelled
    one = embeddings(monkeypatch, checkpoint, tree, tmp_path / "one.npz", "--batch-size", 7, "--workers", 0)
    other = embeddings(monkeypatch, checkpoint, tree, tmp_path / "other", "--batch-size", 100, "--workers", 2)
    patches = data.open_data(labelled, workers=0)
    assert one["ids"].tolist() == patches.ids and one["labels"].tolist() == patches.labels.tolist() and one["simulated"]
    assert one["s1"].shape == one["s2"].shape == (56, 512)
    for sensor in ("s1", "s2"):
        np.testing.assert_allclose(one[sensor], other[sensor], rtol=0, atol=1e-5)
    encoders, scaling = models.load_encoders(checkpoint)
    corners = [(y, x) for y in (0, 8) for x in (0, 8)]  # of crops of 32 px that cover 40
    s1, s2, _ = patches.crops([5] * 4, *zip(*corners), 32)
    with torch.no_grad():
        expected = models.encode(encoders, *data.to_input(s1, s2, **scaling))
    for sensor in ("s1", "s2"):
        np.testing.assert_allclose(one[sensor][5], expected[sensor].mean(0), rtol=0, atol=1e-5)


def test_authors_weights_are_taken_as_they_are(tmp_path, labelled, monkeypatch, capsys):
    nets = {sensor: models.resnet("resnet18", bands) for sensor, bands in (("1", 2), ("2", 13))}
    weights = {f"backbone{k}.{key}": value for k, net in nets.items() for key, value in net.state_dict().items()}
    heads = {k: torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64)) for k in "12"}
    weights |= {f"backbone{k}.fc.{key}": value for k, head in heads.items() for key, value in head.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "released.pth")
    found = embeddings(monkeypatch, tmp_path / "released.pth", labelled, tmp_path / "out.npz", "--crop", 32,
                       "--workers", 0)
    patches = data.open_data(labelled, workers=0)
    s1, s2, _ = patches.crops([9] * 4, [0, 0, 8, 8], [0, 8, 0, 8], 32)
    s1, s2 = data.to_input(s1, s2, "patch-max")
    with torch.no_grad():
        np.testing.assert_allclose(found["s1"][9], nets["1"].eval()(s1).mean(0), rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["s2"][9], nets["2"].eval()(s2).mean(0), rtol=0, atol=1e-5)
        rows, (y, x) = np.flatnonzero(patches.splits == "test"), (4, 4)  # --retrieve: centre crops through the heads
        a, b = data.to_input(*patches.crops(rows, [y] * len(rows), [x] * len(rows), 32)[:2], "patch-max")
        a, b = (F.normalize(heads[k](nets[k](v))) for k, v in (("1", a), ("2", b)))
    capsys.readouterr()
    call(monkeypatch, linear_eval, "--checkpoint", tmp_path / "released.pth", "--data", labelled, "--crop", 32,
         "--workers", 0, "--precision", "float32", "--retrieve", tmp_path / "out.png")
    assert f"median rank {models.retrieval(a @ b.T)['median']:g}\n" in capsys.readouterr().out


@pytest.mark.parametrize("arch, method", [("resnet18", "d-simclr"), ("vgg", "mma")])
def test_authors_weights_are_probed_and_fine_tuned(tmp_path, labelled, monkeypatch, arch, method):
    nets = models.make_encoders(method, {"s1": models.S1_BANDS, "s2": models.S2_BANDS})
    content = {f"{sensor}_model_weights": net.state_dict() for sensor, net in nets.items()}
    if method == "d-simclr":
        content = {"state_dict": {f"backbone{k}.{key}": value for k, net in zip("12", nets.values())
                                  for key, value in net.state_dict().items()}}
    torch.save(content, tmp_path / "released.pth")
    common = ("--checkpoint", tmp_path / "released.pth", "--data", labelled, "--results", tmp_path, "--crop", 32,
              "--seeds", 1, "--workers", 0, "--label-fraction", 0.5)
    call(monkeypatch, linear_eval, *common)
    call(monkeypatch, finetune, *common, "--epochs", 1, "--batch-size", 32)
    probed, tuned = linear_eval.Results(tmp_path).read()
    assert (probed["method"], probed["protocol"], tuned["method"], tuned["protocol"]) == (method, "linear", method, "finetune")
    assert probed["args"]["scale"] == tuned["args"]["scale"] == "patch-max" and not probed["args"].get("stats")


@pytest.mark.parametrize("tree", ["dfc2020", "sen12ms"])
def test_retrieval_as_a_picture(tmp_path, trees, checkpoint, monkeypatch, capsys, tree):
    call(monkeypatch, linear_eval, "--checkpoint", checkpoint, "--data", trees / tree, "--workers", 0, "--retrieve",
         tmp_path / "out.png")
    said = capsys.readouterr().out
    assert f"{24 if tree == 'dfc2020' else 32} held-out candidates," in said  # of sen12ms: half of the scenes
    assert (tmp_path / "out.png").stat().st_size > 20_000


def test_retrieval_needs_patches_that_pretraining_did_not_see(tmp_path, checkpoint, monkeypatch):
    simulate.simulate_sen12ms(tmp_path / "others", scenes=2, patches=2, size=40, seed=9)
    with pytest.raises(data.DataError, match="--retrieve needs patches that pretraining did not see"):
        call(monkeypatch, linear_eval, "--checkpoint", checkpoint, "--data", tmp_path / "others", "--workers", 0, "--retrieve",
             tmp_path / "out.png")


@pytest.mark.parametrize("options, message", [
    (("--method", "mma"), "holds method d-simclr, not --method mma"),
    (("--scale", "fixed"), "holds scale standard, not --scale fixed"),
    (("--bands", "VV", "B2"), "not --bands VV B2"),
    (("--crop", 64), "--crop 64"),
])
def test_what_a_checkpoint_is_not(tmp_path, labelled, checkpoint, monkeypatch, options, message):
    with pytest.raises((models.CheckpointError, data.DataError), match=message):
        call(monkeypatch, linear_eval, "--checkpoint", checkpoint, "--data", labelled, "--results", tmp_path,
             "--workers", 0, *options)


def test_data_without_labels_and_encoders_that_are_not_there(tmp_path, trees, labelled, checkpoint, monkeypatch):
    with pytest.raises(data.DataError, match="needs labelled patches of the splits"):
        call(monkeypatch, linear_eval, "--checkpoint", checkpoint, "--data", trees / "sen12ms", "--workers", 0)
    with pytest.raises(data.DataError, match="--sensors s1"):
        call(monkeypatch, linear_eval, "--baseline", "random", "--method", "only-s2", "--sensors", "s1", "--data",
             labelled, "--crop", 32, "--workers", 0)
    result = user("linear_eval.py", "--checkpoint", ROOT / "nothing.pt", "--data", labelled)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "nothing.pt" in result.stderr
