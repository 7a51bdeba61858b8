"""Linear probe of frozen encoders, the metrics, embeddings, and a picture of retrieval.

    python linear_eval.py --checkpoint runs/d-simclr/last.pt --data STORE --task single multi
    python linear_eval.py --checkpoint C --data STORE --sensors s1      # one satellite is missing
    python linear_eval.py --baseline random --method mma --data STORE   # never trained
    python linear_eval.py --checkpoint C --data STORE --embed OUT.npz   # embeddings of all patches
    python linear_eval.py --checkpoint C --data STORE --retrieve OUT.png

The encoders run once over the crops that cover each patch. A logistic regression on their features
is fitted to convergence, its penalty chosen by cross-validation; trained on are the splits `train`
and `validation`, tested on is `test`. A finished run is one line of results.jsonl and is not
repeated; `python finetune.py --report results` makes the tables.
"""
import argparse
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

import data
import models

TITLES = {name: row["title"] for name, row in models.METHODS.items()}
PENALTIES = 10.0 ** np.arange(1, -6, -1)


def single_scores(true, predicted, count=8):
    """Arrays (N,) of true classes and predictions -> {"class": (count,) accuracy per class, NaN
    where it does not occur, "average": mean of the others, "overall": accuracy of all samples,
    "confusion": (count, count) samples, rows the true class}."""
    confusion = np.zeros((count, count), int)
    np.add.at(confusion, (true, predicted), 1)
    right, total = confusion.diagonal(), confusion.sum(1)
    accuracy = np.where(total, right / np.maximum(total, 1), np.nan)
    return {"class": accuracy, "average": np.nanmean(accuracy),
            "overall": right.sum() / max(total.sum(), 1), "confusion": confusion}


def multi_scores(true, predicted):
    """Arrays (N, C) of true and predicted 0/1 -> {"class": (C,) F1 per class, NaN where it does not
    occur, "average": mean of the others, "overall": F1 of the pooled hits and errors}."""
    true, predicted = true > 0.5, predicted > 0.5
    hits, marked = 2 * (true & predicted).sum(0), true.sum(0) + predicted.sum(0)
    f1 = np.where(true.any(0), hits / np.maximum(marked, 1), np.nan)
    return {"class": f1, "average": np.nanmean(f1), "overall": hits.sum() / max(marked.sum(), 1)}


def score(task, true, logits):
    """(N, C) true 0/1 and logits -> scores. Of several labels those above 0.5 are predicted."""
    if task == "multi":
        return multi_scores(true, logits > 0)
    return single_scores(true.argmax(1), logits.argmax(1), logits.shape[1])


def repeats(labels):
    """How often a patch of each row is repeated to balance the classes, as published:
    floor(1.03 * patches of the largest class / patches of its class)."""
    count = np.bincount(labels)
    return np.floor(1.03 * count.max() / count[labels]).astype(int)


def training_rows(labels, fraction, seed, sampling="patches"):
    """Rows to train on, repeated to balance the classes, of labels (N,), 255 for none. sampling
    `patches`: of each class the first round(fraction * n), at least one, in an order of the seed,
    so that small fractions lie in large ones; `rows`: of the repeated list, as published."""
    rng, rows = np.random.default_rng(seed), np.flatnonzero(labels != data.IGNORE)
    if sampling == "rows":
        repeated = np.repeat(rows, repeats(labels[rows]))
        return np.sort(rng.permutation(repeated)[:max(1, round(fraction * len(repeated)))])
    chosen = []
    for label in np.unique(labels[rows]):
        order = rng.permutation(rows[labels[rows] == label])
        chosen.append(order[:max(1, round(fraction * len(order)))])
    chosen = np.sort(np.concatenate(chosen))
    return np.repeat(chosen, repeats(labels[chosen]))


