"""`spark-me pretrain`: puts a run together from its configuration, or together again from a checkpoint."""

from spark_me.config import Config
from spark_me.data.files import find_files
from spark_me.train import distributed
from spark_me.train.checkpoint import checkpoint_path
from spark_me.train.initial_weights import start_from
from spark_me.train.messages import say_beginning, say_end, say_stopped
from spark_me.train.precision import pick_device
from spark_me.train.pretraining import Pretraining
from spark_me.train.run_directory import RunDirectory
from spark_me.train.trainer import Trainer


def pretrain(config: Config) -> None:
    """Run a configuration to its end, from the newest checkpoint of its directory if there is one.

    With several processes, call it in each, within `distributed.process_group()`.

    Raises:
        UserError: for anything in the configuration, the data or the directory that stands in the way.
        SystemExit: on processes besides the main one, in its place.
    """
    run = RunDirectory(config.run.dir)
    with run.owned():
        _pretrain(config, run)


def _pretrain(config: Config, run: RunDirectory) -> None:
    with distributed.agreed():
        if distributed.is_main():
            run.check(config)
        device = pick_device(config.run.device)
        files = find_files(config.data, config.model.in_channels)
        task = Pretraining(config, files, device)
        trainer = Trainer(task, config, run, device)
    resumed_from = trainer.resume()
    if resumed_from is None and config.model.init_from is not None:
        start_from(config.model.init_from, task.model, config, run)
    with distributed.agreed():
        if distributed.is_main():
            space = trainer.require_space()
            say_beginning(config, task.model, files, trainer.schedule, device, resumed_from, trainer.state.step)
            print(space, flush=True)
    complete = trainer.train()
    if distributed.is_main():
        if complete:
            say_end(config, run)
        else:
            say_stopped(config, trainer.state.step, checkpoint_path(run.checkpoints, trainer.state.step))
