"""Train and test the seven rows of the tables on DFC2020: four from scratch, three from pretrained encoders.

    python finetune.py --method late-fusion --data DFC --task single multi --seeds 5
    python finetune.py --method d-simclr --checkpoint runs/d-simclr/last.pt --data DFC --task multi --label-fraction 0.1

Every layer is trained, on random crops of the split `validation`, its patches repeated to balance the classes; the last
epoch is tested on crops that cover each patch of the split `test`. One JSON line per finished run in
--results/results.jsonl, the loss of every epoch in log.jsonl beside it; a run that is in the results is not repeated.
`linear_eval.py --report results/` makes the tables.
"""
import argparse
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import linear_eval
import models


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", help="pretrained encoders (default: from scratch)")
    linear_eval.add_evaluation_options(add)
    # The released code's settings.
    add("--arch", choices=("resnet18", "resnet50"), help="from scratch, of all but mma (default resnet18)")
    add("--epochs", type=data.positive, default=200)
    add("--lr", type=float, default=1e-5, help="of the encoders (default %(default)s)")
    add("--classifier-lr", type=float, default=3e-6)
    add("--weight-decay", type=float, default=1e-3)
    add("--drop-epoch", type=int, default=100, help="both rates times 0.1 from this epoch on (default %(default)s)")
    return parser.parse_args()


def task_loss(task, logits, classes):
    """Cross-entropy or, for several labels, binary cross-entropy, mean over the crops that have a label."""
    if task == "single":
        label = data.single_label(classes)
        loss = F.cross_entropy(logits, label, ignore_index=data.IGNORE, reduction="sum")
        return loss / (label != data.IGNORE).sum().clamp(1)
    label = data.multi_label(classes)
    has = label.any(1)
    loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none").mean(1)
    return (loss * has).sum() / has.sum().clamp(1)


def train(model, patches, rows, scaling, task, seed, args, name):
    """Fit a classifier to random crops of the patches `rows`, repeats included."""
    device, cast = torch.device(args.device), models.autocast(args.precision, torch.device(args.device))
    batches = data.RandomCrops(patches, rows, args.crop, args.batch_size, seed)
    optimizer = torch.optim.Adam([{"params": model.encoders.parameters(), "lr": args.lr},
                                  {"params": model.fc.parameters(), "lr": args.classifier_lr}],
                                 weight_decay=args.weight_decay, fused=True)
    steps = args.epochs * batches.steps
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [args.drop_epoch * batches.steps], 0.1)
    model.train()
    feed = tqdm(data.loader(batches, range(steps), args.workers, device), total=steps, desc=name, unit="step",
                leave=False, delay=1)
    for step, (s1, s2, classes, _) in enumerate(feed, 1):
        s1, s2 = (x.contiguous(memory_format=torch.channels_last) for x in data.to_input(s1, s2, **scaling))
        if len(s1) == 1:  # batch norm may need two
            s1, s2, classes = (torch.cat((x, x)) for x in (s1, s2, classes))
        with cast:
            logits = model(s1, s2)
        loss = task_loss(task, logits.float(), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % batches.steps == 0:  # once an epoch, since the host waits for the device here
            value, epoch = loss.item(), step // batches.steps
            if not math.isfinite(value):
                raise data.DataError(f"{name}: the loss is {value} after epoch {epoch}: try a lower --lr or --precision "
                                     "float32")
            with open(Path(args.results, "log.jsonl"), "a") as log:
                print(json.dumps({"run": name, "epoch": epoch, "loss": value, "lr": schedule.get_last_lr()[0]}), file=log)


def make_classifier(method, patches, content, args, seed):
    """-> Classifier of a method, its encoders from a checkpoint's content if there is one, else drawn by the seed."""
    torch.manual_seed(seed)
    encoders = models.load_encoders(content)[0] if content else models.make_encoders(method, patches.bands, args.arch)
    return models.Classifier(encoders).to(args.device, memory_format=torch.channels_last)


def main():
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    content = models.load_checkpoint(args.checkpoint) if args.checkpoint else {}
    patches, train_rows, test_rows, scaling = linear_eval.open_labelled(args, content)
    keys = ("crop", "scale", "arch", "label_sampling", "precision", "epochs", "batch_size", "lr", "classifier_lr",
            "weight_decay", "drop_epoch")
    settings = {**{key: getattr(args, key) for key in keys}, "bands": patches.bands}
    results, source = linear_eval.Results(args.results), linear_eval.data_hash(patches)
    identity = linear_eval.file_hash(args.checkpoint) if content else None
    for task, fraction, seed in itertools.product(args.task, args.label_fraction, range(args.seeds)):
        run = {"method": args.method, "protocol": "finetune" if content else "scratch", "task": task,
               "label_fraction": fraction, "seed": seed, "data": source, "args": settings, "checkpoint": identity}
        if results.has(run):
            continue
        chosen = linear_eval.training_rows(patches.labels[train_rows], fraction, seed, args.label_sampling)
        model, start = make_classifier(args.method, patches, content, args, seed), time.perf_counter()
        name = f"{args.method} {task} {fraction:.0%} seed {seed}"
        train(model, patches, train_rows[chosen], scaling, task, seed, args, name)
        found = linear_eval.extract(model, scaling, patches, test_rows, args)
        has = linear_eval.labelled(found, task)
        scores = linear_eval.score(task, found[task][has], found["logits"][has])
        counts = {"train_patches": len(np.unique(chosen)), "train_rows": len(chosen), "test_crops": int(has.sum())}
        results.add(run, scores, counts=counts, seconds=round(time.perf_counter() - start, 1),
                    simulated=patches.simulated or content.get("simulated", False))


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
