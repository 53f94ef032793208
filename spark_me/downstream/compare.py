"""`spark-me compare`: what pretraining is worth, by fine-tuning from it and from scratch on parts of the labels."""

import contextlib
import copy
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from spark_me.config.loading import differing_keys, parse_config, to_yaml
from spark_me.config.tasks import SCRATCH, FinetuneConfig
from spark_me.data.class_folders import balanced_part, find_labelled
from spark_me.downstream.finetune import finetune
from spark_me.errors import UserError
from spark_me.files import sha256_of, write_json, write_text, writing
from spark_me.tables import markdown_table, text_table
from spark_me.train import distributed
from spark_me.train.logs import read_metrics
from spark_me.train.plots import save_figure
from spark_me.train.run_directory import RunDirectory
from spark_me.train.starting_weights import locate, settle_images

PRETRAINED, FROM_SCRATCH = "pretrained", "scratch"
STARTS = (PRETRAINED, FROM_SCRATCH)


@dataclass(frozen=True)
class Trial:
    """One fine-tuning run."""

    start: str
    """One of `STARTS`."""
    fraction: float
    """Share of the training images."""
    seed: int
    images: int
    """How many that are."""
    top1: float
    """On the validation images after the last step, from 0 to 1."""


@dataclass(frozen=True)
class Row:
    """All runs with one part of the labels; accuracies of both starts in the order of the seeds."""

    fraction: float
    images: int
    pretrained: list[float]
    scratch: list[float]

    @property
    def gains(self) -> list[float]:
        """Of each seed: how much higher top-1 is with pretraining."""
        return [with_it - without for with_it, without in zip(self.pretrained, self.scratch)]

    @property
    def verdict(self) -> str:
        """Whether the seeds' ranges of the two starts lie apart."""
        if min(self.pretrained) > max(self.scratch):
            return "better"
        return "worse" if max(self.pretrained) < min(self.scratch) else "overlap"


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


class Comparison:
    """The finished runs of a folder, in its comparison.json.

    Attributes:
        folder: belongs to one configuration and one file of weights.
    """

    def __init__(self, folder: Path, config: FinetuneConfig, weights: Path) -> None:
        """
        Raises:
            UserError: if the folder holds a comparison of another configuration or other weights, or an unreadable one.
        """
        self.folder = folder
        self._path = folder / "comparison.json"
        self._config = config
        self._digest = sha256_of(weights)
        self._trials: list[Trial] = []
        if self._path.is_file():
            self._read()

    def find(self, start: str, fraction: float, seed: int) -> Trial | None:
        """The finished run, if there is one."""
        wanted = (start, fraction, seed)
        return next((trial for trial in self._trials if (trial.start, trial.fraction, trial.seed) == wanted), None)

    def add(self, trial: Trial) -> None:
        """Record a finished run; it is on the disk when this returns."""
        self._trials.append(trial)
        trials = [asdict(each) for each in self._trials]
        content = {"config": to_yaml(self._config), "weights_sha256": self._digest, "trials": trials}
        with writing(self._path):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path, content)

    def rows(self, fractions: Sequence[float], seeds: Sequence[int]) -> list[Row]:
        """One for each part of the labels, all of whose runs are finished."""
        rows = []
        for fraction in fractions:
            both = [[self._finished(start, fraction, seed) for seed in seeds] for start in STARTS]
            pretrained, scratch = ([trial.top1 for trial in trials] for trials in both)
            rows.append(Row(fraction, both[0][0].images, pretrained, scratch))
        return rows

    def _finished(self, start: str, fraction: float, seed: int) -> Trial:
        trial = self.find(start, fraction, seed)
        assert trial is not None, f"{start} with {fraction} of the labels, seed {seed}, has not run"
        return trial

    def _read(self) -> None:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            other = parse_config(content["config"], str(self._path), FinetuneConfig)
            self._trials = [Trial(**trial) for trial in content["trials"]]
            figures = [(trial.fraction, trial.seed, trial.images, trial.top1) for trial in self._trials]
            if not all(type(figure) in (int, float) for trial in figures for figure in trial):
                raise TypeError("figures that are no numbers")
            digest = content["weights_sha256"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, UserError) as error:
            raise UserError(f"{self._path}: cannot be read ({error}): choose another run.dir") from None
        different = differing_keys(other, self._config)
        if different:
            raise UserError(
                f"{self.folder}: holds a comparison of another configuration ({'; '.join(different)}): "
                "choose another run.dir, or go back to that configuration"
            )
        if digest != self._digest:
            raise UserError(f"{self.folder}: weights={self._config.weights} changed since: choose another run.dir")


HEADER = ("labels", "images", PRETRAINED, FROM_SCRATCH, "difference", "ranges of the seeds")
SIDES = ">" * len(HEADER)
VERDICTS = {"better": "apart", "worse": "apart, scratch is better", "overlap": "overlap"}
COLOURS = {PRETRAINED: "tab:blue", FROM_SCRATCH: "tab:orange"}


