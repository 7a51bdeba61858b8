"""Contrastive pretraining of Sentinel-1 and Sentinel-2 encoders on unlabelled pairs.

    python pretrain.py --epochs 200                          # D-SimCLR on datasets/sen12ms
    python pretrain.py --method mma --data STORE --out runs/mma
    torchrun --nproc-per-node 8 pretrain.py --data STORE     # --batch-size stays the global one

In --out: log.jsonl, and last.pt, all that is needed to go on or to evaluate: saved at the end of an
epoch, at most once a minute. The same command started again goes on where it was, on the CPU to the
same bits; SIGTERM and Ctrl-C save first. Every --eval-every epochs the encoders look up held-out
places: which Sentinel-2 patch belongs to this Sentinel-1 patch, and the other way.
"""
import argparse
import contextlib
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
from torchvision.transforms.functional import rgb_to_grayscale
from tqdm import tqdm

import data
import models

FREE = {"out", "threads", "device", "log_every", "eval_every"}  # to change in a run
SAVE_EVERY = 60  # s, at least: a checkpoint has 277 MB, and all processes wait for it
AGREE_EVERY = 8  # steps, on a stop: it takes several processes a message
LOOKED_UP = 1000  # held-out places, at most
TORCHRUN_SETS = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
JITTER = ("brightness", "contrast", "saturation", "hue")


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", default="d-simclr", choices=("d-simclr", "mma", "simclr-rgb"))
    add("--data", default="datasets/sen12ms", help="store (default %(default)s)")
    add("--out", help="folder of the run (default runs/METHOD)")
    # The published settings: the released code's; those of MMA were not released.
    add("--arch", default="resnet18", choices=models.ARCHITECTURES, help="of all but mma")
    add("--epochs", type=data.positive, default=200)
    add("--batch-size", type=data.positive, default=200, help="over all processes (default 200)")
    add("--crop", type=data.positive, default=128, help="side in px (default 128)")
    add("--lr", type=float, default=3e-5)
    add("--weight-decay", type=float, default=1e-4)
    add("--constant-epochs", type=int, default=10, help="before the cosine to zero (default 10)")
    add("--temperature", type=float, help="default 0.07, 0.1 for mma")
    add("--scale", default="patch-max", choices=models.SCALING, help="default patch-max")
    # What the published study does not have.
    add("--bands", nargs="+", metavar="BAND", help="default all; B4 B3 B2 for simclr-rgb")
    add("--seed", type=int, default=0)
    add("--holdout", type=float, default=0.02, help="share of scenes, where no split is `test`")
    add("--eval-every", type=data.positive, default=10, help="epochs, of retrieval (default 10)")
    add("--micro-batch", type=data.positive, help="pairs a pass: less memory; slow on several GPUs")
    add("--precision", default="auto", choices=("auto", "bf16", "float32"), help="default auto")
    add("--threads", type=data.positive, help="that read (default: one per core, at most 8)")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0])
    add("--log-every", type=data.positive, default=10, help="steps, in log.jsonl (default 10)")
    args = parser.parse_args()
    args.out = Path(args.out or f"runs/{args.method}")
    if args.temperature is None:
        args.temperature = 0.1 if args.method == "mma" else 0.07
    least = min(args.lr, args.seed, args.holdout, args.weight_decay, args.constant_epochs)
    if least < 0 or args.holdout >= 1 or args.temperature <= 0 or args.crop < 8:
        parser.error("--temperature is above 0, --holdout below 1, --crop 8 or more; no number is "
                     "negative")
    return args


def join_processes(args):
    """-> (rank, world) of this process among those of torchrun, or of the only one."""
    rank, world = 0, int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        if not TORCHRUN_SETS <= os.environ.keys():
            raise data.DataError(f"WORLD_SIZE={world}: start it with torchrun, or unset WORLD_SIZE")
        rank = int(os.environ["RANK"])
    if args.device == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= count:
            raise data.DataError(f"--nproc-per-node: at most {count}, the GPUs of this machine")
        torch.cuda.set_device(local)
    refuse_unfit(args, world)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, store=meeting(rank), rank=rank, world_size=world)
    return rank, world


def meeting(rank):
    """Where the processes tell each other their addresses. torchrun's store outlives a restart and
    still holds the addresses of dead processes, so each restart gets a part of its own. Of several
    hosts' processes one that dies before it comes here leaves the others waiting: start anew."""
    store, _, _ = next(dist.rendezvous("env://"))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # it differs between hosts: count anew
        restart = str(store.add(f"rank {rank} began", 1))
    return dist.PrefixStore(restart, store)


