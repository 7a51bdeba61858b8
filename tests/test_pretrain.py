"""Pretraining as a user runs it: every method, equal bits, killed, stopped, broken files, several processes."""
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import show
import torch
import torch.distributed as dist
from conftest import BACKGROUND, CONTEXT, ROOT, call, folder, simulated
from torch import nn
from torchvision.transforms.v2 import functional as V

import data
import models
import pretrain

MMA = ["--method", "mma", "--epochs", 3, "--batch-size", 8, "--crop", 16, "--holdout", 0.25, "--eval-every", 1,
       "--log-every", 2, "--lr", 1e-4, "--constant-epochs", 1, "--temperature", 0.2]  # 6 steps an epoch
STEPS = 18


@functools.cache
def make_store():
    """The simulated SEN12MS tree, packed: 64 pairs of 40 px in 4 scenes."""
    data.pack(simulated() / "sen12ms", folder() / "store")
    return folder() / "store"


@pytest.fixture
def store():
    return make_store()


@pytest.fixture
def argv(store):
    return [*MMA, "--data", store]


SCALES = {"d-simclr": "patch-max", "mma": "fixed", "simclr-rgb": "standard"}
RUNS = {"reference": MMA, "again": [*MMA, "--threads", 1]} | {  # by tests that only look at what they leave
    method: ["--method", method, "--epochs", 2, "--batch-size", 16, "--crop", 33, "--holdout", 0.25, "--eval-every", 1,
             "--log-every", 2, "--scale", scale]
    for method, scale in SCALES.items()}


@functools.cache
def begun(name):
    """-> Future of one of RUNS, whose folder is folder() / name, or of the job of torchrun."""
    if name == "torchrun":
        return BACKGROUND.submit(torchrun)
    return BACKGROUND.submit(run, [*RUNS[name], "--data", make_store()], folder() / name)


def begin():
    for name in (*RUNS, "torchrun"):
        begun(name)


def script(argv, says, environment=(), trouble=None):
    """In a process of its own: pretrain.py with these arguments, what it prints into the file `says`."""
    os.setsid()  # a group, as a scheduler's job is
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["pretrain.py", *map(str, argv)]
    sys.stdout = sys.stderr = open(says, "w", buffering=1)  # noqa: SIM115  (to the end of the process)
    pretrain.SAVE_EVERY = 0  # after each epoch
    if trouble:
        trouble()
    data.run(pretrain.main, models.CheckpointError, OSError)


def start(argv, out, says=None, **more):
    says = says or out.with_suffix(".txt")
    process = CONTEXT.Process(target=script, args=([*argv, "--out", out], says), kwargs=more)
    process.start()
    process.says = says
    return process


def finish(process, seconds=120):
    process.join(seconds)
    assert process.exitcode is not None, "hangs"
    return process.exitcode, process.says.read_text()


def run(argv, out, **more):
    code, text = finish(start(argv, out, **more))
    assert code == 0, text
    return text


