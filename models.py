"""Network input, labels, encoders, projection heads, losses, classifier, checkpoints.

    from models import load_encoders, load_classifier, to_input, nt_xent, mma_similarity, info_nce
    encoders, scaling = load_encoders("runs/d-simclr/last.pt")   # {"s1": module, "s2": module}
    classifier, scaling, names = load_classifier("late-fusion_single_1_seed0.pt")
    s1, s2 = to_input(s1, s2, **scaling)
    python models.py export runs/d-simclr/last.pt OUT   # plain torchvision state_dicts and a card

Knows no files but checkpoints. This file can be copied alone; it needs torch and torchvision.
"""
import argparse
import hashlib
import io
import json
import math
import os
import re
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import resnet18, resnet50

S1_BANDS = ["VV", "VH"]
S2_BANDS = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"]
RGB = ["B4", "B3", "B2"]
CLASSES = ["Forest", "Shrubland", "Grassland", "Wetland", "Cropland", "Urban", "Barren", "Water"]
CHECKPOINT_FORMAT = 1
IGNORE = 255  # class of a pixel that is none of the classes; label of a patch that has none
MISSING = -32768  # in S1 as integers

# From sigma nought in dB and reflectance x 10,000 to network input, see to_input().
SCALING = {
    "patch-max": "S1 clipped to -25..0, plus 25; S2 to 0..10000; each channel / (its max + 1e-5)",
    "fixed": "S1 clipped to -25..0, plus 25, / 25; S2 clipped to 0..10000, / 10000",
    "standard": "(value - mean) / std of the band; what is missing becomes 0"}
ARCHITECTURES = {"resnet18": resnet18, "resnet50": resnet50}
# The rows of the tables in the poster's order: what each encoder sees, whether it is pretrained.
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


def to_input(s1, s2, scale, stats=None, bands=None, s2_offset=0):
    """Patches to network input, on the device where they are. Tensors or arrays.

    s1: (N, c1, h, w) int16 in 1/100 dB, -32768 missing, or float in dB, NaN or infinite missing.
    s2: (N, c2, h, w) reflectance x 10,000 + s2_offset, 1,000 in products of processing baseline
        04.00 (2022) and later, 0 in a store; missing where it is 0 or not finite in all bands.
    bands: {"s1": names, "s2": names} to be checked.
    scale: a key of SCALING. stats, for `standard`: {"s1": {"mean": [dB], "std": [dB]}, "s2": ...}.
    -> two float32 tensors, finite for any input. ValueError for other bands or an unknown scale.
    """
    s1, s2 = (x if torch.is_tensor(x) else torch.tensor(x) for x in (s1, s2))  # arrays: copied
    for sensor, x in (("s1", s1), ("s2", s2)) if bands else ():
        if x.shape[1] != len(bands[sensor]):
            raise ValueError(f"{sensor}: {x.shape[1]} channels, not {' '.join(bands[sensor])}")
    missing = ~s1.isfinite() if s1.is_floating_point() else s1 == MISSING
    s1 = (s1 if s1.is_floating_point() else s1 / 100).float().masked_fill(missing, -99)
    s2 = s2.float().nan_to_num(0, posinf=0, neginf=0)
    unseen = (s2 == 0).all(1, keepdim=True)
    s2 = (s2 - s2_offset).clamp(0)
    if scale == "standard":
        s1, s2 = standardise(s1, stats["s1"]), standardise(s2, stats["s2"])
        return s1.masked_fill(missing, 0), s2.masked_fill(unseen, 0)
    s1, s2 = s1.clamp(-25, 0) + 25, s2.clamp(max=10_000)
    if scale == "fixed":
        return s1 / 25, s2 / 10_000
    if scale == "patch-max":
        return tuple(x / (x.amax((2, 3), keepdim=True) + 1e-5) for x in (s1, s2))
    raise ValueError(f"scale {scale!r}: it is one of {', '.join(SCALING)}")