class Results:
    """Folder with results.jsonl, one JSON line per finished run; several processes may add to it
    at a time. The part of a line that is known before the run is its key."""

    def __init__(self, folder):
        self.path = Path(folder) / "results.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def read(self):
        lines, text = [], self.path.read_text(errors="replace") if self.path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # empty, cut off by a kill, NULs by a power cut
                lines.append(json.loads(line))
        return lines

    def has(self, key):
        return any(key.items() <= line.items() for line in self.read())

    def add(self, key, scores, **more):
        """A class that does not occur is null in the file."""
        scores = {name: np.round(values, 6).tolist() for name, values in scores.items()}
        scores["class"] = [None if math.isnan(value) else value for value in scores["class"]]
        with open(self.path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not self.has(key):  # else another process was faster
                file.write("\n" + json.dumps({**key, **scores, **more}))
        tqdm.write(f"{TITLES[key['method']]}, {key['protocol']}, {key['task']}-label, "
                   f"{100 * key['label_fraction']:g} % of labels, seed {key['seed']}: "
                   f"average {scores['average']:.1%}, overall {scores['overall']:.1%}")


def make_encoders(args, content, patches, seed):
    """-> a method's encoders: of a checkpoint's content if there is one, else made by the seed."""
    torch.manual_seed(seed)
    encoders = models.make_encoders(args.method, patches.bands, args.arch)
    return models.load_encoders(content)[0] if content else encoders


def frozen_network(args, content, patches, seed=0):
    """Encoders of the checkpoint's content or of --baseline, those of --sensors -> function of both
    network inputs that gives their features side by side, (N, D)."""
    encoders = make_encoders(args, content, patches, seed).eval()
    encoders.to(args.device, memory_format=torch.channels_last)
    if args.baseline == "bands":  # (N, c, h, w) -> (N, 2c), standard deviation and mean of each
        encoders = dict.fromkeys(encoders, lambda x: torch.cat(torch.std_mean(x, (2, 3)), 1))
    used = {name: encoder for name, encoder in encoders.items() if args.sensors in ("both", name)}
    if not used:
        raise data.DataError(f"--sensors {args.sensors}: {args.method} has no such encoder")
    return lambda s1, s2: models.joined_features(used, s1, s2)


@torch.no_grad()
def extract(network, scaling, patches, rows, args, middle=False):
    """Run a network over crops of the patches `rows`, patch by patch: those that cover them, or the
    middle one. -> {"x": its output, (n, D) float32, "row": (n,) the crop's patch}, and where
    there are class maps the crop's labels, "single" and "multi", (n, C) 0/1, all 0 for none.
    DataError where x is not finite."""
    batches = data.grid_crops(rows, patches.size, args.crop, args.batch_size, middle)
    feed = data.loader(patches, batches, args.crop, args.device, args.threads,
                       classes=patches.labels is not None)
    crops, count = defaultdict(list), len(patches.classes)
    for s1, s2, classes, row in tqdm(feed, "over all crops", len(batches), leave=False, delay=1):
        inputs = models.to_input(s1, s2, **scaling)
        with models.autocast(args.precision, args.device):
            crops["x"].append(network(*inputs).float())
        crops["row"].append(torch.from_numpy(row))
        if classes is not None:
            single = F.one_hot(models.single_label(classes, count), data.IGNORE + 1)
            crops["single"].append(single[:, :count].float())
            crops["multi"].append(models.multi_label(classes, count=count))
    # The host waits for the device only here.
    crops = {name: torch.cat(values).cpu().numpy() for name, values in crops.items()}
    if not np.isfinite(crops["x"]).all():
        raise data.DataError(f"{args.checkpoint or args.method}: values that are not finite on the "
                             f"crops of {args.data}: try --precision float32, or a lower --lr")
    return crops


def fit(task, x, y, weight, penalty, start=None, tolerance=2e-7, iterations=2000):
    """K logistic regressions at once, by L-BFGS -> weights (D, K, C), biases (K, C) for predict().
    task: `single`, multinomial, or `multi`, one-vs-rest. x: (n, D). y: (n, C) 0/1. weight: (K, n),
    of each sample in each of the K. Each minimises the weighted mean of the cross-entropy (summed
    over classes) + penalty / 2 * |weights|^2; scikit-learn's C is 1 / (penalty * weight.sum()).
    start: the weights and biases of another penalty."""
    y, used = y.to(x), (weight > 0).to(x)
    occurs, total = used @ y, used.sum(1, keepdim=True)  # (K, C) samples of each class, and of all
    # What none or all have is not fitted but sure: e^-1000 is 0; infinite times zero would be NaN.
    sure = 1e3 * ((occurs == total).to(x) - (occurs == 0).to(x))
    weight = weight / weight.sum(1, keepdim=True)
    # About curvature^-1/2, for few steps:
    scale = (0.03 * weight.mean(0) @ x.square() + penalty).rsqrt()[:, None, None]
    w, b = start or (x.new_zeros(x.shape[1], *occurs.shape), sure)
    v, c = (w / scale).requires_grad_(), ((b - sure) / 10).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [v, c], max_iter=iterations, max_eval=2 * iterations, tolerance_grad=1e3 * tolerance,
        tolerance_change=1e-12, history_size=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        w = scale * v
        logits = predict(x, w, 10 * c + sure)  # (n, K, C)
        normaliser = logits.logsumexp(2) if task == "single" else F.softplus(logits).sum(2)
        loss = ((normaliser - (logits * y[:, None]).sum(2)) * weight.T).sum()
        loss = 1e3 * (loss + penalty / 2 * w.square().sum())  # torch forgets tiny steps
        loss.backward()
        return loss

    optimizer.step(closure)
    return (scale * v).detach(), 10 * c.detach() + sure


def predict(x, w, b):
    """(n, D) features, weights (D, K, C), biases (K, C) -> (n, K, C) logits."""
    return (x @ w.flatten(1)).view(len(x), *b.shape) + b


def principal_axes(x):
    """(n, D) -> (D, min(n, D)) orthonormal axes of the samples. A penalty on |weights| does not
    notice a rotation, but L-BFGS does: with variances apart it needs a fraction of the steps."""
    basis = torch.linalg.qr(x.T).Q if len(x) < x.shape[1] else torch.eye(x.shape[1]).to(x)
    x = x @ basis
    return basis @ torch.linalg.eigh(x.T @ x).eigenvectors


def folds(rows, labels, count, seed):
    """(n,) patch of each crop, labels of all patches -> (n,) fold of each crop: the patches of each
    class dealt out in turn, all crops of a patch into one fold."""
    order = np.random.default_rng(seed).permutation(np.unique(rows))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), int)
    fold[order] = np.arange(len(order)) % count
    return fold[rows]


