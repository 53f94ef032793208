"""ConvNeXts of torchvision (V1) and timm (V2) with random weights, and what the tests of their conversion share."""

import timm
import torch
import torchvision
from checkpoints import assert_bitwise, random_like

import spark_me
from spark_me.encoders.registry import CONVNEXTS
from spark_me.weights.canonical import from_canonical, to_canonical

V1 = [name for name in CONVNEXTS if name.startswith("convnext_")]
SMALL = ["convnext_tiny", "convnextv2_atto", "convnextv2_tiny"]


def library_network(name, **arguments):
    """torchvision's V1, timm's V2, without memory for their weights."""
    with torch.device("meta"):
        return torchvision.models.get_model(name) if name in V1 else timm.create_model(name, **arguments)


def random_library_state(name, seed=0):
    return random_like(library_network(name).state_dict(), seed)


def filled(network, state):
    network.load_state_dict(state, strict=True, assign=True)
    return network.double().eval()


def images_of(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def convert(state, layout):
    return from_canonical(to_canonical(state, "a"), layout)[0]


def library_features(network, images):
    if isinstance(network, torchvision.models.ConvNeXt):
        maps, x = [], images
        for index, layer in enumerate(network.features):
            x = layer(x)
            if index % 2:
                maps.append(x)
        return maps
    return network.forward_intermediates(images, intermediates_only=True)


def sparse_shapes(name, width):
    """Of a SparK model as the engine keeps it: kernels [K, Cin, Cout], depthwise [K, C], their biases [1, C]."""
    version, depths, widths = CONVNEXTS[name]
    shapes = {}
    for i, c in enumerate(widths):
        before = widths[i - 1]
        conv, norm, normed = ("0", "1", c) if i == 0 else ("1", "0", before)
        shapes[f"downsample_layers.{i}.{conv}.kernel"] = (16, 3, c) if i == 0 else (4, before, c)
        shapes[f"downsample_layers.{i}.{conv}.bias"] = (1, c)
        shapes |= {f"downsample_layers.{i}.{norm}.{leaf}": (normed,) for leaf in ("weight", "bias")}
        for j in range(depths[i]):
            block = {"dwconv.kernel": (49, c), "dwconv.bias": (1, c), "norm.weight": (c,), "norm.bias": (c,)}
            block |= {"pwconv1.weight": (4 * c, c), "pwconv1.bias": (4 * c,)}
            block |= {"pwconv2.weight": (c, 4 * c), "pwconv2.bias": (c,)}
            block |= {"gamma": (c,)} if version == 1 else {"grn.gamma": (4 * c,), "grn.beta": (4 * c,)}
            shapes |= {f"stages.{i}.{j}.{key}": shape for key, shape in block.items()}
    shapes = {f"encoder.{key}": shape for key, shape in shapes.items()}
    for i, c in enumerate(reversed(widths)):
        shapes |= {f"densify.{i}.norm.weight": (c,), f"densify.{i}.norm.bias": (c,)}
        shapes[f"densify.{i}.mask_token"] = (1, c, 1, 1)
        if i or c != width:
            out, size = width // 2**i, 3 if i else 1
            shapes |= {f"densify.{i}.projection.weight": (out, c, size, size), f"densify.{i}.projection.bias": (out,)}
    decoder = spark_me.build_model("resnet18", decoder_width=width).decoder
    return shapes | {f"decoder.{key}": tuple(tensor.shape) for key, tensor in decoder.state_dict().items()}


def assert_same(actual, expected):
    """The same tensors, bitwise, in whatever order."""
    assert_bitwise(dict(sorted(actual.items())), dict(sorted(expected.items())))
