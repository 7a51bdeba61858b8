"""Pretraining as a user runs it: every method, equal bits, killed, stopped, broken files, several processes."""
import functools
import hashlib
import json
import math
import multiprocessing
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

import numpy as np
import pytest
import rasterio
import torch
import torch.distributed as dist
from conftest import BACKGROUND, CONTEXT, ROOT, folder, simulated
from torch import nn

import data
import models
import pretrain

MMA = ["--method", "mma", "--epochs", 3, "--batch-size", 8, "--crop", 16, "--holdout", 0.25, "--eval-every", 1,
       "--log-every", 2, "--lr", 1e-4, "--constant-epochs", 1, "--temperature", 0.2]  # 6 steps an epoch
STEPS = 18


@functools.cache
def make_store():
    """The simulated SEN12MS tree, packed: 64 pairs of 40 px in 4 scenes."""
    data.pack(simulated() / "sen12ms", folder() / "store", workers=0)
    return folder() / "store"


@pytest.fixture
def store():
    return make_store()


RUNS = {"reference": MMA, "again": [*MMA, "--workers", 0]} | {  # by tests that only look at what they leave
    method: ["--method", method, "--epochs", 2, "--batch-size", 16, "--crop", 33, "--holdout", 0.25, "--eval-every", 1,
             "--log-every", 2, "--scale", scale, "--workers", 0]
    for method, scale in (("d-simclr", "patch-max"), ("mma", "fixed"), ("simclr-rgb", "standard"))}


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
    multiprocessing.set_start_method("fork", force=True)  # for its readers, as in a process that a user starts
    os.setsid()  # a group, as a scheduler's job is
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["pretrain.py", *map(str, argv)]
    sys.stdout = sys.stderr = open(says, "w", buffering=1)  # noqa: SIM115  (to the end of the process)
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
    """Everything that must be equal, bit for bit: (checkpoint, log without its times)."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    content = torch.load(out / "last.pt", weights_only=True)
    return content, [{k: v for k, v in line.items() if k not in ("pairs_per_s", "waited_s")} for line in log]


def assert_equal(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for k, (x, y) in enumerate(zip(one, other)):
            assert_equal(x, y, f"{where}/{k}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, where


def assert_same_run(out, reference):
    for one, other in zip(contents(out), contents(reference)):
        assert_equal(one, other)


@pytest.fixture
def reference():
    """A run that was never stopped."""
    begun("reference").result()
    return folder() / "reference"


def step_of(path):
    return torch.load(path, weights_only=True)["step"]


def copy_of_epoch_2(reference, out):
    """The folder as it was after two of the three epochs."""
    out.mkdir()
    shutil.copy(reference / "previous.pt", out / "last.pt")
    shutil.copy(reference / "log.jsonl", out / "log.jsonl")
    return out


# ---------------------------------------------------------------------------------------------- what a run leaves

@pytest.mark.parametrize("method, scale", [("d-simclr", "patch-max"), ("mma", "fixed"), ("simclr-rgb", "standard")])
def test_every_method_runs_and_logs(method, scale):
    begun(method).result()
    out = folder() / method
    content, log = contents(out)
    assert (content["method"], content["scale"], content["epoch"], content["step"]) == (method, scale, 2, 6)
    assert content["simulated"]
    assert content["bands"]["s2"] == (models.RGB if method == "simclr-rgb" else models.S2_BANDS)
    held, steps = ([line for line in log if key in line] for key in ("retrieval", "loss"))
    assert [line["epoch"] for line in held] == [0, 1, 2] and [line["step"] for line in steps] == [2, 3, 4, 6]
    assert steps[0].keys() == {"epoch", "step", "loss", "accuracy", "lr"} and all(line["lr"] == 3e-5 for line in steps)
    assert {"pairs_per_s", "waited_s"} < json.loads((out / "log.jsonl").read_text().splitlines()[1]).keys()
    for line in held:
        assert line["retrieval"]["candidates"] == 16 and len(line["retrieval"]) == 3
    assert held[-1]["retrieval"] == content["retrieval"] and (out / "curve.png").stat().st_size > 10_000
    encoders, scaling = models.load_encoders(out / "last.pt")
    assert list(encoders) == list(models.METHODS[method]["inputs"]) and scaling["scale"] == scale


def test_training_lowers_the_loss_and_follows_the_schedule(reference):
    _, log = contents(reference)
    steps = [line for line in log if "loss" in line]
    assert np.mean([line["loss"] for line in steps[-3:]]) < np.mean([line["loss"] for line in steps[:3]])
    for line in steps:  # constant for an epoch of 6 steps, then a cosine over 12; a line has the rate of its own step
        assert line["lr"] == pytest.approx(1e-4 * (1 + math.cos(math.pi * max(0, line["step"] - 7) / 12)) / 2)


def test_held_out_scenes_are_whole_and_not_trained_on(store):
    patches = data.open_data(store)
    rows, held = data.split_scenes(patches, 0.3)
    assert sorted([*rows, *held]) == list(range(64)) and len(held) == 32
    assert not {patches.scenes[row] for row in rows} & {patches.scenes[row] for row in held}
    assert not len(data.split_scenes(patches, 0)[1])
    patches.splits = np.array(["test"] * 16 + ["spring"] * 48)
    assert min(np.concatenate(data.split_scenes(patches, 0.3))) == 16


def test_bands_are_chosen_by_name_and_recorded(trees, tmp_path):
    tree = tmp_path / "l2a"  # Sentinel-2 L2A: no B10
    shutil.copytree(trees / "sen12ms", tree)
    for path in tree.rglob("*_s2_*.tif"):
        with rasterio.open(path) as tif:
            s2, profile = tif.read(), tif.profile
        with rasterio.open(path, "w", **{**profile, "count": 12}) as tif:
            tif.write(np.delete(s2, 10, 0))
    base = ["--data", tree, "--method", "mma", "--epochs", 1, "--batch-size", 24, "--crop", 16, "--workers", 0]
    run(base, tmp_path / "all")
    l2a = [band for band in models.S2_BANDS if band != "B10"]
    assert models.load_checkpoint(tmp_path / "all/last.pt")["bands"] == {"s1": ["VV", "VH"], "s2": l2a}
    run([*base, "--bands", "VH", "B8", "B4"], tmp_path / "few")
    content = models.load_checkpoint(tmp_path / "few/last.pt")
    assert content["bands"] == {"s1": ["VH"], "s2": ["B8", "B4"]}
    assert content["encoders"]["s2"]["convs1.layers.0.weight"].shape[1] == 2
    for bands, words in ((["VV", "B10"], "no band B10; it has VV VH B1"), (["B2"], "mma needs bands of both sensors")):
        code, text = finish(start([*base, "--bands", *bands], tmp_path / "none"))
        assert code == 2 and words in text.splitlines()[-1] and "Traceback" not in text


@pytest.mark.parametrize("arguments, words", [
    (["--batch-size", 65], "choose a smaller batch"), (["--crop", 41], "--crop 41"),
    (["--epochs", 0], "0 is not above 0"), (["--temperature", 0], "--temperature is above 0"), (["--data", "nowhere"], "SEN12MS: mediaTUM"),
    (["--method", "simclr-rgb", "--bands", "B2"], "three of Sentinel-2")])
def test_bad_arguments_get_one_clear_line(store, tmp_path, monkeypatch, capsys, arguments, words):
    common = ["--data", store, "--batch-size", 8, "--out", tmp_path / "x"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, [*common, *arguments])])
    with pytest.raises(SystemExit, match="2"):
        data.run(pretrain.main, models.CheckpointError)
    assert words in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------------------------- SimCLR's views

def views_of(store, steps=(0, 7), rank=0, world=1, seed=3):
    patches = data.open_data(store, models.RGB)
    views = pretrain.TwoViews(patches, range(64), 33, 8, seed, drop_last=True, rank=rank, world=world)
    views.scale = "fixed"
    return [views[step] for step in steps]


def test_views_are_drawn_per_sample_and_do_not_depend_on_the_processes(store):
    state = torch.get_rng_state()
    whole = views_of(store)
    assert torch.equal(torch.get_rng_state(), state)  # a reader leaves the generator of its process alone
    parts = [views_of(store, rank=rank, world=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        for k, tensor in enumerate(batch):
            assert torch.equal(tensor, torch.cat([part[step][k] for part in parts]))
    a, b, _ = whole[0]
    assert a.shape == (8, 3, 33, 33) and a.dtype == torch.float32 and 0 <= a.min() and a.max() <= 1
    assert not any(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a, views_of(store, seed=4)[0][0])
    patches = data.open_data(store, models.RGB)  # eight times the same crop: eight different draws
    views = pretrain.TwoViews(patches, [5] * 8, 40, 8, 3, drop_last=True)
    views.scale = "patch-max"
    a, b, _ = views[0]
    assert len({tuple(x.flatten()[:50].tolist()) for x in (*a, *b)}) == 16


# ---------------------------------------------------------------------------------------------- survival

def test_the_same_command_gives_the_same_bits(reference):
    begun("again").result()  # whatever the number of workers
    assert_same_run(folder() / "again", reference)


def test_a_finished_run_is_left_as_it_is(store, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "done")
    (tmp_path / "done/curve.png").unlink()
    assert "all 3 epochs are done" in run([*MMA, "--data", store], tmp_path / "done")
    for name in ("last.pt", "previous.pt", "log.jsonl"):
        assert (tmp_path / "done" / name).read_bytes() == (reference / name).read_bytes()
    assert (tmp_path / "done/curve.png").exists()


def test_killed_at_ten_random_moments_it_ends_in_the_same_bits(store, reference, tmp_path):
    """Two runs beside each other, each killed five times, of these twice in the middle of a checkpoint."""
    argv, dice = [*MMA, "--data", store], random.Random(0)
    began = time.monotonic()
    run(argv, tmp_path / "timed")
    duration = time.monotonic() - began
    plans = {tmp_path / name: ["time", "writing", "time", "writing", "time"] for name in ("one", "other")}
    running = {out: (start(argv, out), time.monotonic() + dice.uniform(0.2, 0.9) * duration) for out in plans}
    while any(plans.values()):
        time.sleep(0.0005)
        for out in [out for out, plan in plans.items() if plan]:
            process, until = running[out]
            if process.is_alive() and (time.monotonic() > until if plans[out][0] == "time" else (out / "last.tmp").exists()):
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_saves_after_the_step_in_hand(store, reference, tmp_path, number):
    out, argv = tmp_path / "stopped", [*MMA, "--data", store, "--workers", 1]
    process = start(argv, out)
    while not (out / "log.jsonl").exists() or '"step": 2' not in (out / "log.jsonl").read_text():
        time.sleep(0.002)
        assert process.is_alive()
    os.killpg(process.pid, number)
    code, text = finish(process)
    stopped = step_of(out / "last.pt")
    assert code == 128 + number and f"stopped at step {stopped} of {STEPS}; the same command goes on" in text
    assert "Traceback" not in text and 2 <= stopped < STEPS
    run(argv, out)
    assert_same_run(out, reference)


def test_a_stop_between_logged_steps_leaves_no_trace(store, reference, tmp_path):
    out, argv = copy_of_epoch_2(reference, tmp_path / "stopped"), [*MMA, "--data", store, "--workers", 0]
    code, _ = finish(start(argv, out, trouble=signal_after_step_15))
    assert code == 143 and step_of(out / "last.pt") == 15
    run(argv, out)
    assert_same_run(out, reference)


def signal_after_step_15(original=pretrain.learning_rate):
    def learning_rate(step, *more):
        if step + 1 == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(step, *more)
    pretrain.learning_rate = learning_rate


def test_a_truncated_checkpoint_is_named_and_the_previous_one_used(store, reference, tmp_path):
    out, argv = tmp_path / "cut", [*MMA, "--data", store]
    shutil.copytree(reference, out)
    os.truncate(out / "last.pt", 1_000_000)
    previous = (out / "previous.pt").read_bytes()
    text = run(argv, out)
    assert re.search(r"cut/last.pt: truncated or not .*: kept as last.bad, going on from previous.pt\n", text)
    assert_same_run(out, reference)
    assert (out / "previous.pt").read_bytes() == previous and (out / "last.bad").stat().st_size == 1_000_000
    for name in ("last.pt", "previous.pt"):
        os.truncate(out / name, 0)
    code, text = finish(start(argv, out))
    assert code == 2 and text.splitlines()[-1].endswith("begin anew") and "Traceback" not in text


def test_without_last_pt_the_previous_one_is_used(store, reference, tmp_path):
    out = tmp_path / "between"  # what a kill between the two renames leaves
    shutil.copytree(reference, out)
    (out / "last.pt").unlink()
    run([*MMA, "--data", store], out)
    assert_same_run(out, reference)


def test_changed_settings_are_named(store, reference, tmp_path):
    out = copy_of_epoch_2(reference, tmp_path / "changed")
    before = (out / "last.pt").read_bytes()
    code, text = finish(start([*MMA, "--data", store, "--lr", 1e-3, "--crop", 32, "--log-every", 5], out))
    assert code == 2 and "(--crop 16 there, 32 here; --lr 0.0001 there, 0.001 here)" in text and text.count("\n") == 1
    assert (out / "last.pt").read_bytes() == before


def test_weights_alone_are_nothing_to_go_on_from(store, reference, tmp_path):
    out = copy_of_epoch_2(reference, tmp_path / "weights")
    content = torch.load(out / "last.pt", weights_only=True)
    torch.save({f"{sensor}_model_weights": content["encoders"][sensor] for sensor in ("s1", "s2")}, out / "last.pt")
    code, text = finish(start([*MMA, "--data", store], out))
    assert code == 2 and "weights only" in text and text.count("\n") == 1
    shutil.copy(reference / "previous.pt", out / "previous.pt")  # where there is a whole one, from there
    assert "last.pt: weights only, nothing to go on from: kept as last.bad, going on" in run([*MMA, "--data", store], out)
    assert_same_run(out, reference)


def small_files_only():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))


def test_a_full_disk_keeps_the_old_checkpoint(store, reference, tmp_path):
    out, argv = copy_of_epoch_2(reference, tmp_path / "full"), [*MMA, "--data", store]
    before = (out / "last.pt").read_bytes()
    code, text = finish(start(argv, out, trouble=small_files_only))
    assert code == 2 and re.search(r"full/last.pt: cannot be written \(.*\); the one before it is kept. Free", text)
    assert (out / "last.pt").read_bytes() == before and not (out / "last.tmp").exists() and "Traceback" not in text
    run(argv, out)
    assert_same_run(out, reference)


def nan_at(step, original=pretrain.learning_rate):
    """The update of this step spoils the weights; the loss shows it one step later."""
    pretrain.learning_rate = lambda done, *more: float("nan") if done + 1 == step else original(done, *more)


def nan_within_an_epoch():
    nan_at(14)


def nan_at_the_end_of_an_epoch():
    nan_at(STEPS)


@pytest.mark.parametrize("trouble, words", [(nan_within_an_epoch, "loss nan at step 15"),
                                            (nan_at_the_end_of_an_epoch, "weights not finite at step 18")])
def test_nothing_is_saved_once_the_loss_is_not_finite(store, reference, tmp_path, trouble, words):
    out = copy_of_epoch_2(reference, tmp_path / "nan")
    before = (out / "last.pt").read_bytes()
    code, text = finish(start([*MMA, "--data", store, "--log-every", 6, "--workers", 0], out, trouble=trouble))
    assert code == 2 and words in text and "Traceback" not in text
    patches = data.open_data(store)
    batches = data.RandomCrops(patches, data.split_scenes(patches, 0.25)[0], 16, 8, 0, drop_last=True)
    rows = batches[int(words.split()[-1]) - 1][-1]
    assert text.rstrip().endswith("The batch: " + " ".join(patches.ids[row] for row in rows))
    assert (out / "last.pt").read_bytes() == before and list(out.glob("previous*")) == []


# ---------------------------------------------------------------------------------------------- several processes

def free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return str(door.getsockname()[1])


def rank_environments(world):
    port = free_port()
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in range(world)]


def make(method):
    """-> model without coupling between samples, and a global batch of twelve."""
    torch.manual_seed(0)
    model = models.Contrastive(method, {"s1": ["VV", "VH"], "s2": models.RGB}).eval()
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
        return pretrain.forward_backward(network, lambda *part: part, models.autocast("float32", torch.device("cpu")),
                                         lambda a, b, **share: model.loss(a, b, 0.1, **share),
                                         list(zip(*(x.split(micro or len(x)) for x in mine))), rank, world)

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


def gradients_in_a_process(environment, cases, path):
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for k, (method, *more) in enumerate(cases):
        loss, z1, grad, weights = gradients(method, rank, world, *more)
        everyone = [None] * world
        dist.all_gather_object(everyone, (loss.item(), weights))
        assert set(everyone) == {(loss.item(), weights)}  # on all ranks, after 10 steps in training mode
        if rank == 0:
            torch.save((loss, z1, grad), f"{path}.{k}")
    dist.destroy_process_group()


def assert_close(found, expected):
    for one, other in ((found[0], expected[0]), (found[1], expected[1]), *zip(found[2], expected[2])):
        assert (one - other).abs().max() <= 1e-5 * max(1, other.abs().max())
    norm = torch.stack([other.norm() for other in expected[2]]).norm()
    assert torch.stack([(one - other).norm() for one, other in zip(found[2], expected[2])]).norm() < 1e-5 * norm


@pytest.mark.parametrize("world, cases", [
    (2, [("mma", None, 10), ("d-simclr", None), ("simclr-rgb", 3)]), (3, [("mma", 2, 10), ("d-simclr", None)])])
def test_several_processes_compute_what_one_does(tmp_path, world, cases):
    processes = [CONTEXT.Process(target=gradients_in_a_process, args=(environment, cases, tmp_path / "found"))
                 for environment in rank_environments(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for k, (method, *_) in enumerate(cases):
        assert_close(torch.load(f"{tmp_path}/found.{k}", weights_only=True), gradients(method))


@pytest.mark.parametrize("method, micro", [("d-simclr", 5), ("mma", 1), ("simclr-rgb", 4)])
def test_micro_batches_give_the_gradient_of_the_whole_batch(method, micro):
    assert_close(gradients(method, micro=micro), gradients(method))


def test_two_processes_train_and_stop_together(store, tmp_path):
    argv, out = [*MMA, "--data", store, "--workers", 0, "--micro-batch", 2], tmp_path / "two"
    processes = [start(argv, out, tmp_path / f"stop{rank}.txt", environment=environment,
                       trouble=signal_after_step_15 if rank else None)
                 for rank, environment in enumerate(rank_environments(2))]  # only rank 1 gets a signal
    for process in processes:
        assert finish(process)[0] == 143
    assert step_of(out / "last.pt") == 15
    processes = [start(argv, out, tmp_path / f"go{rank}.txt", environment=environment)
                 for rank, environment in enumerate(rank_environments(2))]
    texts = [finish(process) for process in processes]
    assert [code for code, _ in texts] == [0, 0] and texts[1][1] == ""
    _, log = contents(out)
    assert [line["step"] for line in log if "loss" in line] == list(range(2, 19, 2))
    assert [line["epoch"] for line in log if "retrieval" in line] == [0, 1, 2, 3]


RANK_1_DIES_ONCE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import data, models, pretrain
original = pretrain.learning_rate
def learning_rate(step, *more):
    if step + 1 == 9 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return original(step, *more)
pretrain.learning_rate = learning_rate
data.run(pretrain.main, models.CheckpointError, OSError)
"""


