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
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import resnet18, resnet50

# As in data.py, so that each of the two files can be copied alone:
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
    """A checkpoint, or the run that writes it, cannot go on as asked. One line: which, why, and
    the mend."""


def to_input(s1, s2, scale, stats=None, bands=None, s2_offset=0):
    """Patches to network input, on the device where they are. Tensors or arrays.

    s1: (N, c1, h, w) int16 in 1/100 dB, -32768 missing, or float in dB, NaN or infinite missing.
    s2: (N, c2, h, w) reflectance x 10,000 + s2_offset, 1,000 in products of processing baseline
        04.00 (2022) and later, 0 in a store; missing where it is 0 or not finite in all bands that
        are given here.
    bands: {"s1": names, "s2": names} to be checked.
    scale: a key of SCALING. stats, for `standard`: {"s1": {"mean": [dB], "std": [dB]}, "s2": ...}.
    -> two float32 tensors, finite. ValueError for masked arrays, another scale or number of bands.
    """
    if any(hasattr(x, "mask") for x in (s1, s2)):
        raise ValueError("masked arrays: fill them, S1 with NaN or -32768, S2 with 0")
    s1, s2 = (x if torch.is_tensor(x) else torch.tensor(x) for x in (s1, s2))  # arrays: copied
    for sensor, x in {"s1": s1, "s2": s2}.items():
        if bands and x.shape[1] != len(bands[sensor]):
            raise ValueError(f"{sensor}: {x.shape[1]} channels, not {' '.join(bands[sensor])}")
    if not s1.is_floating_point():
        s1 = torch.where(s1 == MISSING, torch.nan, s1 / 100)
    s1 = s1.float()
    missing = ~s1.isfinite()
    s1 = s1.masked_fill(missing, -99)  # below all that is clipped
    s2 = s2.float().nan_to_num(0, posinf=0, neginf=0)
    unseen = (s2 == 0).all(1, keepdim=True)
    s2 = (s2 - s2_offset).clamp(0)
    if scale == "standard":
        s1 = standardise(s1, stats["s1"]).masked_fill(missing, 0)
        return s1, standardise(s2, stats["s2"]).masked_fill(unseen, 0)
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
    numbers = [*range(count), IGNORE]
    return torch.stack([(classes == number).sum((1, 2)) for number in numbers], 1)


def single_label(classes, count=8):
    """(N, h, w) uint8 of `count` classes -> (N,) int64 tensor: the most frequent class (of equals
    the first), or 255 where that is 255."""
    column = class_counts(classes, count).argmax(1)
    return torch.where(column == count, IGNORE, column)


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
    layers = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(True)]
    return nn.Sequential(OrderedDict(layers=nn.Sequential(*layers)))


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
        if width and method != "mma":
            for name, encoder in self.encoders.items():
                d = encoder.features
                self.heads[name] = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, width))

    def forward(self, a, b):
        if self.method == "simclr-rgb":  # one pass, so that batch norm sees both views together
            return self.embed("s2", torch.cat((a, b))).chunk(2)
        return self.embed("s1", a), self.embed("s2", b)

    def embed(self, sensor, x):
        """Network input of a sensor -> its float32 embedding or map."""
        x = self.encoders[sensor](x)
        if self.heads:
            x = self.heads[sensor](x)
        return x.float()

    def loss(self, z1, z2, temperature):
        """Loss of all embeddings of a batch."""
        if self.method == "mma":
            return info_nce(self.similarity(z1, z2), temperature)
        return nt_xent(z1, z2, temperature)

    def similarity(self, z1, z2):
        """(N, N) similarity of embeddings as the loss sees it."""
        if self.method == "mma":
            return mma_similarity(z1, z2)
        return unit(z1) @ unit(z2).T


class Classifier(nn.Module):
    """One linear layer on the features of a method's encoders side by side: network input of both
    sensors -> (N, classes)."""

    def __init__(self, encoders, classes=8):
        super().__init__()
        self.encoders = encoders
        features = sum(encoder.features for encoder in encoders.values())
        self.fc = nn.Linear(features, classes)

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


def autocast(precision, device):
    """Context in which networks run; where that is float32, in full: without TF32."""
    enabled = resolve_precision(precision, device) == "bf16"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = enabled
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def spoilt_gradients(method, crop, precision, device):
    """Why training must be refused, or None: on a CPU torch's bf16 gradient of a 3x3 convolution
    of stride 2 of a map of 1 px, as a ResNet has up to crops of 16 px, is what the memory held."""
    bf16 = resolve_precision(precision, device) == "bf16"
    if torch.device(device).type == "cpu" and bf16 and crop <= 16 and method != "mma":
        return (f"--crop {crop}: on a CPU bf16 gradients of a ResNet are wrong up to 16 px: "
                "choose --precision float32, or more")
    return None


