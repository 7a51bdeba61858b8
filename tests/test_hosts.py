"""Several hosts: an agent of torchrun for each, here both on the loopback of one machine."""
import os
import subprocess
import sys

from conftest import ROOT
from test_pretrain import MMA, assert_same_run, begun, free_port, make_store

RANK_1_DIES_ONCE = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
import data, models, pretrain
original, died = pretrain.learning_rate, pathlib.Path({died!r})
def learning_rate(step, *more):
    if step + 1 == 9 and os.environ["RANK"] == "1" and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return original(step, *more)
pretrain.learning_rate, pretrain.SAVE_EVERY = learning_rate, 0
data.run(pretrain.main, models.CheckpointError, OSError)
"""


def hosts(folder, outs, restarts=0):
    """pretrain.py on two hosts, a process each, into these folders -> [(exit status, what it said)]."""
    program, port, agents = folder / "dies.py", free_port(), []
    program.write_text(RANK_1_DIES_ONCE.format(root=str(ROOT), died=str(folder / "died")))
    if not restarts:
        (folder / "died").touch()
    for rank, out in enumerate(outs):
        argv = [*MMA, "--data", make_store(), "--micro-batch", 2, "--out", out]
        with open(folder / f"host{rank}.txt", "w") as says:
            agents.append(subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--rdzv-backend", "c10d",
                 "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", "--max-restarts", str(restarts),
                 str(program), *map(str, argv)], stdout=says, stderr=says, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    try:
        return [(agent.wait(240), (folder / f"host{rank}.txt").read_text()) for rank, agent in enumerate(agents)]
    finally:
        for agent in agents:
            agent.terminate()


def test_two_hosts_survive_a_death_and_end_in_the_bits_of_one(tmp_path):
    """A host whose own process lives is restarted without being counted by torchrun: their counts differ."""
    found = hosts(tmp_path, [tmp_path / "shared"] * 2, restarts=1)
    assert [code for code, _ in found] == [0, 0] and (tmp_path / "died").exists(), found
    assert_same_run(tmp_path / "shared", begun("torchrun").result())


def test_hosts_that_do_not_share_the_folder_of_the_run_are_told(tmp_path):
    for code, _ in hosts(tmp_path, [tmp_path / "one", tmp_path / "other"]):
        assert code == 1
    said = [(tmp_path / f"host{rank}.txt").read_text() for rank in range(2)]
    assert all("not that of the other processes: share one" in text for text in said), said
    assert not (tmp_path / "one" / "last.pt").exists()
