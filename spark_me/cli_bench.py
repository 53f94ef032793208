"""`spark-me bench`: parsing only."""

import argparse
from pathlib import Path

from spark_me.cli_grammar import image_size
from spark_me.errors import UserError


def add_bench(commands: argparse._SubParsersAction) -> None:
    """Add the subcommand to those of `spark-me`."""
    parser = commands.add_parser("bench", help="time and memory of sparse against dense, side by side")
    add = parser.add_argument
    add("--scope", choices=("encoder", "step", "both"), help="default: both; for a sweep or --largest-batch encoder")
    add("--encoder", default="resnet50")
    add("--batch", type=int, default=8)
    add("--image-size", type=int, nargs="+", default=[224], metavar="PIXELS", help="side of a square, or H W")
    add("--mask-ratio", type=float, default=0.6, help="share of hidden patches; 0 for the encoder only")
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
    parser.set_defaults(run=_bench, group="train")


def _bench(args: argparse.Namespace) -> None:
    if args.sweep is None and (args.plot is not None or args.values is not None):
        raise UserError("--plot and --values belong to a sweep: add --sweep mask_ratio, batch or image_size")
    if args.largest_batch and args.scope == "both":
        raise UserError("--largest-batch searches in one scope: use --scope encoder or step")
    if args.table is not None:
        from spark_me.benchmark.markdown import markdown_of

        print(markdown_of(args.table))
        return
    from spark_me.benchmark.case import Case, pick_device
    from spark_me.benchmark.command import bench, bench_largest, bench_sweep

    case = Case(
        args.encoder,
        args.batch,
        image_size(args.image_size),
        args.mask_ratio,
        args.decoder_width,
        pick_device(args.device),
        args.dtype,
    )
    options = {name: getattr(args, name) for name in ("backends", "runs", "warmup", "memory", "compiled")}
    if args.largest_batch:
        bench_largest(case, args.scope or "encoder", args.json, args.backends)
    elif args.sweep is None:
        bench(case, args.scope or "both", args.json, **options)
    else:
        bench_sweep(case, args.scope or "encoder", args.json, args.sweep, args.values, args.plot, **options)