def cells_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """What the table says, its header first."""
    return [HEADER, *map(_cells, rows)]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot top-1 over the share of the labels: means, every run as a point."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for start in (PRETRAINED, FROM_SCRATCH):
        accuracies = [_of(row, start) for row in rows]
        shares = [row.fraction for row in rows]
        axes.plot(shares, [mean(values) for values in accuracies], color=COLOURS[start], marker="o", label=start)
        for share, values in zip(shares, accuracies):
            axes.plot([share] * len(values), values, ".", color=COLOURS[start], alpha=0.5)
    axes.set_xscale("log")
    axes.set_xticks([row.fraction for row in rows], [f"{_percent(row)}\n{row.images} images" for row in rows])
    axes.minorticks_off()
    axes.set(xlabel="share of the labels", ylabel="top-1 on the validation images", title="Fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _cells(row: Row) -> tuple[str, ...]:
    accuracies = [_spread(_of(row, start), "%") for start in (PRETRAINED, FROM_SCRATCH)]
    return _percent(row), str(row.images), *accuracies, _spread(row.gains, "", "+"), VERDICTS[row.verdict]


def _percent(row: Row) -> str:
    return f"{100 * row.fraction:.4g} %"


def _of(row: Row, start: str) -> list[float]:
    return row.pretrained if start == PRETRAINED else row.scratch


def _spread(values: Sequence[float], unit: str, sign: str = "") -> str:
    """Mean and standard deviation in percent or percentage points."""
    spread = deviation(values)
    text = f"{100 * mean(values):{sign}.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")
    return f"{text} {unit}".rstrip()


def compare(config: FinetuneConfig, fractions: Sequence[float], seeds: int) -> None:
    """Fine-tune from `config.weights` and from random weights, with every part of the labels and every seed.

    All runs have the same steps, schedule and images to validate on. The seed draws the part of the labels, the order
    of images and the random weights, alike for both starts. Each run has a folder in `config.run.dir` for its
    configuration, metrics and curves; its checkpoints go once its accuracy, that after the last step, is recorded.

    Args:
        config: of each run, but for `weights: none`, `data.fraction` and `run.seed`.
        fractions: shares of the training images in (0, 1].
        seeds: how many, counted from `run.seed`.

    Raises:
        UserError: for anything that stands in the way of a run; finished ones are not done again next time.
    """
    _check(config, fractions, seeds)
    weights = locate(config.weights, "weights=")
    settle_images(config.data, config.model.in_channels, config.weights, "weights=")
    with distributed.raise_together():
        comparison = Comparison(Path(config.run.dir), config, weights)
        all_images = find_labelled(config.data, config.run.seed).train
    for fraction, seed, start in _trials(config, fractions, seeds):
        trial = comparison.find(start, fraction, seed)
        own = _config_of(config, start, fraction, seed)
        if trial is None:
            top1 = _run(own)
            if top1 is None:
                if distributed.is_main():
                    print("stopped as asked: repeat the command to go on")
                return
            trial = Trial(start, fraction, seed, len(balanced_part(all_images, fraction, seed).paths), top1)
            if distributed.is_main():
                comparison.add(trial)
        if distributed.is_main():
            shutil.rmtree(RunDirectory(own).checkpoints, ignore_errors=True)
            labels = f"{100 * fraction:.4g} % of the labels ({trial.images} images)"
            print(f"{labels}, seed {seed}, {start}: top-1 {trial.top1:.2%}", flush=True)
    if distributed.is_main():
        _report(comparison, fractions, range(config.run.seed, config.run.seed + seeds))


def _check(config: FinetuneConfig, fractions: Sequence[float], seeds: int) -> None:
    if config.weights == SCRATCH:
        raise UserError("weights=none: name the pretrained weights to compare with scratch")
    if config.run.resume != "auto":
        raise UserError(f"run.resume={config.run.resume}: a comparison goes on by itself: leave it out")
    if config.data.fraction != 1:
        raise UserError(f"data.fraction={config.data.fraction:g}: say by --fractions which parts of the labels to use")
    wrong = [fraction for fraction in fractions if not 0 < fraction <= 1]
    if wrong or not fractions:
        shown = " ".join(f"{fraction:g}" for fraction in wrong)
        raise UserError(f"--fractions {shown}: give shares of the training images above 0 and up to 1")
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: give at least one")


def _trials(config: FinetuneConfig, fractions: Sequence[float], seeds: int) -> Iterator[tuple[float, int, str]]:
    for fraction in fractions:
        for seed in range(config.run.seed, config.run.seed + seeds):
            for start in STARTS:
                yield fraction, seed, start


def _config_of(config: FinetuneConfig, start: str, fraction: float, seed: int) -> FinetuneConfig:
    own = copy.deepcopy(config)
    own.weights = config.weights if start == PRETRAINED else SCRATCH
    own.data.fraction = fraction
    own.run.seed = seed
    own.run.dir = str(Path(config.run.dir) / f"{start}_{fraction:g}_seed{seed}")
    return own


def _run(config: FinetuneConfig) -> float | None:
    """Top-1 of one run, what it says in its own output.txt; None if it was asked to stop."""
    run = RunDirectory(config)
    with _quiet(run.path):
        complete = finetune(config)
    if not complete:
        return None
    measure = "held_out_top1" if config.train.ema is None else "held_out_ema_top1"
    top1 = [entry[measure] for entry in read_metrics(run.metrics) if measure in entry]
    return top1[-1] if top1 else 0.0  # the folder need not be on every machine; the main process's counts


@contextlib.contextmanager
def _quiet(folder: Path) -> Iterator[None]:
    """Collect what the main process prints; the bar stays on the screen."""
    if not distributed.is_main():
        yield
        return
    path = folder / "output.txt"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    with file, contextlib.redirect_stdout(file):
        yield


def _report(comparison: Comparison, fractions: Sequence[float], seeds: Sequence[int]) -> None:
    rows = comparison.rows(fractions, seeds)
    print(text_table(cells_of(rows), SIDES))
    markdown, picture = comparison.folder / "comparison.md", comparison.folder / "comparison.png"
    write_text(markdown, markdown_table(cells_of(rows), SIDES) + "\n")
    draw(rows, picture)
    print(f"look at   {picture}  {markdown}")
