"""Trials of what else D-SimCLR could learn from, judged on real pairs: those of evidence.md.

    python tests/ombria.py OMBRIA trees/R10 --regions regions.csv --test-regions R10
    python data.py pack trees/R10/pairs folds/R10/pairs
    python data.py pack trees/R10/flood folds/R10/flood          # for clip+dates alone
    python tests/recipe.py clip+noise --fold folds/R10 --seed 0  # a line of trials.jsonl
    python tests/recipe.py --table                               # all of them, in Markdown
    python tests/recipe.py ours --fold folds/R10 --save DIR      # a checkpoint, for linear_eval.py

Every trial is 200 steps on crops of 48 px, of D-SimCLR unless the name says MMA (of which 100 are
enough: --steps, and --results of its own), unless it says otherwise in batches of 64 by Adam,
learning rate 3e-4 for ten epochs, then a cosine to zero; scale `standard`, one thread. Judged is
who finds whom among the held-out places: the mean of both ways and of five crops of a place, centre
and corners.
"""
import argparse
import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import models
import pretrain

OURS = {"recipe": "ours"}  # rates of each tensor, no momentum
CLIP = {"across": True}  # negatives of the other sensor alone
CLIP_RATES = CLIP | OURS
TRIALS = {
    "poster": {},
    "poster+constant": {"constant_epochs": 10 ** 6},  # the rate stays as it is
    "poster+lr1e-4": {"lr": 1e-4},
    "poster+nomomentum": {"betas": (0.0, 0.99)},
    "poster+lars0.6": {"lars": True, "lr": 0.6, "warmup": 20},
    "ours": OURS,
    "ours+momentum": OURS | {"betas": (0.9, 0.999)},
    "clip": CLIP,
    "clip+constant": CLIP | {"constant_epochs": 10 ** 6},
    "clip+shift": CLIP | {"shift": 8},  # px at most, between the crops of the two sensors
    "clip+dates": CLIP | {"later": 0.5},  # share of the radar crops that are of after the flood
    "clip+dropband": CLIP | {"drop": 0.5},  # share of the optical crops that lose one band
    "clip+noise": CLIP | {"noise": 0.3},  # on the radar, in standard deviations of its pixels
    "barlow": {"barlow": 5e-3},  # Barlow Twins in place of the loss: weight of what is redundant
    "clip+batch128": CLIP | {"batch_size": 128, "constant_epochs": 20},
    "clip+adamw": CLIP | {"adamw": True, "weight_decay": 0.05},
    "clip+ema": CLIP | {"ema": 0.98},  # the weights' moving average is judged
    "clip+flips": CLIP | {"turned": 2},  # sensors with flips and quarter turns, alike for both
    "clip+flip-radar": CLIP | {"turned": 1},
    "clip+temp0.05": CLIP | {"temperature": 0.05},
    "clip+learned-temp": CLIP | {"learned": True},  # the temperature's logarithm, at a rate of 1e-2
    "clip+lr1e-3": CLIP | {"lr": 1e-3, "warmup": 20},  # steps in which the rate rises from 0
    "clip+warmup": CLIP | {"warmup": 20},
    "clip+lars0.6": CLIP | {"lars": True, "lr": 0.6, "warmup": 20},
    "clip+lars5": CLIP | {"lars": True, "lr": 5.0, "warmup": 20},
    "clip+adafactor": CLIP | {"adafactor": True, "lr": 1e-2, "warmup": 20},
    "clip+rates": CLIP_RATES,
    "clip+rates+lr1e-3": CLIP_RATES | {"lr": 1e-3},
    "clip+rates+lr1e-4": CLIP_RATES | {"lr": 1e-4},
    "clip+rates+momentum": CLIP_RATES | {"betas": (0.9, 0.999)},
    "clip+rates+flips": CLIP_RATES | {"turned": 2},
    "clip+nomomentum": CLIP | {"betas": (0.0, 0.99), "warmup": 20},
    "vicreg": {"vicreg": True},  # in place of the loss
    "mma": {"method": "mma", "temperature": 0.1},
    "mma+rates": OURS | {"method": "mma", "temperature": 0.1},
    "mma+shift": {"method": "mma", "temperature": 0.1, "map_shift": 1},  # locations of 8 px
}
USUAL = {  # from `method` to `weight_decay` what pretrain.make_model() wants to know
    "across": False, "shift": 0, "later": 0, "drop": 0, "noise": 0, "barlow": 0, "ema": 0,
    "turned": 0, "warmup": 0, "lars": False, "adafactor": False, "adamw": False, "betas": None,
    "learned": False, "vicreg": False, "map_shift": 0, "method": "d-simclr", "arch": "resnet18",
    "recipe": "poster", "lr": 3e-4, "weight_decay": 1e-4,
    "temperature": 0.07, "crop": 48, "batch_size": 64, "constant_epochs": 10}