def standardise(x, stats):
    """(N, c, h, w) float -> mean 0, variance 1 per channel; one that never varies is centred."""
    numbers = torch.tensor([stats["mean"], stats["std"]], dtype=torch.float32)
    mean, std = numbers.to(x.device, non_blocking=True)[..., None, None]
    return (x - mean) / torch.where(std > 1e-6, std, 1)


def class_counts(classes, count):
    """(N, h, w) classes -> (N, count + 1) int64 pixels per class, the last column for 255."""
    classes = torch.as_tensor(classes)
    return torch.stack([(classes == c).sum((1, 2)) for c in (*range(count), IGNORE)], 1)


def single_label(classes, count=8):
    """(N, h, w) uint8 of `count` classes -> (N,) int64 tensor: the most frequent class (of equals
    the first), or 255 where that is 255."""
    label = class_counts(classes, count).argmax(1)
    return torch.where(label == count, IGNORE, label)


def multi_label(classes, count=8):
    """(N, h, w) uint8 of `count` classes -> (N, count) float32 tensor: 1 for each class on at least
    10 % of all pixels, the unlabelled ones counted in."""
    needed = 0.1 * math.prod(classes.shape[1:]) - 1e-6
    return (class_counts(classes, count)[:, :count] >= needed).float()


def resnet(arch, bands):
    """torchvision's network with random weights: (N, bands, h, w) -> (N, 512), resnet50 2048."""
    network = ARCHITECTURES[arch](weights=None)
    network.conv1 = nn.Conv2d(bands, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as there
    network.features = network.fc.in_features
    network.fc = nn.Identity()
    return network


def vgg_block(inputs, outputs):
    """Two of (3x3 convolution, batch norm, ReLU), named as in the released weights."""
    layers = nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))
    return nn.Sequential(OrderedDict(layers=layers))


class VGG(nn.Sequential):
    """Encoder of MMA (after Windsor et al. 2021): (N, bands, h, w) -> map (N, 256, h/8, w/8)."""
    features = 256

    def __init__(self, bands):
        super().__init__(OrderedDict(
            convs1=vgg_block(bands, 64), pool1=nn.MaxPool2d(2),
            convs2=vgg_block(64, 128), pool2=nn.MaxPool2d(2),
            convs3=vgg_block(128, 256), pool3=nn.MaxPool2d(2),
            convs4=vgg_block(256, 256)))


def bands_of(bands, name):
    """Names of the bands that an encoder takes: `s1`, `s2`, or `s1+s2` for both stacked.
    bands: {"s1": names, "s2": names}, as data.Patches.bands."""
    return [band for sensor in name.split("+") for band in bands[sensor]]


def make_encoders(method, bands, arch="resnet18"):
    """-> ModuleDict of a method's encoders by input, see bands_of()."""
    encoders = nn.ModuleDict()
    for name in METHODS[method]["inputs"]:
        count = len(bands_of(bands, name))
        encoders[name] = VGG(count) if method == "mma" else resnet(arch, count)
    return encoders


def joined_features(encoders, s1, s2):
    """Network input of both sensors -> features of the encoders side by side, (N, D); maps are
    averaged over space."""
    inputs = {"s1": s1, "s2": s2}
    if "s1+s2" in encoders:
        inputs["s1+s2"] = torch.cat((s1, s2), 1)
    outputs = [encoder(inputs[name]) for name, encoder in encoders.items()]
    return torch.cat([x.mean((2, 3)) if x.dim() == 4 else x for x in outputs], 1)