def choose_penalty(task, x, y, weight, rows, labels, seed):
    """Penalty with the best average score over five folds of the training patches, of equals the
    strongest; where all are equal, as with one patch of each class, the middle one."""
    fold = folds(rows, labels, min(5, len(np.unique(rows))), seed)
    if not fold.any():  # a single patch
        return 1.0
    inside = [weight * torch.from_numpy(fold != k).to(weight) for k in range(fold.max() + 1)]
    model, scores = None, []
    for penalty in PENALTIES:  # from strong to weak, each starting where the one before ended
        model = fit(task, x, y, torch.stack(inside), penalty, model, tolerance=1e-3, iterations=50)
        held_out = predict(x, *model).cpu().numpy()[np.arange(len(x)), fold]
        scores.append(score(task, y.cpu().numpy(), held_out)["average"])
    best = np.argmax(scores) if min(scores) < max(scores) else len(PENALTIES) // 2
    return float(PENALTIES[best])


def probe(task, train, test, chosen, labels, seed, device="cpu"):
    """Learn from the training crops of the patches `chosen` (repeats are weights), predict the test
    crops, both as extract() gives them. labels: of all patches -> (scores, what else to report)."""
    times = np.bincount(chosen, minlength=len(labels))[train["row"]]
    used, tested = (times > 0) & train[task].any(1), test[task].any(1)
    true, rows = test[task][tested], train["row"][used]
    arrays = train["x"][used], train[task][used], test["x"][tested], np.float32(times[used])
    x, y, queries, weight = (torch.from_numpy(array).to(device) for array in arrays)
    counts = {"train_patches": len(set(chosen)), "train_crops": len(x), "test_crops": len(true)}
    sd, mean = torch.std_mean(x, 0, correction=0)
    sd[sd <= 1e-6 * mean.abs() + 1e-12] = math.inf  # such a feature says nothing
    axes = principal_axes((x - mean) / sd)
    x, queries = (x - mean) / sd @ axes, (queries - mean) / sd
    counts["penalty"] = choose_penalty(task, x, y, weight, rows, labels, seed)
    model = fit(task, x.double(), y, weight[None].double(), counts["penalty"])
    logits = predict(queries.double() @ axes.double(), *model)[:, 0]
    return score(task, true, logits.cpu().numpy()), counts


