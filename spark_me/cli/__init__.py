"""The `spark-me` command: parsing only; each subcommand imports what it needs when it runs."""

import argparse
import errno
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import spark_me
from spark_me.cli.commands import add_bench, add_config, add_data, add_finetune, add_inference, add_schedule
from spark_me.cli.grammar import Parser, PrintVersions, add_configuration, called, configuration, parse
from spark_me.errors import UserError, install_text, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0 done, 2 bad input, 1 a failed check or build, 130 Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # Names of files are no text to rely on, and not every terminal knows our ×.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = parse(_parser(), sys.argv[1:] if argv is None else argv)
        try:
            return args.run(args) or 0
        except ModuleNotFoundError as error:
            package = str(error.name).partition(".")[0]
            if package == spark_me.__name__:
                raise
            raise UserError(f"{args.command} needs the package {package}: {install_text(args.group)}") from None
        except PermissionError as error:
            raise UserError(
                f"{error.filename or error}: permission denied: choose another place, or change its mode"
            ) from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise UserError(f"{error.filename}: the name is too long: choose a shorter one") from None
    except UserError as error:
        print(f"spark-me: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interruption:
        print(printable(": ".join(["spark-me: interrupted", *map(str, interruption.args)])), file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="spark-me", description="Masked pretraining of convnets on sparse convolution.")
    parser.add_argument("--version", action=PrintVersions, help="print versions and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_pretrain(commands)
    add_finetune(commands)
    _add_reconstruct(commands)
    _add_convert(commands)
    add_inference(commands)
    _add_encoders(commands)
    add_bench(commands)
    add_data(commands)
    add_schedule(commands)
    add_config(commands)
    _add_engine(commands)
    _add_doctor(commands)
    return parser


def _add_pretrain(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("pretrain", help="pretrain an encoder on images without labels")
    add_configuration(parser, "pretrain", "for example configs/pretrain/small.yaml data.root=/path/to/images")
    parser.set_defaults(run=_pretrain, group="train")


def _pretrain(args: argparse.Namespace) -> None:
    from spark_me.config.tasks import PretrainConfig

    with configuration(args, PretrainConfig) as config:
        from spark_me.train.pretrain import pretrain

        pretrain(config)


def _add_reconstruct(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("reconstruct", help="draw what a pretrained model makes of hidden patches")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--out", type=Path, default=Path("reconstruction.png"), help="picture to write")
    parser.add_argument("--seed", type=int, default=0, help="which masks are drawn")
    parser.set_defaults(run=called("spark_me.train.reconstruct:reconstruct_files"), group="train")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="bring a checkpoint to another library's layout, or to ours")
    parser.add_argument("source", metavar="SRC", help="path or URL of a .pth or .safetensors file; layout is detected")
    parser.add_argument("destination", metavar="DST", type=Path, help="file to write: .pth, .pt or .safetensors")
    parser.add_argument(
        "--to",
        required=True,
        metavar="LAYOUT",
        help="torchvision, timm, official, mmpretrain, detectron2, fcmae or spark_me",
    )
    parser.add_argument("--encoder", metavar="NAME", help="refuse a source that holds another encoder")
    parser.set_defaults(run=_convert, group="train")


def _convert(args: argparse.Namespace) -> None:
    from spark_me.weights.transfer import convert

    done = convert(args.source, args.destination, args.to, args.encoder)
    print(f"{printable(str(args.destination))}: {done.encoder} from {done.source_layout} to {done.layout} layout")
    for note in done.notes:
        print(f"note: {note}")


def _add_encoders(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("encoders", help="list networks, with patch size and scales, and whether they convert")
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="part of a name, or whole with * and ?")
    parser.set_defaults(run=called("spark_me.encoders_command:list_networks"), group="train")


def _add_engine(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("engine", help="build and install MinkowskiEngine, or say what is installed")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    install = actions.add_parser("install", help="build against the installed torch (cached), then install")
    target = install.add_mutually_exclusive_group()
    target.add_argument("--cpu", dest="device", action="store_const", const="cpu", help="force a CPU build")
    target.add_argument("--cuda", dest="device", action="store_const", const="cuda", help="force a CUDA build")
    install.add_argument("--source", type=Path, help="a MinkowskiEngine source archive on disk, instead of a download")
    install.add_argument("--rebuild", action="store_true", help="build again even if a cached wheel fits")
    install.add_argument(
        "--build-only", action="store_true", help="build into the cache and try to load it; install nothing"
    )
    install.set_defaults(run=called("spark_me.engine.install:install"), group="engine")
    info = actions.add_parser("info", help="what is installed, what is cached, what a build would use")
    info.set_defaults(run=called("spark_me.engine.doctor:print_info"), group="engine")


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("doctor", help="prove the installed engine against dense torch")
    parser.set_defaults(run=called("spark_me.engine.doctor:run_doctor"), group="engine")
