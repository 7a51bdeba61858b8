"""What any reader can run to trust the scores: chance, certainty, and that pretraining helps (on
simulated data)."""
import functools
import json

import numpy as np
import pytest
import simulate
from conftest import BACKGROUND, folder, user

import data
import linear_eval
import models


def crops_of(patches, content=None, scaling=None, baseline=None, seed=0):
    """-> what linear_eval.extract() makes of the training and the test crops."""
    args = linear_eval.evaluation_parser("").parse_args([])
    vars(args).update(crop=32, precision="float32", baseline=baseline, sensors="both")
    network = linear_eval.frozen_network(args, content or {}, patches, seed)
    return [linear_eval.extract(network, scaling or {"scale": "fixed"}, patches,
                                patches.rows_of(split), args) for split in ("validation", "test")]


def scores(parts, labels, chosen, task="single", seed=0):
    rows = chosen[linear_eval.training_rows(labels[chosen], 1, seed)]
    return linear_eval.probe(task, *parts, rows, labels, seed)[0]


@pytest.fixture(scope="module")
def bands_of(labelled):
    """Band means and sd of the training and test crops of simulated patches, the labels of all
    patches, and the training rows."""
    patches = data.Patches(labelled)
    return crops_of(patches, baseline="bands"), patches.labels, patches.rows_of("validation")


def test_shuffled_labels_score_at_chance(bands_of):
    (train, test), labels, rows = bands_of
    each = len(train["row"]) // len(rows)  # crops of a patch
    averages = []
    for seed in range(5):  # labels change places patch by patch, so that crops of one patch agree
        order = np.random.default_rng(seed).permutation(len(rows))
        places = np.add.outer(each * order, np.arange(each)).ravel()
        shuffled, mixed = {**train, "single": train["single"][places]}, labels.copy()
        mixed[rows] = labels[rows[order]]
        averages.append(scores((shuffled, test), mixed, rows, seed=seed)["average"])
    classes = test["single"].any(0).sum()
    error = np.std(averages, ddof=1) / np.sqrt(len(averages))
    assert abs(np.mean(averages) - 1 / classes) < 3 * error + 0.02
    assert scores(*bands_of)["average"] > 1 / classes + 0.2  # while the true ones can be learnt


@pytest.mark.parametrize("task", ["single", "multi"])
def test_the_label_as_a_band_scores_100(bands_of, task):
    parts, labels, rows = bands_of
    train, test = ({**part, "x": part[task]} for part in parts)
    seen = train[task].any(0)
    keep = ~test[task][:, ~seen].any(1)  # what was never shown cannot be learnt
    test = {key: value[keep] for key, value in test.items()}
    found = scores((train, test), labels, rows, task)
    assert found["overall"] == 1 and found["average"] == 1


def pretrain_seed(seed):
    """-> folder of a pretraining of D-SimCLR on simulated pairs."""
    out = folder() / f"sanity{seed}"
    done = user("pretrain.py", "--data", training_pairs(), "--out", out, "--epochs", 2,
                "--batch-size", 16, "--crop", 32, "--lr", 1e-3, "--constant-epochs", 1, "--scale",
                "fixed", "--holdout", 0.2, "--seed", seed)
    assert done.returncode == 0, done.stderr
    return out


@functools.cache
def training_pairs():
    simulate.simulate_sen12ms(folder() / "sanity", scenes=16, patches=40, size=32, seed=3)
    data.pack(folder() / "sanity", folder() / "sanity pairs")
    return folder() / "sanity pairs"


@functools.cache
def begin():
    """-> what pretrains with two seeds."""
    return [BACKGROUND.submit(pretrain_seed, seed) for seed in range(2)]


def test_pretraining_beats_random_weights(tmp_path):
    """By more than the seeds' spread: the worst pretrained encoder is better than the best random
    one."""
    simulate.simulate_dfc2020(tmp_path / "tree", train=96, test=160, size=32, seed=3)
    patches = data.pack(tmp_path / "tree", tmp_path / "store")
    rows, found = patches.rows_of("validation"), {"retrieval": [], "linear": []}
    for seed, pretrained in enumerate(begin()):
        out = pretrained.result()
        content = models.load_checkpoint(out / "last.pt")
        entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        retrieval = [entry["retrieval"]["s1_to_s2"]["top5"] for entry in entries
                     if "retrieval" in entry]
        found["retrieval"].append((retrieval[0], retrieval[-1]))
        _, scaling = models.load_encoders(content)
        both = crops_of(patches, baseline="random", seed=seed), crops_of(patches, content, scaling)
        found["linear"].append([scores(parts, patches.labels, rows, seed=seed)["average"]
                                for parts in both])
    for reading, numbers in found.items():
        before, after = np.array(numbers).T
        print(f"{reading}: random {before.round(3)}, pretrained {after.round(3)}")
        assert after.min() > before.max(), reading