def evaluate(args, content):
    """Probe frozen encoders: a result line per seed, task and label fraction."""
    patches, train_rows, test_rows, scaling = open_labelled(args, content)
    results, labels, crops = Results(args.results), patches.labels, {}
    fixed = {"protocol": "linear", "baseline": args.baseline, "sensors": args.sensors,
             **describe(args, content, patches)}
    runs = list(itertools.product(range(args.seeds), args.task, args.label_fraction))
    for seed, task, fraction in tqdm(runs, "probes", leave=False, delay=1):
        key = {**fixed, "task": task, "label_fraction": fraction, "seed": seed}
        if results.has(key):
            continue
        weights = seed if args.baseline == "random" else 0
        if weights not in crops:  # of one network at a time
            network = frozen_network(args, content, patches, weights)
            crops = {weights: [extract(network, scaling, patches, rows, args)
                               for rows in (train_rows, test_rows)]}
        chosen = training_rows(labels[train_rows], fraction, seed, args.label_sampling)
        scores, counts = probe(
            task, *crops[weights], train_rows[chosen], labels, seed, args.device)
        results.add(key, scores, counts=counts)


def embed(args, content):
    """--embed: each sensor's embedding of every patch, the mean over the crops that cover it."""
    patches = open_patches(args, content)
    _, scaling = models.load_encoders(content)
    network = frozen_network(args, content, patches)
    x = extract(network, scaling, patches, patches.rows, args)["x"]
    x = x.reshape(len(patches.rows), -1, x.shape[1]).mean(1)  # (patches, crops of each, D)
    arrays = {"ids": np.array(patches.ids)[patches.rows], "simulated": patches.simulated}
    if patches.labels is not None:
        arrays |= {"labels": patches.labels[patches.rows], "classes": patches.classes}
    sensors = [name for name in content["encoders"] if args.sensors in ("both", name)]
    for sensor, embedding in zip(sensors, np.split(x, len(sensors), axis=1)):
        arrays |= {sensor: embedding, f"{sensor}_bands": models.bands_of(patches.bands, sensor)}
    with open(f"{args.embed}.tmp", "wb") as file:
        np.savez(file, **arrays)
    Path(f"{args.embed}.tmp").replace(args.embed)
    print(f"wrote {args.embed}: {len(x)} patches, {x.shape[1]} numbers of {' and '.join(sensors)}")


def contrastive_model(content):
    """-> Contrastive of a checkpoint, its scaling."""
    heads = content["heads"] if len(content["heads"]) == 2 else {}  # some released weights lack one
    width = len(heads["s1"]["2.weight"]) if heads else 0  # then the features are compared
    model = models.Contrastive(content["method"], content["bands"], content["arch"], width)
    model.encoders, scaling = models.load_encoders(content)
    for name, weights in heads.items():
        model.heads[name].load_state_dict(weights)
    return model.eval(), scaling