DEVICE = torch.device("cpu")


def barlow_twins(a, b, weight):
    """Zbontar et al. 2021, of embeddings (N, d) with mean 0 and variance 1 over the batch."""
    correlation = a.T @ b / len(a)
    wrong = (correlation - torch.eye(len(correlation))).square()
    return wrong.diagonal().sum() + weight * (wrong.sum() - wrong.diagonal().sum())


def vicreg(a, b):
    """Bardes, Ponce, LeCun 2022, of embeddings (N, d), with their weights."""
    loss = 25 * F.mse_loss(a, b)
    for x in (a, b):
        x = x - x.mean(0)
        covariance = x.T @ x / (len(x) - 1)
        spread = F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
        loss = loss + 25 / 2 * spread + (covariance - covariance.diag().diag()).square().sum() / len(covariance)
    return loss


class LARS(torch.optim.SGD):
    """Layer-wise rates (You, Gitman, Ginsburg 2017), as SimCLR has them: each layer's step is in
    proportion to its weights; not of biases and batch norm, which do not decay either."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for weights in group["params"]:
            gradient = weights.grad
            if weights.ndim > 1:
                gradient.add_(weights, alpha=1e-6)
                gradient *= 0.001 * weights.norm() / gradient.norm().clamp(1e-12)
            gradient *= group["lr"]  # before the momentum, where SGD has it after
        group["lr"] = 1.0
        super().step()


def make_model(args, bands):
    """-> (model, optimiser) of a trial."""
    model, _, optimizer = pretrain.make_model(args, bands, DEVICE, world=1)
    for group in optimizer.param_groups if args.betas else ():
        group["betas"] = args.betas
    if args.lars:
        optimizer = LARS(model.parameters(), args.lr, momentum=0.9)
    if args.adafactor:  # torch's own, whose steps are in proportion to the weights, too
        optimizer = torch.optim.Adafactor(model.parameters(), args.lr)
    if args.barlow:  # it standardises the embeddings: so does retrieval
        for head in model.heads.values():
            head.append(torch.nn.BatchNorm1d(head[-1].out_features, affine=False))
    if args.adamw:
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    if args.learned:
        args.log_temperature = torch.nn.Parameter(torch.tensor(args.temperature).log())
        optimizer.add_param_group(
            {"params": [args.log_temperature], "factor": 1e-2 / args.lr, "weight_decay": 0})
    return model, optimizer


def cut(images, tops, lefts, crop):
    """Images (N, c, H, W) -> (N, c, crop, crop)."""
    return np.stack([image[:, top:top + crop, left:left + crop]
                     for image, top, left in zip(images, tops, lefts)])


def training_input(batch, radar, optical, args, stats, rng):
    """Batch of data.random_crops() -> network inputs. radar: S1 of every date, (dates, N, c, H,
    W), optical: S2 before the flood, (N, c, H, W)."""
    rows, *corner = batch
    moved = [np.clip(place + rng.integers(-args.shift, args.shift + 1, len(rows)), 0, side - args.crop)
             for place, side in zip(corner, optical.shape[-2:])]
    dates = (rng.random(len(rows)) < args.later).astype(int)
    s1, s2 = models.to_input(cut(radar[dates, rows], *corner, args.crop),
                             cut(optical[rows], *moved, args.crop), "standard", stats)
    s1 += args.noise * torch.from_numpy(rng.standard_normal(s1.shape, np.float32))
    for image in s2:
        if rng.random() < args.drop:
            image[rng.integers(len(image))] = 0  # the mean
    for place in zip(s1, s2) if args.turned else ():
        turns, mirrored = rng.integers(4), rng.integers(2)
        for image in place[:args.turned]:
            turned = image.rot90(int(turns), (1, 2))
            image.copy_(turned.flip(2) if mirrored else turned)
    return s1, s2


def similarity_of(model, a, b, args):
    """(N, N) similarity for info_nce() and retrieval; with map_shift the maximum over shifts of MMA's maps."""
    if args.vicreg:  # which leaves the sensors where they are
        a, b = a - a.mean(0), b - b.mean(0)
    if not args.map_shift:
        return model.similarity(a, b)
    b = b[..., args.map_shift:-args.map_shift, args.map_shift:-args.map_shift]
    (height, width), offsets = b.shape[2:], range(2 * args.map_shift + 1)
    shifted = [model.similarity(a[..., y:y + height, x:x + width], b) for y in offsets for x in offsets]
    return torch.stack(shifted).amax(0)


