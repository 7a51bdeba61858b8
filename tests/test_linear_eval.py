"""Metrics, linear probe, results, embeddings, retrieval."""
import itertools
import json
import multiprocessing
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import simulate
import torch
import torch.nn.functional as F
from conftest import ROOT, call, user, watch
from matplotlib.figure import Figure
from test_data import write_tif

import data
import finetune
import linear_eval
import models
from data import IGNORE

PUBLISHED_COUNTS = (76, 37, 101, 180, 156, 62, 23, 351)  # patches per class of the 986
BANDS = {"s1": data.S1_BANDS, "s2": data.S2_BANDS}
FLOOD = {"s1": ["VH"], "s2": ["B12", "B8", "B4"], "classes": {"1": "dry", "4": "flooded"}}


def save_untrained(path, patches, method="d-simclr", **change):
    """Write a checkpoint of random weights for crops of 32 px."""
    torch.manual_seed(0)
    content = {"method": method, "arch": "resnet18", "bands": patches.bands, "scale": "standard",
               "stats": patches.stats(patches.rows), "simulated": True, "classes": patches.classes,
               "args": {"crop": 32, "holdout": 0.3, "data": patches.identity}, **change}
    models.save_checkpoint(path, models.Contrastive(method, patches.bands), **content)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, pairs):
    """An untrained D-SimCLR checkpoint of the simulated pairs."""
    return save_untrained(tmp_path_factory.mktemp("run") / "last.pt", data.Patches(pairs))


def write_pair(folder, name, legend, s1, s2, classes):
    """A pair of plain GeoTIFFs with its class map, each (bands, h, w), in a tree with a legend."""
    images = {"s1": np.float32(s1), "s2": np.uint16(s2), "classes": np.uint8(classes)}
    for sensor, image in images.items():
        write_tif(folder / sensor / f"{name}.tif", image)
    (folder / "../legend.json").write_text(json.dumps(legend))


@pytest.fixture(scope="session")
def flood(tmp_path_factory):
    """A store of pairs with bands and classes of their own: 12 to train on, 8 to test on, 36 px."""
    folder, rng = tmp_path_factory.mktemp("flood"), np.random.default_rng(0)
    for k, split in enumerate(["train"] * 12 + ["test"] * 8):
        wet = (np.arange(36) < 12 + 12 * (k % 2)) * np.ones((1, 36, 1))
        classes = np.where(wet, 4, 1)
        classes[:, 30:] = 7  # no class
        write_pair(folder / "tree" / split, f"scene {k // 2}/{k}", FLOOD,
                   -8 - 12 * wet + rng.normal(0, 1, (1, 36, 36)),
                   3000 - 1500 * wet + rng.normal(0, 200, (3, 36, 36)), classes)
    data.pack(folder / "tree", folder / "store", s2_offset=0)
    return folder / "store"


def crops_of(patches, row, tops, lefts, size=32):
    """Crops of one patch -> s1, s2."""
    batch = np.full(len(tops), row), np.array(tops), np.array(lefts)
    (s1, s2, *_), = data.loader(patches, [batch], size)
    return s1, s2


# ------------------------------------------------------------------------------------------ metrics

def test_metrics_are_those_of_the_released_code(shared):
    golden = np.load(shared / "golden/metrics.npz")
    one_hot = np.eye(8)
    single = linear_eval.score("single", one_hot[golden["single_true"]], one_hot[golden["single_pred"]])
    multi = linear_eval.score("multi", golden["multi_true"], golden["multi_pred"] - 0.5)
    for scores, task, name in ((single, "single", "accuracy"), (multi, "multi", "f1")):
        np.testing.assert_allclose(scores["class"], golden[f"{task}_class_{name}"], atol=1e-6)
        assert scores["average"] == pytest.approx(golden[f"{task}_average"], abs=1e-6)
        assert scores["overall"] == pytest.approx(golden[f"{task}_overall"], abs=1e-6)


def compare(scores, occur, of_classes, overall):
    """occur: numbers of the classes that do; of_classes: what each of them should have."""
    np.testing.assert_allclose(scores["class"][occur], of_classes)
    assert np.isnan(np.delete(scores["class"], occur)).all()
    assert scores["average"] == pytest.approx(of_classes.mean()) and scores["overall"] == pytest.approx(overall)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [2, 8, 254])
def test_metrics_agree_with_scikit_learn(seed, count):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    some = rng.permutation(count)[:rng.integers(1, count + 1)]  # often not all classes occur
    n = rng.integers(1, 200)
    true, predicted = rng.choice(some, n).astype(np.uint8), rng.integers(0, count, n)
    ours = linear_eval.score("single", np.eye(count)[true], np.eye(count)[predicted])
    confusion = metrics.confusion_matrix(true, predicted, labels=range(count))
    np.testing.assert_array_equal(ours["confusion"], confusion)
    occur = np.flatnonzero(confusion.sum(1))
    recall = metrics.recall_score(true, predicted, labels=occur, average=None)
    compare(ours, occur, recall, metrics.accuracy_score(true, predicted))

    often = rng.random(count) * rng.integers(0, 2, count)
    true, predicted = (np.float32(rng.random((n, count)) < often) for _ in range(2))
    true[0, 0] = 1
    occur = np.flatnonzero(true.any(0))
    f1 = metrics.f1_score(true, predicted, average=None, zero_division=0)[occur]
    pooled = metrics.f1_score(true, predicted, average="micro", zero_division=0)
    compare(linear_eval.score("multi", true, predicted - 0.5), occur, f1, pooled)


def test_absent_classes_are_left_out():
    true, predicted = np.eye(8)[[0, 0, 2]], np.eye(8)[[0, 1, 2]]
    scores = linear_eval.score("single", true, predicted)
    np.testing.assert_array_equal(scores["class"], [0.5, np.nan, 1] + [np.nan] * 5)
    assert scores["average"] == 0.75 and scores["overall"] == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------- rows to train on

def test_repeats_are_the_published_ones():
    labels = np.repeat(np.arange(8), PUBLISHED_COUNTS)
    times = linear_eval.repeats(labels)
    assert [set(times[labels == c]) for c in range(8)] == [{n} for n in (4, 9, 3, 2, 2, 5, 15, 1)]
    assert len(linear_eval.training_rows(labels, 1, 0)) == times.sum()


