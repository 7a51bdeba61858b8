"""Pretraining, fine-tuning, probe and map on tensors that only claim to lie on a GPU: one left on the CPU, or of a
type that CUDA cannot compute with, fails here. What a GPU alone decides is replaced: the backward pass, L-BFGS (its
steps depend on numbers; it is asked once), pinned memory, the loader's streams, numbers that the host reads."""
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, ResNet

import data
import finetune
import linear_eval
import models
import pretrain

N, CROP, GPU = 4, 32, torch.device("cuda", 0)
SYNCED = []  # models whose batch norm becomes that of all processes
MOVES = {"_to_copy", "detach", "slice", "select", "split", "view", "unsqueeze"}


class NoArithmetic(TorchDispatchMode):
    """uint16 is moved and converted; few of CUDA's kernels have it, and fake ones do not know that."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name in MOVES or torch.uint16 not in [getattr(x, "dtype", None) for x in args], f"{name} of uint16"
        return function(*args, **(kwargs or {}))


def backward(tensor, gradient=None):
    """Zeros into the .grad of all that the graph of the tensor begins with."""
    like = tensor if gradient is None else gradient
    assert (like.shape, like.dtype, like.device) == (tensor.shape, tensor.dtype, tensor.device)
    found = [tensor.grad_fn]
    for node in found:
        found += {other: 0 for other, _ in node.next_functions if other and other not in found}
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)


def numpy(tensor):
    assert tensor.device.type == "cpu"
    return np.zeros(tensor.shape, str(tensor.dtype).removeprefix("torch."))


def short(weights):
    """A ResNet without its last two layers, since the time goes into the number of operations."""
    network = ResNet(BasicBlock, [1, 1, 1, 1])
    network.layer3 = network.layer4 = nn.Identity()
    network.fc = nn.Linear(128, 1)
    return network


def asked_once(parameters, **options):
    """In the place of L-BFGS."""
    return SimpleNamespace(zero_grad=int, step=lambda closure: closure())


def bands_of(method):
    """-> bands and their statistics."""
    bands = {"s1": models.S1_BANDS, "s2": models.METHODS[method].get("bands", models.S2_BANDS)}
    return bands, {sensor: {"mean": [1] * len(names), "std": [1] * len(names)} for sensor, names in bands.items()}


def crops(bands, floats=False):
    """A batch as the loader yields it."""
    kinds = (torch.float32, torch.float64) if floats else (torch.int16, torch.uint16)
    s1, s2 = [torch.zeros(N, len(names), CROP, CROP, dtype=kind, device=GPU)
              for names, kind in zip(bands.values(), kinds)]
    return s1, s2, torch.zeros(N, CROP, CROP, dtype=torch.uint8, device=GPU), np.arange(N)


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    for owner, name, value in (
            (nn.Module, "to", lambda module, *how, **more: module),  # made in its place
            (torch.Tensor, "pin_memory", torch.Tensor.clone), (torch.Tensor, "backward", backward),
            (torch.Tensor, "numpy", numpy), (torch.Tensor, "item", lambda tensor: 0.0),
            (torch.optim, "LBFGS", asked_once),
            (nn.SyncBatchNorm, "convert_sync_batchnorm", lambda model: SYNCED.append(model) or model),
            (nn.parallel, "DistributedDataParallel", lambda model: model),
            (torch.cuda, "is_bf16_supported", lambda **options: True),
            (torch.cuda.amp.common, "amp_definitely_not_available", bool),
            (data, "loader", lambda patches, batches, *more, **options: (crops(patches.bands) for _ in batches))):
        monkeypatch.setattr(owner, name, value)
    monkeypatch.setitem(models.ARCHITECTURES, "resnet18", short)
    with FakeTensorMode(), NoArithmetic():
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("scale", models.SCALING)
@pytest.mark.parametrize("floats", [False, True])
def test_network_input_is_float32_on_the_gpu(scale, floats):
    bands, stats = bands_of("mma")
    s1, s2, *_ = crops(bands, floats)
    for x in models.to_input(s1, s2, scale, stats, bands, s2_offset=1000):
        assert x.device == GPU and x.dtype == torch.float32


@pytest.mark.parametrize("method, scale, world, micro", [
    ("d-simclr", "patch-max", 1, N), ("d-simclr", "standard", 2, 2),
    ("mma", "fixed", 1, 2), ("mma", "patch-max", 2, N),
    ("simclr-rgb", "patch-max", 1, N), ("simclr-rgb", "standard", 2, 2)])
def test_a_step_of_pretraining_and_the_look_up_stay_on_the_gpu(method, scale, world, micro):
    bands, stats = bands_of(method)
    args = SimpleNamespace(method=method, scale=scale, arch="resnet18", seed=0, lr=1, weight_decay=0,
                           batch_size=N * world, crop=CROP, threads=1, device="cuda")
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)
    with GPU:
        SYNCED.clear()
        model, network, optimizer = pretrain.make_model(args, bands, GPU, world)
    assert SYNCED == [model] * (world > 1)  # batch norm of the global batch
    s1, s2, *_ = crops(bands)
    inputs = pretrain.network_inputs(s1, s2, args, stats, 1, slice(N * (world - 1), N * world))
    cast, loss_of = models.autocast("bf16", GPU), partial(model.loss, temperature=0.1)
    loss, a, b = pretrain.forward_backward(network, cast, loss_of, *inputs, micro, world - 1, world)
    optimizer.step()
    for x in pretrain.gather(loss[None], world), a, b, *optimizer.state[next(model.parameters())].values():
        assert x.device == GPU and x.dtype == torch.float32
    assert len(a) == len(b) == N * world
    models.retrieval(model.similarity(a, b))
    pretrain.held_out_retrieval(model, SimpleNamespace(bands=bands), range(1), args, stats, cast)


@pytest.mark.parametrize("method, task, scale", [*zip(models.METHODS, ["single", "multi"] * 4, [*models.SCALING] * 3)])
def test_fine_tuning_scores_and_maps_stay_on_the_gpu(method, task, scale, tmp_path):
    bands, stats = bands_of(method)
    scaling = {"scale": scale, "stats": stats}
    patches = SimpleNamespace(bands=bands, size=[CROP, CROP], labels=np.zeros(N), classes=models.CLASSES, scenes=["0"] * N)
    args = SimpleNamespace(device=GPU, precision="bf16", lr=1, classifier_lr=1, weight_decay=0, drop_epoch=1, epochs=1,
                           crop=CROP, batch_size=N, threads=1, results=tmp_path, checkpoint=None, method=method)
    with GPU:
        model = models.Classifier(models.make_encoders(method, bands))
    finetune.train(model, scaling, patches, np.arange(N), task, 0, args, "run")
    crops = linear_eval.extract(model.eval(), scaling, patches, np.arange(N), args)
    assert [crops[name].shape for name in ("x", "single", "multi")] == [(N, 8)] * 3
    images = [np.zeros((len(names), CROP, CROP + 8), np.float32) for names in bands.values()]
    logits = finetune.classify(model, scaling, images, [(0, 0), (0, 8)], CROP, args)
    assert logits.device == GPU and logits.shape == (2, 8)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
@pytest.mark.parametrize("task", ["single", "multi"])
@pytest.mark.parametrize("width", [3, 40])  # fewer and more than crops
def test_the_probe_stays_on_the_gpu(task, width):
    crops = {"x": np.ones((16, width), np.float32), "row": np.arange(16), "scene": np.arange(16), task: np.eye(2, dtype=np.float32)[[0, 1] * 8]}
    _, counts = linear_eval.probe(task, crops, crops, np.arange(16), np.arange(16) % 2, 0, GPU)
    assert counts["train_crops"] == 16