def loss_of(model, a, b, args):
    temperature = args.log_temperature.exp() if args.learned else args.temperature
    if args.barlow:
        return barlow_twins(a, b, args.barlow)
    if args.vicreg:
        return vicreg(a, b)
    if args.map_shift or args.across:
        return models.info_nce(similarity_of(model, a, b, args), temperature)
    return model.loss(a, b, temperature)


@torch.no_grad()
def judge(model, patches, rows, args, stats):
    """-> {"top1", "top5"}: mean over both ways, and over the centre and the corners of places."""
    (bottom, right), found = [side - args.crop for side in patches.size], []
    model.eval()
    for place in ((bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)):
        embeddings = []
        for part in np.array_split(rows, len(rows) // 100 + 1):
            where = [np.full(len(part), offset) for offset in place]
            images = [cut(array[part], *where, args.crop) for array in patches.arrays[:2]]
            with models.autocast("auto", DEVICE):
                embeddings.append(model(*models.to_input(*images, "standard", stats)))
        similarity = similarity_of(getattr(model, "module", model), *map(torch.cat, zip(*embeddings)), args)
        found += [models.retrieval(similarity), models.retrieval(similarity.T)]
    return {key: float(np.mean([way[key] for way in found])) for key in ("top1", "top5")}


def run(trial, fold, seed, steps, save=None):
    """One trial -> its line of the results. save: folder for a checkpoint of it."""
    torch.set_num_threads(1)
    args = SimpleNamespace(**{**USUAL, **TRIALS[trial], "seed": seed})
    patches = data.Patches(fold / "pairs")
    rows, held = data.split_scenes(patches, share=0)
    if len(rows) < args.batch_size or not len(held):
        raise data.DataError(f"{fold}/pairs: {len(rows)} places to train on, {len(held)} of the split "
                             f"`test`: a trial needs {args.batch_size} and some")
    stats, radar = patches.stats(rows), patches.arrays[0][None]
    if args.later:
        flood = data.Patches(fold / "flood")
        after = flood.arrays[0][[flood.ids.index(name) for name in patches.ids]]
        radar = np.concatenate((radar, after[None]))
    model, optimizer = make_model(args, patches.bands)
    average = get_ema_multi_avg_fn(args.ema)
    judged = AveragedModel(model, multi_avg_fn=average, use_buffers=True) if args.ema else model
    epoch_steps = len(rows) // args.batch_size
    args.epochs = steps / epoch_steps
    rng, times = np.random.default_rng((seed, 2)), []
    for step in tqdm(range(steps), f"{trial} {fold.name} seed {seed}"):
        start = time.perf_counter()
        epoch, within = divmod(step, epoch_steps)
        if not within:
            batches = data.random_crops(
                rows, patches.size, args.crop, args.batch_size, seed, epoch, drop_last=True)
        rate = pretrain.learning_rate(step, epoch_steps, args)
        rate *= min(1, (step + 1) / max(1, args.warmup))
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1)
        inputs = training_input(batches[within], radar, patches.arrays[1], args, stats, rng)
        with models.autocast("auto", DEVICE):
            a, b = model(*inputs)
        loss = loss_of(model, a, b, args)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if args.ema:
            judged.update_parameters(model)
        times.append(time.perf_counter() - start)
    found = judge(judged, patches, held, args, stats)
    if save:
        models.save_checkpoint(
            save / f"{trial}_{fold.name}_{seed}.pt", getattr(judged, "module", judged), method=args.method,
            arch=args.arch, bands=patches.bands, classes=patches.classes, scale="standard", stats=stats,
            simulated=patches.simulated, args={"crop": args.crop})
    return {"trial": trial, "fold": fold.name, "seed": seed, "steps": steps, **found,
            "loss": loss.item(), "places": len(held), "step_s": float(np.median(times)),
            "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20,
            "simulated": patches.simulated}


