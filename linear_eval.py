"""Linear probe of frozen encoders on DFC2020, the metrics, and the report of all results.

    python linear_eval.py --checkpoint runs/d-simclr/last.pt --data DFC --task single multi --seeds 5
    python linear_eval.py --checkpoint runs/d-simclr/last.pt --data DFC --sensors s1      # one satellite is missing
    python linear_eval.py --baseline random --method d-simclr --data DFC                  # the same, never trained
    python linear_eval.py --checkpoint C --data DATA --embed OUT.npz                      # embeddings of every patch
    python linear_eval.py --checkpoint C --data DATA --retrieve OUT.png                   # who finds whom, as pictures
    python linear_eval.py --report results/        # tables.md and label_fraction.png, beside the poster's numbers

The encoders run once over the crops that cover each patch; their features are kept under --results. On them a logistic
regression is fitted to convergence, its penalty chosen by cross-validation on training patches. Every finished run is
one JSON line in --results/results.jsonl; a run that is there is not repeated. The split `validation` is trained on,
`test` is tested on, as published.
"""
import argparse
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import models
from data import CLASSES, IGNORE

TITLES = {name: row["title"] for name, row in models.METHODS.items()}
PENALTIES = 10.0 ** np.arange(1, -6, -1)
# Percent; Scheibenreif, Mommert, Borth 2022: average and overall of single-label accuracy, then of multi-label F1.
POSTER = {"only-s1": (57, 62, 57, 62), "only-s2": (57, 62, 58, 63), "early-fusion": (62, 66, 60, 62),
          "late-fusion": (62, 65, 54, 61), "simclr-rgb": (49, 58, 39, 49), "d-simclr": (70, 70, 67, 69),
          "mma": (69, 69, 62, 66)}
POSTER_FRACTIONS = {"mma": (47.5, 59.7, 64.2, 69.0), "d-simclr": (36.5, 65.3, 68.4, 70.0),  # of 1, 10, 50, 100 % labels
                    "early-fusion": (34.6, 52.2, 55.1, 62.0), "late-fusion": (39.8, 50.0, 61.7, 62.0)}
MARKERS = {"mma": ("o", "#c0392b"), "d-simclr": ("s", "#2b6cb0"), "early-fusion": ("^", "#1b7837"),
           "late-fusion": ("v", "#e08214")}


# ---------------------------------------------------------------------------------------------- metrics

def single_scores(true, predicted):
    """(N,) true classes, 255 for none, and (N,) predictions -> {"class": (8,) accuracy per class, NaN where the class
    does not occur, "average": mean of the others, "overall": share of right ones}."""
    true, predicted = (np.asarray(v)[np.asarray(true) != IGNORE] for v in (true, predicted))
    right = np.array([(predicted[true == c] == c).mean() if (true == c).any() else np.nan for c in range(len(CLASSES))])
    return {"class": right, "average": average(right), "overall": float((true == predicted).mean())}


def multi_scores(true, predicted):
    """(N, 8) true and predicted 0/1 -> {"class": (8,) F1 per class, NaN where the class does not occur, "average": mean
    of the others, "overall": F1 of the pooled true and false positives and negatives}."""
    true, predicted = np.asarray(true) > 0.5, np.asarray(predicted) > 0.5
    hits, wrong = (true & predicted).sum(0), (true ^ predicted).sum(0)
    f1 = np.where(true.any(0), 2 * hits / np.maximum(2 * hits + wrong, 1), np.nan)
    overall = 2 * hits.sum() / max(2 * hits.sum() + wrong.sum(), 1)
    return {"class": f1, "average": average(f1), "overall": float(overall)}


def average(values):
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def score(task, true, logits):
    """Labels and (N, 8) logits as arrays -> scores; for single labels also "confusion", (8, 8) counts, rows the true
    class. Multi-label: probability above 0.5."""
    if task == "multi":
        return multi_scores(true, logits > 0)
    predicted = logits.argmax(1)
    confusion = np.bincount(true * len(CLASSES) + predicted, minlength=len(CLASSES) ** 2).reshape(len(CLASSES), -1)
    return {**single_scores(true, predicted), "confusion": confusion}


# ---------------------------------------------------------------------------------------------- labels to learn from

def repeats(labels):
    """How often a patch of each row is repeated to balance the classes, as published: floor(1.03 * largest / own)."""
    count = np.bincount(labels, minlength=len(CLASSES))
    return np.floor(1.03 * count.max() / count[labels]).astype(int)


def training_rows(labels, fraction, seed, sampling="patches"):
    """Rows to train on, repeated to balance the classes. labels: (N,) single label per training patch.

    sampling `patches`: of each class the first round(fraction * n), at least one, of an order that only the seed
    decides, so that small fractions lie in large ones and are the same for all methods; `rows`: of the repeated list,
    as published. Patches without a label are left out."""
    rng, rows = np.random.default_rng(seed), np.flatnonzero(labels != IGNORE)
    if sampling == "rows":
        repeated = np.repeat(rows, repeats(labels[rows]))
        return np.sort(rng.permutation(repeated)[:max(1, round(fraction * len(repeated)))])
    chosen = []
    for c in range(len(CLASSES)):
        own = rng.permutation(rows[labels[rows] == c])
        chosen.append(own[:max(1, round(fraction * len(own)))])
    chosen = np.sort(np.concatenate(chosen))
    return np.repeat(chosen, repeats(labels[chosen]))


