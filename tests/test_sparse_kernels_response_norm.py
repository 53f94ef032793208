"""Triton's GELU and global response norm against a gather loop over images in float64.

Without a GPU the kernels run in Triton's interpreter. With one they run on it, and tests marked `gpu` repeat what
a real device could break.
"""

import pytest
import torch
from conftest import contract_masks, randomise, relative_error
from kernel_compilation import compile_in_new_process
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import spark_me
from spark_me import sparse
from spark_me.encoder import sparsify
from spark_me.sparse import norms
from spark_me.sparse.images import first_rows
from spark_me.sparse.kernels import response_norm as fused
from spark_me.sparse.kernels.response_norm import fused_gelu_response_norm
from spark_me.sparse.rules.modules import rowwise

pytestmark = pytest.mark.any_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATCH = 8
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Images are cut into two parts, and a part takes several tiles, the last incomplete."""
    monkeypatch.setattr(fused, "PROGRAMS", 12)


class Case:
    """Rows at `stride` of the contract's masks, whose scale differs between images, and an upstream gradient."""

    def __init__(self, stride, channels, dtype=torch.float32, visible=None, device=DEVICE):
        visible = contract_masks() if visible is None else visible
        self.pyramid = sparse.Pyramid(visible.to(device), PATCH)
        self.image = self.pyramid.image_index(stride)
        generator = torch.Generator().manual_seed(stride + channels)
        rows = torch.randn(len(self.image), channels, generator=generator).to(device)
        self.rows = (rows * (self.image[:, None] % 7 + 1) / 2).to(dtype).requires_grad_()
        self.upstream = (torch.randn(rows.shape, generator=generator) + 1).to(device, dtype)  # sums that do not cancel
        self.first_rows = first_rows(self.pyramid, stride)
        layer = randomise(sparse.GlobalResponseNorm(channels)).to(device)
        self.gamma, self.beta = layer.weight, layer.bias

    def run(self):
        out = fused_gelu_response_norm(self.rows, self.gamma, self.beta, self.first_rows)
        out.backward(self.upstream)
        return {"output": out, "rows": self.rows.grad, "gamma": self.gamma.grad, "beta": self.beta.grad}

    def expected(self):
        rows, gamma, beta = (x.detach().double().requires_grad_() for x in (self.rows, self.gamma, self.beta))
        parts = []
        for image in range(len(self.first_rows) - 1):
            x = rows[self.image == image]
            x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
            norm = x.square().sum(dim=0).sqrt()
            parts.append(gamma * x * (norm / (norm.mean() + 1e-6)) + beta + x)
        out = torch.cat(parts)
        out.backward(self.upstream.double())
        return {"output": out, "rows": rows.grad, "gamma": gamma.grad, "beta": beta.grad}


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert relative_error(actual[name].double(), wanted.double()) < tolerance, name


