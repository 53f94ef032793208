"""`spark-me encoders`: which networks there are, and which of them become sparse encoders."""

import fnmatch
from typing import NamedTuple

from tqdm import tqdm

from spark_me.encoder import sparsify
from spark_me.errors import UserError, printable
from spark_me.networks import all_names, empty_network, list_encoders
from spark_me.tables import text_table


class Row(NamedTuple):
    """What is known of one network.

    Attributes:
        name: of the network.
        parameters: of the encoder; None where there is none.
        patch_size: its total stride.
        strides, channels: of its scales.
        refusal: why it does not convert; empty where it does.
    """

    name: str
    parameters: int | None
    patch_size: int | None
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    refusal: str


def list_networks(pattern: str | None) -> None:
    """Print names with parameters, patch size and scales, and why a network does not convert.

    Args:
        pattern: a part of a name, or with `*` and `?` a whole one; None: the networks of the published recipes and
            registered ones.

    Raises:
        UserError: if nothing is called so.
    """
    names = matching(pattern)
    rows = [describe(name) for name in tqdm(names, desc="encoders", disable=len(names) < 5 or None, leave=False)]
    print(text_table([("name", "parameters", "patch", "scales"), *map(_cells, rows)], "<>><"))
    if pattern is None:
        print("Of torchvision and timm there are more: spark-me encoders 'timm/regnet*'")


def matching(pattern: str | None) -> list[str]:
    """Names of networks that a pattern fits.

    Raises:
        UserError: if there are none.
    """
    if pattern is None:
        return list_encoders()
    whole = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    names = [name for name in all_names() if fnmatch.fnmatchcase(name, whole)]
    if not names:
        raise UserError(f"{pattern}: no network is called so: try a part of a name, such as regnet")
    return names


def _cells(row: Row) -> tuple[str, ...]:
    if row.refusal:
        return row.name, "-", "-", f"no: {printable(row.refusal)}"
    scales = "  ".join(f"{channels}@{stride}" for channels, stride in zip(row.channels, row.strides))
    return row.name, f"{(row.parameters or 0) / 1e6:.2f} M", str(row.patch_size), scales


def describe(name: str) -> Row:
    """Build a network without values, and try to make it sparse."""
    try:
        encoder = sparsify(empty_network(name))
    except UserError as error:
        return Row(name, None, None, (), (), str(error))
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return Row(name, parameters, encoder.total_stride, encoder.strides, encoder.channels, "")
