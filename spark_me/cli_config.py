"""`spark-me config …`: parsing only."""

import argparse
import os
import shutil
import sys

from spark_me.errors import UserError

WIDEST = 100
"""Columns; longer lines are hard to read."""


def add_config(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to those of `spark-me`."""
    parser = commands.add_parser("config", help="list the keys of a configuration, or explain some")
    parser.add_argument(
        "keys", nargs="*", metavar="KEY", help="to explain: train.epochs, a section (train) or a name alone (epochs)"
    )
    parser.add_argument("--markdown", action="store_true", help="print docs/configuration.md")
    parser.set_defaults(run=_config, group="train")


def _config(args: argparse.Namespace) -> None:
    from spark_me.config_reference import markdown_reference, text_reference

    if args.markdown and args.keys:
        raise UserError("--markdown prints the page of all keys: leave out either it or KEY")
    width = min(WIDEST, shutil.get_terminal_size().columns)
    try:
        print(markdown_reference() if args.markdown else text_reference(args.keys, width), flush=True)
    except BrokenPipeError:  # as by `spark-me config | head`, which has read enough
        # Or Python would fail once more, when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
