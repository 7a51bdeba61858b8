"""Speed, as ratios measured in one run; nothing here is a test.

    python tests/benchmark.py data      # packing and crops
    python tests/benchmark.py train     # pretraining step and losses
    python tests/benchmark.py probe     # linear probes of all tables
    python tests/benchmark.py map       # maps of scenes
"""
import argparse
import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import simulate

import data
import finetune
import linear_eval
import models
import pretrain


def seconds(function, repeat=5):
    """Median wall time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeat // 2]


def machine():
    """One line that says where the numbers come from."""
    name = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    native = models.autocast("auto", torch.device("cpu"))._enabled
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (f"{os.cpu_count()} cores {name[1] if name else ''}, {'native' if native else 'no native'} bf16, "
            f"{gpu}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")


def table(title, header, rows):
    print(f"\n{title}\n")
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(str(v) for v in row) + " |")


def copies(tree, out, count):
    """A tree of `count` patches whose files are hard links to those of a small one, other names."""
    pairs = data.find_pairs(tree)
    for k in range(count):
        for sensor in ("s1", "s2"):
            name = f"ROIs1158_spring_{sensor}_{k % 9}_p{k}.tif"
            (out / sensor).mkdir(parents=True, exist_ok=True)
            os.link(pairs[k % len(pairs)][sensor], out / sensor / name)
    return out


def peak_memory(tree, store):
    """Largest resident memory of a packing, in MB."""
    code = (f"import re, data; data.pack({str(tree)!r}, {str(store)!r}, 2)\n"
            "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def sparse_store(folder, count=180_662, size=256):
    """A store of the size of SEN12MS whose files hold nothing."""
    folder.mkdir()
    plan = {"format": data.STORE_FORMAT, "bands": {"s1": data.S1_BANDS, "s2": data.S2_BANDS},
            "size": [size, size], "classes": data.CLASSES, "codes": data.DFC_CODES, "labelled": False,
            "simulated": True, "s2_offset": None, "identity": "none", "splits": ["spring"] * count,
            "ids": [f"ROIs1158_spring_{k // 700}_p{k % 700}" for k in range(count)],
            "scenes": [f"ROIs1158_spring_{k // 700}" for k in range(count)]}
    for name, (dtype, shape) in data.layout(plan).items():
        array = np.lib.format.open_memmap(folder / name, "w+", dtype, shape)
    array["state"] = 1
    (folder / "index.json").write_text(json.dumps({**plan, "left_out": {}}))
    return folder


def best_rates(functions, items, rounds=25):
    """{name: function of the round} -> {name: items per second of the best round}. Called in turn, the
    best of many: what other work on the machine disturbs least."""
    best = dict.fromkeys(functions, float("inf"))
    for k in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function(k)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: items / seconds for name, seconds in best.items()}


def window_crops(pairs, batch, side):
    """Each crop read from its two GeoTIFFs, as without a store."""
    for row, top, left in zip(*batch):
        window = rasterio.windows.Window(left, top, side, side)
        for sensor in ("s1", "s2"):
            with rasterio.open(pairs[row][sensor]) as tif:
                tif.read(window=window)


def reuse_memory():
    """-> context in which every thread gets the same tensor again for the same shape, as torch does it with the
    pinned memory towards a GPU: a CPU is given new memory, and to get that from the system takes longer than to fill it."""
    own, empty = threading.local(), torch.empty

    def again(shape, dtype, pin_memory=False):
        kept = vars(own).setdefault("tensors", {})
        if (shape, dtype) not in kept:
            kept[shape, dtype] = empty(shape, dtype=dtype)
        return kept[shape, dtype]

    return mock.patch.object(torch, "empty", again)


def bare_loop(patches, batches, side, threads):
    """Nothing but the copies of slices."""
    def copy(batch):
        for array, dtype in zip(patches.arrays, (torch.int16, torch.uint16)):
            crops = torch.empty((len(batch[0]), array.shape[1], side, side), dtype=dtype).numpy()
            for crop, row, top, left in zip(crops, *batch):
                crop[:] = array[row, :, top:top + side, left:left + side]

    for _ in data.ahead(copy, batches, threads):
        pass


def all_crops(patches, batches, side, threads):
    for _ in data.loader(patches, batches, side, threads=threads):
        pass


def first_batch(store):
    """Seconds from nothing to 200 random crops of 128 px."""
    start = time.perf_counter()
    patches = data.Patches(store)
    batches = data.random_crops(patches.rows, patches.size, 128, 200, 0, 0)
    next(data.loader(patches, batches, 128))
    return time.perf_counter() - start


def script_beside_bare_step(store, batch, device):
    """Pairs/s of pretrain.py, reading beside its steps, and of the bare step, in turn three times."""
    step, _ = bare_step(device, batch, "auto", torch.channels_last)
    rates = [(script_speed(store, batch, 3, device), batch / seconds(step, 5)) for _ in range(3)]
    rates.sort(key=lambda pair: pair[0] / pair[1])
    return rates[1], [f"{a / b:.2f}" for a, b in rates]  # the middle one


def data_path():
    """The table of crops and packing, on simulated patches of 256 px."""
    print(machine())
    torch.set_num_threads(1)
    side, batch = 128, 200
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        simulate.simulate_sen12ms(folder / "few", scenes=1, patches=25, size=256)
        simulate.simulate_sen12ms(folder / "small", scenes=1, patches=25, size=32)
        tree = copies(folder / "few", folder / "tree", 250)
        pairs = data.find_pairs(tree)
        plan = data.make_plan(tree, pairs, None)
        whole = best_rates({
            "read": lambda k: all(data.ahead(lambda pair: data.read_patch(pair, plan), pairs, 2)),
            "pack": lambda k: data.pack(tree, folder / f"store {k}", 2)}, len(pairs), 3)
        patches = data.Patches(folder / "store 0")
        order = [data.random_crops(patches.rows, patches.size, side, batch, 0, k)[0] for k in range(25)]
        functions = {(threads, function): lambda k, threads=threads, function=function: function(patches, order, side, threads)
                     for threads in (1, 2) for function in (bare_loop, all_crops)}
        fresh = best_rates(functions, batch * len(order), 5)
        with reuse_memory():
            again = best_rates(functions, batch * len(order), 5)
        slow = data.random_crops(patches.rows[:20], patches.size, side, 20, 0, 0)[0]
        tree = best_rates({"tree": lambda k: window_crops(pairs, slow, side)}, 20, 5)["tree"]
        few, many = [peak_memory(copies(folder / "small", folder / f"{count}", count), folder / f"of {count}")
                     for count in (200, 2000)]
        opening = first_batch(sparse_store(folder / "sparse"))
        torch.set_num_threads(os.cpu_count())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        batch = 200 if device.type == "cuda" else 4
        data.pack(copies(folder / "few", folder / "short", 8 * batch), folder / "8 steps an epoch")
        (script, bare), rounds = script_beside_bare_step(folder / "8 steps an epoch", batch, device)

    def row(what, rate, against, reference, target, unit="/s"):
        return what, f"{rate:,.3g}{unit}", against, f"{reference:,.3g}{unit}", f"{rate / reference:.2f}", target

    table("Data path, crops of 128 px from patches of 256 px", ("", "", "against", "", "ratio", "target"), [
        row("loader, one thread, memory used again", again[1, all_crops], "from GeoTIFFs", tree, "40"),
        row("the same", again[1, all_crops], "bare loop of slice copies, the same", again[1, bare_loop], "0.8"),
        row("the same, two threads", again[2, all_crops], "two threads of bare loops", again[2, bare_loop], "0.85"),
        row("loader, one thread, new memory (CPU)", fresh[1, all_crops], "bare loop, the same", fresh[1, bare_loop], ""),
        row("the same, two threads", fresh[2, all_crops], "two threads of bare loops", fresh[2, bare_loop], ""),
        row("packing, two threads", whole["pack"], "reading and judging alone", whole["read"], "0.7"),
        row("memory of packing 2,000 patches", many, "200 patches", few, "within 50 MB", " MB"),
        ("180,662 patches: open, first batch of 200", f"{opening:.2f} s", "", "", "", "1 s"),
        row(f"pretrain.py, readers beside it ({', '.join(rounds)})", script, "bare step", bare, "0.95")])


def textbook_nt_xent(z1, z2, temperature):
    """NT-Xent as usually written: all similarities, boolean masks for the diagonal and the partners, then gathered."""
    n, z = len(z1), F.normalize(torch.cat((z1, z2)), dim=1)
    similarity = z @ z.T
    diagonal, partner = torch.eye(2 * n, dtype=torch.bool, device=z.device), torch.eye(n, dtype=torch.bool).to(z.device)
    partner = partner.repeat(2, 2) & ~diagonal
    positive = similarity[partner].view(2 * n, 1)
    negative = similarity[~(partner | diagonal)].view(2 * n, -1)
    logits = torch.cat((positive, negative), 1) / temperature
    return F.cross_entropy(logits, torch.zeros(2 * n, dtype=torch.long, device=z.device))


def peak_of(function, device):
    """Bytes that a call holds at most, beyond what was held before it. On the CPU from Linux's resident set, with every
    large block returned to the system at once: so only after all timings."""
    function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    function()
    return (int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) - before) * 1024


def bare_step(device, batch, precision, layout, compiled=False, micro=None):
    """-> function that makes one D-SimCLR step at 128 px on a batch in memory, and the model."""
    args = SimpleNamespace(method="d-simclr", arch="resnet18", seed=0, lr=3e-5, weight_decay=1e-4)
    bands = {"s1": models.S1_BANDS, "s2": models.S2_BANDS}
    model, network, optimizer = pretrain.make_model(args, bands, device, world=1)
    model.to(memory_format=layout)
    network = torch.compile(model) if compiled else network
    inputs = [torch.rand(batch, count, 128, 128, device=device).to(memory_format=layout) for count in (2, 13)]
    cast = models.autocast(precision, device)
    loss_of = functools.partial(model.loss, temperature=0.07)

    def step():
        if micro:
            pretrain.forward_backward(network, cast, loss_of, *inputs, micro, 0, 1)
        else:
            with cast:
                embeddings = network(*inputs)
            loss_of(*embeddings).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step, model


def ceilings(device):
    """Rates of the machine: {"float32", "bf16": FLOP/s of a large matrix product}, bytes/s of a copy."""
    n, rates = (8192 if device.type == "cuda" else 1536), {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "bf16" and not models.autocast("auto", device)._enabled:
            continue
        a = torch.rand(n, n, device=device, dtype=dtype)
        rates[name] = 2 * n**3 / seconds(lambda a=a: (a @ a)[0, 0].item())
    a = torch.rand(1 << 26, device=device)
    b = torch.empty_like(a)
    return rates, 2 * a.nbytes / seconds(lambda: b.copy_(a)[0].item())


def script_speed(store, batch, epochs, device, more=()):
    """Pairs/s of pretrain.py over its last lines of log."""
    with tempfile.TemporaryDirectory() as out:
        options = ["--data", store, "--out", out, "--batch-size", batch, "--holdout", 0, "--epochs", epochs,
                   "--log-every", 8, "--eval-every", 10**6, "--device", device.type, *more]
        sys.argv = ["pretrain.py", *map(str, options)]
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        pretrain.main()
        for number, handler in handlers.items():  # pretrain.py's only note a stop
            signal.signal(number, handler)
        lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()][2:]
    rates = sorted(line["pairs_per_s"] for line in lines)
    return rates[len(rates) // 2]


def training():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = (200, 2048) if device.type == "cuda" else (4,)
    native = models.autocast("auto", device)._enabled
    layouts = [("float32", torch.contiguous_format), ("float32", torch.channels_last)]
    layouts += [("bf16", torch.channels_last)] * native
    print(machine())
    rates, copy = ceilings(device)
    rows = [(f"matrix product, {precision}", f"{rate / 1e12:.3g} TFLOP/s") for precision, rate in rates.items()]
    table("Ceilings", ("", "measured"), [*rows, ("copy", f"{copy / 1e9:.3g} GB/s read and written")])

    rows, speed = [], {}
    for batch in batches:
        for compiled in (False, True):
            for precision, layout in layouts:
                try:
                    step, model = bare_step(device, batch, precision, layout, compiled)
                    speed[batch, compiled, precision, layout] = rate = batch / seconds(step, 3)
                except Exception as error:  # noqa: BLE001 - no compiler on this machine, or no memory
                    rows.append((batch, precision, "", compiled, f"cannot: {type(error).__name__}", "", ""))
                    continue
                with FlopCounterMode(display=False) as flops:
                    model.loss(*model(*(torch.rand(2, k, 128, 128, device=device) for k in (2, 13))), 0.07).backward()
                share = rate * flops.get_total_flops() / 2 / rates[precision]
                first = speed.get((batch, False, "float32", torch.contiguous_format))  # none where it does not fit
                rows.append((batch, precision, str(layout)[6:], "yes" if compiled else "no", f"{rate:.3g}",
                             f"{rate / first:.2f}" if first else "-", f"{share:.0%}"))
    table(f"Step of D-SimCLR, ResNet18, 128 px, {flops.get_total_flops() / 2e9:.3g} GFLOP a pair",
          ("batch", "precision", "layout", "compiled", "pairs/s", "ratio", "of the matrix product"), rows)

    batch = batches[0]
    images = torch.rand(2 * batch, 3, 128, 128, device=device)

    def views():
        pretrain.two_views(images, *pretrain.draw_views(2 * batch, 0, 1))
        return device.type == "cuda" and torch.cuda.synchronize()

    rows = [("SimCLR's augmentations", f"{4 * batch / seconds(views):.3g} views/s")]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        simulate.simulate_sen12ms(folder / "few", scenes=2, patches=16, size=256)
        data.pack(copies(folder / "few", folder / "tree", 8 * batch), folder / "store")
        for method in ("d-simclr", "simclr-rgb"):
            rate = script_speed(folder / "store", batch, 4, device, ["--method", method])
            rows.append((f"pretrain.py, {method}", f"{rate:.3g} pairs/s"))
    table(f"The script, batch {batch}", ("", "measured"), rows)

    losses = {"ours": models.nt_xent, "textbook": textbook_nt_xent}
    with contextlib.suppress(ImportError):
        from lightly.loss import NTXentLoss
        losses["lightly"] = lambda a, b, temperature: NTXentLoss(temperature)(a, b)
    rows, took = [], {}

    def backward(loss, n):
        a, b = torch.randn(2, n, 128, device=device).requires_grad_().unbind()
        loss(a, b, 0.07).backward()
        return device.type == "cuda" and torch.cuda.synchronize()

    sizes = 256, 1024, 4096
    for n in sizes:
        took |= {(name, n): seconds(lambda n=n, loss=loss: backward(loss, n), 3) for name, loss in losses.items()}
    held = {(name, n): peak_of(lambda n=n, loss=loss: backward(loss, n), device)
            for n in sizes for name, loss in losses.items()}
    for n in sizes:
        for name in losses:
            rows.append((n, name, f"{took[name, n] * 1e3:.4g} ms", f"{took['ours', n] / took[name, n]:.2f}",
                         f"{held[name, n] / 1e6:.4g} MB", f"{held['ours', n] / held[name, n]:.2f}"))
    table("NT-Xent of N pairs of 128, forward and backward; against lightly's at 4,096 the target is 0.75",
          ("pairs", "", "time", "ours / it", "peak memory", "ours / it"), rows)

    batch, rows, whole = 4 * batches[0], [], None
    for micro in (batch, batch // 2, batch // 4, batch // 8):
        step, _ = bare_step(device, batch, "auto", torch.channels_last, micro=micro)
        peak = peak_of(step, device)
        whole = whole or peak
        rows.append((micro, f"{peak / 1e6:.4g} MB", f"{peak / whole:.2f}"))
    table(f"--micro-batch, global batch {batch}: memory of a step beyond weights and optimiser",
          ("micro-batch", "peak", "ratio"), rows)


def probes():
    """All linear probes of five seeds, beside frozen forward passes as the released code makes them."""
    rng, d = np.random.default_rng(0), 1024
    centres, mix = rng.normal(0, 1, (8, 64)), rng.normal(0, 1 / 8, (64, d))

    def made_up(patches, crops=4):
        """Features of mixed patches: each crop has a share of a second class; a random layer with ReLU."""
        row = np.repeat(np.arange(patches), crops)
        first, second = rng.integers(0, 8, (2, patches))
        share = np.clip(rng.choice([0, 0.3], patches)[row] + rng.normal(0, 0.15, len(row)), 0, 1)[:, None]
        a, b = centres[first[row]], centres[second[row]]
        x = (1 - share) * a + share * b + rng.normal(0, 1, (patches, 64))[row] + rng.normal(0, 0.7, (len(row), 64))
        x = np.maximum(x @ mix + rng.normal(0, 0.3, (len(row), d)), 0).astype(np.float32)
        of_first, of_second = np.eye(8)[first[row]], np.eye(8)[second[row]]
        multi = np.maximum((share < 0.9) * of_first, (share > 0.1) * of_second).astype(np.float32)
        single = np.where(share < 0.5, of_first, of_second).astype(np.float32)
        return {"x": x, "single": single, "multi": multi, "row": row, "scene": row}, first

    print(machine())
    (train, labels), (test, _) = made_up(986), made_up(1000)
    rows, total = [], 0
    for fraction in (0.01, 0.1, 0.5, 1):
        for task in ("single", "multi"):
            start, cpu, averages = time.perf_counter(), time.process_time(), []
            for seed in range(5):
                chosen = linear_eval.training_rows(labels, fraction, seed)
                scores, _ = linear_eval.probe(task, train, test, chosen, labels, seed)
                averages.append(scores["average"])
            wall = time.perf_counter() - start
            total += wall
            cpu, average = time.process_time() - cpu, np.mean(averages)
            rows.append([f"{fraction:.0%}", task, f"{wall:.1f}", f"{cpu:.1f}", f"{average:.1%}"])
    encoders = models.make_encoders("d-simclr", {"s1": models.S1_BANDS, "s2": models.S2_BANDS}).eval()
    s1, s2 = torch.rand(8, 2, 128, 128), torch.rand(8, 13, 128, 128)
    with torch.no_grad():
        forward = seconds(lambda: models.joined_features(encoders, s1, s2)) / 8 * 986 * 200
    rows.append(["all", "both", f"{total:.1f}", "", ""])
    table("Linear probes, 986 x 4 training crops, 1024 features, five seeds each",
          ["labels", "task", "wall s", "CPU s", "average"], rows)
    print(f"\n200 epochs of frozen forward passes of 986 crops of 128 px, one seed (measured on 8 crops, scaled): "
          f"{forward:.0f} s, {forward / (total / 5):.0f} times the probes of one seed")


def write_scene(folder, height, width, rng=None):
    """S1.tif and S2.tif, of noise; without rng holes all over that take no place on the disk."""
    for name, count, kind in (("S1", 2, np.float32), ("S2", 13, np.uint16)):
        with rasterio.open(folder / f"{name}.tif", "w", driver="GTiff", count=count, height=height, width=width,
                           dtype=kind, crs="EPSG:32633", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
                           tiled=True, sparse_ok=True, bigtiff="yes") as tif:
            tif.descriptions = data.S1_BANDS if name == "S1" else data.S2_BANDS
            for top in range(0, height, 512) if rng else ():
                shape = count, min(512, height - top), width
                noise = rng.normal(-12, 4, shape) if name == "S1" else rng.integers(1, 4000, shape)
                if name == "S2":
                    noise[10] %= 100  # B10, without the offset of 2022
                tif.write(noise.astype(kind), window=rasterio.windows.Window(0, top, width, shape[1]))


def map_command(folder, *options):
    return ["finetune.py", "--map", folder / "map.tif", "--classifier", folder / "classifier.pt",
            "--s1", folder / "S1.tif", "--s2", folder / "S2.tif", *options]


def map_memory(folder, *options):
    """Largest resident memory of a process that makes a map, in MB, and its seconds."""
    code = ("import re, sys, finetune; finetune.main()\n"
            "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, map_command(folder, *options)[1:])], cwd=ROOT,
                          stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024, time.perf_counter() - start


def maps(side=2240, crop=128, tile=10_980):
    """Making a map beside the bare forward pass; memory of a whole tile."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bands = {"s1": data.S1_BANDS, "s2": data.S2_BANDS}
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = models.Classifier(models.make_encoders("late-fusion", bands)).eval().requires_grad_(False)
        models.save_checkpoint(folder / "classifier.pt", model, method="late-fusion", arch="resnet18", bands=bands,
                               scale="fixed", stats=None, classes=data.CLASSES, simulated=True, task="single",
                               crop=crop, args={})
        model = model.to(device, memory_format=torch.channels_last)
        inputs = [torch.rand(100, len(names), crop, crop, device=device).contiguous(memory_format=torch.channels_last)
                  for names in bands.values()]

        def bare():
            with models.autocast("auto", device):
                return model(*inputs).sum().item()

        sys.argv, walls = list(map(str, map_command(folder))), []
        for length in (4 * crop, side):  # what both take is the start
            write_scene(folder, length, length, np.random.default_rng(0))
            before, start = seconds(bare, 3), time.perf_counter()
            finetune.main()
            walls.append(time.perf_counter() - start)
        rate = 100 / (before + seconds(bare, 3)) * 2
        few, many, whole = (len(finetune.windows(length, crop, crop // 2)[0]) ** 2 for length in (4 * crop, side, tile))
        mapped = (many - few) / (walls[1] - walls[0])
        flops = FlopCounterMode(display=False)
        with flops:
            model(*inputs)
        work = flops.get_total_flops() / 100 * whole
        write_scene(folder, 10 * crop, 10 * crop)  # a whole batch of windows
        small, _ = map_memory(folder, "--step", crop)
        write_scene(folder, tile, tile)
        large, took = map_memory(folder, "--step", crop)
        table(f"Maps: late-fusion, ResNet18, windows of {crop} px every {crop // 2}, {side} x {side} px", ("", ""), [
            ("bare forward pass", f"{rate:.1f} windows/s"),
            ("map, beyond its start", f"{mapped:.1f} windows/s, {mapped * (crop // 2) ** 2:,.0f} px/s"),
            ("ratio (0.9)", f"{mapped / rate:.2f}"),
            ("start", f"{walls[0] - few / mapped:.1f} s"),
            (f"a tile of {tile:,} x {tile:,} px ({whole:,} windows), at this rate", f"{whole / mapped / 60:.1f} min"),
            ("computing by count on a GPU at 40 TFLOP/s", f"{work / 40e12:.1f} s ({work:.2g} FLOP)"),
            ("reading, in one thread that gave 5.5 to 7.8 Mpx/s on a null driver",
             f"{tile ** 2 / 7.8e6:.0f} to {tile ** 2 / 5.5e6:.0f} s"),
            (f"memory of a whole (empty) tile, --step {crop}, {took:.0f} s; beyond a scene of one batch (2,048 MB)",
             f"{large:.0f} MB, {large - small:+.0f} MB")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("data", "train", "probe", "map"))
    {"data": data_path, "train": training, "probe": probes, "map": maps}[parser.parse_args().part]()


if __name__ == "__main__":
    main()
