"""tests/recipe.py: trials train, are judged and stand in the table; their losses and steps are the formulas."""
import json
import math

import numpy as np
import pytest
import recipe
import torch
import torch.nn.functional as F

import models

ONE_BAND = {"s1": ["VV"], "s2": ["B4"]}


def settings(trial="poster", **more):
    return recipe.SimpleNamespace(**recipe.USUAL | recipe.TRIALS[trial] | {"seed": 0} | more)


@pytest.mark.parametrize("trial", ["poster", "ours", "barlow", "vicreg", "mma+shift", "poster+lars0.6", "clip+dates",
                                   "clip+shift", "clip+dropband", "clip+flips", "clip+ema", "clip+learned-temp"])
def test_trials_train_are_judged_and_stand_in_the_table(labelled, tmp_path, monkeypatch, capsys, trial):
    """One of each mechanism; the others have other numbers, or several of these."""
    for name in ("pairs", "flood"):
        (tmp_path / name).symlink_to(labelled)
    monkeypatch.setattr(recipe, "USUAL", recipe.USUAL | {"crop": 24, "batch_size": 16})
    monkeypatch.setitem(recipe.TRIALS, trial, {**recipe.TRIALS[trial], "batch_size": 16})
    threads = torch.get_num_threads()
    line = recipe.run(trial, tmp_path, 0, 3, tmp_path)
    torch.set_num_threads(threads)
    assert line["places"] == 24 and 0 <= line["top1"] <= line["top5"] <= 1 and line["simulated"]
    assert math.isfinite(line["loss"]) and json.dumps(line)
    encoders, scaling = models.load_encoders(tmp_path / f"{trial}_{tmp_path.name}_0.pt")
    assert list(encoders) == ["s1", "s2"] and scaling["scale"] == "standard"
    usual = "mma" if trial.startswith("mma") else "poster"
    recipe.print_table([{**line, "trial": usual, "top1": 0.1, "top5": 0.2}, {**line, "top1": 0.2, "top5": 0.3}])
    table = capsys.readouterr().out
    assert "SIMULATED" in table and (trial == usual or f"| {trial} | 1 | 20.0 | 30.0 | 2.00 / 1.50 |" in table)


def test_no_trial_has_a_setting_that_nothing_reads():
    for changes in recipe.TRIALS.values():
        assert changes.keys() <= recipe.USUAL.keys()


def test_vicreg_is_its_formula():
    a, b = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 25 * np.square(a.numpy() - b.numpy()).mean()
    for x in (a.numpy(), b.numpy()):
        expected += 25 / 2 * np.maximum(0, 1 - np.sqrt(x.var(0, ddof=1) + 1e-4)).mean()
        covariance = np.cov(x.T)
        expected += (np.square(covariance).sum() - np.square(covariance.diagonal()).sum()) / 6
    assert recipe.vicreg(a, b).item() == pytest.approx(expected)


def test_in_clip_each_row_picks_its_partner_among_those_of_the_other_sensor():
    """A textbook's two loops."""
    a, b = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)).double()
    cosine, total = F.cosine_similarity, 0
    for one, other in ((a, b), (b, a)):
        for k in range(7):
            total -= (cosine(one[k:k + 1], other) / 0.1).log_softmax(0)[k] / 14
    model = models.Contrastive("d-simclr", ONE_BAND)
    assert abs(recipe.loss_of(model, a, b, settings("clip", temperature=0.1)) - total) < 1e-12
    assert abs(model.loss(a, b, 0.1) - total) > 0.1  # where those of the same sensor count


