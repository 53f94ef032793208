"""What a command may not read or write, as somebody without root's rights: one line that names it, and exit code 2."""

import ast
import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_runs
import torch
from child import run_limited

import spark_me
import spark_me.downstream.features
import spark_me.train.pretrain  # noqa: F401  (nobody may not read the environment: all that is needed is there before)
from spark_me import cli

COMMANDS = {
    "{config}": "pretrain {config} run.dir={open}/run",
    "{images}": "data check {config} data.workers=0",
    "{images}/00.png": "features {weights} {images}/00.png --workers 0 --out {open}/f.npz",
    "{weights}": "convert {weights} {open}/out.pth --to timm",
    "{closed}": "convert {weights} {closed}/out.pth --to timm",
    "{closed}/run": "pretrain {config} run.dir={closed}/run",
    "{closed}/stats.json": "data stats {config} data.workers=0 --json {closed}/stats.json",
    "{closed}/run/checkpoints": "pretrain {config} run.dir={closed}/run",
}
"""By what is closed to others."""


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, Path]]:
    """Files that all may read, in a folder that all may pass."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        images = tiny_runs.write_images(folder / "images")
        config = tiny_runs.write_config(folder / "tiny.yaml", images, encoder=tiny_runs.SMALL)
        torch.save(spark_me.get_model("resnet18").state_dict(), folder / "weights.pth")
        (folder / "closed/run/checkpoints").mkdir(parents=True)
        (folder / "closed/stats.json").touch()
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        yield {
            "config": config,
            "images": images,
            "weights": folder / "weights.pth",
            "open": folder / "open",
            "closed": folder / "closed",
        }


@pytest.mark.parametrize("closed", COMMANDS)
def test_closed_places_are_one_line(places: dict[str, Path], closed: str) -> None:
    path = Path(closed.format(**places))
    mode = path.stat().st_mode
    path.chmod(0)
    command = COMMANDS[closed].format(**places).split()
    errors = io.StringIO()

    def call() -> tuple[int, str]:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(command)
        return code, errors.getvalue()

    try:
        code, line = ast.literal_eval(run_limited(call, root=False))
    finally:
        os.chmod(path, mode)
    said = [one for one in line.splitlines() if one.startswith("spark-me: error:")]
    assert code == 2 and len(said) == 1 and "Traceback" not in line, line
    assert str(path) in said[0] or str(path.parent) in said[0], line
    assert any(word in said[0].lower() for word in ("permission denied", "not writable", "unreadable")), line