def torchrun():
    """-> folders of a job of torchrun of which a rank dies, and of one that is left alone."""
    out, argv = folder() / "torchrun", [*MMA, "--data", make_store(), "--workers", 0]
    out.mkdir()
    (out / "dies.py").write_text(RANK_1_DIES_ONCE.format(root=str(ROOT)))
    job = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                          "--max-restarts", "1", str(out / "dies.py"), *map(str, argv), "--out", str(out / "restarted")],
                         capture_output=True, text=True, timeout=300, check=False,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert job.returncode == 0, job.stderr
    processes = [start(argv, out / "whole", out / f"{rank}.txt", environment=environment)
                 for rank, environment in enumerate(rank_environments(2))]
    for process in processes:
        assert finish(process)[0] == 0
    return out / "restarted", out / "whole"


def test_torchrun_starts_again_after_a_rank_died():
    assert_same_run(*begun("torchrun").result())


def test_a_rank_that_dies_ends_the_job(store, tmp_path):
    argv, out = [*MMA, "--data", store, "--workers", 0, "--epochs", 1000], tmp_path / "dead"
    one, other = [start(argv, out, tmp_path / f"{rank}.txt", environment=environment)
                  for rank, environment in enumerate(rank_environments(2))]
    while not (out / "log.jsonl").exists() or '"step": 2' not in (out / "log.jsonl").read_text():
        time.sleep(0.01)
        assert one.is_alive() and other.is_alive()
    os.kill(other.pid, signal.SIGKILL)
    assert finish(one, 30)[0] not in (0, None)
