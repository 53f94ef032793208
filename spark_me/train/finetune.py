"""`spark-me finetune`: puts a run together from its configuration, or together again from a checkpoint."""

from spark_me.config import FinetuneConfig
from spark_me.data.class_folders import find_labelled
from spark_me.train import distributed
from spark_me.train.checkpoint import checkpoint_path
from spark_me.train.finetune_messages import say_beginning, say_end
from spark_me.train.finetuning import Finetuning
from spark_me.train.messages import say_stopped
from spark_me.train.precision import pick_device
from spark_me.train.run_directory import RunDirectory
from spark_me.train.starting_weights import settle_images, start_from
from spark_me.train.trainer import Trainer


def finetune(config: FinetuneConfig) -> bool:
    """Run a configuration to its end, from the newest checkpoint of its directory if there is one.

    What it leaves open of the images is filled in, in place (`settle_images`).

    With several processes, call it in each, within `distributed.process_group()`.

    Returns:
        False if a signal asked to stop before the end.

    Raises:
        UserError: for anything in the configuration, the data, the weights or the directory that stands in the way.
        SystemExit: on processes besides the main one, in its place.
    """
    run = RunDirectory(config.run.dir)
    with run.owned():
        return _finetune(config, run)


def _finetune(config: FinetuneConfig, run: RunDirectory) -> bool:
    settle_images(config, config.weights, "weights=", run)
    with distributed.agreed():
        if distributed.is_main():
            run.check(config)
        device = pick_device(config.run.device)
        task = Finetuning(config, find_labelled(config.data, config.run.seed), device)
        trainer = Trainer(task, config, run, device)
    resumed_from = trainer.resume()
    start = resumed_from or start_from(task.model, config)
    with distributed.agreed():
        if distributed.is_main():
            space = trainer.require_space()
            say_beginning(task, trainer.schedule, start, trainer.state.step)
            print(space, flush=True)
    complete = trainer.train()
    if distributed.is_main():
        if complete:
            say_end(task, run)
        else:
            say_stopped(config, trainer.state.step, checkpoint_path(run.checkpoints, trainer.state.step))
    return complete
