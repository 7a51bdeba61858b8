"""Train and test the seven rows of the tables: four from scratch, three from pretrained encoders.

    python finetune.py --method late-fusion --data STORE --task single multi
    python finetune.py --checkpoint runs/d-simclr/last.pt --data STORE --label-fraction 0.1
    python finetune.py --report results      # tables.md and label_fraction.png, beside the poster's

Every layer is trained, on random crops of the split `validation`, its patches repeated to balance
the classes; the last epoch is tested on crops that cover each patch of the split `test`. A finished
run is one JSON line in results.jsonl and is not repeated; the loss of every epoch is in log.jsonl.
"""
import collections
import functools
import itertools
import json
import math
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import linear_eval
import models
from linear_eval import TITLES

# Percent; Scheibenreif, Mommert, Borth 2022: average and overall, of accuracy and of F1.
POSTER = {
    "single": {"only-s1": (57, 62), "only-s2": (57, 62), "early-fusion": (62, 66),
               "late-fusion": (62, 65), "simclr-rgb": (49, 58), "d-simclr": (70, 70),
               "mma": (69, 69)},
    "multi": {"only-s1": (57, 62), "only-s2": (58, 63), "early-fusion": (60, 62),
              "late-fusion": (54, 61), "simclr-rgb": (39, 49), "d-simclr": (67, 69),
              "mma": (62, 66)}}
POSTER_NOTE = ", beside the poster (Scheibenreif, Mommert, Borth 2022)"
POSTER_PERCENT = (1, 10, 50, 100)  # of the labels, with these single-label averages:
POSTER_FRACTIONS = {"mma": (47.5, 59.7, 64.2, 69.0), "d-simclr": (36.5, 65.3, 68.4, 70.0),
                    "early-fusion": (34.6, 52.2, 55.1, 62.0),
                    "late-fusion": (39.8, 50.0, 61.7, 62.0)}
MARKERS = {"mma": ("o", "#c0392b"), "d-simclr": ("s", "#2b6cb0"),
           "early-fusion": ("^", "#1b7837"), "late-fusion": ("v", "#e08214")}
HEADINGS = {"single": ("Single-label classification, accuracy", "OA"),
            "multi": ("Multi-label classification, F1", "O-F1")}


# ----------------------------------------------------------------------------------------- training

def task_loss(task, logits, classes):
    """Cross-entropy or, for several labels, binary cross-entropy of (N, C) logits, mean over the
    crops that have a label. classes: (N, h, w)."""
    count = logits.shape[1]
    if task == "single":
        label = data.single_label(classes, count)
        loss = F.cross_entropy(logits, label, ignore_index=data.IGNORE, reduction="sum")
        return loss / (label != data.IGNORE).sum().clamp(1)
    label = data.multi_label(classes, count=count)
    has = label.any(1)
    loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none").mean(1)
    return (loss * has).sum() / has.sum().clamp(1)


def make_classifier(args, content, patches, seed):
    """-> Classifier, its encoders from a checkpoint's content if there is one, else drawn by the
    seed."""
    torch.manual_seed(seed)
    encoders = models.make_encoders(args.method, patches.bands, args.arch)
    if content:
        encoders, _ = models.load_encoders(content)
    model = models.Classifier(encoders, len(patches.classes))
    return model.to(args.device, memory_format=torch.channels_last)