# ---------------------------------------------------------------------------------------------- results

class Results:
    """Folder with results.jsonl, one JSON line per finished run; several processes may add to it at a time."""

    def __init__(self, folder):
        self.path = Path(folder) / "results.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def read(self):
        lines = []
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                lines.append(json.loads(text))
            except ValueError:  # a line that a kill cut off is no result
                continue
        return lines

    def has(self, run):
        return any(all(line.get(key) == value for key, value in run.items()) for line in self.read())

    def add(self, run, scores, **more):
        """run: what identifies it. A class that does not occur is null in the file."""
        numbers = {"class": [None if np.isnan(v) else round(float(v), 6) for v in scores["class"]],
                   "average": round(scores["average"], 6), "overall": round(scores["overall"], 6)}
        if "confusion" in scores:
            numbers["confusion"] = scores["confusion"].tolist()
        with open(self.path, "a+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if self.has(run):  # another process was faster
                return
            handle.seek(0)
            cut = not (handle.read() or "\n").endswith("\n")  # the line before was cut off by a kill
            handle.write("\n" * cut + json.dumps({**run, **numbers, **more}) + "\n")
        name = f"{TITLES.get(run['method'], run['method'])}, {run['protocol']}, {run['task']}-label, " \
               f"{run['label_fraction']:.0%} of labels, seed {run['seed']}"
        tqdm.write(f"{name}: average {scores['average']:.1%}, overall {scores['overall']:.1%}")
        absent = [name for name, v in zip(CLASSES, scores["class"]) if np.isnan(v)]
        if absent:
            tqdm.write(f"  not in the test data and left out of the average: {', '.join(absent)}")


def file_hash(path):
    """First 12 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def data_hash(patches):
    """The same for what a store or tree holds: ids, labels and band sums."""
    return digest([patches.index[key] for key in ("ids", "labels", "sums", "crc")])


# ---------------------------------------------------------------------------------------------- frozen features

class BandStatistics(nn.Module):
    """What a linear model can do without a network: (N, c, h, w) -> (N, 2c) mean and standard deviation per band."""

    def forward(self, x):
        return torch.cat((x.mean((2, 3)), x.std((2, 3))), 1)


@torch.no_grad()
def extract(network, scaling, patches, rows, args):
    """Run encoders or a classifier over the crops that cover the patches `rows` -> {"s1": (n, D) float32, "s2": (n, D)
    or "logits": (n, 8), "single": (n,), "multi": (n, 8), "row": (n,) the crop's patch}; crops patch by patch.
    DataError where the network's values are not finite."""
    device, grid, parts = torch.device(args.device), data.GridCrops(patches, rows, args.crop, args.batch_size), []
    cast, network = models.autocast(args.precision, device), network.to(device, memory_format=torch.channels_last).eval()
    for s1, s2, classes, row in tqdm(data.loader(grid, range(len(grid)), args.workers, device), total=len(grid),
                                     desc="over all crops", unit="batch", leave=False, delay=1):
        inputs = data.to_input(s1, s2, **scaling)
        with cast:
            found = models.encode(network, *inputs) if isinstance(network, nn.ModuleDict) else {"logits": network(*inputs)}
        part = {name: models.pooled(values).float() for name, values in found.items()}
        part |= {"single": data.single_label(classes), "multi": data.multi_label(classes), "row": row}
        parts.append({key: value.cpu().numpy() for key, value in part.items()})
    found = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if not all(np.isfinite(values).all() for values in found.values()):
        raise data.DataError(f"{args.checkpoint or args.method}: values that are not finite on the crops of {patches.path}: "
                             "try --precision float32, or a lower --lr")
    return found


def labelled(part, task):
    """What extract() gives -> (n,) whether a crop has a label."""
    return part["single"] != IGNORE if task == "single" else part["multi"].any(1)


def features_of(encoders, scaling, patches, rows, args, identity):
    """extract(), kept on disk under everything that it depends on."""
    key = digest([identity, data_hash(patches), patches.bands, args.crop, scaling, args.precision,
                  torch.device(args.device).type, rows.tolist()])
    path = Path(args.results) / "features" / f"{key}.npz"
    try:
        return dict(np.load(path))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # not there, or not whole
        features = extract(encoders, scaling, patches, rows, args)
        save_arrays(path, features)
        return features


def save_arrays(path, arrays):
    """Write an .npz that is there whole or not at all, whoever else is writing it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as handle:
        np.savez(handle, **arrays)
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------- linear classifier

def fit(x, y, weight, penalty, start=None, tolerance=2e-7, iterations=2000):
    """F logistic regressions at once, by L-BFGS -> weights (D, F, 8) and biases (F, 8) for predict().

    x: (n, D). y: (n,) int64 for multinomial, (n, 8) 0/1 for one-vs-rest. weight: (F, n), of each sample in each of the
    F. Each minimises the weighted mean of the cross-entropy (summed over labels) + penalty / 2 * |weights|^2;
    scikit-learn's C is 1 / (penalty * weight.sum()). start: the weights and biases of another penalty.
    """
    labels = (F.one_hot(y, len(CLASSES)) if y.dim() == 1 else y).to(x)
    used = (weight > 0).to(x)
    have = used @ labels  # (F, 8) samples with each label
    # What no sample has, or all have, is not fitted but sure: e^-1000 is 0. Infinite would be NaN times zero weight.
    sure = 1e3 * ((have == used.sum(1, keepdim=True)).to(x) - (have == 0).to(x))
    weight = weight / weight.sum(1, keepdim=True)
    scale = (0.03 * weight.mean(0) @ x.square() + penalty).rsqrt()[:, None, None]  # about curvature^-1/2, for few steps
    w, b = (start[0], start[1] - sure) if start else (x.new_zeros(x.shape[1], *have.shape), torch.zeros_like(have))
    v, c = (w / scale).requires_grad_(), (b / 10).requires_grad_()
    optimizer = torch.optim.LBFGS([v, c], max_iter=iterations, max_eval=2 * iterations, tolerance_grad=1e3 * tolerance,
                                  tolerance_change=1e-12, history_size=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        w = scale * v
        logits = predict(x, w, 10 * c + sure)  # (n, F, 8)
        if y.dim() == 1:
            loss = logits.logsumexp(2) - (logits * labels[:, None]).sum(2)
        else:
            loss = (F.softplus(logits) - logits * labels[:, None]).sum(2)
        loss = 1e3 * ((loss * weight.T).sum() + penalty / 2 * w.square().sum())  # torch forgets tiny steps
        loss.backward()
        return loss

    optimizer.step(closure)
    return (scale * v).detach(), 10 * c.detach() + sure


def predict(x, w, b):
    """(n, D) features, weights (D, F, 8), biases (F, 8) -> (n, F, 8) logits."""
    return (x @ w.flatten(1)).view(len(x), *b.shape) + b


def principal_axes(x):
    """(n, D) -> (D, min(n, D)) orthonormal axes of the samples. A penalty on |weights| does not notice a rotation, but
    the fit converges in far fewer steps where its Hessian is nearly diagonal, and few samples need few dimensions."""
    basis = torch.linalg.qr(x.T).Q if len(x) < x.shape[1] else torch.eye(x.shape[1]).to(x)
    x = x @ basis
    return basis @ torch.linalg.eigh(x.T @ x).eigenvectors


def folds(rows, labels, count, seed):
    """Fold of each crop: the patches of each class dealt out in turn, all crops of a patch into one fold."""
    rng, patches = np.random.default_rng(seed), np.unique(rows)
    order = rng.permutation(patches)
    order = order[np.argsort(labels[order], kind="stable")]
    fold = dict(zip(order.tolist(), np.arange(len(order)) % count))
    return np.array([fold[row] for row in rows.tolist()])


def choose_penalty(x, y, weight, rows, labels, task, seed):
    """Penalty with the best average score over five folds of the training patches, of equals the strongest; where all
    are equal, as with one patch of each class, the middle one."""
    fold = folds(rows, labels, min(5, len(np.unique(rows))), seed)
    if not fold.any():  # a single patch
        return 1.0
    inside = torch.stack([weight * torch.from_numpy(fold != k).to(weight) for k in range(fold.max() + 1)])
    model, scores = None, []
    for penalty in PENALTIES:  # from strong to weak, each starting where the one before ended
        model = fit(x, y, inside, penalty, model, tolerance=1e-3, iterations=50)
        held_out = predict(x, *model).cpu().numpy()[np.arange(len(x)), fold]
        scores.append(score(task, y.cpu().numpy(), held_out)["average"])
    return float(PENALTIES[int(np.argmax(scores)) if min(scores) < max(scores) else len(PENALTIES) // 2])


def knn(x, y, queries, k=20, temperature=0.07):
    """Weighted cosine k-nearest-neighbour vote (Wu et al. 2018) -> (n, 8) logits, positive for a majority."""
    similarity, at = (F.normalize(queries) @ F.normalize(x).T).topk(min(k, len(x)), 1)
    votes = y if y.dim() == 2 else F.one_hot(y, len(CLASSES)).to(x)
    share = torch.einsum("nk,nkc->nc", (similarity / temperature).softmax(1), votes[at].to(x))
    return share - 0.5


def probe(train, test, names, task, chosen, labels, seed, args):
    """Fit on the training crops of the rows `chosen` (repeats counted as weights), predict the test crops.
    names: the encoders whose features are used -> (scores, what else to report)."""
    device, times = torch.device(args.device), np.bincount(chosen, minlength=len(labels))
    use, tested = np.flatnonzero((times[train["row"]] > 0) & labelled(train, task)), np.flatnonzero(labelled(test, task))
    x, queries = (torch.from_numpy(np.concatenate([part[name][at] for name in names], 1)).to(device)
                  for part, at in ((train, use), (test, tested)))
    y, weight = torch.from_numpy(train[task][use]).to(device), torch.from_numpy(times[train["row"][use]]).to(x)
    counts = {"train_patches": len(np.unique(chosen)), "train_crops": len(use), "test_crops": len(tested)}
    if args.probe == "knn":
        logits = knn(x, y, queries)
    else:
        mean, sd = x.mean(0), x.std(0, correction=0)
        x, queries = ((v - mean) / torch.where(sd > 1e-6 * mean.abs() + 1e-12, sd, math.inf) for v in (x, queries))
        axes = principal_axes(x)
        x = x @ axes
        counts["penalty"] = choose_penalty(x, y, weight, train["row"][use], labels, task, seed)
        model = fit(x.double(), y, weight[None].double(), counts["penalty"])
        logits = predict(queries.double() @ axes.double(), *model)[:, 0]
    return score(task, test[task][tested], logits.cpu().numpy()), counts


# ---------------------------------------------------------------------------------------------- report

def row_title(line):
    """Name of the table row that a result line belongs to."""
    title, pretrained = TITLES[line["method"]], models.METHODS[line["method"]]["pretrained"]
    if line["protocol"] == "linear":
        title = {"random": f"{title}, random weights", "bands": "Band means and sd"}.get(line["baseline"], title)
        return f"{title}, kNN" if line["probe"] == "knn" else title
    return f"{title}, from scratch" if line["protocol"] == "scratch" and pretrained else title


def table_rows(lines):
    """Result lines -> {row title: lines}, in the poster's order. Runs of one row with different settings become rows of
    their own, named by what differs, so that nothing is averaged that does not belong together."""
    order, rows, named = [*TITLES.values(), "Band means and sd"], {}, {}
    for line in lines:
        settings = {**line["args"], **{key: line[key] for key in ("method", "checkpoint", "data")}}
        rows.setdefault(row_title(line), {}).setdefault(json.dumps(settings, sort_keys=True), []).append(line)
    for title in sorted(rows, key=lambda title: (order.index(title.split(",")[0]), title)):
        settings = [json.loads(text) for text in rows[title]]
        differ = [key for key in sorted(set().union(*settings))
                  if any(own.get(key) != settings[0].get(key) for own in settings)]
        for own, found in zip(settings, rows[title].values()):
            values = ", ".join(f"{key} {own.get(key)}" for key in differ)
            named[f"{title} [{values}]" if differ else title] = found
    return named


def cell(values):
    """Percent, mean ± standard deviation over seeds, rounded as on the poster."""
    values = 100 * np.array([v for v in values if v is not None])
    if not len(values):
        return "-"
    return f"{values.mean():.0f} ± {values.std(ddof=1):.0f}" if len(values) > 1 else f"{values.mean():.0f}"


def column(lines, key):
    return [line["class"][key] if isinstance(key, int) else line[key] for line in lines]


def markdown(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def main_table(lines, task, simulated):
    """One of the poster's two tables as Markdown."""
    named = table_rows([line for line in lines if line["task"] == task and line["protocol"] != "linear"
                        and line["label_fraction"] == 1])
    means = {title: 100 * np.mean(column(found, "average")) for title, found in named.items()}
    rows = []
    for title, found in named.items():
        numbers = [cell(column(found, key)) for key in (*range(len(CLASSES)), "average", "overall")]
        average = f"**{numbers[-2]}**" if means[title] == max(means.values()) else numbers[-2]
        poster = POSTER[found[0]["method"]][2 * (task == "multi"):][:2]
        beside = (poster[0], f"{round(means[title] - poster[0]):+d}", numbers[-1], poster[1])
        if row_title(found[0]) not in TITLES.values():  # the poster has no such row
            beside = ("-", "-", numbers[-1], "-")
        rows.append([title, *numbers[:-2], average, *([numbers[-1]] if simulated else beside), len(found)])
    title, overall = ("Single-label classification, accuracy", "OA") if task == "single" else \
        ("Multi-label classification, F1", "O-F1")
    beside = [overall] if simulated else ["poster", "difference", overall, f"poster {overall}"]
    table = markdown(["", *CLASSES, "Average", *beside, "seeds"], rows) if rows else "No results.\n"
    there = {row_title(found[0]) for found in named.values()}
    missing = ", ".join(title for title in TITLES.values() if title not in there)
    return f"## {title}, %\n\n{table}" + (f"\nMissing: {missing}.\n" if missing else "")


def probe_table(lines):
    """Frozen encoders: rows by features, sensors used and share of labels; both tasks."""
    rows = []
    for title, found in table_rows(lines).items():
        for sensors, fraction in sorted({(line["sensors"], line["label_fraction"]) for line in found}):
            own = [line for line in found if (line["sensors"], line["label_fraction"]) == (sensors, fraction)]
            tasks = [[line for line in own if line["task"] == task] for task in ("single", "multi")]
            rows.append([title, sensors, f"{fraction:.0%}", *(cell(column(part, key)) for part in tasks for key in
                                                            ("average", "overall")), max(map(len, tasks))])
    header = ["features", "sensors", "labels", "single average", "OA", "multi average", "O-F1", "seeds"]
    return markdown(header, rows) if rows else "No results.\n"


def t_quantile(df, probability=0.975):
    """Quantile of Student's t distribution, by summing its density over angles, t = tan(angle)."""
    step = math.pi / 2 / 200_000
    t = np.tan((np.arange(200_000) + 0.5) * step)
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = constant * (1 + t * t) * (1 + t * t / df) ** (-(df + 1) / 2)
    return t[np.searchsorted(np.cumsum(density) * step, probability - 0.5)]


def welch(x, y):
    """Difference of the means of two samples and half its 95 % interval (Welch), infinite for a sample of one."""
    if min(len(x), len(y)) < 2:
        return np.mean(x) - np.mean(y), math.inf
    u, v = np.var(x, ddof=1) / len(x), np.var(y, ddof=1) / len(y)
    df = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1)) if u + v else 1
    return np.mean(x) - np.mean(y), t_quantile(df) * math.sqrt(u + v)


