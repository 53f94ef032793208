"""The directory of a run: what lies where, whose it is, which checkpoint to go on from, how the run was started."""

import fcntl
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

import spark_me
from spark_me.config.loading import ON_THE_LINE, differing_keys, load_config, parse_config, to_yaml
from spark_me.config.tasks import AnyConfig
from spark_me.errors import UserError
from spark_me.files import check_output_folder, clear_leftovers, write_text, writing
from spark_me.machine import describe_machine
from spark_me.train import distributed
from spark_me.train.checkpoint import BEST, list_checkpoints, read_checkpoint, step_of

# What may change when a run goes on in another directory from a checkpoint that is named: never what decides which
# images step N sees.
CHANGEABLE = ("optim.", "train.epochs:", "train.steps:", "train.precision:", "train.compile:")


class RunDirectory:
    """Paths of a run. A directory belongs to one configuration, which it records."""

    def __init__(self, config: AnyConfig) -> None:
        self.config = config
        self.path = Path(config.run.dir)
        self.lock = self.path / "lock"
        self.config_file = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.initial_weights = self.path / "initial_weights.json"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self.loss_plot = self.path / "loss.png"
        self.picture = self.path / "reconstruction.png"
        self.unreadable = self.path / "unreadable.txt"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Keep other processes that would write here out, for as long as the block lasts.

        The lock is the operating system's and goes with this process, however that ends; data workers do not hold it.

        Every process of a run calls it; the main one holds the lock.

        Raises:
            UserError: if another run is writing here, or the directory cannot be made.
        """
        with ExitStack() as stack:
            with distributed.raise_together():
                if distributed.is_main():
                    stack.enter_context(self._locked())
            yield

    @contextmanager
    def _locked(self) -> Iterator[None]:
        check_output_folder(self.path)
        is_new = not self.path.exists()
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self._acquire()
            for folder in (self.path, self.checkpoints):
                if folder.is_dir():
                    clear_leftovers(folder)
        try:
            yield
        finally:
            self.lock.unlink(missing_ok=True)
            lock.close()
            if is_new and not any(self.path.iterdir()):
                self.path.rmdir()

    def _acquire(self) -> BinaryIO:
        while True:
            lock = self.lock.open("ab")
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                lock.close()
                raise UserError(
                    f"{self.path}: another run is writing there now: wait for its end, or choose another run.dir"
                ) from None
            # Whoever held it before may have removed the file between the two.
            if self.lock.exists() and os.path.samestat(os.fstat(lock.fileno()), self.lock.stat()):
                return lock
            lock.close()

    def check(self) -> None:
        """Refuse a directory that another run owns; writes nothing.

        Raises:
            UserError: if it holds another configuration, or checkpoints that this run would overwrite.
        """
        other = self.recorded()
        if other is not None:
            different = differing_keys(other, self.config)
            if different:
                raise UserError(
                    f"{self.path}: holds a run of another configuration ({'; '.join(different)}): "
                    "choose another run.dir, or go back to that configuration"
                )
        if self.config.run.resume == "never" and list_checkpoints(self.checkpoints):
            raise UserError(f"{self.path}: holds a run, and run.resume=never: choose another run.dir, or resume=auto")

    def recorded(self) -> AnyConfig | None:
        """The configuration of the run that the directory holds already; None if it holds none.

        Raises:
            UserError: if it is that of another task.
        """
        if not self.config_file.is_file():
            return None
        try:
            config: AnyConfig = load_config(self.config_file, unchecked=ON_THE_LINE, schema=type(self.config))
            return config
        except UserError as error:
            raise UserError(
                f"{self.path}: holds a run of another command or version ({error}): choose another run.dir"
            ) from None

    def create(self) -> None:
        """Make the directory and write the resolved configuration into it."""
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, to_yaml(self.config))

    def find_checkpoint(self, task: str) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that `run.resume` asks for, read; None to start afresh.

        Raises:
            UserError: if it does not load, is of another configuration, or is older than what the directory holds.
        """
        resume = self.config.run.resume
        if resume == "never":
            return None
        if resume == "auto":
            found = self._newest_that_loads(task)
            # config.yaml may be gone, or a checkpoint be of another directory.
            different = [] if found is None else self._differences(*found)
            if different:
                raise UserError(
                    f"{self.checkpoints}: is of another configuration ({'; '.join(different)}): choose another "
                    "run.dir, or go back to that configuration"
                )
            return found
        path = Path(resume)
        content = read_checkpoint(path, task)
        different = self._differences(path, content)
        fixed = [difference for difference in different if not difference.startswith(CHANGEABLE)]
        if fixed:
            raise UserError(f"{path}: is of another run ({'; '.join(fixed)}): use its configuration for these keys")
        newer = [other for other in list_checkpoints(self.checkpoints) if step_of(other) > content["step"]]
        if newer:
            raise UserError(f"{path}: run.dir holds newer ones, up to {newer[-1].name}: take another, or resume=auto")
        return path, content

    def _newest_that_loads(self, task: str) -> tuple[Path, dict[str, Any]] | None:
        best = self.checkpoints / BEST
        # The best one goes on as well as any, if it is all that is left.
        paths = [*([best] if best.is_file() else []), *list_checkpoints(self.checkpoints)]
        for path in reversed(paths):
            try:
                return path, read_checkpoint(path, task)
            except UserError as error:
                print(f"spark-me: skipped a damaged checkpoint: {error}")
        if paths:
            raise UserError(f"{self.checkpoints}: none of {len(paths)} checkpoints loads: choose another run.dir")
        return None

    def _differences(self, path: Path, content: dict[str, Any]) -> list[str]:
        return differing_keys(parse_config(content["config"], str(path), type(self.config)), self.config)


def describe_environment(device: torch.device) -> str:
    """JSON: command line, versions, commit, hardware and number of processes of this start of a run."""
    environment: dict[str, Any] = {
        "command": shlex.join(sys.orig_argv),
        "git_commit": git_commit(Path(spark_me.__file__).parent),
        "processes": distributed.world_size(),
        "device": str(device),
        **asdict(describe_machine(device.type)),
    }
    return json.dumps(environment, indent=2) + "\n"


def git_commit(package: Path) -> str | None:
    """The commit that a source folder is at, with -dirty if files differ from it; None outside a repository."""
    git = ["git", "-C", str(package)]
    try:
        # An installed package may lie, untracked, in the repository of something else.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):  # no git, no repository
        return None
    return described.stdout.strip()