@pytest.mark.parametrize("sampling", ["patches", "rows"])
@pytest.mark.parametrize("counts", [PUBLISHED_COUNTS, (300, 150), range(3, 257)], ids=len)
@pytest.mark.parametrize("seed", range(5))
def test_fractions_are_nested_and_leave_unlabelled_patches_out(seed, sampling, counts):
    sizes, fractions = (*counts, 30), (0.01, 0.1, 0.5, 1)
    labels = np.repeat([*range(len(counts)), IGNORE], sizes)
    labels = np.random.default_rng(seed).permutation(labels)
    chosen = [linear_eval.training_rows(labels, fraction, seed, sampling) for fraction in fractions]
    for small, large in itertools.pairwise(chosen):
        assert set(small) < set(large)
    assert all((labels[rows] != IGNORE).all() for rows in chosen)
    total = len(chosen[-1])
    if sampling == "rows":
        assert [len(rows) for rows in chosen] == [round(f * total) for f in fractions]
    else:
        for rows, fraction in zip(chosen, fractions):
            distinct, times = np.unique(rows, return_counts=True)
            count = [max(1, round(fraction * n)) for n in counts]  # of patches, at least one
            assert np.bincount(labels[distinct], minlength=len(counts)).tolist() == count
            np.testing.assert_array_equal(linear_eval.repeats(labels[distinct]), times)
    assert np.array_equal(chosen[0], linear_eval.training_rows(labels, 0.01, seed, sampling))
    other = linear_eval.training_rows(labels, 0.1, seed + 1, sampling)
    assert not np.array_equal(chosen[1], other)


def test_crops_of_a_patch_share_a_fold_and_folds_are_stratified():
    labels = np.repeat(np.arange(8), 10)
    rows = np.repeat(np.random.default_rng(0).permutation(80), 4)
    fold = linear_eval.folds(rows, labels[rows], 5, seed=3)
    for patch in range(80):
        assert len(set(fold[rows == patch])) == 1
    for k in range(5):
        patches = np.unique(rows[fold == k])
        assert np.bincount(labels[patches], minlength=8).tolist() == [2] * 8
    assert not np.array_equal(fold, linear_eval.folds(rows, labels[rows], 5, seed=4))


@pytest.mark.parametrize("count, whole", [(24, True), (5, True), (4, False), (1, False)])
def test_folds_hold_out_whole_scenes_where_there_are_enough(monkeypatch, count, whole):
    (train, labels), (test, _) = made_up(48, 0), made_up(16, 1)
    train["scene"] = train["row"] % count
    dealt = watch(monkeypatch, linear_eval, "folds")
    linear_eval.probe("single", train, test, linear_eval.training_rows(labels, 1, 0), labels, 0)
    (groups, *_), fold = dealt[0]
    assert np.array_equal(groups, train["scene" if whole else "row"]) and len(set(fold)) == 5
    assert len({*zip(groups, fold)}) == len(set(groups))


# -------------------------------------------------------------------------------- linear classifier

def problem(seed, task="single", n=300, d=20, classes=8):
    """Random features (n, d), labels (n, 8) of some classes and integer weights of an overlapping
    problem."""
    rng = np.random.default_rng(seed)
    label, centres = rng.integers(0, classes, n), rng.normal(0, 1, (8, d))
    x = (centres[label] + rng.normal(0, 1.5, (n, d))) * rng.lognormal(0, 1, d)
    y = np.eye(8)[label]
    if task == "multi":
        y = np.float64(rng.random((n, 8)) < 1 / (1 + np.exp(-centres @ x.T / x.std())).T)
    weight = rng.integers(1, 6, n).astype(np.float64)
    return torch.tensor(x), torch.tensor(y), torch.tensor(weight)


def fitted(task, x, y, weight, penalty, queries, **options):
    """-> (queries, K, C) logits."""
    return linear_eval.predict(queries, *linear_eval.fit(task, x, y, weight, penalty, **options))


def objective(task, x, y, weight, penalty, w, b):
    logits = x @ w + b
    if task == "single":
        loss = F.cross_entropy(logits, y, reduction="none")
    else:
        loss = F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)
    return (loss * weight).sum() / weight.sum() + penalty / 2 * w.square().sum()


@pytest.mark.parametrize("task", ["single", "multi"])
@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-5])
def test_the_fit_is_converged(task, penalty):
    x, y, weight = problem(0, task)
    model = linear_eval.fit(task, x, y, weight[None], penalty)
    w, b = (v[..., 0, :].clone().requires_grad_() for v in model)
    gradients = torch.autograd.grad(objective(task, x, y, weight, penalty, w, b), (w, b))
    assert max(g.abs().max() for g in gradients) < 1e-5 and b.abs().max() < 100