def test_lars_is_its_formula():
    """v = 0.9 v + rate * ratio * (gradient + decay), of which the ratio is 1 and no decay for biases."""
    weights, bias = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))
    optimizer, speed = recipe.LARS([weights, bias], 1.0, momentum=0.9), 0
    for rate in (0.5, 0.2):
        optimizer.param_groups[0]["lr"] = rate
        before, pull = weights.detach().clone(), torch.arange(6.0).view(2, 3)
        weights.grad, bias.grad = pull.clone(), torch.full((3,), 2.0)
        optimizer.step()
        decayed = pull + 1e-6 * before
        speed = 0.9 * speed + rate * 0.001 * before.norm() / decayed.norm() * decayed
        assert torch.allclose(weights, before - speed, atol=1e-7)
    assert torch.allclose(bias, torch.full((3,), 1 - 1.0 - (0.9 * 1.0 + 0.4)))


def test_similarity_over_shifts_is_the_best_of_nine():
    model = models.Contrastive("mma", ONE_BAND)
    a, b = torch.randn(2, 3, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    inner = F.normalize(b, dim=1)[..., 1:5, 1:5].flatten(1)
    shifted = [F.normalize(a, dim=1)[..., k:k + 4, m:m + 4].flatten(1) @ inner.T / 16
               for k in range(3) for m in range(3)]
    found = recipe.similarity_of(model, a, b, settings(map_shift=1))
    assert torch.allclose(found, torch.stack(shifted).amax(0), atol=1e-6)


@pytest.mark.parametrize("turned", [1, 2])
def test_turned_crops_have_their_pixels_elsewhere_in_the_radar_alone_or_alike_in_both(turned):
    pixels = np.arange(4 * 6 * 6).reshape(1, 4, 1, 6, 6)
    args, radar = settings(turned=turned, crop=6), (100 * pixels).astype(np.int16)
    stats = {sensor: {"mean": [0], "std": [1]} for sensor in ("s1", "s2")}
    batch = np.arange(4), np.zeros(4, int), np.zeros(4, int)
    s1, s2 = recipe.training_input(batch, radar, pixels[0], args, stats, np.random.default_rng(0))
    plain = torch.from_numpy(pixels[0].astype(np.float32))
    assert torch.equal(s2, s1 if turned == 2 else plain) and not torch.equal(s1, plain)
    assert torch.equal(s1.flatten(1).sort(1).values, plain.flatten(1))  # the same pixels elsewhere


@pytest.mark.parametrize("trial, kind, betas, own_rates", [
    ("poster", "Adam", (0.9, 0.999), False), ("clip", "Adam", (0.9, 0.999), False),
    ("ours", "Adam", (0.0, 0.99), True), ("ours+momentum", "Adam", (0.9, 0.999), True),
    ("clip+adamw", "AdamW", (0.9, 0.999), False), ("clip+adafactor", "Adafactor", None, False),
    ("poster+lars0.6", "LARS", None, False), ("clip+lars5", "LARS", None, False)])
def test_trials_have_their_optimiser_momentum_and_rates_of_all_weights(trial, kind, betas, own_rates):
    model, optimizer = recipe.make_model(settings(trial), ONE_BAND)
    held = [weights for group in optimizer.param_groups for weights in group["params"]]
    assert type(optimizer).__name__ == kind and list(map(id, held)) == list(map(id, model.parameters()))
    assert {group.get("betas") for group in optimizer.param_groups} == {betas}
    factors = {group.get("factor", 1) for group in optimizer.param_groups}
    assert len(factors) > 20 if own_rates else factors == {1}


def test_a_learned_temperature_moves_by_its_own_rate_from_the_usual_one():
    args = settings("clip+learned-temp")
    model, optimizer = recipe.make_model(args, ONE_BAND)
    for group in optimizer.param_groups:
        group["lr"] = args.lr * group.get("factor", 1)
    a, b = torch.randn(2, 8, 128, generator=torch.Generator().manual_seed(0))
    loss = recipe.loss_of(model, a, b, args)
    assert loss.item() == pytest.approx(models.info_nce(model.similarity(a, b), 0.07).item())
    loss.backward()
    optimizer.step()
    assert abs(args.log_temperature.item() - math.log(0.07)) == pytest.approx(0.01, rel=0.01)