def cell(values):
    """Shares -> "mean ± sd" in %, of one value that alone."""
    values = 100 * np.array(values)
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}" if len(values) else ""


def print_table(lines):
    """All trials in Markdown, the poster's first; of MMA against MMA. A run that was repeated counts
    once."""
    if len(lengths := {line["steps"] for line in lines}) > 1:
        raise data.DataError(f"--results: has trials of {sorted(lengths)} steps: keep each in a file of its own")
    folds, scores = list(dict.fromkeys(line["fold"] for line in lines)), {}
    for line in {(line["trial"], line["fold"], line["seed"]): line for line in lines}.values():
        runs = scores.setdefault((line["trial"], line["fold"]), {"top1": [], "top5": []})
        for key, values in runs.items():
            values.append(line[key])
    if any(line["simulated"] for line in lines):
        print("SIMULATED data\n")
    heading = [f"{fold} top-{count}" for fold in folds for count in (1, 5)]
    print(f"| trial | runs | {' | '.join(heading)} | times the poster's top-1 / top-5, per fold |")
    print("|" + "---|" * (len(heading) + 3))
    for trial in sorted({trial for trial, _ in scores}, key=list(TRIALS).index):
        cells, counts, times = [], [], []
        for fold in folds:
            own = scores.get((trial, fold), {"top1": [], "top5": []})
            counts.append(str(len(own["top1"])))
            cells += map(cell, own.values())
            usual = "mma" if trial.startswith("mma") else "poster"
            if own["top1"] and (poster := scores.get((usual, fold))):
                times.append(" / ".join(f"{np.mean(own[key]) / np.mean(poster[key]):.2f}"
                                        for key in own))
        print(f"| {trial} | {'/'.join(counts)} | {' | '.join(cells)} | {', '.join(times)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", nargs="?", choices=TRIALS)
    parser.add_argument("--fold", type=Path, help="folder with the stores `pairs` and `flood`")
    parser.add_argument("--seed", type=int, default=0, help="0 or above")
    parser.add_argument("--steps", type=data.positive, default=200)
    parser.add_argument("--results", type=Path, default="trials.jsonl", help="default %(default)s")
    parser.add_argument("--save", type=Path, metavar="DIR")
    parser.add_argument("--table", action="store_true", help="print what is in --results")
    args = parser.parse_args()
    if args.table:
        return print_table([json.loads(line) for line in args.results.open()])
    if not (args.trial and args.fold) or args.seed < 0:
        parser.error("give a trial and --fold, or --table; --seed is 0 or above")
    for folder in filter(None, (args.results.parent, args.save)):
        folder.mkdir(parents=True, exist_ok=True)  # before the work
    line = json.dumps(run(args.trial, args.fold, args.seed, args.steps, args.save))
    print(line)
    with args.results.open("a") as file:
        print(line, file=file)
    return None


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