@pytest.mark.parametrize("classes", [8, 5, 2])
@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_the_fit_predicts_what_scikit_learn_predicts(penalty, classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    same = []
    for seed in range(2):
        x, y, weight = problem(seed, classes=classes)
        queries = problem(seed + 100, n=1000)[0]
        ours = fitted("single", x, y, weight[None], penalty, queries)[:, 0].argmax(1).numpy()
        strength = 1 / (penalty * weight.sum().item())
        if classes == 2:  # of two opposite rows of weights only the difference counts there
            strength *= 2
        theirs = linear_model.LogisticRegression(C=strength, tol=1e-6, max_iter=10_000)
        same.append((theirs.fit(x, y.argmax(1), weight).predict(queries) == ours).mean())
        x, y, weight = problem(seed, "multi")
        strength = 1 / (penalty * weight.sum().item())
        theirs.set_params(solver="newton-cholesky", C=strength)  # faster, for two classes
        ours = fitted("multi", x, y, weight[None], penalty, queries)[:, 0].numpy() > 0
        for c in range(8):
            if 0 < y[:, c].mean() < 1:
                same.append((theirs.fit(x, y[:, c], weight).predict(queries) == ours[:, c]).mean())
            else:
                assert (ours[:, c] == y[0, c].item()).all()
    assert np.mean(same) >= 0.995 and min(same) > 0.98


def test_weights_are_repeats_and_fits_side_by_side_are_fits_alone():
    x, y, weight = problem(1, classes=6)
    both = torch.stack((weight, weight * (torch.arange(len(x)) < 200)))
    together = fitted("single", x, y, both, 0.01, x)
    repeated = torch.arange(len(x)).repeat_interleave(weight.long())
    alone = fitted("single", x[repeated], y[repeated], torch.ones(1, len(repeated)).double(), 0.01, x)
    some = fitted("single", x[:200], y[:200], weight[None, :200], 0.01, x)
    assert torch.allclose(together[:, :1, :6], alone[..., :6], atol=1e-4)
    assert torch.allclose(together[:, 1:, :6], some[..., :6], atol=1e-4)
    assert (together[..., 6:] < -900).all()  # classes without a sample


def test_labels_that_none_or_all_samples_have_are_predicted_so():
    x, y, weight = problem(2, "multi")
    y[:, 0], y[:, 1] = 0, 1
    logits = fitted("multi", x, y, weight[None], 0.1, x)[:, 0]
    assert (logits[:, 0] < 0).all() and (logits[:, 1] > 0).all() and logits.isfinite().all()


@pytest.mark.parametrize("n", [30, 300])
def test_principal_axes_leave_the_solution_as_it_is(n):
    x, y, weight = problem(3, n=n, d=100)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors[:, -min(x.shape):]  # as in probe()
    assert axes.shape == (100, min(n, 100))
    assert torch.allclose(axes.T @ axes, torch.eye(axes.shape[1]).double())
    one, other = (fitted("single", v, y, weight[None], 0.1, v, tolerance=1e-9) for v in (x, x @ axes))
    assert torch.allclose(one, other, atol=1e-4)


def made_up(n, seed, classes=8, d=16):
    """Features of n patches of 4 crops each, as extract() gives them, and the patches' labels."""
    rng, row = np.random.default_rng(seed), np.repeat(np.arange(n), 4)
    labels = rng.permutation(n) % classes
    centres = np.random.default_rng(99).normal(0, 1, (classes, d))
    x = (centres[labels[row]] + rng.normal(0, 1, (4 * n, d))).astype(np.float32)
    y = np.eye(classes, dtype=np.float32)[labels[row]]
    return {"x": x, "single": y, "multi": y, "row": row, "scene": row}, labels


def test_the_penalty_is_the_one_that_predicts_other_patches_best():
    (train, labels), (test, _) = made_up(48, 0), made_up(200, 1)
    chosen = linear_eval.training_rows(labels, 1, 0)
    found = linear_eval.probe("single", train, test, chosen, labels, 0)[1]["penalty"]
    x, y, queries = (torch.from_numpy(v).double() for v in (train["x"], train["single"], test["x"]))
    right = {}
    for penalty in linear_eval.PENALTIES:
        logits = fitted("single", x, y, torch.ones(1, len(x)).double(), penalty, queries)
        predicted = logits[:, 0].argmax(1).numpy()
        right[penalty] = (predicted == test["single"].argmax(1)).mean()
    assert right[found] > max(right.values()) - 0.01 > min(right.values()) + 0.01


@pytest.mark.parametrize("seed", [0, 3, 15, 19, 25])
def test_the_penalty_is_chosen_among_fits_that_have_converged(seed, monkeypatch):
    """Where there are more features than patches, fits that are broken off rank the penalties otherwise."""
    rng, patches, crops, d = np.random.default_rng(seed), 20, 6, 256
    labels, row = np.arange(patches) % 5, np.repeat(np.arange(patches), crops)
    x = 0.15 * rng.normal(size=(5, d))[labels[row]] + 0.7 * rng.normal(size=(patches, d))[row] + rng.normal(size=(len(row), d))
    x = torch.from_numpy(x @ np.linalg.svd(x - x.mean(0), full_matrices=False)[2].T).float()
    y, fit, chosen = torch.eye(5)[labels[row]], linear_eval.fit, []
    for settings in ({}, {"tolerance": 2e-7, "iterations": 2000}):
        monkeypatch.setattr(linear_eval, "fit", lambda *args, s=settings, **given: fit(*args, **{**given, **s}))
        chosen.append(linear_eval.choose_penalty("single", x, y, torch.ones(len(x)), row, row, labels[row], 0))
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("task", ["single", "multi"])
def test_a_patch_that_is_not_chosen_teaches_nothing(task):
    (train, labels), (test, _) = made_up(48, 0), made_up(40, 1)
    chosen = linear_eval.training_rows(labels, 0.5, 0)
    others = ~np.isin(train["row"], chosen)
    other = {**train, "x": np.where(others[:, None], -5 * train["x"], train["x"])}
    one = linear_eval.probe(task, train, test, chosen, labels, 0)
    np.testing.assert_equal(one, linear_eval.probe(task, other, test, chosen, labels, 0))


@pytest.mark.parametrize("task", ["single", "multi"])
def test_a_test_label_changes_no_prediction(monkeypatch, task):
    (train, labels), (test, _) = made_up(48, 0), made_up(40, 1)
    predictions, score = [], linear_eval.score
    monkeypatch.setattr(linear_eval, "score",
                        lambda *args: predictions.append(args[2]) or score(*args))
    scores = []
    for change in (0, 3):
        changed = {**test, task: np.roll(test[task], change, 1)}
        chosen = linear_eval.training_rows(labels, 1, 0)
        scores.append(linear_eval.probe(task, train, changed, chosen, labels, 0)[0])
    half = len(predictions) // 2
    assert all(np.array_equal(a, b) for a, b in zip(predictions[:half], predictions[half:]))
    assert scores[0]["average"] > 0.5 > scores[1]["average"]


def test_repeats_weigh_in_every_fit_of_a_probe(monkeypatch):
    """Classes of 24, 12 and 6 patches."""
    (train, labels), (test, _) = made_up(42, 0, 7), made_up(20, 1, 7)
    labels = np.digitize(labels, (4, 6))
    train["single"] = np.eye(7, dtype=np.float32)[labels[train["row"]]]
    fits, chosen = watch(monkeypatch, linear_eval, "fit"), linear_eval.training_rows(labels, 1, 0)
    linear_eval.probe("single", train, test, chosen, labels, 0)
    times = np.bincount(chosen)[train["row"]]
    assert set(times) == {1, 2, 4}
    *folds, (_, _, _, weight, *_) = [arguments for arguments, _ in fits]
    assert np.array_equal(weight, times[None])
    for _, _, _, weight, *_ in folds:
        assert len(weight) == 5 and np.array_equal(weight.sum(0), 4 * times) and set(weight.ravel().tolist()) == {0, 1, 2, 4}


@pytest.mark.parametrize("task", ["single", "multi"])
def test_crops_without_a_label_neither_teach_nor_count(task):
    (train, labels), (test, _) = made_up(48, 0), made_up(40, 1)
    probed = []
    for more in (False, True):
        for crops in (train, test) if more else ():
            bare = {"x": 50 * crops["x"][:9], "single": np.zeros((9, 8), np.float32), "multi": np.zeros((9, 8), np.float32)}
            crops |= {name: np.concatenate([values, bare.get(name, values[:9])]) for name, values in crops.items()}
        probed.append(linear_eval.probe(task, train, test, linear_eval.training_rows(labels, 1, 0), labels, 0))
    np.testing.assert_equal(*probed)


def test_features_of_test_crops_change_no_prediction_of_another(monkeypatch):
    (train, labels), (test, _) = made_up(48, 0), made_up(40, 1)
    predictions, score = [], linear_eval.score
    monkeypatch.setattr(linear_eval, "score", lambda *args: predictions.append(args[2]) or score(*args))
    for factor in (1, 100):
        test["x"][1:] *= factor
        linear_eval.probe("single", train, test, linear_eval.training_rows(labels, 1, 0), labels, 0)
    one, other = [logits for logits in predictions if len(logits) == len(test["x"])]
    np.testing.assert_allclose(one[0], other[0], rtol=1e-9)


@pytest.mark.parametrize("task, classes", [("single", 2), ("multi", 2), ("single", 80)])
def test_any_number_of_classes(task, classes):
    train, labels = made_up(2 * classes, 0, classes, 32)
    test, _ = made_up(classes, 1, classes, 32)
    chosen = linear_eval.training_rows(labels, 1, 0)
    scores, counts = linear_eval.probe(task, train, test, chosen, labels, 0)
    assert len(scores["class"]) == classes and counts["train_patches"] == 2 * classes
    assert scores["overall"] > 0.5


# ------------------------------------------------------------------------------------------ results

def run_of(**change):
    return {"method": "d-simclr", "protocol": "finetune", "task": "single", "label_fraction": 1.0,
            "seed": 0, "data": "d", "args": {"lr": 1e-5, "bands": {"s1": ["VV"], "s2": ["B2"]}},
            "checkpoint": "c", "classes": list(data.CLASSES), **change}


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
    lines = (tmp_path / "results.jsonl").read_text().split("\n")[1:]
    assert sorted(json.loads(line)["seed"] for line in lines) == list(range(80))


POWER_CUT = b"\n".join((b"", b"\0" * 50, b"\xff\xfe", b"\0" * 50 + b'{"seed": 1}', b"\0" * 9, b""))


# The third ends in a brace.
@pytest.mark.parametrize("keep", [b"{", b'"task": "si', b'"s2": ["B2"]}', b'"overall": 0.6'])
def test_lines_that_a_kill_cut_off_or_a_power_cut_spoilt_are_no_results(tmp_path, keep):
    results = linear_eval.Results(tmp_path)
    results.add(run_of(seed=0), SCORES)
    whole = results.path.read_bytes()
    line = whole.strip().replace(b'"seed": 0', b'"seed": 1')
    results.path.write_bytes(whole + POWER_CUT + line[:line.index(keep) + len(keep)])
    assert results.has(run_of(seed=0)) and not results.has(run_of(seed=1))
    results.add(run_of(seed=1), SCORES)
    results.add(run_of(seed=2), SCORES)
    assert [line["seed"] for line in results.read()] == [0, 1, 2]
    assert results.read()[1]["class"] == [0.5] * 7 + [None]


def test_a_run_that_files_joined_by_cat_hold_twice_counts_once(tmp_path):
    results = linear_eval.Results(tmp_path)
    for seed in range(2):
        results.add(run_of(seed=seed), SCORES)
    there = results.path.read_text()
    elsewhere = there.replace("0.5,", "0.499,")  # on another machine a digit differs
    assert elsewhere != there
    results.path.write_text(there + there + elsewhere)
    assert [(line["seed"], line["average"]) for line in results.read()] == [(0, 0.5), (1, 0.5)]


def test_what_is_printed_of_a_run_names_its_network(tmp_path, capsys):
    results = linear_eval.Results(tmp_path)
    results.add(run_of(), SCORES)
    results.add(run_of(protocol="linear", baseline="bands", sensors="s1"), SCORES)
    scores = "100 % of labels, seed 0: average 50.0%, overall 60.0%\n"
    assert capsys.readouterr().out == (
        f"d-simclr, finetune, single, {scores}d-simclr, linear, bands, s1, single, {scores}")


@pytest.mark.parametrize("fraction, words", [(0.002, "0.2 % of labels"), (0.07, "7 % of"), (0.1, "10 % of"),
                                             (1.0, "100 % of")])
def test_small_fractions_are_not_rounded_away(tmp_path, capsys, fraction, words):
    linear_eval.Results(tmp_path).add(run_of(label_fraction=fraction), SCORES)
    assert f", {words}" in capsys.readouterr().out


# ------------------------------------------------------------------------------ on simulated stores

def test_probe_of_a_checkpoint(tmp_path, labelled, checkpoint, monkeypatch):
    def probe(*options):
        call(monkeypatch, linear_eval, "--checkpoint", checkpoint, "--data", labelled, "--results",
             tmp_path, "--seeds", 2, "--task", "single", "multi", *options)
        return linear_eval.Results(tmp_path).read()

    calls = watch(monkeypatch, linear_eval, "extract")
    first = probe("--label-fraction", 0.1, 1)
    assert len(calls) == 2  # training and test crops, whatever the seeds, tasks and fractions
    stats = models.load_checkpoint(checkpoint)["stats"]  # of what the encoders learnt from
    assert all(scaling["stats"] == stats for (_, scaling, *_), _ in calls)
    assert len(first) == 8
    assert all(line["simulated"] and line["protocol"] == "linear" for line in first)
    assert all(line["classes"] == list(data.CLASSES) for line in first)
    assert {line["counts"]["train_patches"] for line in first if line["label_fraction"] == 1} != {0}
    assert probe("--label-fraction", 0.1, 1) == first and len(calls) == 2  # nothing is repeated
    assert len(probe("--sensors", "s1")) == 12

    (tmp_path / "results.jsonl").unlink()
    assert probe("--label-fraction", 0.1, "--seeds", 1) == first[::2][:2]


def test_frozen_features_are_those_of_the_sensors_and_of_the_baseline_asked_for(pairs, checkpoint):
    patches, encoders = data.Patches(pairs), models.load_encoders(checkpoint)[0]
    s1, s2 = torch.rand(3, 2, 32, 32), torch.rand(3, 13, 32, 32)

    def features(*inputs, content=(), **options):
        args = linear_eval.evaluation_parser("").parse_args([])
        vars(args).update({"baseline": None, "sensors": "both", **options})
        with torch.no_grad():
            return linear_eval.frozen_network(args, content, patches)(*inputs)

    content = models.load_checkpoint(checkpoint)
    alone = [encoders["s1"](s1), encoders["s2"](s2)]
    for sensors, expected in (("s1", alone[0]), ("s2", alone[1]), ("both", torch.cat(alone, 1))):
        assert torch.allclose(features(s1, s2, content=content, sensors=sensors), expected, atol=1e-5)
    whole = features(s1, s2, baseline="random")  # batch norm as after training: no crop depends on another
    assert torch.allclose(features(s1[:1], s2[:1], baseline="random"), whole[:1], atol=1e-5)
    bands = features(s1, s2, baseline="bands")
    for x, found in ((s1, bands[:, :4]), (s2, bands[:, 4:])):
        expected = np.concatenate([x.numpy().std((2, 3), ddof=1), x.numpy().mean((2, 3))], 1)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_whatever_decides_a_result_makes_another_run(tmp_path):
    """And is not skipped in the belief that it is done."""
    def planned(**change):
        args = linear_eval.evaluation_parser("").parse_args(["--seeds", "1", "--checkpoint", str(tmp_path / "last.pt")])
        vars(args).update({option: 1 for option in finetune.OPTIONS})
        patches = SimpleNamespace(bands=BANDS, identity="d", classes=["a", "b"], simulated=False)
        for name, value in change.items():
            vars(patches if hasattr(patches, name) else args)[name] = value
        run, = linear_eval.planned_runs(args, models.load_checkpoint(tmp_path / "last.pt"), patches, finetune.OPTIONS)
        return run

    patches = SimpleNamespace(bands=BANDS, classes=["a"], identity="d", stats=lambda rows: None, rows=[])
    save_untrained(tmp_path / "last.pt", patches)
    first = planned()
    assert planned(threads=7, results="elsewhere", data="moved") == first
    changes = [("crop", 7), ("scale", "fixed"), ("arch", "resnet50"), ("label_sampling", "rows"), ("precision", "bf16"),
               ("method", "mma"), ("identity", "e"), ("bands", {"s1": ["VV"], "s2": []}), ("classes", ["a"]),
               ("simulated", True), ("task", ["multi"]), ("label_fraction", [0.1]), *((option, 2) for option in finetune.OPTIONS)]
    assert {"epochs", "batch_size", "lr", "classifier_lr", "weight_decay", "drop_epoch"} == {*finetune.OPTIONS}
    for name, value in changes:
        change = {name: value} if name != "precision" else {name: "float32" if first["args"][name] == "bf16" else "bf16"}
        assert planned(**change) != first, name
    save_untrained(tmp_path / "last.pt", patches, "mma")
    assert planned() != first


@pytest.mark.parametrize("script, options", [(linear_eval, ("--baseline", "random")), (finetune, ("--method", "only-s1", "--epochs", 1))])
def test_each_seed_draws_its_own_labels_weights_and_crops_as_asked(tmp_path, labelled, monkeypatch, script, options):
    drawn = watch(monkeypatch, linear_eval, "training_rows")
    made, trained = watch(monkeypatch, linear_eval, "make_encoders"), watch(monkeypatch, finetune, "train")
    call(monkeypatch, script, *options, "--data", labelled, "--results", tmp_path, "--crop", 32, "--seeds", 2,
         "--label-fraction", 0.5, "--label-sampling", "rows")
    assert [more for (_, fraction, *more), _ in drawn if fraction == 0.5] == [[0, "rows"], [1, "rows"]]
    assert [seed for (*_, seed), _ in made] == [0, 1]
    assert [arguments[5] for arguments, _ in trained] == ([0, 1] if script is finetune else [])


@pytest.mark.parametrize("script", [linear_eval, finetune])
def test_seed_of_pretraining_is_not_taken_for_a_number_of_seeds(labelled, monkeypatch, capsys, script):
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, script, "--data", labelled, "--seed", 2)
    assert "unrecognized arguments: --seed 2" in capsys.readouterr().err


