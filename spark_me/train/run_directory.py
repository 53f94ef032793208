"""The directory of a run: what lies where, whose it is, and which checkpoint to go on from."""

from pathlib import Path
from typing import Any

from spark_me.config import AnyConfig, differing_keys, load_config, parse_config, to_yaml
from spark_me.errors import UserError
from spark_me.files import check_output_folder, write_text, writing
from spark_me.train.checkpoint import list_checkpoints, read_checkpoint, step_of

# What may change when a run goes on in another directory from a checkpoint that is named: never what decides which
# images step N sees.
CHANGEABLE = ("optim.", "train.epochs:", "train.steps:", "train.precision:", "train.compile:")


class RunDirectory:
    """Paths of a run. A directory belongs to one configuration."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.initial_weights = self.path / "initial_weights.json"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self.loss_plot = self.path / "loss.png"
        self.picture = self.path / "reconstruction.png"
        self.unreadable = self.path / "unreadable.txt"

    def check(self, config: AnyConfig) -> None:
        """Refuse a directory that another run owns; writes nothing.

        Raises:
            UserError: if it cannot be written to, holds another configuration, or checkpoints that this run would
                overwrite.
        """
        check_output_folder(self.path)
        other = self.recorded(type(config))
        if other is not None:
            different = differing_keys(other, config)
            if different:
                raise UserError(
                    f"{self.path}: holds a run of another configuration ({'; '.join(different)}): "
                    "choose another run.dir, or go back to that configuration"
                )
        if config.run.resume == "never" and list_checkpoints(self.checkpoints):
            raise UserError(f"{self.path}: holds a run, and run.resume=never: choose another run.dir, or resume=auto")

    def recorded(self, schema: type[AnyConfig]) -> AnyConfig | None:
        """The configuration of the run that the directory holds; None if it holds none.

        Raises:
            UserError: if it is that of another task.
        """
        if not self.config.is_file():
            return None
        try:
            config: AnyConfig = load_config(self.config, schema=schema)
            return config
        except UserError as error:
            raise UserError(
                f"{self.path}: holds a run of another command or version ({error}): choose another run.dir"
            ) from None

    def create(self, config: AnyConfig) -> None:
        """Make the directory and write the resolved configuration into it."""
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text(self.config, to_yaml(config))

    def find_checkpoint(self, config: AnyConfig, task: str) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that `run.resume` asks for, read; None to start afresh.

        Raises:
            UserError: if it does not load, is of another configuration, or is older than what the directory holds.
        """
        resume = config.run.resume
        if resume == "never":
            return None
        if resume == "auto":
            return self._newest_that_loads(task)
        path = Path(resume)
        content = read_checkpoint(path, task)
        different = differing_keys(parse_config(content["config"], str(path), type(config)), config)
        fixed = [difference for difference in different if not difference.startswith(CHANGEABLE)]
        if fixed:
            raise UserError(f"{path}: is of another run ({'; '.join(fixed)}): use its configuration for these keys")
        newer = [other for other in list_checkpoints(self.checkpoints) if step_of(other) > content["step"]]
        if newer:
            raise UserError(f"{path}: run.dir holds newer ones, up to {newer[-1].name}: take another, or resume=auto")
        return path, content

    def _newest_that_loads(self, task: str) -> tuple[Path, dict[str, Any]] | None:
        paths = list_checkpoints(self.checkpoints)
        for path in reversed(paths):
            try:
                return path, read_checkpoint(path, task)
            except UserError as error:
                print(f"spark-me: skipped a damaged checkpoint: {error}")
        if paths:
            raise UserError(f"{self.checkpoints}: none of {len(paths)} checkpoints loads: choose another run.dir")
        return None
