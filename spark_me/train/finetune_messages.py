"""What a fine-tuning run prints at its beginning and at its end."""

from spark_me.errors import printable
from spark_me.train import distributed
from spark_me.train.checkpoint import BEST
from spark_me.train.finetuning import Finetuning
from spark_me.train.messages import batch_text, command_text, length_text, quoted
from spark_me.train.metrics import read_metrics
from spark_me.train.run_directory import RunDirectory
from spark_me.train.schedules import Schedule, describe_peak


def say_beginning(task: Finetuning, schedule: Schedule, start: str, steps_done: int) -> None:
    """What is trained on what, and from where."""
    config, images = task.config, task.images
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    processes = distributed.world_size()
    where = str(task.device) if processes == 1 else f"{processes} processes ({task.device.type})"
    print(
        f"{config.model.encoder} ({parameters / 1e6:.2f} M parameters), {len(task.classes)} classes, "
        f"{config.data.train_crop}×{config.data.train_crop}, {config.train.precision} on {where}"
    )
    print(
        f"{len(images.train.paths)} training images (× {config.data.repeats} crops an epoch), {len(images.val.paths)} "
        f"to validate on; {length_text(config, schedule)} of {batch_text(config, processes)}, "
        f"{describe_peak(config)}, layer decay {config.optim.layer_decay}"
    )
    start = printable(start)
    if steps_done == 0:
        print(f"starting from {start} in {printable(config.run.dir)}")
    elif steps_done < schedule.steps:
        print(f"going on from {start}, {steps_done} steps done")
    else:
        print(f"this run is complete: {start} is its last step (for another, choose another run.dir)")


def say_end(task: Finetuning, run: RunDirectory) -> None:
    """The result, where to look and what to run next."""
    measured = [entry for entry in read_metrics(run.metrics) if task.best_by in entry]
    average = "" if task.ema is None else " of the averaged weights"
    if measured:
        last, best = measured[-1], max(measured, key=lambda entry: entry[task.best_by])
        print(
            f"top-1 {last[task.best_by]:.2%}{average} after the last step, "
            f"{best[task.best_by]:.2%} at best (step {best['step']})"
        )
    print(f"look at   {printable(str(run.loss_plot))}")
    print(f"curves    {command_text('tensorboard')} --logdir {quoted(run.tensorboard)}")
    weights, folder = quoted(run.checkpoints / BEST), quoted(run.path)
    print(f"next      {command_text('spark-me')} evaluate {quoted(run.config)} --weights {weights} --out {folder}")
    print(f"or        {command_text('spark-me')} predict {weights} YOUR_PHOTO.jpg")
