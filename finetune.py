"""Train and test the seven rows of the tables: four from scratch, three from pretrained encoders.

    python finetune.py --method late-fusion --data STORE --task single multi --save DIR
    python finetune.py --checkpoint runs/d-simclr/last.pt --data STORE --label-fraction 0.1
    python finetune.py --report results      # tables.md and label_fraction.png, beside the poster's
    python finetune.py --map OUT.tif --classifier DIR/late-fusion_single_1_seed0.pt \
        --s1 S1.tif --s2 S2.tif              # classes of a whole scene

Every layer is trained, on random crops of the splits `train` and `validation`, patches repeated to
balance the classes; the last epoch is tested on crops that cover each patch of the split `test`. A
finished run is one line of results.jsonl and is not repeated; log.jsonl has each epoch's last loss.
"""
import itertools
import json
import math
from collections import defaultdict
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
# Scheibenreif, Mommert, Borth 2022: average and overall in percent.
POSTER = {
    "single": {"only-s1": (57, 62), "only-s2": (57, 62), "early-fusion": (62, 66),
               "late-fusion": (62, 65), "simclr-rgb": (49, 58), "d-simclr": (70, 70),
               "mma": (69, 69)},
    "multi": {"only-s1": (57, 62), "only-s2": (58, 63), "early-fusion": (60, 62),
              "late-fusion": (54, 61), "simclr-rgb": (39, 49), "d-simclr": (67, 69),
              "mma": (62, 66)}}
# Its figure: percent of the labels; marker, colour and single-label averages of each curve.
PERCENT = (1, 10, 50, 100)
CURVES = {"mma": ("o", "#c0392b", (47.5, 59.7, 64.2, 69.0)),
          "d-simclr": ("s", "#2b6cb0", (36.5, 65.3, 68.4, 70.0)),
          "early-fusion": ("^", "#1b7837", (34.6, 52.2, 55.1, 62.0)),
          "late-fusion": ("v", "#e08214", (39.8, 50.0, 61.7, 62.0))}
ORDER = [*TITLES.values(), "Band means and sd"]  # of a table's rows, the poster's first
OWN = {"method", "checkpoint", "bands"}  # of a table's row; in what else they differ, they say
# What a run was made with, beside what linear_eval.py tells of its own:
OPTIONS = ("epochs", "batch_size", "lr", "classifier_lr", "weight_decay", "drop_epoch")
STRIP = 256  # px of a map that are made at a time
NO_DATA = 255  # in a map
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


def train(model, scaling, patches, rows, task, seed, args, name, times=1):
    """Fit a classifier to random crops of the patches `rows`, repeats included, in `times` as many
    epochs as args says. DataError where the loss is not finite."""
    model.to(args.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(
        [{"params": model.encoders.parameters(), "lr": args.lr},
         {"params": model.fc.parameters(), "lr": args.classifier_lr}],
        weight_decay=args.weight_decay, fused=True)
    epochs, drop_epoch = round(times * args.epochs), round(times * args.drop_epoch)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [drop_epoch], 0.1)
    for epoch in tqdm(range(epochs), name, unit="epoch", leave=False, delay=1):
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


def is_done(settings, results, path):
    """Whether a run has its result line and, where it is to be kept, its classifier. DataError
    where that file is of a run with other settings."""
    if path and not path.exists():
        return False
    if path and models.load_checkpoint(path).get("run") != settings:
        raise data.DataError(f"{path}: has other settings: choose another --save")
    return results.has(settings)