def contents(out):
    """Everything that must be equal, bit for bit: [checkpoint, log without its times]."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    content = torch.load(out / "last.pt", weights_only=True)
    return [content, [{k: v for k, v in line.items() if k != "pairs_per_s"} for line in log]]


def assert_equal(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, list):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, where


def assert_same_run(out, reference):
    assert_equal(contents(out), contents(reference))


@pytest.fixture
def reference():
    """A run that was never stopped."""
    begun("reference").result()
    return folder() / "reference"


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


@functools.cache
def stopped_after_epoch_2():
    """-> folder of a run that was stopped with the last step of the second of three epochs."""
    out = folder() / "epoch 2"
    code, text = finish(start([*MMA, "--data", make_store()], out, trouble=partial(signal_after, 12)))
    assert code == 143, text
    return out


@pytest.fixture
def killed(reference, tmp_path):
    """A folder as a kill in the third epoch leaves it: the checkpoint of the second, the log has lines of the third."""
    out = tmp_path / "killed"
    out.mkdir()
    shutil.copy(stopped_after_epoch_2() / "last.pt", out / "last.pt")
    shutil.copy(reference / "log.jsonl", out / "log.jsonl")
    return out


def assert_goes_on(argv, out, reference):
    """To the bits of the run that was never stopped."""
    run(argv, out)
    assert_same_run(out, reference)


# ---------------------------------------------------------------------------------------------- what a run leaves

@pytest.mark.parametrize("method, scale", SCALES.items())
def test_every_method_runs_and_logs(method, scale):
    begun(method).result()
    out = folder() / method
    content, log = contents(out)
    assert (content["method"], content["scale"], content["epoch"], content["step"]) == (method, scale, 2, 6)
    assert content["simulated"] and content["classes"] == models.CLASSES
    assert content["bands"]["s2"] == (models.RGB if method == "simclr-rgb" else models.S2_BANDS)
    held, steps = ([line for line in log if key in line] for key in ("retrieval", "loss"))
    assert [line["epoch"] for line in held] == [0, 1, 2] and [line["step"] for line in steps] == [2, 3, 4, 6]
    assert steps[0].keys() == {"epoch", "step", "loss", "accuracy", "lr"} and all(line["lr"] == 3e-5 for line in steps)
    assert json.loads((out / "log.jsonl").read_text().splitlines()[1])["pairs_per_s"] > 0
    for line in held:
        assert line["retrieval"]["candidates"] == 16 and len(line["retrieval"]) == 3
    assert held[-1]["retrieval"] == content["retrieval"]
    encoders, scaling = models.load_encoders(out / "last.pt")
    assert list(encoders) == list(models.METHODS[method]["inputs"]) and scaling["scale"] == scale


@pytest.mark.parametrize("method", SCALES)
def test_the_look_up_is_of_held_out_places_by_the_network_as_it_is_used_afterwards(method):
    begun(method).result()
    content = models.load_checkpoint(folder() / method / "last.pt")
    model, scaling = models.load_contrastive(content)
    model.to(memory_format=torch.channels_last)  # as in training: each layout has its own rounding
    patches = data.Patches(make_store(), models.METHODS[method].get("bands"))
    _, held = data.split_scenes(patches, 0.25)
    (s1, s2, *_), = data.loader(patches, data.grid_crops(held, patches.size, 33, 100, middle=True), 33)
    inputs = models.to_input(s1, s2, scaling["scale"], scaling["stats"])
    if method == "simclr-rgb":  # the halves of one sensor
        inputs = inputs[1][..., :16, :], inputs[1][..., 16:32, :]
    with torch.no_grad(), models.autocast("auto", torch.device("cpu")):
        embeddings = model(*inputs)
    similarity = model.similarity(*embeddings)
    forth, back = models.retrieval(similarity), models.retrieval(similarity.T)
    assert [*content["retrieval"].values()] == [16, forth, back]


def test_training_lowers_the_loss_and_follows_the_schedule(reference):
    _, log = contents(reference)
    steps = [line for line in log if "loss" in line]
    assert np.mean([line["loss"] for line in steps[-3:]]) < np.mean([line["loss"] for line in steps[:3]])
    for line in steps:  # constant for an epoch of 6 steps, then a cosine over 12; a line has the rate of its own step
        assert line["lr"] == pytest.approx(1e-4 * (1 + math.cos(math.pi * max(0, line["step"] - 7) / 12)) / 2)


def test_what_is_held_out_is_not_trained_on(store, reference):
    patches = data.Patches(store)
    args = SimpleNamespace(crop=16, batch_size=8, seed=0, epochs=2)
    rows, _ = data.split_scenes(patches, 0.25)
    assert contents(reference)[0]["stats"] == patches.stats(rows) != patches.stats(patches.rows)  # nor in the scaling
    for splits in (patches.splits, np.array(["spring"] * 48 + ["test"] * 16)):
        patches.splits = splits
        rows, held = data.split_scenes(patches, 0.25)
        assert sorted([*rows, *held]) == list(range(64)) and len(held) == 16
        assert not {patches.scenes[row] for row in rows} & {patches.scenes[row] for row in held}
        seen = [row for batch in pretrain.batches_from(0, rows, patches.size, args) for row in batch[0]]
        assert len(seen) == 96 and set(seen) == set(rows)  # in two epochs


def test_processes_and_resumed_runs_take_their_parts_of_the_same_batches():
    args = SimpleNamespace(crop=16, batch_size=6, seed=3, epochs=3)

    def batches(*more):
        return [np.stack(batch) for batch in pretrain.batches_from(*more)]

    whole = batches(0, np.arange(20, 40), (40, 50), args)
    parts = [batches(0, np.arange(20, 40), (40, 50), args, slice(first, first + 2)) for first in (0, 2, 4)]
    assert len(whole) == 9 and np.array_equal(whole, np.concatenate(parts, 2))  # (batch, 3, crop)
    for epoch in range(3):  # every row at most once; in each epoch other places
        rows, tops, lefts = np.concatenate(whole[3 * epoch:3 * epoch + 3], 1)
        assert len(set(rows)) == 18 and tops.max() <= 24 < lefts.max() <= 34
    assert not np.array_equal(whole[0], whole[3])
    args.seed = 4
    assert not np.array_equal(whole[0][0], batches(0, np.arange(20, 40), (40, 50), args)[0][0])
    args.seed = 3
    for start in (2, 3, 7):
        assert np.array_equal(batches(start, np.arange(20, 40), (40, 50), args), whole[start:])


@pytest.mark.parametrize("method", SCALES)
def test_what_nobody_chose_is_as_published(method, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--method", method])
    published = {"epochs": 200, "batch_size": 200, "crop": 128, "lr": 3e-5, "weight_decay": 1e-4, "constant_epochs": 10,
                 "temperature": 0.1 if method == "mma" else 0.07, "scale": "patch-max", "arch": "resnet18", "bands": None, "seed": 0,
                 "micro_batch": None}
    chosen = vars(pretrain.arguments())
    assert {name: chosen[name] for name in published} == published


def test_a_model_is_of_the_arch_and_seed_asked_for_and_adam_moves_all_of_it():
    args, bands = SimpleNamespace(method="d-simclr", arch="resnet50", seed=3, lr=0.2, weight_decay=0.3), {"s1": ["VV"], "s2": models.RGB}
    model, network, optimizer = pretrain.make_model(args, bands, torch.device("cpu"), 1)
    assert network is model and model.training and type(optimizer) is torch.optim.Adam
    assert "layer1.0.conv3.weight" in model.encoders["s1"].state_dict() and model.heads["s2"][0].in_features == 2048
    group, = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.2, 0.3)
    assert {*map(id, group["params"])} == {*map(id, model.parameters())}
    args.arch, first = "resnet18", {}
    for seed in (3, 4):
        args.seed = seed
        first[seed] = pretrain.make_model(args, bands, torch.device("cpu"), 1)[0].encoders["s1"].conv1.weight
    assert not torch.equal(first[3], first[4])


@pytest.fixture(scope="module")
def four_bands(trees):
    """The simulated SEN12MS tree again as plain pairs, with four S2 bands that a legend names, packed."""
    tree = folder() / "four"
    for sensor, bands in {"s1": [1, 2], "s2": [13, 8, 4, 1]}.items():
        for path in (trees / "sen12ms").rglob(f"*_{sensor}_*.tif"):
            scene, _, name = path.stem.replace(f"{sensor}_", "").rpartition("_")
            with rasterio.open(path) as tif:
                pixels, profile = tif.read(bands), tif.profile
            target = tree / sensor / scene / f"{name}.tif"
            target.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(target, "w", **{**profile, "count": len(bands)}) as tif:
                tif.write(pixels)
    classes = {"1": "dry", "2": "flooded"}
    (tree / "legend.json").write_text(json.dumps({"s2": ["swir", "nir", "red", "haze"], "classes": classes}))
    data.pack(tree, folder() / "four bands", s2_offset=0)
    return folder() / "four bands"


@pytest.mark.parametrize("method, options, bands", [
    ("mma", [], {"s1": ["VV", "VH"], "s2": ["swir", "nir", "red", "haze"]}),
    ("mma", ["--bands", "VH", "red", "nir"], {"s1": ["VH"], "s2": ["red", "nir"]}),
    ("simclr-rgb", ["--bands", "nir", "swir", "red"], {"s1": [], "s2": ["nir", "swir", "red"]})])
def test_bands_are_chosen_by_name_and_recorded(four_bands, tmp_path, method, options, bands):
    base = ["--data", four_bands, "--method", method, "--epochs", 1, "--batch-size", 24, "--crop", 24]
    run([*base, *options], tmp_path / "run")
    content = models.load_checkpoint(tmp_path / "run/last.pt")
    assert content["bands"] == bands and content["classes"] == ["dry", "flooded"]
    for sensor, weights in content["encoders"].items():
        assert next(iter(weights.values())).shape[1] == len(bands[sensor])


@pytest.fixture
def refusal(store, tmp_path, monkeypatch, capsys):
    """-> function: the line with which pretrain.py refuses these arguments."""
    def refusal(*arguments):
        common = ["--data", store, "--batch-size", 8, "--out", tmp_path / "x"]
        with pytest.raises(SystemExit, match="2"):
            data.run(lambda: call(monkeypatch, pretrain, *common, *arguments), models.CheckpointError)
        said = capsys.readouterr().err
        assert (said.count("\n") == 1 or said.startswith("usage:")) and not (tmp_path / "x").exists()
        return said.splitlines()[-1]
    return refusal


def test_simclr_asks_for_three_bands_where_colours_are_missing(four_bands, refusal):
    said = refusal("--data", four_bands, "--method", "simclr-rgb")
    assert re.search("no band (B4 B3 B2|B2 B3 B4), see --bands; .*haze", said)


@pytest.mark.parametrize("arguments, words", [
    (["--batch-size", 65], "only 48 pairs"), (["--crop", 41], "--crop 41"),
    (["--epochs", 0], "0 is not above 0"), (["--temperature", 0], "--temperature is above 0"),
    (["--data", "nowhere"], "SEN12MS"), (["--data", ROOT], "data.py pack"), (["--threads", 0], "0 is not above 0"),
    (["--batch-size", 1], "--batch-size 1: choose 2 or more, on CPUs for each process, as a loss"),
    (["--weight-decay", -1], "no number is negative"), (["--constant-epochs", -1], "negative"), (["--crop", 7], "--crop 8 or more"),
    (["--micro-batch", 7], "--micro-batch 7: leaves batch norm a single pair of 8: choose a divisor of 8"),
    (["--micro-batch", 1], "--micro-batch 1: leaves"),
    (["--crop", 16, "--precision", "bf16"], "--crop 16: on a CPU bf16 gradients of a ResNet are wrong up to 16 px"),
    (["--bands", "VV", "B13"], "no band B13"), (["--bands", "B2"], "d-simclr takes bands of both sensors"),
    (["--method", "simclr-rgb", "--bands", "B2"], "three of Sentinel-2")])
def test_bad_arguments_get_one_clear_line(refusal, arguments, words):
    assert words in refusal(*arguments)


@pytest.mark.parametrize("environment, arguments, words", [
    ({"WORLD_SIZE": "2"}, [], "WORLD_SIZE=2: start it with torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": "1"}, [], "WORLD_SIZE=2: start"),
    ({}, ["--batch-size", 7], "a multiple of the number of processes, 2"),
    ({}, ["--batch-size", 2], "2 or more, on CPUs for each process, as a loss and batch norm need other places"),
    ({}, ["--micro-batch", 3], "--micro-batch 3: leaves batch norm a single pair of 4")])
def test_several_processes_that_cannot_work_are_refused_before_they_meet(
        refusal, monkeypatch, environment, arguments, words):
    for name, value in (environment or rank_environments(2)[0]).items():
        monkeypatch.setenv(name, value)
    assert words in refusal(*arguments)


def test_a_run_of_a_recipe_that_is_gone_is_refused_one_of_the_posters_goes_on(store, tmp_path):
    argv = ["--data", store, "--epochs", 2, "--batch-size", 24, "--crop", 24]
    assert finish(start(argv, tmp_path / "run", trouble=partial(signal_after, 1)))[0] == 143
    path = tmp_path / "run/last.pt"
    for recipe, status, words in (("ours", 2, "made with other settings ({'recipe': 'ours'})"), ("poster", 0, "")):
        content = torch.load(path)
        content["args"]["recipe"] = recipe
        torch.save(content, path)
        code, said = finish(start(argv, tmp_path / "run"))
        assert code == status and words in said


# ---------------------------------------------------------------------------------------------- SimCLR's views

@pytest.mark.parametrize("kind, factors", [
    ("brightness", (0.2, 0.7, 1, 1.8)), ("contrast", (0.2, 0.7, 1, 1.8)), ("saturation", (0.2, 0.7, 1, 1.8)),
    ("hue", (-0.2, -0.05, 0, 0.2))])
def test_jitter_of_a_batch_is_torchvisions_of_each_image(kind, factors):
    images = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    images[:, :, 0], images[:, :, 1], images[:, 1, 2] = 0, images[:, :1, 1], images[:, 0, 2]  # black, grey, equals
    adjust = getattr(V, f"adjust_{kind}")
    expected = torch.stack([adjust(image, factor) for image, factor in zip(images, factors)])
    assert (pretrain.jitter(kind, images, torch.tensor(factors)[:, None, None, None]) - expected).abs().max() < 2e-6


def test_blur_of_a_batch_is_torchvisions_of_each_image():
    images, sigma = torch.rand(3, 3, 60, 60, generator=torch.Generator().manual_seed(0)), (0.1, 0.8, 2.0)
    expected = torch.stack([V.gaussian_blur(image, 7, x) for image, x in zip(images, sigma)])  # a tenth of the side
    assert (pretrain.blur(images, torch.tensor(sigma)[:, None, None, None]) - expected).abs().max() < 1e-6


def plain_draws(count):
    """Draws that leave the images as they are."""
    numbers = np.tile([1., 0, 0, 0, 1, 0, 1, 1, 1, 0, 1, 0.01], (2, count, 1))
    return numbers, np.tile(range(4), (2, 1))


def test_views_crop_and_flip_as_torchvision_does():
    images, (numbers, orders) = torch.rand(3, 3, 32, 32), plain_draws(3)
    boxes = [(0, 0, 32, 32), (4, 8, 16, 20), (12, 3, 20, 10)]  # top, left, height, width
    for view, mirror in enumerate((1, -1)):
        for k, (top, left, height, width) in enumerate(boxes):
            numbers[view, k, :6] = (mirror * width / 32, 0, (2 * left + width) / 32 - 1,
                                    0, height / 32, (2 * top + height) / 32 - 1)
    for view, flip in zip(pretrain.two_views(images, numbers, orders), (False, True)):
        for k, box in enumerate(boxes):
            expected = V.resized_crop(images[k], *box, [32, 32], antialias=True)
            expected = V.horizontal_flip(expected) if flip else expected
            edge = 0 if k == 0 else 2  # where we see half a pixel beyond the crop, torchvision repeats its last
            inside = slice(edge, 32 - edge), slice(edge, 32 - edge)
            assert (view[k] - expected)[(slice(None), *inside)].abs().max() < 1e-5


def test_each_sample_has_its_own_augmentations_and_each_view_its_order():
    images = torch.rand(4, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    (numbers, _), orders = plain_draws(4), np.array([[2, 0, 3, 1], [3, 1, 0, 2]])
    low, high = (0.2, 0.2, 0.2, -0.2), (1.8, 1.8, 1.8, 0.2)
    numbers[:, :3, 6:10] = np.random.default_rng(0).uniform(low, high, (2, 3, 4))  # the last is not jittered
    numbers[0, 2, 10], numbers[1, 1, 11] = 0, 1.5  # grey, blurred
    views = pretrain.two_views(images, numbers, orders)
    operations = V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue
    for view in range(2):
        for k, image in enumerate(images):
            for number in orders[view] if k < 3 else ():
                image = operations[number](image, numbers[view, k, 6 + number])
            image = V.rgb_to_grayscale(image, 3) if (view, k) == (0, 2) else image
            image = V.gaussian_blur(image, 3, 1.5) if (view, k) == (1, 1) else image
            assert (views[view][k] - image).abs().max() < 1e-5


def test_draws_have_the_published_strengths():
    numbers, _ = pretrain.draw_views(20_000, 0, 0)
    mirrored_width, _, x, _, height, y, *factors, colour, sigma = np.moveaxis(numbers, 2, 0)
    width, jittered, blurred = abs(mirrored_width), factors[0] != 1, sigma != 0.01
    assert (abs(x) <= 1 - width + 1e-12).all() and (abs(y) <= 1 - height + 1e-12).all()  # within the image
    assert all((factor[~jittered] == same).all() for factor, same in zip(factors, (1, 1, 1, 0)))
    jitters = zip((factor[jittered] for factor in factors), (0.2, 0.2, 0.2, -0.2), (1.8, 1.8, 1.8, 0.2))
    ranges = (width * height, 0.08, 1), (width / height, 3 / 4, 4 / 3), (sigma[blurred], 0.1, 2)
    for values, low, high in (*ranges, *jitters):
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.02 * (high - low) < values.max() <= high
    shares = (mirrored_width < 0).mean(), jittered.mean(), (colour == 0).mean(), blurred.mean()
    assert shares == pytest.approx((0.5, 0.8, 0.2, 0.5), abs=0.01) and ((colour == 0) | (colour == 1)).all()
    orders = np.concatenate([pretrain.draw_views(1, 0, step)[1] for step in range(300)])
    assert len(np.unique(orders, axis=0)) == 24 and (np.sort(orders) == range(4)).all()


def test_views_do_not_depend_on_the_processes_and_every_sample_has_its_own():
    args = SimpleNamespace(method="simclr-rgb", scale="patch-max", batch_size=8, seed=3)
    s1, s2 = torch.zeros(8, 0, 20, 20, dtype=torch.int16), torch.arange(1200).view(1, 3, 20, 20).repeat(8, 1, 1, 1)
    state = torch.get_rng_state()
    whole = pretrain.network_inputs(s1, s2, args, None, 7)
    for k in range(2):
        parts = [pretrain.network_inputs(s1[:4], s2[:4], args, None, 7, slice(first, first + 4))[k] for first in (0, 4)]
        assert torch.equal(whole[k], torch.cat(parts))
        assert whole[k].shape == (8, 3, 20, 20) and 0 <= whole[k].min() and whole[k].max() <= 1
    assert len({x.numpy().tobytes() for x in (*whole[0], *whole[1])}) == 16  # of the same image
    for seed, step in ((4, 7), (3, 8)):
        args.seed = seed
        assert not torch.equal(pretrain.network_inputs(s1, s2, args, None, step)[0], whole[0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", models.SCALING)
@pytest.mark.parametrize("method", SCALES)
def test_a_network_sees_in_training_what_it_sees_afterwards(method, scale, monkeypatch):
    monkeypatch.setattr(pretrain, "draw_views", lambda count, *more: plain_draws(count))
    rng = np.random.default_rng(0)
    s1 = torch.from_numpy(rng.integers(-3000, 0, (4, 2, 20, 20), np.int16))
    s2 = torch.from_numpy(rng.integers(1, 10_000, (4, 3, 20, 20), np.uint16))
    stats = {"s1": {"mean": [-12.] * 2, "std": [4.] * 2}, "s2": {"mean": [1000., 1200, 900], "std": [500., 700, 600]}}
    args = SimpleNamespace(method=method, scale=scale, batch_size=4, seed=0)
    expected = models.to_input(s1, s2, scale, stats)
    if method == "simclr-rgb":
        expected = expected[1], expected[1]
    for found, x in zip(pretrain.network_inputs(s1, s2, args, stats, 1), expected):
        assert torch.allclose(found, x, atol=1e-3 if scale == "standard" else 1e-5)


# ---------------------------------------------------------------------------------------------- survival

def test_the_same_command_gives_the_same_bits(reference):
    begun("again").result()  # whatever the number of threads
    assert_same_run(folder() / "again", reference)


def test_the_picture_of_a_run_shows_what_its_log_says(reference):
    lines = [json.loads(line) for line in (reference / "log.jsonl").read_text().splitlines()]
    left, right = show.draw_run(reference).axes
    assert left.lines[0].get_ydata().tolist() == [line["loss"] for line in lines if "loss" in line]
    found = [line["retrieval"] for line in lines if "retrieval" in line]
    for line in right.lines:
        assert line.get_ydata().tolist() == [retrieval[line.get_label()]["top1"] for retrieval in found]
    assert len(right.lines) == 2 and len(found) == 4


def test_a_finished_run_is_left_as_it_is(argv, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "done")
    assert f"{STEPS} of {STEPS} steps are done" in run(argv, tmp_path / "done")
    for name in ("last.pt", "log.jsonl"):
        assert (tmp_path / "done" / name).read_bytes() == (reference / name).read_bytes()


def test_killed_at_ten_random_moments_it_ends_in_the_same_bits(argv, reference, tmp_path):
    """Two runs beside each other, each killed five times, of these twice in the middle of a checkpoint."""
    dice, began = random.Random(0), time.monotonic()
    run(argv, tmp_path / "timed")
    duration = time.monotonic() - began
    plans = {tmp_path / name: ["time", "writing", "time", "writing", "time"] for name in ("one", "other")}
    running = {out: (start(argv, out), time.monotonic() + dice.uniform(0.2, 0.9) * duration) for out in plans}
    while any(plans.values()):
        time.sleep(0.0005)
        for out in [out for out, plan in plans.items() if plan]:
            process, until = running[out]
            due = time.monotonic() > until if plans[out][0] == "time" else (out / "last.tmp").exists()
            if process.is_alive() and due:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                if process.exitcode:  # it was not faster
                    plans[out].pop(0)
            if not process.is_alive():
                if process.exitcode == 0:  # done before the next kill: from the beginning
                    assert_same_run(out, reference)
                    shutil.rmtree(out)
                running[out] = start(argv, out), time.monotonic() + dice.uniform(0.2, 0.9) * duration
    for out, (process, _) in running.items():
        assert finish(process)[0] == 0
        assert_same_run(out, reference)


def signal_after(last, number=signal.SIGTERM, original=pretrain.learning_rate):
    def learning_rate(step, *more):
        if step + 1 == last:
            os.killpg(0, number)  # as a scheduler does
        return original(step, *more)
    pretrain.learning_rate = learning_rate


@pytest.mark.parametrize("number, status, step", [
    (signal.SIGTERM, 143, 15), (signal.SIGINT, 130, 15), (signal.SIGKILL, -signal.SIGKILL, 12)])
def test_a_signal_saves_after_the_step_in_hand_and_a_kill_costs_those_since_the_checkpoint(
        argv, reference, killed, number, status, step):
    code, text = finish(start(argv, killed, trouble=partial(signal_after, 15, number)))  # between logged steps
    assert code == status and step_of(killed / "last.pt") == step and "Traceback" not in text
    found = torch.load(killed / "last.pt", weights_only=True)["retrieval"]  # of the last look-up, before it was started
    assert found == torch.load(stopped_after_epoch_2() / "last.pt", weights_only=True)["retrieval"] is not None
    assert (f"killed/last.pt: 15 of {STEPS} steps are done" in text) == (step == 15)
    assert '"step": 14' in (killed / "log.jsonl").read_text()
    assert_goes_on(argv, killed, reference)


@pytest.mark.parametrize("method", ["d-simclr", "simclr-rgb"])
def test_heads_and_views_go_on_too(method, store, tmp_path):
    argv = [*RUNS[method], "--data", store]
    assert finish(start(argv, tmp_path / "run", trouble=partial(signal_after, 4)))[0] == 143
    begun(method).result()
    assert_goes_on(argv, tmp_path / "run", folder() / method)


def record_saves(path, original=pretrain.learning_rate, save=models.save_checkpoint, loader=data.loader):
    """The steps of all checkpoints into a file; after that of the first epoch the minute between them counts. Into
    another the rows that are trained on, and those that are looked up, of which three are allowed."""
    pretrain.LOOKED_UP = 3

    def noted(patches, batches, *more):
        batches, looks_up = list(batches), isinstance(batches, list)
        with path.with_suffix(".rows").open("a") as file:
            print(json.dumps([looks_up, [int(row) for rows, *_ in batches for row in rows]]), file=file)
        return loader(patches, batches, *more)

    def learning_rate(step, *more):
        pretrain.SAVE_EVERY = 60 if step >= 6 else 0
        return original(step, *more)

    def save_checkpoint(*arguments, **content):
        with path.open("a") as file:
            print(content["step"], file=file)
        save(*arguments, **content)
    pretrain.learning_rate, models.save_checkpoint, data.loader = learning_rate, save_checkpoint, noted


def test_checkpoints_are_written_at_the_ends_of_epochs_a_minute_apart(argv, reference, tmp_path):
    run(argv, tmp_path / "run", trouble=partial(record_saves, tmp_path / "saves"))
    assert (tmp_path / "saves").read_text().split() == ["6", "18"]  # of a first epoch, and at the end
    one, other = contents(tmp_path / "run")[0], contents(reference)[0]
    assert_equal({**one, "retrieval": None}, {**other, "retrieval": None})
    train, held = data.split_scenes(data.Patches(argv[-1]), 0.25)
    seen = [json.loads(line) for line in (tmp_path / "saves.rows").read_text().splitlines()]
    (trained_on,), looked_up = ([rows for looks, rows in seen if looks == kind] for kind in (False, True))
    assert len(trained_on) == 8 * STEPS and set(trained_on) == set(train)
    assert looked_up == [held[::6].tolist()] * 4  # of 16 places


def test_lines_of_a_log_that_a_power_cut_spoilt_are_dropped(argv, reference, killed):
    log = killed / "log.jsonl"
    first, *others = log.read_bytes().splitlines(True)
    spoilt = [first, b"\0" * 40 + b"\n", *others[:3], b"\0\0" + others[3], b"\xff\xfe\n", *others[3:], b"\0" * 99]
    log.write_bytes(b"".join(spoilt))
    assert show.draw_run(killed).axes
    assert_goes_on(argv, killed, reference)


def test_a_run_that_another_writes_is_refused(argv, reference, killed):
    log, before = pretrain.open_log(killed / "log.jsonl", step=12), sorted(killed.iterdir())
    code, text = finish(start(argv, killed))
    assert code == 2 and text.count("\n") == 1 and "killed: another run writes there: wait for it, or choose" in text
    assert sorted(killed.iterdir()) == before and step_of(killed / "last.pt") == 12
    log.close()
    assert_goes_on(argv, killed, reference)


def test_a_truncated_checkpoint_is_named_and_without_it_the_run_begins_anew(argv, reference, killed):
    os.truncate(killed / "last.pt", 1_000_000)
    code, text = finish(start(argv, killed))
    assert code == 2 and re.search(r"killed/last.pt: truncated or not .*: remove it", text) and text.count("\n") == 1
    (killed / "last.pt").unlink()
    assert_goes_on(argv, killed, reference)


def small_files_only():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))


def nan_at(step, original=pretrain.learning_rate):
    """The update of this step spoils the weights; the loss shows it one step later."""
    pretrain.learning_rate = lambda done, *more: float("nan") if done + 1 == step else original(done, *more)


def raise_in_a_step(error):
    def forward_backward(*arguments):
        raise error
    pretrain.forward_backward = forward_backward


@pytest.mark.parametrize("options, trouble, words", [
    pytest.param(["--lr", 1e-3, "--crop", 32, "--log-every", 5], None,
                 "killed/last.pt: made with other settings ({'crop': 16, 'lr': 0.0001}): use them",
                 id="other settings"),
    pytest.param([], small_files_only,
                 "killed/last.pt: cannot be written (File too large); the one before it is kept. Free", id="full disk"),
    pytest.param(["--log-every", 6], partial(nan_at, 14),
                 "loss nan at step 18, norm of the weights nan: try a lower --lr or --precision float32", id="NaN"),
    pytest.param(["--log-every", 6], partial(nan_at, STEPS),
                 "at step 18, norm of the weights nan: try a lower --lr or --precision float32", id="NaN at the end"),
    pytest.param([], partial(raise_in_a_step, torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nAnd more")),
                 "choose a --micro-batch", id="out of memory")])
def test_a_run_that_fails_says_why_in_its_last_line_and_goes_on_when_started_again(
        argv, reference, killed, options, trouble, words):
    before = (killed / "last.pt").read_bytes()
    code, text = finish(start([*argv, *options], killed, trouble=trouble))
    assert code == 2 and words in text.splitlines()[-1] and "Traceback" not in text
    assert (killed / "last.pt").read_bytes() == before
    assert {path.name for path in killed.iterdir()} == {"last.pt", "log.jsonl"}
    assert_goes_on(argv, killed, reference)


def test_a_bug_keeps_its_traceback(argv, tmp_path):
    trouble = partial(raise_in_a_step, RuntimeError("sizes do not match"))
    code, text = finish(start(argv, tmp_path / "bug", trouble=trouble))
    assert code == 1 and "Traceback" in text and "\nRuntimeError: sizes do not match\n" in text


# ---------------------------------------------------------------------------------------------- several processes

def free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return str(door.getsockname()[1])


def rank_environments(world):
    port = free_port()
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in range(world)]


def start_two(argv, out, trouble=None):
    """Two processes of one run, of which the second has the trouble."""
    one, other = rank_environments(2)
    return [start(argv, out, out.with_suffix(".0.txt"), environment=one),
            start(argv, out, out.with_suffix(".1.txt"), environment=other, trouble=trouble)]


def make(method):
    """-> model without coupling between samples, and a global batch of twelve."""
    torch.manual_seed(0)
    model = models.Contrastive(method, {"s1": ["VV", "VH"], "s2": models.RGB}).eval()
    model.to(memory_format=torch.channels_last)  # as in training
    with torch.no_grad():  # untrained features hardly differ from place to place, and their gradients cancel
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(2.5 if method == "mma" else 1)
                module.bias.normal_(0, 0.2)
    return model, torch.randn(12, 3 if method == "simclr-rgb" else 2, 16, 16), torch.randn(12, 3, 16, 16)


def gradients(method, rank=0, world=1, micro=None, steps=0):
    """-> loss over all processes, embeddings, gradients, hash of the weights after so many steps of Adam."""
    model, a, b = make(method)
    network = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    mine = [x.chunk(world)[rank] for x in (a, b)]

    def backward():
        return pretrain.forward_backward(
            network, models.autocast("float32", torch.device("cpu")), partial(model.loss, temperature=0.1),
            *mine, micro or len(mine[0]), rank, world)

    loss, z1, _ = backward()
    if world > 1:
        dist.all_reduce(loss)
    found = loss / world, z1, [weight.grad.clone() for weight in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        backward()
        optimizer.step()
    weights = b"".join(weight.detach().numpy().tobytes() for weight in model.parameters())
    return *found, hashlib.sha256(weights).hexdigest()


def plain_gradients(method):
    """The same without any of pretrain.py."""
    model, a, b = make(method)
    embeddings = model(a, b)
    loss = model.loss(*embeddings, 0.1)
    loss.backward()
    return loss.detach(), embeddings[0].detach(), [weight.grad for weight in model.parameters()]


@pytest.mark.parametrize("device, micro, world, processes", [
    ("cpu", None, 1, None), ("cpu", None, 2, 2), ("cuda", None, 8, None), ("cuda", 5, 8, 8), ("cuda", 5, 1, None)])
def test_a_run_goes_on_with_as_many_processes_where_each_has_its_own_batch_norm(device, micro, world, processes):
    args = SimpleNamespace(method="mma", arch="resnet18", scale="fixed", precision="bf16", device=device, micro_batch=micro, data="s")
    patches = SimpleNamespace(bands={"s1": ["VV"], "s2": ["B2"]}, classes=[], simulated=True, identity="1", stats=lambda rows: None)
    assert pretrain.facts_of(args, patches, [1], world)["args"]["processes"] == processes


def test_a_drive_that_locks_nothing_is_one_line(monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    with open(os.devnull) as file, pytest.raises(data.DataError, match="runs/x: cannot be locked .No locks available.: mount it with flock"):
        data.lock(file, "runs/x")


def gradients_in_a_process(environment, cases, path):
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    args = SimpleNamespace(method="d-simclr", arch="resnet18", seed=rank, lr=1, weight_decay=0)
    model, network, _ = pretrain.make_model(args, {"s1": ["VV"], "s2": models.RGB}, torch.device("cpu"), world)
    assert network.module is model and not network.will_sync_module_buffers()  # not in every forward
    first = model.encoders["s1"].conv1.weight
    assert torch.equal(*pretrain.gather(first.detach()[None], world)[[0, -1]])  # all begin with one's weights
    for k, (method, *more) in enumerate(cases):
        loss, z1, grad, weights = gradients(method, rank, world, *more)
        everyone = [None] * world
        dist.all_gather_object(everyone, (loss.item(), weights))
        assert set(everyone) == {(loss.item(), weights)}  # on all ranks, after 3 steps in training mode
        if rank == 0:
            torch.save((loss, z1, grad), f"{path}.{k}")
    dist.destroy_process_group()


def assert_close(found, expected):
    for one, other in ((found[0], expected[0]), (found[1], expected[1]), *zip(found[2], expected[2])):
        assert (one - other).abs().max() <= 1e-5 * max(1, other.abs().max())
    norm = torch.stack([other.norm() for other in expected[2]]).norm()
    assert torch.stack([(one - other).norm() for one, other in zip(found[2], expected[2])]).norm() < 1e-5 * norm


@pytest.mark.parametrize("world, cases", [
    (2, [("mma", None, 3), ("d-simclr", None), ("simclr-rgb", 3)]), (3, [("mma", 2, 3)])])
def test_several_processes_compute_what_one_does(tmp_path, world, cases):
    processes = [CONTEXT.Process(target=gradients_in_a_process, args=(environment, cases, tmp_path / "found"))
                 for environment in rank_environments(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for k, (method, *_) in enumerate(cases):
        assert_close(torch.load(f"{tmp_path}/found.{k}", weights_only=True), plain_gradients(method))


@pytest.mark.parametrize("method, micro", [("d-simclr", 5), ("d-simclr", None), ("mma", 1), ("simclr-rgb", 4)])
def test_micro_batches_give_the_gradient_of_the_whole_batch(method, micro):
    assert_close(gradients(method, micro=micro), plain_gradients(method))


def test_two_processes_stop_together_or_die_and_end_in_the_same_bits(argv, tmp_path):
    argv, out = [*argv, "--micro-batch", 2], tmp_path / "two"
    for process in start_two(argv, out, partial(signal_after, 15)):  # only rank 1 gets a signal
        assert finish(process)[0] == 143
    assert step_of(out / "last.pt") == 16  # they agree on it every eight steps and where they log
    texts = [finish(process) for process in start_two(argv, out)]
    assert [code for code, _ in texts] == [0, 0] and texts[1][1] == ""
    _, log = contents(out)
    assert [line["step"] for line in log if "loss" in line] == list(range(2, 19, 2))
    assert [line["epoch"] for line in log if "retrieval" in line] == [0, 1, 2, 3]
    assert_same_run(begun("torchrun").result(), out)
    run([*argv, "--epochs", 1], tmp_path / "one")  # the same pairs; batch norm sees two of them at a time, too
    alone = next(line for line in contents(tmp_path / "one")[1] if "loss" in line)
    assert alone["step"] == 2 and alone["loss"] == pytest.approx(next(line["loss"] for line in log if "loss" in line), rel=1e-3)


def test_the_others_do_not_wait_for_a_rank_that_is_refused(argv, tmp_path):
    out = tmp_path / "two"
    out.mkdir()
    log = pretrain.open_log(out / "log.jsonl", 0)
    first, second = [finish(process, 60) for process in start_two(argv, out)]
    log.close()
    assert first[0] == 2 and "another run writes there" in first[1] and second[0] not in (0, None)


RANK_1_DIES_ONCE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import data, models, pretrain
original = pretrain.learning_rate
def learning_rate(step, *more):
    if step + 1 == 9 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(step, *more)
pretrain.learning_rate, pretrain.SAVE_EVERY = learning_rate, 0
data.run(pretrain.main, models.CheckpointError, OSError)
"""


def torchrun():
    """-> folder of a job of torchrun of which a rank dies once."""
    out, argv = folder() / "torchrun", [*MMA, "--data", make_store(), "--micro-batch", 2]
    out.mkdir()
    (out / "dies.py").write_text(RANK_1_DIES_ONCE.format(root=str(ROOT)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", "1", out / "dies.py", *argv, "--out", out / "restarted"]
    job = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert job.returncode == 0, job.stderr
    return out / "restarted"


def test_a_rank_that_dies_ends_the_job_which_until_then_holds_its_folder(argv, tmp_path):
    out = tmp_path / "dead"
    one, other = start_two([*argv, "--epochs", 1000], out)
    while not (out / "log.jsonl").exists() or '"step": 2' not in (out / "log.jsonl").read_text():
        time.sleep(0.01)
        assert one.is_alive() and other.is_alive()
    with pytest.raises(data.DataError, match="dead: another run writes there: wait for it"):
        pretrain.open_log(out / "log.jsonl", 0)
    os.kill(other.pid, signal.SIGKILL)
    assert finish(one, 30)[0] not in (0, None)