def refuse_unfit(args, world):
    """DataError for options that would spoil a run, or slow it down, without a word."""
    size, micro = args.batch_size, args.micro_batch
    n = size // world
    if size == 1 or size % world or (n == 1 and args.device == "cpu"):
        raise data.DataError(f"--batch-size {size}: choose 2 or more, on CPUs for each process, as "
                             "a loss and batch norm need other places, and a multiple of the "
                             f"number of processes, {world}")
    if micro and 1 in (micro, n % micro):
        raise data.DataError(f"--micro-batch {micro}: leaves batch norm a single pair of {n}: "
                             f"choose a divisor of {n} above 1")
    if reason := models.spoilt_gradients(args.method, args.crop, args.precision, args.device):
        raise data.DataError(reason)


def gather(x, world):
    """(n, ...) of this process -> (world * n, ...) of all, in the order of the processes."""
    if world == 1:
        return x
    everyone = x.new_empty(world * len(x), *x.shape[1:])
    dist.all_gather(list(everyone.chunk(world)), x.contiguous())
    return everyone


def open_patches(args):
    """The store with the bands that the method takes."""
    bands = args.bands or models.METHODS[args.method].get("bands")
    patches = data.Patches(args.data, bands)
    s1, s2 = patches.bands.values()
    needs, fits = "bands of both sensors", s1 and s2
    if args.method == "simclr-rgb":
        needs, fits = "three of Sentinel-2", len(s2) == 3
    if not fits:
        raise data.DataError(f"--bands {s1 + s2}: {args.method} takes {needs}")
    return patches


def facts_of(args, patches, rows, world):
    """What a checkpoint says of the whole run; it goes on with the same `args` alone."""
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    own_batch_norm = args.device == "cpu" or args.micro_batch  # else that of the global batch
    settings |= {
        "precision": models.resolve_precision(args.precision, args.device),
        "bands": patches.bands["s1"] + patches.bands["s2"],
        "data": patches.identity,  # wherever it lies
        "processes": world if world > 1 and own_batch_norm else None}
    source = {"path": args.data, "pairs": len(rows), "identity": patches.identity}
    return {"method": args.method, "arch": args.arch, "scale": args.scale, "bands": patches.bands,
            "classes": patches.classes, "simulated": patches.simulated, "data": source,
            "stats": patches.stats(rows), "args": settings}