def evaluate(args, content):
    """Train and test a classifier per seed, task and label fraction: a result line each."""
    if args.batch_size == 1 or min(args.lr, args.classifier_lr, args.weight_decay) < 0:
        raise data.DataError("--batch-size: 2 or more, as batch norm needs others; no rate and no "
                             "decay is negative")
    patches, train_rows, test_rows, scaling = linear_eval.open_labelled(args, content)
    if reason := models.spoilt_gradients(args.method, args.crop, args.precision, args.device):
        raise data.DataError(reason)
    results, labels = linear_eval.Results(args.results), patches.labels[train_rows]
    protocol = "finetune" if content else "scratch"
    options = OPTIONS + ("equal_crops",) * args.equal_crops
    for settings in linear_eval.planned_runs(args, content, patches, options, protocol=protocol):
        task, fraction, seed = (settings[key] for key in ("task", "label_fraction", "seed"))
        path = args.save and args.save / f"{args.method}_{task}_{fraction:g}_seed{seed}.pt"
        if is_done(settings, results, path):
            continue
        chosen = linear_eval.training_rows(labels, fraction, seed, args.label_sampling)
        encoders = linear_eval.make_encoders(args, content, patches, seed)
        model = models.Classifier(encoders, len(patches.classes))
        name = f"{args.method} {task} {100 * fraction:g} % seed {seed}"
        all_rows = linear_eval.training_rows(labels, 1, seed, args.label_sampling)
        times = len(all_rows) / len(chosen) if args.equal_crops else 1
        train(model, scaling, patches, train_rows[chosen], task, seed, args, name, times)
        crops = linear_eval.extract(model.eval(), scaling, patches, test_rows, args)
        labelled = crops[task].any(1)
        scores = linear_eval.score(task, crops[task][labelled], crops["x"][labelled])
        if path:
            keep(path, model, scaling, settings, scores, patches.stored)
        counts = {"train_patches": len(np.unique(chosen)), "train_rows": len(chosen),
                  "test_crops": int(labelled.sum())}
        results.add(settings, scores, counts=counts)


def keep(path, model, scaling, settings, scores, stored):
    """--save: write a trained classifier with all that a map needs to know, and how good it is."""
    every = settings | settings["args"]
    needed = ("method", "arch", "bands", "crop", "classes", "simulated", "task", "args")
    content = {key: every[key] for key in needed} | scaling
    content["scores"] = {name: float(scores[name]) for name in SCORES}
    models.save_checkpoint(path, model, **content, run=settings, stored=stored)


def row_title(line):
    """Name of the table row that a result line belongs to."""
    title = TITLES[line["method"]]
    if line["protocol"] == "scratch" and models.METHODS[line["method"]]["pretrained"]:
        return f"{title}, from scratch"
    if line.get("baseline"):
        title = f"{title}, random weights" if line["baseline"] == "random" else ORDER[-1]
    every = " and ".join(models.METHODS[line["method"]]["inputs"])
    return title if line.get("sensors", every) == every else f"{title}, {line['sensors']} alone"


def grouped(lines, key):
    """-> {key(line): the lines that have it}."""
    groups = defaultdict(list)
    for line in lines:
        groups[key(line)].append(line)
    return groups


def settings_of(line):
    """What tells a run from others of its table row -> set of (name, value as text)."""
    settings = {key: line[key] for key in ("method", "checkpoint", "data")} | line["args"]
    settings["bands"] = " ".join(itertools.chain(*settings["bands"].values()))
    return frozenset((name, str(value)) for name, value in settings.items())


def table_rows(lines):
    """Result lines -> {row title: lines}, in the poster's order. Runs of one row with different
    settings become rows of their own, named by what differs; but for OWN, from any row."""
    def place(line):
        title = row_title(line)
        return ORDER.index(title.split(",")[0]), title

    rows, every = {}, grouped(lines, settings_of)
    for (_, title), group in grouped(sorted(lines, key=place), place).items():
        variants = grouped(group, settings_of)
        same = {pair for pair in frozenset.intersection(*variants) if pair[0] in OWN}
        same |= frozenset.intersection(*every)
        for settings, variant in variants.items():
            differ = ", ".join(" ".join(pair) for pair in sorted(settings - same))
            rows[f"{title} [{differ}]" if differ else title] = variant
    return rows


def percent(values, digits=0):
    """Mean ± standard deviation over seeds, rounded, with no digits, as on the poster."""
    values = [100 * value for value in values if value is not None]
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}" if values else "-"


def markdown(header, rows):
    """Markdown table, or what stands in its place where there is nothing in it."""
    if not rows:
        return "No results.\n"
    text = ""
    for row in (header, ["---"] * len(header), *rows):
        text += "| " + " | ".join(map(str, row)) + " |\n"
    return text


