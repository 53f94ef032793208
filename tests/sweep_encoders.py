"""Which of torchvision's and timm's networks convert, and how exactly: writes docs/encoders.md (`make encoders`).

Every name is built without values and made sparse. Of each family the smallest networks are also computed, in float64
with nothing masked, at two image sizes: every map of the encoder against that of the dense network's own forward.

    python tests/sweep_encoders.py [--family NAME …] [--computed N] [--out FILE]
"""

import argparse
import copy
import gc
import json
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spark_me import sparse
from spark_me.encoder import sparsify
from spark_me.encoders_command import Row, describe
from spark_me.errors import first_line
from spark_me.networks import TIMM, all_names, dense_network, empty_network

GRIDS = ((2, 3), (3, 1))
"""Patches of the images, H and W."""
ATTENTION = ("aten.bmm", "aten.baddbmm", "aten._scaled_dot_product", "aten._efficient_attention")
"""Products of two activations."""
UPSAMPLING = ("aten.upsample", "aten.convolution.transposed", "aten.pixel_shuffle", "aten.grid_sampler")
NO_CONVNET = ("attention", "upsampling", "one image size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", nargs="+", help="these alone")
    parser.add_argument("--computed", type=int, default=2, help="networks of each family that are computed")
    parser.add_argument("--out", type=Path, default=Path("docs/encoders.md"))
    parser.add_argument("--cache", type=Path, default=Path("runs/encoders.jsonl"), help="what was found before")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    families: dict[str, list[str]] = defaultdict(list)
    for name in all_names():
        families[family_of(name)].append(name)
    args.cache.parent.mkdir(parents=True, exist_ok=True)
    known = {}
    if args.cache.exists():
        known = {row["name"]: row for row in map(json.loads, args.cache.read_text().splitlines())}
    with args.cache.open("a") as cache:
        for family, names in families.items():
            if args.family and family not in args.family:
                continue
            for name in names:
                if name not in known:
                    row = describe_safely(name)
                    kind = kind_of(name) if row.refusal else ""
                    known[name] = {"family": family, "error": None, "kind": kind, **row._asdict()}
                    print(json.dumps(known[name]), file=cache, flush=True)
            small = sorted((known[n] for n in names if not known[n]["refusal"]), key=lambda row: row["parameters"])
            for row in small[: args.computed]:
                if row["error"] is None:
                    try:
                        row["error"] = largest_error(row["name"])
                    except (AssertionError, RuntimeError) as error:  # of a head that takes one size, as a rule
                        print(f"{row['name']}: not computed ({error!r})", file=sys.stderr, flush=True)
                        continue
                    print(json.dumps(row), file=cache, flush=True)
                    print(f"{row['name']}: {row['error']:.1e}", file=sys.stderr, flush=True)
    args.out.write_text(document([known[n] for names in families.values() for n in names if n in known]))


def family_of(name: str) -> str:
    """The module of the library that a network is from."""
    if name.startswith(TIMM) or name == "resnet200" or name.startswith("convnextv2_"):
        import timm

        return "timm " + timm.models.model_entrypoint(name.removeprefix(TIMM)).__module__.rpartition(".")[2]
    from torchvision import models

    return "torchvision " + models.get_model_builder(name).__module__.rpartition(".")[2]


def describe_safely(name: str) -> Row:
    """As `describe`, with the library's own refusals."""
    try:
        return describe(name)
    except Exception as error:  # a library that builds no such network is no reason to stop
        return Row(name, None, None, (), (), f"{type(error).__name__}: {first_line(error)}")


def largest_error(name: str) -> float:
    """Relative to each map's largest value."""
    torch.manual_seed(0)
    network = dense_network(name).double().eval()
    randomise(network)
    encoder = sparsify(copy.deepcopy(network)).eval()
    errors = []
    for rows, columns in GRIDS:
        side = encoder.total_stride
        images = torch.randn(2, 3, rows * side, columns * side, dtype=torch.double)
        with torch.no_grad():
            expected = maps_of(network, encoder.taps, images)
            pyramid = sparse.Pyramid(torch.ones(2, rows, columns, dtype=torch.bool), side, "native")
            found = [sparse.to_dense(x) for x in encoder(sparse.to_sparse(images, pyramid))]
        errors += [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected)]
    del network, encoder
    gc.collect()
    return max(errors)


