"""`spark-me schedule …`: parsing only."""

import argparse
from pathlib import Path

from spark_me.cli_grammar import add_configuration


def add_schedule(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to those of `spark-me`."""
    parser = commands.add_parser("schedule", help="learning rate and weight decay of a configuration before it is run")
    add_configuration(parser, "pretrain", "key=value holds for all of them", several=True)
    parser.add_argument("--images", type=int, metavar="N", help="number of training images, instead of counting them")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    parser.set_defaults(run=_schedule, group="train")


def _schedule(args: argparse.Namespace) -> None:
    from spark_me.train.schedule_report import report_schedules

    report_schedules(args.configs, args.overrides, args.images, args.plot)
