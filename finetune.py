"""Train and test the seven rows of the tables: four from scratch, three from pretrained encoders.

    python finetune.py --method late-fusion --data STORE --task single multi
    python finetune.py --checkpoint runs/d-simclr/last.pt --data STORE --label-fraction 0.1
    python finetune.py --report results      # tables.md and label_fraction.png, beside the poster's
    python finetune.py --method late-fusion --data STORE --save DIR       # keep what was trained
    python finetune.py --map OUT.tif --classifier DIR/late-fusion_single_1_seed0.pt \
        --s1 S1.tif --s2 S2.tif              # classes of a whole scene; and OUT.png

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
import rasterio
import torch
import torch.nn.functional as F
from rasterio.windows import Window
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
KNOWN_BANDS = {"s1": [data.S1_BANDS], "s2": [data.S2_BANDS, data.L2A_BANDS]}
STRIP = 256  # px of a map that are made at a time
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
        saved = args.save and args.save / f"{args.method}_{task}_{fraction:g}_seed{seed}.pt"
        kept = saved and saved.exists()
        if kept and models.load_checkpoint(saved).get("run") != key:
            raise data.DataError(f"{saved}: has other settings: choose another --save")
        if results.has(key) and (kept or not saved):
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
        if saved:
            shown = {name: float(scores[name]) for name in ("average", "overall")}
            models.save_checkpoint(
                saved, model, method=args.method, arch=args.arch, bands=patches.bands, **scaling,
                classes=patches.classes, simulated=patches.simulated, task=task, crop=args.crop,
                args=key["args"], run=key, scores=[shown])
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


# --------------------------------------------------------------------------------------------- maps

def open_scene(args, content):
    """-> {sensor: (path, names of its bands)} of the rasters that a classifier looks at, and one of
    them, open, for its grid. DataError where bands are lacking or the grids differ."""
    scene, grids = {}, []
    for sensor in "+".join(models.METHODS[content["method"]]["inputs"]).split("+"):
        path, needed = getattr(args, sensor), content["bands"][sensor]
        if not path:
            raise data.DataError(f"--{sensor}: {args.classifier} needs a GeoTIFF of {needed}")
        raster = rasterio.open(path)
        for names in (raster.descriptions, needed, *KNOWN_BANDS[sensor]):
            if len(names) == raster.count and {*needed} <= {*names}:
                scene.setdefault(sensor, (path, list(names)))
        if sensor not in scene:
            raise data.DataError(f"{path}: {raster.count} bands, named {raster.descriptions}; "
                                 f"{args.classifier} needs {needed}: name them in the file")
        corner = [round(number, 6) for number in raster.transform[:6]]
        grids.append([str(raster.crs), corner, f"{raster.width} x {raster.height} px"])
    if grids[0] != grids[-1]:
        differ = [f"{one} and {other}" for one, other in zip(*grids) if one != other]
        left, bottom, right, top = raster.bounds
        raise data.DataError(
            f"{args.s1}, {args.s2}: not on one grid: {'; '.join(differ)}. Warp: gdalwarp -t_srs "
            f"{raster.crs} -te {left} {bottom} {right} {top} -ts {raster.width} {raster.height} "
            f"-r bilinear {args.s1} WARPED.tif")
    return scene, raster


def windows(length, crop, step):
    """Starts of windows that cover so many px, and the bounds between the px that are each one's:
    the `step` in its middle, at both ends all up to the edge."""
    starts = [*range(0, length - crop, step), length - crop]
    middles = [step * k + (crop - step) // 2 for k in range(1, len(starts))]
    return starts, [0, *middles, length]


def read_rows(scene, content, rows):
    """A window of a scene -> S1 and S2 (c, h, w) float32, NaN where there is no data, 0 if the
    classifier does not look at it; (h, w) bool: a sensor has none there, which is NaN, the
    raster's nodata value, or 0 in all bands."""
    images, missing = [], np.zeros((rows.height, rows.width), bool)
    for sensor, bands in content["bands"].items():
        image = np.zeros((len(bands), *missing.shape), np.float32)
        images.append(image)
        if sensor in scene:
            path, names = scene[sensor]
            numbers = [names.index(band) + 1 for band in bands]
            with rasterio.open(path) as raster:
                pixels = raster.read(numbers, window=rows, masked=True)
            image[:] = pixels.filled(0)
            empty = pixels.mask.any(0) | ~np.isfinite(image).all(0) | ~image.any(0)
            image[:, empty] = np.nan
            missing |= empty
            if sensor == "s1" and np.nanmin(image, initial=0.1) > 0 and not empty.all():
                raise data.DataError(f"{path}: never below 0, so not in dB: 10 log10 of power is")
    return images, missing


def offset_of(scene):
    """What to subtract from a scene's S2: by its cirrus band, as packing does with a patch."""
    path, names = scene.get("s2", (None, ()))
    if "B10" in names:
        with rasterio.open(path) as raster:
            cirrus = raster.read(names.index("B10") + 1)
        if cirrus.any() and cirrus[cirrus > 0].min() >= 1000:
            print(f"{path}: B10 is never below 1,000, so of processing baseline 04.00 or later: "
                  "1,000 is subtracted (--s2-offset 0 switches that off)")
            return 1000
    return 0


