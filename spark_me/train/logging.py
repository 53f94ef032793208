"""What a run tells: a progress bar for the eye, TensorBoard and metrics.jsonl for later."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from spark_me.train.board import Board
from spark_me.train.data_wait import DataWait
from spark_me.train.metrics import MetricsFile
from spark_me.train.run_directory import RunDirectory

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
