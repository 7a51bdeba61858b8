"""Linear probe of frozen encoders, the metrics, embeddings, and a picture of retrieval.

    python linear_eval.py --checkpoint runs/d-simclr/last.pt --data STORE --task single multi
    python linear_eval.py --checkpoint C --data STORE --sensors s1      # one satellite is missing
    python linear_eval.py --baseline random --method mma --data STORE   # never trained
    python linear_eval.py --checkpoint C --data STORE --embed OUT.npz   # embeddings of all patches
    python linear_eval.py --checkpoint C --data STORE --retrieve OUT.png

The encoders run once over the crops that cover each patch. A logistic regression on the features is
fitted to convergence, its penalty chosen by cross-validation; trained on are the splits `train` and
`validation`, tested on is `test`. A finished run, a line of results.jsonl, is not repeated.
"""
import argparse
import contextlib
import fcntl
import functools
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
PENALTIES = 10.0 ** np.arange(1, -6, -1)  # of the probe, from strong to weak
FOLDS = 5
SURE = 1e3  # logit of certainty: e^-1000 is 0, while infinity times zero would be NaN
# L-BFGS needs few steps in variables in which the curvature of the loss is near 1:
CURVATURE = 0.03  # p (1 - p), that of cross-entropy in a logit, about what it is once fitted
BIAS_UNIT = 10
LOSS_SCALE = 1e3  # torch's L-BFGS learns nothing from steps that change the loss too little
OUTCOMES = {"class", "average", "overall", "confusion", "counts"}  # of a run, beside its settings
CANDIDATES = 1000  # that a retrieval looks among
PICTURED, NEAREST = 12, 5  # of them in its picture, and below each


def score(task, true, logits):
    """(n, C) true 0/1 and logits -> {"class": (C,) accuracy of each class or, of several labels,
    F1 of those above 0.5, NaN where a class does not occur; "average": mean of the others;
    "overall": accuracy of all samples, or F1 of the pooled hits and errors}, and of single labels
    "confusion": (C, C) samples, rows the true class."""
    true = true > 0.5
    if task == "single":
        predicted = np.eye(true.shape[1], dtype=bool)[logits.argmax(1)]
        possible = true.sum(0)
    else:
        predicted = logits > 0
        possible = (true.sum(0) + predicted.sum(0)) / 2
    hits = (true & predicted).sum(0)
    of_classes = hits / np.where(true.any(0), possible, np.nan)
    overall = hits.sum() / possible.sum()
    scores = {"class": of_classes, "average": np.nanmean(of_classes), "overall": overall}
    return scores if task == "multi" else scores | {"confusion": true.T.astype(int) @ predicted}


def repeats(labels):
    """How often a patch of each row is repeated to balance the classes, as published:
    floor(1.03 * patches of the largest class / patches of its class)."""
    count = np.bincount(labels)
    return np.floor(1.03 * count.max() / count[labels]).astype(int)


def training_rows(labels, fraction, seed, sampling="patches"):
    """Rows to train on, repeated to balance the classes, of labels (N,), 255 for none. sampling
    `patches`: of each class the first round(fraction * n), at least one, in an order of the seed,
    so that small fractions lie in large ones; `rows`: of the repeated list, as published."""
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(labels != data.IGNORE)
    groups = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
    if sampling == "rows":
        groups = [np.repeat(rows, repeats(labels[rows]))]
    chosen = []
    for group in groups:
        count = max(1, round(fraction * len(group)))
        chosen.extend(rng.permutation(group)[:count])
    chosen = np.sort(chosen)
    return chosen if sampling == "rows" else np.repeat(chosen, repeats(labels[chosen]))


