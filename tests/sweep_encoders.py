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

import torch
from torch import Tensor, nn

from spark_me import sparse
from spark_me.encoder import sparsify
from spark_me.encoders_command import Row, describe
from spark_me.networks import TIMM, all_names, dense_network

GRIDS = ((2, 3), (3, 1))
"""Patches of the images, H and W."""
ATTENTION = (
    "attention", "attn", "softmax", "matmul", "einsum", "scaled_dot_product", "Attention", "qkv", "transformer",
    "Transformer", "pos_embed", "pos_embd", "rel_pos", "bmm", "token", "doesn't match model", "divisible by window",
    "divisible by grid", "divisible by patch", "Wrong image height", "vit.py", "coat.py", "cpubone", "davit",
    "efficientformer", "efficientvit", "efficientvim", "hiera", "levit.py", "Vit ", "ViT", "MaxVit", "'Node'",
)  # fmt: skip
"""What refusals of networks with attention say: operation, file, or the image size that positions were made for."""
TRIED, ALIKE = 3, "as others of its family:"
"""Of families whose first members have attention, the others are not tried."""
UPSAMPLING = ("Upsample", "interpolate", "ConvTranspose")


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
                    tried = [known[other] for other in names if other in known][:TRIED]
                    if len(tried) == TRIED and all(reason_of(row["refusal"]) == "attention" for row in tried):
                        row = Row(name, None, None, (), (), f"{ALIKE} {tried[0]['refusal']}")
                    else:
                        row = describe_safely(name)
                    known[name] = {"family": family, "error": None, **row._asdict()}
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
        return Row(name, None, None, (), (), f"{type(error).__name__}: {str(error).splitlines()[0]}")


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


def reason_of(refusal: str) -> str:
    """Why, in a word."""
    if any(word in refusal for word in UPSAMPLING):
        return "upsampling"
    if any(word in refusal for word in ATTENTION):
        return "attention"
    return "other"


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
        reasons = [reason_of(row["refusal"]) for row in own if row["refusal"]]
        others = len(own) - reasons.count("attention") - reasons.count("upsampling")
        sentences.append(
            f"{library}: of {len(own)} networks {reasons.count('attention')} have attention and "
            f"{reasons.count('upsampling')} upsampling; of the other {others} {converted} convert "
            f"({converted / max(others, 1):.1%})."
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
