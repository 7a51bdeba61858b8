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
    """Logistic regression by L-BFGS -> function from (n, D) features to (n, 8) logits.

    x: (n, D). y: (n,) int64 for multinomial, (n, 8) 0/1 for one-vs-rest. weight: (n,). Minimises the weighted mean of the
    cross-entropy (summed over labels) + penalty / 2 * |weights|^2; scikit-learn's C is 1 / (penalty * weight.sum()).
    A class that no sample has gets logit -inf, a label that all have +inf. start: the function of another penalty.
    """
    if y.dim() == 1:
        present, target = y.unique(return_inverse=True)
        full = x.new_full((len(CLASSES),), -math.inf)
        cross_entropy = F.cross_entropy
    else:
        share = y.mean(0)
        present = ((share > 0) & (share < 1)).nonzero()[:, 0]
        full, target = torch.where(share == 1, math.inf, -math.inf).to(x), y[:, present].to(x)
        cross_entropy = F.binary_cross_entropy_with_logits
    w, b = start.parameters if start else (x.new_zeros(x.shape[1], len(present)), x.new_zeros(len(present)))
    w, b, weight = w.clone().requires_grad_(), b.clone().requires_grad_(), weight / weight.sum()
    optimizer = torch.optim.LBFGS([w, b], max_iter=iterations, tolerance_grad=tolerance, tolerance_change=1e-12,
                                  history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(x @ w + b, target, reduction="none").reshape(len(x), -1).sum(1) @ weight
        loss = loss + penalty / 2 * w.square().sum()
        loss.backward()
        return loss

    def logits(x):
        out = full.repeat(len(x), 1)
        out[:, present] = x @ w.detach() + b.detach()
        return out

    optimizer.step(closure)
    logits.parameters = w.detach(), b.detach()
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
            model = fit(x[inside], y[inside], weight[inside], penalty, model, tolerance=1e-4, iterations=50)
            held_out[penalty][fold == k] = model(x[outside]).cpu().numpy()
    scores = [score(task, y.cpu().numpy(), held_out[penalty])["average"] for penalty in PENALTIES]
    return PENALTIES[int(np.argmax(scores))] if fold.max() else 1.0


def knn(x, y, queries, k=20, temperature=0.07):
    """Weighted cosine k-nearest-neighbour vote (Wu et al. 2018) -> (n, 8) logits, positive where a label has a majority."""
    similarity, at = (F.normalize(queries) @ F.normalize(x).T).topk(min(k, len(x)), 1)
    votes = y if y.dim() == 2 else F.one_hot(y, len(CLASSES)).to(x)
    share = torch.einsum("nk,nkc->nc", (similarity / temperature).softmax(1), votes[at].to(x))
    return share - 0.5


def probe(train, test, names, task, chosen, labels, seed, args):
    """Fit on the training crops of the rows `chosen` (repeats counted as weights), predict the test crops.
    names: the encoders whose features are used -> (scores, what else to report)."""
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
        logits = fit(x.double(), y, weight.double(), counts["penalty"])(queries.double())
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
    order, rows, named = list(TITLES.values()), {}, {}
    for line in lines:
        settings = json.dumps({**line["args"], "checkpoint": line["checkpoint"], "data": line["data"]}, sort_keys=True)
        rows.setdefault(row_title(line), {}).setdefault(settings, []).append(line)
    for title in sorted(rows, key=lambda t: (order.index(t.split(",")[0]) if t.split(",")[0] in order else len(order), t)):
        all_settings = [json.loads(text) for text in rows[title]]
        differ = [key for key in all_settings[0] if any(s.get(key) != all_settings[0][key] for s in all_settings)]
        for settings, found in zip(all_settings, rows[title].values()):
            values = ", ".join(f"{key} {settings[key]}" for key in differ)
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
    best, rows = max((np.mean(column(found, "average")) for found in named.values()), default=None), []
    for title, found in named.items():
        average = 100 * np.mean(column(found, "average"))
        poster = POSTER[found[0]["method"]][:2] if task == "single" else POSTER[found[0]["method"]][2:]
        row = [title, *(cell(column(found, c)) for c in range(len(CLASSES)))]
        row.append(f"**{cell(column(found, 'average'))}**" if average == 100 * best else cell(column(found, "average")))
        row += [] if simulated else [poster[0], f"{average - poster[0]:+.0f}"]
        rows.append([*row, cell(column(found, "overall")), *([] if simulated else [poster[1]]), len(found)])
    title, overall = ("Single-label classification, accuracy", "OA") if task == "single" else \
        ("Multi-label classification, F1", "O-F1")
    header = ["", *CLASSES, "Average", *([] if simulated else ["poster", "difference"]), overall,
              *([] if simulated else [f"poster {overall}"]), "seeds"]
    there = {found[0]["method"] for found in named.values()}
    missing = ", ".join(TITLES[method] for method in TITLES if method not in there)
    return f"## {title}, %\n\n{markdown(header, rows)}" + (f"\nMissing: {missing}.\n" if missing else "")


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
    return markdown(header, rows) if rows else "Missing: no such results.\n"


def t_quantile(df, probability=0.975):
    """Quantile of Student's t distribution, by summing its density."""
    x = np.linspace(0, 1000, 2_000_001)
    density = np.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - (df + 1) / 2 * np.log1p(x * x / df))
    return x[np.searchsorted(np.cumsum(density) * x[1] / math.sqrt(df * math.pi), probability - 0.5)]


