"""Contrastive pretraining of Sentinel-1 and Sentinel-2 encoders on unlabelled pairs.

    python pretrain.py --epochs 200                          # D-SimCLR on datasets/sen12ms
    python pretrain.py --method mma --data STORE --out runs/mma
    torchrun --nproc-per-node 8 pretrain.py --data STORE     # --batch-size stays the global one

In --out: log.jsonl, previous.pt and last.pt, all that is needed to go on or to evaluate: saved at
the end of an epoch, at most once a minute. The same command started again goes on where it was, on
the CPU to the same bits; SIGTERM and Ctrl-C save first. Every --eval-every epochs the encoders look
up held-out places: which Sentinel-2 patch belongs to this Sentinel-1 patch, and the other way.
"""
import argparse
import contextlib
import fcntl
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
    add("--recipe", default="poster", choices=("poster", "ours"), help="ours: finds more places")
    add("--bands", nargs="+", metavar="BAND", help="default all; B4 B3 B2 for simclr-rgb")
    add("--seed", type=int, default=0)
    add("--holdout", type=float, default=0.02, help="share of scenes, where no split is `test`")
    add("--eval-every", type=data.positive, default=10, help="epochs, of retrieval (default 10)")
    add("--micro-batch", type=data.positive, help="pairs a pass: less memory; slow on several GPUs")
    add("--precision", default="auto", choices=("auto", "bf16", "float32"), help="default auto")
    add("--threads", type=data.positive, help="that read (default: one per core, at most 8)")
    devices = ("cpu", "cuda")[:1 + torch.cuda.is_available()]
    add("--device", choices=devices, default=devices[-1])
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
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise data.DataError(f"WORLD_SIZE={world}: start it with torchrun, or unset WORLD_SIZE")
    rank = int(os.environ["RANK"]) if world > 1 else 0
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    refuse_unfit(args, device, world)
    if world > 1:  # torchrun keeps its store over a restart, with the addresses of the dead
        store, *_ = next(dist.rendezvous("env://"))
        began = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":  # it differs between hosts: count anew
            began = str(store.add(f"rank {rank} began", 1))
        store = dist.PrefixStore(began, store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return rank, world, device


def refuse_unfit(args, device, world):
    """DataError for options that would spoil a run, or slow it down, without a word."""
    size, n, micro = args.batch_size, args.batch_size // world, args.micro_batch
    if size == 1 or size % world:
        raise data.DataError(f"--batch-size {size}: choose 2 or more, since a loss needs other "
                             f"places, and a multiple of the number of processes, {world}")
    if micro and 1 in (micro, n % micro):
        raise data.DataError(f"--micro-batch {micro}: leaves batch norm a single pair of {n}: "
                             f"choose a divisor of {n} above 1")
    if models.spoils_gradients(args.method, args.crop, args.precision, device):
        raise data.DataError(f"--crop {args.crop}: on a CPU bf16 gradients of a ResNet are wrong "
                             "up to 16 px: choose --precision float32, or more")


def gather(x, world):
    """(n, ...) of this process -> (world * n, ...) of all, in the order of the processes."""
    if world == 1:
        return x
    everyone = x.new_empty(world * len(x), *x.shape[1:])
    dist.all_gather(list(everyone.chunk(world)), x.contiguous())
    return everyone


def open_patches(args):
    """The store with the bands that the method takes."""
    rgb = args.method == "simclr-rgb"
    patches = data.Patches(args.data, args.bands or (models.RGB if rgb else None))
    s1, s2 = patches.bands.values()
    if not (len(s2) == 3 if rgb else s1 and s2):
        needs = "three of Sentinel-2" if rgb else "bands of both sensors"
        raise data.DataError(f"--bands {s1 + s2}: {args.method} takes {needs}")
    return patches


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
        _, colours = models.to_input(s1, s2, scale)
        numbers, orders = draw_views(args.batch_size, args.seed, step)  # of all processes
        views = two_views(colours, numbers[:, rank * len(s2):][:, :len(s2)], orders)
        if args.scale == "standard":
            views = [models.standardise(view * 10_000, stats["s2"]) for view in views]
        return views
    return models.to_input(s1, s2, args.scale, stats)


def draw_views(count, seed, step):
    """What is random in two views of `count` images (Chen et al. 2020) -> (2, count, 12): a crop as
    F.affine_grid takes it, a factor for jitter() of each kind, that of saturation again for grey,
    px for blur(); (2, 4): the order of the kinds, which all images of a view share."""
    rng = np.random.default_rng((seed, step, 1))  # (seed, epoch) draws the places of the crops
    shape = 2, count
    ratio = (4 / 3) ** rng.uniform(-1, 1, shape)
    area = rng.uniform(0.08, np.minimum(ratio, 1 / ratio))  # at most what fits into the image
    width, height = sides = np.sqrt((area * ratio, area / ratio))  # of the image's
    x, y = (1 - sides) * rng.uniform(-1, 1, sides.shape)
    mirrored, zero = rng.choice((-1, 1), shape), np.zeros(shape)
    jittered = rng.random(shape) < 0.8
    factors = 1 + jittered * rng.uniform(-0.8, 0.8, (3, *shape))
    hue = jittered * rng.uniform(-0.2, 0.2, shape)
    colour = rng.random(shape) >= 0.2
    sigma = np.where(rng.random(shape) < 0.5, rng.uniform(0.1, 2, shape), 0.01)  # 0.01: sharp
    numbers = mirrored * width, zero, x, zero, height, y, *factors, hue, colour, sigma
    return np.stack(numbers, 2), rng.permuted([range(4), range(4)], axis=1)


def two_views(images, numbers, orders):
    """(N, 3, h, w) colours in 0..1, and what draw_views() drew for them -> two of (N, 3, h, w)."""
    numbers, views = torch.from_numpy(numbers).float(), []
    numbers = numbers.pin_memory() if images.is_cuda else numbers
    for drawn, order in zip(numbers.to(images.device, non_blocking=True), orders):  # of one view
        grid = F.affine_grid(drawn[:, :6].unflatten(1, (2, 3)), images.shape, align_corners=False)
        view = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        *factors, colour, sigma = drawn[:, 6:, None, None, None].unbind(1)
        for number in order:
            view = jitter(JITTER[number], view, factors[number])
        view = jitter("saturation", view, colour)
        views.append(blur(view, sigma))
    return views


def jitter(kind, images, factor):
    """torchvision's adjust_brightness, adjust_contrast, adjust_saturation or adjust_hue of images
    (N, 3, h, w) in 0..1. factor: (N, 1, 1, 1), 1 leaves an image as it is, of a hue 0."""
    grey = rgb_to_grayscale(images)  # (N, 1, h, w)
    if kind == "hue":
        value, brightest = images.max(1, keepdim=True)
        chroma = value - images.amin(1, keepdim=True)
        others = images.roll(-1, 1) - images.roll(-2, 1)
        sixths = 2 * brightest + others.gather(1, brightest) / chroma.clamp(min=1e-9)
        offsets = torch.arange(5, 0, -2, device=images.device)[:, None, None]
        sixths = (sixths + 6 * factor + offsets) % 6  # of a turn on the wheel of colours
        return value - chroma * torch.minimum(sixths, 4 - sixths).clamp(0, 1)
    other = {"brightness": grey * 0, "contrast": grey.mean((1, 2, 3), keepdim=True)}
    return torch.lerp(other.get(kind, grey), images, factor).clamp(0, 1)


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
    batch norm, which sees each micro-batch by itself, and twice."""
    batches = list(zip(a.split(micro), b.split(micro)))
    with cast, torch.set_grad_enabled(len(batches) == 1):
        outputs = [torch.stack(network(*batch), 1) for batch in batches]  # (micro, 2, ...)
    everyone = gather(torch.cat(outputs).detach(), world).requires_grad_()  # (N, 2, ...)
    loss = loss_of(*everyone.unbind(1), first=rank * len(a), n=len(a))
    loss.backward()
    if world > 1:
        dist.all_reduce(everyone.grad)  # what the other processes' rows want of our embeddings
    for k, gradient in enumerate(everyone.grad[rank * len(a):][:len(a)].split(micro)):
        if world > 1:  # share the sum over the micro-batches alone, as DDP's no_sync() does
            network.require_backward_grad_sync = k == len(batches) - 1
        if len(batches) > 1:
            with cast:
                outputs[k] = torch.stack(network(*batches[k]), 1)
        outputs[k].backward(gradient)
    return loss.detach(), *everyone.detach().unbind(1)


def learning_rate(step, epoch_steps, args):
    """Constant for some epochs, then a cosine to zero over the steps that remain."""
    total, constant = args.epochs * epoch_steps, args.constant_epochs * epoch_steps
    done = max(0, step - constant) / max(1, total - constant)
    return args.lr * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def held_out_retrieval(model, patches, crops, args, stats, device, cast):
    """Retrieval among the places of these crops -> dict for the log and the checkpoint."""
    forth, back, embeddings = "s1_to_s2", "s2_to_s1", []
    model.eval()
    for s1, s2, *_ in data.loader(patches, crops, args.crop, device, args.threads):
        inputs = models.to_input(s1, s2, args.scale, stats)
        if args.method == "simclr-rgb":  # one sensor: which is the right half to this left one?
            forth, back = "left_to_right", "right_to_left"
            inputs = inputs[1].split(args.crop // 2, dim=3)[:2]
        with cast:
            embeddings.append(model(*inputs))
    model.train()
    similarity = model.similarity(*map(torch.cat, zip(*embeddings)))
    one, other = models.retrieval(similarity), models.retrieval(similarity.T)
    tqdm.write(f"held out, top-1: {forth} {one['top1']:.1%}, {back} {other['top1']:.1%}")
    return {"candidates": len(similarity), forth: one, back: other}


def open_log(path, step):
    """-> log.jsonl to add to: a JSON line per logged step and per retrieval, up to `step`; locked
    until its process ends. DataError where another run has it."""
    path.touch()
    log = open(path, "r+", buffering=1, errors="replace")  # noqa: SIM115 (to the end of the run)
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise data.DataError(f"{path.parent}: another run writes there: wait for it, or choose "
                             "another --out") from None
    kept = []
    for line in log:
        with contextlib.suppress(ValueError):  # what a kill or a power cut spoilt
            if step and json.loads(line)["step"] <= step:
                kept.append(line.strip() + "\n")
    log.seek(0)
    log.writelines(kept)  # mostly what is there already
    log.truncate()  # what follows is of a run that was killed
    return log


def make_model(args, bands, device, world):
    """-> (models.Contrastive, the same as training calls it, its optimiser)."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True  # TF32 in no loss
    torch.manual_seed(args.seed)
    model = models.Contrastive(args.method, bands, args.arch)
    model = model.to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":  # the statistics of the global batch
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    network = model
    if world > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)
        network.broadcast_buffers = False  # as an argument it is deprecated from torch 2.14 on
    groups, betas = [{"params": model.parameters()}], (0.9, 0.999)
    if args.recipe == "ours":  # a rate for each tensor, by its first weights, and no momentum
        groups, betas = [], (0.0, 0.99)
        for weights in model.parameters():
            rms = max(1e-3, weights.detach().square().mean().sqrt().item())
            groups.append({"params": [weights], "factor": rms / 0.03})  # 1 for 3x3, 250 channels
    optimizer = torch.optim.Adam(
        groups, args.lr, betas, weight_decay=args.weight_decay, fused=True)
    return model, network, optimizer