def test_one_split_is_learnt_from_and_the_other_tested_on(tmp_path, labelled, monkeypatch):
    options = ("--data", labelled, "--results", tmp_path, "--crop", 32, "--seeds", 1)
    probes = watch(monkeypatch, linear_eval, "probe")
    call(monkeypatch, linear_eval, "--baseline", "bands", *options)
    trainings, extractions = watch(monkeypatch, finetune, "train"), watch(monkeypatch, linear_eval, "extract")
    call(monkeypatch, finetune, "--method", "only-s1", "--epochs", 1, *options)
    (_, crops, other, chosen, *_), _ = probes[0]
    (_, _, _, trained, *_), _ = trainings[0]
    (_, scaling, _, tested, *_), _ = extractions[0]
    patches = data.Patches(labelled)
    validation = patches.rows_of("validation")
    usable = set(validation[patches.labels[validation] != IGNORE])
    assert set(chosen) == set(trained) == usable and usable <= set(crops["row"])
    assert set(other["row"]) == set(tested) == set(patches.rows_of("test"))
    assert scaling["stats"] == patches.stats(validation) != patches.stats(patches.rows)


def test_random_weights_are_others_with_each_seed_and_bands_are_taken_once(tmp_path, labelled, monkeypatch):
    calls = watch(monkeypatch, linear_eval, "extract")
    for baseline in ("random", "bands"):
        call(monkeypatch, linear_eval, "--baseline", baseline, "--data", labelled, "--results",
             tmp_path, "--crop", 32, "--seeds", 2, "--scale", "fixed")
    lines = linear_eval.Results(tmp_path).read()
    assert [line["baseline"] for line in lines] == ["random", "random", "bands", "bands"]
    assert lines[0]["average"] != lines[1]["average"] and len(calls) == 2 * 2 + 2


