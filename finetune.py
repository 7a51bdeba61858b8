"""Train and test the seven rows of the tables: four from scratch, three from pretrained encoders.

    python finetune.py --method late-fusion --data STORE --task single multi
    python finetune.py --checkpoint runs/d-simclr/last.pt --data STORE --label-fraction 0.1
    python finetune.py --report results      # tables.md and label_fraction.png, beside the poster's
    python finetune.py --method late-fusion --data STORE --save DIR       # keep what was trained
    python finetune.py --map OUT.tif --classifier DIR/late-fusion_single_1_seed0.pt \
        --s1 S1.tif --s2 S2.tif              # classes of a whole scene

Every layer is trained, on random crops of the splits `train` and `validation`, patches repeated to
balance the classes; the last epoch is tested on crops that cover each patch of the split `test`. A
finished run is one line of results.jsonl and is not repeated; each epoch's loss is in log.jsonl.
"""
import itertools
import json
import math
from pathlib import Path

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rasterio.windows import Window
from tqdm import tqdm

import data
import linear_eval
import models
from linear_eval import TITLES

HEADINGS = {"single": ("Single-label classification, accuracy", "OA"),
            "multi": ("Multi-label classification, F1", "O-F1")}
SCORES = ("average", "overall")
# Scheibenreif, Mommert, Borth 2022: average and overall in percent, single-label and multi-label.
POSTER = {"only-s1": {"single": (57, 62), "multi": (57, 62)},
          "only-s2": {"single": (57, 62), "multi": (58, 63)},
          "early-fusion": {"single": (62, 66), "multi": (60, 62)},
          "late-fusion": {"single": (62, 65), "multi": (54, 61)},
          "simclr-rgb": {"single": (49, 58), "multi": (39, 49)},
          "d-simclr": {"single": (70, 70), "multi": (67, 69)},
          "mma": {"single": (69, 69), "multi": (62, 66)}}
# Its figure: percent of the labels; marker, colour and single-label averages of each curve.
PERCENT = (1, 10, 50, 100)
CURVES = {"mma": ("o", "#c0392b", (47.5, 59.7, 64.2, 69.0)),
          "d-simclr": ("s", "#2b6cb0", (36.5, 65.3, 68.4, 70.0)),
          "early-fusion": ("^", "#1b7837", (34.6, 52.2, 55.1, 62.0)),
          "late-fusion": ("v", "#e08214", (39.8, 50.0, 61.7, 62.0))}
STRIP = 256  # px of a map that are made at a time
# Of the classes in their order, as in data.CLASSES; from the ninth on again.
COLOURS = ["1b7837", "a6a04c", "a6d96a", "5aae9e", "f2c14e", "c0392b", "b9a596", "2b6cb0"]


def task_loss(task, logits, classes):
    """Cross-entropy or, for several labels, binary cross-entropy of (N, C) logits, mean over the
    crops that have a label. classes: (N, h, w)."""
    count = logits.shape[1]
    if task == "single":
        label = models.single_label(classes, count)
        loss = F.cross_entropy(logits, label, ignore_index=data.IGNORE, reduction="sum")
        return loss / (label != data.IGNORE).sum().clamp(1)
    label = models.multi_label(classes, count=count)
    has = label.any(1)
    loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none").mean(1)
    return (loss * has).sum() / has.sum().clamp(1)