class Results:
    """Folder with results.jsonl, one JSON line per finished run: first its settings, see
    planned_runs(), then what came out. Several processes may add lines at a time."""

    def __init__(self, folder):
        self.path = Path(folder) / "results.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def read(self):
        """-> lines, one of each run, though files of two machines were joined by `cat`."""
        runs = {}
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # empty, cut off by a kill, NULs by a power cut
                run = json.loads(line)
                settings = {name: run[name] for name in run if name not in OUTCOMES}
                runs.setdefault(json.dumps(settings, sort_keys=True), run)
        return [*runs.values()]

    def has(self, settings):
        """Whether a line has all these settings, with what came out beside them."""
        return any(settings.items() <= line.items() for line in self.read())

    def add(self, settings, scores, **more):
        """A class that does not occur is null in the file."""
        scores = {name: np.round(values, 6).tolist() for name, values in scores.items()}
        scores["class"] = [None if math.isnan(value) else value for value in scores["class"]]
        with open(self.path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not self.has(settings):  # else another process was faster
                file.write("\n" + json.dumps({**settings, **scores, **more}))
        names = ("method", "protocol", "baseline", "sensors", "task")
        about = ", ".join(settings[name] for name in names if settings.get(name))
        share, seed = 100 * settings["label_fraction"], settings["seed"]
        tqdm.write(f"{about}, {share:g} % of labels, seed {seed}: "
                   f"average {scores['average']:.1%}, overall {scores['overall']:.1%}")


def planned_runs(args, content, patches, options=(), **more):
    """-> the settings of each run, by seed, task and label fraction: a dict of all that decides its
    result. options: names of those that only one script has. more: what else it was made with."""
    names = ("crop", "scale", "arch", "label_sampling", *options)
    chosen = {name: getattr(args, name) for name in names}
    chosen["precision"] = models.resolve_precision(args.precision, args.device)
    chosen["bands"] = patches.bands
    common = {**more, "method": args.method, "checkpoint": content.get("checkpoint"),
              "data": patches.identity, "classes": patches.classes, "simulated": patches.simulated,
              "args": chosen}
    runs = itertools.product(range(args.seeds), args.task, args.label_fraction)
    return [{**common, "task": task, "label_fraction": fraction, "seed": seed}
            for seed, task, fraction in runs]


def make_encoders(args, content, patches, seed):
    """-> a method's encoders: of a checkpoint's content if there is one, else made by the seed."""
    torch.manual_seed(seed)
    encoders = models.make_encoders(args.method, patches.bands, args.arch)
    return models.load_encoders(content)[0] if content else encoders


def encoders_used(args):
    """Names of the method's encoders that --sensors leaves. DataError where none is left."""
    inputs = models.METHODS[args.method]["inputs"]
    names = [name for name in inputs if args.sensors in ("both", name)]
    if not names:
        raise data.DataError(f"--sensors {args.sensors}: {args.method} has no such encoder")
    return names


def frozen_network(args, content, patches, seed=0):
    """Encoders of the checkpoint's content or of --baseline, those of --sensors -> function of both
    network inputs that gives their features side by side, (N, D)."""
    encoders = make_encoders(args, content, patches, seed).eval()
    encoders.to(args.device, memory_format=torch.channels_last)
    used = {name: encoders[name] for name in encoders_used(args)}
    if args.baseline == "bands":  # (N, c, h, w) -> (N, 2c), standard deviation and mean of each
        used = dict.fromkeys(used, lambda x: torch.cat(torch.std_mean(x, (2, 3)), 1))
    return functools.partial(models.joined_features, used)


@torch.no_grad()
def extract(network, scaling, patches, rows, args, middle=False):
    """Run a network over crops of the patches `rows`, patch by patch: those that cover them, or the
    middle one. -> {"x": its output, (n, D) float32, "row": (n,) the crop's patch, "scene": (n,) its
    number}, and where there are class maps the labels, "single" and "multi", (n, C) 0/1, all 0
    for none.
    DataError where x is not finite."""
    batches = data.grid_crops(rows, patches.size, args.crop, args.batch_size, middle)
    labelled, count = patches.labels is not None, len(patches.classes)
    feed = data.loader(patches, batches, args.crop, args.device, args.threads, classes=labelled)
    crops = defaultdict(list)
    for s1, s2, classes, row in tqdm(feed, "over all crops", len(batches), leave=False, delay=1):
        s1, s2 = models.to_input(s1, s2, **scaling)
        with models.autocast(args.precision, args.device):
            crops["x"].append(network(s1, s2).float())
        crops["row"].append(torch.from_numpy(row))
        if labelled:
            label = models.single_label(classes, count)
            one_hot = F.one_hot(label, data.IGNORE + 1)
            crops["single"].append(one_hot[:, :count].float())
            crops["multi"].append(models.multi_label(classes, count=count))
    # The host waits for the device only here.
    crops = {name: torch.cat(values).cpu().numpy() for name, values in crops.items()}
    crops["scene"] = np.unique(patches.scenes, return_inverse=True)[1][crops["row"]]
    if not np.isfinite(crops["x"]).all():
        raise data.DataError(f"{args.checkpoint or args.method}: values that are not finite on the "
                             f"crops of {args.data}: try --precision float32, or a lower --lr")
    return crops


def fit(task, x, y, weight, penalty, start=None, tolerance=2e-7, iterations=2000):
    """K logistic regressions at once, by L-BFGS -> weights (D, K, C), biases (K, C) for predict().
    task: `single`, multinomial, or `multi`, one-vs-rest. x: (n, D). y: (n, C) 0/1. weight: (K, n),
    of each sample in each of the K. Each minimises the weighted mean of the cross-entropy (summed
    over classes) + penalty / 2 * |weights|^2; scikit-learn's C is 1 / (penalty * weight.sum()).
    start: what another penalty gave. A class of all samples, or of none, is not fitted but sure."""
    y = y.to(x)
    none = weight @ y == 0  # (K, C)
    every = weight @ (1 - y) == 0
    sure = SURE * (every.to(x) - none.to(x))
    w, b = start or (x.new_zeros(x.shape[1], *sure.shape), sure)
    weight = weight / weight.sum(1, keepdim=True)
    curvature = CURVATURE * weight.mean(0) @ x.square() + penalty  # (D,), of the loss in a weight
    unit = curvature.rsqrt()[:, None, None]
    v, c = (w / unit).requires_grad_(), (b / BIAS_UNIT).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [v, c], max_iter=iterations, max_eval=2 * iterations, line_search_fn="strong_wolfe",
        tolerance_grad=LOSS_SCALE * tolerance, tolerance_change=1e-12, history_size=50)

    def closure():
        optimizer.zero_grad()
        w = unit * v
        logits = predict(x, w, BIAS_UNIT * c)  # (n, K, C)
        normaliser = logits.logsumexp(2) if task == "single" else F.softplus(logits).sum(2)
        losses = normaliser - (logits * y[:, None]).sum(2)  # (n, K)
        loss = LOSS_SCALE * ((losses * weight.T).sum() + penalty / 2 * w.square().sum())
        loss.backward()
        return loss

    optimizer.step(closure)
    return (unit * v).detach(), (BIAS_UNIT * c).detach()


