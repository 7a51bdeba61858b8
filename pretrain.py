"""Contrastive pretraining of Sentinel-1 and Sentinel-2 encoders on unlabelled pairs.

    python pretrain.py --epochs 200                          # D-SimCLR on datasets/sen12ms
    python pretrain.py --method mma --data STORE --out runs/mma
    torchrun --nproc-per-node 8 pretrain.py --data STORE     # --batch-size stays the global one

In --out: last.pt (all that is needed to go on or to evaluate), previous.pt, log.jsonl, curve.png.
The same command started again goes on at the step where it was; SIGTERM and Ctrl-C save first. On
the CPU it ends in the same bits as if never stopped; on a GPU the order of the data is exact, and
cuDNN chooses its algorithms anew. Every --eval-every epochs the encoders look up held-out places:
which of the candidates' Sentinel-2 patches belongs to this Sentinel-1 patch, and the other way.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import models

FREE = {"out", "threads", "cache", "device", "log_every", "eval_every"}  # to change in a run
AGREE = 8  # steps between two agreements of several processes on stopping


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--method", default="d-simclr", choices=("d-simclr", "mma", "simclr-rgb"))
    add("--data", default="datasets/sen12ms", help="store (default %(default)s)")
    add("--out", help="folder of the run (default runs/METHOD)")
    # The published settings: the released code's; those of MMA were not released.
    add("--arch", default="resnet18", choices=("resnet18", "resnet50"), help="of all but mma")
    add("--epochs", type=data.positive, default=200)
    add("--batch-size", type=data.positive, default=200, help="over all processes (default 200)")
    add("--crop", type=data.positive, default=128, help="side in px (default 128)")
    add("--lr", type=float, default=3e-5)
    add("--weight-decay", type=float, default=1e-4)
    add("--constant-epochs", type=int, default=10, help="before the cosine to zero (default 10)")
    add("--temperature", type=float, help="default 0.07, 0.1 for mma")
    add("--scale", default="patch-max", choices=data.SCALES, help="default patch-max, as published")
    # What the published study does not have.
    add("--bands", nargs="+", metavar="BAND", help="default all; B4 B3 B2 for simclr-rgb")
    add("--seed", type=int, default=0)
    add("--holdout", type=float, default=0.02, help="share of scenes, where no split is `test`")
    add("--eval-every", type=data.positive, default=10, help="epochs, of retrieval (default 10)")
    add("--micro-batch", type=data.positive, help="pairs per forward pass: less memory")
    add("--precision", default="auto", choices=("auto", "bf16", "float32"), help="default auto")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--threads", type=data.positive, help="that read (default: one per core, at most 8)")
    add("--cache", choices=("device",), help="hold the data in the device's memory")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--log-every", type=data.positive, default=10, help="steps, in log.jsonl (default 10)")
    args = parser.parse_args()
    args.out = Path(args.out or f"runs/{args.method}")
    if args.temperature is None:
        args.temperature = 0.1 if args.method == "mma" else 0.07
    if not (args.temperature > 0 and 0 <= args.holdout < 1 and args.lr >= 0 and args.seed >= 0):
        parser.error("--temperature is above 0, --holdout below 1, --lr and --seed not negative")
    return args


def join_processes(args):
    """-> (rank, world, device) of this process among those of torchrun, or of the only one."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if args.batch_size % world:
        raise data.DataError(f"--batch-size {args.batch_size} does not divide by {world} processes")
    if world > 1:  # torchrun keeps its store over a restart, with the addresses of the dead
        store, *_ = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return rank, world, device


def gather(x, world):
    """(n, ...) of this process -> (world * n, ...) of all, in the order of the processes."""
    if world == 1:
        return x
    x = x.contiguous()  # MMA's maps have their channels last
    everyone = x.new_empty(world * len(x), *x.shape[1:])
    dist.all_gather(list(everyone.chunk(world)), x)
    return everyone


def open_patches(args, device):
    """The store with the bands that the method takes."""
    patches = data.Patches(args.data)
    rgb = args.method == "simclr-rgb"
    needs = "three of Sentinel-2" if rgb else "bands of both sensors"
    bands = args.bands or (models.RGB if rgb else patches.bands["s1"] + patches.bands["s2"])
    try:
        s1, s2 = patches.select(bands).bands.values()
    except data.DataError as error:
        raise data.DataError(f"{error}. {args.method} takes {needs}, see --bands") from None
    if not (len(s2) == 3 if rgb else s1 and s2):
        raise data.DataError(f"--bands {' '.join(bands)}: {args.method} takes {needs}")
    return patches.hold(device) if args.cache else patches


