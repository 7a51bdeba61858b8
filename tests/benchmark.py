"""Speed, as ratios measured in one run; nothing here is a test.

    python tests/benchmark.py data      # packing and crops
    python tests/benchmark.py train     # pretraining step and losses
    python tests/benchmark.py probe     # linear probes of all tables
"""
import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import simulate

import data
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


def table(title, header, rows):
    print(f"\n{title}\n")
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(str(v) for v in row) + " |")


def copies(tree, out, count):
    """A tree of `count` patches whose files are hard links to those of a small one, under other names."""
    places = data.find_patches(tree)[0]
    for k in range(count):
        for sensor in ("s1", "s2"):
            (out / sensor).mkdir(parents=True, exist_ok=True)
            os.link(getattr(places[k % len(places)], sensor), out / sensor / f"ROIs1158_spring_{sensor}_{k % 9}_p{k}.tif")
    return out


def peak_memory(tree, store):
    """Largest resident memory of a packing's main process and of its workers, in MB."""
    code = (f"import re, resource, data; data.pack({str(tree)!r}, {str(store)!r}, 2)\n"
            "own = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"  # rusage: that of our parent
            "print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [int(number) / 1024 for number in done.stdout.split()]


def sparse_store(folder, count=180_662, size=256):
    """A store of the size of SEN12MS whose files hold nothing."""
    folder.mkdir()
    shape = [len(data.S2_BANDS), size, size]
    for path, (header, length) in data.store_files(folder, count, shape, False).items():
        with open(path, "wb") as handle:
            handle.write(header)
            handle.truncate(length)
    index = {"format": data.STORE_FORMAT, "patches": count, "shape": shape, "bands": [*data.S1_BANDS, *data.S2_BANDS],
             "ids": [f"ROIs1158_spring_{k // 700}_p{k % 700}" for k in range(count)], "splits": ["spring"] * count,
             "labels": None, "sums": {}, "simulated": True, "left_out": {}}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def best_rates(functions, items, rounds=25):
    """{name: function of the round} -> {name: items per second of the best round}. Called in turn, the best of many:
    what other work on the machine disturbs least."""
    best = dict.fromkeys(functions, float("inf"))
    for k in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function(k)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: items / seconds for name, seconds in best.items()}


def loaded_per_second(crops, workers, steps=60):
    """Crops per second through the loader, once it runs."""
    batches = data.loader(crops, range(steps), workers)
    for _ in range(20):
        next(batches)
    start = time.perf_counter()
    return sum(len(batch[0]) for batch in batches) / (time.perf_counter() - start)