def train(model, scaling, patches, rows, task, seed, args, name):
    """Fit a classifier to random crops of the patches `rows`, repeats included. DataError where the
    loss is not finite."""
    plan = functools.partial(data.random_crops, rows, patches.size, args.crop, args.batch_size,
                             seed)
    batches = itertools.chain.from_iterable(map(plan, range(args.epochs)))
    per_epoch = len(plan(0))
    optimizer = torch.optim.Adam(
        [{"params": model.encoders.parameters(), "lr": args.lr},
         {"params": model.fc.parameters(), "lr": args.classifier_lr}],
        weight_decay=args.weight_decay, fused=True)
    drop = args.drop_epoch * per_epoch
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [drop], 0.1)
    model.train()
    feed = data.loader(patches, batches, args.crop, args.device, args.threads, classes=True)
    bar = tqdm(feed, name, args.epochs * per_epoch, unit="step", leave=False, delay=1)
    for step, (s1, s2, classes, _) in enumerate(bar, 1):
        s1, s2 = data.to_input(s1, s2, **scaling)
        if len(s1) == 1:  # batch norm may need two
            s1, s2, classes = (torch.cat((x, x)) for x in (s1, s2, classes))
        s1, s2 = (x.contiguous(memory_format=torch.channels_last) for x in (s1, s2))
        with models.autocast(args.precision, args.device):
            logits = model(s1, s2)
        loss = task_loss(task, logits.float(), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % per_epoch == 0:  # once an epoch, since the host waits for the device here
            entry = {"run": name, "epoch": step // per_epoch, "loss": loss.item(),
                     "lr": schedule.get_last_lr()[0]}
            if not math.isfinite(entry["loss"]):
                raise data.DataError(f"{name}: the loss is {entry['loss']} after epoch "
                                     f"{entry['epoch']}: try a lower --lr or --precision float32")
            with open(Path(args.results, "log.jsonl"), "a") as log:
                print(json.dumps(entry), file=log)


def evaluate(args, content):
    """Train and test a classifier per task, label fraction and seed: a result line each."""
    patches, train_rows, test_rows, scaling = linear_eval.open_labelled(args, content)
    results, labels = linear_eval.Results(args.results), patches.labels[train_rows]
    fixed = {"protocol": "finetune" if content else "scratch",
             **linear_eval.describe(args, content, patches, "epochs", "batch_size", "lr",
                                    "classifier_lr", "weight_decay", "drop_epoch")}
    for task, fraction, seed in itertools.product(args.task, args.label_fraction,
                                                  range(args.seeds)):
        key = {**fixed, "task": task, "label_fraction": fraction, "seed": seed}
        if results.has(key):
            continue
        start = time.perf_counter()
        name = f"{args.method} {task} {fraction:.0%} seed {seed}"
        chosen = linear_eval.training_rows(labels, fraction, seed, args.label_sampling)
        model = make_classifier(args, content, patches, seed)
        train(model, scaling, patches, train_rows[chosen], task, seed, args, name)
        crops = linear_eval.extract(model.eval(), scaling, patches, test_rows, args)
        has = crops[task].any(1)
        scores = linear_eval.score(task, crops[task][has], crops["x"][has])
        counts = {"train_patches": len(np.unique(chosen)), "train_rows": len(chosen),
                  "test_crops": int(has.sum())}
        results.add(key, scores, counts=counts, seconds=round(time.perf_counter() - start, 1))


# ------------------------------------------------------------------------------------------- report

def row_title(line):
    """Name of the table row that a result line belongs to."""
    title = TITLES[line["method"]]
    if line["protocol"] == "linear":
        titles = {"random": f"{title}, random weights", "bands": "Band means and sd"}
        title = titles.get(line["baseline"], title)
        return f"{title}, kNN" if line["probe"] == "knn" else title
    pretrained = models.METHODS[line["method"]]["pretrained"]
    return f"{title}, from scratch" if line["protocol"] == "scratch" and pretrained else title


def settings_of(line):
    """What must be the same in lines that are averaged, beside their row."""
    settings = {**line["args"], **{name: line[name] for name in ("method", "checkpoint", "data")}}
    if bands := settings.get("bands"):
        settings["bands"] = " ".join(bands["s1"] + bands["s2"])
    return settings


def table_rows(lines):
    """Result lines -> {row title: lines}, in the poster's order. Runs of one row with different
    settings become rows of their own, named by what differs."""
    order, groups = [*TITLES.values(), "Band means and sd"], {}
    for line in lines:
        text = json.dumps(settings_of(line), sort_keys=True)
        groups.setdefault(row_title(line), {}).setdefault(text, []).append(line)
    rows = {}
    for title in sorted(groups, key=lambda title: (order.index(title.split(",")[0]), title)):
        settings = [settings_of(group[0]) for group in groups[title].values()]
        names = sorted(set().union(*settings))
        differ = [name for name in names if len({each.get(name) for each in settings}) > 1]
        for each, group in zip(settings, groups[title].values()):
            values = ", ".join(f"{name} {each.get(name)}" for name in differ)
            rows[f"{title} [{values}]" if differ else title] = group
    return rows


def percent(values):
    """Mean ± standard deviation over seeds, rounded as on the poster."""
    values = 100 * np.array([value for value in values if value is not None])
    if not len(values):
        return "-"
    spread = f" ± {values.std(ddof=1):.0f}" if len(values) > 1 else ""
    return f"{values.mean():.0f}{spread}"


def markdown(header, rows):
    """Markdown table, or what stands in its place where there is nothing in it."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in
             (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n" if rows else "No results.\n"


def main_table(lines, task, classes, beside_poster):
    """One of the poster's two tables as Markdown."""
    named = table_rows([line for line in lines if line["task"] == task
                        and line["protocol"] != "linear" and line["label_fraction"] == 1])
    means = {title: 100 * np.mean([line["average"] for line in group])
             for title, group in named.items()}
    heading, pooled = HEADINGS[task]
    header = ["", *classes, "Average", pooled, "seeds"]
    if beside_poster:
        header[-2:] = ["poster", "difference", pooled, f"poster {pooled}", "seeds"]
    rows = []
    for title, group in named.items():
        cells = [percent(values) for values in zip(*(line["class"] for line in group))]
        shown = percent(line["average"] for line in group)
        cells.append(f"**{shown}**" if means[title] == max(means.values()) else shown)
        cells.append(percent(line["overall"] for line in group))
        if beside_poster:
            average, overall = POSTER[task][group[0]["method"]]
            published = average, f"{round(means[title] - average):+d}", overall
            if row_title(group[0]) not in TITLES.values():  # the poster has no such row
                published = "-", "-", "-"
            cells[-1:] = *published[:2], cells[-1], published[2]
        rows.append([title, *cells, len(group)])
    present = {row_title(group[0]) for group in named.values()}
    missing = ", ".join(title for title in TITLES.values() if title not in present)
    note = f"\nMissing: {missing}.\n" if missing else ""
    return f"### {heading}, %\n\n{markdown(header, rows)}{note}"


def probe_table(lines):
    """Frozen encoders: rows by features, sensors used and share of labels; both tasks."""
    rows = []
    for title, group in table_rows(lines).items():
        inputs = {}
        for line in group:
            tasks = inputs.setdefault((line["sensors"], line["label_fraction"]), {})
            tasks.setdefault(line["task"], []).append(line)
        for (sensors, fraction), tasks in sorted(inputs.items()):
            cells = [percent(line[name] for line in tasks.get(task, ()))
                     for task in HEADINGS for name in ("average", "overall")]
            seeds = max(map(len, tasks.values()))
            rows.append([title, sensors, f"{fraction:.0%}", *cells, seeds])
    header = ["features", "sensors", "labels", "single average", "OA", "multi average", "O-F1",
              "seeds"]
    return f"### Frozen encoders, linear classifier, %\n\n{markdown(header, rows)}"


def draw_fractions(axis, lines, beside_poster):
    """Average accuracy against the share of labels: our mean and standard deviation over seeds, and
    the poster's points."""
    for method, points in POSTER_FRACTIONS.items() if beside_poster else ():
        axis.plot(POSTER_PERCENT, points, MARKERS[method][0], color="0.6", ms=5,
                  label=f"{TITLES[method]}, poster")
    dashes = collections.defaultdict(lambda: itertools.cycle(("-", "--", ":", "-.")))
    for title, group in table_rows(lines).items():
        averages = {}
        for line in group:
            averages.setdefault(100 * line["label_fraction"], []).append(100 * line["average"])
        x = sorted(averages)
        y = [np.mean(values) for values in map(averages.get, x)]
        sd = [np.std(values, ddof=len(values) > 1) for values in map(averages.get, x)]
        method = group[0]["method"]
        marker, colour = MARKERS[method]
        axis.errorbar(x, y, sd, color=colour, marker=marker, linestyle=next(dashes[method]), ms=5,
                      lw=1.2, capsize=3, label=title)
    axis.set(xscale="log", xlabel="labelled training data, %", ylabel="average accuracy, %")
    axis.set_xticks(POSTER_PERCENT, map(str, POSTER_PERCENT))
    axis.minorticks_off()
    axis.legend(fontsize=7, frameon=False)


def report(folder):
    """Print the tables of a results folder and write them there with the figure, for each set of
    class names its own; reads results.jsonl and nothing else."""
    lines = linear_eval.Results(folder).read() if folder.is_dir() else []
    if not lines:
        raise data.DataError(f"{folder}/results.jsonl: no results there; linear_eval.py and "
                             "finetune.py write them")
    simulated = any(line["simulated"] for line in lines)
    parts = ["# SIMULATED data: these numbers say nothing about the methods\n" if simulated else
             "# Results\n",
             "Mean ± standard deviation over seeds; best average bold; `-`: no such number.\n"]
    by_classes, panels = {}, []
    for line in lines:
        by_classes.setdefault(tuple(line.get("classes", data.CLASSES)), []).append(line)
    for classes, group in by_classes.items():
        published = classes == tuple(data.CLASSES)
        title = "DFC2020" if published else textwrap.shorten(", ".join(classes), 60)
        beside_poster = published and not simulated
        parts.append(f"## {title}{POSTER_NOTE if beside_poster else ''}\n")
        parts += [main_table(group, task, classes, beside_poster) for task in HEADINGS]
        parts.append(probe_table([line for line in group if line["protocol"] == "linear"]))
        curves = [line for line in group if line["task"] == "single" and line["method"] in MARKERS
                  and line["protocol"] != "linear" and row_title(line) in TITLES.values()]
        if curves:
            panels.append((title, curves, beside_poster))
    text = "\n".join(parts)
    print(text)
    (folder / "tables.md").write_text(text)
    if panels:
        figure, axes = data.new_figure(1, len(panels), figsize=(5.6 * len(panels), 4))
        for axis, (title, *panel) in zip(axes[0], panels):
            draw_fractions(axis, *panel)
            axis.set_title(f"{'SIMULATED data, ' * simulated}{title}, single-label", fontsize=10)
        figure.savefig(folder / "label_fraction.png", dpi=130)
    print(f"wrote tables.md{' and label_fraction.png' * bool(panels)} in {folder}")


def main():
    parser = linear_eval.evaluation_parser(__doc__)
    add = parser.add_argument
    add("--report", type=Path, metavar="DIR", help="tables and figure of the results there, alone")
    # As in the released code:
    add("--epochs", type=data.positive, default=200)
    add("--lr", type=float, default=1e-5, help="of the encoders (default %(default)s)")
    add("--classifier-lr", type=float, default=3e-6)
    add("--weight-decay", type=float, default=1e-3)
    add("--drop-epoch", type=int, default=100,
        help="both rates times 0.1 from this epoch on (default %(default)s)")
    args, content = linear_eval.read_options(parser)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if args.report:
        report(args.report)
    else:
        evaluate(args, content)


if __name__ == "__main__":
    data.run(main, models.CheckpointError, torch.OutOfMemoryError)
