"""Results of a comparison of pretrained weights with scratch, kept as they come in."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from spark_me.config import FinetuneConfig, differing_keys, parse_config, to_yaml
from spark_me.errors import UserError
from spark_me.files import sha256_of, write_json, writing

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