def batches_from(start, rows, size, args, mine=slice(None)):
    """(rows, tops, lefts) of what this process takes of every batch from step `start` on."""
    first, skip = divmod(start, len(rows) // args.batch_size)
    for epoch in range(first, args.epochs):
        batches = data.random_crops(rows, size, args.crop, args.batch_size, args.seed, epoch, True)
        for batch in batches[skip:]:
            yield [values[mine] for values in batch]
        skip = 0


def network_inputs(s1, s2, args, stats, step, mine=slice(None)):
    """Crops of a step, those that are `mine` of its batch -> the two inputs of models.Contrastive:
    sensors, or SimCLR's views."""
    if args.method != "simclr-rgb":
        return models.to_input(s1, s2, args.scale, stats)
    scale = "patch-max" if args.scale == "patch-max" else "fixed"  # colours in 0..1
    _, colours = models.to_input(s1, s2, scale)
    drawn, orders = draw_views(args.batch_size, args.seed, step)
    views = two_views(colours, drawn[:, mine], orders)
    if args.scale == "standard":
        views = [models.standardise(view * 10_000, stats["s2"]) for view in views]
    return views


def draw_views(count, seed, step):
    """What is random in two views of `count` images (Chen et al. 2020) -> (2, count, 12): columns 0
    to 5 the crop as F.affine_grid takes it, 6 to 9 a factor for each kind of jitter(), 10 that of
    saturation again for grey, 11 px for blur(); (2, 4): the order of the kinds, which all images of
    a view share."""
    rng = np.random.default_rng((seed, step, 1))  # (seed, epoch) draws the places of the crops
    shape = 2, count
    ratio = (4 / 3) ** rng.uniform(-1, 1, shape)
    area = rng.uniform(0.08, np.minimum(ratio, 1 / ratio))  # at most what fits into the image
    sides = np.sqrt((area * ratio, area / ratio))  # of the image's
    width, height = sides
    x, y = (1 - sides) * rng.uniform(-1, 1, sides.shape)
    mirrored = rng.choice((-1, 1), shape)
    jittered = rng.random(shape) < 0.8
    factors = 1 + jittered * rng.uniform(-0.8, 0.8, (3, *shape))
    hue = jittered * rng.uniform(-0.2, 0.2, shape)
    colour = rng.random(shape) >= 0.2
    blurred = rng.random(shape) < 0.5
    sigma = np.where(blurred, rng.uniform(0.1, 2, shape), 0.01)  # 0.01: sharp
    zero = np.zeros(shape)
    crop = mirrored * width, zero, x, zero, height, y
    drawn = np.stack((*crop, *factors, hue, colour, sigma), 2)
    return drawn, rng.permuted([range(4), range(4)], axis=1)


def two_views(images, drawn, orders):
    """(N, 3, h, w) colours in 0..1, and what draw_views() drew for them -> two of (N, 3, h, w)."""
    drawn = torch.from_numpy(drawn).float().to(images.device, non_blocking=True)
    return [augment(images, drawn[view], orders[view]) for view in range(2)]


def augment(images, drawn, order):
    """One view. drawn: (N, 12), order: (4,)."""
    affine = drawn[:, :6].unflatten(1, (2, 3))
    grid = F.affine_grid(affine, images.shape, align_corners=False)
    view = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    *factors, colour, sigma = drawn[:, 6:, None, None, None].unbind(1)
    for number in order:
        view = jitter(JITTER[number], view, factors[number])
    view = jitter("saturation", view, colour)
    return blur(view, sigma)


def jitter(kind, images, factor):
    """torchvision's adjust_brightness, adjust_contrast, adjust_saturation or adjust_hue of images
    (N, 3, h, w) in 0..1. factor: (N, 1, 1, 1), 1 leaves an image as it is, of a hue 0."""
    if kind == "hue":
        return turn_hue(images, factor)
    other = rgb_to_grayscale(images)  # (N, 1, h, w)
    if kind == "brightness":
        other = torch.zeros_like(other)
    if kind == "contrast":
        other = other.mean((1, 2, 3), keepdim=True)
    return torch.lerp(other, images, factor).clamp(0, 1)


def turn_hue(images, turn):
    """From RGB to hue, saturation, value and back, as in HSV. turn: (N, 1, 1, 1), of the circle."""
    value, brightest = images.max(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    others = images.roll(-1, 1) - images.roll(-2, 1)
    sixths = 2 * brightest + others.gather(1, brightest) / chroma.clamp(min=1e-9)
    offsets = torch.arange(5, 0, -2, device=images.device)[:, None, None]  # of red, green, blue
    sixths = (sixths + 6 * turn + offsets) % 6
    return value - chroma * torch.minimum(sixths, 4 - sixths).clamp(0, 1)


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
    """Gradients of one global batch, in the parameters of every process; -> its loss and all
    embeddings. a, b: network inputs of this process, `micro` of which pass at a time.

    Every process computes the loss of the embeddings of all; its gradient at its own then goes
    back through the network, micro-batch by micro-batch (Gao et al. 2021). That is exact but for
    batch norm, which sees each micro-batch by itself, and twice."""
    parts = list(zip(a.split(micro), b.split(micro)))
    twice = len(parts) > 1  # the first time without gradients, for the embeddings alone
    with cast, torch.set_grad_enabled(not twice):
        outputs = [torch.stack(network(*part), 1) for part in parts]  # (micro, 2, ...)

    # The loss of all embeddings, which are leaves here: their gradient, and no further.
    embeddings = gather(torch.cat(outputs).detach(), world).requires_grad_()  # (N, 2, ...)
    loss = loss_of(*embeddings.unbind(1))
    loss.backward()

    # Back through the network. The weights' gradient is the sum of what all processes add, while
    # DDP takes the mean: hence `world` times.
    mine = slice(rank * len(a), (rank + 1) * len(a))
    gradients = (world * embeddings.grad[mine]).split(micro)
    for part, output, gradient in zip(parts, outputs, gradients):
        if world > 1:  # share the sum over the micro-batches alone, as DDP's no_sync() does
            network.require_backward_grad_sync = part is parts[-1]
        if twice:
            with cast:
                output = torch.stack(network(*part), 1)
        output.backward(gradient)
    return loss.detach(), *embeddings.detach().unbind(1)


def learning_rate(step, epoch_steps, args):
    """Constant for some epochs, then a cosine to zero over the steps that remain."""
    total, constant = args.epochs * epoch_steps, args.constant_epochs * epoch_steps
    done = max(0, step - constant) / max(1, total - constant)
    return args.lr * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def held_out_retrieval(model, patches, crops, args, stats, cast):
    """Retrieval among the places of these crops -> dict for the log and the checkpoint."""
    forth, back = "s1_to_s2", "s2_to_s1"
    if args.method == "simclr-rgb":  # one sensor: which is the lower half to this upper one?
        forth, back = "upper_to_lower", "lower_to_upper"
    embeddings = []
    model.eval()
    for s1, s2, *_ in data.loader(patches, crops, args.crop, args.device, args.threads):
        inputs = models.to_input(s1, s2, args.scale, stats)
        if args.method == "simclr-rgb":
            # Not left and right: on CPUs with AMX bf16 convolutions of stride 2 of tall maps, 2 px
            # wide, are wrong (torch 2.14; alike: pytorch/pytorch#169688).
            inputs = inputs[1].split(args.crop // 2, dim=2)[:2]
        with cast:
            embeddings.append(model(*inputs))
    model.train()
    z1, z2 = (torch.cat(parts) for parts in zip(*embeddings))
    similarity = model.similarity(z1, z2)
    one, other = models.retrieval(similarity), models.retrieval(similarity.T)
    tqdm.write(f"held out, top-1 of {len(similarity)}: {forth} {one['top1']:.1%}, "
               f"{back} {other['top1']:.1%}")
    return {"candidates": len(similarity), forth: one, back: other}


def open_log(path, step):
    """-> log.jsonl to add to: a JSON line per logged step and per retrieval, up to `step`; locked
    until its process ends. DataError where another run has it."""
    path.touch()
    log = open(path, "r+", buffering=1, errors="replace")  # noqa: SIM115 (to the end of the run)
    data.lock(log, path.parent)
    kept = []
    for line in log:
        with contextlib.suppress(ValueError, LookupError, TypeError):  # spoilt, or not ours
            if json.loads(line)["step"] <= step:
                kept.append(line.strip() + "\n")
    log.seek(0)
    log.writelines(kept if step else [])  # mostly what is there already
    log.truncate()  # what follows is of a run that was killed
    return log


def make_model(args, bands, device, world):
    """-> (models.Contrastive, the same as training calls it, its optimiser)."""
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    model = models.Contrastive(args.method, bands, args.arch)
    model = model.to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":  # the statistics of the global batch
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = model
    if world > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)
        network.broadcast_buffers = False  # as an argument it is deprecated from torch 2.14 on
    optimizer = torch.optim.Adam(
        model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    return model, network, optimizer


def resume(path, settings, model, optimizer):
    """Load a checkpoint, where there is one, into model and optimiser -> (its step, its retrieval).
    CheckpointError where it cannot be read or was made with other settings."""
    if not path.exists():
        return 0, None
    content = models.load_checkpoint(path)
    old = content["args"]
    settings = {"recipe": old.get("recipe") and "poster", **settings}  # older versions had another
    changed = {key: old.get(key) for key in settings if old.get(key) != settings[key]}
    if changed:
        raise models.CheckpointError(
            f"{path}: made with other settings ({changed}): use them, or another --out")
    for kind in ("encoders", "heads"):
        for name, module in getattr(model, kind).items():
            module.load_state_dict(content[kind][name])
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["random"])
    return content["step"], content["retrieval"]


def refuse_other_folder(out, start, world):
    """CheckpointError in every process where one of them has a folder of its own."""
    gather(torch.tensor([start]), world)  # a barrier: the first process has made the log
    found = start if (out / "log.jsonl").exists() else -1
    if (gather(torch.tensor([found]), world) != start).any():
        raise models.CheckpointError(f"{out}: not that of the other processes: share one")


def refuse_infinite(loss, model, step):
    """CheckpointError where the loss or a weight is not finite."""
    norm = torch.nn.utils.get_total_norm(model.parameters())
    if not math.isfinite(loss + norm):  # once a weight is not, it stays so
        raise models.CheckpointError(f"loss {loss} at step {step}, norm of the weights {norm}: "
                                     "try a lower --lr or --precision float32")


def train(args):
    rank, world = join_processes(args)
    patches = open_patches(args)
    rows, held = data.split_scenes(patches, args.holdout)
    epoch_steps = len(rows) // args.batch_size
    if not epoch_steps:
        raise data.DataError(f"--batch-size {args.batch_size}: only {len(rows)} pairs to train on")
    total = args.epochs * epoch_steps
    n = args.batch_size // world
    mine = slice(rank * n, (rank + 1) * n)  # what this process takes of each batch
    held = [] if rank else held[::max(1, math.ceil(len(held) / LOOKED_UP))]  # by the first process
    held_crops = data.grid_crops(held, patches.size, args.crop, 100, middle=True)
    facts = facts_of(args, patches, rows, world)
    device = torch.device(args.device)
    model, network, optimizer = make_model(args, patches.bands, device, world)
    cast = models.autocast(args.precision, device)
    loss_of = partial(model.loss, temperature=args.temperature)

    args.out.mkdir(parents=True, exist_ok=True)
    last = args.out / "last.pt"
    start, retrieval = resume(last, facts["args"], model, optimizer)
    log = open_log(args.out / "log.jsonl", start) if rank == 0 else None
    refuse_other_folder(args.out, start, world)

    def look_up(step):
        found = held_out_retrieval(model, patches, held_crops, args, facts["stats"], cast)
        entry = {"epoch": step // epoch_steps, "step": step, "retrieval": found}
        print(json.dumps(entry), file=log)
        return found

    caught = [0]  # numbers of signals: 0 for none, the last one ends the run after a step
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: caught.append(number))
    if held_crops and not start:
        retrieval = look_up(step=0)
    batches = batches_from(start, rows, patches.size, args, mine)
    feed = data.loader(patches, batches, args.crop, args.device, args.threads)
    bar = tqdm(range(start + 1, total + 1), args.method, total, initial=start, disable=rank > 0)
    step = logged = start
    stop = 0
    clock = saved = time.perf_counter()  # of the last logged step, of the last checkpoint
    for step, (s1, s2, *_) in zip(bar, feed):
        rate = learning_rate(step - 1, epoch_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        a, b = network_inputs(s1, s2, args, facts["stats"], step, mine)
        micro = args.micro_batch or n
        loss, z1, z2 = forward_backward(network, cast, loss_of, a, b, micro, rank, world)
        optimizer.step()
        optimizer.zero_grad()

        epoch_ends = step % epoch_steps == 0
        logs = epoch_ends or step % args.log_every == 0
        if logs or world == 1 or step % AGREE_EVERY == 0:
            stop = gather(torch.tensor(caught[-1:]), world).max().item()
        if logs or stop:  # only here does the host wait for the device, but for SyncBatchNorm
            loss = loss.item()
            refuse_infinite(loss, model, step)
        if logs and rank == 0:
            accuracy = models.retrieval(model.similarity(z1, z2))["top1"]
            speed = (step - logged) * args.batch_size / (time.perf_counter() - clock)
            entry = {"epoch": step / epoch_steps, "step": step, "loss": loss, "lr": rate,
                     "accuracy": accuracy, "pairs_per_s": speed}
            print(json.dumps(entry), file=log)
            bar.set_postfix(loss=f"{loss:.3f}", top1=f"{accuracy:.1%}")
        evaluates = step % (args.eval_every * epoch_steps) == 0 or step == total
        if held_crops and evaluates:
            retrieval = look_up(step)
        # A signal costs nothing, a kill what came since the last end of an epoch that saved.
        due = epoch_ends and time.perf_counter() - saved >= SAVE_EVERY
        if rank == 0 and (due or stop or step == total):
            models.save_checkpoint(
                last, model, **facts, epoch=step // epoch_steps, step=step, retrieval=retrieval,
                optimizer=optimizer.state_dict(), random=torch.get_rng_state())
            saved = time.perf_counter()
        if stop:
            break
        if logs:
            logged, clock = step, time.perf_counter()

    bar.close()
    if rank == 0:
        print(f"{last}: {step} of {total} steps are done, see log.jsonl beside it")
    if world > 1:
        dist.destroy_process_group()
    if stop:
        sys.exit(128 + stop)


def main():
    try:
        train(arguments())
    except torch.OutOfMemoryError:
        raise data.DataError("out of memory: choose a --micro-batch") from None


if __name__ == "__main__":
    data.run(main, models.CheckpointError)
