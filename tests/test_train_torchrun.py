"""Two processes under torchrun: one is killed, one is asked to stop, and the run ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tiny_runs import SMALL, assert_same_end, write_config, write_images

from spark_me.train.checkpoint import list_checkpoints

# Process 1 kills itself in the third step of its first life, and is asked to stop in the fifth of its second.
MAIN = """
import os, signal, sys
from pathlib import Path
import tiny_runs  # its encoder
from spark_me.cli import main
from spark_me.train import distributed
from spark_me.train.step import Stepper

life, take_step = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), Stepper.step

def disturbed(self, batches):
    step = self.state.step + 1
    if distributed.rank() == 1 and {disturbed}:
        if (life, step) == (0, 3):
            while not Path({checkpoint!r}).exists():
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        if (life, step) == (1, 5):
            os.kill(os.getpid(), signal.SIGTERM)
    return take_step(self, batches)

if __name__ == "__main__":
    Stepper.step = disturbed
    sys.exit(main(sys.argv[1:]))
"""


PATHS = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]


def torchrun(script: Path, *arguments: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    options = ["--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script), "pretrain", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"},
    )


def test_restarts_and_stops_change_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"), encoder=SMALL)
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    script, disturbing = tmp_path / "main.py", tmp_path / "disturbing.py"
    checkpoint = str(disturbed / "checkpoints/step_00000002.pt")
    script.write_text(MAIN.format(disturbed=False, checkpoint=checkpoint))
    disturbing.write_text(MAIN.format(disturbed=True, checkpoint=checkpoint))

    done = torchrun(script, str(config), f"run.dir={calm}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starting in") == 1  # one process speaks

    stopped = torchrun(disturbing, str(config), f"run.dir={disturbed}", restarts=3)
    assert stopped.returncode == 0, stopped.stderr
    assert f"going on from {checkpoint}, 2 steps done" in stopped.stdout
    assert f"failed (exitcode: {-signal.SIGKILL}) local_rank: 1" in stopped.stderr
    assert stopped.stdout.count("stopped as asked, 5 steps done") == 1
    assert list_checkpoints(disturbed / "checkpoints")[-1].name == "step_00000005.pt"

    rest = torchrun(script, str(config), f"run.dir={disturbed}")
    assert rest.returncode == 0, rest.stderr
    assert_same_end(disturbed, calm)


def test_an_error_is_one_line_of_one_process(tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", write_images(tmp_path / "images"))
    failed = torchrun(Path(__file__).parents[1] / "spark_me/__main__.py", str(config), "train.batch_size=3")
    assert failed.returncode != 0
    assert failed.stderr.count("spark-me: error: train.batch_size=3 does not split evenly over 2 processes") == 1
    assert "spark_me/cli.py" not in failed.stderr  # no traceback of ours
    assert not (tmp_path / "run").exists()