@torch.no_grad()
def classify(model, s1, s2, places, crop, scaling, args):
    """Windows of two images (c, h, w) at places (top, left) -> (N, classes) float32 logits."""
    images = [torch.from_numpy(image).to(args.device) for image in (s1, s2)]
    scale = functools.partial(data.to_input, **scaling, s2_offset=args.s2_offset)
    by_window, logits = scaling["scale"] == "patch-max", []
    if not by_window:  # each pixel is scaled once, though several windows see it
        images = [image[0] for image in scale(*(image[None] for image in images))]
    for k in range(0, len(places), args.batch_size):
        crops = []
        for image in images:
            cut = [image[:, y:y + crop, x:x + crop] for y, x in places[k:k + args.batch_size]]
            crops.append(torch.stack(cut))
        with models.autocast(args.precision, args.device):
            logits.append(model(*(scale(*crops) if by_window else crops)).float())
    return torch.cat(logits)


def write_map(args):
    """--map: classes of a whole scene, strip by strip, the next ones read beside the computing."""
    content = models.load_checkpoint(args.classifier)
    model, scaling, names = models.load_classifier(content)
    model = model.to(args.device, memory_format=torch.channels_last)
    scene, raster = open_scene(args, content)
    height, width, crop = raster.height, raster.width, content["crop"]
    several = content["task"] == "multi"
    step = args.step or crop // 2
    if not step <= crop <= min(height, width):
        raise data.DataError(f"{raster.name}: {width} x {height} px, --step {step}: the windows of "
                             f"the classifier are {crop} x {crop} px: neither may the scene be "
                             "smaller nor the step larger")
    if args.s2_offset is None:
        args.s2_offset = offset_of(scene)
    tops, bounds = windows(height, crop, step)
    lefts, left_bounds = windows(width, crop, step)
    at_once = max(1, STRIP // step)
    strips = [slice(k, k + at_once) for k in range(0, len(tops), at_once)]

    def read(strip):
        top, bottom = tops[strip][0], tops[strip][-1] + crop
        return read_rows(scene, content, Window(0, top, width, bottom - top))

    part = args.map.with_suffix(".part.tif")
    try:
        with rasterio.open(
                part, "w", driver="GTiff", dtype="uint8", nodata=255, height=height, width=width,
                count=len(names) if several else 1, crs=raster.crs,
                transform=raster.transform, compress="deflate", bigtiff="if_safer") as tif:
            tags = {f"class_{number}": name for number, name in enumerate(names)}
            tif.update_tags(**tags, task=content["task"], simulated=content["simulated"])
            if several:
                tif.descriptions = [f"{name}, %" for name in names]
            else:
                colours = data.class_colours(names)(range(len(names)), bytes=True)
                tif.write_colormap(1, dict(enumerate(map(tuple, colours.tolist()))))
            work = zip(strips, data.ahead(read, strips, 2, 1))
            for strip, (images, missing) in tqdm(work, "map", len(strips), unit="strip"):
                top, ends = tops[strip][0], bounds[strip.start:strip.stop + 1]
                places = [(start - top, left) for start in tops[strip] for left in lefts]
                logits = classify(model, *images, places, crop, scaling, args)
                percent, best = (100 * logits.sigmoid()).round(), logits.argmax(1, keepdim=True)
                values = (percent if several else best).byte().cpu().numpy()
                values = values.T.reshape(tif.count, -1, len(lefts))
                values = values.repeat(np.diff(ends), 1).repeat(np.diff(left_bounds), 2)
                values[:, missing[ends[0] - top:ends[-1] - top]] = 255
                tif.write(values, window=Window(0, ends[0], width, ends[-1] - ends[0]))
        draw_map(args.map.with_suffix(".png"), part, raster, scene, content)
        part.replace(args.map)
    except rasterio.errors.RasterioError as error:  # a full disk, a scene that is cut off
        raise data.DataError(f"{args.map}: {error.__cause__ or error}: free space, or mend "
                             f"{args.s1}, {args.s2}") from None
    finally:
        part.unlink(missing_ok=True)
    print(f"wrote {args.map} and {args.map.with_suffix('.png')}")


def draw_map(out, path, raster, scene, content):
    """Picture of a scene, its map and the legend; of several labels the most probable one."""
    shrink = max(1, *(side / 1500 for side in raster.shape))
    shape = [math.ceil(side / shrink) for side in raster.shape]
    with rasterio.open(path) as tif:
        values = tif.read(out_shape=(tif.count, *shape))
    image = np.nan_to_num(raster.read(out_shape=(raster.count, *shape)))
    figure, axes = data.new_figure(1, 2, (11, 5), subplot_kw={"xticks": [], "yticks": []})
    if "s2" in scene:
        picture, title = data.composite(image, scene["s2"][1])
        title = f"Sentinel-2, {title}"
        axes[0, 0].imshow(picture)
    else:
        title = f"{scene['s1'][1][0]} of Sentinel-1"
        axes[0, 0].imshow(image[0], "gray", vmin=-25, vmax=0)
    classes = np.where(values[0] == 255, 255, values.argmax(0)) if len(values) > 1 else values[0]
    data.draw_classes(figure, axes[0, 1], classes, content["classes"])
    axes[0, 0].set_title(title)
    axes[0, 1].set_title("SIMULATED data " * content["simulated"] + TITLES[content["method"]])
    figure.savefig(out, dpi=110)


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
    add("--drop-epoch", type=int, default=100,
        help="both rates times 0.1 from this epoch on (default %(default)s)")
    args, content = linear_eval.read_options(parser)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if args.report:
        report(args.report)
    elif args.map:
        if not args.classifier or args.map.suffix not in (".tif", ".tiff"):
            parser.error("--map OUT.tif needs --classifier, --s1 and --s2")
        write_map(args)
    else:
        evaluate(args, content)


if __name__ == "__main__":
    data.run(main, models.CheckpointError, torch.OutOfMemoryError)