def embeddings(monkeypatch, checkpoint, store, out, *options):
    call(monkeypatch, linear_eval, "--checkpoint", checkpoint, "--data", store, "--embed", out,
         "--precision", "float32", *options)
    return dict(np.load(out))


def test_embeddings_do_not_depend_on_batches_and_threads(tmp_path, labelled, checkpoint,
                                                        monkeypatch):
    one = embeddings(monkeypatch, checkpoint, labelled, tmp_path / "one.npz", "--batch-size", 7,
                     "--threads", 1)
    other = embeddings(monkeypatch, checkpoint, labelled, tmp_path / "a new/folder/other", "--threads", 3)
    patches = data.Patches(labelled)
    assert one["ids"].tolist() == patches.ids and one["simulated"]
    assert one["labels"].tolist() == patches.labels.tolist()
    assert one["classes"].tolist() == list(data.CLASSES)
    assert one["s2_bands"].tolist() == list(data.S2_BANDS)
    assert one["s1"].shape == one["s2"].shape == (56, 512)
    for sensor in ("s1", "s2"):
        np.testing.assert_allclose(one[sensor], other[sensor], rtol=0, atol=1e-5)
    encoders, scaling = models.load_encoders(checkpoint)
    s1, s2 = crops_of(patches, 5, (0, 0, 8, 8), (0, 8, 0, 8))  # of 32 px, that cover 40
    with torch.no_grad():
        expected = models.joined_features(encoders, *models.to_input(s1, s2, **scaling)).mean(0)
    np.testing.assert_allclose(np.concatenate((one["s1"][5], one["s2"][5])), expected, rtol=0, atol=1e-5)