def main_table(lines, task, classes, beside_poster):
    """One of the poster's two tables as Markdown."""
    heading, pooled = HEADINGS[task]
    shown = [line for line in lines if line["task"] == task and line["label_fraction"] == 1]
    named = table_rows(shown)
    means = {title: 100 * np.mean([line["average"] for line in group])
             for title, group in named.items()}
    rows = []
    for title, group in named.items():
        of_classes = zip(*(line["class"] for line in group))
        average, overall = (percent(line[name] for line in group) for name in SCORES)
        if means[title] == max(means.values()):
            average = f"**{average}**"
        if beside_poster and row_title(group[0]) in TITLES.values():
            published, published_overall = POSTER[task][group[0]["method"]]
            average += f" (poster {published}: {means[title] - published:+.0f})"
            overall += f" (poster {published_overall})"
        rows.append([title, *map(percent, of_classes), average, overall, len(group)])
    return f"### {heading}, %\n\n{markdown(['', *classes, 'Average', pooled, 'seeds'], rows)}"


def share_table(heading, lines):
    """Scores by row, task and share of the labels, as Markdown."""
    rows = []
    for title, group in table_rows(lines).items():
        kinds = grouped(group, lambda line: (line["task"], line["label_fraction"]))
        for (task, fraction), runs in sorted(kinds.items(), reverse=True):
            cells = [percent((line[name] for line in runs), 1) for name in SCORES]
            patches = np.mean([line["counts"]["train_patches"] for line in runs]).round()
            rows.append([title, task, f"{100 * fraction:g} %", f"{patches:g}", *cells, len(runs)])
    columns = ["", "task", "labels", "patches", *SCORES, "seeds"]
    return f"### {heading}, %\n\n{markdown(columns, rows)}"


