"""`spark-me data …`: parsing only."""

import argparse
from pathlib import Path

from spark_me.cli_grammar import add_configuration

ROOT = "for example configs/pretrain/small.yaml data.root=/path/to/images"


def add_data(commands: argparse._SubParsersAction) -> None:
    """Add the group to the subcommands of `spark-me`."""
    parser = commands.add_parser("data", help="measure and check the images of a configuration")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    stats = actions.add_parser("stats", help="mean and deviation of each channel, as lines for the configuration")
    add_configuration(stats, "pretrain", ROOT)
    stats.add_argument("--sample", type=int, metavar="N", help="measure so many of the training images, not all")
    stats.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    stats.set_defaults(run=_stats, group="train")
    check = actions.add_parser("check", help="open every image; exits with 1 if any is unreadable")
    add_configuration(check, "pretrain", ROOT)
    check.add_argument("--out", type=Path, metavar="FILE", help="list the unreadable ones there, not on the screen")
    check.set_defaults(run=_check, group="train")
    digits = actions.add_parser("digits", help="write scikit-learn's digits as labelled images, for a demo")
    digits.add_argument("folder", type=Path, metavar="FOLDER", help="gets train/ and val/")
    digits.set_defaults(run=_digits, group="demo")


def _stats(args: argparse.Namespace) -> None:
    from spark_me.config import load_config

    # They may be missing: they are what is measured.
    config = load_config(args.config, args.overrides, unchecked=("data.mean", "data.std"))
    from spark_me.data.stats import stats

    stats(config, args.sample, args.json)


def _check(args: argparse.Namespace) -> int:
    from spark_me.config import load_config

    config = load_config(args.config, args.overrides, unchecked=("data.mean", "data.std"))
    from spark_me.data.check import check

    return check(config, args.out)


def _digits(args: argparse.Namespace) -> None:
    from spark_me.data.digits import write_digits

    write_digits(args.folder)
