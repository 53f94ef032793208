"""The gathering depthwise convolution against dense torch in float64; on the CPU by Triton's interpreter."""

import masked_convolutions as reference
import pytest
import torch
from conftest import contract_masks
from kernel_compilation import compile_in_new_process
from masked_convolutions import assert_near, doubled, random, results, square_window

from spark_me import sparse
from spark_me.sparse.neighbours import Neighbours, VisiblePatches

depthwise = pytest.importorskip("spark_me.sparse.kernels.depthwise", reason="Triton is not installed")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")


def compare(stride, size, channels, dtype, block, visible=None, patch=8, device="cpu"):
    """Outputs and the gradients of rows, kernel and bias against dense torch."""
    pyramid = sparse.Pyramid(contract_masks() if visible is None else visible, patch)
    neighbours = Neighbours(VisiblePatches.of(pyramid.visible.to(device)), patch)
    inputs = [
        random(*shape, dtype=dtype, seed=seed, device=device)
        for seed, shape in enumerate([(neighbours.sites(stride), channels), (size**2, channels), (channels,)])
    ]
    window = square_window(stride, size)
    actual = depthwise.convolution(*inputs, neighbours.inputs_of_outputs(window), block)
    rows, kernel, bias = doubles = doubled(inputs)
    weight = reference.torch_weight(kernel[:, None], window.size)
    expected = reference.convolution(rows, weight, window, pyramid, groups=channels) + bias
    assert_near(results(actual, inputs), results(expected, doubles), dtype)


@interpreted
@pytest.mark.parametrize("stride, size, channels", [(4, 3, 5), (8, 7, 33), (4, 7, 3), (8, 5, 64), (8, 3, 1)])
def test_equals_the_dense_convolution_of_the_masked_map(stride, size, channels):
    compare(stride, size, channels, torch.float32, block=64)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float64(dtype):
    compare(8, 7, 5, dtype, block=32)


@interpreted
def test_several_parts_of_the_kernel_gradient_repeat_bit_by_bit(monkeypatch):
    monkeypatch.setattr(depthwise, "MIN_STEPS", 1)
    compare(4, 3, 5, torch.float32, block=32)
    neighbours = Neighbours(VisiblePatches.of(contract_masks()), 8)
    inputs = [random(*shape, dtype=torch.float32, seed=2) for shape in [(neighbours.sites(4), 5), (9, 5), (5,)]]
    table, kept = neighbours.inputs_of_outputs(square_window(4, 3)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        runs = [results(depthwise.convolution(*inputs, table, 32), inputs) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs))
    assert kept == [inputs[0].shape, inputs[1].shape] * 2


COMPILATION = """
import torch
from kernel_compilation import compiled_kernels
from masked_convolutions import square_window
from spark_me.sparse.kernels import depthwise
from spark_me.sparse.neighbours import Neighbours, VisiblePatches

neighbours = Neighbours(VisiblePatches.of(torch.ones(1, 3, 4, dtype=torch.bool)), 8)
table = neighbours.inputs_of_outputs(square_window(4, 7))
with compiled_kernels() as kernels:
    for dtype, channels in ((torch.bfloat16, 64), (torch.bfloat16, 96), (torch.float32, 5)):
        shapes = (neighbours.sites(4), channels), (49, channels), (channels,)
        inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
        depthwise.convolution(*inputs, table, 64).sum().backward()
for kernel in kernels:
    print(kernel.metadata.name)
"""


def test_the_kernels_compile_for_an_h100():
    compiled = compile_in_new_process(COMPILATION)
    assert compiled == ["_convolve_kernel", "_convolve_kernel", "_correlate_kernel"] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride, size, channels", [(4, 7, 96), (8, 7, 192), (16, 7, 384), (32, 7, 768), (8, 3, 5)])
def test_on_a_gpu_equals_dense_torch(stride, size, channels, dtype):
    visible = torch.rand(16, 7, 7, generator=torch.Generator().manual_seed(4)) < 0.4
    visible[:, 0, 0] = True
    for block in depthwise.BLOCKS.values():
        compare(stride, size, channels, dtype, block, visible, 32, "cuda")
