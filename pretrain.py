"""Contrastive pretraining of Sentinel-1 and Sentinel-2 encoders on unlabelled pairs.

    python pretrain.py --epochs 200                                   # D-SimCLR on datasets/sen12ms, published settings
    python pretrain.py --method mma --data STORE --out runs/mma
    torchrun --nproc-per-node 8 pretrain.py --data STORE              # --batch-size stays the global one

In --out: last.pt (encoders, heads, optimiser, everything to go on or to evaluate), previous.pt, log.jsonl, curve.png.
The same command started again goes on at the step where it was; SIGTERM and Ctrl-C save first. Every --eval-every
epochs the encoders look up held-out places: which of the candidates' Sentinel-2 patches belongs to this Sentinel-1
patch, and the other way round.
"""
import argparse
import contextlib
import json
import math
import multiprocessing.util
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import data
import models

FREE = {"data", "out", "bands", "workers", "cache", "device", "log_every", "eval_every"}  # do not change the result
STOP = (signal.SIGTERM, signal.SIGINT)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", default="d-simclr", choices=[name for name, row in models.METHODS.items() if row["pretrained"]])
    add("--data", default="datasets/sen12ms", help="store or tree (default %(default)s)")
    add("--out", help="folder of the run (default runs/METHOD)")
    # The published settings: the released code's, and for MMA its ResNet's, since its own were not released.
    add("--arch", default="resnet18", choices=("resnet18", "resnet50"), help="of all but mma")
    add("--epochs", type=data.positive, default=200)
    add("--batch-size", type=data.positive, default=200, help="pairs per step, over all processes (default %(default)s)")
    add("--crop", type=data.positive, default=128, help="side of the random crops, px (default %(default)s)")
    add("--lr", type=float, default=3e-5)
    add("--weight-decay", type=float, default=1e-4)
    add("--constant-epochs", type=int, default=10, help="before the cosine to zero (default %(default)s)")
    add("--temperature", type=float, help="default 0.07, 0.1 for mma")
    add("--scale", default="patch-max", choices=data.SCALES, help="network input (default %(default)s, as published)")
    # What the published study does not have.
    add("--bands", nargs="+", metavar="BAND", help="e.g. VV VH B2 B3 B4 (default: all; B4 B3 B2 for simclr-rgb)")
    add("--seed", type=int, default=0)
    add("--holdout", type=float, default=0.02, help="share of scenes kept out for retrieval (default %(default)s)")
    add("--eval-every", type=data.positive, default=10, help="epochs between retrievals (default %(default)s)")
    add("--micro-batch", type=data.positive, help="pairs per forward pass: less memory, the gradient of the whole batch")
    add("--precision", default="auto", choices=("auto", "bf16", "float32"), help="auto: bf16 where it is native")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--workers", type=int, help="processes that read, per process that trains (default: one per core)")
    add("--cache", choices=("ram", "device"), help="hold the data in memory")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--log-every", type=data.positive, default=10, help="steps between lines of log.jsonl (default %(default)s)")
    args = parser.parse_args()
    args.out = Path(args.out or f"runs/{args.method}")
    if args.temperature is None:
        args.temperature = 0.1 if args.method == "mma" else 0.07
    if not (args.temperature > 0 and 0 <= args.holdout < 1 and args.lr >= 0):
        parser.error("--temperature is above 0, --holdout a share below 1, --lr not negative")
    return args


