"""The seven rows, trained for a step or two on simulated data, and the report."""
import json
import os
import signal
import time
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONTEXT, as_main, call, user, watch
from matplotlib.figure import Figure
from test_linear_eval import save_untrained

import data
import finetune
import linear_eval
import models
from data import CLASSES

QUICK = ("--epochs", 1, "--batch-size", 16, "--crop", 32, "--seeds", 1, "--label-fraction", 0.5)


def tune(monkeypatch, store, results, *options):
    call(monkeypatch, finetune, "--data", store, "--results", results, *QUICK, *options)
    return linear_eval.Results(results).read()


# ----------------------------------------------------------------------------------------- training

@pytest.mark.parametrize("method", models.METHODS)
def test_each_row_from_scratch(tmp_path, labelled, monkeypatch, method):
    line, = tune(monkeypatch, labelled, tmp_path, "--method", method, "--task", "multi")
    assert line["method"] == method and line["protocol"] == "scratch" and line["simulated"]
    assert line["counts"]["train_patches"] < 32 and 0 <= line["overall"] <= 1
    assert "confusion" not in line and line["classes"] == list(CLASSES)
    bands = models.RGB if method == "simclr-rgb" else list(data.S2_BANDS)
    assert line["args"]["bands"]["s2"] == bands


@pytest.mark.parametrize("method", [m for m, row in models.METHODS.items() if row["pretrained"]])
def test_each_pretrained_row_is_fine_tuned(tmp_path, labelled, monkeypatch, method):
    """From the weights of the checkpoint on, and every layer of them."""
    patches = data.Patches(labelled, models.METHODS[method].get("bands"))
    path = save_untrained(tmp_path / "last.pt", patches, method, scale="fixed", stats=None)
    begins, train = [], finetune.train
    monkeypatch.setattr(finetune, "train", lambda model, *more: begins.append((model, deepcopy(model.state_dict()))) or train(model, *more))
    line, = tune(monkeypatch, labelled, tmp_path / "a", "--checkpoint", path)
    assert line["method"] == method and line["protocol"] == "finetune"
    assert line["args"]["scale"] == "fixed"
    assert np.sum(line["confusion"]) == line["counts"]["test_crops"]
    (model, first), = begins
    for sensor, weights in models.load_checkpoint(path)["encoders"].items():
        assert all(torch.equal(first[f"encoders.{sensor}.{name}"], weight) for name, weight in weights.items())
    assert {name for name, weight in model.state_dict().items() if torch.equal(weight, first[name])} == set()


def test_run_twice_gives_equal_bits_and_is_not_repeated(tmp_path, labelled, monkeypatch):
    options = ("--method", "only-s1", "--seeds", 2)
    calls = watch(monkeypatch, linear_eval, "extract")
    first = tune(monkeypatch, labelled, tmp_path / "a", *options, "--threads", 1)
    second = tune(monkeypatch, labelled, tmp_path / "b", *options, "--threads", 3)
    logits = [crops["x"] for _, crops in calls]
    assert len(first) == 2 and len(logits) == 4
    assert all(np.array_equal(a, b) for a, b in zip(logits[:2], logits[2:]))
    assert [line["class"] for line in first] == [line["class"] for line in second]
    assert not np.array_equal(logits[0], logits[1])  # another seed
    monkeypatch.setattr(finetune, "train", None)
    assert tune(monkeypatch, labelled, tmp_path / "a", *options) == first


def test_killed_and_started_again_nothing_is_lost_or_counted_twice(tmp_path, labelled):
    def command(name):
        return ("--method", "only-s1", "--data", labelled, *QUICK, "--seeds", 3, "--results",
                tmp_path / name)

    def lines(name):
        return linear_eval.Results(tmp_path / name).read()

    assert user("finetune.py", *command("whole")).returncode == 0
    process = CONTEXT.Process(target=as_main, args=("finetune.py", command("killed"), tmp_path))
    process.start()
    while not lines("killed"):
        time.sleep(0.01)
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert 1 <= len(lines("killed")) < 3
    assert user("finetune.py", *command("killed")).returncode == 0
    assert lines("killed") == lines("whole") and len(lines("whole")) == 3


