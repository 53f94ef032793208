"""The trainer: brings a task from its newest checkpoint to its last step, alone or with other processes."""

import math
import os
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from tqdm import tqdm

from spark_me.config.loading import to_yaml
from spark_me.data.datasets import Batch
from spark_me.data.sampler import Share
from spark_me.data.unreadable import UnreadableFiles
from spark_me.errors import UserError
from spark_me.files import write_text
from spark_me.train import distributed
from spark_me.train.checkpoint import (
    CheckpointWriter,
    TrainState,
    checkpoint_of,
    checkpoint_size,
    list_checkpoints,
    require_finite,
    require_space,
    restore,
    step_of,
)
from spark_me.train.cuda_graph import GraphedSteps
from spark_me.train.distributed import Precision, named_failures, note_gathered
from spark_me.train.logs import RunLog, say_stopped
from spark_me.train.run_directory import RunDirectory, describe_environment
from spark_me.train.schedules import Schedule, build_optimizer, build_schedule
from spark_me.train.step import Prepared, Stepper, Taken, Task

ANSWERS = {
    signal.SIGINT: "spark-me: finishing this step, then saving; Ctrl-C again stops at once, without saving",
    signal.SIGTERM: "spark-me: asked to stop (SIGTERM): finishing this step, then saving",
}


class StopRequest:
    """Within its block, SIGTERM and SIGINT are answered and noted instead of obeyed; a SIGINT after that stops at once.

    Python calls a signal's handler between two of its own instructions, and a backward pass may be a single one that
    takes seconds. So a thread answers: the interpreter writes the signal's number into a pipe as soon as it comes.
    """

    def __init__(self, *, answer: bool = True) -> None:
        """
        Args:
            answer: say that the signal was noticed; of several processes one should.
        """
        self.signal: signal.Signals | None = None
        """The first one that came."""
        self._answer = answer

    def __enter__(self) -> "StopRequest":
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        self._previous_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._note) for number in ANSWERS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        os.close(self._writer)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)

    def _listen(self, reader: int) -> None:
        """Answer the first signal; end when the pipe is closed."""
        answered = not self._answer
        while number := os.read(reader, 1):
            text = ANSWERS.get(signal.Signals(number[0]))
            if text is not None and not answered:
                answered = True
                tqdm.write(text, file=sys.stderr)
        os.close(reader)


