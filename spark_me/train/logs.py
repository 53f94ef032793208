"""What a run tells: lines and a progress bar for the eye, TensorBoard and metrics.jsonl for later."""

import json
import math
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard import summary
from tqdm import tqdm

import spark_me
from spark_me.config.training import OptimConfig, TrainConfig
from spark_me.errors import printable
from spark_me.files import write_text, writing
from spark_me.train import distributed
from spark_me.train.checkpoint import checkpoint_path
from spark_me.train.run_directory import RunDirectory
from spark_me.train.schedules import Schedule, describe_peak


class MetricsFile:
    """Appends to a metrics file; lines of steps that a resumed run will do again are dropped first."""

    def __init__(self, path: Path, first_step: int) -> None:
        entries, damaged = _read_entries(path)
        if damaged:
            print(f"spark-me: {path}: left out {damaged} lines that are damaged")
        kept = [entry for entry in entries if entry["step"] <= first_step]
        write_text(path, "".join(_line_of(entry) for entry in kept))
        self.path = path

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; it is on its way to the disk when this returns."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(_line_of(entry))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All good lines of a metrics file; none if there is no file. Values that are null or no numbers are left out."""
    return _read_entries(path)[0]


def _read_entries(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The good lines, and how many others there are. A run's curve is worth less than the run, which goes on."""
    if not path.is_file():
        return [], 0
    entries = [_entry(line) for line in path.read_bytes().split(b"\n") if line]
    good = [entry for entry in entries if entry is not None]
    return good, len(entries) - len(good)


def _entry(line: bytes) -> dict[str, Any] | None:
    """A kill or a power cut may leave half a line, or one of zeros."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return None
    return {name: value for name, value in entry.items() if type(value) in (int, float)}


def _line_of(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


EVENT_VERSION = "brain.Event:2"
"""Of the file's format, which its first record says."""


class Board:
    """Scalars and pictures by step, each written at once: torch's writer has a thread, whose errors nobody catches."""

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], None] = print) -> None:
        """Begin a file.

        Args:
            folder: of the event files; made if missing.
            first_step: events of it and of later ones, in files from before, are hidden.
            say: gets one line if the file cannot be written; all later calls do nothing.
        """
        self._folder, self._say = folder, say
        self._records: RecordWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self._records = RecordWriter((folder / name).open("ab"))
        except OSError as error:
            self._stop(error)
        self._write(Event(file_version=EVENT_VERSION))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        self._write(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)])))

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture, uint8 [H, W, 3]."""
        self._write(Event(step=step, summary=summary.image(name, pixels, dataformats="HWC")))

    def close(self) -> None:
        """Finish the file."""
        if self._records is not None:
            self._records.close()  # all is written already

    def _write(self, event: Event) -> None:
        if self._records is None:
            return
        event.wall_time = time.time()
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            self._stop(error)

    def _stop(self, error: OSError) -> None:
        if self._records is not None:
            with suppress(OSError):  # it tries to write the rest once more
                self._records.close()
            self._records = None
        reason = error.strerror or error
        self._say(
            printable(f"spark-me: {self._folder}: TensorBoard's file cannot be written ({reason}): the run goes on")
        )


LARGEST_WAIT = 0.2
"""Share of the time that may go by waiting before it is said."""
STEPS_OF_WAIT = 10
"""Steps that are measured before."""


class DataWait:
    """The share of waiting in the time since the epoch began; says once an epoch that it is large."""

    def __init__(self, workers: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            workers: `data.workers`, for the message.
            clock: seconds that pass.
        """
        self.workers = workers
        self._clock = clock
        self._said = False
        self._start: float | None = None

    def add(self, seconds: float) -> str | None:
        """Note that a step, now over, waited so many seconds; return what there is to say."""
        if self._start is None:  # the first step also starts the workers
            self._start, self._waited, self._steps = self._clock(), 0.0, 0
            return None
        self._waited += seconds
        self._steps += 1
        share = self._waited / max(self._clock() - self._start, 1e-9)
        if self._said or self._steps < STEPS_OF_WAIT or share <= LARGEST_WAIT:
            return None
        self._said = True
        return (
            f"the loader is the bottleneck: {share:.0%} of the time is spent waiting for images; "
            f"raise data.workers (now {self.workers}) or shrink the images"
        )

    def begin_epoch(self) -> None:
        """Forget what was: between epochs there is more than training."""
        self._said = False
        self._start = None


