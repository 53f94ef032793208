"""Triton kernels of GELU followed by a global response norm, over the rows [N, C] of a batch of images.

An image's rows lie side by side: those of image b are `first_rows[b]` to `first_rows[b + 1]`. The programs [columns, B,
parts] take some channels, and one of `parts` equal parts, of the rows of an image. Arithmetic and sums are in float32,
the latter in a fixed order. GELU is exact, and computed again wherever it is needed rather than read.
"""

import triton
import triton.language as tl


@triton.jit
def _part_of_image(first_rows: tl.tensor, parts: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The first row of this program, and the one after its last."""
    first = tl.load(first_rows + tl.program_id(1))
    end = tl.load(first_rows + tl.program_id(1) + 1)
    rows_of_part = tl.cdiv(end - first, parts)
    start = first + tl.program_id(2) * rows_of_part
    return start, tl.minimum(start + rows_of_part, end)


@triton.jit
def _normal_distribution(x: tl.tensor) -> tl.tensor:
    """Φ(x), so that GELU is x·Φ(x)."""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def squares_of_parts(
    x: tl.tensor,
    first_rows: tl.tensor,
    squares: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Sums of gelu(x)² over the rows of each part: [B, parts, C]."""
    start, end = _part_of_image(first_rows, parts)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    while start < end:
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (channel < channels)
        value = tl.load(x + row * channels + channel, mask=mask, other=0.0).to(tl.float32)
        activated = value * _normal_distribution(value)
        total += activated * activated
        start += ROWS
    place = (tl.program_id(1) * parts + tl.program_id(2)) * channels + channel
    tl.store(squares + place, tl.sum(total, axis=0)[None, :], mask=channel < channels)


@triton.jit
def respond(
    x: tl.tensor,
    first_rows: tl.tensor,
    scale: tl.tensor,
    beta: tl.tensor,
    out: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """gelu(x)·scale + beta, with `scale` [B, C] float32."""
    start, end = _part_of_image(first_rows, parts)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    scales = tl.load(scale + tl.program_id(1) * channels + channel, mask=channel < channels, other=0.0)
    betas = tl.load(beta + channel, mask=channel < channels, other=0.0).to(tl.float32)
    while start < end:
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (channel < channels)
        value = tl.load(x + row * channels + channel, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row * channels + channel, value * _normal_distribution(value) * scales + betas, mask=mask)
        start += ROWS


@triton.jit
def gradient_sums_of_parts(
    x: tl.tensor,
    gradient: tl.tensor,
    first_rows: tl.tensor,
    sums: tl.tensor,
    products: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """Sums of the output's gradient g, and of g·gelu(x), over the rows of each part: two [B, parts, C]."""
    start, end = _part_of_image(first_rows, parts)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    product = tl.zeros([ROWS, CHANNELS], tl.float32)
    while start < end:
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (channel < channels)
        value = tl.load(x + row * channels + channel, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(gradient + row * channels + channel, mask=mask, other=0.0).to(tl.float32)
        total += upstream
        product += upstream * value * _normal_distribution(value)
        start += ROWS
    place = (tl.program_id(1) * parts + tl.program_id(2)) * channels + channel
    tl.store(sums + place, tl.sum(total, axis=0)[None, :], mask=channel < channels)
    tl.store(products + place, tl.sum(product, axis=0)[None, :], mask=channel < channels)


@triton.jit
def input_gradient(
    x: tl.tensor,
    gradient: tl.tensor,
    first_rows: tl.tensor,
    scale: tl.tensor,
    pull: tl.tensor,
    grad_x: tl.tensor,
    channels: tl.tensor,
    parts: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """(g·scale + gelu(x)·pull)·gelu′(x), with `scale` and `pull` [B, C] float32."""
    start, end = _part_of_image(first_rows, parts)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    of_image = tl.program_id(1) * channels + channel
    scales = tl.load(scale + of_image, mask=channel < channels, other=0.0)
    pulls = tl.load(pull + of_image, mask=channel < channels, other=0.0)
    while start < end:
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (channel < channels)
        value = tl.load(x + row * channels + channel, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(gradient + row * channels + channel, mask=mask, other=0.0).to(tl.float32)
        distribution = _normal_distribution(value)
        density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
        grad_activated = upstream * scales + value * distribution * pulls
        slope = distribution + value * density
        tl.store(grad_x + row * channels + channel, grad_activated * slope, mask=mask)
        start += ROWS
