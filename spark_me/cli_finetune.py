"""`spark-me finetune`, `spark-me compare` and `spark-me evaluate`: parsing only."""

import argparse
from pathlib import Path

from spark_me.cli_grammar import add_configuration, configuration

WEIGHTS = "for example configs/finetune/small.yaml weights=runs/mine/checkpoints/best.pt"


def add_finetune(commands: argparse._SubParsersAction) -> None:
    """Add them to the subcommands of `spark-me`."""
    parser = commands.add_parser("finetune", help="train a pretrained encoder to classify labelled images")
    add_configuration(parser, "finetune", f"{WEIGHTS} (none: from scratch)")
    parser.set_defaults(run=_finetune, group="train")
    parser = commands.add_parser("compare", help="what pretraining is worth: fine-tune from it and from scratch")
    add_configuration(parser, "finetune", WEIGHTS)
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=[0.01, 0.1, 1.0], help="shares of the labels; default 0.01 0.1 1"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind; default 3")
    parser.set_defaults(run=_compare, group="train")
    parser = commands.add_parser("evaluate", help="accuracy of a classifier on labelled images")
    add_configuration(parser, "finetune", "for example configs/finetune/small.yaml data.root=/path/to/imagenet")
    parser.add_argument(
        "--weights", required=True, metavar="W", help="a fine-tuning checkpoint, a published name, a path or URL"
    )
    parser.add_argument("--raw", action="store_true", help="a checkpoint's weights, not their moving average")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw the confusion matrix there, confusion.png")
    parser.set_defaults(run=_evaluate, group="train")


def _finetune(args: argparse.Namespace) -> None:
    from spark_me.config import FinetuneConfig

    with configuration(args, FinetuneConfig) as config:
        from spark_me.train.finetune import finetune

        finetune(config)


def _compare(args: argparse.Namespace) -> None:
    from spark_me.config import FinetuneConfig

    with configuration(args, FinetuneConfig) as config:
        from spark_me.train.compare import compare

        compare(config, args.fractions, args.seeds)


def _evaluate(args: argparse.Namespace) -> None:
    from spark_me.config import FinetuneConfig, load_config

    # What a run would start from does not matter here.
    config = load_config(args.config, args.overrides, unchecked=("weights",), schema=FinetuneConfig)
    from spark_me.train.evaluation import evaluate

    evaluate(config, args.weights, raw=args.raw, json_file=args.json, out=args.out)
