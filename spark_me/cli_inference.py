"""`spark-me predict`, `features`, `probe` and `export`: parsing only."""

import argparse
from pathlib import Path
from typing import Any

from spark_me.cli_grammar import image_size


def add_inference(commands: argparse._SubParsersAction) -> None:
    """Add what uses a trained model to the subcommands of `spark-me`."""
    _add_predict(commands)
    _add_features(commands)
    _add_probe(commands)
    _add_export(commands)


def _add_predict(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("predict", help="classify images; exits with 1 if any is unreadable")
    _add_weights(parser, "name of a published classifier, or a checkpoint with a classifier")
    _add_images(parser)
    parser.add_argument("--top-k", type=int, metavar="K", help="list the K likeliest classes of each image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions there, as one list")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the first 64 images with their classes")
    _add_computing(parser)
    parser.set_defaults(run=_predict, group="inference")


def _predict(args: argparse.Namespace) -> int:
    from spark_me.inference.predict_command import predict_files

    return predict_files(
        args.weights,
        args.images,
        top_k=args.top_k,
        json_file=args.json,
        picture=args.picture,
        raw=args.raw,
        **_computing(args),
    )


def _add_features(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("features", help="an encoder's pooled features of images, as .npz")
    _add_weights(parser)
    _add_images(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="file to write")
    _add_stage(parser)
    _add_computing(parser)
    parser.set_defaults(run=_features, group="inference")


def _features(args: argparse.Namespace) -> int:
    from spark_me.inference.features import features_of_files

    return features_of_files(args.weights, args.images, args.out, stage=args.stage, raw=args.raw, **_computing(args))


def _add_probe(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("probe", help="k-NN and linear probe on frozen features")
    _add_weights(parser)
    parser.add_argument("--train", type=Path, required=True, metavar="DIR", help="one folder a class")
    parser.add_argument("--test", type=Path, required=True, metavar="DIR", help="the same class folders")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of each class's training images; default 1")
    parser.add_argument("--seed", type=int, default=0, help="decides which, and what the linear probe holds out")
    parser.add_argument("--k", type=int, default=20, help="neighbours that vote; default 20")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    _add_stage(parser)
    _add_computing(parser)
    parser.set_defaults(run=_probe, group="probe")


def _probe(args: argparse.Namespace) -> int:
    from spark_me.inference.probe import probe

    return probe(
        args.weights,
        args.train,
        args.test,
        fraction=args.fraction,
        seed=args.seed,
        k=args.k,
        stage=args.stage,
        raw=args.raw,
        json_file=args.json,
        **_computing(args),
    )


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="a model for use elsewhere, checked against the network")
    _add_weights(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FORMAT",
        help="onnx (.onnx), torchscript (.pt), torch-export (.pt2); state dicts: torchvision, timm",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="side of a square, or H W; default: the test images'",
    )
    parser.set_defaults(run=_export, group="export")


def _export(args: argparse.Namespace) -> None:
    from spark_me.inference.export import export

    size = None if args.image_size is None else image_size(args.image_size)
    export(args.weights, args.out, args.to, image_size=size, raw=args.raw)


def _add_weights(
    parser: argparse.ArgumentParser, what: str = "name of published weights, or a checkpoint of any known layout"
) -> None:
    parser.add_argument("weights", metavar="WEIGHTS", help=what)
    parser.add_argument("--raw", action="store_true", help="of a fine-tuning checkpoint, not the moving average (EMA)")


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, and folders at any depth")


def _add_stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", type=int, default=4, help="whose maps are averaged: 1 to 4, the deepest; default 4")


def _add_computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1")
    parser.add_argument("--batch-size", type=int, default=32, metavar="B", help="images at once; default 32")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images; default: one a CPU, at most 4"
    )


def _computing(args: argparse.Namespace) -> dict[str, Any]:
    return {"device": args.device, "batch_size": args.batch_size, "workers": args.workers}
