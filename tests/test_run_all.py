"""run_all.sh with a `python` that only notes its jobs: a job per GPU, and an end to all of them where one fails."""
import os
import signal
import subprocess
import time

import pytest
from conftest import ROOT

import finetune
import models

PYTHON = """#!/usr/bin/env bash
case "$*" in
  *device_count*) echo "$GPUS"; exit ;;
  *sched_getaffinity*) echo 2; exit ;;
esac
echo "$CUDA_VISIBLE_DEVICES $*" >> "$NOTES/began"
case "$*" in
  *"pretrain.py --method $FAILS "*)
    until [ "$SLEEPS" = none ] || [ -e "$NOTES/asleep" ]; do sleep 0.01; done
    printf 'step 1\\rstep 2\\n%s: no such thing\\n' "$FAILS" >&2; exit 3 ;;
  *"pretrain.py --method $SLEEPS "* | *"data.py pack "*"/$SLEEPS")
    trap 'sleep 0.3; echo saved > "$NOTES/saved"; exit 143' TERM
    echo $$ > "$NOTES/asleep"
    sleep 60 & wait ;;
  *"pretrain.py --method $VANISH "*) rm -r "$NOTES"/out/.claims* ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """-> function that starts run_all.sh on stores that look whole."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(PYTHON)
    (tmp_path / "bin/python").chmod(0o755)
    for name in ("sen12ms", "dfc2020"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "index.json").touch()

    def start(gpus, fails="none", sleeps="none", vanish="none", **more):
        environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "NOTES": str(tmp_path), "GPUS": str(gpus),
                       "FAILS": fails, "SLEEPS": sleeps, "VANISH": vanish, **more}
        return subprocess.Popen(
            ["bash", ROOT / "run_all.sh", "--sen12ms", tmp_path / "sen12ms", "--dfc2020", tmp_path / "dfc2020",
             "--out", tmp_path / "out"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize("gpus", [0, 1, 3])
def test_every_job_runs_once_and_the_pretrainings_come_first(start, tmp_path, gpus):
    job = start(gpus)
    _, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (0, "")
    began = [line.partition(" ") for line in (tmp_path / "began").read_text().splitlines()]
    commands = [command for _, _, command in began]
    assert len(commands) == len(set(commands)) == 3 + 3 * 3 + 1 + 4 + 7 + 4 + 1
    assert {command.split()[2] for command in commands[:3]} == {"d-simclr", "mma", "simclr-rgb"}
    assert all(command.startswith("pretrain.py --method ") for command in commands[:3])
    assert commands[-1] == f"finetune.py --report {tmp_path}/out/results"
    assert all(f" --data {tmp_path}/sen12ms --out {tmp_path}/out/runs/{command.split()[2]}" in f"{command} " for command in commands[:3])
    assert not any("--scale" in command or "--lr" in command or "--crop" in command for command in commands)  # as published
    evaluated = [command for command in commands[3:-1] if "show.py" not in command]
    assert all(f" --data {tmp_path}/dfc2020 --results {tmp_path}/out/results --seeds 5 " in command for command in evaluated)
    tuned = {command.split()[8]: command for command in evaluated if "finetune.py" in command and "--label-fraction" not in command}
    assert tuned.keys() == models.METHODS.keys() and all(command.endswith("--task single multi") for command in tuned.values())
    for method, command in tuned.items():
        checkpoint = f"--checkpoint {tmp_path}/out/runs/{method}/last.pt"
        assert (checkpoint in command) == models.METHODS[method]["pretrained"] == any(
            "linear_eval.py" in probe and checkpoint in probe for probe in evaluated)
    few = {command.split()[8] for command in evaluated if command.endswith("--label-fraction 0.01 0.1 0.5")}
    assert few == finetune.CURVES.keys()
    seen = {device for device, _, _ in began[:-1]}
    assert seen <= {*map(str, range(gpus))} if gpus else seen == {""}


def test_a_tree_is_packed_at_every_start_so_that_another_one_is_refused(start, tmp_path):
    for name in ("sen12ms", "dfc2020"):
        (tmp_path / name / "index.json").unlink()
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "index.json").touch()
    start(1).communicate(timeout=60)
    began = (tmp_path / "began").read_text()
    for name in ("sen12ms", "dfc2020"):
        assert f"data.py pack {tmp_path}/{name} {tmp_path}/out/{name}\n" in began


def test_a_job_that_fails_alone_says_so_itself(start):
    job = start(1, "mma")
    _, err = job.communicate(timeout=30)
    assert job.returncode == 3 and err.endswith("mma: no such thing\n")


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("fails, sleeps", [("mma", "d-simclr"), ("d-simclr", "mma")])  # whichever slot is waited for
def test_a_job_that_fails_ends_the_others_at_once(start, tmp_path, gpus, fails, sleeps):
    job = start(gpus, fails, sleeps)
    _, err = job.communicate(timeout=30)  # the other would sleep for a minute
    assert job.returncode == 3 and err == f"step 1\nstep 2\n{fails}: no such thing\n"
    assert_nothing_is_left(tmp_path)
    assert "linear_eval" not in (tmp_path / "began").read_text()


def assert_nothing_is_left(folder):
    assert (folder / "saved").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "asleep").read_text()), 0)


@pytest.mark.parametrize("sleeps", ["mma", "dfc2020"])  # a job, packing
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_once_the_job_in_hand_has_saved(start, tmp_path, number, sleeps):
    (tmp_path / "dfc2020/index.json").unlink()
    job = start(2, sleeps=sleeps)
    while not (tmp_path / "asleep").exists():
        time.sleep(0.01)
        assert job.poll() is None
    job.send_signal(number)
    job.communicate(timeout=30)
    assert job.returncode == -number
    assert_nothing_is_left(tmp_path)


def test_jobs_run_on_the_gpus_that_the_user_left_visible_one_on_each(start, tmp_path):
    start(2, "mma", "d-simclr", CUDA_VISIBLE_DEVICES="5,7").communicate(timeout=30)  # the first sleeps until the other fails
    first = [line.split()[:4] for line in (tmp_path / "began").read_text().splitlines()]
    assert {device for device, *_ in first} == {"5", "7"} and {method for *_, method in first} >= {"d-simclr", "mma"}


def test_claims_that_vanish_leave_no_job_out_in_silence(start):
    job = start(1, vanish="d-simclr")  # during the first job
    _, err = job.communicate(timeout=30)
    assert job.returncode == 2 and "cannot be made: free space" in err


@pytest.mark.parametrize("options", [["--sen12ms"], ["--out"], ["--sen12ms", "/no/such"], ["--else"]])
def test_options_that_say_too_little_are_refused(options):
    result = subprocess.run(["bash", ROOT / "run_all.sh", *options], check=False, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("run_all.sh: ") and result.stderr.count("\n") == 1