def predict(x, w, b):
    """(n, D) features, weights (D, K, C), biases (K, C) -> (n, K, C) logits."""
    return (x @ w.flatten(1)).view(len(x), *b.shape) + b


def folds(groups, labels, count, seed):
    """(n,) scene or patch of each crop, label of its patch -> (n,) fold of each crop: the groups of
    each class, that of the first crop, dealt out in turn, each whole."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(first))
    order = order[np.argsort(labels[first][order], kind="stable")]
    fold = np.empty(len(order), int)
    fold[order] = np.arange(len(order)) % count
    return fold[group]


def choose_penalty(task, x, y, weight, rows, scenes, labels, seed):
    """Penalty with the best average score over folds of the training scenes, where there are as
    many as folds, else of the patches; the strongest of several; where all are equally good, as
    with one patch of each class, the middle one."""
    groups = scenes if len(np.unique(scenes)) >= FOLDS else rows
    count = min(FOLDS, len(np.unique(groups)))
    if count == 1:  # a single patch: nothing to hold out, and little to learn from: a strong one
        return 1.0
    fold = folds(groups, labels, count, seed)
    others = torch.from_numpy(fold != np.arange(count)[:, None])  # (K, n)
    weight = weight * others.to(weight)
    true = y.cpu().numpy()
    model, scores = None, []
    for penalty in PENALTIES:  # each fit starts where the one before ended
        model = fit(task, x, y, weight, penalty, model, tolerance=1e-6, iterations=200)
        logits = predict(x, *model).cpu().numpy()
        held_out = logits[range(len(x)), fold]  # of each crop, by the fit that lacked it
        scores.append(score(task, true, held_out)["average"])
    best = np.argmax(scores) if min(scores) < max(scores) else len(PENALTIES) // 2
    return float(PENALTIES[best])


def probe(task, train, test, chosen, patch_labels, seed, device="cpu"):
    """Learn from the training crops of the patches `chosen` (repeats are weights), predict the test
    crops, both as extract() gives them. patch_labels: of all patches, to balance folds by, in both
    tasks -> (scores, what else to report)."""
    times = np.bincount(chosen, minlength=len(patch_labels))[train["row"]]
    used = (times > 0) & train[task].any(1)
    tested = test[task].any(1)
    true = test[task][tested]
    arrays = train["x"][used], train[task][used], np.float32(times[used]), test["x"][tested]
    x, y, weight, queries = (torch.from_numpy(array).to(device) for array in arrays)
    sd, mean = torch.std_mean(x, 0, correction=0)
    sd[sd <= 1e-6 * mean.abs() + 1e-12] = math.inf  # such a feature says nothing
    x, queries = (x - mean) / sd, (queries - mean) / sd
    # A penalty on |weights| does not notice a rotation, but L-BFGS does: along the principal axes,
    # whose variances are apart, it needs a fraction of the steps.
    axes = torch.linalg.eigh(x.double().T @ x.double()).eigenvectors[:, -min(x.shape):]
    x = x @ axes.float()  # (n, min(n, D))
    rows, scenes = train["row"][used], train["scene"][used]
    penalty = choose_penalty(task, x, y, weight, rows, scenes, patch_labels[rows], seed)
    model = fit(task, x.double(), y, weight[None].double(), penalty)
    logits = predict(queries.double() @ axes, *model)[:, 0]
    counts = {"train_patches": len(set(chosen)), "train_crops": len(x), "test_crops": len(true),
              "penalty": penalty}
    return score(task, true, logits.cpu().numpy()), counts


def evaluate(args, content):
    """Probe frozen encoders: a result line per seed, task and label fraction."""
    patches, train_rows, test_rows, scaling = open_labelled(args, content)
    labels, results = patches.labels, Results(args.results)

    @functools.lru_cache(1)  # the crops of one network at a time
    def crops_of(seed):
        network = frozen_network(args, content, patches, seed)
        return [extract(network, scaling, patches, rows, args) for rows in (train_rows, test_rows)]

    runs = planned_runs(args, content, patches,
                        protocol="linear", baseline=args.baseline,
                        sensors=" and ".join(encoders_used(args)))
    for settings in tqdm(runs, "probes", leave=False, delay=1):
        if results.has(settings):
            continue
        task, seed, fraction = (settings[key] for key in ("task", "seed", "label_fraction"))
        train, test = crops_of(seed if args.baseline == "random" else 0)
        chosen = training_rows(labels[train_rows], fraction, seed, args.label_sampling)
        scores, counts = probe(task, train, test, train_rows[chosen], labels, seed, args.device)
        results.add(settings, scores, counts=counts)


def embed(args, content):
    """--embed: each sensor's embedding of every patch, the mean over the crops that cover it."""
    patches, part = open_patches(args, content), Path(f"{args.embed}.tmp")
    part.parent.mkdir(parents=True, exist_ok=True)
    _, scaling = models.load_encoders(content)
    network = frozen_network(args, content, patches)
    x = extract(network, scaling, patches, patches.rows, args)["x"]
    x = x.reshape(len(patches.rows), -1, x.shape[1]).mean(1)  # (patches, crops of each, D)
    arrays = {"ids": np.array(patches.ids)[patches.rows], "simulated": patches.simulated}
    if patches.labels is not None:
        arrays |= {"labels": patches.labels[patches.rows], "classes": patches.classes}
    sensors = encoders_used(args)
    for sensor, embedding in zip(sensors, np.split(x, len(sensors), axis=1)):
        arrays |= {sensor: embedding, f"{sensor}_bands": models.bands_of(patches.bands, sensor)}
    with open(part, "wb") as file:
        np.savez(file, **arrays)
    part.replace(args.embed)
    print(f"wrote {args.embed}: {len(x)} patches, {x.shape[1]} numbers of {' and '.join(sensors)}")


