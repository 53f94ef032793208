"""Two processes under torchrun: one is killed, one is asked to stop, and the run ends as if nothing had happened."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from child import Child, together
from tiny_runs import SMALL, assert_same_end, write_config, write_images
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from spark_me.cli import main
from spark_me.train import distributed
from spark_me.train.checkpoint import list_checkpoints
from spark_me.train.step import Stepper


def disturbed(checkpoint: Path, words: Sequence[str]) -> None:
    """Process 1 kills itself in the third step of its first life, and is asked to stop in the fifth of its second."""
    life, take = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), Stepper.take

    def step(self: Stepper, *arguments: Any) -> Any:
        number = self.state.step + 1
        if distributed.rank() == 1:
            if (life, number) == (0, 3):
                while not checkpoint.exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            if (life, number) == (1, 5):
                os.kill(os.getpid(), signal.SIGTERM)
        return take(self, *arguments)

    Stepper.take = step  # type: ignore[method-assign]
    raise SystemExit(main([*words]))


def launch(*arguments: Any) -> None:
    """What torchrun does, but that its processes are forks: they would import for ten seconds what is here already."""
    logging.getLogger("torch.distributed.elastic").addHandler(logging.StreamHandler())  # pytest has what there was
    rendezvous = {"run_id": "run", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    elastic_launch(LaunchConfig(1, 1, 2, max_restarts=3, start_method="fork", **rendezvous), disturbed)(*arguments)


def test_restarts_and_stops_change_nothing(tmp_path: Path, undrawn: None) -> None:
    config = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"), encoder=SMALL)
    calm, other = ["pretrain", str(config), f"run.dir={tmp_path / 'calm'}"], tmp_path / "disturbed"
    checkpoint = other / "checkpoints/step_00000002.pt"

    children = together(lambda: main(calm))
    assert [child.returncode for child in children] == [0, 0], [child.output for child in children]
    assert sum(child.output.count("starting in") for child in children) == 1  # one process speaks

    words = ["pretrain", str(config), f"run.dir={other}"]
    stopped = Child(lambda: launch(checkpoint, words))
    assert stopped.wait() == 0, stopped.output
    assert f"going on from {checkpoint}, 2 steps done" in stopped.output
    assert f"failed (exitcode: {-signal.SIGKILL}) local_rank: 1" in stopped.output
    assert stopped.output.count("stopped as asked, 5 steps done") == 1
    assert list_checkpoints(other / "checkpoints")[-1].name == "step_00000005.pt"

    children = together(lambda: main(words))
    assert [child.returncode for child in children] == [0, 0], [child.output for child in children]
    assert_same_end(other, tmp_path / "calm")


def test_an_error_is_one_line_of_one_process(tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"))
    root = Path(__file__).parents[1]
    words = ["--standalone", "--nproc-per-node=2", "-m", "spark_me", "pretrain", str(config), "train.batch_size=3"]
    failed = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert failed.returncode != 0
    assert failed.stderr.count("spark-me: error: train.batch_size=3 does not split evenly over 2 processes") == 1
    assert "spark_me/cli.py" not in failed.stderr  # no traceback of ours
    assert not (tmp_path / "run").exists()
