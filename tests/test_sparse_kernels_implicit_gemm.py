"""Implicit GEMM against dense torch in float64; on the CPU by Triton's interpreter, so shapes are tiny."""

import subprocess
import sys

import masked_convolutions as reference
import pytest
import torch
from conftest import contract_masks
from kernel_compilation import compile_in_new_process
from masked_convolutions import assert_near, doubled, random, results, square_window

from spark_me import sparse
from spark_me.sparse.neighbours import Neighbours, VisiblePatches, Window

implicit_gemm = pytest.importorskip("spark_me.sparse.kernels.implicit_gemm", reason="Triton is not installed")

PATCH = 8
SMALL = implicit_gemm.Blocks(16, 32, 16, warps=4, stages=2)
WIDE = implicit_gemm.Blocks(64, 64, 32, warps=4, stages=2)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
gpu = pytest.mark.gpu


def dense_convolution(rows, kernel, window, pyramid):
    return reference.convolution(rows, reference.torch_weight(kernel, window.size), window, pyramid)


def compare(window, channels, blocks, dtype, visible=None, patch=PATCH, device="cpu"):
    """Outputs and both gradients against dense torch."""
    pyramid = sparse.Pyramid(contract_masks() if visible is None else visible, patch)
    neighbours = Neighbours(VisiblePatches.of(pyramid.visible.to(device)), patch)
    rows = random(neighbours.sites(window.in_stride), channels[0], dtype=dtype, seed=0, device=device)
    kernel = random(window.volume, *channels, dtype=dtype, seed=1, device=device)
    table = neighbours.inputs_of_outputs(window)
    actual = implicit_gemm.convolution(rows, kernel, table, lambda: neighbours.outputs_of_inputs(window), blocks)
    inputs = doubled([rows, kernel])
    expected = dense_convolution(*inputs, window, pyramid)
    assert_near(results(actual, [rows, kernel]), results(expected, inputs), dtype)


@interpreted
@pytest.mark.parametrize(
    "window, channels",
    [
        (square_window(8, 3, 1), (5, 7)),
        (square_window(4, 3, 1), (16, 40)),
        (square_window(2, 3, 2), (5, 7)),
        (square_window(4, 3, 2), (33, 16)),
        (square_window(2, 7, 2), (3, 8)),
        (square_window(4, 1, 2), (5, 7)),
        (square_window(4, 2, 2), (16, 17)),
        (square_window(4, 3, 1, 2), (5, 7)),
        (square_window(2, 5, 2, 3), (4, 4)),
        (square_window(8, 7, 1), (1, 1)),
        (Window(4, (1, 7), 1, (1, 1), (0, 3)), (5, 7)),
        (Window(4, (3, 5), 2, (1, 2), (1, 4)), (4, 4)),
        (Window(2, (3, 3), 2, (1, 1), (0, 0)), (5, 7)),
        (Window(4, (4, 4), 2, (1, 1), (1, 1)), (5, 7)),
    ],
)
def test_equals_the_dense_convolution_of_the_masked_map(window, channels):
    compare(window, channels, WIDE, torch.float32)


@interpreted
@pytest.mark.parametrize("window", [square_window(4, 3, 1), square_window(4, 3, 2)])
def test_half_precision_is_near_float64(window):
    """float16 alone: the interpreter's product takes the bits of bfloat16 for integers. On a GPU both are tested."""
    compare(window, (17, 40), WIDE, torch.float16)


@interpreted
def test_several_blocks_along_every_axis(monkeypatch):
    monkeypatch.setattr(implicit_gemm, "MIN_STEPS", 1)  # many parts of the kernel gradient
    compare(square_window(8, 3, 1), (37, 70), SMALL, torch.float32)


@interpreted
def test_offsets_without_any_neighbour():
    """One visible patch, one site: eight of nine offsets find nothing."""
    visible = torch.tensor([[[False, True], [False, False]]])
    compare(square_window(8, 3, 1), (3, 4), SMALL, torch.float32, visible)
    compare(square_window(4, 3, 2), (3, 4), SMALL, torch.float32, visible)