@pytest.mark.parametrize("stride, channels", [(1, 64), (2, 5), (4, 100), (8, 1), (8, 6)])
def test_outputs_and_gradients_equal_float64(stride, channels):
    case = Case(stride, channels)
    assert_same(case.run(), case.expected(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_statistics_in_float32(dtype):
    case = Case(2, 9, dtype)
    with torch.no_grad():
        case.rows *= 100  # squares exceed the range of float16
    actual = case.run()
    assert actual["output"].dtype == actual["rows"].dtype == dtype
    assert actual["gamma"].dtype == torch.float32
    assert_same(actual, case.expected(), TOLERANCE[dtype])


def test_a_channel_that_is_zero_in_an_image_has_finite_gradients():
    case = Case(4, 6)
    with torch.no_grad():
        case.rows[case.image == 1, 2] = 0
    gradient = case.run()["rows"]
    assert gradient.isfinite().all()
    # Half of the output's gradient: GELU's slope at zero; the norm itself has the subgradient zero.
    of_image = case.image == 1
    torch.testing.assert_close(gradient[of_image, 2], case.upstream[of_image, 2] / 2)


def test_only_the_rows_are_kept():
    case = Case(2, 6)
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        fused_gelu_response_norm(case.rows, case.gamma, case.beta, case.first_rows)
    images = len(case.first_rows) - 1
    assert sorted(kept) == sorted([6, images + 1, 6 * images, case.rows.numel()])


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_blocks_do_not_depend_on_the_kernels(version, linear, monkeypatch):
    """timm's, whose GELU and response norm are found behind its dropout of nothing and computed as one."""
    results, asked = [], []
    for in_triton in (False, True):
        monkeypatch.setattr(norms, "computes_in_triton", lambda rows, yes=in_triton: asked.append(rows) or yes)
        block = ConvNeXtBlock(4, use_grn=version == 2, conv_mlp=not linear, drop_path=0.0)
        encoder = sparsify(randomise(nn.Sequential(nn.Conv2d(3, 4, 4, 4), block, nn.Conv2d(4, 4, 2, 2)))).to(DEVICE)
        images = torch.randn(6, 3, 24, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE).requires_grad_()
        pyramid = sparse.Pyramid(contract_masks().to(DEVICE), PATCH, "native")
        outputs = [x.F for x in encoder(sparse.to_sparse(images, pyramid))]
        sum((x * x.detach().cos()).sum() for x in outputs).backward()
        gradients = {name: x.grad for name, x in encoder.named_parameters()}
        results.append(dict(enumerate(outputs)) | {"images": images.grad} | gradients)
    assert_same(results[1], results[0], 1e-4)
    assert len(asked) == (2 if version == 2 else 0)


def test_gelu_before_the_norm_is_torchs(visible):
    layer = randomise(sparse.GlobalResponseNorm(5))
    x = sparse.to_sparse(torch.randn(len(visible), 5, 24, 32), sparse.Pyramid(visible, PATCH))
    assert torch.equal(layer(x, gelu=True).F, layer(rowwise(nn.GELU(), x)).F)


COMPILATION = """
import torch
from kernel_compilation import compiled_kernels
from spark_me.sparse.kernels.response_norm import fused_gelu_response_norm

with compiled_kernels() as kernels:
    rows = torch.randn(64, 384).bfloat16().requires_grad_()
    gamma, beta = (torch.ones(384, requires_grad=True) for _ in range(2))
    fused_gelu_response_norm(rows, gamma, beta, torch.tensor([0, 16, 64])).sum().backward()
print(*sorted({kernel.metadata.name for kernel in kernels}))
"""


def test_the_kernels_compile_for_a_gpu():
    names = ["gradient_sums_of_parts", "input_gradient", "respond", "squares_of_parts"]
    assert compile_in_new_process(COMPILATION) == names


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride, channels, images", [(1, 384, 64), (8, 3072, 64), (2, 768, 2)])
def test_realistic_sizes_on_a_gpu_are_right_and_reproducible(stride, channels, images, dtype, monkeypatch):
    monkeypatch.undo()  # all programs
    visible = torch.rand(images, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    visible[:, 0, 0] = True
    first, second = (Case(stride, channels, dtype, visible, "cuda") for _ in range(2))
    expected, actual = first.expected(), first.run()
    assert_same(actual, expected, max(2 * TOLERANCE[dtype], 1e-4))  # sums of many rows
    for name, again in second.run().items():
        assert torch.equal(again, actual[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_keeps_half_precision_under_autocast_on_a_gpu(dtype):
    case = Case(2, 96, dtype, device="cuda")
    layer, reference = (randomise(kind).cuda() for kind in (sparse.LayerNorm(96, 1e-6), nn.LayerNorm(96, 1e-6)))
    with torch.autocast("cuda", dtype=dtype):
        out = layer(sparse.at_stride(sparse.to_sparse(torch.zeros(6, 1, 24, 32).cuda(), case.pyramid), 2, case.rows)).F
    assert out.dtype == dtype
    out.backward(case.upstream)
    rows = case.rows.detach().double().requires_grad_()
    expected = reference.double()(rows)
    expected.backward(case.upstream.double())
    pairs = [(out, expected), (case.rows.grad, rows.grad)]
    pairs += [(layer.weight.grad, reference.weight.grad), (layer.bias.grad, reference.bias.grad)]
    for actual, wanted in pairs:
        assert relative_error(actual.double(), wanted) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["convnextv2_atto", "convnext_tiny"])
def test_a_whole_encoder_on_a_gpu_equals_float64_on_the_cpu(name, visible, monkeypatch, assert_close):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = torch.randn(len(visible), 3, 96, 128, generator=torch.Generator().manual_seed(1))
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        model = spark_me.build_model(name, image_size=(96, 128), decoder_width=32, drop_path=0.0, backend="native")
        model = randomise(model).to(device, dtype)
        features = model.encode(images.to(device, dtype), visible.to(device))
        torch.stack([x.square().mean() + x.mean() for x in features]).sum().backward()
        gradients = {f"gradient of {key}": x.grad for key, x in model.encoder.named_parameters()}
        results.append({f"features {number}": x for number, x in enumerate(features)} | gradients)
    for key, actual in results[0].items():
        assert_close(actual.cpu(), results[1][key].float(), key)