def compare(lines, one, other):
    """Difference of two methods' averages with its 95 % interval over seeds (Welch), as Markdown."""
    rows = []
    for task in ("single", "multi"):
        chosen = [line for line in lines if line["task"] == task and line["label_fraction"] == 1]
        for protocol, part in (("fine-tuned", [line for line in chosen if line["protocol"] != "linear"]),
                               ("linear", [line for line in chosen if line["protocol"] == "linear"])):
            named = table_rows(part)
            for a, b in ((a, b) for a in named for b in named if (named[a][0]["method"], named[b][0]["method"]) == (one, other)):
                x, y = (100 * np.array(column(named[t], "average")) for t in (a, b))
                text = "needs two seeds of each"
                if min(len(x), len(y)) > 1:
                    u, v = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
                    df = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1)) if u + v else 1
                    half = t_quantile(df) * math.sqrt(u + v)
                    low, high = x.mean() - y.mean() - half, x.mean() - y.mean() + half
                    text = f"{low:+.1f} to {high:+.1f}" + (", could be none" if low <= 0 <= high else "")
                rows.append([a, b, task, protocol, f"{x.mean() - y.mean():+.1f}", text, f"{len(x)} and {len(y)}"])
    if not rows:
        raise data.DataError(f"--compare {one} {other}: no results of both in one table")
    header = ["", "against", "task", "", "difference of averages, points", "95 % interval (Welch)", "seeds"]
    return f"## Difference\n\n{markdown(header, rows)}"