def unit(x):
    """Vectors along dimension 1, scaled to length 1; half precision, which spoils a softmax,
    becomes float32."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def nt_xent(z1, z2, temperature):
    """NT-Xent (Chen et al. 2020) over 2N embeddings, here of two sensors.

    z1, z2: (N, d), of any length; row i of both is one place. Each of the 2N rows picks its
    partner among the 2N - 1 others by cosine similarity / temperature; mean cross-entropy ->
    scalar."""
    z = torch.cat((unit(z1), unit(z2)))
    with torch.autocast(z.device.type, enabled=False):
        logits = z / temperature @ z.T  # (2N, 2N)
    # In place, and unseen by autograd: the gradient of a product does not need its result.
    logits.detach().fill_diagonal_(float("-inf"))
    partner = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(logits, partner)


def mma_similarity(m1, m2):
    """Similarity of feature maps (Windsor et al. 2021) of equal size, which have one shift: cosine
    along the channels, mean over the locations. m1: (N, c, h, w), m2: (M, c, h, w) -> (N, M)."""
    if m1.shape[1:] != m2.shape[1:]:
        raise ValueError(f"maps of {[*m1.shape[1:]]} and {[*m2.shape[1:]]}: crop them alike")
    with torch.autocast(m1.device.type, enabled=False):
        return unit(m1).flatten(1) @ unit(m2).flatten(1).T / math.prod(m1.shape[2:])


def info_nce(similarity, temperature):
    """Symmetric InfoNCE: mean cross-entropy towards the diagonal of similarity / temperature, over
    rows and over columns, mean of both -> scalar. similarity: (N, N)."""
    diagonal = torch.arange(len(similarity), device=similarity.device)
    over_rows = F.cross_entropy(similarity / temperature, diagonal)
    over_columns = F.cross_entropy(similarity.T / temperature, diagonal)
    return (over_rows + over_columns) / 2


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
# classifier of finetune.py has no heads but fc (state_dict), task, crop, run, scores and stored
# (bands of its store). Reading adds its path (file) and hash (checkpoint) and executes no pickle.

# What the weights released with the paper do not say.
RELEASED = {"arch": "resnet18", "bands": {"s1": S1_BANDS, "s2": S2_BANDS}, "classes": CLASSES,
            "scale": "patch-max", "stats": None, "simulated": False, "heads": {}, "args": {}}
# A card has everything else of a checkpoint.
UNTOLD = {"encoders", "heads", "fc", "optimizer", "random", "file", "arch"}
LICENCE = "contains modified Copernicus Sentinel data, which must be named wherever it is used"


def save_checkpoint(path, model, **content):
    """Write a Contrastive model or a Classifier and whatever else its file holds. The file is there
    whole or not at all, and then the one before it is still there. Raises CheckpointError."""
    versions = {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
    content = {"format": CHECKPOINT_FORMAT, **content, "versions": versions}
    for part in ("encoders", "heads"):
        modules = getattr(model, part, {})
        content[part] = {name: module.state_dict() for name, module in modules.items()}
    if isinstance(model, Classifier):
        content["fc"] = model.fc.state_dict()
    buffer = io.BytesIO()  # since torch's own writer does not always name a full disk
    torch.save(content, buffer)
    path = Path(path)
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
    temporary.replace(path)


def load_checkpoint(path):
    """-> the content of a checkpoint of this project, or of the weights released with the paper
    in the same form, on the CPU. path: or what this returned before. Raises CheckpointError."""
    if isinstance(path, dict):
        return path
    content, digest = read_weights(path)
    weights = content.get("state_dict")
    if not isinstance(weights, dict):
        weights = content
    if "backbone1.conv1.weight" in weights:
        content = released_resnets(weights)
    elif weights.keys() >= {"s1_model_weights", "s2_model_weights"}:
        encoders = {"s1": weights["s1_model_weights"], "s2": weights["s2_model_weights"]}
        content = {**RELEASED, "method": "mma", "encoders": encoders}
    elif content.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path}: begins with {next(iter(weights), 'nothing')}: neither a "
                              "checkpoint of this version nor weights released with the paper; "
                              "those of MoCo or DistributedDataParallel (module.) are not taken")
    for key, known in (("method", METHODS), ("arch", ARCHITECTURES), ("scale", SCALING)):
        if content.get(key) not in known:
            raise CheckpointError(f"{path}: {key} {content.get(key)!r} is not one of {[*known]}")
    return {**content, "file": str(path), "checkpoint": digest}


def read_weights(path):
    """-> the dict in a file of torch.save, or an empty one; the hash of the file."""
    try:
        file = Path(path).read_bytes()  # once: a run that goes on may replace it between
        with warnings.catch_warnings():  # an error says enough
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(file), map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; python pretrain.py writes it") from None
    except Exception as error:  # a foreign file can raise anything in the unpickler
        reason = (f"truncated or not a checkpoint ({type(error).__name__}): "
                  "remove it, and its run begins anew")
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"not read, since it would run code: it holds {code[1]}, not only weights"
        raise CheckpointError(f"{path}: {reason}") from error
    return content if isinstance(content, dict) else {}, hashlib.sha256(file).hexdigest()[:12]


def released_resnets(weights):
    """The authors' state_dict of both ResNets -> content of a checkpoint."""
    content = {**RELEASED, "method": "d-simclr", "encoders": {}, "heads": {}}
    if "backbone1.layer1.0.conv3.weight" in weights:
        content["arch"] = "resnet50"
    for sensor, prefix in (("s1", "backbone1."), ("s2", "backbone2.")):
        encoder = {key.removeprefix(prefix): weight for key, weight in weights.items()
                   if key.startswith(prefix)}
        head = {key.removeprefix("fc."): encoder.pop(key) for key in [*encoder]
                if key.startswith("fc.")}
        content["encoders"][sensor] = encoder
        if "2.weight" in head:
            content["heads"][sensor] = head
    return content


