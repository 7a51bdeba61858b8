"""Losses against golden values and naive loops, retrieval, checkpoints of every kind, released weights, export."""
import hashlib
import json
import os
import pickle
import re
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import call
from torch import nn

import data
import models

BANDS = {"s1": models.S1_BANDS, "s2": models.S2_BANDS}


def relative(value, expected):
    value, expected = torch.as_tensor(value), torch.as_tensor(expected)
    return ((value - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------------------------------------- losses

def mma(m1, m2, temperature):
    return models.info_nce(models.mma_similarity(m1, m2), temperature)


EACH_LOSS = pytest.mark.parametrize("loss_of, shape", [(models.nt_xent, (64, 128)), (mma, (64, 8, 4, 4))],
                                    ids=["nt_xent", "mma"])


@pytest.mark.parametrize("loss_of, inputs, case", [
    *((models.nt_xent, "z", case) for case in range(3)), *((mma, "m", case) for case in range(2))])
def test_losses_equal_the_published_values(shared, loss_of, inputs, case):
    golden = np.load(shared / f"golden/{loss_of.__name__}.npz")
    a, b = (torch.from_numpy(golden[f"{inputs}{side}_{case}"]).requires_grad_() for side in (1, 2))
    loss = loss_of(a, b, golden[f"temperature_{case}"].item())
    loss.backward()
    found = {"loss": loss.detach(), "grad1": a.grad, "grad2": b.grad}
    if loss_of is mma:
        found["similarity"] = models.mma_similarity(a, b).detach()
    for name, value in found.items():
        assert relative(value, golden[f"{name}_{case}"]) < 1e-9, name


def test_nt_xent_equals_its_definition_written_out():
    z1, z2 = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, total = [v / v.norm() for v in (*z1, *z2)], 0
    for i in range(10):
        others = torch.stack([z[i] @ z[j] / 0.2 for j in range(10) if j != i])
        total += others.exp().sum().log() - z[i] @ z[(i + 5) % 10] / 0.2
    assert relative(models.nt_xent(z1, z2, 0.2), total / 10) < 1e-12


def test_info_nce_equals_its_definition_written_out():
    similarity, total = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 0
    for i in range(4):
        for line in (similarity[i], similarity[:, i]):
            total += (line / 0.2).exp().sum().log() - similarity[i, i] / 0.2
    assert relative(models.info_nce(similarity, 0.2), total / 8) < 1e-12


@pytest.mark.parametrize("method", ["d-simclr", "mma", "simclr-rgb"])
def test_each_method_has_its_own_loss_and_heeds_the_temperature(method):
    model, (z1, z2) = models.Contrastive(method, BANDS), torch.randn(2, 5, 8, 3, 3)
    if method != "mma":
        z1, z2 = z1[..., 0, 0], z2[..., 0, 0]
    losses = []
    for temperature in (0.1, 0.5):
        expected = (mma if method == "mma" else models.nt_xent)(z1, z2, temperature)
        losses.append(model.loss(z1, z2, temperature))
        assert torch.equal(losses[-1], expected)
    assert losses[0] != losses[1]


@EACH_LOSS
@pytest.mark.parametrize("related", [0.01, None], ids=["pairs", "strangers"])
def test_losses_in_float32_are_stable_at_a_low_temperature(loss_of, shape, related):
    z1, z2 = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    z2 = z1 + related * z2 if related else z2
    single = [x.clone().requires_grad_() for x in (z1, z2)]
    double = [x.double().requires_grad_() for x in (z1, z2)]
    loss, exact = loss_of(*single, 0.005), loss_of(*double, 0.005)
    loss.backward(), exact.backward()
    assert abs(loss.item() - exact.item()) < 1e-3 * max(1, exact.item())
    found, expected = single[0].grad, double[0].grad
    assert found.isfinite().all() and (found - expected).abs().max() < 1e-3 * expected.abs().max() + 1e-6


@EACH_LOSS
@pytest.mark.parametrize("temperature", [0.07, 0.005])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
def test_losses_of_half_precision_are_computed_in_float32(loss_of, shape, dtype, temperature, cast):
    z1, z2 = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    z1[0], z1[1], z2[2] = 0, 1e4 * z1[1], 1e-4 * z2[2]  # normalised, half precision makes NaN of these
    half = [x.to(dtype).requires_grad_() for x in (z1, z2)]
    whole = [x.detach().float().requires_grad_() for x in half]
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        loss = loss_of(*half, temperature)
    expected = loss_of(*whole, temperature)
    loss.backward(), expected.backward()
    assert loss.dtype == torch.float32 and relative(loss.detach(), expected.detach()) < 1e-6
    assert all(torch.equal(one.grad, other.grad.to(dtype)) for one, other in zip(half, whole))
    assert whole[1].grad.isfinite().all() and loss_of(z1.double(), z2.double(), temperature).dtype == torch.float64


def test_losses_keep_no_more_than_one_matrix_of_pairs():
    """What nt_xent saves for its backward pass: the softmax, not masks, indices or copies of the similarities."""
    saved = []
    z1, z2 = torch.randn(2, 300, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = models.nt_xent(z1, z2, 0.07)
    assert {x.numel() for x in saved if x.numel() > 600 * 16} == {600 * 600}
    assert len({x.data_ptr() for x in saved if x.numel() > 600 * 16}) == 1 and loss.isfinite()


def test_mma_similarity_is_the_one_shift_of_the_correlation():
    m1, m2 = torch.randn(2, 4, 8, 3, 3, dtype=torch.float64)
    shifted = F.conv2d(F.normalize(m1, dim=1), F.normalize(m2, dim=1)).amax((2, 3)) / 9
    assert torch.allclose(models.mma_similarity(m1, m2), shifted, rtol=1e-12)
    with pytest.raises(ValueError, match=r"maps of \[8, 3, 3\] and \[8, 1, 9\]"):
        models.mma_similarity(m1, m2.reshape(4, 8, 1, 9))


def test_retrieval_does_not_find_what_is_tied_or_collapsed():
    assert models.retrieval(torch.eye(8)) == {"top1": 1, "top5": 1, "median": 1}
    ranks = torch.tensor([[3., 1, 2], [5, 4, 0], [9, 8, 7]])  # the right one comes 1st, 2nd, 3rd
    assert models.retrieval(ranks) == pytest.approx({"top1": 1 / 3, "top5": 1, "median": 2})
    for collapsed in (torch.ones(10, 10), torch.full((10, 10), float("nan"))):
        assert models.retrieval(collapsed) == {"top1": 0, "top5": 0, "median": 10}
    tied = torch.eye(10)
    tied[0, 1] = 1  # as good as the right one: not found
    assert models.retrieval(tied)["top1"] == pytest.approx(0.9)
    ranks, similarity = [1, 1, 1, 1, 5, 6, 7, 8, 9], torch.zeros(9, 9)
    for row, rank in enumerate(ranks):  # rank - 1 of the others are nearer
        similarity[row] = torch.cat((torch.full((rank - 1,), 2.), torch.zeros(10 - rank))).roll(row + 1)
        similarity[row, row] = 1
    assert models.retrieval(similarity) == pytest.approx({"top1": 4 / 9, "top5": 5 / 9, "median": 5})


# ---------------------------------------------------------------------------------------------- networks

@pytest.mark.filterwarnings("error")
def test_arrays_that_may_not_be_written_are_taken_and_left_as_they_are():
    rng = np.random.default_rng(0)
    for s1 in (rng.integers(-3000, 100, (2, 2, 6, 6), np.int16), rng.normal(-10, 9, (2, 2, 6, 6)).astype(np.float32)):
        arrays = s1, rng.integers(0, 12_000, (2, 13, 6, 6), np.uint16)
        before = [array.copy() for array in arrays]
        for array in arrays:
            array.flags.writeable = False
        found = models.to_input(*arrays, "patch-max")
        for x, y in zip(found, models.to_input(*map(torch.from_numpy, before), "patch-max")):
            assert x.dtype == torch.float32 and torch.equal(x, y)
        assert all(np.array_equal(one, other) for one, other in zip(arrays, before))


@pytest.mark.parametrize("method, names, shape", [
    ("only-s1", ["s1"], (2, 512)), ("only-s2", ["s2"], (2, 512)), ("early-fusion", ["s1+s2"], (2, 512)),
    ("late-fusion", ["s1", "s2"], (2, 512)), ("d-simclr", ["s1", "s2"], (2, 512)),
    ("mma", ["s1", "s2"], (2, 256, 4, 4))])
def test_encoders_of_every_method_take_its_inputs_and_feed_a_classifier(method, names, shape):
    encoders = models.make_encoders(method, BANDS).eval()
    s1, s2 = torch.rand(2, 2, 32, 32), torch.rand(2, 13, 32, 32)
    inputs = {"s1": s1, "s2": s2, "s1+s2": torch.cat((s1, s2), 1)}
    outputs = [encoder(inputs[name]) for name, encoder in encoders.items()]
    assert list(encoders) == names and {tuple(x.shape) for x in outputs} == {shape}
    expected = torch.cat([x.flatten(2).mean(2) if method == "mma" else x for x in outputs], 1)
    assert torch.allclose(models.joined_features(encoders, s1, s2), expected, atol=1e-6)
    assert models.Classifier(encoders)(s1, s2).shape == (2, 8)
    assert models.Classifier(encoders, classes=3)(s1, s2).shape == (2, 3)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_autocast_can_be_asked_for_any_device(device):
    torch.set_float32_matmul_precision("high")  # as in NVIDIA's containers
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    assert not models.autocast("float32", torch.device(device))._enabled
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"  # float32 is float32
    assert models.autocast("bf16", torch.device(device)).fast_dtype == torch.bfloat16
    models.autocast("auto", torch.device(device))


def test_batch_norm_sees_both_views_of_simclr_together():
    model, (a, b) = models.Contrastive("simclr-rgb", {"s2": models.RGB}), torch.rand(2, 3, 3, 32, 32)
    other = deepcopy(model)
    assert torch.equal(torch.cat(model(a, b)), other.embed("s2", torch.cat((a, b))))


def test_embeddings_are_float32_whatever_the_network_ran_in():
    model = models.Contrastive("d-simclr", BANDS)
    with models.autocast("bf16", torch.device("cpu")):
        assert {z.dtype for z in model(torch.rand(2, 2, 32, 32), torch.rand(2, 13, 32, 32))} == {torch.float32}


# ---------------------------------------------------------------------------------------------- checkpoints

def write(path, method="mma", **change):
    torch.manual_seed(0)
    model = models.Contrastive(method, BANDS)
    content = {"method": method, "arch": "resnet18", "bands": BANDS, "scale": "fixed", "stats": None, "simulated": True,
               "args": {"crop": 32}, "classes": models.CLASSES, **change}
    models.save_checkpoint(path, model, **content)
    return model


def refusal(path, load=models.load_checkpoint):
    """-> the one line of the error that the file causes."""
    with pytest.raises(models.CheckpointError) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_gives_back_the_encoders_and_what_was_said_of_them(tmp_path):
    path = tmp_path / "last.pt"
    model = write(path).eval()
    encoders, scaling = models.load_encoders(path)
    x = torch.rand(2, 13, 32, 32)
    assert not encoders.training and torch.equal(encoders["s2"](x), model.encoders["s2"](x))
    assert scaling["scale"] == "fixed" and scaling["stats"] is None
    write(path, simulated=False, classes=["dry", "flooded"])
    content = models.load_checkpoint(path)
    assert not content["simulated"] and content["classes"] == ["dry", "flooded"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", ["d-simclr", "mma", "simclr-rgb"])
def test_a_checkpoint_gives_back_the_embeddings_or_one_line(method, tmp_path):
    model = write(tmp_path / "last.pt", method).eval()
    inputs = torch.rand(2, 2, 32, 32), torch.rand(2, 13, 32, 32)
    if method == "simclr-rgb":
        inputs = torch.rand(2, 2, 13, 32, 32)
    loaded, _ = models.load_contrastive(tmp_path / "last.pt")
    assert all(map(torch.equal, loaded(*inputs), model(*inputs)))
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    for head in content["heads"].values():
        head["0.weight"] = head["0.weight"][:3]
        torch.save(content, tmp_path / "bad.pt")
        assert "bad.pt: its head for s" in refusal(tmp_path / "bad.pt", models.load_contrastive)


def test_both_files_that_can_be_copied_alone_name_the_same_classes():
    assert list(data.CLASSES) == models.CLASSES and models.IGNORE == data.IGNORE


class Hostile:
    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return os.mkdir, (self.victim,)


def test_no_pickle_is_executed(tmp_path, recwarn):
    victim = tmp_path / "victim"
    torch.save({"format": 1, "encoders": Hostile(victim)}, tmp_path / "zip.pt")
    torch.save({"format": 1, "encoders": Hostile(victim)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for protocol in range(6):
        (tmp_path / f"{protocol}.pt").write_bytes(pickle.dumps(Hostile(victim), protocol))
    for path in tmp_path.glob("*.pt"):
        assert re.match(f"{path}: .*(mkdir|not a checkpoint)", refusal(path))
    assert not victim.exists() and not recwarn.list  # the error says enough
    said = refusal(tmp_path / "zip.pt", models.load_encoders)
    assert re.search("not read, since it would run code: it holds .*mkdir", said)


def test_files_that_are_no_checkpoints_get_one_line(tmp_path):
    write(tmp_path / "good.pt")
    good, path = (tmp_path / "good.pt").read_bytes(), tmp_path / "bad.pt"
    random = np.random.default_rng(0).bytes(5000)
    for content in (b"", b"hello\nworld\n", random, *(good[:len(good) * k // 20] for k in range(1, 20)), good[:-1]):
        path.write_bytes(content)
        assert re.search("truncated or not .*: remove it, and its run begins anew", refusal(path))
    for content, first in (
            ([1, 2], "nothing"), (torch.ones(3), "nothing"), ({"format": 99}, "format"),
            ({"weights": torch.ones(2)}, "weights"), ({"conv1.weight": torch.ones(2)}, "conv1.weight"),
            ({"state_dict": {"module.encoder_q.conv1.weight": torch.ones(2)}}, "module.encoder_q.conv1.weight"),
            ({"state_dict": {"module.backbone1.conv1.weight": torch.ones(2)}}, "module.backbone1.conv1.weight"),
            ({"state_dict": {}}, "nothing"), ({"state_dict": 3}, "state_dict")):
        torch.save(content, path)
        words = (f"bad.pt: begins with {first}: neither a checkpoint of this version nor .*"
                 "MoCo or DistributedDataParallel .* are not taken")
        assert re.search(words, refusal(path))
    assert "No such file or directory; python pretrain.py" in refusal(tmp_path / "none.pt")
    assert "Is a directory" in refusal(tmp_path)


STATS = {"s1": {"mean": [0.] * 2, "std": [1.] * 2}, "s2": {"mean": [0.] * 13, "std": [1.] * 13}}


@pytest.mark.parametrize("change, words", [
    ({"bands": {"s1": ["VV", "VH"], "s2": models.RGB}}, "weights for s2 do not fit .*'B4', 'B3', 'B2'.*size mismatch"),
    ({"method": "d-simclr", "arch": "resnet50"}, "weights for s1 do not fit resnet50 .*Missing key"),
    ({"encoders": {"s1": models.VGG(2).state_dict()}}, "weights for s2 do not fit .*Missing key"),
    *(({key: "another"}, f"{key} 'another' is not one of") for key in ("method", "arch", "scale"))])
def test_weights_that_do_not_fit_what_the_file_names_get_one_line(tmp_path, change, words):
    write(tmp_path / "last.pt")
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save({**content, **change}, tmp_path / "bad.pt")
    assert re.search(words, refusal(tmp_path / "bad.pt", models.load_encoders))


def test_a_kill_before_the_rename_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    write(tmp_path / "last.pt")
    whole, moved = (tmp_path / "last.pt").read_bytes(), []

    def replace(path, target):
        moved.append((models.load_checkpoint(path)["simulated"], path.name, target.name))
        raise KeyboardInterrupt

    synced, fsync = [], os.fsync  # a power cut must not leave a name without its bytes
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(type(tmp_path), "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "last.pt", simulated=False)
    assert synced == [(tmp_path / "last.tmp").stat().st_size]
    assert moved == [(False, "last.tmp", "last.pt")]  # it was whole, and its only way in is the rename
    assert (tmp_path / "last.pt").read_bytes() == whole


# ---------------------------------------------------------------------------------------------- released weights

def plain_resnet(arch, bands):
    network = getattr(torchvision.models, arch)(weights=None)
    network.conv1 = nn.Conv2d(bands, 64, 7, 2, 3, bias=False)
    for module in network.modules():  # statistics as of a trained network
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2)
    return network


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_released_resnets_load_like_a_checkpoint(tmp_path, arch):
    s1, s2 = networks = [plain_resnet(arch, bands).eval() for bands in (2, 13)]
    weights, heads = {}, []
    for number, network in enumerate(networks, 1):
        width = network.fc.in_features
        network.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 128))
        weights |= {f"backbone{number}.{key}": value for key, value in network.state_dict().items()}
        heads.append(network.fc)
        network.fc = nn.Identity()
    torch.save({"epoch": 199, "state_dict": weights}, tmp_path / "released.pth")
    content = models.load_checkpoint(tmp_path / "released.pth")
    encoders, scaling = models.load_encoders(content)
    assert (content["method"], content["arch"], content["bands"]) == ("d-simclr", arch, BANDS)
    assert content["args"] == {} and not content["simulated"] and scaling["scale"] == "patch-max"
    x1, x2 = torch.rand(2, 2, 64, 64), torch.rand(2, 13, 64, 64)
    with torch.inference_mode():
        assert (encoders["s1"](x1) - s1(x1)).abs().max() < 1e-6
        assert (encoders["s2"](x2) - s2(x2)).abs().max() < 1e-6
        for z, head, features in zip(models.load_contrastive(content)[0](x1, x2), heads, (s1(x1), s2(x2))):
            assert (z - head(features)).abs().max() < 1e-5


def test_released_mma_weights_load_like_a_checkpoint(tmp_path):
    content, networks = {}, {}
    for sensor, bands in (("s1", 2), ("s2", 13)):
        layers, state, widths = [], {}, (bands, 64, 128, 256, 256)
        for k in range(4):
            block = [nn.Conv2d(widths[k], widths[k + 1], 3, padding=1), nn.BatchNorm2d(widths[k + 1]), nn.ReLU(),
                     nn.Conv2d(widths[k + 1], widths[k + 1], 3, padding=1), nn.BatchNorm2d(widths[k + 1]), nn.ReLU()]
            layers += [*block, nn.MaxPool2d(2)] if k < 3 else block
            part = nn.Sequential(*block).state_dict()
            state |= {f"convs{k + 1}.layers.{key}": value for key, value in part.items()}
        content[f"{sensor}_model_weights"] = state
        networks[sensor] = nn.Sequential(*layers).eval()
    torch.save(content, tmp_path / "mma.pth")
    encoders, _ = models.load_encoders(tmp_path / "mma.pth")
    for sensor, x in (("s1", torch.rand(2, 2, 32, 32)), ("s2", torch.rand(2, 13, 32, 32))):
        assert (encoders[sensor](x) - networks[sensor](x)).abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------- export

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder with last.pt and what `python models.py export` made of it."""
    folder = tmp_path_factory.mktemp("export")
    model = write(folder / "last.pt", "d-simclr", scale="standard", stats=STATS, epoch=7, retrieval={"candidates": 9},
                  data={"path": "datasets/sen12ms", "pairs": 80}, simulated=False, classes=["dry", "flooded"]).eval()
    models.export(folder / "last.pt", folder / "out")
    return folder, model


def test_exported_weights_load_in_torchvision(exported):
    folder, model = exported
    for sensor, bands in (("s1", 2), ("s2", 13)):
        network = plain_resnet("resnet18", bands)
        network.fc = nn.Identity()
        network.load_state_dict(torch.load(folder / f"out/{sensor}.pt", weights_only=True), strict=True)
        x = torch.rand(2, bands, 32, 32)
        assert torch.equal(network.eval()(x), model.encoders[sensor](x))


def test_exported_weights_load_in_timm(exported):
    folder, model = exported
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18", in_chans=13, num_classes=0)
    network.load_state_dict(torch.load(folder / "out/s2.pt", weights_only=True))
    x = torch.rand(2, 13, 32, 32)
    assert (network.eval()(x) - model.encoders["s2"](x)).abs().max() < 1e-5


def test_the_card_says_what_a_user_must_know(exported):
    folder, _ = exported
    card = json.loads((folder / "out/card.json").read_text())
    assert card["inputs"] == {"s1": models.S1_BANDS, "s2": models.S2_BANDS} and card["network"] == "resnet18"
    assert card["units"]["s1"] == "sigma nought in dB" and "file" not in card
    assert card["scale"] == "standard" and "mean" in card["scaling"] and card["stats"] == STATS
    assert (card["method"], card["epoch"], card["retrieval"]) == ("d-simclr", 7, {"candidates": 9})
    assert card["data"] == {"path": "datasets/sen12ms", "pairs": 80} and card["classes"] == ["dry", "flooded"]
    assert "modified Copernicus Sentinel data" in card["licence"] and not card["simulated"]
    assert card["checkpoint"] == hashlib.sha256((folder / "last.pt").read_bytes()).hexdigest()[:12]


def test_export_works_from_the_command_line_and_says_in_one_line_what_is_missing(tmp_path, monkeypatch, capsys):
    write(tmp_path / "last.pt")
    call(monkeypatch, models, "export", tmp_path / "last.pt", tmp_path / "out")
    assert "card.json, s1 s2" in capsys.readouterr().out
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert "simulated" in card["licence"] and card["network"] == "models.VGG" and "encoders" not in card
    models.VGG(13).load_state_dict(torch.load(tmp_path / "out/s2.pt", weights_only=True))
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, models, "export", tmp_path / "none.pt", tmp_path / "out")
    assert capsys.readouterr().err.count("\n") == 1