def retrieve(args, content):
    """--retrieve: who finds whom, by the centre crops of at most 1,000 patches that pretraining did
    not see: of the split `test` or, in its data, of the held-out scenes."""
    if models.METHODS[args.method]["inputs"] != ("s1", "s2"):
        raise data.DataError(f"{args.checkpoint}: --retrieve: {args.method} lacks a sensor")
    patches, pretraining = open_patches(args, content), content["args"]
    share = pretraining["holdout"] if pretraining.get("data") == patches.identity else 0
    _, rows = data.split_scenes(patches, share)
    if not len(rows):
        raise data.DataError(f"{args.data}: --retrieve needs patches that pretraining did not see: "
                             "a split `test`, or its very data and --holdout above 0 there")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int)]
    model, scaling = contrastive_model(content)
    model.to(args.device)
    x = extract(lambda s1, s2: torch.stack(model(s1, s2), 1), scaling, patches, rows, args,
                middle=True)["x"]  # (N, 2, 128), or maps (N, 2, 256, h/8, w/8)
    similarity = model.similarity(*torch.from_numpy(x).unbind(1))
    found = models.retrieval(similarity)
    result = (f"{TITLES[args.method]}: {len(rows)} held-out candidates, top-1 {found['top1']:.0%}, "
              f"top-5 {found['top5']:.0%}, median rank {found['median']:g}")
    result = "SIMULATED data, " * patches.simulated + result
    nearest = similarity.topk(min(5, len(rows)), 1).indices.numpy()
    draw_retrieval(args, rows, nearest, result)
    print(f"wrote {args.retrieve}: {result}")