def run_bare(bare, count):
    """A function in so many processes at once, 40 times in each."""
    running = [multiprocessing.Process(target=lambda: [bare(step) for step in range(40)]) for _ in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join()


def first_batch(store):
    """Seconds from nothing to 200 random crops of 128 px."""
    start = time.perf_counter()
    patches = data.open_data(store)
    data.RandomCrops(patches, np.arange(len(patches)), 128, 200, seed=0)[0]
    return time.perf_counter() - start


def data_path():
    """The table of crops and packing, on simulated patches of 256 px."""
    with tempfile.TemporaryDirectory() as folder:
        folder, batch, side, rows = Path(folder), 200, 128, []
        simulate.simulate_sen12ms(folder / "few", scenes=1, patches=25, size=256)
        simulate.simulate_sen12ms(folder / "small", scenes=1, patches=25, size=32)
        tree = copies(folder / "few", folder / "tree", 250)
        places = data.find_patches(tree)[0]
        shape = data.tree_shape(places)
        whole = best_rates({"read": lambda k: all(data.scan(places, shape, 2)),
                            "pack": lambda k: data.pack(tree, folder / f"store {k}", 2)}, len(places), 3)
        store = folder / "store 0"
        patches, from_tree, ram = data.open_data(store), data.open_data(tree, workers=2), data.open_data(store, cache="ram")
        s1, s2, classes = (x.numpy() for x in data.empty(batch, 2, 13, side, side))
        classes[:] = data.IGNORE

        def bare(step):
            rng = np.random.default_rng(step)
            order = rng.permutation(len(patches))[:batch]
            tops, lefts = rng.integers(0, 256 - side + 1, (2, batch))
            for k, (row, top, left) in enumerate(zip(order, tops, lefts)):
                s1[k] = patches.arrays[0][row, :, top:top + side, left:left + side]
                s2[k] = patches.arrays[1][row, :, top:top + side, left:left + side]

        crops, held = (data.RandomCrops(p, np.arange(batch), side, batch, seed=0) for p in (patches, ram))
        slow = data.RandomCrops(from_tree, np.arange(20), side, 20, seed=0)
        speed = best_rates({"bare": bare, "store": crops.__getitem__, "ram": held.__getitem__}, batch)
        speed |= best_rates({"tree": slow.__getitem__}, 20, 5)
        both = best_rates({"one": lambda k: run_bare(bare, 1), "two": lambda k: run_bare(bare, 2)}, 1, 5)
        loaded = [[loaded_per_second(crops, workers) for workers in (0, 2)] for _ in range(3)]
        one, two = map(max, zip(*loaded))
        memory = [peak_memory(copies(folder / "small", folder / f"{count}", count), folder / f"of {count}")
                  for count in (200, 2000)]
        opening = first_batch(sparse_store(folder / "sparse"))
        rows = [
            ["crops from a store, one process", f"{speed['store']:,.0f}/s", f"from GeoTIFFs {speed['tree']:,.0f}/s",
             f"{speed['store'] / speed['tree']:.0f}", "40"],
            ["the same", f"{speed['store']:,.0f}/s", f"bare numpy loop {speed['bare']:,.0f}/s",
             f"{speed['store'] / speed['bare']:.2f}", "0.8"],
            ["two worker processes", f"{two:,.0f}/s", f"one process {one:,.0f}/s", f"{two / one:.2f}", "1.5"],
            ["for comparison: two bare loops at once", "", "one bare loop", f"{2 * both['two'] / both['one']:.2f}", ""],
            ["--cache ram", f"{speed['ram']:,.0f}/s", f"bare numpy loop {speed['bare']:,.0f}/s",
             f"{speed['ram'] / speed['bare']:.2f}", "1.0"],
            ["packing, 2 workers", f"{whole['pack']:,.0f} patches/s", f"reading and judging alone {whole['read']:,.0f} patches/s",
             f"{whole['pack'] / whole['read']:.2f}", "0.8"],
            *([f"memory of packing 2,000 patches, {name}", f"{many:,.0f} MB", f"200 patches {few:,.0f} MB",
               f"{many - few:+.0f} MB", "within 50 MB, a worker under 500 MB"] for name, few, many in zip(("main process", "largest worker"), *memory)),
            ["180,662 patches: open, first batch of 200", f"{opening:.2f} s", "", "", "under 1 s"],
        ]
    table("Data path, crops of 128 px from patches of 256 px", ("", "measured", "against", "ratio", "target"), rows)


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
    model = models.Contrastive("d-simclr", {"s1": models.S1_BANDS, "s2": models.S2_BANDS})
    model = model.to(device, memory_format=layout)
    network = torch.compile(model) if compiled else model
    optimizer = torch.optim.Adam(model.parameters(), 3e-5, weight_decay=1e-4, fused=True)
    parts = [[torch.rand(micro or batch, bands, 128, 128, device=device).to(memory_format=layout) for bands in (2, 13)]
             for _ in range(batch // (micro or batch))]
    cast = models.autocast(precision, device)

    def loss_of(a, b, **_):
        return model.loss(a, b, 0.07)

    def step():
        if micro:
            pretrain.forward_backward(network, lambda *part: part, cast, loss_of, parts, 0, 1)
        else:
            with cast:
                embeddings = network(*parts[0])
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
    """Pairs/s of pretrain.py over its last lines of log, and the share of the time that it waited for data."""
    with tempfile.TemporaryDirectory() as out:
        options = ["--data", store, "--out", out, "--batch-size", batch, "--holdout", 0, "--epochs", epochs,
                   "--log-every", 8, "--eval-every", 10**6, "--device", device.type, *more]
        sys.argv = ["pretrain.py", *map(str, options)]
        pretrain.main()
        lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()][2:]
    rates = sorted(line["pairs_per_s"] for line in lines)
    return rates[len(rates) // 2], sum(line["waited_s"] for line in lines) / sum(8 * batch / rate for rate in rates)


def training():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = (200, 2048) if device.type == "cuda" else (4,)
    native = models.autocast("auto", device)._enabled
    layouts = [("float32", torch.contiguous_format), ("float32", torch.channels_last)]
    layouts += [("bf16", torch.channels_last)] * native
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}{'' if native else ', no native bf16 here: left out'}")
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
                first = speed[batch, False, "float32", torch.contiguous_format]
                rows.append((batch, precision, str(layout)[6:], "yes" if compiled else "no", f"{rate:.3g}",
                             f"{rate / first:.2f}", f"{share:.0%}"))
    table(f"Step of D-SimCLR, ResNet18, 128 px, {flops.get_total_flops() / 2e9:.3g} GFLOP a pair",
          ("batch", "precision", "layout", "compiled", "pairs/s", "ratio", "of the matrix product"), rows)

    batch, rows = batches[0], []
    with tempfile.TemporaryDirectory() as folder:
        simulate.simulate_sen12ms(Path(folder, "few"), scenes=2, patches=16, size=256)
        data.pack(copies(Path(folder, "few"), Path(folder, "tree"), 8 * batch), Path(folder, "store"))  # 8 steps an epoch
        patches = data.open_data(Path(folder, "store"))
        for workers in sorted({0, max(1, os.cpu_count() - 1)}):
            crops = data.RandomCrops(patches, range(len(patches)), 128, batch, 0)
            feed = data.loader(crops, range(60), workers, device)
            next(feed)  # starts the workers
            start = time.perf_counter()
            rate = sum(len(ids) for *_, ids in feed) / (time.perf_counter() - start)
            rows.append((f"crops of 128 px, {workers} workers", f"{rate:.4g} pairs/s", ""))
        views = pretrain.TwoViews(data.open_data(Path(folder, "store"), models.RGB), range(32), 128, 8, 0)
        views.scale = "patch-max"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        alone = 16 / seconds(lambda: views[0], 7)
        torch.set_num_threads(threads)
        rows.append(("SimCLR's augmentations, one core", f"{alone:.3g} images/s", ""))
        step, _ = bare_step(device, batch, "auto", torch.channels_last)
        before = batch / seconds(step, 5)
        script, waited = script_speed(Path(folder, "store"), batch, 8, device)
        bare = (before + batch / seconds(step, 5)) / 2
        rows += [("pretrain.py, d-simclr", f"{script:.3g} pairs/s", f"{script / bare:.2f} of the bare step, target 0.95"),
                 ("the device waited for data", f"{waited:.1%} of the time", "target under 5 % on a GPU")]
        simclr, waited = script_speed(Path(folder, "store"), batch, 8, device, ["--method", "simclr-rgb"])
        rows.append(("pretrain.py, simclr-rgb", f"{simclr:.3g} pairs/s", f"waited {waited:.1%} of the time"))
    table(f"Data path and script, batch {batch}", ("", "measured", ""), rows)

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

    batch, whole = 4 * batches[0], None
    rows = []
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
        single = np.where(share[:, 0] < 0.5, first[row], second[row])
        return {"s1": x[:, :d // 2], "s2": x[:, d // 2:], "single": single, "multi": multi, "row": row}, first

    (train, labels), (test, _) = made_up(986), made_up(1000)
    args, rows, total = argparse.Namespace(device="cpu", probe="linear"), [], 0
    for fraction in (0.01, 0.1, 0.5, 1):
        for task in ("single", "multi"):
            start, cpu, averages = time.perf_counter(), time.process_time(), []
            for seed in range(5):
                chosen = linear_eval.training_rows(labels, fraction, seed)
                scores, _ = linear_eval.probe(train, test, ("s1", "s2"), task, chosen, labels, seed, args)
                averages.append(scores["average"])
            wall = time.perf_counter() - start
            total += wall
            cpu, average = time.process_time() - cpu, np.mean(averages)
            rows.append([f"{fraction:.0%}", task, f"{wall:.1f}", f"{cpu:.1f}", f"{average:.1%}"])
    encoders = models.make_encoders("d-simclr", {"s1": models.S1_BANDS, "s2": models.S2_BANDS}).eval()
    s1, s2 = torch.rand(8, 2, 128, 128), torch.rand(8, 13, 128, 128)
    with torch.no_grad():
        forward = seconds(lambda: models.encode(encoders, s1, s2)) / 8 * 986 * 200
    rows.append(["all", "both", f"{total:.1f}", "", ""])
    table("Linear probes, 986 x 4 training crops, 1024 features, five seeds each",
          ["labels", "task", "wall s", "CPU s", "average"], rows)
    print(f"\n200 epochs of frozen forward passes of 986 crops of 128 px, one seed (measured on 8 crops, scaled): "
          f"{forward:.0f} s, {forward / (total / 5):.0f} times the probes of one seed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("data", "train", "probe"))
    {"data": data_path, "train": training, "probe": probes}[parser.parse_args().part]()


if __name__ == "__main__":
    main()
