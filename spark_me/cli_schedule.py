"""`spark-me schedule …`: parsing only."""

import argparse
from pathlib import Path

from spark_me.errors import UserError


def add_schedule(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to those of `spark-me`."""
    parser = commands.add_parser("schedule", help="learning rate and weight decay of a configuration before it is run")
    parser.add_argument("configs", nargs="+", metavar="CONFIG.yaml", help="and key=value, which holds for all of them")
    parser.add_argument("--images", type=int, metavar="N", help="number of training images, instead of counting them")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    parser.set_defaults(run=_schedule)


def _schedule(args: argparse.Namespace) -> None:
    from spark_me.train.schedule_report import report_schedules

    overrides = [argument for argument in args.configs if "=" in argument]
    configs = [Path(argument) for argument in args.configs if "=" not in argument]
    if not configs:
        raise UserError("no configuration: name one, for example configs/demo/pretrain.yaml")
    report_schedules(configs, overrides, args.images, args.plot)