def as_csv(lines):
    """Every number of the tables and the figure: one line per row, protocol, task, share of labels and metric."""
    text = "row,method,protocol,sensors,task,label_fraction,metric,mean,sd,seeds\n"
    groups = {(line["protocol"], line.get("sensors", ""), line["task"], line["label_fraction"]) for line in lines}
    for group in sorted(groups):
        part = [line for line in lines if (line["protocol"], line.get("sensors", ""), line["task"], line["label_fraction"]) == group]
        for title, found in table_rows(part).items():
            for key, name in ((*enumerate(CLASSES), ("average", "average"), ("overall", "overall"))):
                values = np.array([v for v in column(found, key) if v is not None])
                if len(values):
                    sd = f"{values.std(ddof=1):.6f}" if len(values) > 1 else ""
                    text += f'"{title}",{found[0]["method"]},{",".join(map(str, group))},{name},{values.mean():.6f},{sd},{len(values)}\n'
    return text


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
        axis.errorbar([100 * v for v in x], [np.mean(v) for v in y], [np.std(v, ddof=1) if len(v) > 1 else 0 for v in y],
                      color=colour, marker=marker, ms=5, lw=1.2, capsize=3, label=title)
    axis.set(xscale="log", xlabel="labelled training data, %", ylabel="average accuracy, %", xticks=(1, 10, 50, 100),
             xticklabels=("1", "10", "50", "100"), title="SIMULATED data" if simulated else "Single-label classification")
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
    for row, column_ in np.ndindex(*share.shape):
        if count[row].any():
            axis.text(column_, row, f"{100 * share[row, column_]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if share[row, column_] > 0.5 else "black")
    axis.set(xticks=range(8), yticks=range(8), yticklabels=CLASSES, xlabel="predicted", ylabel="true, % of row",
             title=f"{'SIMULATED data, ' if simulated else ''}{title}, {len(lines)} seeds")
    axis.set_xticklabels(CLASSES, rotation=45, ha="right")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def report(args):
    """Print tables of a results folder and write them there with its figures; reads results.jsonl and nothing else."""
    folder = Path(args.report)
    lines = Results(folder).read() if folder.is_dir() else []
    if not lines:
        raise data.DataError(f"{folder}/results.jsonl: no results there; linear_eval.py and finetune.py write them")
    simulated, written = any(line["simulated"] for line in lines), [f"tables.{args.format}", "label_fraction.png"]
    linear = [line for line in lines if line["protocol"] == "linear"]
    one_missing = {line["method"] for line in linear if line["sensors"] != "both"}
    if args.format == "csv":
        text = as_csv(lines)
    else:
        title = "# SIMULATED data: these numbers say nothing about the methods\n" if simulated else \
            "# Results beside the poster (Scheibenreif, Mommert, Borth 2022)\n"
        note = "Mean ± standard deviation over seeds; best average bold; `-`: the class does not occur in the test data.\n"
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
    tuned = [line for line in lines if line["task"] == "single" and
             (line["protocol"] == "finetune") == models.METHODS[line["method"]]["pretrained"] and line["protocol"] != "linear"]
    draw_fractions([line for line in tuned if line["method"] in MARKERS], folder / written[1], simulated)
    for title, found in table_rows([line for line in tuned if line["label_fraction"] == 1]).items():
        name = f"confusion_{title.lower().replace(' ', '_').translate(dict.fromkeys(map(ord, '()[],'))).replace('.', '')}.png"
        draw_confusion(title, found, folder / name, simulated)
        written.append(name)
    print(f"wrote {', '.join(written)} in {folder}")


# ---------------------------------------------------------------------------------------------- command line

def add_evaluation_options(add):
    """What linear_eval.py and finetune.py ask for alike."""
    add("--data", default="datasets/dfc2020", help="store or tree with labels (default %(default)s)")
    add("--task", nargs="+", default=["single"], choices=("single", "multi"))
    add("--label-fraction", type=share, nargs="+", default=[1.0], help="share of the labelled patches, e.g. 0.01 0.1 1")
    add("--label-sampling", default="patches", choices=("patches", "rows"), help="rows: after the repeats, as published")
    add("--seeds", type=int, default=5, help="runs, with seeds 0, 1, ... (default %(default)s)")
    add("--crop", type=int, help="side of the crops, px (default: that of pretraining, else 128)")
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


def open_labelled(args, content):
    """Open --data for a checkpoint's content, or {} -> (Patches, training rows, test rows, scaling for data.to_input);
    settles --crop. Raises DataError or CheckpointError where they do not go together."""
    method, asked = content.get("method", args.method), args.bands
    bands = content["bands"]["s1"] + content["bands"]["s2"] if content else asked or models.METHODS[method].get("bands")
    for option, value, trained in (("--scale", args.scale, content.get("scale")), ("--bands", asked, content and bands)):
        if content and value not in (None, trained):
            raise models.CheckpointError(f"{args.checkpoint}: was trained with {option} {trained}, not {value}")
    patches = data.open_data(args.data, bands, args.cache, args.workers, args.device)
    train, test = (np.flatnonzero(patches.splits == split) for split in ("validation", "test"))
    if patches.labels is None or not (patches.labels[train] != IGNORE).any() or not len(test):
        raise data.DataError(f"{args.data}: needs labelled patches of the splits `validation` (trained on) and `test`; it "
                             f"has {len(train)} and {len(test)}{' without labels' if patches.labels is None else ''}")
    counts = np.bincount(patches.labels[train], minlength=IGNORE + 1)[:len(CLASSES)]
    if not counts.all():
        print("no training patch of", ", ".join(name for name, count in zip(CLASSES, counts) if not count))
    for fraction in args.label_fraction:
        few = [name for name, count in zip(CLASSES, counts) if count and round(fraction * count) < 1]
        if few and args.label_sampling == "patches":
            print(f"{fraction:.1%} of {', '.join(few)} is less than one patch: one of each is used")
    args.crop = args.crop or content.get("args", {}).get("crop", 128)
    scaling = {"scale": content.get("scale") or args.scale or "patch-max",
               "stats": content["stats"] if content else patches.stats({"validation"})}
    return patches, train, test, scaling


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--report", metavar="DIR", help="print and write the tables of a results folder, and stop")
    add("--format", default="md", choices=("md", "csv"), help="of --report")
    add("--compare", nargs=2, choices=TITLES, metavar="METHOD", help="with --report: difference of two rows")
    add("--checkpoint", help="pretrained encoders: last.pt of a run, or the file released with the paper")
    add("--baseline", choices=("random", "bands"), help="instead: untrained encoders of --method, or per-band mean and sd")
    add("--method", default="d-simclr", choices=TITLES, help="of --baseline (default %(default)s)")
    add("--sensors", default="both", choices=("both", "s1", "s2"), help="use only this sensor's encoder")
    add("--probe", default="linear", choices=("linear", "knn"), help="knn: 20 nearest by cosine, nothing to fit")
    add("--batch-size", type=int, default=100, help="crops per forward pass (default %(default)s)")
    add_evaluation_options(add)
    args = parser.parse_args()
    if not args.report and (args.checkpoint is None) == (args.baseline is None):
        parser.error("give either --checkpoint or --baseline (or --report DIR)")
    return args


def main():
    args = arguments()
    if args.report:
        return report(args)
    content = models.load_checkpoint(args.checkpoint) if args.checkpoint else {}
    method, identity = content.get("method", args.method), file_hash(args.checkpoint) if content else None
    patches, train_rows, test_rows, scaling = open_labelled(args, content)
    inputs = models.METHODS[method]["inputs"]
    names = inputs if args.sensors == "both" else [name for name in inputs if name == args.sensors]
    if not names:
        raise data.DataError(f"--sensors {args.sensors}: {TITLES[method]} has no such encoder")
    settings = {"crop": args.crop, "scale": scaling["scale"], "label_sampling": args.label_sampling,
                "precision": args.precision, "bands": patches.bands}
    results, labels, source = Results(args.results), patches.labels[train_rows], data_hash(patches)
    for seed in range(args.seeds):
        runs = [{"method": method, "protocol": "linear", "probe": args.probe, "baseline": args.baseline, "task": task,
                 "sensors": args.sensors, "label_fraction": fraction, "seed": seed, "checkpoint": identity, "data": source,
                 "args": settings} for task in args.task for fraction in args.label_fraction]
        runs = [run for run in runs if not results.has(run)]
        if not runs:
            continue
        torch.manual_seed(seed)
        encoders = nn.ModuleDict({name: BandStatistics() for name in inputs}) if args.baseline == "bands" else \
            models.load_encoders(content)[0] if content else models.make_encoders(method, patches.bands).eval()
        name = identity or [args.baseline, method, seed * (args.baseline == "random")]
        train, test = (features_of(encoders, scaling, patches, rows, args, name) for rows in (train_rows, test_rows))
        train["row"] = np.searchsorted(train_rows, train["row"])  # place among the training patches
        for run in runs:
            chosen = training_rows(labels, run["label_fraction"], seed, args.label_sampling)
            scores, counts = probe(train, test, names, run["task"], chosen, labels, seed, args)
            results.add(run, scores, counts=counts, simulated=patches.simulated or content.get("simulated", False))


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