def compare_to_map(channels, stride, size, dtype, blocks, pyramid, device="cpu"):
    neighbours = Neighbours(VisiblePatches.of(pyramid.visible.to(device)), pyramid.patch_size)
    rows = random(neighbours.sites(stride), channels[0], dtype=dtype, seed=0, device=device)
    kernel = random(size**2, *channels, dtype=dtype, seed=1, device=device)
    table = neighbours.inputs_of_places(stride, size)
    actual = implicit_gemm.convolution(rows, kernel, table, lambda: neighbours.places_of_inputs(stride, size), blocks)
    inputs = doubled([rows, kernel])
    expected = reference.convolution_to_map(*inputs, stride, pyramid)
    assert_near(results(actual, [rows, kernel]), results(expected, inputs), dtype)


@interpreted
@pytest.mark.parametrize("stride, size, channels", [(4, 3, (5, 7)), (8, 3, (16, 33)), (8, 5, (3, 4))])
def test_outputs_at_every_place_of_the_dense_map(stride, size, channels):
    compare_to_map(channels, stride, size, torch.float32, WIDE, sparse.Pyramid(contract_masks(), PATCH))


@interpreted
def test_runs_repeat_bit_by_bit_and_keep_rows_and_kernel_only():
    neighbours, window = Neighbours(VisiblePatches.of(contract_masks()), PATCH), square_window(4, 3, 1)
    rows, kernel = (
        random(neighbours.sites(4), 8, dtype=torch.float32, seed=0),
        random(9, 8, 8, dtype=torch.float32, seed=1),
    )
    table, kept = neighbours.inputs_of_outputs(window), []
    runs = []
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            out = implicit_gemm.convolution(rows, kernel, table, lambda: neighbours.outputs_of_inputs(window), WIDE)
        runs.append(results(out, [rows, kernel]))
    assert all(torch.equal(*pair) for pair in zip(*runs))
    assert kept == [rows.shape, kernel.shape] * 2


COMPILATION = """
import torch
from kernel_compilation import compiled_kernels
from masked_convolutions import square_window
from spark_me.sparse.kernels import implicit_gemm
from spark_me.sparse.neighbours import Neighbours, VisiblePatches

def compile_all(dtype, pairs):
    for channels in pairs:
        rows = torch.randn(neighbours.sites(4), channels[0]).to(dtype).requires_grad_()
        kernel = torch.randn(9, *channels).to(dtype).requires_grad_()
        for blocks in implicit_gemm.block_choices(dtype, *channels, rows.device).values():
            implicit_gemm.convolution(rows, kernel, table, lambda: back, blocks).sum().backward()

def tables_of(visible, stride):
    neighbours, window = Neighbours(VisiblePatches.of(visible), 8), square_window(stride, 3, 8 // stride)
    return neighbours, neighbours.inputs_of_outputs(window), neighbours.outputs_of_inputs(window)

neighbours, table, back = tables_of(torch.ones(1, 3, 4, dtype=torch.bool), 4)
with compiled_kernels() as kernels:
    compile_all(torch.bfloat16, [(256, 512), (3, 24)])
    neighbours, table, back = tables_of(torch.ones(1, 1, 1, dtype=torch.bool), 4)  # one site, to Triton a constant
    compile_all(torch.bfloat16, [(16, 1)])
    compile_all(torch.float32, [(64, 96)])
    torch.backends.cuda.matmul.allow_tf32 = True
    compile_all(torch.float32, [(64, 128)])
for kernel in kernels:
    print(kernel.metadata.name, kernel.metadata.shared, kernel.asm["ptx"].count("wgmma.mma_async"), sep=",")
"""


def test_the_kernels_compile_for_an_h100_and_take_its_tensor_cores():
    """Also what fits: a program may have 227 KiB of shared memory there."""
    compiled = [line.split(",") for line in compile_in_new_process(COMPILATION)]
    assert {name for name, _, _ in compiled} == {"_multiply_kernel", "_correlate_kernel"}
    assert max(int(shared) for _, shared, _ in compiled) <= 227 * 1024
    # forward, input and kernel gradient of the first convolution, in its three cuts
    assert all(int(products) > 0 for _, _, products in compiled[:9])