def compare(lines, one, other):
    """Difference of two methods' averages in the main tables with its 95 % interval over seeds, as Markdown. Not for
    linear probes: there seeds redraw hardly anything, and noise would read as a result."""
    rows, lines = [], [line for line in lines if line["label_fraction"] == 1 and line["protocol"] != "linear"]
    for task in ("single", "multi"):
        part = [line for line in lines if line["task"] == task]
        ours, theirs = (table_rows([line for line in part if line["method"] == method]) for method in (one, other))
        for a, b in itertools.product(ours, theirs):
            x, y = (100 * np.array(column(found, "average")) for found in (ours[a], theirs[b]))
            middle, half = welch(x, y)
            text = f"{middle - half:+.1f} to {middle + half:+.1f}" + (", could be none" if abs(middle) <= half else "")
            rows.append([a, b, task, f"{middle:+.1f}", text if half < math.inf else "needs two seeds of each",
                         f"{len(x)} and {len(y)}"])
    if not rows:
        raise data.DataError(f"--compare {one} {other}: no results of both in one table: run finetune.py for both")
    header = ["", "against", "task", "difference of averages, points", "95 % interval (Welch)", "seeds"]
    note = "The interval is over the seeds of fine-tuning; all seeds of a row share one pretraining.\n"
    return f"## Difference\n\n{markdown(header, rows)}\n{note}"


