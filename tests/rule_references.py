"""Operations of dense networks on visible sites, by loops over these sites, and encoders of networks that have them.

What reads no neighbours is done by torch to each image's visible sites alone, gathered into an image of 1 × n; what
does, by a loop over the places under a kernel.
"""

import itertools

import torch
from conftest import randomise
from torch import nn

from spark_me import sparse
from spark_me.encoder import sparsify

PATCH = 8
# everything, one corner, isolated patches that touch at corners and lie at borders
VISIBLE = torch.tensor([[[1, 1, 1], [1, 1, 1]], [[0, 0, 1], [0, 0, 0]], [[1, 0, 1], [0, 1, 0]]]).bool()
CHANNELS = C = 6


class Operation(nn.Module):
    """A function as a module, with layers and parameters that it may use."""

    def __init__(self, function, *layers, **parameters):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)
        for name, parameter in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.ones(parameter)))
        self.register_buffer("constant", torch.linspace(-1, 1, CHANNELS).view(1, -1, 1, 1))

    def forward(self, x):
        return self.function(self, x)


class Between(nn.Module):
    """An operation on a map at stride 2 between convolutions that look at no other patch; the total stride is 8."""

    def __init__(self, operation, channels=CHANNELS, step=1):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 2, 2)
        self.operation = operation if isinstance(operation, nn.Module) else Operation(operation)
        self.head = nn.Conv2d(channels, 4, 4 // step, 4 // step)

    def forward(self, x):
        return self.head(self.operation(self.stem(x)))


def places(visible, height):
    """Per image, the visible (y, x) of a map of this height."""
    side = height // visible.shape[1]
    for mask in visible:
        rows, columns = (range(length * side) for length in mask.shape)
        yield [(y, x) for y, x in itertools.product(rows, columns) if mask[y // side, x // side]]


def scattered(rows, sites, shape):
    """Rows [n, C] at their sites of a map [C, h, w], zero elsewhere."""
    out = rows.new_zeros(*shape, rows.shape[1])
    y, x = torch.tensor(sites).unbind(1)
    return out.index_put((y, x), rows).permute(2, 0, 1)


def of_images_alone(operation, x, visible):
    """Each image's visible sites through the operation, as an image of 1 × n."""
    out = []
    for image, sites in zip(x, places(visible, x.shape[2])):
        rows = torch.stack([image[:, y, column] for y, column in sites])
        done = operation(rows.t()[None, :, None])
        out.append(scattered(done[0, :, 0].t(), sites, x.shape[2:]))
    return torch.stack(out)


def windowed(x, visible, function, size, stride, before, mirrored=False):
    """`function` of {offset: values or None} at every output; None where hidden, absent beyond the map."""
    out = []
    for image, sites, outputs in zip(x, places(visible, x.shape[2]), places(visible, x.shape[2] // stride)):
        seen, rows = set(sites), []
        for y, column in outputs:
            under = {}
            for down, across in itertools.product(range(size[0]), range(size[1])):
                place = [y * stride - before[0] + down, column * stride - before[1] + across]
                if mirrored:
                    place = [min(abs(p), 2 * length - 2 - abs(p)) for p, length in zip(place, x.shape[2:])]
                if all(0 <= p < length for p, length in zip(place, x.shape[2:])):
                    under[down, across] = image[:, place[0], place[1]] if tuple(place) in seen else None
            rows.append(function(under))
        out.append(scattered(torch.stack(rows), outputs, [length // stride for length in x.shape[2:]]))
    return torch.stack(out)


def compare(network, reference, assert_close, backend="native", training=True):
    """The sparse encoder and the reference of the operation: maps, gradients of the images and of all parameters."""
    network = randomise(network).double().train(training)
    visible = VISIBLE
    images = torch.randn(3, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    images = images * torch.arange(1, 4).view(-1, 1, 1, 1)  # statistics over the batch would be far off
    parameters = list(network.parameters())
    theirs = images.clone().requires_grad_()
    expected = network.head(reference(network.operation, network.stem(theirs), visible))
    expected = expected * visible[:, None]
    encoder = sparsify(network)
    assert all(one is other for one, other in zip(encoder.parameters(), parameters))
    ours = images.clone().requires_grad_()
    actual = sparse.to_dense(encoder(sparse.to_sparse(ours, sparse.Pyramid(visible, PATCH, backend)))[-1])
    assert_close(actual, expected, "output")
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    wanted = torch.autograd.grad(expected, [theirs, *parameters], upstream)
    found = torch.autograd.grad(actual, [ours, *parameters], upstream)
    largest = max(gradient.abs().max() for gradient in wanted)
    for name, one, other in zip(["images", *dict(network.named_parameters())], found, wanted, strict=True):
        # of parameters that a norm behind them cancels, the gradient is rounding alone
        scale = max(other.abs().max(), 1e-4 * largest)
        assert (one - other).abs().max() < 1e-9 * scale, f"gradient of {name}"