def load_weights(module, weights, misfit):
    """Into a module, or CheckpointError: `misfit` and torch's reason, in one line."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{misfit}: {reason}") from None


def load_encoders(checkpoint):
    """-> (ModuleDict of ready encoders by sensor in eval mode, scaling for to_input(s1, s2,
    **scaling)). checkpoint: a path, or load_checkpoint's content. Raises CheckpointError."""
    content = load_checkpoint(checkpoint)
    arch, bands = content["arch"], content["bands"]
    encoders = make_encoders(content["method"], bands, arch)
    for name, encoder in encoders.items():
        misfit = f"{content['file']}: the weights for {name} do not fit {arch} and {bands}"
        load_weights(encoder, content["encoders"].get(name, {}), misfit)
    return encoders.eval(), {key: content[key] for key in ("scale", "stats", "bands")}


def load_contrastive(checkpoint):
    """-> (Contrastive in eval mode, scaling for to_input()). Its embeddings are the features where
    the file has no heads. checkpoint: as for load_encoders(). Raises CheckpointError."""
    content = load_checkpoint(checkpoint)
    heads, width = content["heads"], 0
    if heads.keys() != content["encoders"].keys():  # some released weights lack one
        heads = {}
    for weights in heads.values():
        width = len(weights["2.weight"])
    model = Contrastive(content["method"], content["bands"], content["arch"], width)
    model.encoders, scaling = load_encoders(content)
    for name, weights in heads.items():
        load_weights(model.heads[name], weights, f"{content['file']}: its head for {name} misfits")
    return model.eval(), scaling


def load_classifier(checkpoint):
    """-> (Classifier in eval mode without gradients, scaling for to_input(), class names) of a
    file of `finetune.py --save`. checkpoint: as for load_encoders(). Raises CheckpointError."""
    content = load_checkpoint(checkpoint)
    file, classes = content["file"], content["classes"]
    if "fc" not in content:
        raise CheckpointError(f"{file}: encoders without a classifier: "
                              "`python finetune.py --save DIR` writes one")
    encoders, scaling = load_encoders(content)
    model = Classifier(encoders, len(classes))
    misfit = f"{file}: its last layer does not fit its encoders and {len(classes)} classes"
    load_weights(model.fc, content["fc"], misfit)
    return model.eval().requires_grad_(False), scaling, classes


def export(checkpoint, out):
    """Write each encoder as a plain state_dict, OUT/s1.pt and OUT/s2.pt, or s1+s2.pt, of a
    classifier its last layer, OUT/fc.pt, and OUT/card.json: all that a user must know. -> those."""
    content, out = load_checkpoint(checkpoint), Path(out)
    encoders, _ = load_encoders(content)
    weights = {name: encoder.state_dict() for name, encoder in encoders.items()}
    if "fc" in content:
        weights["fc"] = content["fc"]
    card = {"licence": "of simulated data" if content["simulated"] else LICENCE,
            "units": {"s1": "sigma nought in dB", "s2": "reflectance x 10,000"},
            "network": "models.VGG" if content["method"] == "mma" else content["arch"],
            "inputs": {name: bands_of(content["bands"], name) for name in encoders},
            "scaling": SCALING[content["scale"]]}
    card |= {key: value for key, value in content.items() if key not in UNTOLD}
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
        parser.exit(2, f"models.py: error: {error}\n")
    print(f"wrote {args.out}/card.json, {' '.join(weights)}")


if __name__ == "__main__":
    main()