def test_embeddings_of_a_store_with_a_bad_patch_keep_the_names_of_the_others(tmp_path, flood, monkeypatch):
    shutil.copytree(flood.parent / "tree", tmp_path / "tree")
    bad = sorted((tmp_path / "tree").rglob("s1/**/*.tif"))[3]
    bad.write_bytes(b"cut off")
    patches = data.pack(tmp_path / "tree", tmp_path / "store", s2_offset=0, max_bad=0.5)
    whole = data.Patches(flood)
    path = save_untrained(tmp_path / "last.pt", whole)
    found = embeddings(monkeypatch, path, tmp_path / "store", tmp_path / "some.npz")
    every = embeddings(monkeypatch, path, flood, tmp_path / "every.npz")
    assert len(found["ids"]) == len(found["s1"]) == len(found["labels"]) == 19 and not {*patches.left_out} & {*found["ids"]}
    at = [every["ids"].tolist().index(name) for name in found["ids"]]
    assert np.array_equal(found["labels"], every["labels"][at])
    for sensor in ("s1", "s2"):
        np.testing.assert_allclose(found[sensor], every[sensor][at], rtol=0, atol=1e-5)


def save_released(path, model, heads=()):
    """Write a model as the authors wrote theirs, of the sensors `heads` with their heads."""
    states = {sensor: encoder.state_dict() for sensor, encoder in model.encoders.items()}
    content = {f"{sensor}_model_weights": state for sensor, state in states.items()}
    if model.method == "d-simclr":
        weights = {}
        for prefix, sensor in (("backbone1.", "s1"), ("backbone2.", "s2")):
            weights |= {prefix + key: value for key, value in states[sensor].items()}
            if sensor in heads:
                weights |= {f"{prefix}fc.{key}": value for key, value in model.heads[sensor].state_dict().items()}
        content = {"state_dict": weights}
    torch.save(content, path)


def test_authors_weights_are_taken_as_they_are(tmp_path, labelled, monkeypatch, capsys):
    """In embeddings, and in --retrieve, which sends centre crops through the heads if both are there."""
    model, path = models.Contrastive("d-simclr", BANDS, width=64).eval(), tmp_path / "released.pth"
    save_released(path, model, ("s1", "s2"))
    found = embeddings(monkeypatch, path, labelled, tmp_path / "out.npz", "--crop", 32)
    patches = data.Patches(labelled)
    inputs = models.to_input(*crops_of(patches, 9, (0, 0, 8, 8), (0, 8, 0, 8)), "patch-max")
    centres = [crops_of(patches, row, (4,), (4,)) for row in patches.rows_of("test")]
    central = models.to_input(*map(torch.cat, zip(*centres)), "patch-max")
    with torch.no_grad():
        for sensor, x in zip(BANDS, inputs):
            expected = model.encoders[sensor](x).mean(0)
            np.testing.assert_allclose(found[sensor][9], expected, rtol=0, atol=1e-5)
        features = {sensor: model.encoders[sensor](x) for sensor, x in zip(BANDS, central)}
        projected = {sensor: model.heads[sensor](x) for sensor, x in features.items()}
    for heads, compared in ((("s1", "s2"), projected), (("s2",), features), ((), features)):
        save_released(path, model, heads)
        capsys.readouterr()
        call(monkeypatch, linear_eval, "--checkpoint", path, "--data", labelled, "--crop", 32,
             "--precision", "float32", "--retrieve", tmp_path / "out.png")
        a, b = (F.normalize(x) for x in compared.values())
        expected = models.retrieval(a @ b.T)["median"]
        assert f"median rank {expected:g}, crops of 32 px\n" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["d-simclr", "mma"])