class Contrastive(nn.Module):
    """A method's encoders with their projection heads, 512 -> 512 -> width (0: none); MMA compares
    maps and has none. forward: two network inputs, of the sensors or for SimCLR (RGB) two views of
    one image -> two float32 embeddings (N, width), or maps (N, 256, h/8, w/8), to be compared."""

    def __init__(self, method, bands, arch="resnet18", width=128):
        super().__init__()
        self.method = method
        self.encoders = make_encoders(method, bands, arch)
        self.heads = nn.ModuleDict()
        for name, encoder in self.encoders.items() if width and method != "mma" else ():
            d = encoder.features
            self.heads[name] = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, width))

    def forward(self, a, b):
        if self.method == "simclr-rgb":  # one pass, so that batch norm sees both views together
            both = self.encoders["s2"](torch.cat((a, b)))
            return self.heads["s2"](both).float().chunk(2)
        a, b = self.encoders["s1"](a), self.encoders["s2"](b)
        if self.heads:
            a, b = self.heads["s1"](a), self.heads["s2"](b)
        return a.float(), b.float()

    def loss(self, a, b, temperature, first=0, n=None):
        """Loss of the n places from `first` on (default: of all) among the embeddings of all N."""
        if self.method != "mma":
            return nt_xent(a, b, temperature, first, n)
        rows = self.similarity(a[first:][:n], b)
        columns = None if len(rows) == len(b) else self.similarity(b[first:][:n], a)
        return info_nce(rows, temperature, columns, first)

    def similarity(self, a, b):
        """(N, N) similarity of embeddings as the loss sees it."""
        return mma_similarity(a, b) if self.method == "mma" else unit(a) @ unit(b).T


class Classifier(nn.Module):
    """One linear layer on the features of a method's encoders side by side: network input of both
    sensors -> (N, classes)."""

    def __init__(self, encoders, classes=8):
        super().__init__()
        self.encoders = encoders
        self.fc = nn.Linear(sum(encoder.features for encoder in encoders.values()), classes)

    def forward(self, s1, s2):
        return self.fc(joined_features(self.encoders, s1, s2))


def resolve_precision(precision, device):
    """`auto` -> `bf16` where the device computes in it natively, else `float32`."""
    if precision != "auto":
        return precision
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "float32"


def spoils_gradients(method, crop, precision, device):
    """Whether training must be refused: on a CPU torch's bf16 gradient of a 3x3 convolution with
    stride 2 of a map of 1 px, as a ResNet has up to crops of 16 px, is what the memory held."""
    bf16 = resolve_precision(precision, device) == "bf16"
    return bf16 and torch.device(device).type == "cpu" and crop <= 16 and method != "mma"