# tqdm puts a comma before the postfix.
BAR = "{desc} |{bar}| step {n_fmt}/{total_fmt}{postfix} · {remaining} left"


class RunLog:
    """Reports of the main process."""

    def __init__(
        self,
        run: RunDirectory,
        *,
        steps: int,
        steps_per_epoch: int,
        first_step: int,
        log_every: int,
        print_every: int,
        workers: int,
    ) -> None:
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.epochs = math.ceil(steps / steps_per_epoch)
        self.log_every = log_every
        self.print_every = print_every
        self._metrics = MetricsFile(run.metrics, first_step)
        # What is no terminal, a file of a cluster's job for example, gets lines instead of a bar.
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            desc=self._describe(first_step),
            bar_format=BAR,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._board = Board(run.tensorboard, first_step + 1, self._bar.write)
        self._rate = _Rate()
        self._pace = _Pace(steps - first_step)
        self._wait = DataWait(workers)

    def step(self, step: int, values: dict[str, float], images: int) -> None:
        """Report a step: `step` done so far, its values by name, the images it took."""
        rate, data_wait = self._rate.add(images, values["data_wait"])
        state = f"loss {values['loss']:.4f} · {rate:.0f} images/s"
        self._bar.set_postfix_str(state, refresh=False)
        self._bar.set_description_str(self._describe(step - 1), refresh=False)
        self._bar.update()
        expected = self._pace.add()
        if expected is not None:
            self._bar.write(expected)
        # The end of an epoch has a line of its own.
        if self._bar.disable and step % self.print_every == 0 and step % self.steps_per_epoch and step != self.steps:
            left = tqdm.format_interval(self._pace.seconds_left)
            print(f"{self._describe(step - 1)} · step {step}/{self.steps} · {state} · {left} left", flush=True)
        slow = self._wait.add(values["data_wait"])
        if slow is not None:
            self._bar.write(f"spark-me: {slow}")
        if step % self.log_every == 0 or step % self.steps_per_epoch == 0 or step == self.steps:
            self._write(step, {**values, "data_wait": data_wait, "images_per_second": rate})
            self._rate = _Rate()

    def epoch(self, step: int, loss: float, measured: dict[str, float]) -> None:
        """Report the end of an epoch, with the loss of its last step and what was measured on held-out data."""
        if measured:
            self._write(step, measured)
        values = [
            f"{name.replace('held_out_', 'held-out ')} {value:.4f}"
            for name, value in {"loss": loss, **measured}.items()
        ]
        self._bar.write(" · ".join([self._describe(step - 1), f"step {step}", *values]))

    def picture(self, step: int, path: Path) -> None:
        """Show a picture file in TensorBoard."""
        with Image.open(path, formats=["PNG"]) as picture:
            self._board.add_image(path.stem, np.asarray(picture.convert("RGB")), step)

    def pause(self) -> None:
        """Leave what is not training, such as the end of an epoch, out of the rate."""
        self._wait.begin_epoch()
        self._rate = _Rate()

    def close(self) -> None:
        """Finish the bar and the event file."""
        self._board.close()
        self._bar.close()

    def _describe(self, steps_before: int) -> str:
        return f"epoch {min(steps_before // self.steps_per_epoch + 1, self.epochs)}/{self.epochs}"

    def _write(self, step: int, values: dict[str, float]) -> None:
        entry: dict[str, Any] = {"step": step, "epoch": step / self.steps_per_epoch, **values}
        # JSON knows no infinity; a step that fp16's scaler leaves out has such a gradient.
        self._metrics.append({name: value if math.isfinite(value) else None for name, value in entry.items()})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