class Trainer:
    """One process's part of a run. The main process alone writes; all take every step together."""

    def __init__(self, task: Task, run: RunDirectory, device: torch.device) -> None:
        """
        Args:
            task: a model and what it is trained for.
            run: where it lives, with its configuration.
            device: of the model.

        Raises:
            UserError: if the device cannot compute in the precision asked for.
        """
        config = run.config
        self.task = task
        self.run = run
        self.device = device
        self.data = config.data
        self.settings = config.run
        self.batch_size, self.accumulate = config.train.batch_size, config.train.accumulate
        self.clip_norm = config.optim.clip_norm
        self.precision = Precision(config.train.precision, device)
        self.schedule = build_schedule(config.optim, config.train, task.steps_per_epoch)
        capturable = not task.graph_obstacle
        optimizer = build_optimizer(task.model, config.optim, task.lr_scale, capturable=capturable)
        self.state = TrainState(task.model, optimizer, self.precision.scaler)
        self.unreadable = UnreadableFiles(
            self.state.unreadable, task.files, config.data.max_unreadable, write=self._write_unreadable
        )

    def resume(self) -> str | None:
        """Bring the state to the checkpoint that the configuration asks for; return its path, None when fresh.

        Raises:
            UserError: if it does not load, is of another run or of other data.
        """
        found = None
        with distributed.raise_together():
            if distributed.is_main():
                found = self.run.find_checkpoint(self.task.name)
        found = distributed.broadcast(found)  # the directory need not be on every machine
        if found is None:
            return None
        path, content = found
        now = self.task.data_fingerprint
        with distributed.raise_together():
            if content["data"] != now:
                raise UserError(
                    f"{path}: the training data changed since ({content['data']} then, {now} now): "
                    "restore them, or choose another run.dir"
                )
            restore(self.state, content, path)
            self.task.restore(content, path)
        return str(path)

    def require_space(self) -> str:
        """Make sure that the checkpoints which are to come fit on the disk; return in words what they take.

        Raises:
            UserError: if they do not fit.
        """
        settings, left = self.settings, self.schedule.steps - self.state.step
        writes = math.ceil(left / self.task.steps_per_epoch)
        if settings.checkpoint_every_steps is not None:
            writes += left // settings.checkpoint_every_steps
        size = checkpoint_size(self.state, self.task.entries())
        return require_space(self.run.checkpoints, size, keep_last=settings.keep_last, writes=writes)

    def run_to_end(
        self,
        say_beginning: Callable[[RunDirectory, Schedule, str | None, int], None],
        say_end: Callable[[RunDirectory], None],
        start: str | None,
    ) -> bool:
        """Do the steps that are left, and say so; False if a signal asked to stop before the last one.

        Args:
            say_beginning: gets the directory, the schedule, `start` and the steps done.
            say_end: gets the directory; called after the last step.
            start: what is gone on or started from, if there is anything to say of that.

        Raises:
            UserError: if the checkpoints will not fit on the disk, and as `train`.
        """
        with distributed.raise_together():
            if distributed.is_main():
                space = self.require_space()
                say_beginning(self.run, self.schedule, start, self.state.step)
                if self.precision.remark:
                    print(self.precision.remark)
                print(space, flush=True)
        complete = self.train()
        if distributed.is_main():
            if complete:
                say_end(self.run)
            else:
                say_stopped(self.run, self.state.step)
        return complete

    def train(self) -> bool:
        """Do the steps that are left; False if a signal asked to stop before the last one.

        Raises:
            UserError: for whatever stops a run; its checkpoints stay.
            KeyboardInterrupt: for a second Ctrl-C, saying what is lost.
        """
        self.writer = CheckpointWriter(self.run.checkpoints, self.settings.keep_last)
        stop_request = StopRequest(answer=distributed.is_main())
        try:
            with self._reports(), self.precision.products(), stop_request as stop, named_failures(), self.writer:
                complete = self._take_steps(stop)
                with distributed.raise_together():
                    self.writer.wait()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._lost()) from None
        return complete

    def _lost(self) -> str:
        """What is gone when a run is broken off."""
        saved = list_checkpoints(self.run.checkpoints, up_to=self.state.step)
        lost = self.state.step - (step_of(saved[-1]) if saved else 0)
        since = f"since {saved[-1]}" if saved else "since the beginning"
        steps = f"{lost} step{'' if lost == 1 else 's'} {since} lost" if lost else f"nothing is lost {since}"
        return f"{steps}; the same command goes on from there"

    @contextmanager
    def _reports(self) -> Iterator[None]:
        self.log: RunLog | None = None
        """Of the main process."""
        with distributed.raise_together():
            if distributed.is_main():
                self.run.create()
                write_text(self.run.environment, describe_environment(self.device))
                self.log = RunLog(
                    self.run,
                    steps=self.schedule.steps,
                    steps_per_epoch=self.task.steps_per_epoch,
                    first_step=self.state.step,
                    log_every=self.settings.log_every_steps,
                    print_every=self.settings.print_every_steps,
                    workers=self.data.workers,
                )
        try:
            yield
        finally:
            if self.log is not None:
                self.log.close()

    def _take_steps(self, stop: StopRequest) -> bool:
        seed = self.settings.seed
        self.failure: UserError | None = None
        """What the other processes are to be told of."""
        self.stepper = Stepper(
            self.task, self.state, self.schedule, self.precision, seed=seed, clip_norm=self.clip_norm
        )
        if not self.task.graph_obstacle:
            self.stepper.compute = GraphedSteps(self.stepper.compute, self.state).take
        self.taken: deque[tuple[Taken, float]] = deque()
        """Steps that are not reported yet, with the seconds that their images were waited for."""
        source = iter(self.task.batches(self._share(), self.unreadable.most))
        while self.state.step < self.schedule.steps:
            started = time.perf_counter()
            batches = self._fetch(source)
            data_wait = time.perf_counter() - started
            prepared = self.stepper.prepare(batches)
            stopping, targets = self._exchange(stop, batches, prepared)
            if stopping:
                self._report_all()
                self._save()
                return False
            self.taken.append((self.stepper.take(prepared, targets), data_wait))
            self._after_step()
        # A run that was killed between its last checkpoint and its pictures gets them when it is started again.
        with distributed.raise_together():
            self._draw()
        return True

    def _share(self) -> Share:
        """What is left of the run's samples for this process."""
        return Share(
            self.batch_size,
            self.schedule.steps,
            self.settings.seed,
            first_step=self.state.step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            accumulate=self.accumulate,
            drop_last=self.data.drop_last,
        )

    @contextmanager
    def _kept_failure(self) -> Iterator[None]:
        """An error within is told to the other processes in the next exchange."""
        try:
            with named_failures():
                yield
        except UserError as error:
            self.failure = self.failure or error

    def _fetch(self, source: Iterator[Batch]) -> list[Batch]:
        """This process's micro-batches of the next step, while a GPU computes the one before."""
        with self._kept_failure():
            self.writer.check()
            return [next(source) for _ in range(self.accumulate)]
        return []

    def _exchange(self, stop: StopRequest, batches: list[Batch], prepared: Prepared) -> tuple[bool, float]:
        """The one exchange of a step besides that of gradients; reports the last step that is done.

        Returns:
            Whether to stop, and how many targets the step has.
        """
        # Of a GPU the newest step is still under way.
        done = len(self.taken) > (self.device.type == "cuda")
        loss, norm = self.taken[0][0].values.read() if done else (0.0, 0.0)
        records = [record for batch in batches for record in batch.unreadable]
        stops, failures, unreadable, empty, targets, loss = distributed.all_reduce(
            stop.signal is not None,
            self.failure is not None,
            len(records),
            not all(batch.indices for batch in batches),
            prepared.targets,
            loss,
        )
        if failures:
            raise distributed.first_of_all(self.failure) from None
        if unreadable:
            note_gathered(self.unreadable, records)
        if empty:
            what = f"none of the images of step {self.state.step + 1} is readable: run `spark-me data check`"
            raise distributed.shared(UserError(what))
        if done:
            self._report(loss, norm)
        return stops > 0, targets

    def _report(self, loss: float, norm: float) -> None:
        """Report the oldest step that is not yet, by its loss over all processes."""
        taken, data_wait = self.taken.popleft()
        self.stepper.require_finite(taken, loss, norm)
        self.loss = loss
        """Of the last step that was reported."""
        if self.log is not None:
            values = {
                "loss": loss,
                "gradient_norm": norm,
                "lr": self.schedule.lr(taken.step - 1),
                "weight_decay": self.schedule.decay(taken.step - 1),
                "data_wait": data_wait,
                "memory_gib": self._peak_memory(),
            }
            with self._kept_failure():
                self.log.step(taken.step, values, self.batch_size)

    def _report_all(self) -> None:
        """Wait for all steps and report them."""
        while self.taken:
            own, norm = self.taken[0][0].values.read()
            (loss,) = distributed.all_reduce(own)
            self._report(loss, norm)
        with distributed.raise_together():
            if self.failure is not None:
                raise self.failure

    def _after_step(self) -> None:
        step, every = self.state.step, self.settings.checkpoint_every_steps
        # The last epoch of a run whose length is given in steps may be cut short.
        if step % self.task.steps_per_epoch == 0 or step == self.schedule.steps:
            self._report_all()
            self._end_epoch()
        elif every is not None and step % every == 0:
            self._report_all()
            self._save()

    def _end_epoch(self) -> None:
        settings, last = self.settings, self.state.step == self.schedule.steps
        epoch = math.ceil(self.state.step / self.task.steps_per_epoch)
        # Measured before the checkpoint, or a kill between the two would leave a gap in the curve.
        evaluate = last or epoch % settings.evaluate_every_epochs == 0
        measured = self.task.evaluate(self.unreadable, self.precision.autocast) if evaluate else {}
        value = measured.get(self.task.best_by)
        best = value is not None and self._beats(value, self.state.best)
        if best:
            self.state.best = value
        with distributed.raise_together():
            if self.log is not None:
                self.log.epoch(self.state.step, self.loss, measured)
        self._save(best=best)
        with distributed.raise_together():
            if not last and epoch % settings.picture_every_epochs == 0:
                self._draw()
            if self.log is not None:
                self.log.pause()

    def _beats(self, value: float, best: float | None) -> bool:
        if not math.isfinite(value):
            return False
        if best is None or not math.isfinite(best):
            return True
        return value > best if self.task.best_is_highest else value < best

    def _save(self, *, best: bool = False) -> None:
        with distributed.raise_together():
            if distributed.is_main():
                require_finite(self.state)
                content = checkpoint_of(
                    self.state,
                    task=self.task.name,
                    config=to_yaml(self.run.config),
                    batch_size=self.batch_size,
                    steps_per_epoch=self.task.steps_per_epoch,
                    data_fingerprint=self.task.data_fingerprint,
                    entries=self.task.entries(),
                )
                self.writer.save(content, best=best)

    def _draw(self) -> None:
        if self.log is not None:
            self.task.draw(self.run, self.state.step)
            if self.run.picture.is_file():
                self.log.picture(self.state.step, self.run.picture)

    def _write_unreadable(self, text: str) -> None:
        if distributed.is_main():
            write_text(self.run.unreadable, text)

    def _peak_memory(self) -> float:
        """GiB: of the GPU, or of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