def as_csv(lines):
    """Every number of every run, one per line."""
    keys = ("method", "protocol", "baseline", "probe", "sensors", "checkpoint", "data", "task", "label_fraction",
            "seed", "simulated")
    rows = [(*keys, "metric", "value")]
    for line in lines:
        numbers = dict(zip(CLASSES, line["class"])) | {key: line[key] for key in ("average", "overall")}
        rows += [(*map(line.get, keys), name, value) for name, value in numbers.items()]
    return "".join(",".join("" if value is None else str(value) for value in row) + "\n" for row in rows)


def new_figure(*args, **kwargs):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt.subplots(*args, **kwargs)


def draw_fractions(lines, out, simulated):
    """Average accuracy against the share of labels: our mean and standard deviation over seeds, the poster's points."""
    figure, axis = new_figure(figsize=(5.6, 4))
    for method, points in POSTER_FRACTIONS.items() if not simulated else ():
        axis.plot((1, 10, 50, 100), points, MARKERS[method][0], color="0.6", ms=5, label=f"{TITLES[method]}, poster")
    for title, found in table_rows(lines).items():
        marker, colour = MARKERS[found[0]["method"]]
        x = sorted({line["label_fraction"] for line in found})
        y = [[100 * line["average"] for line in found if line["label_fraction"] == fraction] for fraction in x]
        sd = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in y]
        axis.errorbar([100 * v for v in x], [np.mean(v) for v in y], sd, color=colour, marker=marker, ms=5, lw=1.2,
                      capsize=3, label=title)
    axis.set(xscale="log", xlabel="labelled training data, %", ylabel="average accuracy, %", xticks=(1, 10, 50, 100),
             xticklabels=("1", "10", "50", "100"), title=f"{'SIMULATED data, s' if simulated else 'S'}ingle-label")
    axis.minorticks_off()
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def draw_confusion(title, lines, out, simulated):
    """Row-normalised confusion matrix of single-label classification, the seeds pooled."""
    count = np.sum([line["confusion"] for line in lines], 0)
    share = count / np.maximum(count.sum(1, keepdims=True), 1)
    figure, axis = new_figure(figsize=(5, 4.6))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for true, predicted in np.ndindex(*share.shape):
        if count[true].any():
            axis.text(predicted, true, f"{100 * share[true, predicted]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if share[true, predicted] > 0.5 else "black")
    axis.set(xticks=range(8), yticks=range(8), yticklabels=CLASSES, xlabel="predicted", ylabel="true, % of row")
    title = f"{'SIMULATED data, ' if simulated else ''}{title}, {len(lines)} seed{'s' * (len(lines) > 1)}"
    axis.set_title(title, fontsize=9, wrap=True)
    axis.set_xticklabels(CLASSES, rotation=45, ha="right")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def report(args):
    """Print tables of a results folder and write them there with its figures; reads results.jsonl and nothing else."""
    folder = Path(args.report)
    lines = Results(folder).read() if folder.is_dir() else []
    if not lines:
        raise data.DataError(f"{folder}/results.jsonl: no results there; linear_eval.py and finetune.py write them")
    simulated, written = any(line["simulated"] for line in lines), [f"tables.{args.format}"]
    linear = [line for line in lines if line["protocol"] == "linear"]
    one_missing = {line["method"] for line in linear if line["sensors"] != "both"}
    if args.format == "csv":
        text = as_csv(lines)
    else:
        title = "# SIMULATED data: these numbers say nothing about the methods\n" if simulated else \
            "# Results beside the poster (Scheibenreif, Mommert, Borth 2022)\n"
        note = "Mean ± standard deviation over seeds; best average bold; `-`: no such number.\n"
        parts = [title, note, main_table(lines, "single", simulated), main_table(lines, "multi", simulated),
                 "## Frozen encoders, linear classifier, %\n",
                 probe_table([line for line in linear if line["sensors"] == "both"])]
        if one_missing:
            parts += ["## One satellite missing: frozen encoders of both or of one sensor, %\n",
                      probe_table([line for line in linear if line["method"] in one_missing and not line["baseline"]])]
        parts += [compare(lines, *args.compare)] if args.compare else []
        text = "\n".join(parts)
    print(text)
    (folder / written[0]).write_text(text)
    tuned = [line for line in lines if line["task"] == "single" and row_title(line) in TITLES.values() and
             line["protocol"] != "linear"]
    fractions = [line for line in tuned if line["method"] in MARKERS]
    if fractions:
        written.append("label_fraction.png")
        draw_fractions(fractions, folder / written[-1], simulated)
    for title, found in table_rows([line for line in tuned if line["label_fraction"] == 1]).items():
        written.append(f"confusion_{re.sub('[^a-z0-9]+', '_', title.lower()).strip('_')}.png")
        draw_confusion(title, found, folder / written[-1], simulated)
    print(f"wrote {', '.join(written)} in {folder}")


# ---------------------------------------------------------------------------------------------- encoders at work

def embed(args, content):
    """--embed: each sensor's embedding of every patch, the mean over the crops that cover it, with ids and labels."""
    patches = open_for(args, content)
    encoders, scaling = models.load_encoders(content)
    found = extract(encoders, scaling, patches, np.arange(len(patches)), args)
    arrays = {name: found[name].reshape(len(patches), -1, encoders[name].features).mean(1) for name in encoders}
    arrays |= {"ids": np.array(patches.ids), "simulated": np.array(patches.simulated or content["simulated"])}
    save_arrays(args.embed, arrays if patches.labels is None else {**arrays, "labels": patches.labels})
    print(f"wrote {args.embed}: {', '.join(f'{name} {array.shape}' for name, array in arrays.items() if array.ndim)}")


@torch.no_grad()
def retrieve(args, content):
    """--retrieve: for a dozen held-out Sentinel-1 patches a picture of the five Sentinel-2 patches nearest to each, by
    the centre crops of at most 1,000 patches of the split `test`, or in the data of pretraining of its held-out scenes."""
    if models.METHODS[content["method"]]["inputs"] != ("s1", "s2"):
        raise models.CheckpointError(f"{args.checkpoint}: --retrieve: {content['method']} lacks a sensor")
    args.cache = None  # the bands that the picture shows are not always those that the encoders see
    patches, device = open_for(args, content), torch.device(args.device)
    heads = content["heads"]  # without them, as of some released weights, by the encoders' features
    width = {"width": len(heads["s1"]["2.weight"])} if heads else {}
    model = models.Contrastive(content["method"], content["bands"], content["arch"], **width)
    model.encoders, scaling = models.load_encoders(content)
    for name in model.heads:
        if heads:
            model.heads[name].load_state_dict(heads[name])
        else:
            model.heads[name] = nn.Identity()
    model = model.to(device).eval()
    rows = np.flatnonzero(patches.splits == "test")
    if not len(rows) and content["args"].get("data") == patches.identity():  # the scenes that pretraining held out
        rows = data.split_scenes(patches, content["args"]["holdout"])[1]
    if not len(rows):
        raise data.DataError(f"{args.data}: --retrieve needs patches that pretraining did not see: a `test` split, or the "
                             "very data of a pretraining with --holdout above 0")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int)]
    centres, embeddings = data.CentreCrops(patches, rows, args.crop, args.batch_size), []
    for s1, s2, *_ in data.loader(centres, range(len(centres)), args.workers, device):
        with models.autocast(args.precision, device):
            embeddings.append(model(*data.to_input(s1, s2, **scaling)))
    similarity = model.similarity(*map(torch.cat, zip(*embeddings)))
    nearest, found = similarity.topk(min(5, len(rows)), 1).indices.tolist(), models.retrieval(similarity)
    patches.select(patches.index["bands"])
    y, x = (slice(start, start + args.crop) for start in centres.places[0])
    queries = np.unique(np.linspace(0, len(rows) - 1, 12).astype(int))
    figure, axes = new_figure(6, len(queries), figsize=(1.1 * len(queries) + 0.6, 7.4), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for query, column_ in zip(queries, axes.T):
        column_[0].imshow(patches.window(rows[query], y, x)[0][0] / 100, cmap="gray", vmin=-25, vmax=0)
        for axis, candidate in zip(column_[1:], nearest[query]):
            axis.imshow(data.true_colour(patches.window(rows[candidate], y, x)[1]))
            if candidate == query:
                axis.spines[:].set(color="#00c853", linewidth=4)
    for axis, name in zip(axes[:, 0], ("Sentinel-1 VV", "nearest", "2nd", "3rd", "4th", "5th")):
        axis.set_ylabel(name, fontsize=8)
    simulated = "SIMULATED data, " if patches.simulated or content["simulated"] else ""
    title = f"{simulated}{TITLES[content['method']]}: Sentinel-2 patches nearest to a Sentinel-1 patch, the right " \
            f"one framed\n{len(rows)} held-out candidates, " \
            f"top-1 {found['top1']:.0%}, top-5 {found['top5']:.0%}, median rank {found['median']:g}"
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(args.retrieve, dpi=110)
    print(f"wrote {args.retrieve}: {title.splitlines()[1]}")


# ---------------------------------------------------------------------------------------------- command line

def add_evaluation_options(add):
    """What linear_eval.py and finetune.py ask for alike."""
    add("--method", choices=TITLES, help="default: the checkpoint's, else d-simclr")
    add("--data", default="datasets/dfc2020", help="store or tree with labels (default %(default)s)")
    add("--task", nargs="+", default=["single"], choices=("single", "multi"))
    add("--label-fraction", type=share, nargs="+", default=[1.0], help="share of the labelled patches, e.g. 0.01 0.1 1")
    add("--label-sampling", default="patches", choices=("patches", "rows"), help="rows: after repeating, as published")
    add("--seeds", type=data.positive, default=5, help="runs, with seeds 0, 1, ... (default %(default)s)")
    add("--batch-size", type=data.positive, default=100, help="crops (default %(default)s)")
    add("--crop", type=data.positive, help="side of the crops, px (default: that of pretraining, else 128)")
    add("--scale", choices=data.SCALES, help="network input (default: that of pretraining, else patch-max)")
    add("--bands", nargs="+", help="only these, by name, e.g. VV VH B2 B3 B4 (default: those of pretraining, else all)")
    add("--results", default="results", help="folder of results.jsonl (default %(default)s)")
    add("--precision", default="auto", choices=("auto", "bf16", "float32"), help="auto: bf16 where it is native")
    add("--cache", choices=("ram", "device"), help="hold the data in memory")
    add("--workers", type=int, help="processes that read (default: one per core)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def share(text):
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def open_for(args, content):
    """Open --data for a checkpoint's content, or {} -> Patches. --method, --arch, --scale, --bands and --crop become
    the checkpoint's, or the published ones; raises CheckpointError where something else was asked for."""
    held = {key: content[key] for key in ("method", "arch", "scale")} if content else {}
    if content:
        held["bands"] = [*content["bands"]["s1"], *content["bands"]["s2"]]
    for key, value in held.items():
        asked = getattr(args, key, None)
        if asked not in (None, value):
            value, asked = (" ".join(v) if key == "bands" else v for v in (value, asked))
            raise models.CheckpointError(f"{args.checkpoint}: holds {key} {value}, not --{key} {asked}")
    for key, usual in (("method", "d-simclr"), ("arch", "resnet18"), ("scale", "patch-max"), ("bands", None)):
        setattr(args, key, held.get(key) or getattr(args, key, None) or usual)
    args.precision = models.resolve_precision(args.precision, torch.device(args.device))  # as results must say it
    args.bands = args.bands or models.METHODS[args.method].get("bands")
    args.crop = args.crop or content.get("args", {}).get("crop", 128)
    return data.open_data(args.data, args.bands, args.cache, args.workers, args.device)


def open_labelled(args, content):
    """open_for() -> (Patches, training rows, test rows, scaling for data.to_input); raises DataError without labels."""
    patches = open_for(args, content)
    labels = np.full(len(patches), IGNORE) if patches.labels is None else patches.labels
    train, test = (np.flatnonzero(patches.splits == split) for split in ("validation", "test"))
    if not all((labels[rows] != IGNORE).any() for rows in (train, test)):
        raise data.DataError(f"{args.data}: needs labelled patches of the splits `validation` (trained on) and `test`; "
                             f"it has {len(train)} and {len(test)}{' unlabelled' if patches.labels is None else ''}")
    counts = np.bincount(labels[train], minlength=IGNORE + 1)[:len(CLASSES)]
    if not counts.all():
        print("no training patch of", ", ".join(name for name, count in zip(CLASSES, counts) if not count))
    for fraction in args.label_fraction:
        few = [name for name, count in zip(CLASSES, counts) if count and round(fraction * count) < 1]
        if few and args.label_sampling == "patches":
            print(f"{fraction:.1%} of {', '.join(few)} is less than one patch: one of each is used")
    stats = content["stats"] if content else patches.stats({"validation"})
    return patches, train, test, {"scale": args.scale, "stats": stats}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--report", metavar="DIR", help="print and write the tables of a results folder, and stop")
    add("--format", default="md", choices=("md", "csv"), help="of --report")
    add("--compare", nargs=2, choices=TITLES, metavar="METHOD", help="with --report: difference of two rows")
    add("--checkpoint", help="pretrained encoders: last.pt of a run, or the file released with the paper")
    add("--baseline", choices=("random", "bands"), help="instead: untrained encoders, or mean and sd of each band")
    add("--embed", metavar="OUT.npz", help="write embeddings of all patches of --data, and stop")
    add("--retrieve", metavar="OUT.png", help="picture of the S2 patches nearest to some S1 patches, and stop")
    add("--sensors", default="both", choices=("both", "s1", "s2"), help="use only this sensor's encoder")
    add("--probe", default="linear", choices=("linear", "knn"), help="knn: 20 nearest by cosine, nothing to fit")
    add_evaluation_options(add)
    args = parser.parse_args()
    if not args.report and (args.checkpoint is None) == (args.baseline is None):
        parser.error("give either --checkpoint or --baseline (or --report DIR)")
    if args.compare and (args.format == "csv" or not args.report):
        parser.error("--compare goes with --report DIR, and not with --format csv")
    if (args.embed or args.retrieve) and not args.checkpoint:
        parser.error("--embed and --retrieve need --checkpoint")
    return args


def evaluate(args, content):
    """Probe the encoders of a checkpoint's content, or of --baseline: a result line per seed, task and fraction."""
    patches, train_rows, test_rows, scaling = open_labelled(args, content)
    inputs, identity = models.METHODS[args.method]["inputs"], file_hash(args.checkpoint) if content else None
    names = [name for name in inputs if args.sensors in ("both", name)]
    if not names:
        raise data.DataError(f"--sensors {args.sensors}: {TITLES[args.method]} has no such encoder")
    settings = {"crop": args.crop, "scale": args.scale, "label_sampling": args.label_sampling,
                "precision": args.precision, "bands": patches.bands}
    fixed = {"method": args.method, "protocol": "linear", "probe": args.probe, "baseline": args.baseline,
             "sensors": args.sensors, "checkpoint": identity, "data": data_hash(patches), "args": settings}
    results, labels = Results(args.results), patches.labels[train_rows]
    for seed in range(args.seeds):
        runs = [run for task in args.task for fraction in args.label_fraction
                if not results.has(run := {**fixed, "task": task, "label_fraction": fraction, "seed": seed})]
        if not runs:
            continue
        torch.manual_seed(seed)
        encoders = nn.ModuleDict({name: BandStatistics() for name in inputs}) if args.baseline == "bands" else \
            models.load_encoders(content)[0] if content else models.make_encoders(args.method, patches.bands).eval()
        name = identity or [args.baseline, args.method, seed * (args.baseline == "random")]
        train, test = (features_of(encoders, scaling, patches, rows, args, name) for rows in (train_rows, test_rows))
        train["row"] = np.searchsorted(train_rows, train["row"])  # place among the training patches
        for run in tqdm(runs, desc=f"probes, seed {seed}", unit="probe", leave=False, delay=1):
            chosen = training_rows(labels, run["label_fraction"], seed, args.label_sampling)
            scores, counts = probe(train, test, names, run["task"], chosen, labels, seed, args)
            results.add(run, scores, counts=counts, simulated=patches.simulated or content.get("simulated", False))


def main():
    args = arguments()
    if args.report:
        return report(args)
    content = models.load_checkpoint(args.checkpoint) if args.checkpoint else {}
    if args.embed:
        embed(args, content)
    if args.retrieve:
        retrieve(args, content)
    if not args.embed and not args.retrieve:
        evaluate(args, content)


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