def autocast(precision, device):
    """Context in which networks run."""
    enabled = resolve_precision(precision, device) == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def unit(x):
    """Vectors along dimension 1, scaled to length 1; half precision, which spoils a softmax,
    becomes float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def nt_xent(z1, z2, temperature, first=0, n=None):
    """NT-Xent (Chen et al. 2020) over 2N embeddings, here of two sensors.

    z1, z2: (N, d), of any length; row i of both is one place. Each of the 2N rows picks its
    partner among the 2N - 1 others by cosine similarity / temperature; mean cross-entropy ->
    scalar. first, n: as one of several processes, only the rows of the n places from `first` on."""
    places, n = len(z1), len(z1) if n is None else n
    z = torch.cat((unit(z1), unit(z2)))
    left = torch.arange(first, first + n, device=z.device)
    anchor = torch.cat((left, left + places))
    partner = torch.cat((left + places, left))
    with torch.autocast(z.device.type, enabled=False):
        logits = (z if n == places else z[anchor]) / temperature @ z.T  # (2n, 2N)
    logits.detach().scatter_(1, anchor[:, None], float("-inf"))  # off the graph: no gradient
    return F.cross_entropy(logits, partner)


def mma_similarity(m1, m2):
    """Similarity of feature maps (Windsor et al. 2021) of equal size, which have one shift: cosine
    along the channels, mean over the locations. m1: (N, c, h, w), m2: (M, c, h, w) -> (N, M)."""
    with torch.autocast(m1.device.type, enabled=False):
        return unit(m1).flatten(1) @ unit(m2).flatten(1).T / math.prod(m1.shape[2:])


def info_nce(similarity, temperature, columns=None, first=0):
    """Symmetric InfoNCE: mean cross-entropy towards the diagonal of similarity / temperature, over
    rows and over columns, mean of both -> scalar. similarity: (N, N); in one of several processes
    its rows from `first` on, (n, N), and `columns`, (n, N), the same columns transposed."""
    target = torch.arange(first, first + len(similarity), device=similarity.device)
    columns = similarity.T if columns is None else columns
    loss = F.cross_entropy(similarity / temperature, target)
    return (loss + F.cross_entropy(columns / temperature, target)) / 2


@torch.no_grad()
def retrieval(similarity):
    """(N, N) similarity of queries to candidates, the right one on the diagonal -> {"top1",
    "top5": shares found there, "median": rank of the right one, 1 is best}. Of equals the right
    one counts as last, and NaN is never found, so a collapsed encoder scores nothing."""
    worse = similarity < similarity.diagonal()[:, None]
    rank = len(similarity) - worse.sum(1).float()
    return {"top1": (rank <= 1).float().mean().item(),
            "top5": (rank <= 5).float().mean().item(),
            "median": rank.quantile(0.5).item()}


# A checkpoint is a dict: format, method, arch, bands {"s1", "s2": names in order}, classes (names),
# scale, stats {"s1", "s2": {"mean", "std"}}, simulated, args, encoders and heads {"s1", "s2":
# state_dict}, versions; from pretrain.py also epoch, step, optimizer, random, retrieval, data; a
# classifier of finetune.py has no heads but fc (state_dict), task, crop, run and scores. No pickle
# in a file is ever executed.

# What the weights released with the paper do not say.
RELEASED = {"arch": "resnet18", "bands": {"s1": S1_BANDS, "s2": S2_BANDS}, "classes": CLASSES,
            "scale": "patch-max", "stats": None, "simulated": False, "heads": {}, "args": {}}


def save_checkpoint(path, model, **content):
    """Write a Contrastive model or a Classifier and whatever else its file holds. The file is there
    whole or not at all; that of a Contrastive before it is kept as `previous.pt`, so that one of
    the two always is. Raises CheckpointError."""
    path, classifies = Path(path), isinstance(model, Classifier)
    versions = {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
    content = {"format": CHECKPOINT_FORMAT, **content, "versions": versions}
    for part in ("encoders", "heads"):
        modules = getattr(model, part, {})
        content[part] = {name: module.state_dict() for name, module in modules.items()}
    if classifies:
        content["fc"] = model.fc.state_dict()
    buffer = io.BytesIO()  # since torch's own writer does not always name a full disk
    torch.save(content, buffer)
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); the one before it is "
                              "kept. Free space and start the same command again") from None
    if path.exists() and not classifies:
        path.replace(path.with_name("previous.pt"))
    temporary.replace(path)


def load_checkpoint(path):
    """-> the content of a checkpoint of this project, or of the weights released with the paper
    in the same form, on the CPU. Raises CheckpointError."""
    content = read_weights(path)
    weights = content.get("state_dict")
    weights = weights if isinstance(weights, dict) else content
    if any(str(key).startswith("backbone1.") for key in weights):
        content = released_resnets(weights)
    elif "s1_model_weights" in content and "s2_model_weights" in content:
        encoders = {"s1": content["s1_model_weights"], "s2": content["s2_model_weights"]}
        content = {**RELEASED, "method": "mma", "encoders": encoders}
    elif content.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path}: begins with {next(iter(weights), 'nothing')}: neither a "
                              "checkpoint of this version nor weights released with the paper; "
                              "those of MoCo or DistributedDataParallel (module.) are not taken")
    for key, known in (("method", METHODS), ("arch", ARCHITECTURES), ("scale", SCALING)):
        if content.get(key) not in known:
            raise CheckpointError(f"{path}: {key} {content.get(key)!r} is not one of {[*known]}")
    return {**content, "file": str(path)}


def read_weights(path):
    """-> the dict in a file of torch.save, an empty one where it holds something else."""
    try:
        with warnings.catch_warnings():  # an error says enough
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; python pretrain.py writes it") from None
    except Exception as error:  # a foreign file can raise anything in the unpickler
        reason = (f"truncated or not a checkpoint ({type(error).__name__}): "
                  "remove it, and a run goes on from previous.pt")
        if needs := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"not read, since it would run code: it holds {needs[1]}, not only weights"
        raise CheckpointError(f"{path}: {reason}") from error
    return content if isinstance(content, dict) else {}


def released_resnets(weights):
    """The authors' state_dict of both ResNets -> content of a checkpoint."""
    content = {**RELEASED, "method": "d-simclr", "encoders": {}, "heads": {}}
    for sensor, prefix in (("s1", "backbone1."), ("s2", "backbone2.")):
        keys = [key.removeprefix(prefix) for key in weights if key.startswith(prefix)]
        network = {key: weights[prefix + key] for key in keys}
        head = {key.removeprefix("fc."): network.pop(key) for key in keys if key.startswith("fc.")}
        content["encoders"][sensor] = network
        if "2.weight" in head:
            content["heads"][sensor] = head
    if "layer1.0.conv3.weight" in network:
        content["arch"] = "resnet50"
    return content