@pytest.mark.parametrize(
    "dtype, channels, kibibytes, names",
    [
        (torch.bfloat16, (512, 512), 227, ["64x64", "128x128", "128x256"]),  # H100
        (torch.bfloat16, (512, 512), 99, ["64x64", "128x128"]),  # consumer cards
        (torch.bfloat16, (512, 512), 48, ["64x64"]),
        (torch.bfloat16, (64, 64), 227, ["64x64", "128x64"]),
        (torch.float16, (3, 20), 227, ["64x32", "128x32"]),
        (torch.float32, (512, 512), 227, ["64x64"]),
    ],
)
def test_every_way_to_cut_that_fits_is_named_once(dtype, channels, kibibytes, names, monkeypatch):
    monkeypatch.setattr(implicit_gemm, "_shared_memory", lambda device: kibibytes * 1024)
    assert list(implicit_gemm.block_choices(dtype, *channels, torch.device("cuda", 0))) == names


def test_importing_the_sparse_layers_imports_no_triton():
    program = "import sys, spark_me.sparse; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.fixture
def exact_products():
    """float32 products without TF32, in our kernels and in cuDNN."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


def random_masks(images, rows, columns):
    visible = torch.rand(images, rows, columns, generator=torch.Generator().manual_seed(4)) < 0.4
    visible[:, 0, 0] = True
    return visible


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "window, channels",
    [
        (square_window(4, 3, 1), (64, 64)),
        (square_window(8, 3, 1), (128, 128)),
        (square_window(16, 3, 1), (256, 256)),
        (square_window(32, 3, 1), (512, 512)),
        (square_window(4, 3, 2), (128, 128)),
        (square_window(16, 3, 2), (512, 512)),
        (square_window(1, 7, 2), (3, 64)),
        (square_window(8, 3, 1, 2), (96, 40)),
        (square_window(8, 3, 1), (5, 7)),
    ],
)
def test_on_a_gpu_every_way_to_cut_equals_dense_torch(window, channels, dtype, exact_products):
    images = max(2, 20000 * window.out_stride**2 // 32**2 // 20)  # about 20,000 outputs
    visible = random_masks(min(images, 256), 7, 7)
    for blocks in implicit_gemm.block_choices(dtype, *channels, torch.device("cuda", 0)).values():
        compare(window, channels, blocks, dtype, visible, 32, "cuda")


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_dense_map_equals_dense_torch(dtype, exact_products):
    pyramid = sparse.Pyramid(random_masks(8, 7, 7), 32)
    for blocks in implicit_gemm.block_choices(dtype, 256, 64, torch.device("cuda", 0)).values():
        compare_to_map((256, 64), 4, 3, dtype, blocks, pyramid, "cuda")


@gpu
def test_on_a_gpu_tf32_is_near_float64(exact_products):
    torch.backends.cuda.matmul.allow_tf32 = True
    window, visible = square_window(8, 3, 1), random_masks(16, 7, 7)
    pyramid, neighbours = sparse.Pyramid(visible, 32), Neighbours(VisiblePatches.of(visible.cuda()), 32)
    rows = random(neighbours.sites(8), 128, dtype=torch.float32, seed=0, device="cuda")
    kernel = random(9, 128, 128, dtype=torch.float32, seed=1, device="cuda")
    inputs = doubled([rows, kernel])
    expected = results(dense_convolution(*inputs, window, pyramid), inputs)
    for blocks in implicit_gemm.block_choices(torch.float32, 128, 128, rows.device).values():
        table = neighbours.inputs_of_outputs(window)
        out = implicit_gemm.convolution(rows, kernel, table, lambda: neighbours.outputs_of_inputs(window), blocks)
        for ours, theirs in zip(results(out, [rows, kernel]), expected):
            assert ((ours.double() - theirs).norm() / theirs.norm()).item() < 1e-3


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_runs_repeat_bit_by_bit(dtype, exact_products):
    window, neighbours = square_window(8, 3, 2), Neighbours(VisiblePatches.of(random_masks(64, 7, 7).cuda()), 32)
    rows = random(neighbours.sites(8), 128, dtype=dtype, seed=0, device="cuda")
    kernel = random(9, 128, 256, dtype=dtype, seed=1, device="cuda")
    for blocks in implicit_gemm.block_choices(dtype, 128, 256, rows.device).values():
        runs = []
        for _ in range(3):
            table = neighbours.inputs_of_outputs(window)
            out = implicit_gemm.convolution(rows, kernel, table, lambda: neighbours.outputs_of_inputs(window), blocks)
            runs.append(results(out, [rows, kernel]))
        for run in runs[1:]:
            assert all(torch.equal(*pair) for pair in zip(run, runs[0]))