def batches_from(start, rows, size, args, rank=0, world=1):
    """(rows, tops, lefts) of what this process takes of every batch from step `start` on."""
    n = args.batch_size // world
    first, skip = divmod(start, len(rows) // args.batch_size)
    for epoch in range(first, args.epochs):
        batches = data.random_crops(rows, size, args.crop, args.batch_size, args.seed, epoch, True)
        for batch in batches[skip:]:
            yield [values[rank * n:(rank + 1) * n] for values in batch]
        skip = 0


def network_inputs(s1, s2, args, stats, step, rank):
    """Crops of a step -> the two inputs of models.Contrastive: sensors, or SimCLR's views."""
    if args.method == "simclr-rgb":
        scale = "patch-max" if args.scale == "patch-max" else "fixed"  # colours in 0..1
        _, colours = data.to_input(s1, s2, scale)
        mine = slice(rank * len(s2), (rank + 1) * len(s2))
        draws = [draw[:, mine] for draw in draw_views(args.batch_size, args.seed, step)]
        inputs = two_views(colours, *draws)
        if args.scale == "standard":
            inputs = [data.standardise(view * 10_000, stats["s2"]) for view in inputs]
    else:
        inputs = data.to_input(s1, s2, args.scale, stats)
    return [x.contiguous(memory_format=torch.channels_last) for x in inputs]


def draw_views(count, seed, step):
    """Parameters of two views of `count` images as in Chen et al. 2020: arrays (2, count, ...)."""
    rng = np.random.default_rng((seed, step, 1))  # (seed, epoch) draws the places of the crops
    shape = 2, count
    ratio = np.exp(rng.uniform(-1, 1, shape) * math.log(4 / 3))
    area = rng.uniform(0.08, np.minimum(ratio, 1 / ratio))  # at most what fits into the image
    sides = np.sqrt((area * ratio, area / ratio))  # width and height, of the image's
    crop = np.zeros((*shape, 2, 3))  # as F.affine_grid takes it
    crop[..., 0, 0], crop[..., 1, 1] = sides
    crop[..., 0, 0] *= rng.choice((-1, 1), shape)  # mirrored or not
    crop[..., 0, 2], crop[..., 1, 2] = (1 - sides) * rng.uniform(-1, 1, sides.shape)
    order = rng.permuted(np.tile(range(4), (*shape, 1)), axis=2)
    order[rng.random(shape) < 0.2] = -1  # no jitter
    factors = rng.uniform((0.2, 0.2, 0.2, -0.2), (1.8, 1.8, 1.8, 0.2), order.shape)
    grey = rng.random(shape) < 0.2
    sigma = rng.uniform(0.1, 2, shape) * (rng.random(shape) < 0.5)  # px, 0 for no blur
    return crop, order, factors, grey, sigma


def two_views(images, *draws):
    """(N, 3, h, w) colours in 0..1, arrays (2, N, ...) of draw_views -> two of (N, 3, h, w)."""
    crop, order, factors, grey, sigma = (draw.reshape(-1, *draw.shape[2:]) for draw in draws)
    views = torch.cat((images, images))
    grid = F.affine_grid(send(crop, views.device).float(), views.shape, align_corners=False)
    views = F.grid_sample(views, grid, padding_mode="border", align_corners=False)
    for turn in order.T:
        for number, kind in enumerate(("brightness", "contrast", "saturation", "hue")):
            change(views, turn == number, partial(jitter, kind), factors[:, number])
    change(views, grey, partial(jitter, "saturation"), np.zeros(len(views)))
    change(views, sigma > 0, blur, sigma)
    return views.chunk(2)


def change(images, chosen, operation, strength):
    """images[chosen] = operation(images[chosen], strength[chosen]); arrays (N,) of the host."""
    index = np.flatnonzero(chosen)
    if len(index):
        strength = send(strength[index], images.device).float()[:, None, None, None]
        index = send(index, images.device)
        images[index] = operation(images[index], strength)


def send(array, device):
    """An array of the host as a tensor on the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def jitter(kind, images, factor):
    """torchvision's adjust_brightness, adjust_contrast, adjust_saturation or adjust_hue."""
    r, g, b = images.split(1, 1)
    grey = 0.2989 * r + 0.587 * g + 0.114 * b  # (N, 1, h, w)
    if kind == "hue":
        value, brightest = images.max(1, keepdim=True)
        chroma = value - images.amin(1, keepdim=True)
        others = images.roll(-1, 1) - images.roll(-2, 1)
        sixths = 2 * brightest + others.gather(1, brightest) / chroma.clamp(min=1e-9)
        offsets = torch.arange(5, 0, -2, device=images.device)[:, None, None]
        sixths = (sixths + 6 * factor + offsets) % 6  # of a turn on the wheel of colours
        return value - chroma * torch.minimum(sixths, 4 - sixths).clamp(0, 1)
    if kind == "brightness":
        return (images * factor).clamp(0, 1)
    if kind == "contrast":
        grey = grey.mean((1, 2, 3), keepdim=True)
    return torch.lerp(grey, images, factor).clamp(0, 1)


def blur(images, sigma):
    """Gaussian of sigma px, cut off at a twentieth of the side."""
    n, c, h, w = images.shape
    reach = h // 20
    x = torch.arange(-reach, reach + 1, device=images.device)
    kernel = (-(x / sigma) ** 2 / 2).softmax(3).repeat_interleave(c, 0)  # (N c, 1, 1, taps)
    planes = F.pad(images.reshape(1, n * c, h, w), [reach] * 4, mode="reflect")
    planes = F.conv2d(planes, kernel, groups=n * c)
    return F.conv2d(planes, kernel.transpose(2, 3), groups=n * c).view(images.shape)


def forward_backward(network, cast, loss_of, a, b, micro, rank, world):
    """Gradients of one global batch, in the parameters of every process; -> its loss here and all
    embeddings. a, b: network inputs of this process, `micro` of which pass at a time.

    The loss sees the embeddings of all processes and micro-batches; its gradient at them then goes
    back through the network, micro-batch by micro-batch (Gao et al. 2021). That is exact but for
    batch norm, whose statistics are a micro-batch's, and which forgets sooner: it sees each twice.
    """
    batches = list(zip(a.split(micro), b.split(micro)))
    with cast, torch.set_grad_enabled(len(batches) == 1):
        outputs = [network(*batch) for batch in batches]
    mine = slice(rank * len(a), (rank + 1) * len(a))
    leaves = []  # the embeddings of all, off the graph of the network
    for embeddings in zip(*outputs):
        leaves.append(gather(torch.cat(embeddings).detach(), world).requires_grad_())
    loss = loss_of(*leaves, first=mine.start, n=len(a) if world > 1 else None)
    loss.backward()
    for leaf in leaves if world > 1 else ():
        dist.all_reduce(leaf.grad)  # what the other processes' rows want of our embeddings
    gradients = zip(*(leaf.grad[mine].split(micro) for leaf in leaves))
    for k, gradient in enumerate(gradients):
        if world > 1:  # share the sum over the micro-batches alone, as DDP's no_sync() does
            network.require_backward_grad_sync = k == len(batches) - 1
        if len(batches) > 1:
            with cast:
                outputs[k] = network(*batches[k])
        torch.autograd.backward(outputs[k], gradient)
    return loss.detach(), *(leaf.detach() for leaf in leaves)


def learning_rate(step, epoch_steps, args):
    """Constant for some epochs, then a cosine to zero over the steps that remain."""
    total, constant = args.epochs * epoch_steps, args.constant_epochs * epoch_steps
    done = max(0, step - constant) / max(1, total - constant)
    return args.lr * (1 + math.cos(math.pi * done)) / 2


def refuse_not_finite(recent, losses, model, patches, args):
    """Raise where the loss of a recent (step, rows, loss) or now a weight is NaN or infinite."""
    bad = [k for k, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad or not torch.stack([weight.isfinite().all() for weight in model.parameters()]).all():
        step, batch_rows, _ = recent[bad[0] if bad else -1]
        ids = " ".join(patches.ids[row] for row in batch_rows)
        what = f"loss {losses[bad[0]]}" if bad else "weights not finite"
        raise models.CheckpointError(
            f"{what} at step {step}; the checkpoints in {args.out} are from before it. Try a lower "
            f"--lr or --precision float32. The batch: {ids}")


@torch.no_grad()
def held_out_retrieval(model, patches, crops, args, stats, device, cast):
    """Retrieval among the places of these crops -> dict for the log and the checkpoint."""
    forth, back, embeddings = "s1_to_s2", "s2_to_s1", []
    model.eval()
    for s1, s2, *_ in data.loader(patches, crops, args.crop, device, args.threads):
        inputs = data.to_input(s1, s2, args.scale, stats)
        if args.method == "simclr-rgb":  # one sensor: which is the right half to this left one?
            forth, back = "left_to_right", "right_to_left"
            inputs = inputs[1].split(args.crop // 2, dim=3)[:2]
        with cast:
            embeddings.append(model(*inputs))
    model.train()
    similarity = model.similarity(*map(torch.cat, zip(*embeddings)))
    return {"candidates": len(similarity),
            forth: models.retrieval(similarity), back: models.retrieval(similarity.T)}


class Log:
    """log.jsonl: a JSON line per logged step and per retrieval, up to the step to go on from."""

    def __init__(self, path, step):
        path.touch()
        lines = path.read_text().splitlines(True) if step else []
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        self.path, self.entries = path, [json.loads(line) for line in lines]
        os.truncate(path, len("".join(lines)))  # what follows is of a run that was killed

    def add(self, **entry):
        self.entries.append(entry)
        try:
            with open(self.path, "a") as handle:
                print(json.dumps(entry), file=handle)
        except OSError as error:
            raise models.CheckpointError(f"{self.path}: cannot be written ({error.strerror}). Mend "
                                         "that and start the same command again") from None


def draw_curve(entries, out, title):
    """Picture of loss, in-batch retrieval accuracy and held-out retrieval over epochs."""
    figure, [[left, right]] = data.new_figure(1, 2, figsize=(9, 3.4))
    steps = [entry for entry in entries if "loss" in entry]
    epochs = [entry["epoch"] for entry in steps]
    left.plot(epochs, [entry["loss"] for entry in steps], color="grey")
    left.set(xlabel="epoch", ylabel="loss", title=title)
    right.plot(epochs, [entry["accuracy"] for entry in steps], color="grey", label="in the batch")
    lookups = [entry for entry in entries if "retrieval" in entry]
    for way in list(lookups[0]["retrieval"])[1:] if lookups else ():
        points = [(entry["epoch"], entry["retrieval"][way]["top1"]) for entry in lookups]
        right.plot(*zip(*points), "o-", label=f"held out, {way}")
    right.set(xlabel="epoch", ylabel="retrieval, top-1", ylim=(0, 1))
    right.legend()
    figure.savefig(out, dpi=110)


def make_model(args, bands, device, world):
    """-> (models.Contrastive, the same as training calls it, its optimiser)."""
    # TF32 in convolutions, never in a loss
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    model = models.Contrastive(args.method, bands, args.arch)
    model = model.to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":  # the statistics of the global batch
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = torch.compile(model) if args.compile else model
    if world > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)
        network.broadcast_buffers = False  # as an argument it is deprecated from torch 2.14 on
    optimizer = torch.optim.Adam(
        model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    return model, network, optimizer


def resume(args, settings, model, optimizer, rank):
    """Load the newest whole checkpoint of --out into model and optimiser -> (its step, its
    retrieval). Settings that would change the result raise models.CheckpointError."""
    last, previous = args.out / "last.pt", args.out / "previous.pt"
    for path in filter(Path.exists, (last, previous)):
        try:
            content = models.load_checkpoint(path)
            if "optimizer" not in content:
                raise models.CheckpointError(f"{path}: weights only, nothing to go on from")
        except models.CheckpointError as error:
            if path == previous or not previous.exists():
                raise models.CheckpointError(f"{error}. Remove {args.out} to begin anew") from None
            if rank == 0:  # not left where the next checkpoint would push it over previous.pt
                print(f"{error}: kept as last.bad, going on from previous.pt", file=sys.stderr)
                path.replace(path.with_suffix(".bad"))
            continue
        old = content["args"]
        changes = "; ".join(f"--{key.replace('_', '-')} {old.get(key)} there, {settings[key]} here"
                            for key in settings if old.get(key) != settings[key])
        if changes:
            raise models.CheckpointError(f"{path}: made with other settings ({changes}): use them, "
                                         "or another --out")
        for kind in ("encoders", "heads"):
            for name, module in getattr(model, kind).items():
                module.load_state_dict(content[kind][name])
        optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["random"])
        return content["step"], content["retrieval"]
    return 0, None


def moment(device):
    """Now; of a GPU the moment when it will have done all that it was given so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(one, other):
    """From one moment to another, both past."""
    return other - one if isinstance(one, float) else one.elapsed_time(other) / 1000


def train(args):
    rank, world, device = join_processes(args)
    patches = open_patches(args, device)
    rows, held = data.split_scenes(patches, args.holdout)
    held = held[np.linspace(0, len(held) - 1, min(len(held), 1000)).astype(int)]
    epoch_steps = len(rows) // args.batch_size
    if not epoch_steps:
        raise data.DataError(f"--batch-size {args.batch_size}: {args.data} has {len(rows)} patches "
                             "to train on: choose a smaller batch")
    held_crops = data.centre_crops(held, patches.size, args.crop, 100)
    total = args.epochs * epoch_steps
    stats = patches.stats(rows)
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings["precision"] = models.resolve_precision(args.precision, device)
    settings["bands"] = patches.bands["s1"] + patches.bands["s2"]
    settings["data"] = patches.identity()
    settings["processes"] = world if device.type == "cpu" else None  # each with its own batch norm
    model, network, optimizer = make_model(args, patches.bands, device, world)
    cast = models.autocast(args.precision, device)
    args.out.mkdir(parents=True, exist_ok=True)
    start, retrieval = resume(args, settings, model, optimizer, rank)
    if (gather(torch.tensor([start]), world) != start).any():
        raise models.CheckpointError(f"{args.out}: not that of the other processes: share one")
    log = Log(args.out / "log.jsonl", start) if rank == 0 else None
    loss_of = partial(model.loss, temperature=args.temperature)

    def look_up(epoch, step):
        """Held-out retrieval, logged and printed."""
        if rank or not len(held):
            return retrieval
        result = held_out_retrieval(model, patches, held_crops, args, stats, device, cast)
        log.add(epoch=epoch, step=step, retrieval=result)
        line = "epoch {}, {} of {} held out: top-1 {top1:.1%}, top-5 {top5:.1%}, median {median:g}"
        for way in list(result)[1:]:
            tqdm.write(line.format(epoch, way, len(held), **result[way]))
        return result

    stopping, stop = [], False  # signals end the run after the step in hand
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: stopping.append(number))
    if start == 0:
        retrieval = look_up(0, 0)
    model.train()
    batches = batches_from(start, rows, patches.size, args, rank, world)
    feed = data.loader(patches, batches, args.crop, device, args.threads)
    bar = tqdm(total=total * args.batch_size, initial=start * args.batch_size, unit="pair",
               unit_scale=True, desc=args.method, disable=rank > 0)
    recent, waits, clock = [], [], time.perf_counter()
    for step in range(start + 1, total + 1):
        before = moment(device)
        s1, s2, _, batch_rows = next(feed)
        waits.append((before, moment(device)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, epoch_steps, args)
        inputs = network_inputs(s1, s2, args, stats, step, rank)
        micro = args.micro_batch or len(s1)
        loss, a, b = forward_backward(network, cast, loss_of, *inputs, micro, rank, world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append((step, batch_rows, loss))  # a loss that is still on the device

        epoch, ends_epoch = step // epoch_steps, step % epoch_steps == 0
        logs = ends_epoch or step % args.log_every == 0
        if world == 1 or step % AGREE == 0:
            # on the host, which need not wait for the device
            stop = gather(torch.tensor([len(stopping)]), world).any().item()
        if logs or stop:  # the only places where the host waits for the device
            losses = torch.stack([loss for *_, loss in recent])
            losses = gather(losses[None], world).mean(0).tolist()
            refuse_not_finite(recent, losses, model, patches, args)
        if logs and rank == 0:
            pairs = len(recent) * args.batch_size
            accuracy = models.retrieval(model.similarity(a, b))["top1"]
            log.add(epoch=step / epoch_steps, step=step, loss=losses[-1], accuracy=accuracy,
                    lr=group["lr"], pairs_per_s=pairs / (time.perf_counter() - clock),
                    waited_s=sum(seconds(*wait) for wait in waits))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", top1=f"{accuracy:.1%}", refresh=False)
            bar.update(pairs)
        if ends_epoch and (epoch % args.eval_every == 0 or step == total):
            retrieval = look_up(epoch, step)
        if rank == 0 and (ends_epoch or stop):
            models.save_checkpoint(
                args.out / "last.pt", model, method=args.method, arch=args.arch, scale=args.scale,
                bands=patches.bands, classes=patches.classes, simulated=patches.simulated,
                data={"path": args.data, "pairs": len(rows), "identity": settings["data"]},
                stats=stats, args=settings, epoch=epoch, step=step, retrieval=retrieval,
                optimizer=optimizer.state_dict(), random=torch.get_rng_state())
        if stop:
            break
        if logs:
            recent, waits, clock = [], [], time.perf_counter()
    bar.close()
    if rank == 0:
        title = "SIMULATED data, " * patches.simulated + args.method
        draw_curve(log.entries, args.out / "curve.png", title)
        print(f"stopped at step {step} of {total}; the same command goes on from there" if stop else
              f"{args.out}/last.pt: all {args.epochs} epochs are done, see curve.png beside it")
    if world > 1:
        dist.destroy_process_group()
    if stop:
        sys.exit(128 + (stopping or [signal.SIGTERM])[0])


def main():
    args = arguments()
    try:
        train(args)
    except torch.OutOfMemoryError:
        raise data.DataError("out of memory: choose a --micro-batch, and no --cache") from None


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