def test_authors_weights_are_probed_and_fine_tuned(tmp_path, labelled, monkeypatch, method):
    save_released(tmp_path / "released.pth", models.Contrastive(method, BANDS))
    common = ("--checkpoint", tmp_path / "released.pth", "--data", labelled, "--results", tmp_path,
              "--crop", 32, "--seeds", 1, "--label-fraction", 0.5)
    call(monkeypatch, linear_eval, *common)
    call(monkeypatch, finetune, *common, "--epochs", 1, "--batch-size", 32)
    probed, tuned = linear_eval.Results(tmp_path).read()
    for line, protocol in ((probed, "linear"), (tuned, "finetune")):
        assert (line["method"], line["protocol"], line["args"]["scale"]) == (method, protocol, "patch-max")


def test_retrieval_as_a_picture(tmp_path, pairs, labelled, checkpoint, monkeypatch, capsys):
    common = ("--checkpoint", checkpoint, "--retrieve", tmp_path / "out.png", "--data")
    call(monkeypatch, linear_eval, *common, labelled)
    assert "24 test candidates," in capsys.readouterr().out  # of a store that says nothing of what was trained on
    call(monkeypatch, linear_eval, *common, pairs)
    assert "32 held-out candidates," in capsys.readouterr().out  # half of the scenes are held out
    assert (tmp_path / "out.png").stat().st_size > 20_000


@pytest.mark.parametrize("method", ["d-simclr", "mma"])
def test_retrieval_with_larger_crops_than_in_training(tmp_path, labelled, monkeypatch, capsys, method):
    path = save_untrained(tmp_path / "last.pt", data.Patches(labelled), method)  # trained with 32
    calls = watch(monkeypatch, models.Contrastive, "similarity")
    for options, crop in (((), 32), (("--crop", 40), 40)):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *args, to=figures, **kwargs: to.append(figure))
        call(monkeypatch, linear_eval, "--checkpoint", path, "--data", labelled, "--retrieve",
             tmp_path / "out.png", *options)
        said = f"24 held-out candidates, .*, crops of {crop} px\n"
        assert re.search(said, capsys.readouterr().out)
        assert figures[0].get_suptitle().splitlines()[0].endswith(f"crops of {crop} px")
        shapes = {axis.images[0].get_array().shape[:2] for axis in figures[0].axes}
        assert shapes == {(crop, crop)}
    maps = [(256, 4, 4), (256, 5, 5)]  # an eighth of the crops
    assert [a.shape[1:] for (_, a, _), _ in calls] == (maps if method == "mma" else [(128,)] * 2)


def test_a_picture_of_retrieval_shows_each_query_above_what_is_nearest_to_it(tmp_path, labelled, monkeypatch):
    figures, patches = [], data.Patches(labelled)
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    args = SimpleNamespace(data=labelled, crop=40, retrieve=tmp_path / "out.png")
    rows = patches.rows[:30]
    nearest = (np.arange(30)[:, None] + [7, 0, 1, 2, 3]) % 30  # the right one in the second place
    linear_eval.draw_retrieval(args, rows, nearest, "title")
    axes = np.reshape(figures[0].axes, (6, 10))  # every third of 30
    for k, column in enumerate(axes.T):
        s1, s2, *_ = next(iter(data.loader(patches, [(rows[[3 * k, *nearest[3 * k]]], np.zeros(6, int), np.zeros(6, int))], 40)))
        assert np.array_equal(column[0].images[0].get_array(), s1[0, 0])
        pictures, _ = linear_eval.composite(s2.numpy(), patches.bands["s2"])
        for axis, picture in zip(column[1:], pictures[1:]):
            assert np.array_equal(axis.images[0].get_array(), picture)
        assert [axis.spines["top"].get_linewidth() == 4 for axis in column] == [False, False, True, False, False, False]


def test_a_picture_is_in_true_colour_or_of_the_first_three_bands():
    rng = np.random.default_rng(0)
    s2 = rng.integers(0, 6000, (13, 4, 5)).astype(np.uint16)
    picture, title = linear_eval.composite(s2, data.S2_BANDS)
    assert title == "true colour" and picture.shape == (4, 5, 3)
    assert np.allclose(picture, np.clip(s2[[3, 2, 1]] / 3000, 0, 1).transpose(1, 2, 0))
    for bands, shown in ((["B12", "B8", "B4"], [0, 1, 2]), (["pan"], [0, 0, 0]),
                         (["a", "b"], [0, 1, 0]), (["B4", "B8", "B3", "B11"], [0, 1, 2])):
        picture, title = linear_eval.composite(s2[:len(bands)], bands)
        assert title.startswith("false colour") and all(bands[k] in title for k in shown)
        assert picture.shape == (4, 5, 3) and picture.min() >= 0 and 0.9 < picture.max() <= 1
        for channel, band in enumerate(shown):
            order = s2[band].ravel().argsort(kind="stable")
            assert (np.diff(picture[..., channel].ravel()[order]) >= 0).all()


def test_retrieval_needs_patches_that_pretraining_did_not_see(tmp_path, checkpoint, monkeypatch):
    simulate.simulate_sen12ms(tmp_path / "others", scenes=2, patches=2, size=40, seed=9)
    data.pack(tmp_path / "others", tmp_path / "store")
    with pytest.raises(data.DataError, match="--retrieve needs patches that pretraining"):
        call(monkeypatch, linear_eval, "--checkpoint", checkpoint, "--data", tmp_path / "store",
             "--retrieve", tmp_path / "out.png")


@pytest.mark.parametrize("method", ["d-simclr", "mma", "simclr-rgb"])
def test_bands_and_classes_of_ones_own(tmp_path, flood, monkeypatch, capsys, method):
    bands = ["B12", "B8", "B4"] if method == "simclr-rgb" else ["VH", "B12", "B8", "B4"]
    patches = data.Patches(flood, bands)
    path = save_untrained(tmp_path / "last.pt", patches, method)
    common = ("--checkpoint", path, "--data", flood)
    evaluated = (*common, "--results", tmp_path, "--seeds", 1, "--task", "single", "multi")
    call(monkeypatch, linear_eval, *evaluated)
    call(monkeypatch, finetune, *evaluated, "--epochs", 1, "--batch-size", 12)
    lines = linear_eval.Results(tmp_path).read()
    assert len(lines) == 4
    for line in lines:
        assert line["simulated"] and not patches.simulated  # since the encoders learnt from simulated data
        assert line["classes"] == ["dry", "flooded"] and len(line["class"]) == 2
        assert [*line["args"]["bands"]["s1"], *line["args"]["bands"]["s2"]] == bands
        assert line["task"] == "multi" or np.shape(line["confusion"]) == (2, 2)
    assert lines[0]["average"] > 0.9  # the third of the picture that is wet or dry decides

    found = embeddings(monkeypatch, path, flood, tmp_path / "out.npz")
    assert found["s2_bands"].tolist() == ["B12", "B8", "B4"]
    assert found["classes"].tolist() == ["dry", "flooded"]
    assert sorted(set(found["labels"].tolist())) == [0, 1]
    if method != "simclr-rgb":
        capsys.readouterr()
        call(monkeypatch, linear_eval, *common, "--retrieve", tmp_path / "out.png")
        assert "8 held-out candidates" in capsys.readouterr().out