def retrieve(args, content):
    """--retrieve: who finds whom, by the centre crops of at most 1,000 patches that pretraining
    held out, or, in another store than its own, of the split `test`."""
    if models.METHODS[args.method]["inputs"] != ("s1", "s2") or "fc" in content:
        raise data.DataError(f"{args.checkpoint}: --retrieve: give a pretraining of both sensors")
    patches, pretraining = open_patches(args, content), content["args"]
    own = pretraining.get("data") == patches.identity
    _, held_out = data.split_scenes(patches, pretraining["holdout"] if own else 0)
    if not len(held_out):
        raise data.DataError(f"{args.data}: --retrieve needs patches that pretraining did not see: "
                             "a split `test`, or its very data and --holdout above 0 there")
    Path(args.retrieve).parent.mkdir(parents=True, exist_ok=True)
    rows = held_out[::math.ceil(len(held_out) / CANDIDATES)]
    model, scaling = models.load_contrastive(content)
    model.to(args.device)
    x = extract(lambda s1, s2: torch.stack(model(s1, s2), 1), scaling, patches, rows, args,
                middle=True)["x"]  # (N, 2, 128), or maps (N, 2, 256, h/8, w/8)
    similarity = model.similarity(*torch.from_numpy(x).unbind(1))
    found = models.retrieval(similarity)
    result = (f"{'SIMULATED data, ' * patches.simulated}{TITLES[args.method]}: {len(rows)} "
              f"{'held-out' if own else 'test'} candidates, top-1 {found['top1']:.0%}, top-5 "
              f"{found['top5']:.0%}, median rank {found['median']:g}, crops of {args.crop} px")
    nearest = similarity.topk(min(NEAREST, len(rows)), 1).indices.numpy()
    draw_retrieval(args, rows, nearest, result)
    print(f"wrote {args.retrieve}: {result}")


