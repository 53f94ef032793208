"""`model.init_from`: weights that a run starts from, of any known layout, and the record of what they were."""

from torch import nn

from spark_me.config import Config
from spark_me.errors import printable
from spark_me.files import sha256_of, write_json
from spark_me.train import distributed
from spark_me.train.run_directory import RunDirectory
from spark_me.train.starting_weights import locate
from spark_me.weights.transfer import load_weights


def start_from(source: str, model: nn.Module, config: Config, run: RunDirectory) -> None:
    """Load weights into a model that has not been trained yet; say and record what was found.

    Every process calls it and reads the file.

    Args:
        source: name of published weights, path or URL; of a whole model, or of its encoder alone.
        model: the run's SparK model.
        config: of the run.
        run: where initial_weights.json is written.

    Raises:
        UserError: if they cannot be had, or are of another encoder.
    """
    path = locate(source, "model.init_from=")
    with distributed.agreed():
        loaded = load_weights(model, path)
    with distributed.agreed():
        if distributed.is_main():
            run.create(config)
            record = {"source": source, "sha256": sha256_of(path), **loaded._asdict()}
            write_json(run.initial_weights, record)
            print(f"weights from {printable(source)}: {loaded.encoder}, {loaded.layout} layout")