def train(model, scaling, patches, rows, task, seed, args, name):
    """Fit a classifier to random crops of the patches `rows`, repeats included. DataError where the
    loss is not finite."""
    model.to(args.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(
        [{"params": model.encoders.parameters(), "lr": args.lr},
         {"params": model.fc.parameters(), "lr": args.classifier_lr}],
        weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [args.drop_epoch], 0.1)
    for epoch in tqdm(range(args.epochs), name, unit="epoch", leave=False, delay=1):
        batches = data.random_crops(rows, patches.size, args.crop, args.batch_size, seed, epoch)
        feed = data.loader(patches, batches, args.crop, args.device, args.threads, classes=True)
        for s1, s2, classes, _ in feed:
            s1, s2 = models.to_input(s1, s2, **scaling)
            with models.autocast(args.precision, args.device):
                logits = model(s1, s2)
            loss = task_loss(task, logits.float(), classes)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        schedule.step()
        loss = loss.item()  # once an epoch, since the host waits for the device here
        if not math.isfinite(loss):
            raise data.DataError(f"{name}: the loss is {loss} after epoch {epoch + 1}: "
                                 "try a lower --lr or --precision float32")
        with open(Path(args.results, "log.jsonl"), "a") as log:
            print(json.dumps({"run": name, "epoch": epoch + 1, "loss": loss}), file=log)


def evaluate(args, content):
    """Train and test a classifier per task, label fraction and seed: a result line each."""
    patches, train_rows, test_rows, scaling = linear_eval.open_labelled(args, content)
    if models.spoils_gradients(args.method, args.crop, args.precision, args.device):
        raise data.DataError(f"--crop {args.crop}: on a CPU bf16 gradients of a ResNet are wrong "
                             "up to 16 px: choose --precision float32, or more")
    results, labels = linear_eval.Results(args.results), patches.labels[train_rows]
    fixed = {"protocol": "finetune" if content else "scratch",
             **linear_eval.describe(args, content, patches, "epochs", "batch_size", "lr",
                                    "classifier_lr", "weight_decay", "drop_epoch")}
    for task, fraction, seed in itertools.product(args.task, args.label_fraction,
                                                  range(args.seeds)):
        key = {**fixed, "task": task, "label_fraction": fraction, "seed": seed}
        path = args.save and args.save / f"{args.method}_{task}_{fraction:g}_seed{seed}.pt"
        kept = path and path.exists()
        if kept and models.load_checkpoint(path).get("run") != key:
            raise data.DataError(f"{path}: has other settings: choose another --save")
        if results.has(key) and (kept or not path):
            continue
        name = f"{args.method} {task} {100 * fraction:g} % seed {seed}"
        chosen = linear_eval.training_rows(labels, fraction, seed, args.label_sampling)
        encoders = linear_eval.make_encoders(args, content, patches, seed)
        model = models.Classifier(encoders, len(patches.classes))
        train(model, scaling, patches, train_rows[chosen], task, seed, args, name)
        crops = linear_eval.extract(model.eval(), scaling, patches, test_rows, args)
        has = crops[task].any(1)
        scores = linear_eval.score(task, crops[task][has], crops["x"][has])
        counts = {"train_patches": len(np.unique(chosen)), "train_rows": len(chosen),
                  "test_crops": int(has.sum())}
        if path:
            models.save_checkpoint(
                path, model, method=args.method, arch=args.arch, bands=patches.bands, **scaling,
                classes=patches.classes, simulated=patches.simulated, task=task, crop=args.crop,
                args=key["args"], run=key, scores={name: float(scores[name]) for name in SCORES})
        results.add(key, scores, counts=counts)


def row_title(line):
    """Name of the table row that a result line belongs to."""
    title = TITLES[line["method"]]
    if line["protocol"] == "linear":
        titles = {"random": f"{title}, random weights", "bands": "Band means and sd"}
        return titles.get(line["baseline"], title)
    pretrained = models.METHODS[line["method"]]["pretrained"]
    return f"{title}, from scratch" if line["protocol"] == "scratch" and pretrained else title


def grouped(lines, key):
    """-> {key(line): the lines that have it}."""
    groups = {}
    for line in lines:
        groups.setdefault(key(line), []).append(line)
    return groups


def table_rows(lines):
    """Result lines -> {row title: lines}, in the poster's order. Runs of one row with different
    settings become rows of their own, named by what differs."""

    def settings(line):
        told = line["args"] | {name: line[name] for name in ("method", "checkpoint", "data")}
        told["bands"] = " ".join(itertools.chain(*told["bands"].values()))
        return frozenset((name, str(value)) for name, value in told.items())

    order, rows = [*TITLES.values(), "Band means and sd"], {}
    by_title = grouped(lines, row_title)
    for title in sorted(by_title, key=lambda title: (order.index(title.split(",")[0]), title)):
        groups = grouped(by_title[title], settings)
        common = frozenset.intersection(*groups)
        for pairs, group in groups.items():
            differ = ", ".join(" ".join(pair) for pair in sorted(pairs - common))
            rows[f"{title} [{differ}]" if differ else title] = group
    return rows


def percent(values):
    """Mean ± standard deviation over seeds, rounded as on the poster."""
    values = [100 * value for value in values if value is not None]
    spread = f" ± {np.std(values, ddof=1):.0f}" if len(values) > 1 else ""
    return f"{np.mean(values):.0f}{spread}" if values else "-"


def markdown(header, rows):
    """Markdown table, or what stands in its place where there is nothing in it."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in
             (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n" if rows else "No results.\n"


def main_table(lines, task, classes, beside_poster):
    """One of the poster's two tables as Markdown."""
    heading, pooled = HEADINGS[task]
    named = table_rows([line for line in lines if line["task"] == task
                        and line["protocol"] != "linear" and line["label_fraction"] == 1])
    means = {title: 100 * np.mean([line["average"] for line in group])
             for title, group in named.items()}
    rows = []
    for title, group in named.items():
        cells = [percent(values) for values in zip(*(line["class"] for line in group))]
        average, overall = (percent(line[name] for line in group) for name in SCORES)
        if means[title] == max(means.values()):
            average = f"**{average}**"
        if beside_poster and row_title(group[0]) in TITLES.values():
            published = POSTER[group[0]["method"]][task]
            average += f" (poster {published[0]}: {means[title] - published[0]:+.0f})"
            overall += f" (poster {published[1]})"
        rows.append([title, *cells, average, overall, len(group)])
    return f"### {heading}, %\n\n{markdown(['', *classes, 'Average', pooled, 'seeds'], rows)}"


def probe_table(lines):
    """Frozen encoders: rows by features, sensors used and share of labels; both tasks."""
    rows = []
    for title, group in table_rows(lines).items():
        inputs = grouped(group, lambda line: (line["sensors"], line["label_fraction"]))
        for (sensors, fraction), runs in sorted(inputs.items()):
            tasks = grouped(runs, lambda line: line["task"])
            cells = [percent(line[name] for line in tasks.get(task, ()))
                     for task in HEADINGS for name in SCORES]
            seeds = max(map(len, tasks.values()))
            rows.append([title, sensors, f"{100 * fraction:g} %", *cells, seeds])
    header = ["features", "sensors", "labels", "single average", "OA", "multi average", "O-F1",
              "seeds"]
    return f"### Frozen encoders, linear classifier, %\n\n{markdown(header, rows)}"


def draw_fractions(axis, lines, beside_poster):
    """Average accuracy against the share of labels: our mean and standard deviation over seeds, and
    the poster's points."""
    for method, (marker, _, averages) in CURVES.items() if beside_poster else ():
        axis.plot(PERCENT, averages, marker, color="0.6", ms=5, label=f"{TITLES[method]}, poster")
    curves = [line for line in lines if line["task"] == "single" and line["method"] in CURVES
              and line["protocol"] != "linear" and row_title(line) in TITLES.values()]
    for title, group in table_rows(curves).items():
        points = []
        for fraction, runs in sorted(grouped(group, lambda line: line["label_fraction"]).items()):
            averages = [100 * line["average"] for line in runs]
            points.append((100 * fraction, np.mean(averages), np.std(averages, ddof=len(runs) > 1)))
        marker, colour, _ = CURVES[group[0]["method"]]
        axis.errorbar(*zip(*points), color=colour, marker=marker, capsize=3, label=title)
    axis.set(xscale="log", xlabel="labelled training data, %", ylabel="average accuracy, %")
    axis.set_xticks(PERCENT, map(str, PERCENT))
    axis.legend(*axis.get_legend_handles_labels(), fontsize=7, frameon=False)


def report(folder):
    """Print the tables of a results folder and write them there with the figure, for each set of
    class names its own; reads results.jsonl and nothing else."""
    lines = linear_eval.Results(folder).read() if folder.is_dir() else []
    if not lines:
        raise data.DataError(f"{folder}: no results: linear_eval.py and finetune.py write them")
    simulated = any(line["simulated"] for line in lines)
    heading = "SIMULATED data, which say nothing about the methods" if simulated else "Results"
    parts = [f"# {heading}\n",
             "Mean ± standard deviation over seeds; best average bold; `-`: no such number.\n"]
    by_classes = grouped(lines, lambda line: tuple(line["classes"]))
    figure = Figure((5.6 * len(by_classes), 4), layout="constrained")
    axes = figure.subplots(1, len(by_classes), squeeze=False)
    for axis, (classes, group) in zip(axes[0], by_classes.items()):
        published = classes == tuple(data.CLASSES)
        title = "DFC2020" if published else ", ".join(classes)
        beside_poster = published and not simulated
        note = ", beside the poster (Scheibenreif, Mommert, Borth 2022)" * beside_poster
        parts.append(f"## {title}{note}\n")
        parts += [main_table(group, task, classes, beside_poster) for task in HEADINGS]
        parts.append(probe_table([line for line in group if line["protocol"] == "linear"]))
        draw_fractions(axis, group, beside_poster)
        axis.set_title(f"{'SIMULATED data, ' * simulated}{title}, single-label", fontsize=10)
    text = "\n".join(parts)
    print(text)
    (folder / "tables.md").write_text(text)
    figure.savefig(folder / "label_fraction.png", dpi=130)
    print(f"wrote tables.md and label_fraction.png in {folder}")


def open_scene(args, content):
    """-> {sensor: data.Raster} of what a classifier looks at, on one grid. DataError where a raster
    does not fit."""
    scene = {}
    for sensor, needed in content["bands"].items():
        if sensor in "+".join(models.METHODS[content["method"]]["inputs"]):
            path = vars(args)[sensor]
            if not path:
                raise data.DataError(f"--{sensor}: the classifier needs a GeoTIFF of {needed}")
            scene[sensor] = data.Raster(path, sensor, needed, args.s2_offset)
    if len(scene) == 2:
        data.refuse_other_grid(scene["s1"].tif, scene["s2"].tif)
    return scene


def read_strip(scene, bands, window):
    """A window of a scene -> S1 and S2 (c, h, w) float32, NaN where there is no data, 0 if the
    classifier does not look at it; (h, w) bool: a sensor has none there."""
    shape, images = (window.height, window.width), []
    for sensor, names in bands.items():
        blank = np.zeros((len(names), *shape), np.float32)
        images.append(scene[sensor].values(window) if sensor in scene else blank)
    return images, np.isnan(np.concatenate(images)).any(0)


def windows(length, crop, step):
    """Starts of windows that cover so many px, and the bounds between the px that are each one's:
    the `step` in its middle, at both ends all up to the edge."""
    starts = [*range(0, length - crop, step), length - crop]
    middles = [step * k + (crop - step) // 2 for k in range(1, len(starts))]
    return starts, [0, *middles, length]


@torch.no_grad()
def classify(model, scaling, images, corners, crop, args):
    """Windows of S1 and S2 (c, h, w) at corners (top, left) -> (N, classes) float32 logits."""
    images = [torch.from_numpy(image)[None].to(args.device) for image in images]
    by_window, logits = scaling["scale"] == "patch-max", []
    if not by_window:  # each pixel is scaled once, though several windows see it
        images = models.to_input(*images, **scaling)
    for batch in np.array_split(corners, math.ceil(len(corners) / args.batch_size)):
        crops = []
        for image in images:
            crops.append(torch.cat([image[..., y:y + crop, x:x + crop] for y, x in batch]))
        if by_window:
            crops = models.to_input(*crops, **scaling)
        with models.autocast(args.precision, args.device):
            logits.append(model(*crops).float())
    return torch.cat(logits)


def map_strips(args, content, model, scaling, scene, step):
    """Yield a map from top to bottom, the next part of the scene read beside the computing: number
    of the first line, values (bands, lines, width) uint8, 255 for no data."""
    model, crop = model.to(args.device, memory_format=torch.channels_last), content["crop"]
    raster = (scene.get("s2") or scene["s1"]).tif
    tops, ends = windows(raster.height, crop, step)
    lefts, right_ends = windows(raster.width, crop, step)
    n = max(1, STRIP // step)  # lines of windows
    strips = [(tops[k:k + n], ends[k:k + n + 1]) for k in range(0, len(tops), n)]

    def read(strip):
        starts, _ = strip
        window = Window(0, starts[0], raster.width, starts[-1] + crop - starts[0])
        return read_strip(scene, content["bands"], window)

    work = zip(strips, data.ahead(read, strips, 1, 1))
    for (starts, bounds), (images, missing) in tqdm(work, "map", len(strips), unit="strip"):
        inside = np.array(starts) - starts[0]
        corners = list(itertools.product(inside, lefts))
        logits = classify(model, scaling, images, corners, crop, args)
        values = logits.argmax(1, keepdim=True)
        if content["task"] == "multi":
            values = (100 * logits.sigmoid()).round()
        values = values.byte().cpu().numpy().T.reshape(-1, len(starts), len(lefts))
        values = values.repeat(np.diff(bounds), 1).repeat(np.diff(right_ends), 2)
        values[:, missing[bounds[0] - starts[0]:bounds[-1] - starts[0]]] = 255
        yield bounds[0], values


def write_map(args):
    """--map: classes of a whole scene, georeferenced; all or nothing."""
    content = models.load_checkpoint(args.classifier)
    model, scaling, _ = models.load_classifier(content)
    names, crop, multi = content["classes"], content["crop"], content["task"] == "multi"
    scene, step = open_scene(args, content), args.step or crop // 2
    raster = (scene.get("s2") or scene["s1"]).tif
    if not step <= crop <= min(raster.shape):
        raise data.DataError(
            f"{raster.name}: {raster.width} x {raster.height} px, --step {step}: the windows of "
            f"the classifier are {crop} x {crop} px: give a larger scene or a smaller step")
    sources = [raster.tif.files for raster in scene.values()]  # a VRT has several
    for path in itertools.chain([args.classifier], *sources):
        if args.map.resolve() == Path(path).resolve():
            raise data.DataError(f"--map {args.map}: would overwrite {path}: choose another name")
    part = args.map.with_suffix(".part.tif")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with rasterio.open(
                part, "w", driver="GTiff", dtype="uint8", nodata=255, compress="deflate",
                height=raster.height, width=raster.width, count=len(names) if multi else 1,
                crs=raster.crs, transform=raster.transform) as tif:
            if multi:
                tif.descriptions = [f"{name}, %" for name in names]
            else:
                colours = [(*bytes.fromhex(colour), 255) for colour in COLOURS]
                tif.write_colormap(1, dict(zip(range(len(names)), itertools.cycle(colours))))
            for top, values in map_strips(args, content, model, scaling, scene, step):
                tif.write(values, window=Window(0, top, raster.width, values.shape[1]))
            tags = {key: content[key] for key in ("method", "task", "simulated")}
            tags |= {f"class_{number}": name for number, name in enumerate(names)}
            offsets = [raster.offset or 0 for raster in scene.values()]
            tif.update_tags(**tags, s2_offset=max(offsets))
        with rasterio.open(part) as tif:  # read again, since writing does not tell of a full disk
            for band in tif.indexes:
                tif.checksum(band)
        part.replace(args.map)
    except rasterio.errors.RasterioError as error:  # a full disk, a scene that is cut off
        raise data.DataError(f"{args.map}: {error.__cause__ or error}: free space, or mend "
                             f"{args.s1}, {args.s2}") from None
    finally:
        part.unlink(missing_ok=True)
    for raster in scene.values():
        plain = raster.numbers == [*raster.tif.indexes] and raster.tif.nodata is None
        if raster.offset or not plain:
            print(f"{raster.name}: {' '.join(raster.bands)} are its bands {raster.numbers}, no "
                  f"data is {raster.tif.nodata}, {raster.offset or 0:,} was subtracted")
    print(f"wrote {args.map}; tests/show.py draws it")


def main():
    parser = linear_eval.evaluation_parser(__doc__)
    add = parser.add_argument
    add("--report", type=Path, metavar="DIR", help="tables and figure of the results there, alone")
    add("--save", type=Path, metavar="DIR", help="keep the trained classifiers there")
    add("--map", type=Path, metavar="OUT.tif", help="classes of a scene, with what follows, alone")
    add("--classifier", help="a file that --save wrote")
    add("--s1", help="GeoTIFF in dB")
    add("--s2", help="GeoTIFF of reflectance x 10,000, on the same grid")
    add("--step", type=data.positive, help="px between windows (default: half the crop)")
    add("--s2-offset", type=int, choices=(0, 1000), help="default: 1000 where B10 shows it")
    # As in the released code:
    add("--epochs", type=data.positive, default=200)
    add("--lr", type=float, default=1e-5, help="of the encoders (default %(default)s)")
    add("--classifier-lr", type=float, default=3e-6)
    add("--weight-decay", type=float, default=1e-3)
    add("--drop-epoch", type=int, default=100, help="both rates times 0.1 from this epoch on")
    args, content = linear_eval.read_options(parser)
    torch.backends.cudnn.benchmark = True
    if args.report:
        report(args.report)
    elif args.map:
        if not args.classifier or args.map.suffix.lower() not in (".tif", ".tiff"):
            parser.error("--map: a name that ends in .tif, and --classifier, --s1 and --s2")
        write_map(args)
    else:
        evaluate(args, content)


if __name__ == "__main__":
    data.run(main, models.CheckpointError, torch.OutOfMemoryError)
