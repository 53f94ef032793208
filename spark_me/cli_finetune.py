"""`spark-me finetune`, `spark-me compare` and `spark-me evaluate`: parsing only."""

import argparse
from pathlib import Path


def add_finetune(commands: argparse._SubParsersAction) -> None:
    """Add them to the subcommands of `spark-me`."""
    parser = commands.add_parser("finetune", help="train a pretrained encoder to classify labelled images")
    _add_config(parser, "for example weights=runs/pretrain/checkpoints/best.pt (none: from scratch)")
    parser.set_defaults(run=_finetune)
    parser = commands.add_parser("compare", help="what pretraining is worth: fine-tune from it and from scratch")
    _add_config(parser, "for example weights=runs/pretrain/checkpoints/best.pt")
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=[0.01, 0.1, 1.0], help="shares of the labels; default 0.01 0.1 1"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind; default 3")
    parser.set_defaults(run=_compare)
    parser = commands.add_parser("evaluate", help="accuracy of a classifier on labelled images")
    _add_config(parser, "for example data.root=/path/to/imagenet")
    parser.add_argument(
        "--weights", required=True, metavar="W", help="a fine-tuning checkpoint, a published name, a path or URL"
    )
    parser.add_argument("--raw", action="store_true", help="a checkpoint's weights, not their moving average")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw the confusion matrix there, confusion.png")
    parser.set_defaults(run=_evaluate)


def _add_config(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="for example configs/finetune/small.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=example)


def _finetune(args: argparse.Namespace) -> None:
    from spark_me.config import FinetuneConfig, load_config
    from spark_me.train import distributed
    from spark_me.train.finetune import finetune

    with distributed.process_group():
        with distributed.agreed():
            config = load_config(args.config, args.overrides, schema=FinetuneConfig)
        finetune(config)


def _compare(args: argparse.Namespace) -> None:
    from spark_me.config import FinetuneConfig, load_config
    from spark_me.train import distributed
    from spark_me.train.compare import compare

    with distributed.process_group():
        with distributed.agreed():
            config = load_config(args.config, args.overrides, schema=FinetuneConfig)
        compare(config, args.fractions, args.seeds)


def _evaluate(args: argparse.Namespace) -> None:
    from spark_me.config import FinetuneConfig, load_config
    from spark_me.train.evaluation import evaluate

    # What a run would start from does not matter here.
    config = load_config(args.config, args.overrides, unchecked=("weights",), schema=FinetuneConfig)
    evaluate(config, args.weights, raw=args.raw, json_file=args.json, out=args.out)