def draw_retrieval(args, rows, nearest, title):
    """Write a picture of a dozen Sentinel-1 patches, below each the Sentinel-2 patches nearest to
    it, the right one framed. nearest: (N, 5) places in rows."""
    patches = data.Patches(args.data)  # all bands: the encoders may see none that are colours
    queries = np.arange(0, len(rows), math.ceil(len(rows) / PICTURED))
    shown = np.column_stack((queries, nearest[queries]))  # (12, 6): the query, those nearest to it
    batches = data.grid_crops(
        rows[shown.ravel()], patches.size, args.crop, len(shown[0]), middle=True)
    figure = Figure((13.8, 7.6), layout="constrained")
    axes = figure.subplots(*shown.T.shape, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    columns = zip(axes.T, shown, data.loader(patches, batches, args.crop))
    for column, places, (s1, s2, *_) in columns:  # a batch is what one column shows
        pictures, colours = composite(s2.numpy(), patches.bands["s2"])
        column[0].imshow(s1[0, 0].numpy(), "gray", vmin=-2500, vmax=0)
        for axis, place, picture in zip(column[1:], places[1:], pictures[1:]):
            axis.imshow(picture)
            if place == places[0]:
                axis.spines[:].set(color="#00c853", linewidth=4)
    figure.suptitle(f"{title}\n{patches.bands['s1'][0]} of Sentinel-1; below it the nearest of "
                    f"Sentinel-2, {colours}, the right one framed", fontsize=10)
    figure.savefig(args.retrieve, format="png", dpi=110)


def composite(s2, bands):
    """S2 (..., c, h, w) of the named bands -> picture (..., h, w, 3) in 0..1, and its title: true
    colour where B4, B3, B2 are there, else the first three bands as false colour."""
    shown, white, title = models.RGB, 3000, "true colour"
    if not set(shown) <= set(bands):
        shown = (bands * 3)[:3]
        white, title = np.percentile(s2, 98) + 1, f"false colour {' '.join(shown)}"
    picture = np.stack([s2[..., bands.index(band), :, :] for band in shown], -1)
    return np.clip(picture / white, 0, 1), title


def evaluation_parser(description):
    """-> parser with the options that linear_eval.py and finetune.py have in common.

    No option may be abbreviated: pretrain.py's --seed 2 would be --seeds 2 here."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
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
    add("--crop", type=data.positive, default=128, help="default: pretraining's, or %(default)s")
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
    if "epoch" in content and content["epoch"] < content["args"]["epochs"]:
        print(f"{args.checkpoint}: {content['epoch']} of {content['args']['epochs']} epochs")
    held = {name: content[name] for name in ("method", "arch", "scale")}
    held["bands"] = content["bands"]["s1"] + content["bands"]["s2"]
    # Read once more with the checkpoint's values as defaults: what differs now was typed.
    parser.set_defaults(**held, crop=content["args"].get("crop", args.crop))
    args = parser.parse_args()
    if (vars(args) | held) != vars(args):
        raise models.CheckpointError(f"{args.checkpoint}: holds {held}: leave --method, --arch, "
                                     "--scale and --bands out")
    return args, content


def sees(method, sensor):
    """Whether an encoder of the method takes a sensor, alone or stacked upon the other."""
    return sensor in "+".join(models.METHODS[method]["inputs"])


def open_patches(args, content):
    """-> the store --data with the bands that the encoders take; DataError where it lacks them. It
    counts as simulated where the encoders learnt from simulated data."""
    patches = data.Patches(args.data, args.bands or models.METHODS[args.method].get("bands"))
    for sensor, bands in patches.bands.items():
        if sees(args.method, sensor) and not bands:
            raise data.DataError(f"--bands: {args.method} needs bands of {sensor}")
    patches.simulated |= content.get("simulated", False)
    return patches


def open_labelled(args, content):
    """-> Patches, training rows, test rows, scaling for models.to_input. Raises DataError."""
    patches = open_patches(args, content)
    if not 0 < min(args.label_fraction) <= max(args.label_fraction) <= 1:
        raise data.DataError("--label-fraction: above 0 and at most 1")
    if patches.labels is None:
        raise data.DataError(f"{args.data}: no class maps: pack a tree that has them")
    if "fc" in content:
        raise data.DataError(f"{args.checkpoint}: has learnt from labels: give a pretraining's")
    train_rows = patches.rows_of(*data.TRAINED_ON)
    test_rows = patches.rows_of("test")
    labelled = patches.labels != data.IGNORE
    if not (labelled[train_rows].any() and labelled[test_rows].any()):
        raise data.DataError(
            f"{args.data}: needs labelled patches of the splits `train` or `validation`, and "
            f"`test`; it has {len(train_rows)} and {len(test_rows)}")
    stats = content["stats"] if content else patches.stats(train_rows)
    return patches, train_rows, test_rows, {"scale": args.scale, "stats": stats}


def main():
    parser = evaluation_parser(__doc__)
    parser.add_argument("--sensors", default="both", choices=("both", "s1", "s2"))
    add = parser.add_mutually_exclusive_group().add_argument
    add("--baseline", choices=("random", "bands"), help="random weights, or mean and sd of bands")
    add("--embed", metavar="OUT.npz", help="write embeddings of all patches, and stop")
    add("--retrieve", metavar="OUT.png", help="draw the S2 nearest to some S1 patches, and stop")
    args, content = read_options(parser)
    if bool(content) == bool(args.baseline):
        parser.error("give --checkpoint, or --baseline without it")
    if args.embed:
        embed(args, content)
    elif args.retrieve:
        retrieve(args, content)
    else:
        evaluate(args, content)


if __name__ == "__main__":
    data.run(main, models.CheckpointError, torch.OutOfMemoryError)
