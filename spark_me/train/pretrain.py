"""`spark-me pretrain`: puts a run together from its configuration, or together again from a checkpoint."""

from typing import Any

import torch
from torch.utils.data import DataLoader

from spark_me.config import Config
from spark_me.data.datasets import collate
from spark_me.data.files import Files, find_files, fingerprint
from spark_me.data.loaders import held_out_dataset, held_out_loader, train_loader
from spark_me.data.unreadable import UnreadableFiles
from spark_me.errors import UserError
from spark_me.files import write_text
from spark_me.train import distributed
from spark_me.train.checkpoint import TrainState, restore, save_checkpoint
from spark_me.train.evaluate import held_out_loss
from spark_me.train.logging import RunLog
from spark_me.train.loop import train
from spark_me.train.messages import say_beginning, say_end
from spark_me.train.metrics import read_metrics
from spark_me.train.optim import build_optimizer
from spark_me.train.plots import plot_loss
from spark_me.train.reconstruct import draw_reconstruction, model_of
from spark_me.train.run_directory import RunDirectory
from spark_me.train.schedules import build_schedule

PICTURES = 6
"""Most rows of reconstruction.png."""


def pretrain(config: Config) -> None:
    """Run a configuration to its end, from the newest checkpoint of its directory if there is one.

    Raises:
        UserError: for anything in the configuration, the data or the directory that stands in the way.
    """
    run = RunDirectory(config.run.dir)
    run.check(config)
    files = find_files(config.data, config.model.in_channels)
    _count_steps_per_epoch(files, config)
    device = _pick_device(config.run.device)
    torch.manual_seed(config.run.seed)
    model = model_of(config).to(device)
    state = TrainState(model, build_optimizer(model, config.optim))
    resumed_from = _resume(state, run, files, config)
    run.create(config)
    job = Pretraining(config, run, files, state, device)
    say_beginning(config, model, files, job.schedule, device, resumed_from, state.step)
    job.train()
    say_end(run)


class Pretraining:
    """One process's part of a run."""

    def __init__(
        self, config: Config, run: RunDirectory, files: Files, state: TrainState, device: torch.device
    ) -> None:
        self.config = config
        self.run = run
        self.files = files
        self.state = state
        self.device = device
        self.steps_per_epoch = _count_steps_per_epoch(files, config)
        self.schedule = build_schedule(config, self.steps_per_epoch)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
        self.unreadable = UnreadableFiles(
            state.unreadable,
            len(files.train) + len(files.held_out),
            config.data.max_unreadable,
            write=lambda text: write_text(run.unreadable, text),
        )
        self.held_out = held_out_dataset(files, config)
        self.log = RunLog(
            run,
            steps=self.schedule.steps,
            steps_per_epoch=self.steps_per_epoch,
            first_step=state.step,
            log_every=config.run.log_every_steps,
            workers=config.data.workers,
        )

    def train(self) -> None:
        """Do the steps that are left."""
        try:
            train(
                self.state,
                self._train_batches(),
                self.schedule,
                self.unreadable,
                steps_per_epoch=self.steps_per_epoch,
                seed=self.config.run.seed,
                clip_norm=self.config.optim.clip_norm,
                device=self.device,
                autocast=self.autocast,
                on_step=self._after_step,
            )
        finally:
            self.log.close()
        # A run that was killed between its last checkpoint and its pictures gets them when it is started again.
        self._draw()

    def _after_step(self, values: dict[str, float], images: int) -> None:
        if not distributed.is_main():
            return
        step = self.state.step
        self.log.step(step, values, images)
        every = self.config.run.checkpoint_every_steps
        if step % self.steps_per_epoch == 0:
            self._end_epoch(step // self.steps_per_epoch, values["loss"])
        elif every is not None and step % every == 0:
            self._save()

    def _end_epoch(self, epoch: int, loss: float) -> None:
        last = epoch == self.config.train.epochs
        evaluate = last or epoch % self.config.run.evaluate_every_epochs == 0
        # Measured before the checkpoint, or a kill between the two would leave a gap in the curve.
        measured = self._held_out_loss() if evaluate and self.files.held_out else None
        self.log.epoch(self.state.step, loss, measured)
        self._save()
        if evaluate and not last:
            self._draw()

    def _held_out_loss(self) -> float:
        batches = held_out_loader(self.held_out, self.config, pin_memory=self.device.type == "cuda")
        seed = self.config.run.seed
        return held_out_loss(
            self.state.model, batches, self.unreadable, seed=seed, device=self.device, autocast=self.autocast
        )

    def _save(self) -> None:
        save_checkpoint(
            self.run.checkpoints,
            self.state,
            self.config,
            steps_per_epoch=self.steps_per_epoch,
            data_fingerprint=fingerprint(self.files.train),
            keep_last=self.config.run.keep_last,
        )

    def _draw(self) -> None:
        plot_loss(read_metrics(self.run.metrics), self.run.loss_plot)
        rows = min(PICTURES, len(self.held_out))
        batch = collate([self.held_out[index] for index in range(rows)])
        if batch.indices:
            draw_reconstruction(self.state.model, batch, self.config, self.run.picture, seed=self.config.run.seed)

    def _train_batches(self) -> DataLoader[Any]:
        return train_loader(
            self.files,
            self.config,
            first_step=self.state.step,
            most_unreadable=self.unreadable.most,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            pin_memory=self.device.type == "cuda",
        )


def _resume(state: TrainState, run: RunDirectory, files: Files, config: Config) -> str | None:
    """Bring `state` to the checkpoint that the configuration asks for; return its path, None when fresh."""
    found = run.find_checkpoint(config)
    if found is None:
        return None
    path, content = found
    now = fingerprint(files.train)
    if content["data"] != now:
        raise UserError(
            f"{path}: the training images changed since ({content['data']} then, {now} now): "
            "restore them, or choose another run.dir"
        )
    restore(state, content, path)
    return str(path)


def _count_steps_per_epoch(files: Files, config: Config) -> int:
    samples = len(files.train) * config.data.repeats
    batch_size = config.train.batch_size
    if samples < batch_size:
        raise UserError(
            f"train.batch_size={batch_size} is more than the {samples} images of an epoch "
            f"({len(files.train)} files × data.repeats={config.data.repeats}): lower it, or raise data.repeats"
        )
    return samples // batch_size


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"run.device={name}: not usable here ({reason}): use run.device=auto or cpu") from None
    return device
