"""Encoders, projection heads, contrastive losses, classifier, checkpoints. Knows no files but checkpoints.

    from models import load_encoders, nt_xent, mma_similarity, info_nce
    encoders, scaling = load_encoders("runs/d-simclr/last.pt")      # {"s1": module, "s2": module}, for data.to_input

This file can be copied alone; it needs torch and torchvision.
"""
import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import resnet18, resnet50

S1_BANDS = ["VV", "VH"]
S2_BANDS = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"]
RGB = ["B4", "B3", "B2"]
CHECKPOINT_FORMAT = 1

# The rows of the tables, in the poster's order: what each encoder sees, and whether it can be pretrained.
METHODS = {
    "only-s1": {"title": "OnlySen-1", "inputs": ("s1",), "pretrained": False},
    "only-s2": {"title": "OnlySen-2", "inputs": ("s2",), "pretrained": False},
    "early-fusion": {"title": "EarlyFusion", "inputs": ("s1+s2",), "pretrained": False},
    "late-fusion": {"title": "LateFusion", "inputs": ("s1", "s2"), "pretrained": False},
    "simclr-rgb": {"title": "SimCLR (RGB)", "inputs": ("s2",), "pretrained": True, "bands": RGB},
    "d-simclr": {"title": "D-SimCLR", "inputs": ("s1", "s2"), "pretrained": True},
    "mma": {"title": "MMA", "inputs": ("s1", "s2"), "pretrained": True},
}


class CheckpointError(Exception):
    """A checkpoint cannot be used as asked. The text is one line: which, why, and the mend."""


# ---------------------------------------------------------------------------------------------- networks