def draw_retrieval(args, rows, nearest, title):
    """Write a picture of a dozen Sentinel-1 patches, below each the Sentinel-2 patches nearest to
    it, the right one framed. nearest: (N, 5) places in rows."""
    patches = data.Patches(args.data)  # all bands: the encoders may see none that are colours
    queries = np.unique(np.linspace(0, len(rows) - 1, 12).astype(int))
    shown = np.column_stack((queries, nearest[queries]))  # (12, 6): the query, those nearest to it
    batches = data.grid_crops(rows[shown.ravel()], patches.size, args.crop, shown.size, middle=True)
    (s1, s2, *_), = data.loader(patches, batches, args.crop)
    pictures, colours = composite(s2.numpy(), patches.bands["s2"])
    figure = Figure((13.8, 7.6), layout="constrained")
    axes = figure.subplots(*shown.T.shape, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for k, (column, line) in enumerate(np.ndindex(shown.shape)):
        axis = axes[line, column]
        axis.imshow(pictures[k] if line else s1[k, 0].numpy(), "gray", vmin=-2500, vmax=0)
        if line and shown[column, line] == queries[column]:
            axis.spines[:].set(color="#00c853", linewidth=4)
    figure.suptitle(f"{title}\n{patches.bands['s1'][0]} of Sentinel-1; below it the nearest of "
                    f"Sentinel-2, {colours}, the right one framed", fontsize=10)
    figure.savefig(args.retrieve, format="png", dpi=110)


def composite(s2, bands):
    """S2 (..., c, h, w) of the named bands -> picture (..., h, w, 3) in 0..1, and its title: true
    colour where B4, B3, B2 are there, else the first three bands as false colour."""
    shown, white, title = ["B4", "B3", "B2"], 3000, "true colour"
    if not set(shown) <= set(bands):
        shown = (bands * 3)[:3]
        white, title = np.percentile(s2, 98) + 1, f"false colour {' '.join(shown)}"
    picture = np.stack([s2[..., bands.index(band), :, :] for band in shown], -1)
    return np.clip(picture / white, 0, 1), title


def evaluation_parser(description):
    """-> parser with the options that linear_eval.py and finetune.py have in common."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="pretrained: it decides --method, --arch, --scale and --bands")
    add("--method", choices=TITLES, default="d-simclr", help="default %(default)s")
    add("--arch", choices=models.ARCHITECTURES, default="resnet18", help="of all but mma")
    add("--data", default="datasets/dfc2020", help="store with class maps (default %(default)s)")
    add("--task", nargs="+", default=["single"], choices=("single", "multi"))
    add("--label-fraction", type=float, nargs="+", default=[1.0], help="e.g. 0.01 0.1 1")
    add("--label-sampling", default="patches", choices=("patches", "rows"), help="rows: published")
    add("--seeds", type=data.positive, default=5, help="number of runs (default %(default)s)")
    add("--batch-size", type=data.positive, default=100, help="crops (default %(default)s)")
    add("--crop", type=data.positive, default=128, help="side in px (default %(default)s)")
    add("--scale", choices=models.SCALING, default="patch-max", help="default %(default)s")
    add("--bands", nargs="+", help="only these, e.g. VV VH B2 B3 B4 (default: all)")
    add("--results", default="results", help="folder of results.jsonl (default %(default)s)")
    add("--precision", default="auto", choices=("auto", "bf16", "float32"))
    add("--threads", type=data.positive, help="that read (default: one per core, at most 8)")
    devices = ("cpu", "cuda")[:1 + torch.cuda.is_available()]
    add("--device", choices=devices, default=devices[-1])
    return parser


def read_options(parser):
    """-> options, content of --checkpoint or {}. CheckpointError where they contradict it."""
    args = parser.parse_args()
    if not args.checkpoint:
        return args, {}
    content = models.load_checkpoint(args.checkpoint)
    held = {name: content[name] for name in ("method", "arch", "scale")}
    held["bands"] = [*content["bands"]["s1"], *content["bands"]["s2"]]
    parser.set_defaults(**held, crop=content["args"].get("crop", 128))
    args = parser.parse_args()
    if vars(args) | held != vars(args):
        raise models.CheckpointError(f"{args.checkpoint}: holds {held}: leave --method, --arch, "
                                     "--scale and --bands out")
    return args, content


def open_patches(args, content):
    """-> the store --data with the bands that the encoders take; DataError where it lacks them. It
    counts as simulated where the encoders learnt from simulated data."""
    method = models.METHODS[args.method]
    patches = data.Patches(args.data, args.bands or method.get("bands"))
    for sensor, bands in patches.bands.items():
        if sensor in "+".join(method["inputs"]) and not bands:
            raise data.DataError(f"--bands: {args.method} needs bands of {sensor}")
    patches.simulated = patches.simulated or content.get("simulated", False)
    return patches


def open_labelled(args, content):
    """-> Patches, training rows, test rows, scaling for models.to_input. Raises DataError."""
    patches = open_patches(args, content)
    if not 0 < min(args.label_fraction) <= max(args.label_fraction) <= 1:
        raise data.DataError("--label-fraction: above 0 and at most 1")
    if patches.labels is None:
        raise data.DataError(f"{args.data}: no class maps: pack a tree that has them")
    train_rows, test_rows = patches.rows_of(*data.TRAINED_ON), patches.rows_of("test")
    if not all((patches.labels[rows] != data.IGNORE).any() for rows in (train_rows, test_rows)):
        raise data.DataError(
            f"{args.data}: needs labelled patches of the splits `train` or `validation`, and "
            f"`test`; it has {len(train_rows)} and {len(test_rows)}")
    stats = content["stats"] if content else patches.stats(train_rows)
    return patches, train_rows, test_rows, {"scale": args.scale, "stats": stats}


def describe(args, content, patches, *names):
    """What both scripts know of a result line before the run. names: of a script's own options."""
    names = "crop", "scale", "arch", "label_sampling", *names
    settings = {name: getattr(args, name) for name in names}
    settings["precision"] = models.resolve_precision(args.precision, args.device)
    weights = Path(args.checkpoint).read_bytes() if content else None
    return {"method": args.method, "data": patches.identity, "classes": patches.classes,
            "simulated": patches.simulated, "args": {**settings, "bands": patches.bands},
            "checkpoint": weights and hashlib.sha256(weights).hexdigest()[:12]}


def main():
    parser = evaluation_parser(__doc__)
    add = parser.add_argument
    add("--baseline", choices=("random", "bands"), help="random weights, or mean and sd of bands")
    add("--sensors", default="both", choices=("both", "s1", "s2"), help="of the encoders")
    add("--embed", metavar="OUT.npz", help="write embeddings of all patches, and stop")
    add("--retrieve", metavar="OUT.png", help="draw the S2 nearest to some S1 patches, and stop")
    args, content = read_options(parser)
    if bool(content) == bool(args.baseline) or (args.embed or args.retrieve) and not content:
        parser.error("give --checkpoint or --baseline; --embed and --retrieve need --checkpoint")
    if args.embed:
        embed(args, content)
    if args.retrieve:
        retrieve(args, content)
    if not args.embed and not args.retrieve:
        evaluate(args, content)


if __name__ == "__main__":
    data.run(main, models.CheckpointError, torch.OutOfMemoryError)