def test_a_checkpoint_of_something_else_is_one_line(tmp_path, labelled):
    path = save_untrained(tmp_path / "last.pt", data.Patches(labelled))
    result = user("finetune.py", "--checkpoint", path, "--data", labelled, "--method", "mma")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "holds" in result.stderr and "leave --method" in result.stderr


@pytest.mark.parametrize("count", [2, 8, 254])
def test_crops_without_a_label_teach_nothing(count):
    logits = torch.randn(4, count, requires_grad=True)
    classes = torch.full((4, 10, 10), data.IGNORE, dtype=torch.uint8)
    for task in ("single", "multi"):
        loss = finetune.task_loss(task, logits, classes)
        loss.backward()
        assert loss == 0 and not logits.grad.any()
    classes[0] = count - 1
    label = F.one_hot(torch.tensor([count - 1]), count).float()
    for task, loss_of in (("single", F.cross_entropy), ("multi", F.binary_cross_entropy_with_logits)):
        expected = loss_of(logits[:1], label).item()
        assert finetune.task_loss(task, logits, classes).item() == pytest.approx(expected)


def fit_some(labelled, rows, rate=1e-5, epochs=1, seed=0):
    args = linear_eval.evaluation_parser("").parse_args([])
    vars(args).update(method="only-s2", crop=32, batch_size=2, lr=rate, classifier_lr=rate,
                      epochs=epochs, weight_decay=0.0, drop_epoch=1, precision="float32",
                      results=labelled.parent)
    patches = data.Patches(labelled)
    model = models.Classifier(linear_eval.make_encoders(args, {}, patches, seed=0))
    finetune.train(model, {"scale": "fixed"}, patches, np.array(rows), "single", seed, args,
                   "a run")
    return model


@pytest.mark.parametrize("task", ["single", "multi"])
def test_training_is_what_its_steps_are_written_out(labelled, task):
    """Adam on the task's own loss, the encoders at --lr, the classifier at --classifier-lr, both with --weight-decay."""
    patches, rows = data.Patches(labelled), np.arange(12)
    args = linear_eval.evaluation_parser("").parse_args([])
    vars(args).update(crop=32, batch_size=12, lr=1e-3, classifier_lr=1e-2, weight_decay=0.1, epochs=2, drop_epoch=1,
                      precision="float32", results=labelled.parent)
    torch.manual_seed(0)
    model = models.Classifier(models.make_encoders("only-s2", patches.bands)).eval()
    first, other = deepcopy(model), deepcopy(model).to(memory_format=torch.channels_last).train()
    finetune.train(model, {"scale": "fixed"}, patches, rows, task, 5, args, "a run")
    optimizer = torch.optim.Adam([{"params": other.encoders.parameters(), "lr": 1e-3}, {"params": other.fc.parameters(), "lr": 1e-2}],
                                 weight_decay=0.1, fused=True)
    for epoch in range(2):
        for batch in data.random_crops(rows, patches.size, 32, 12, 5, epoch):
            (s1, s2, classes, _), = data.loader(patches, [batch], 32, classes=True)
            logits, label = other(*models.to_input(s1, s2, "fixed")), models.single_label(classes)
            if task == "single":
                loss = F.cross_entropy(logits[label != data.IGNORE], label[label != data.IGNORE])
            else:
                label = models.multi_label(classes)
                loss = F.binary_cross_entropy_with_logits(logits, label, reduction="none").mean(1)[label.any(1)].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] /= 10
    for part in ("encoders", "fc"):  # the way from the first weights, alike but for rounding, which Adam blows up
        found, expected, start = (torch.cat([weight.flatten() for weight in getattr(net, part).parameters()])
                                  for net in (model, other, first))
        assert (found - expected).norm() < 0.02 * (expected - start).norm()
    for found, expected in zip(model.buffers(), other.buffers()):
        assert (found - expected).double().norm() <= 0.05 * expected.double().norm()