def load_encoders(checkpoint):
    """-> (ModuleDict of ready encoders by sensor in eval mode, scaling for to_input(s1, s2,
    **scaling)). checkpoint: a path, or load_checkpoint's content. Raises CheckpointError."""
    content = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
    encoders = make_encoders(content["method"], content["bands"], content["arch"])
    for name, encoder in encoders.items():
        try:
            encoder.load_state_dict(content["encoders"].get(name, {}))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{content['file']}: the weights for {name} do not fit "
                                  f"{content['arch']} and {content['bands']}: {reason}") from None
    return encoders.eval(), {key: content[key] for key in ("scale", "stats", "bands")}


def load_classifier(checkpoint):
    """-> (Classifier in eval mode without gradients, scaling for to_input(), class names) of a
    file of `finetune.py --save`. checkpoint: as for load_encoders(). Raises CheckpointError."""
    content = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
    if "fc" not in content:
        raise CheckpointError(f"{content['file']}: encoders without a classifier: "
                              "`python finetune.py --save DIR` writes one")
    encoders, scaling = load_encoders(content)
    model = Classifier(encoders, len(content["classes"]))
    try:
        model.fc.load_state_dict(content["fc"])
    except (RuntimeError, TypeError):
        raise CheckpointError(f"{content['file']}: its last layer does not fit its encoders and "
                              f"{len(content['classes'])} classes") from None
    return model.eval().requires_grad_(False), scaling, content["classes"]


def export(checkpoint, out):
    """Write each encoder as a plain state_dict, OUT/s1.pt and OUT/s2.pt, of a classifier its last
    layer, OUT/fc.pt, and OUT/card.json: all that a user must know. -> the state_dicts."""
    content, out = load_checkpoint(checkpoint), Path(out)
    encoders, _ = load_encoders(content)
    weights = {name: encoder.state_dict() for name, encoder in encoders.items()}
    if "fc" in content:
        weights["fc"] = content["fc"]
    card = {"checkpoint": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()[:12],
            "licence": "of simulated data" if content["simulated"] else
            "contains modified Copernicus Sentinel data, which must be named wherever it is used",
            "units": {"s1": "sigma nought in dB", "s2": "reflectance x 10,000"},
            "network": "models.VGG" if content["method"] == "mma" else content["arch"],
            "inputs": {name: bands_of(content["bands"], name) for name in encoders},
            "scaling": SCALING[content["scale"]]}
    weighty = {"encoders", "heads", "fc", "optimizer", "random", "file", "arch"}
    card |= {key: value for key, value in content.items() if key not in weighty}
    out.mkdir(parents=True, exist_ok=True)
    for name, state in weights.items():
        torch.save(state, out / f"{name}.pt")
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    return weights


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("checkpoint", help="last.pt of a run, or the file released with the paper")
    parser.add_argument("out", help="folder to write")
    args = parser.parse_args()
    try:
        weights = export(args.checkpoint, args.out)
    except (CheckpointError, OSError) as error:
        print(f"models.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.out}/card.json, {' '.join(weights)}")


if __name__ == "__main__":
    main()