def resume(args, settings, model, optimizer):
    """Load the newest checkpoint of --out into model and optimiser -> (its step, its retrieval).
    CheckpointError where it cannot be read or was made with other settings."""
    both = args.out / "last.pt", args.out / "previous.pt"  # a kill may leave only the second
    path = next(filter(Path.exists, both), None)
    if not path:
        return 0, None
    content = models.load_checkpoint(path)
    old = content["args"]
    if there := {key: old.get(key) for key in settings if old.get(key) != settings[key]}:
        raise models.CheckpointError(
            f"{path}: made with other settings ({there}): use them, or another --out")
    for kind in ("encoders", "heads"):
        for name, module in getattr(model, kind).items():
            module.load_state_dict(content[kind][name])
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["random"])
    return content["step"], content["retrieval"]


def train(args):
    rank, world, device = join_processes(args)
    patches = open_patches(args)
    rows, held = data.split_scenes(patches, args.holdout)
    epoch_steps = len(rows) // args.batch_size
    if not epoch_steps:
        raise data.DataError(f"--batch-size {args.batch_size}: only {len(rows)} pairs to train on")
    held = [] if rank else held[::len(held) // 1000 + 1]  # by the first process, up to 1,000
    held_crops = data.grid_crops(held, patches.size, args.crop, 100, middle=True)
    total, stats = args.epochs * epoch_steps, patches.stats(rows)
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings |= {"precision": models.resolve_precision(args.precision, device),
                 "bands": patches.bands["s1"] + patches.bands["s2"], "data": patches.identity,
                 "processes": world if device.type == "cpu" else None}  # each its own batch norm
    model, network, optimizer = make_model(args, patches.bands, device, world)
    cast = models.autocast(args.precision, device)
    loss_of = partial(model.loss, temperature=args.temperature)
    args.out.mkdir(parents=True, exist_ok=True)
    start, retrieval = resume(args, settings, model, optimizer)
    log = open_log(args.out / "log.jsonl", start) if rank == 0 else None
    gather(torch.tensor([start]), world)  # now the log of the first process is there for all
    shared = (args.out / "log.jsonl").exists()
    if (gather(torch.tensor([start if shared else -1]), world) != start).any():
        raise models.CheckpointError(f"{args.out}: not that of the other processes: share one")

    def look_up(step):
        found = held_out_retrieval(model, patches, held_crops, args, stats, device, cast)
        entry = {"epoch": step // epoch_steps, "step": step, "retrieval": found}
        print(json.dumps(entry), file=log)
        return found

    signals = [0]  # they end the run after the step in hand
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))
    if held_crops and not start:
        retrieval = look_up(step=0)
    batches = batches_from(start, rows, patches.size, args, rank, world)
    feed = data.loader(patches, batches, args.crop, device, args.threads)
    bar = tqdm(range(start + 1, total + 1), args.method, total, initial=start, disable=rank > 0)
    step, stop, timed = start, 0, start
    clock = saved = time.perf_counter()
    for step, (s1, s2, *_) in zip(bar, feed):
        rate = learning_rate(step - 1, epoch_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1)
        inputs = network_inputs(s1, s2, args, stats, step, rank)
        micro = args.micro_batch or len(s1)
        loss, a, b = forward_backward(network, cast, loss_of, *inputs, micro, rank, world)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        epoch, within = divmod(step, epoch_steps)  # the epochs that are done, and 0 at their end
        logs = not within or step % args.log_every == 0
        if world == 1 or logs or step % 8 == 0:  # a message between the hosts
            stop = gather(torch.tensor(signals[-1:]), world).max().item()
        if logs or stop:  # the only places where the host waits for the device
            loss = gather(loss[None], world).mean().item()
            norm = torch.nn.utils.get_total_norm(model.parameters())
            if not math.isfinite(loss + norm):  # once a weight is not, it stays so
                raise models.CheckpointError(f"loss {loss} at step {step}, norm of the weights "
                                             f"{norm}: try a lower --lr or --precision float32")
        if logs and rank == 0:
            accuracy = models.retrieval(model.similarity(a, b))["top1"]
            pairs_per_s = (step - timed) * args.batch_size / (time.perf_counter() - clock)
            entry = {"epoch": step / epoch_steps, "step": step, "loss": loss, "lr": rate,
                     "accuracy": accuracy, "pairs_per_s": pairs_per_s}
            print(json.dumps(entry), file=log)
            bar.set_postfix(loss=f"{loss:.3f}", top1=f"{accuracy:.1%}")
        if held_crops and not within and (epoch % args.eval_every == 0 or step == total):
            retrieval = look_up(step)
        due = not within and time.perf_counter() - saved >= SAVE_EVERY
        if rank == 0 and (due or stop or step == total):
            saved = time.perf_counter()
            models.save_checkpoint(
                args.out / "last.pt", model, method=args.method, arch=args.arch, scale=args.scale,
                bands=patches.bands, classes=patches.classes, simulated=patches.simulated,
                data={"path": args.data, "pairs": len(rows), "identity": settings["data"]},
                stats=stats, args=settings, epoch=epoch, step=step, retrieval=retrieval,
                optimizer=optimizer.state_dict(), random=torch.get_rng_state())
        if stop:
            break
        if logs:
            timed, clock = step, time.perf_counter()
    bar.close()
    if rank == 0:
        print(f"{args.out}/last.pt: {step} of {total} steps are done, see log.jsonl beside it")
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
