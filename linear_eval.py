"""Linear probe of frozen encoders on DFC2020, the metrics, and the report of all results.

    python linear_eval.py --checkpoint runs/d-simclr/last.pt --data DFC --task single multi --seeds 5
    python linear_eval.py --checkpoint runs/d-simclr/last.pt --data DFC --sensors s1      # one satellite is missing
    python linear_eval.py --baseline random --method d-simclr --data DFC                  # the same, never trained
    python linear_eval.py --report results/        # tables.md and label_fraction.png, beside the poster's numbers

The encoders run once over the crops that cover each patch; their features are kept under --results. On them a logistic
regression is fitted to convergence, its penalty chosen by cross-validation on training patches. Every finished run is one
JSON line in --results/results.jsonl; a run that is there is not repeated. The split `validation` is trained on, `test`
is tested on, as published.
"""
import argparse
import fcntl
import hashlib
import json
import math
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
    return {"class": f1, "average": average(f1), "overall": float(2 * hits.sum() / max(2 * hits.sum() + wrong.sum(), 1))}


def average(values):
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def score(task, true, logits):
    """Labels and (N, 8) logits -> (scores, predictions). Multi-label: probability above 0.5."""
    predicted = logits.argmax(1) if task == "single" else (logits > 0).astype(np.float32)
    return (single_scores if task == "single" else multi_scores)(true, predicted), predicted


# ---------------------------------------------------------------------------------------------- labels to learn from

def repeats(labels):
    """How often a patch of each row is repeated to balance the classes, as published: floor(1.03 * largest / own)."""
    count = np.bincount(labels, minlength=len(CLASSES))
    return np.floor(1.03 * count.max() / count[labels]).astype(int)


def training_rows(labels, fraction, seed, sampling="patches"):
    """Rows to train on, repeated to balance the classes. labels: (N,) single label per training patch.

    sampling `patches`: of each class the first round(fraction * n), at least one, of an order that only the seed
    decides, so that small fractions lie in large ones and are the same for all methods; `rows`: of the repeated list, as
    published. Patches without a label are left out."""
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


def open_labelled(args, bands=None):
    """-> Patches, training rows, test rows of --data; DataError where there is nothing to learn from or to test on."""
    patches = data.open_data(args.data, bands, getattr(args, "cache", None), args.workers, args.device)
    train, test = (np.flatnonzero(patches.splits == split) for split in ("validation", "test"))
    if patches.labels is None or not (patches.labels[train] != IGNORE).any() or not len(test):
        raise data.DataError(f"{args.data}: needs labelled patches of the splits `validation` (trained on) and `test`; it "
                             f"has {len(train)} and {len(test)}{' without labels' if patches.labels is None else ''}")
    absent = [name for c, name in enumerate(CLASSES) if not (patches.labels[train] == c).any()]
    if absent:
        print(f"no training patch of {', '.join(absent)}")
    return patches, train, test


# ---------------------------------------------------------------------------------------------- results