def test_each_task_is_trained_with_its_own_loss_and_tested_with_its_own_labels(tmp_path, labelled, monkeypatch):
    losses, scores = watch(monkeypatch, finetune, "task_loss"), watch(monkeypatch, linear_eval, "score")
    tune(monkeypatch, labelled, tmp_path, "--method", "only-s1", "--task", "single", "multi")
    tasks = [task for (task, *_), _ in losses]
    assert tasks == ["single"] * (len(tasks) // 2) + ["multi"] * (len(tasks) // 2)
    (single, true, _), (multi, several, _) = [arguments for arguments, _ in scores]
    assert (single, multi) == ("single", "multi") and (true.sum(1) == 1).all() and several.sum(1).max() > 1


def test_what_nobody_chose_is_as_published(monkeypatch):
    chosen = []
    monkeypatch.setattr(finetune, "evaluate", lambda args, content: chosen.append(vars(args)))
    call(monkeypatch, finetune)
    published = {"epochs": 200, "batch_size": 100, "lr": 1e-5, "classifier_lr": 3e-6, "weight_decay": 1e-3, "drop_epoch": 100,
                 "seeds": 5, "crop": 128, "scale": "patch-max", "arch": "resnet18", "label_fraction": [1], "equal_crops": False,
                 "task": ["single"], "bands": None}
    assert {name: chosen[0][name] for name in published} == published


def test_each_seed_and_epoch_has_its_own_crops(labelled, monkeypatch):
    calls = watch(monkeypatch, data, "random_crops")
    for seed in range(2):
        fit_some(labelled, [0, 1, 2, 3], epochs=2, seed=seed)
    assert len({str(plan) for _, plan in calls}) == 4


def test_both_rates_drop_to_a_tenth_at_the_drop_epoch(labelled, monkeypatch):
    rates = []

    class Watched(torch.optim.Adam):
        def step(self, *args):
            rates.append([group["lr"] for group in self.param_groups])
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    fit_some(labelled, [0, 1, 2, 3], 1e-3, epochs=3)  # two steps each, the drop after the first
    assert np.allclose(rates, [[1e-3, 1e-3]] * 2 + [[1e-4, 1e-4]] * 4)


def test_same_crops_with_few_labels(labelled, tmp_path, monkeypatch):
    drops = watch(monkeypatch, torch.optim.lr_scheduler, "MultiStepLR")
    crops = watch(monkeypatch, data, "random_crops")
    for options in ((), ("--same-crops",)):
        call(monkeypatch, finetune, "--method", "only-s1", "--data", labelled, "--epochs", 3, "--drop-epoch", 2, "--crop", 32,
             "--label-fraction", 0.01, 0.25, 1, "--seeds", 1, "--results", tmp_path, "--precision", "float32", *options)
    runs = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    starts = [k for k, run in enumerate(runs) if run["epoch"] == 1]
    epochs = [runs[k - 1]["epoch"] for k in [*starts[1:], 0]]
    seen = [len(rows) for (rows, *_), _ in crops]  # of each epoch; test crops are a grid
    sums = [sum(seen[start:start + count]) for start, count in zip(starts, epochs)]
    assert epochs[:3] == [3, 3, 3] and sums[0] < sums[1] < sums[2]
    assert epochs[3] > epochs[4] > epochs[5] == 3 and np.allclose(sums[3:], sums[2], rtol=0.2)
    assert [drop for (_, (drop,), _), _ in drops[:3]] == [2] * 3
    assert np.allclose([drop for (_, (drop,), _), _ in drops], np.multiply(epochs, 2 / 3), atol=1)
    assert len(linear_eval.Results(tmp_path).read()) == 6
    assert all("equal_crops" not in line["args"] for line in linear_eval.Results(tmp_path).read()[:3])


def test_a_loss_that_is_not_finite_is_named(labelled):
    with pytest.raises(data.DataError, match="a run: the loss is nan after epoch 1: try"):
        fit_some(labelled, [0, 1, 2, 3], 1e30)


# ------------------------------------------------------------------------------------------- report

def result_line(average, overall=0.5, **change):
    classes = change.get("classes", CLASSES)
    line = {"method": "d-simclr", "protocol": "finetune", "task": "single", "label_fraction": 1.0,
            "seed": 0, "data": "d", "checkpoint": "c", "classes": list(classes), "simulated": False,
            "class": [average] * (len(classes) - 1) + [None], "average": average,
            "overall": overall, "counts": {"train_patches": 100 * change.get("label_fraction", 1)}, **change}
    line["args"] = {"lr": 1e-5, "bands": {"s1": ["VV"], "s2": ["B2"]}, **change.get("args", {})}
    return line


def report_of(monkeypatch, folder, lines):
    (folder / "results.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"cut o')
    call(monkeypatch, finetune, "--report", folder)
    return (folder / "tables.md").read_text()


SCRATCH = {"protocol": "scratch", "checkpoint": None}
LINEAR = {"protocol": "linear", "baseline": None, "sensors": "s1 and s2"}
LINES = [
    *(result_line(v, 0.7, seed=k) for k, v in enumerate((0.68, 0.70, 0.74))),
    *(result_line(v, 0.6, seed=k, method="late-fusion", **SCRATCH)
      for k, v in enumerate((0.60, 0.61, 0.65))),
    result_line(0.3, **SCRATCH),
    *(result_line(v, method="mma", label_fraction=f) for v, f in ((0.4, 0.01), (0.5, 0.1))),
    result_line(0.55, 0.65, **LINEAR), result_line(0.35, 0.4, label_fraction=0.002, **LINEAR),
    result_line(0.45, 0.5, **{**LINEAR, "sensors": "s1"}),
    result_line(0.2, 0.25, **{**LINEAR, "baseline": "random"}, checkpoint=None),
    result_line(0.3, 0.35, **{**LINEAR, "sensors": "s2"}, method="simclr-rgb")]
FLOOD = [result_line(0.6, 0.7, classes=["dry", "flooded"], data="e", seed=k) for k in range(2)]


def test_report_has_the_rows_of_the_poster_and_a_spread_over_seeds(tmp_path, monkeypatch):
    text = report_of(monkeypatch, tmp_path, LINES)
    single, multi, trained, linear = text.split("### ")[1:]
    rows = [line for line in single.splitlines() if line.startswith("| ")]
    assert rows[0] == "|  | " + " | ".join(CLASSES) + " | Average | OA | seeds |"
    assert rows[2:] == [
        "| LateFusion | " + "62 ± 3 | " * 7
        + "- | 62 ± 3 (poster 62: +0) | 60 ± 0 (poster 65) | 3 |",
        "| D-SimCLR | " + "71 ± 3 | " * 7
        + "- | **71 ± 3** (poster 70: +1) | 70 ± 0 (poster 70) | 3 |",
        "| D-SimCLR, from scratch | " + "30 | " * 7 + "- | 30 | 50 | 1 |"]
    assert "No results." in multi and "|" not in multi
    assert [line for line in linear.splitlines() if line.startswith("| ")][2:] == ["| SimCLR (RGB) | single | 100 % | 100 | 30.0 | 35.0 | 1 |",
        "| D-SimCLR | single | 100 % | 100 | 55.0 | 65.0 | 1 |", "| D-SimCLR | single | 0.2 % | 0 | 35.0 | 40.0 | 1 |",
        "| D-SimCLR, random weights | single | 100 % | 100 | 20.0 | 25.0 | 1 |", "| D-SimCLR, s1 alone | single | 100 % | 100 | 45.0 | 50.0 | 1 |"]
    assert [line for line in trained.splitlines() if line.startswith("| MMA")] == [
        "| MMA | single | 10 % | 10 | 50.0 | 50.0 | 1 |", "| MMA | single | 1 % | 1 | 40.0 | 50.0 | 1 |"]
    assert "SIMULATED" not in text
    assert (tmp_path / "label_fraction.png").stat().st_size > 5000


def test_report_of_simulated_data_says_so_and_compares_with_nothing(tmp_path, monkeypatch):
    text = report_of(monkeypatch, tmp_path, [{**LINES[0], "simulated": True}, LINES[1]])
    assert text.startswith("# SIMULATED data") and "poster" not in text
    assert "| D-SimCLR | " + "69 ± 1 | " * 7 + "- | **69 ± 1** | 70 ± 0 | 2 |" in text


def test_report_keeps_runs_of_different_settings_apart(tmp_path, monkeypatch):
    others = [result_line(0.6, args={"lr": 1e-4}), result_line(0.7, args={"weight_decay": 64}),
              result_line(0.8, args={"bands": {"s1": ["VV"], "s2": ["B3"]}})]
    text = report_of(monkeypatch, tmp_path, [result_line(0.5), *others])
    assert "| D-SimCLR [bands VV B2, lr 1e-05] | 50 " in text
    assert "| D-SimCLR [bands VV B2, lr 0.0001] | 60 " in text
    assert "| D-SimCLR [bands VV B2, lr 1e-05, weight_decay 64] | 70 " in text
    assert "| D-SimCLR [bands VV B3, lr 1e-05] | 80 " in text


def test_the_report_says_of_which_bands_each_row_saw_those_of_its_sensors(tmp_path, monkeypatch):
    rgb, few = {"bands": {"s1": [], "s2": models.RGB}}, {"bands": {"s1": ["VV"], "s2": ["B3"]}}
    text = report_of(monkeypatch, tmp_path, [
        result_line(0.5), result_line(0.6, method="mma"), result_line(0.4, method="simclr-rgb", args=rgb),
        result_line(0.7, **SCRATCH, method="late-fusion", args=few), result_line(0.3, **{**LINEAR, "baseline": "bands"}, args=few)])
    assert [line for line in text.splitlines() if line.startswith("Of bands")] == [
        "Of bands VV B2: D-SimCLR; MMA.", "Of bands B4 B3 B2: SimCLR (RGB).", "Of bands VV B3: Band means and sd; LateFusion."]


def test_the_posters_numbers_are_the_published_ones(shared, tmp_path, monkeypatch):
    paper = json.loads((shared / "paper.json").read_text())
    for task, table in finetune.POSTER.items():
        for method, scores in table.items():
            published = paper[f"{task}_label"][finetune.TITLES[method]]
            assert scores == (published["average"][0], published["overall"][0])
        assert table.keys() == models.METHODS.keys()
    for method, (*_, averages) in finetune.CURVES.items():
        assert list(averages) == paper["label_fraction"][finetune.TITLES[method]]
    assert list(finetune.PERCENT) == paper["label_fraction"]["percent"]
    text = report_of(monkeypatch, tmp_path, [result_line(0.68, 0.7, task="multi")])
    assert "- | **68** (poster 67: +1) | 70 (poster 69) | 1 |" in text


def test_the_figure_has_the_mean_and_spread_of_single_label_averages(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    multi = result_line(0.1, 0.2, method="late-fusion", task="multi", **SCRATCH)
    report_of(monkeypatch, tmp_path, [*LINES, multi])
    curves = {curve.get_label(): curve for curve in figures[0].axes[0].containers}
    for name, points, sd in (("LateFusion", [[100, 62]], 2.6458), ("D-SimCLR", [[100, 212 / 3]], 3.0551), ("MMA", [[1, 40], [10, 50]], None)):
        line, _, (bars,) = curves[name]
        np.testing.assert_allclose(line.get_xydata(), points)
        if sd:
            np.testing.assert_allclose(np.diff(bars.get_segments()[0][:, 1]), 2 * sd, rtol=1e-4)


def test_rows_of_a_table_that_differ_in_crop_scale_or_data_say_so(tmp_path, monkeypatch):
    rows = report_of(monkeypatch, tmp_path, [result_line(0.5), result_line(0.6, **SCRATCH, method="late-fusion", args={"lr": 1, "epochs": 9})])
    assert "| LateFusion [epochs 9, lr 1] | 60 " in rows and "| D-SimCLR [lr 1e-05] | 50 " in rows
    lines = [result_line(0.5, args={"crop": 24, "scale": "fixed"}), result_line(0.6, method="mma", args={"crop": 32, "scale": "fixed"}),
             result_line(0.7, **LINEAR, args={"scale": "fixed"}), result_line(0.4, **LINEAR, method="mma", data="e", args={"scale": "fixed"})]
    text = report_of(monkeypatch, tmp_path, lines)
    assert "| D-SimCLR [crop 24] | 50 " in text and "| MMA [crop 32] | 60 " in text
    assert "| D-SimCLR [data d] | single | 100 % | 100 | 70.0 " in text
    assert "| MMA [data e] | single | 100 % | 100 | 40.0 " in text


def test_a_probe_table_tells_the_seeds_of_either_task(tmp_path, monkeypatch):
    lines = [result_line(0.5, seed=seed, **LINEAR) for seed in range(3)] + [result_line(0.4, task="multi", **LINEAR)]
    text = report_of(monkeypatch, tmp_path, lines)
    assert "| D-SimCLR | single | 100 % | 100 | 50.0 ± 0.0 | 50.0 ± 0.0 | 3 |\n| D-SimCLR | multi | 100 % | 100 | 40.0 | 50.0 | 1 |" in text


def test_classes_of_ones_own_have_their_own_tables_and_no_poster(tmp_path, monkeypatch):
    text = report_of(monkeypatch, tmp_path, [*LINES, *FLOOD])
    eight, two = text.split("## dry, flooded\n")
    assert "| D-SimCLR | " + "71 ± 3 | " * 7 + "- | **71 ± 3** (poster 70: +1) |" in eight
    assert "|  | dry | flooded | Average | OA | seeds |" in two and "poster" not in two
    assert "| D-SimCLR | 60 ± 0 | - | **60 ± 0** | 70 ± 0 | 2 |" in two


@pytest.mark.parametrize("simulated", [False, True])
def test_the_poster_is_drawn_beside_its_own_classes_alone(tmp_path, monkeypatch, simulated):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    report_of(monkeypatch, tmp_path, [{**line, "simulated": simulated} for line in [*LINES, *FLOOD]])
    (title, curves), (other, others) = [(axis.get_title(), axis.get_legend_handles_labels()[1])
                                        for figure in figures for axis in figure.axes]
    assert [name for name in curves if "poster" not in name] == ["LateFusion", "D-SimCLR", "MMA"]
    assert sum("poster" in name for name in curves) == (0 if simulated else 4)
    assert others == ["D-SimCLR"] and other.endswith("dry, flooded, single-label")
    assert ("SIMULATED" in title) == ("SIMULATED" in other) == simulated


def test_two_pretrainings_of_a_method_are_told_apart_and_the_legend_hides_no_curve(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    report_of(monkeypatch, tmp_path, [result_line(0.5), result_line(0.6, checkpoint="other")])
    figures[0].draw_without_rendering()
    axis, = figures[0].axes
    one, other = (curve[0] for curve in axis.containers)
    assert one.get_color() == other.get_color() and one.get_linestyle() != other.get_linestyle()
    legend = axis.get_legend().get_window_extent()
    assert axis.get_window_extent().x1 <= legend.x0 < legend.x1 <= figures[0].bbox.x1


def test_report_without_results_is_one_line(tmp_path):
    result = user("finetune.py", "--report", tmp_path / "none")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "no results" in result.stderr
    assert not (tmp_path / "none").exists()


def test_bf16_on_a_cpu_with_crops_whose_gradients_are_wrong_is_refused(tmp_path, labelled, monkeypatch):
    for method, crop, precision, refused in (("only-s2", 16, "bf16", True), ("mma", 16, "bf16", False),
                                             ("only-s2", 17, "bf16", False), ("only-s2", 16, "float32", False)):
        assert bool(models.spoilt_gradients(method, crop, precision, "cpu")) == refused
    for options in (["--batch-size", 1], ["--lr", -1], ["--weight-decay", -1]):
        with pytest.raises(data.DataError, match="--batch-size: 2 or more, .*; no rate and no decay is negative"):
            call(monkeypatch, finetune, "--data", labelled, "--results", tmp_path, *options)
    with pytest.raises(data.DataError, match="--crop 16: on a CPU bf16 gradients"):
        call(monkeypatch, finetune, "--method", "only-s2", "--data", labelled, "--crop", 16, "--precision", "bf16",
             "--results", tmp_path)