class TwoViews(data.RandomCrops):
    """SimCLR: two augmentations of each crop, drawn per sample; the same for any number of workers and processes."""

    scale = stats = None  # as data.to_input takes them

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        jitter = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)  # strengths of Chen et al. 2020
        blur = v2.RandomApply([v2.GaussianBlur(self.size // 20 * 2 + 1, (0.1, 2.0))], 0.5)  # kernel a tenth of the side
        self.augment = v2.Compose([v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip(), jitter,
                                   v2.RandomGrayscale(0.2), blur])

    def __getitem__(self, step):
        s1, s2, _, rows = super().__getitem__(step)
        images = data.to_input(s1, s2, "patch-max" if self.scale == "patch-max" else "fixed")[1]  # colours in 0..1
        pairs, first = [], self.rank * len(rows)  # place in the batch of all processes
        with torch.random.fork_rng(devices=[]):
            for place, image in enumerate(images, first):
                seed = np.random.SeedSequence((self.seed, step, place)).generate_state(1)[0]
                torch.default_generator.manual_seed(seed.item())
                pairs.append((self.augment(image), self.augment(image)))
        views = [torch.stack(view) for view in zip(*pairs)]
        if self.scale == "standard":
            views = [data.standardise(view * 10_000, self.stats["s2"]) for view in views]
        return *views, rows


def gather(x, world):
    """(n, ...) of this process -> (world * n, ...) of all, in the order of the processes."""
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def forward_backward(network, ready, cast, loss_of, parts, rank, world):
    """Gradients of one global batch, in the parameters of every process; -> its loss here and all embeddings.

    parts: one pair of crops per micro-batch, which `ready` makes network input. The loss sees the embeddings of all
    processes and micro-batches at once; its gradient at the embeddings is then sent back through the network,
    micro-batch by micro-batch (Gao et al. 2021), which is exact as long as batch norm does not couple the samples.
    Batch norm takes its statistics within a micro-batch, and meets each twice, so its running means forget sooner.
    """
    with cast, torch.set_grad_enabled(len(parts) == 1):
        outputs = [network(*ready(*part)) for part in parts]
    local = [torch.cat(x) if len(parts) > 1 else x[0] for x in zip(*outputs)]
    n = len(local[0])
    leaves = [gather(x.detach(), world).requires_grad_() for x in local]
    loss = loss_of(*leaves, first=rank * n, n=n if world > 1 else None)
    loss.backward()
    for leaf in leaves if world > 1 else ():
        dist.all_reduce(leaf.grad)  # what the other processes' rows want of our embeddings
    gradients = [leaf.grad[rank * n:(rank + 1) * n] for leaf in leaves]
    if len(parts) == 1:
        torch.autograd.backward(local, gradients)
    else:
        gradients = zip(*(g.split([len(output[0]) for output in outputs]) for g in gradients))
        for k, (part, gradient) in enumerate(zip(parts, gradients)):
            with network.no_sync() if world > 1 and k < len(parts) - 1 else contextlib.nullcontext():
                with cast:
                    outputs = network(*ready(*part))
                torch.autograd.backward(outputs, gradient)
    return loss.detach(), *(leaf.detach() for leaf in leaves)


@torch.no_grad()
def held_out_retrieval(model, patches, rows, args, stats, device, cast):
    """Retrieval among the centre crops of held-out places, at most 1,000 of them -> dict for the log and checkpoint."""
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), 1000)).astype(int)]
    centres, embeddings = data.CentreCrops(patches, rows, args.crop, 100), []
    model.eval()
    for batch in tqdm(range(len(centres)), desc="retrieval", unit="batch", leave=False, delay=1):
        s1, s2, *_ = (x.to(device) for x in centres[batch])
        views = data.to_input(s1, s2, args.scale, stats)
        if args.method == "simclr-rgb":  # one sensor: which of the candidates was this half's other half cut from?
            views = views[1].split(args.crop // 2, dim=3)[:2]
        with cast:
            embeddings.append(model(*views))
    model.train()
    similarity = model.similarity(*map(torch.cat, zip(*embeddings)))
    there, back = ("left_to_right", "right_to_left") if args.method == "simclr-rgb" else ("s1_to_s2", "s2_to_s1")
    return {"candidates": len(rows), there: models.retrieval(similarity), back: models.retrieval(similarity.T)}


def learning_rate(step, steps, args):
    """Constant for some epochs, then a cosine to zero over the steps that remain."""
    total, constant = args.epochs * steps, args.constant_epochs * steps
    done = max(0, step - constant) / max(1, total - constant)
    return args.lr * (1 + math.cos(math.pi * done)) / 2


def resume(args, settings, model, optimizer, rank):
    """Load the newest whole checkpoint of --out into model and optimiser -> (its step, its retrieval). Settings that
    would change the result raise models.CheckpointError."""
    last, previous = args.out / "last.pt", args.out / "previous.pt"
    for path in filter(Path.exists, (last, previous)):
        try:
            content = models.load_checkpoint(path)
            if "optimizer" not in content:
                raise models.CheckpointError(f"{path}: weights only, nothing to go on from")
        except models.CheckpointError as error:
            if path == previous or not previous.exists():
                raise models.CheckpointError(f"{error}. Use another --out, or remove {args.out} to begin anew") from None
            if rank == 0:
                print(f"{error}: kept as last.bad, going on from previous.pt", file=sys.stderr)
                path.replace(path.with_suffix(".bad"))  # else the next checkpoint would push previous.pt out
            continue
        old = content["args"]
        if changed := "; ".join(f"--{key.replace('_', '-')} {old.get(key)} there, {value} here"
                                for key, value in settings.items() if old.get(key) != value):
            raise models.CheckpointError(f"{path}: made with other settings ({changed}): use them, or another --out")
        for part in ("encoders", "heads"):
            for name, module in getattr(model, part).items():
                module.load_state_dict(content[part][name])
        optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"])
        return content["step"], content["retrieval"]
    return 0, None


def highest(number, world):
    """The highest of the integers that all processes call with; agreed on the host, without waiting for the device."""
    number = torch.tensor(int(number))
    if world > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def refuse_not_finite(recent, losses, model, patches, args):
    """Raise where the loss of one of the recent steps (step, rows, loss) is NaN or infinite, or the weights now are;
    called before anything made of them is saved."""
    bad = [k for k, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad or not torch.stack([weight.isfinite().all() for weight in model.parameters()]).all():
        step, rows, _ = recent[bad[0] if bad else -1]
        what = f"loss {losses[bad[0]]}" if bad else "weights not finite"
        ids = " ".join(patches.ids[row] for row in rows.tolist())
        raise models.CheckpointError(f"{what} at step {step}; the checkpoints in {args.out} are from before it. Try a "
                                     f"lower --lr or --precision float32. The batch: {ids}")


def shielded(loader, *arguments):
    """The batches of a loader whose processes never see the signals that end a run: torchrun and schedulers send them
    to all, and the step in hand needs its data."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)  # which processes inherit
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed, of which no checkpoint must know
        feed = loader(*arguments)
        first = next(feed)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)
    readers = multiprocessing.active_children()

    def end():  # they are deaf to the SIGTERM by which Python ends them at its exit
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch takes their death for a failure
        for reader in readers:
            reader.kill()

    multiprocessing.util.Finalize(None, end, exitpriority=1)
    yield first
    yield from feed


class Log:
    """log.jsonl: one JSON line per logged step and per retrieval. Lines after `step` are of a run that was cut off."""

    def __init__(self, path, step):
        text = path.read_text() if step and path.exists() else ""
        entries = map(json.loads, text[:text.rfind("\n") + 1].splitlines())  # the last line may lack its end
        self.path, self.entries = path, [entry for entry in entries if entry["step"] <= step]
        path.with_suffix(".tmp").write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))
        path.with_suffix(".tmp").replace(path)

    def add(self, **entry):
        self.entries.append(entry)
        try:
            with open(self.path, "a") as handle:
                print(json.dumps(entry), file=handle)
        except OSError as error:
            raise models.CheckpointError(f"{self.path}: cannot be written ({error.strerror}). Mend that and start the same "
                                         "command again: it goes on from the last checkpoint") from None


def draw_curve(entries, out, title):
    """Picture of loss, in-batch retrieval accuracy and held-out retrieval over epochs."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    steps = [entry for entry in entries if "loss" in entry]
    left.plot([e["epoch"] for e in steps], [e["loss"] for e in steps], color="black", lw=1)
    left.set(xlabel="epoch", ylabel="loss")
    right.plot([e["epoch"] for e in steps], [e["accuracy"] for e in steps], color="grey", lw=0.8, label="in the batch")
    held = [entry for entry in entries if "retrieval" in entry]
    for way in [key for key in held[0]["retrieval"] if key != "candidates"] if held else ():
        right.plot([e["epoch"] for e in held], [e["retrieval"][way]["top1"] for e in held], "o-", ms=3, lw=1,
                   label=f"held out, {way.replace('_', ' ')}, top-1 of {held[-1]['retrieval']['candidates']}")
    right.set(xlabel="epoch", ylabel="retrieval accuracy", ylim=(0, 1))
    right.legend(fontsize=7, frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main():
    args = arguments()
    rank, local_rank, world = (int(os.environ.get(key, default)) for key, default in
                               (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))  # torchrun's
    device = torch.device(args.device, local_rank) if args.device == "cuda" else torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        store, *_ = next(dist.rendezvous("env://"))  # torchrun keeps it over a restart, with addresses of the dead
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        if args.batch_size % world:
            raise data.DataError(f"--batch-size {args.batch_size} does not divide by {world} processes")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True  # TF32 in convolutions, never in a loss

    bands = args.bands or models.METHODS[args.method].get("bands")
    patches = data.open_data(args.data, bands, args.cache, args.workers, device)
    counts = {sensor: len(patches.bands[sensor]) for sensor in models.METHODS[args.method]["inputs"]}
    if not all(counts.values()) or args.method == "simclr-rgb" and counts["s2"] != 3:
        raise data.DataError(f"--bands {' '.join(bands)}: {args.method} needs "
                             f"{'three of Sentinel-2' if args.method == 'simclr-rgb' else 'bands of both sensors'}")
    rows, held = data.split_scenes(patches, args.holdout)
    if len(rows) < args.batch_size:
        raise data.DataError(f"--batch-size {args.batch_size}: {args.data} has {len(rows)} patches to train on (and "
                             f"{len(held)} held out): choose a smaller batch")
    stats = patches.stats(set(patches.splits) - {"test"})
    kind = TwoViews if args.method == "simclr-rgb" else data.RandomCrops
    batches = kind(patches, rows, args.crop, args.batch_size, args.seed, drop_last=True, rank=rank, world=world)
    batches.scale, batches.stats = args.scale, stats  # for TwoViews

    torch.manual_seed(args.seed)
    model = models.Contrastive(args.method, patches.bands, args.arch).to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # the statistics of the global batch
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    args.precision = models.resolve_precision(args.precision, device)
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings["bands"] = patches.bands["s1"] + patches.bands["s2"]
    settings["data"] = patches.identity()
    settings["processes"] = world if device.type == "cpu" else None  # there each has its own batch norm statistics
    args.out.mkdir(parents=True, exist_ok=True)
    start, found = resume(args, settings, model, optimizer, rank)
    if highest(start, world) != start:
        raise models.CheckpointError(f"{args.out}: not the folder that the other processes go on from: share one")
    network = torch.compile(model) if args.compile else model
    if world > 1:
        network = nn.parallel.DistributedDataParallel(network, [device] if device.type == "cuda" else None)
    cast = models.autocast(args.precision, device)
    log, total = Log(args.out / "log.jsonl", start) if rank == 0 else None, args.epochs * batches.steps

    def loss_of(a, b, **share):
        return model.loss(a, b, args.temperature, **share)

    def ready(a, b):
        """A batch as it was read -> the two network inputs."""
        a, b = (a, b) if args.method == "simclr-rgb" else data.to_input(a, b, args.scale, stats)
        return (x.contiguous(memory_format=torch.channels_last) for x in (a, b))

    def evaluate(step):
        if rank or not len(held):
            return found
        result = held_out_retrieval(model, patches, held, args, stats, device, cast)
        log.add(epoch=step // batches.steps, step=step, retrieval=result)
        ways = ", ".join(f"{way.replace('_', ' ')} {r['top1']:.1%} / {r['top5']:.1%} / {r['median']:g}"
                         for way, r in result.items() if way != "candidates")
        tqdm.write(f"epoch {step // batches.steps}: retrieval among {result['candidates']} held-out places, top-1 / "
                   f"top-5 / median rank: {ways}")
        return result

    def save(step):
        if rank == 0:
            models.save_checkpoint(args.out / "last.pt", model, method=args.method, arch=args.arch, bands=patches.bands,
                                   scale=args.scale, stats=stats, simulated=patches.simulated, args=settings,
                                   retrieval=found, epoch=step // batches.steps, step=step,
                                   optimizer=optimizer.state_dict(), random=torch.get_rng_state(),
                                   data={"path": str(args.data), "pairs": len(rows)})

    stopping = []  # signals end the run after the step in hand
    for number in STOP:
        signal.signal(number, lambda number, frame: stopping.append(number))
    if start == 0:
        found = evaluate(0)
    model.train()
    recent, waited, clock = [], 0.0, time.perf_counter()  # recent: (step, rows, loss still on the device)
    bar = tqdm(total=total * args.batch_size, initial=start * args.batch_size, unit="pair", unit_scale=True,
               desc=args.method, disable=rank > 0)
    feed, stop = shielded(data.loader, batches, range(start, total), args.workers, device), False
    for step in range(start + 1, total + 1):
        before = time.perf_counter()
        batch = next(feed)
        waited += time.perf_counter() - before
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, batches.steps, args)
        parts = list(zip(*(x.split(args.micro_batch or len(x)) for x in batch[:2])))
        loss, a, b = forward_backward(network, ready, cast, loss_of, parts, rank, world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append((step, batch[-1], loss))

        ends_epoch, logs = step % batches.steps == 0, step % args.log_every == 0
        stop = highest(bool(stopping), world)
        if ends_epoch or logs or stop:  # the only places where the host waits for the device
            losses = torch.stack([loss for *_, loss in recent])
            if world > 1:
                dist.all_reduce(losses)
            losses = (losses / world).tolist()
            refuse_not_finite(recent, losses, model, patches, args)
        if rank == 0 and (ends_epoch or logs):
            seconds, pairs = time.perf_counter() - clock, len(recent) * args.batch_size
            accuracy = models.retrieval(model.similarity(a, b))["top1"]
            log.add(epoch=step / batches.steps, step=step, loss=losses[-1], accuracy=accuracy, lr=group["lr"],
                    pairs_per_s=pairs / seconds, waited_s=waited)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", top1=f"{accuracy:.1%}", refresh=False)
            bar.update(pairs)
        if ends_epoch and (step // batches.steps % args.eval_every == 0 or step == total):
            found = evaluate(step)
        if ends_epoch or stop:
            save(step)
        if stop:
            break
        if ends_epoch or logs:
            recent, waited, clock = [], 0.0, time.perf_counter()
    bar.close()
    if rank == 0:
        draw_curve(log.entries, args.out / "curve.png", f"{'SIMULATED data, ' * patches.simulated}{args.method}")
        print(f"stopped at step {step} of {total}; the same command goes on from there" if stop else
              f"{args.out}/last.pt: all {args.epochs} epochs are done; log.jsonl and curve.png are beside it")
    if world > 1:
        dist.destroy_process_group()
    if stop:
        sys.exit(128 + (stopping or STOP)[0])


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