class Results:
    """Folder with results.jsonl, one JSON line per finished run; several processes may add to it at a time."""

    def __init__(self, folder):
        self.path = Path(folder) / "results.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def read(self):
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # a line that a kill cut off is no result

    def has(self, run):
        return any(all(line[key] == value for key, value in run.items()) for line in self.read())

    def add(self, run, scores, **more):
        """run: what identifies it. A class that does not occur is null in the file."""
        numbers = {"class": [None if np.isnan(v) else round(float(v), 6) for v in scores["class"]],
                   "average": round(scores["average"], 6), "overall": round(scores["overall"], 6)}
        with open(self.path, "a+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            handle.seek(0)
            text = handle.read()
            handle.write("\n" * (text != "" and text[-1] != "\n") + json.dumps({**run, **numbers, **more}) + "\n")
        name = f"{TITLES.get(run['method'], run['method'])}, {run['protocol']}, {run['task']}-label, " \
               f"{run['label_fraction']:.0%} of labels, seed {run['seed']}"
        tqdm.write(f"{name}: average {scores['average']:.1%}, overall {scores['overall']:.1%}")
        absent = [name for name, v in zip(CLASSES, scores["class"]) if np.isnan(v)]
        if absent:
            tqdm.write(f"  not in the test data and left out of the average: {', '.join(absent)}")


def file_hash(path):
    """First 12 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def data_hash(patches):
    """The same for what a store or tree holds: ids and band sums."""
    return hashlib.sha256(json.dumps([patches.ids, patches.index["sums"]]).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------- frozen features

class BandStatistics(nn.Module):
    """What a linear model can do without a network: (N, c, h, w) -> (N, 2c) mean and standard deviation per band."""

    def forward(self, x):
        return torch.cat((x.mean((2, 3)), x.std((2, 3))), 1)


@torch.no_grad()
def extract(encoders, scaling, patches, rows, args):
    """Run frozen encoders over the crops that cover the patches `rows` -> {"s1": (n, D) float32, ..., "single": (n,),
    "multi": (n, 8), "row": (n,) the crop's patch}; crops patch by patch."""
    device, grid, parts = torch.device(args.device), data.GridCrops(patches, rows, args.crop, args.batch_size), []
    cast = models.autocast(args.precision, device)
    encoders = encoders.to(device)
    for s1, s2, classes, row in tqdm(data.loader(grid, range(len(grid)), args.workers, device), total=len(grid),
                                     desc="features", unit="batch", delay=1):
        with cast:
            features = models.encode(encoders, *data.to_input(s1, s2, **scaling))
        labels = {"single": data.single_label(classes), "multi": data.multi_label(classes), "row": row}
        parts.append({**{name: models.pooled(f).float() for name, f in features.items()}, **labels})
    return {key: torch.cat([part[key] for part in parts]).cpu().numpy() for key in parts[0]}


def features_of(encoders, scaling, patches, rows, args, identity):
    """extract(), kept on disk under everything that it depends on."""
    key = hashlib.sha256(json.dumps([identity, data_hash(patches), patches.bands, args.crop, scaling, args.precision,
                                     rows.tolist()]).encode()).hexdigest()[:16]
    path = Path(args.results) / "features" / f"{key}.npz"
    if path.exists():
        return dict(np.load(path))
    features = extract(encoders, scaling, patches, rows, args)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".tmp"), "wb") as handle:
        np.savez(handle, **features)
    path.with_suffix(".tmp").rename(path)
    return features


# ---------------------------------------------------------------------------------------------- linear classifier