def resnet(arch, bands):
    """torchvision's `resnet18` or `resnet50` for (N, bands, h, w) input, random weights -> (N, 512 or 2048) features."""
    network = {"resnet18": resnet18, "resnet50": resnet50}[arch](weights=None)
    network.conv1 = nn.Conv2d(bands, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    network.features = network.fc.in_features
    network.fc = nn.Identity()
    return network


class VGGBlock(nn.Module):
    """Two of (3x3 convolution, batch norm, ReLU)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.layers(x)


class VGG(nn.Module):
    """Encoder of MMA (after Windsor et al. 2021): (N, bands, h, w) -> feature map (N, 256, h / 8, w / 8)."""
    features = 256

    def __init__(self, bands):
        super().__init__()
        widths = (bands, 64, 128, 256, 256)
        for k in range(4):
            setattr(self, f"convs{k + 1}", VGGBlock(widths[k], widths[k + 1]))

    def forward(self, x):
        x = F.max_pool2d(self.convs1(x), 2)
        x = F.max_pool2d(self.convs2(x), 2)
        x = F.max_pool2d(self.convs3(x), 2)
        return self.convs4(x)


def make_encoders(method, bands, arch="resnet18"):
    """-> ModuleDict of a method's encoders by input: `s1`, `s2`, or `s1+s2` for stacked bands.
    bands: {"s1": [names], "s2": [names]} as in data.Patches.bands."""
    count = {"s1": len(bands["s1"]), "s2": len(bands["s2"]), "s1+s2": len(bands["s1"]) + len(bands["s2"])}
    build = VGG if method == "mma" else lambda n: resnet(arch, n)
    return nn.ModuleDict({name: build(count[name]) for name in METHODS[method]["inputs"]})


def encode(encoders, s1, s2):
    """Network input of both sensors -> {input: features (N, D) or map (N, 256, h / 8, w / 8)} of each encoder."""
    return {name: encoder(torch.cat((s1, s2), 1) if name == "s1+s2" else s1 if name == "s1" else s2)
            for name, encoder in encoders.items()}


def pooled(features):
    """(N, D) features as they are; a map (N, D, h, w) averaged over space -> (N, D)."""
    return features.mean((2, 3)) if features.dim() == 4 else features


class Contrastive(nn.Module):
    """A method's encoders with their projection heads, 512 -> 512 -> 128; none for MMA, which compares maps.

    forward: two network inputs -> the two float32 embeddings (N, 128), or maps (N, 256, h / 8, w / 8), to be compared:
    of the two sensors, or for SimCLR (RGB) of two augmentations of one image.
    """

    def __init__(self, method, bands, arch="resnet18", width=128):
        super().__init__()
        self.method, self.encoders, self.heads = method, make_encoders(method, bands, arch), nn.ModuleDict()
        for name, encoder in self.encoders.items() if method != "mma" else ():
            d = encoder.features
            self.heads[name] = nn.Sequential(nn.Linear(d, d), nn.ReLU(inplace=True), nn.Linear(d, width))

    def forward(self, a, b):
        if self.method == "simclr-rgb":  # one pass, so that batch norm sees both augmentations together
            return self.heads["s2"](self.encoders["s2"](torch.cat((a, b)))).float().chunk(2)
        a, b = self.encoders["s1"](a), self.encoders["s2"](b)
        return (a.float(), b.float()) if self.method == "mma" else (self.heads["s1"](a).float(), self.heads["s2"](b).float())

    def loss(self, a, b, temperature, first=0, n=None):
        """Loss of the n places from `first` on (default all of them) among the embeddings of all N places."""
        if self.method == "mma":
            return info_nce(mma_similarity(a[first:][:n], b), temperature, None if n is None else
                            mma_similarity(b[first:][:n], a), first)
        return nt_xent(a, b, temperature, first, n)

    def similarity(self, a, b):
        """(N, N) similarity of embeddings as the loss sees it."""
        return mma_similarity(a, b) if self.method == "mma" else F.normalize(a) @ F.normalize(b).T


class Classifier(nn.Module):
    """One linear layer on the concatenated features of a method's encoders. Network input of both sensors -> (N, 8)."""

    def __init__(self, encoders, classes=8):
        super().__init__()
        self.encoders = encoders
        self.fc = nn.Linear(sum(encoder.features for encoder in encoders.values()), classes)

    def forward(self, s1, s2):
        return self.fc(torch.cat([pooled(f) for f in encode(self.encoders, s1, s2).values()], 1))


def autocast(precision, device):
    """Context in which networks run: `bf16`, `float32`, or `auto`: bf16 where the device computes in it natively."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bf16" if native else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# ---------------------------------------------------------------------------------------------- losses

def nt_xent(z1, z2, temperature, first=0, n=None):
    """NT-Xent (Chen et al. 2020) over 2N embeddings, here of two sensors.

    z1, z2: (N, d), of any length; row i of both is one place. Each of the 2N rows picks its partner among the 2N - 1
    others by cosine similarity / temperature; mean cross-entropy -> scalar. first, n: only the rows of the n places
    from `first` on, against all columns: the share of one process.
    """
    places, n = len(z1), len(z1) if n is None else n
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    own = torch.arange(first, first + n, device=z.device)
    own, partner = torch.cat((own, own + places)), torch.cat((own + places, own))
    logits = (z if n == places else z[own]) / temperature @ z.T  # (2n, 2N)
    logits.scatter_(1, own[:, None], float("-inf"))  # in place: a (2N)^2 copy less
    return F.cross_entropy(logits, partner)


def mma_similarity(m1, m2):
    """Similarity of feature maps (Windsor et al. 2021): both normalised along their channels at every location, m2
    correlated with m1 over all relative shifts, the maximum, divided by the locations of m2.
    m1: (N, c, H, W), m2: (M, c, h, w) with h <= H, w <= W -> (N, M). Maps of equal size have one shift."""
    m1, m2 = F.normalize(m1, dim=1), F.normalize(m2, dim=1)
    locations = m2.shape[2] * m2.shape[3]
    if m1.shape[2:] == m2.shape[2:]:
        return m1.flatten(1) @ m2.flatten(1).T / locations
    if m1.shape[2] < m2.shape[2] or m1.shape[3] < m2.shape[3]:
        raise ValueError(f"m1 {tuple(m1.shape)} is smaller than m2 {tuple(m2.shape)}: exchange them")
    return F.conv2d(m1, m2).amax((2, 3)) / locations  # (N, M, H - h + 1, W - w + 1) before the maximum


def info_nce(similarity, temperature, columns=None, first=0):
    """Symmetric InfoNCE: mean cross-entropy towards the diagonal of similarity / temperature, over rows and over
    columns, mean of both -> scalar. similarity: (N, N), or for one process's share rows `first` onwards (n, N) with
    `columns` (n, N), the same columns transposed."""
    target = torch.arange(first, first + len(similarity), device=similarity.device)
    columns = similarity.T if columns is None else columns
    return (F.cross_entropy(similarity / temperature, target) + F.cross_entropy(columns / temperature, target)) / 2


@torch.no_grad()
def retrieval(similarity):
    """(N, N) similarity of queries to candidates, the right one on the diagonal -> {"top1", "top5": shares, "median":
    rank of the right one, 1 is best}. Of equals the right one counts as last, so a collapsed encoder scores nothing."""
    rank = (similarity >= similarity.diagonal()[:, None]).sum(1).float()
    return {"top1": (rank <= 1).float().mean().item(), "top5": (rank <= 5).float().mean().item(),
            "median": rank.quantile(0.5).item()}


# ---------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(path, model, **content):
    """Write a Contrastive model and whatever else a checkpoint holds; the file before it is kept as `previous.pt`.
    The file is there whole or not at all."""
    path = Path(path)
    content = {"format": CHECKPOINT_FORMAT, **content,
               "encoders": {name: encoder.state_dict() for name, encoder in model.encoders.items()},
               "heads": {name: head.state_dict() for name, head in model.heads.items()},
               "versions": {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}}
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as handle:
            torch.save(content, handle)
            handle.flush()
            os.fsync(handle.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({error}); the checkpoint before it is kept. Free space and "
                              "start the same command again") from None
    if path.exists():
        path.replace(path.with_name("previous.pt"))
    temporary.replace(path)


def load_checkpoint(path):
    """-> the dict of a checkpoint of this project, or of the weights released with the paper, on the CPU. Nothing in
    the file is executed. Raises CheckpointError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; python pretrain.py writes it") from None
    except UnpicklingError:
        raise CheckpointError(f"{path}: holds code or objects, not only weights; it was not read, since reading it would "
                              "run that code") from None
    except (RuntimeError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: truncated or not a checkpoint ({str(error).splitlines()[0][:80]})") from None
    if isinstance(content, dict) and content.get("format") == CHECKPOINT_FORMAT:
        return content
    if isinstance(content, dict) and "state_dict" in content:
        return released_resnets(path, content["state_dict"])
    if isinstance(content, dict) and "s1_model_weights" in content:
        encoders = {"s1": content["s1_model_weights"], "s2": content["s2_model_weights"]}
        return {**RELEASED, "method": "mma", "encoders": encoders}
    raise CheckpointError(f"{path}: neither a checkpoint of this version nor weights released with the paper")


RELEASED = {"arch": "resnet18", "bands": {"s1": S1_BANDS, "s2": S2_BANDS}, "scale": "patch-max", "stats": None,
            "simulated": False, "heads": {}, "epoch": None, "args": {}}


def released_resnets(path, weights):
    """The authors' D-SimCLR file: backbone1.* is Sentinel-1, backbone2.* Sentinel-2, heads under fc."""
    encoders = {sensor: {key.removeprefix(prefix): value for key, value in weights.items()
                         if key.startswith(prefix) and not key.startswith(f"{prefix}fc.")}
                for sensor, prefix in (("s1", "backbone1."), ("s2", "backbone2."))}
    if not all(encoders.values()):
        raise CheckpointError(f"{path}: no backbone1.* and backbone2.* weights in its state_dict")
    arch = "resnet50" if "layer1.0.conv3.weight" in encoders["s1"] else "resnet18"
    return {**RELEASED, "method": "d-simclr", "arch": arch, "encoders": encoders}


def load_encoders(path):
    """-> (ModuleDict of ready encoders by sensor in eval mode, scaling {"scale", "stats"} for data.to_input, the
    checkpoint's other content). Raises CheckpointError."""
    content = load_checkpoint(path) if not isinstance(path, dict) else path
    encoders = make_encoders(content["method"], content["bands"], content["arch"])
    for name, encoder in encoders.items():
        try:
            encoder.load_state_dict(content["encoders"][name])
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(f"{path}: weights of {name} do not fit {content['arch']}: {error}") from None
    return encoders.eval(), {"scale": content["scale"], "stats": content["stats"]}
