"""What any reader can run to trust the scores: chance, certainty, and that pretraining helps (on simulated data)."""
import argparse
import functools

import numpy as np
import pytest
import simulate
import torch
from conftest import BACKGROUND, folder, user

import data
import linear_eval
import models
import pretrain
from data import IGNORE

ARGS = argparse.Namespace(device="cpu", probe="linear", crop=32, batch_size=100, workers=0, precision="float32",
                          checkpoint="", results=None)


def features(patches, encoders, scaling, split):
    rows = np.flatnonzero(patches.splits == split)
    found = linear_eval.extract(encoders, scaling, patches, rows, ARGS)
    return {**found, "row": np.searchsorted(rows, found["row"])}


def scores(parts, labels, task="single", seed=0, probe="linear"):
    args, (train, test) = argparse.Namespace(device="cpu", probe=probe), parts
    names = [name for name in train if name not in ("single", "multi", "row")]
    chosen = linear_eval.training_rows(labels, 1, seed)
    return linear_eval.probe(train, test, names, task, chosen, labels, seed, args)[0]


@pytest.fixture(scope="module")
def bands_of(trees):
    """Band means and sd of the training and test crops of simulated patches, and the training patches' labels."""
    patches = data.open_data(trees / "dfc2020", workers=0)
    encoders = torch.nn.ModuleDict({name: linear_eval.BandStatistics() for name in ("s1", "s2")})
    parts = [features(patches, encoders, {"scale": "fixed"}, split) for split in ("validation", "test")]
    return parts, patches.labels[patches.splits == "validation"]


def test_shuffled_labels_score_at_chance(bands_of):
    (train, test), labels = bands_of
    averages = []
    for seed in range(5):  # labels change places patch by patch, so that crops of one patch still agree
        order = np.random.default_rng(seed).permutation(len(labels))
        places = order[train["row"]] * (len(train["row"]) // len(labels)) + np.arange(len(train["row"])) % (
            len(train["row"]) // len(labels))
        shuffled = {**train, "single": train["single"][places]}
        averages.append(scores((shuffled, test), labels[order], seed=seed)["average"])
    classes = len(np.unique(test["single"][test["single"] != IGNORE]))
    error = np.std(averages, ddof=1) / np.sqrt(len(averages))
    assert abs(np.mean(averages) - 1 / classes) < 3 * error + 0.02
    assert scores(bands_of[0], labels)["average"] > 1 / classes + 0.2  # while the true ones can be learnt


@pytest.mark.parametrize("task", ["single", "multi"])
def test_the_label_as_a_band_scores_100(bands_of, task):
    parts, labels = bands_of
    leaky = []
    for part in parts:
        label = np.eye(256, dtype=np.float32)[part["single"]][:, :8] if task == "single" else part["multi"]
        leaky.append({**{key: part[key] for key in ("single", "multi", "row")}, "label": label})
    seen = leaky[0]["label"].any(0)
    keep = ~leaky[1]["label"][:, ~seen].any(1)  # what was never shown cannot be learnt
    leaky[1] = {key: value[keep] for key, value in leaky[1].items()}
    found = scores(leaky, labels, task)
    assert found["overall"] == 1 and found["average"] == 1


def pretrain_seed(seed):
    """-> folder of a pretraining of D-SimCLR on simulated pairs."""
    out = folder() / f"sanity{seed}"
    done = user("pretrain.py", "--data", pairs(), "--out", out, "--epochs", 2, "--batch-size", 16, "--crop", 32, "--lr", 1e-3,
                "--constant-epochs", 1, "--scale", "fixed", "--holdout", 0.2, "--seed", seed, "--workers", 0)
    assert done.returncode == 0, done.stderr
    return out


@functools.cache
def pairs():
    simulate.simulate_sen12ms(folder() / "pairs", scenes=16, patches=40, size=32, seed=3)
    return folder() / "pairs"


@functools.cache
def begin():
    """-> what pretrains with two seeds."""
    return [BACKGROUND.submit(pretrain_seed, seed) for seed in range(2)]


def test_pretraining_beats_random_weights(tmp_path):
    """By more than the seeds' spread: the worst pretrained encoder is better than the best random one."""
    simulate.simulate_dfc2020(tmp_path, train=96, test=160, size=32, seed=3)
    patches, pretrained = data.open_data(tmp_path, workers=0), [future.result() for future in begin()]
    labels = patches.labels[patches.splits == "validation"]
    found = {}
    for seed in range(2):
        content = models.load_checkpoint(pretrained[seed] / "last.pt")
        encoders, scaling = models.load_encoders(content)
        torch.manual_seed(seed)
        random = models.make_encoders("d-simclr", patches.bands).eval()
        retrieval = [line["retrieval"]["s1_to_s2"]["top5"] for line in
                     pretrain.Log(pretrained[seed] / "log.jsonl", 10**9).entries if "retrieval" in line]
        found.setdefault("retrieval", []).append((retrieval[0], retrieval[-1]))
        parts = [[features(patches, e, scaling, split) for split in ("validation", "test")] for e in (random, encoders)]
        for probe in ("linear", "knn"):
            averages = [scores(part, labels, seed=seed, probe=probe)["average"] for part in parts]
            found.setdefault(probe, []).append(averages)
    for reading, pairs in found.items():
        before, after = np.array(pairs).T
        print(f"{reading}: random {before.round(3)}, pretrained {after.round(3)}")
        assert after.min() > before.max(), reading