def test_crops_have_their_own_labels_among_many_classes(tmp_path):
    """The halves of each patch are of two of twelve classes, the crops of one."""
    legend = {**FLOOD, "classes": {str(10 * c): f"class {c}" for c in range(12)}}
    for c in range(12):
        halves = np.repeat([10 * c, 10 * ((c + 1) % 12)], 8) * np.ones((1, 8, 1))
        s2 = np.concatenate([halves + 10] * 3)
        write_pair(tmp_path / "tree/train", c, legend, halves / 10 - 30, s2, halves)
    patches = data.pack(tmp_path / "tree", tmp_path / "store", s2_offset=0)
    args = linear_eval.evaluation_parser("").parse_args(["--crop", "8"])
    crops = linear_eval.extract(lambda s1, s2: s2.mean((2, 3)), {"scale": "fixed"}, patches,
                                patches.rows, args)
    codes = np.rint(crops["x"][:, 0] * 1e4).astype(int) - 10  # the class is the reflectance
    for task in ("single", "multi"):
        np.testing.assert_array_equal(crops[task], np.eye(12)[codes // 10])
    assert crops["row"].tolist() == np.repeat(patches.rows, 2).tolist() and len(codes) == 24
    patches.scenes = [f"scene {k // 5}" for k in range(12)]
    crops = linear_eval.extract(lambda s1, s2: s2.mean((2, 3)), {"scale": "fixed"}, patches, patches.rows, args)
    assert crops["scene"].tolist() == [k // 10 for k in range(24)]


@pytest.mark.parametrize("options, message", [
    ("--checkpoint {checkpoint} --method mma", "last.pt: holds .*d-simclr.*: leave --method, --arch"),
    ("--checkpoint {checkpoint} --scale fixed", "last.pt: holds .*standard.* --scale and"),
    ("--checkpoint {checkpoint} --arch resnet50", "last.pt: holds .*resnet18.*--arch"),
    ("--checkpoint {checkpoint} --bands VV B2", "last.pt: holds .*'VV', 'VH', 'B1'.* --bands out"),
    ("--checkpoint {checkpoint} --crop 64", "--crop 64"),
    ("--checkpoint {checkpoint} --label-fraction 0.1 0", "--label-fraction: above 0 and at most 1"),
    ("--checkpoint {checkpoint} --label-fraction 10", "--label-fraction: above 0 and at most 1"),
    ("--checkpoint {checkpoint} --data {pairs}", "no class maps"),
    ("--checkpoint {checkpoint} --data {flood}", "no band (VV|B1) .*B12.*B8.*B4"),
    ("--baseline random --bands VV --data {flood}", "no band VV, .*VH.*B12"),
    ("--baseline random --method simclr-rgb --data {flood}", "no band (B3 B2|B2 B3),"),
    ("--baseline random --bands VH --data {flood}", "d-simclr needs bands of s2"),
    ("--baseline random --method only-s2 --sensors s1 --crop 32", "--sensors s1"),
    ("--baseline random --data {checkpoint.parent}", "pack"),
    ("--checkpoint {only_s1}", "only-s1.pt: has learnt from labels"),
    ("--checkpoint {only_s1} --retrieve x.png", "only-s1.pt: --retrieve: give a pretraining of both"),
    ("--checkpoint {d_simclr} --retrieve x.png", "d-simclr.pt: --retrieve: give a pretraining of both"),
])
def test_a_checkpoint_or_data_that_do_not_fit_are_one_line(tmp_path, labelled, pairs, flood, checkpoint, monkeypatch,
                                                           options, message):
    content = models.load_checkpoint(checkpoint)
    classifiers = {}
    for method in ("only-s1", "d-simclr"):
        path = classifiers[method.replace("-", "_")] = tmp_path / f"{method}.pt"
        models.save_checkpoint(path, models.Classifier(models.make_encoders(method, content["bands"])),
                               **{**content, "method": method})
    filled = [option.format(checkpoint=checkpoint, pairs=pairs, flood=flood, **classifiers)
              for option in options.split()]
    with pytest.raises((models.CheckpointError, data.DataError), match=message) as raised:
        call(monkeypatch, linear_eval, "--data", labelled, "--results", tmp_path, *filled)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("epoch", [0, 3, 4])
def test_a_pretraining_that_is_not_at_its_end_is_said(epoch, tmp_path, pairs, monkeypatch, capsys):
    path = save_untrained(tmp_path / "last.pt", data.Patches(pairs), epoch=epoch, args={"epochs": 4, "crop": 32})
    monkeypatch.setattr("sys.argv", ["x", "--checkpoint", str(path)])
    linear_eval.read_options(linear_eval.evaluation_parser(""))
    assert capsys.readouterr().out == ("" if epoch == 4 else f"{path}: {epoch} of 4 epochs\n")


def test_a_split_and_a_checkpoint_that_are_not_there(tmp_path, labelled, monkeypatch):
    simulate.simulate_dfc2020(tmp_path / "tree", train=6, test=0, size=40)
    data.pack(tmp_path / "tree", tmp_path / "store")
    with pytest.raises(data.DataError, match="labelled patches of the splits .* it has 6 and 0"):
        call(monkeypatch, linear_eval, "--baseline", "bands", "--data", tmp_path / "store")
    result = user("linear_eval.py", "--checkpoint", ROOT / "nothing.pt", "--data", labelled)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "nothing.pt" in result.stderr