def fit(x, y, weight, penalty, start=None, tolerance=1e-6, iterations=500):
    """Logistic regression by L-BFGS -> (weights (D, C), bias (C,)), both for C classes or labels.

    x: (n, D). y: (n,) int64 for multinomial, (n, C) float for one-vs-rest. weight: (n,). Minimises the weighted mean of
    the cross-entropy (summed over labels) + penalty / 2 * |weights|^2; scikit-learn's C is 1 / (penalty * weight.sum()).
    """
    classes = int(y.max()) + 1 if y.dim() == 1 else y.shape[1]
    w, b = start or (x.new_zeros(x.shape[1], classes), x.new_zeros(classes))
    w, b, weight = w.clone().requires_grad_(), b.clone().requires_grad_(), weight / weight.sum()
    optimizer = torch.optim.LBFGS([w, b], max_iter=iterations, tolerance_grad=tolerance, tolerance_change=1e-12,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = x @ w + b
        loss = F.cross_entropy(logits, y, reduction="none") if y.dim() == 1 else \
            F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(1)
        loss = loss @ weight + penalty / 2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach(), b.detach()


def fit_present(x, y, weight, penalty, start=None, **how):
    """fit() on the classes that the training data tell apart -> function from (n, D) to (n, 8) logits. A class never
    seen is never predicted, a label always there always. start: the function of another penalty."""
    if y.dim() == 1:
        present, y = y.unique(return_inverse=True)
        constant = x.new_full((len(CLASSES),), -math.inf)
    else:
        share = y.mean(0)
        present = ((share > 0) & (share < 1)).nonzero()[:, 0]
        constant = torch.where(share == 1, math.inf, -math.inf).to(x)
        y = y[:, present].to(x)
    w, b = fit(x, y, weight, penalty, start and start.parameters, **how) if len(present) else (x.new_zeros(x.shape[1], 0), 0)

    def logits(x):
        full = constant.expand(len(x), -1).clone()
        full[:, present] = x @ w + b
        return full

    logits.parameters = w, b
    return logits


def folds(rows, labels, count, seed):
    """Fold of each crop: the patches of each class dealt out in turn, all crops of a patch into one fold."""
    rng, patches = np.random.default_rng(seed), np.unique(rows)
    order = rng.permutation(patches)
    order = order[np.argsort(labels[order], kind="stable")]
    fold = dict(zip(order.tolist(), np.arange(len(order)) % count))
    return np.array([fold[row] for row in rows.tolist()])


def choose_penalty(x, y, weight, rows, labels, task, seed):
    """Penalty with the best average score over five folds of the training patches; of equals the strongest."""
    fold = folds(rows, labels, min(5, len(np.unique(rows))), seed)
    held_out = {penalty: np.zeros((len(x), len(CLASSES)), np.float32) for penalty in PENALTIES}
    for k in np.unique(fold) if fold.max() else ():
        inside, outside, model = torch.from_numpy(fold != k), torch.from_numpy(fold == k), None
        for penalty in PENALTIES:  # from strong to weak, each starting where the one before ended
            model = fit_present(x[inside], y[inside], weight[inside], penalty, model, tolerance=1e-4, iterations=50)
            held_out[penalty][fold == k] = model(x[outside]).cpu().numpy()
    scores = [score(task, y.cpu().numpy(), held_out[penalty])[0]["average"] for penalty in PENALTIES]
    return PENALTIES[int(np.argmax(scores))] if fold.max() else 1.0


def knn(x, y, queries, k=20, temperature=0.07):
    """Weighted cosine k-nearest-neighbour vote (Wu et al. 2018) -> (n, 8) logits, positive where a label has a majority."""
    similarity, at = (F.normalize(queries) @ F.normalize(x).T).topk(min(k, len(x)), 1)
    votes = y if y.dim() == 2 else F.one_hot(y, len(CLASSES)).to(x)
    share = torch.einsum("nk,nkc->nc", (similarity / temperature).softmax(1), votes[at].to(x))
    return share - 0.5


def probe(train, test, names, task, chosen, labels, seed, args):
    """Fit on the training crops of the rows `chosen` (repeats counted as weights), predict the test crops.
    names: the encoders whose features are used -> (scores, predictions, what else to report)."""
    device, times = torch.device(args.device), np.bincount(chosen, minlength=len(labels))
    usable = train["single"] != IGNORE if task == "single" else train["multi"].any(1)
    use = np.flatnonzero((times[train["row"]] > 0) & usable)
    tested = np.flatnonzero(test["single"] != IGNORE if task == "single" else test["multi"].any(1))
    x, queries = (torch.from_numpy(np.concatenate([part[name][at] for name in names], 1)).to(device)
                  for part, at in ((train, use), (test, tested)))
    y, weight = torch.from_numpy(train[task][use]).to(device), torch.from_numpy(times[train["row"][use]]).to(x)
    counts = {"train_patches": len(np.unique(chosen)), "train_crops": len(use), "test_crops": len(tested)}
    if args.probe == "knn":
        logits = knn(x, y, queries)
    else:
        mean, sd = x.mean(0), x.std(0, correction=0)
        x, queries = ((v - mean) / torch.where(sd > 1e-6 * mean.abs() + 1e-12, sd, math.inf) for v in (x, queries))
        counts["penalty"] = float(choose_penalty(x, y, weight, train["row"][use], labels, task, seed))
        logits = fit_present(x.double(), y, weight.double(), counts["penalty"])(queries.double())
    return *score(task, test[task][tested], logits.cpu().numpy()), test[task][tested], counts


# ---------------------------------------------------------------------------------------------- report

def row_title(line):
    """Name of the table row that a result line belongs to."""
    title = TITLES[line["method"]]
    if line["protocol"] == "linear":
        return {"random": f"{title}, random weights", "bands": "Band means and sd"}.get(line["baseline"], title)
    return f"{title}, from scratch" if line["protocol"] == "scratch" and models.METHODS[line["method"]]["pretrained"] else title


def table_rows(lines):
    """Result lines -> {row title: lines}, in the poster's order. Runs of one row with different settings become rows of
    their own, named by what differs, so that nothing is averaged that does not belong together."""
    order = {title: k for k, title in enumerate(TITLES.values())}
    rows, settings = {}, {}
    for line in lines:
        own = {**line["args"], "checkpoint": line["checkpoint"], "data": line["data"]}
        rows.setdefault(row_title(line), {}).setdefault(json.dumps(own, sort_keys=True), []).append(line)
        settings[json.dumps(own, sort_keys=True)] = own
    named = {}
    for title in sorted(rows, key=lambda t: (order.get(t.split(",")[0], len(order)), t)):
        differ = sorted({key for a in rows[title] for b in rows[title] for key in settings[a]
                         if settings[a][key] != settings[b].get(key)})
        for key, found in sorted(rows[title].items()):
            values = ", ".join(f"{name} {settings[key][name]}" for name in differ)
            named[f"{title} ({values})" if differ else title] = found
    return named


def cell(values):
    """Percent, mean ± standard deviation over seeds, rounded as on the poster."""
    values = np.array([np.nan if v is None else v for v in values], float) * 100
    if np.isnan(values).all():
        return "-"
    mean = f"{np.nanmean(values):.0f}"
    return f"{mean} ± {np.nanstd(values, ddof=1):.0f}" if np.isfinite(values).sum() > 1 else mean


def markdown(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def main_table(lines, task, simulated):
    """One of the poster's two tables as Markdown."""
    lines = [line for line in lines if line["task"] == task and line["protocol"] != "linear" and line["label_fraction"] == 1]
    named = table_rows(lines)
    best = max((np.mean([line["average"] for line in found]) for found in named.values()), default=None)
    rows = []
    for title, found in named.items():
        averages, poster = [line["average"] for line in found], POSTER[found[0]["method"]]
        row = [title, *(cell([line["class"][c] for line in found]) for c in range(len(CLASSES)))]
        row.append(f"**{cell(averages)}**" if np.mean(averages) == best else cell(averages))
        if not simulated:
            row += [poster[2 * (task == "multi")], f"{100 * np.mean(averages) - poster[2 * (task == 'multi')]:+.0f}"]
        row += [cell([line["overall"] for line in found])] + [poster[2 * (task == "multi") + 1]] * (not simulated)
        rows.append([*row, len(found)])
    overall = "OA" if task == "single" else "O-F1"
    header = ["", *CLASSES, "Average", *(["poster", "difference"] * (not simulated)), overall,
              *([f"poster {overall}"] * (not simulated)), "seeds"]
    title = "Single-label classification, accuracy" if task == "single" else "Multi-label classification, F1"
    missing = [name for name in TITLES.values() if not any(title.split(" (")[0].split(",")[0] == name.split(" (")[0]
                                                          for title in named)]
    return f"## {title}, %\n\n" + markdown(header, rows) + (f"\nMissing: {', '.join(missing)}.\n" if missing else "")


def probe_table(lines):
    """All linear probes: method by sensors, both tasks."""
    header = ["features", "sensors", "labels", "single average", "OA", "multi average", "O-F1", "seeds"]
    rows = []
    for title, found in table_rows([line for line in lines if line["protocol"] == "linear"]).items():
        for probe, sensors, fraction in sorted({(line["probe"], line["sensors"], line["label_fraction"]) for line in found}):
            row, seeds = [title + ", kNN" * (probe == "knn"), sensors, f"{fraction:.0%}"], set()
            for task in ("single", "multi"):
                own = [line for line in found if (line["task"], line["probe"], line["sensors"], line["label_fraction"])
                       == (task, probe, sensors, fraction)]
                row += [cell([line[key] for line in own]) if own else "-" for key in ("average", "overall")]
                seeds |= {line["seed"] for line in own}
            rows.append([*row, len(seeds)])
    return "## Frozen encoders, linear classifier, %\n\n" + (markdown(header, rows) if rows else "Missing: all linear probes.\n")


def draw_fractions(lines, out, simulated):
    """Average accuracy against the share of labels: our mean and standard deviation over seeds, the poster's points."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.6, 4))
    for method, points in POSTER_FRACTIONS.items() if not simulated else ():
        axis.plot((1, 10, 50, 100), points, MARKERS[method][0], color="0.6", ms=5, label=f"{TITLES[method]}, poster")
    lines = [line for line in lines if line["task"] == "single" and line["method"] in MARKERS
             and (line["protocol"] == "finetune") == models.METHODS[line["method"]]["pretrained"]]
    for title, found in table_rows(lines).items():
        marker, colour = MARKERS[found[0]["method"]]
        x = sorted({line["label_fraction"] for line in found})
        y = [[100 * line["average"] for line in found if line["label_fraction"] == fraction] for fraction in x]
        axis.errorbar([100 * v for v in x], [np.mean(v) for v in y], [np.std(v, ddof=1) if len(v) > 1 else 0 for v in y],
                      color=colour, marker=marker, ms=5, lw=1.2, capsize=3, label=title)
    axis.set(xscale="log", xlabel="labelled training data, %", ylabel="average accuracy, %", xticks=(1, 10, 50, 100),
             xticklabels=("1", "10", "50", "100"), title="SIMULATED data" if simulated else "Single-label classification")
    axis.minorticks_off()
    axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def report(folder):
    """Print tables.md of a results folder and write it there with its figure; reads results.jsonl and nothing else."""
    lines = Results(folder).read()
    if not lines:
        raise data.DataError(f"{folder}/results.jsonl: no results there; linear_eval.py and finetune.py write them")
    simulated = any(line["simulated"] for line in lines)
    title = "# SIMULATED data: these numbers say nothing about the methods" if simulated else \
        "# Results beside the poster (Scheibenreif, Mommert, Borth 2022)"
    note = "Mean ± standard deviation over seeds; best average in bold; a class that does not occur in the test data is `-`.\n"
    text = "\n".join((f"{title}\n", note, main_table(lines, "single", simulated), main_table(lines, "multi", simulated),
                      probe_table(lines)))
    print(text)
    Path(folder, "tables.md").write_text(text)
    draw_fractions(lines, Path(folder, "label_fraction.png"), simulated)
    print(f"wrote {folder}/tables.md and label_fraction.png")


# ---------------------------------------------------------------------------------------------- command line

def add_evaluation_options(add):
    """What linear_eval.py and finetune.py ask for alike."""
    add("--data", default="datasets/dfc2020", help="store or tree with labels (default %(default)s)")
    add("--task", nargs="+", default=["single"], choices=("single", "multi"))
    add("--label-fraction", type=float, nargs="+", default=[1.0], help="share of the labelled patches, e.g. 0.01 0.1 1")
    add("--label-sampling", default="patches", choices=("patches", "rows"), help="rows: after the repeats, as published")
    add("--seeds", type=int, default=5, help="runs, with seeds 0, 1, ... (default %(default)s)")
    add("--crop", type=int, help="side of the crops, px (default: that of pretraining, else 128)")
    add("--scale", choices=data.SCALES, help="network input (default: that of pretraining, else patch-max)")
    add("--results", default="results", help="folder of results.jsonl (default %(default)s)")
    add("--precision", default="auto", choices=("auto", "bf16", "float32"), help="auto: bf16 where it is native")
    add("--workers", type=int, help="processes that read (default: one per core)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def check_fractions(args):
    for fraction in args.label_fraction:
        if not 0 < fraction <= 1:
            raise data.DataError(f"--label-fraction {fraction:g}: it is a share above 0, at most 1")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--report", metavar="DIR", help="print and write the tables of a results folder, and stop")
    add("--checkpoint", help="pretrained encoders: last.pt of a run, or the file released with the paper")
    add("--baseline", choices=("random", "bands"), help="instead: untrained encoders of --method, or per-band mean and sd")
    add("--method", default="d-simclr", choices=TITLES, help="of --baseline (default %(default)s)")
    add("--sensors", default="both", choices=("both", "s1", "s2"), help="use only this sensor's encoder")
    add("--probe", default="linear", choices=("linear", "knn"))
    add("--batch-size", type=int, default=100, help="crops per forward pass")
    add_evaluation_options(add)
    args = parser.parse_args()
    if not args.report and (args.checkpoint is None) == (args.baseline is None):
        parser.error("give either --checkpoint or --baseline (or --report DIR)")
    check_fractions(args)
    return args


def main():
    args = arguments()
    if args.report:
        return report(args.report)
    content = models.load_checkpoint(args.checkpoint) if args.checkpoint else {"method": args.method, "args": {}}
    method, identity = content["method"], file_hash(args.checkpoint) if args.checkpoint else None
    bands = content["bands"]["s1"] + content["bands"]["s2"] if args.checkpoint else models.METHODS[method].get("bands")
    patches, train_rows, test_rows = open_labelled(args, bands)
    args.crop = args.crop or content["args"].get("crop", 128)
    if args.checkpoint:
        if args.scale not in (None, content["scale"]):
            raise data.DataError(f"--scale {args.scale}: {args.checkpoint} was trained with {content['scale']}; leave it out")
        encoders, scaling = models.load_encoders(content)
    else:
        scaling = {"scale": args.scale or "patch-max", "stats": patches.stats({"validation"})}
    inputs = models.METHODS[method]["inputs"]
    names = inputs if args.sensors == "both" else [name for name in inputs if name == args.sensors]
    if not names:
        raise data.DataError(f"--sensors {args.sensors}: {TITLES[method]} has no such encoder")
    settings = {"crop": args.crop, "scale": scaling["scale"], "label_sampling": args.label_sampling,
                "precision": args.precision}
    results = Results(args.results)
    labels = patches.labels[train_rows]
    at = np.full(len(patches), -1)
    at[train_rows] = np.arange(len(train_rows))  # patch -> its place among the training patches
    for seed in range(args.seeds):
        train = None
        for task in args.task:
            for fraction in args.label_fraction:
                run = {"method": method, "protocol": "linear", "probe": args.probe, "baseline": args.baseline,
                       "sensors": args.sensors, "task": task, "label_fraction": fraction, "seed": seed,
                       "checkpoint": identity, "data": data_hash(patches), "args": settings}
                if results.has(run):
                    continue
                if train is None:
                    if args.baseline == "random":
                        torch.manual_seed(seed)
                        encoders, identity_of = models.make_encoders(method, patches.bands).eval(), f"random {method} {seed}"
                    elif args.baseline == "bands":
                        encoders, identity_of = nn.ModuleDict({name: BandStatistics() for name in inputs}), f"bands {method}"
                    train, test = (features_of(encoders, scaling, patches, rows, args, identity or identity_of)
                                   for rows in (train_rows, test_rows))
                    train["row"] = at[train["row"]]
                chosen = training_rows(labels, fraction, seed, args.label_sampling)
                scores, _, _, counts = probe(train, test, names, task, chosen, labels, seed, args)
                results.add(run, scores, counts=counts, simulated=patches.simulated or content.get("simulated", False))


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