def randomise(network: nn.Module) -> None:
    """Statistics and factors that are not zero and one."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.normal_(0, 0.1)
            elif name == "running_var":
                buffer.uniform_(0.5, 1.5)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() <= 1:
                nn.init.uniform_(parameter, 0.5, 1.5)


def maps_of(network: nn.Module, taps: tuple, images: Tensor) -> list[Tensor]:
    """What the network's own forward computes, where the taps say: seen by hooks."""
    from spark_me.masked_dense import MaskedDense

    grid = [side // taps[-1][1] for side in images.shape[2:]]
    return MaskedDense(network, taps)(images, torch.ones(len(images), *grid, dtype=torch.bool))


def kind_of(name: str) -> str:
    """What a network has that no convnet has, by what its forward computes of tensors without values; "" if nothing.

    Attention multiplies activations with each other; mixers and recurrent networks multiply positions with a matrix of
    one size, and take images of one size alone.
    """
    network = empty_network(name).eval()
    if any(isinstance(module, nn.RNNBase) for module in network.modules()):
        return "one image size"
    size = getattr(network, "default_cfg", {}).get("input_size", (3, 224, 224))
    computed = _Operations()
    try:
        with computed, torch.no_grad():
            network(torch.empty(2, *size, device="meta"))
    except Exception as error:  # what decides by values; what ran before it tells as a rule
        print(f"{name}: {error!r}"[:200], file=sys.stderr, flush=True)
    for kind, operations in {"attention": ATTENTION, "upsampling": UPSAMPLING}.items():
        if any(each.startswith(operations) for each in computed.names):
            return kind
    try:
        with torch.no_grad():
            network(torch.empty(2, size[0], size[1] + 64, size[2] + 128, device="meta"))
    except (RuntimeError, AssertionError):
        return "one image size"
    return ""


class _Operations(TorchDispatchMode):
    """Names of all operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        transposed = func is torch.ops.aten.convolution.default and args[6]
        self.names.add("aten.convolution.transposed" if transposed else str(func))
        return func(*args, **(kwargs or {}))


def document(rows: list[dict]) -> str:
    """docs/encoders.md."""
    lines = [HEADER, summary(rows), ""]
    of_families: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        of_families[row["family"]].append(row)
    lines += ["| family | networks | convert | computed | largest error |", "| --- | --- | --- | --- | --- |"]
    for family, own in of_families.items():
        converted = [row for row in own if not row["refusal"]]
        errors = [row["error"] for row in own if row["error"] is not None]
        error = f"{max(errors):.0e}" if errors else "–"
        lines.append(f"| {family} | {len(own)} | {len(converted)} | {len(errors)} | {error} |")
    lines += ["", "## Networks that convert", ""]
    lines += ["| name | parameters (M) | patch | scales | largest error |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if not row["refusal"]:
            scales = ", ".join(f"{channels}@{stride}" for channels, stride in zip(row["channels"], row["strides"]))
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            lines.append(
                f"| {row['name']} | {row['parameters'] / 1e6:.2f} | {row['patch_size']} | {scales} | {error} |"
            )
    lines += ["", "## Networks that do not", ""]
    lines += ["| reason | names |", "| --- | --- |"]
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["refusal"]:
            reasons[shortened(row["refusal"])].append(row["name"])
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {reason.replace('|', '/')} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def summary(rows: list[dict]) -> str:
    """The share that converts, in a sentence for each library."""
    sentences = []
    for library in ("torchvision", "timm"):
        own = [row for row in rows if row["family"].startswith(library)]
        converted = sum(not row["refusal"] for row in own)
        counts = {kind: sum(row["kind"] == kind for row in own if row["refusal"]) for kind in NO_CONVNET}
        others = len(own) - sum(counts.values())
        sentences.append(
            f"{library}: of {len(own)} networks {counts['attention']} have attention, {counts['upsampling']} "
            f"upsampling, and {counts['one image size']} take images of one size alone (mixers, recurrent networks); "
            f"of the other {others} {converted} convert ({converted / max(others, 1):.1%})."
        )
    return " ".join(sentences)


def shortened(refusal: str) -> str:
    """Without what is of one machine."""
    import re

    text = re.sub(r"\(?/\S*/site-packages/(\S+), line \d+\)?", r"(\1)", refusal)
    return text.partition(" Take it out")[0].partition(": its forward has to")[0]


HEADER = """# Encoders

Which networks of torchvision and timm become sparse encoders, and how exactly: written by `make encoders`. A network of
your own is tried by `spark_me.sparsify(network)`, one by name by `spark-me encoders NAME`.

*Convert*: made sparse without values. *Computed*: the smallest of the family also in float64, with nothing masked, at
two image sizes (H ≠ W), every map against that of the dense network's own forward; *largest error* relative to the
map's largest value. With masks, in training mode, with gradients and running statistics, tests/test_encoder.py compares
34 of them with the dense simulation. Parameters are the encoder's, without what follows its last map; scales are
channels@stride.
"""


if __name__ == "__main__":
    main()
