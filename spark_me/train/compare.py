"""`spark-me compare`: what pretraining is worth, by fine-tuning from it and from scratch on parts of the labels."""

import contextlib
import copy
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from spark_me.config import FinetuneConfig
from spark_me.config_finetune import SCRATCH
from spark_me.data.class_folders import balanced_part, find_labelled
from spark_me.errors import UserError
from spark_me.files import writing
from spark_me.train import distributed
from spark_me.train.comparison import PRETRAINED, STARTS, Comparison, Trial
from spark_me.train.comparison_report import draw, format_markdown, format_table
from spark_me.train.finetune import finetune
from spark_me.train.metrics import read_metrics
from spark_me.train.run_directory import RunDirectory
from spark_me.train.starting_weights import locate, settle_images


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
    settle_images(config, config.weights, "weights=")
    with distributed.agreed():
        comparison = Comparison(Path(config.run.dir), config, weights)
        all_images = find_labelled(config.data, config.run.seed).train
    for fraction, seed, start in _trials(config, fractions, seeds):
        trial = comparison.find(start, fraction, seed)
        if trial is None:
            top1 = _run(_config_of(config, start, fraction, seed))
            if top1 is None:
                if distributed.is_main():
                    print("stopped as asked: repeat the command to go on")
                return
            trial = Trial(start, fraction, seed, len(balanced_part(all_images, fraction, seed).paths), top1)
            if distributed.is_main():
                comparison.add(trial)
        if distributed.is_main():
            shutil.rmtree(RunDirectory(_folder(config, start, fraction, seed)).checkpoints, ignore_errors=True)
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
    own.run.dir = str(_folder(config, start, fraction, seed))
    return own


def _folder(config: FinetuneConfig, start: str, fraction: float, seed: int) -> Path:
    return Path(config.run.dir) / f"{start}_{fraction:g}_seed{seed}"


def _run(config: FinetuneConfig) -> float | None:
    """Top-1 of one run, what it says in its own output.txt; None if it was asked to stop."""
    run = RunDirectory(config.run.dir)
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
    print(format_table(rows))
    markdown, picture = comparison.folder / "comparison.md", comparison.folder / "comparison.png"
    format_markdown(rows, markdown)
    draw(rows, picture)
    print(f"look at   {picture}  {markdown}")