def draw_fractions(axis, lines, beside_poster):
    """Average accuracy by share of the labels, mean and sd over seeds, and the poster's points."""
    axis.set_prop_cycle(linestyle=["-", "--", ":", "-."])  # rows of a method have one colour
    for method, (marker, colour, published) in CURVES.items():
        if beside_poster:
            axis.plot(PERCENT, published, marker, color="0.6", label=f"{TITLES[method]}, poster")
    curves = [line for line in lines if line["task"] == "single" and line["method"] in CURVES
              and row_title(line) in TITLES.values()]
    for title, group in table_rows(curves).items():
        points = []
        for fraction, runs in sorted(grouped(group, lambda line: line["label_fraction"]).items()):
            averages = [100 * line["average"] for line in runs]
            spread = np.std(averages, ddof=1) if len(runs) > 1 else math.nan
            points.append((100 * fraction, np.mean(averages), spread))
        marker, colour, _ = CURVES[group[0]["method"]]
        axis.errorbar(*zip(*points), color=colour, marker=marker, capsize=3, label=title)
    axis.set(xscale="log", xlabel="labelled training data, %", ylabel="average accuracy, %")
    axis.set_xticks(PERCENT, map(str, PERCENT))
    axis.legend(*axis.get_legend_handles_labels(), fontsize=7, frameon=False,
                loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes: it may be long


def report_part(axis, lines, classes, simulated):
    """Draw the figure of all results with these classes -> their tables, the bands they had."""
    published = classes == tuple(data.CLASSES)
    beside_poster = published and not simulated
    title = "Classes of DFC2020" if published else ", ".join(classes)
    note = ", beside the poster's of DFC2020 (Scheibenreif et al. 2022)" if beside_poster else ""
    probed = [line for line in lines if line["protocol"] == "linear"]
    trained = [line for line in lines if line["protocol"] != "linear"]
    draw_fractions(axis, trained, beside_poster)
    axis.set_title(f"{'SIMULATED data, ' * simulated}{title}, single-label", fontsize=10)
    tables = [main_table(trained, task, classes, beside_poster) for task in HEADINGS]
    tables += [share_table("All layers trained, by share of the labels", trained),
               share_table("Frozen encoders, linear classifier", probed)]
    for bands, group in grouped(lines, lambda line: dict(settings_of(line))["bands"]).items():
        tables.append(f"Of bands {bands}: {'; '.join(sorted({*map(row_title, group)}))}.\n")
    return "\n".join([f"## {title}{note}\n", *tables])


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
    figure = Figure((9 * len(by_classes), 4), layout="constrained")
    axes = figure.subplots(1, len(by_classes), squeeze=False)
    for axis, (classes, group) in zip(axes[0], by_classes.items()):
        parts.append(report_part(axis, group, classes, simulated))
    text = "\n".join(parts)
    print(text)
    (folder / "tables.md").write_text(text)
    figure.savefig(folder / "label_fraction.png", dpi=130)
    print(f"wrote tables.md and label_fraction.png in {folder}")


def open_scene(args, content):
    """-> {sensor: data.Raster} of what a classifier looks at, on one grid. DataError where a raster
    does not fit."""
    scene = {}
    for sensor, bands in content["bands"].items():
        if not linear_eval.sees(content["method"], sensor):
            continue
        path = getattr(args, sensor)
        if not path:
            raise data.DataError(f"--{sensor}: the classifier needs a GeoTIFF of {bands}")
        order = content.get("stored", {}).get(sensor)
        scene[sensor] = data.Raster(path, sensor, bands, args.s2_offset, order)
    if len(scene) == 2:
        data.refuse_other_grid(scene["s1"].tif, scene["s2"].tif)
    return scene


def grid_of(scene):
    """-> the open raster on whose grid a map lies: one that says where that is, if there is one."""
    rasters = [raster.tif for raster in scene.values()]
    return max(rasters, key=lambda tif: (not tif.transform.is_identity, tif.crs is not None))


def read_strip(scene, bands, window):
    """A window of a scene -> S1 and S2 (c, h, w) float32, NaN where there is no data, 0 if the
    classifier does not look at it; (h, w) bool: a sensor has none there."""
    images = []
    for sensor, names in bands.items():
        unseen = np.zeros((len(names), window.height, window.width), np.float32)
        images.append(scene[sensor].values(window) if sensor in scene else unseen)
    return images, np.isnan(np.concatenate(images)).any(0)


def windows(length, crop, step):
    """Starts of windows of `crop` px that cover `length` px, and the bounds between the px that get
    the class of each: `step` px in its middle, at both ends all up to the edge. 8 px, crop 4, step
    2: starts 0, 2, 4, bounds 0, 3, 5, 8."""
    starts = [*range(0, length - crop, step), length - crop]
    middles = [step * k + (crop - step) // 2 for k in range(1, len(starts))]
    return starts, [0, *middles, length]


@torch.no_grad()
def classify(model, scaling, images, corners, crop, args):
    """Windows of S1 and S2 (c, h, w) at corners (top, left) -> (N, classes) float32 logits."""
    images = [torch.from_numpy(image)[None].to(args.device) for image in images]
    by_window = scaling["scale"] == "patch-max"
    if not by_window:  # scaled and brought into the network's form once: windows share pixels
        images = [image.contiguous(memory_format=torch.channels_last)
                  for image in models.to_input(*images, **scaling)]
    logits = []
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
    of the first line, values (bands, lines, width) uint8, 255 for no data. All px of a block of
    `step` px, the middle of a window, have one value."""
    model.to(args.device, memory_format=torch.channels_last)
    crop, grid = content["crop"], grid_of(scene)
    tops, down_bounds = windows(grid.height, crop, step)
    lefts, right_bounds = windows(grid.width, crop, step)
    n = max(1, STRIP // step)  # lines of windows
    strips = [(tops[k:k + n], down_bounds[k:k + n + 1]) for k in range(0, len(tops), n)]

    def read(strip):
        starts, _ = strip
        window = Window(0, starts[0], grid.width, starts[-1] + crop - starts[0])
        return read_strip(scene, content["bands"], window)

    work = zip(strips, data.ahead(read, strips, 1, 1))
    for (starts, bounds), (images, missing) in tqdm(work, "map", len(strips), unit="strip"):
        inside = np.array(starts) - starts[0]
        corners = list(itertools.product(inside, lefts))
        logits = classify(model, scaling, images, corners, crop, args)
        values = logits.argmax(1, keepdim=True)
        if content["task"] == "multi":
            values = (100 * logits.sigmoid()).round()
        values = values.byte().cpu().numpy().T.reshape(-1, len(starts), len(lefts))  # by window
        values = values.repeat(np.diff(bounds), 1).repeat(np.diff(right_bounds), 2)  # by px
        first, last = bounds[0] - starts[0], bounds[-1] - starts[0]  # lines of the strip
        values[:, missing[first:last]] = NO_DATA
        yield bounds[0], values


def refuse_map(args, part, scene, crop, step):
    """DataError where the windows do not fit the scene, or where the map or its part, which comes
    before it, would overwrite a file that it is made from."""
    grid = grid_of(scene)
    if not step <= crop <= min(grid.shape):
        raise data.DataError(
            f"{grid.name}: {grid.width} x {grid.height} px, --step {step}: the windows of the "
            f"classifier are {crop} x {crop} px: give a larger scene or a smaller step")
    inputs = (raster.tif.files for raster in scene.values())  # of a VRT several
    for path in (args.classifier, *itertools.chain(*inputs)):
        if Path(path).resolve() in (args.map.resolve(), part.resolve()):
            raise data.DataError(f"--map {args.map}: would overwrite {path}: choose another name")


def write_tif(path, content, scene, strips):
    """Write the parts of a map, see map_strips(), with names and colours of the classes."""
    names, grid = content["classes"], grid_of(scene)
    multi = content["task"] == "multi"
    with rasterio.open(
            path, "w", driver="GTiff", dtype="uint8", nodata=NO_DATA, compress="deflate",
            bigtiff="if_safer",  # since its size is not known before
            height=grid.height, width=grid.width, count=len(names) if multi else 1,
            crs=grid.crs, transform=grid.transform) as tif:
        if multi:
            tif.descriptions = [f"{name}, %" for name in names]
        else:
            colours = itertools.cycle(map(bytes.fromhex, COLOURS))
            tif.write_colormap(1, dict(zip(range(len(names)), colours)))
        for top, values in strips:
            tif.write(values, window=Window(0, top, grid.width, values.shape[1]))
        tags = {key: content[key] for key in ("method", "task", "simulated")}
        tags |= {f"class_{number}": name for number, name in enumerate(names)}
        offsets = [raster.offset or 0 for raster in scene.values()]
        tif.update_tags(**tags, s2_offset=max(offsets))
    with rasterio.open(path) as tif:  # read again, since writing does not tell of a full disk
        for band in tif.indexes:
            tif.checksum(band)


def write_map(args):
    """--map: classes of a whole scene, georeferenced; all or nothing."""
    content = models.load_checkpoint(args.classifier)
    model, scaling, _ = models.load_classifier(content)
    scene = open_scene(args, content)
    step = args.step or content["crop"] // 2
    part = args.map.with_suffix(".part.tif")
    refuse_map(args, part, scene, content["crop"], step)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_tif(part, content, scene, map_strips(args, content, model, scaling, scene, step))
        part.replace(args.map)
        for ending in (".ovr", ".aux.xml"):  # overviews and statistics of an older map
            Path(f"{args.map}{ending}").unlink(missing_ok=True)
    except rasterio.errors.RasterioError as error:  # a full disk, a scene that is cut off
        raise data.DataError(f"{args.map}: {error.__cause__ or error}: free space, or mend "
                             f"{args.s1}, {args.s2}") from None
    finally:
        part.unlink(missing_ok=True)
    for raster in scene.values():
        print(f"{raster.name}: {' '.join(raster.bands)} are its bands {raster.numbers}, no data is "
              f"{raster.tif.nodata}, {raster.offset or 0:,} was subtracted")
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
    add("--s2-offset", type=int, choices=(0, 1000), help="default: as B10 or a tag shows")
    add("--same-crops", dest="equal_crops", action="store_true", help="more epochs with few labels")
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