class _Pace:
    """The time that steps take, and with it the time that is left."""

    STEPS, SECONDS = 5, 10
    """So much of it is measured before the expected time is said, whichever comes first."""
    LEAST = 3
    """Steps that are measured all the same: one by itself may be slow for a reason of its own."""
    WORTH_SAYING = 30
    """Seconds."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = -1  # the first step also starts the workers, and is not measured
        self._said = False
        self.seconds_left = 0.0

    def add(self) -> str | None:
        """Note that a step is over; return what there is to say of the time that is left, once."""
        now = time.perf_counter()
        self._done += 1
        if self._done == 0:
            self._start = now
            return None
        seconds = (now - self._start) / self._done
        left = self._steps - self._done - 1
        self.seconds_left = left * seconds
        enough = self._done >= self.STEPS or now - self._start >= self.SECONDS
        if self._said or self._done < self.LEAST or not enough:
            return None
        self._said = True
        if self.seconds_left < self.WORTH_SAYING:
            return None
        return f"expect {duration_text(self.seconds_left)}: {left} more steps of {seconds:.2g} s, and measuring between"


def duration_text(seconds: float) -> str:
    """A time for people: 12 min, 3 h 20 min, 5 days 3 h."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} days {minutes % 1440 // 60} h"


class _Rate:
    """Images per second and mean seconds of waiting a step, since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._images = self._steps = 0
        self._waited = 0.0

    def add(self, images: int, data_wait: float) -> tuple[float, float]:
        self._images += images
        self._steps += 1
        self._waited += data_wait
        return self._images / (time.perf_counter() - self._start), self._waited / self._steps


def size_text(train: TrainConfig, schedule: Schedule, optim: OptimConfig) -> str:
    """How long a run is, its batch with how it is split if it is, and its highest learning rate."""
    epochs = "" if train.epochs is None else f"{train.epochs} epochs, "
    processes = distributed.world_size()
    size, parts = train.batch_size, processes * train.accumulate
    batch = str(size) if parts == 1 else f"{size} ({processes} × {train.accumulate} × {size // parts})"
    return f"{epochs}{schedule.steps} steps of {batch}, {describe_peak(optim, size)}"


def place_text(device: torch.device) -> str:
    """Where a run computes."""
    processes = distributed.world_size()
    return str(device) if processes == 1 else f"{processes} processes ({device.type})"


def say_start(start: str | None, run: RunDirectory, steps_done: int, steps: int) -> None:
    """Where a run lives, and from where it goes on.

    Args:
        start: the checkpoint it goes on from, or what it starts from, if there is anything to say of that.
        run: its directory.
        steps_done: up to there.
        steps: in all.
    """
    from_where = "" if start is None else f" from {printable(start)}"
    if steps_done == 0:
        print(f"starting{from_where} in {printable(str(run.path))}")
    elif steps_done < steps:
        print(f"going on{from_where}, {steps_done} steps done")
    else:
        print(f"this run is complete: {printable(str(start))} is its last step (for another, choose another run.dir)")


def say_stopped(run: RunDirectory, steps_done: int) -> None:
    """How to go on with a run that was asked to stop before its end."""
    how = "" if run.config.run.resume == "auto" else " with run.resume=auto"
    where = printable(str(checkpoint_path(run.checkpoints, steps_done)))
    print(f"stopped as asked, {steps_done} steps done and saved in {where}: repeat the command{how} to go on")


def command_text(name: str) -> str:
    """How to call a command of this environment from here, activated or not; `spark-me` as it was called."""
    script = Path(sys.argv[0])
    if name == "spark-me" and script.suffix == ".py" and script.name != "__main__.py":  # one's own, with its encoder
        return f"{command_text('python')} {quoted(script)}"
    return name if shutil.which(name) else quoted(os.path.relpath(Path(sys.executable).with_name(name)))


def configuration_text(task: str) -> str:
    """Where the small configuration of a task lies, as seen from here."""
    path = Path(spark_me.__file__).parents[1] / "configs" / task / "small.yaml"
    return quoted(os.path.relpath(path)) if path.is_file() else f"configs/{task}/small.yaml"


def quoted(path: str | Path) -> str:
    """A path as a shell takes it, and a terminal shows it."""
    text = str(path)
    if text.isprintable():
        return shlex.quote(text)
    # What bash and zsh write for such names.
    characters = (
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\{byte:03o}" for byte in os.fsencode(text)
    )
    return f"$'{''.join(characters)}'"
