"""Scaled cosine attention in shifted windows and its gradients, for a GPU. gpu.py launches these kernels.

Tokens are read and written in place, by index: nothing is rolled, padded or partitioned. A program holds all keys of a
window (in the gradients of keys and values, all queries), so a softmax is computed at once. The size of a block is a power
of two. To avoid 256 places for 144 tokens, the N tokens of a window are divided into a WHOLE block, the largest power of two
in N, and a block for the REST, 0 for none. Places from N on are filler. Padding of the map has places below N.

Matrix products multiply q, k, v and gradients in the type they are stored in, which may be a half precision, and sum in
float32. q and k are normalized after their product, by a float32 factor per row and per column, so logits are not rounded.
The operands of second products (weights, gradients of logits) are rounded once.

Shape letters: B images, h heads, D channels of a head, M windows of one image, N tokens of one window, T tokens of an image.
DIM is D rounded up to a power of two. Window m of image b has the index b · M + m over all images.

    qkv (B · T, 3, h, D), q_bias, v_bias (h, D), scale (h), bias (h, N, N), mixed (B · T, h, D)
    token_of (M, N), -1 for padding; region_of (label_rows, N), labels 4 · group + region, read if HAS_REGIONS; label_rows is
    M, for all images the same, or B · M
    normalizers (B · M, h, 2, N) float32: the largest logit of each query, and 1 / the sum of exp2(logit − largest). Logits
    are to base 2, multiplied by log₂ e: exp2 is one instruction, and exp, whose results may be denormal, five
    deltas (B · M, h, N) float32: the mean of the gradients of a query's weights, weighted by these weights
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from simmim.encoders.shifted_windows import geometry
from simmim.encoders.swinv2 import model

MASKED_LOGIT = tl.constexpr(geometry.MASKED_LOGIT)
OTHER_GROUP_LOGIT = tl.constexpr(geometry.OTHER_GROUP_LOGIT)
REGIONS = tl.constexpr(geometry.REGIONS)
LOG2_E = tl.constexpr(math.log2(math.e))
SMALLEST_NORM = tl.constexpr(model.SMALLEST_NORM)
# Of a pair with a filler place, which has no weight. Differences of infinities would be NaN.
FILLER_LOGIT = tl.constexpr(-1e30)
# These differ between the stages of an encoder. By default Triton compiles a kernel again for values that are 1 or divisible
# by 16.
RUNTIME_SIZES = ["tokens", "windows", "label_rows", "heads", "shares", "num_windows", "chunks"]


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def forward(
    qkv, q_bias, v_bias, scale, bias, token_of, region_of, mixed, normalizers, tokens, windows, label_rows, heads,
    shares, N: tl.constexpr, D: tl.constexpr, HAS_REGIONS: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a share of a window's queries to all of its keys. A program per (window of an image, share of the query
    blocks, head). Heads of a window are neighbors, because the heads of a token share cache lines."""
    head = tl.program_id(0) % heads
    share = tl.program_id(0) // heads % shares
    image_window = tl.program_id(0) // heads // shares
    window, first_row = image_window % windows, tl.cast(image_window // windows, tl.int64) * tokens
    label_row = image_window % label_rows
    window_head = tl.cast(image_window, tl.int64) * heads + head
    factor = tl.load(scale + head)
    base2_factor = factor * LOG2_E
    stride, q_column, k_column, v_column = columns_of(heads, head, D)

    k_place, k_token, k_region = load_places(token_of, region_of, window, label_row, 0, N, HAS_REGIONS, WHOLE)
    k = load_rows(qkv, first_row, k_token, stride, k_column, D, DIM)
    v = with_bias(load_rows(qkv, first_row, k_token, stride, v_column, D, DIM), v_bias, head, D, DIM)
    k_factor = inverse_or_0(norms(k))
    if REST > 0:
        k2_place, k2_token, k2_region = load_places(token_of, region_of, window, label_row, WHOLE, N, HAS_REGIONS, REST)
        k2 = load_rows(qkv, first_row, k2_token, stride, k_column, D, DIM)
        v2 = with_bias(load_rows(qkv, first_row, k2_token, stride, v_column, D, DIM), v_bias, head, D, DIM)
        k2_factor = inverse_or_0(norms(k2))

    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    for block in range(blocks * share // shares, blocks * (share + 1) // shares):
        place, token, region = load_places(token_of, region_of, window, label_row, block * BLOCK, N, HAS_REGIONS, BLOCK)
        q = with_bias(load_rows(qkv, first_row, token, stride, q_column, D, DIM), q_bias, head, D, DIM)
        q_factor = inverse_or_0(norms(q)) * base2_factor
        logits = logits_of(
            q,
            k,
            q_factor,
            k_factor,
            place,
            k_place,
            region,
            k_region,
            bias + head * N * N,
            N,
            HAS_REGIONS,
            False,
            WHOLE,
            PRECISION,
        )
        row_max = tl.max(logits, 1)
        if REST > 0:
            logits2 = logits_of(
                q,
                k2,
                q_factor,
                k2_factor,
                place,
                k2_place,
                region,
                k2_region,
                bias + head * N * N,
                N,
                HAS_REGIONS,
                False,
                WHOLE + REST,
                PRECISION,
            )
            row_max = tl.maximum(row_max, tl.max(logits2, 1))
        weights = tl.exp2(logits - row_max[:, None])
        total = tl.sum(weights, 1)
        if REST > 0:
            weights2 = tl.exp2(logits2 - row_max[:, None])
            total += tl.sum(weights2, 1)
        out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        if REST > 0:
            out = tl.dot(weights2.to(v.dtype), v2, out, input_precision=PRECISION)
        inverse_sum = inverse(total)
        store_rows(mixed, first_row, token, heads * D, head * D, out * inverse_sum[:, None], D, DIM)
        tl.store(normalizers + window_head * 2 * N + place, row_max, mask=place < N)
        tl.store(normalizers + window_head * 2 * N + N + place, inverse_sum, mask=place < N)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def backward_of_queries(
    qkv, q_bias, v_bias, scale, bias, token_of, region_of, normalizers, grad_mixed, grad_qkv, deltas, grad_bias,
    grad_q_bias, grad_scale, tokens, windows, label_rows, heads, num_windows, chunks, N: tl.constexpr, D: tl.constexpr,
    HAS_REGIONS: tl.constexpr, WHOLE: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, and of what all windows share. A program per (chunk of the windows of all images, block of
    queries, head), which sums over its windows. Also writes `deltas` for `backward_of_keys`.

    grad_bias (chunks, h, N, N), grad_q_bias (chunks, blocks, h, D), grad_scale (chunks, blocks, h): sums of each
    program, float32.
    """
    head = tl.program_id(0) % heads
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    block = tl.program_id(0) // heads % blocks
    chunk = tl.program_id(0) // heads // blocks
    factor = tl.load(scale + head)
    base2_factor = factor * LOG2_E
    stride, q_column, k_column, v_column = columns_of(heads, head, D)
    # Gradients of logits are about 1 / N of those of weights, and may underflow in float16. They are scaled for the product.
    GRAD_SCALE: tl.constexpr = WHOLE

    bias_sum = tl.zeros((BLOCK, WHOLE), tl.float32)
    if REST > 0:
        bias_sum2 = tl.zeros((BLOCK, REST), tl.float32)
    q_bias_sum = tl.zeros((BLOCK, DIM), tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    first = (chunk.to(tl.int64) * num_windows // chunks).to(tl.int32)
    last = ((chunk + 1).to(tl.int64) * num_windows // chunks).to(tl.int32)
    for image_window in range(first, last):
        window, first_row = image_window % windows, tl.cast(image_window // windows, tl.int64) * tokens
        label_row = image_window % label_rows
        place, token, region = load_places(token_of, region_of, window, label_row, block * BLOCK, N, HAS_REGIONS, BLOCK)
        q = with_bias(load_rows(qkv, first_row, token, stride, q_column, D, DIM), q_bias, head, D, DIM)
        grad = load_rows(grad_mixed, first_row, token, heads * D, head * D, D, DIM)
        q_norm = norms(q)
        inverse_norm = inverse(tl.maximum(q_norm, SMALLEST_NORM))
        window_head = tl.cast(image_window, tl.int64) * heads + head
        row_max, inverse_sum = load_normalizers(normalizers, window_head, place, N)

        k_place, k_token, k_region = load_places(token_of, region_of, window, label_row, 0, N, HAS_REGIONS, WHOLE)
        k = load_rows(qkv, first_row, k_token, stride, k_column, D, DIM)
        v = with_bias(load_rows(qkv, first_row, k_token, stride, v_column, D, DIM), v_bias, head, D, DIM)
        k_factor = inverse_or_0(norms(k))
        logits = logits_of(
            q,
            k,
            inverse_norm * base2_factor,
            k_factor,
            place,
            k_place,
            region,
            k_region,
            bias + head * N * N,
            N,
            HAS_REGIONS,
            False,
            WHOLE,
            PRECISION,
        )
        weights = tl.exp2(logits - row_max[:, None]) * inverse_sum[:, None]
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        delta = tl.sum(weights * grad_weights, 1)
        if REST > 0:
            k2_place, k2_token, k2_region = load_places(token_of, region_of, window, label_row, WHOLE, N, HAS_REGIONS, REST)
            k2 = load_rows(qkv, first_row, k2_token, stride, k_column, D, DIM)
            v2 = with_bias(load_rows(qkv, first_row, k2_token, stride, v_column, D, DIM), v_bias, head, D, DIM)
            k2_factor = inverse_or_0(norms(k2))
            logits2 = logits_of(
                q,
                k2,
                inverse_norm * base2_factor,
                k2_factor,
                place,
                k2_place,
                region,
                k2_region,
                bias + head * N * N,
                N,
                HAS_REGIONS,
                False,
                WHOLE + REST,
                PRECISION,
            )
            weights2 = tl.exp2(logits2 - row_max[:, None]) * inverse_sum[:, None]
            grad_weights2 = tl.dot(grad, tl.trans(v2), input_precision=PRECISION)
            delta += tl.sum(weights2 * grad_weights2, 1)
        tl.store(deltas + window_head * N + place, delta, mask=place < N)

        grad_logits = weights * (grad_weights - delta[:, None])
        bias_sum += grad_logits
        grad_unit = tl.dot((grad_logits * (k_factor * GRAD_SCALE)[None, :]).to(k.dtype), k, input_precision=PRECISION)
        if REST > 0:
            grad_logits2 = weights2 * (grad_weights2 - delta[:, None])
            bias_sum2 += grad_logits2
            grad_unit = tl.dot(
                (grad_logits2 * (k2_factor * GRAD_SCALE)[None, :]).to(k2.dtype), k2, grad_unit, input_precision=PRECISION
            )
        grad_unit = grad_unit * (1 / GRAD_SCALE)
        unit = q.to(tl.float32) * inverse_norm[:, None]
        inner = tl.sum(unit * grad_unit, 1)
        scale_sum += inner
        grad_q = normalize_back(grad_unit, unit, inner, q_norm, inverse_norm) * factor
        q_bias_sum += grad_q
        store_rows(grad_qkv, first_row, token, stride, q_column, grad_q, D, DIM)

    place = block * BLOCK + tl.arange(0, BLOCK)
    pairs = grad_bias + (chunk.to(tl.int64) * heads + head) * N * N + place[:, None] * N
    column = tl.arange(0, WHOLE)
    tl.store(pairs + column[None, :], bias_sum, mask=(place < N)[:, None] & (column < N)[None, :])
    if REST > 0:
        column2 = WHOLE + tl.arange(0, REST)
        tl.store(pairs + column2[None, :], bias_sum2, mask=(place < N)[:, None] & (column2 < N)[None, :])
    sums_offset = (chunk * blocks + block) * heads + head
    channel = tl.arange(0, DIM)
    tl.store(grad_q_bias + sums_offset * D + channel, tl.sum(q_bias_sum, 0), mask=channel < D)
    tl.store(grad_scale + sums_offset, tl.sum(scale_sum, 0))


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def backward_of_keys(
    qkv, q_bias, v_bias, scale, bias, token_of, region_of, normalizers, deltas, grad_mixed, grad_qkv, grad_v_bias,
    tokens, windows, label_rows, heads, shares, N: tl.constexpr, D: tl.constexpr, HAS_REGIONS: tl.constexpr,
    WHOLE: tl.constexpr, REST: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values. A program per (window of an image, share of the key blocks, head). Logits and weights
    are transposed here: a row per key.

    grad_v_bias (B · M, shares, h, D): sums of each program, float32. Padding tokens count too, as their values are the bias.
    """
    head = tl.program_id(0) % heads
    share = tl.program_id(0) // heads % shares
    image_window = tl.program_id(0) // heads // shares
    window, first_row = image_window % windows, tl.cast(image_window // windows, tl.int64) * tokens
    label_row = image_window % label_rows
    factor = tl.load(scale + head)
    base2_factor = factor * LOG2_E
    stride, q_column, k_column, v_column = columns_of(heads, head, D)
    window_head = tl.cast(image_window, tl.int64) * heads + head
    GRAD_SCALE: tl.constexpr = WHOLE

    q_place, q_token, q_region = load_places(token_of, region_of, window, label_row, 0, N, HAS_REGIONS, WHOLE)
    q = with_bias(load_rows(qkv, first_row, q_token, stride, q_column, D, DIM), q_bias, head, D, DIM)
    grad = load_rows(grad_mixed, first_row, q_token, heads * D, head * D, D, DIM)
    q_factor = inverse_or_0(norms(q))
    row_max, inverse_sum = load_normalizers(normalizers, window_head, q_place, N)
    delta = tl.load(deltas + window_head * N + q_place, mask=q_place < N, other=0.0)
    if REST > 0:
        q2_place, q2_token, q2_region = load_places(token_of, region_of, window, label_row, WHOLE, N, HAS_REGIONS, REST)
        q2 = with_bias(load_rows(qkv, first_row, q2_token, stride, q_column, D, DIM), q_bias, head, D, DIM)
        grad2 = load_rows(grad_mixed, first_row, q2_token, heads * D, head * D, D, DIM)
        q2_factor = inverse_or_0(norms(q2))
        row_max2, inverse_sum2 = load_normalizers(normalizers, window_head, q2_place, N)
        delta2 = tl.load(deltas + window_head * N + q2_place, mask=q2_place < N, other=0.0)

    v_bias_sum = tl.zeros((BLOCK, DIM), tl.float32)
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    for block in range(blocks * share // shares, blocks * (share + 1) // shares):
        place, token, region = load_places(token_of, region_of, window, label_row, block * BLOCK, N, HAS_REGIONS, BLOCK)
        k = load_rows(qkv, first_row, token, stride, k_column, D, DIM)
        v = with_bias(load_rows(qkv, first_row, token, stride, v_column, D, DIM), v_bias, head, D, DIM)
        k_norm = norms(k)
        inverse_norm = inverse(tl.maximum(k_norm, SMALLEST_NORM))
        logits = logits_of(
            k,
            q,
            inverse_norm,
            q_factor * base2_factor,
            place,
            q_place,
            region,
            q_region,
            bias + head * N * N,
            N,
            HAS_REGIONS,
            True,
            WHOLE,
            PRECISION,
        )
        weights = tl.exp2(logits - row_max[None, :]) * inverse_sum[None, :]
        grad_v = tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
        grad_logits = weights * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        grad_unit = tl.dot((grad_logits * (q_factor * GRAD_SCALE)[None, :]).to(q.dtype), q, input_precision=PRECISION)
        if REST > 0:
            logits2 = logits_of(
                k,
                q2,
                inverse_norm,
                q2_factor * base2_factor,
                place,
                q2_place,
                region,
                q2_region,
                bias + head * N * N,
                N,
                HAS_REGIONS,
                True,
                WHOLE + REST,
                PRECISION,
            )
            weights2 = tl.exp2(logits2 - row_max2[None, :]) * inverse_sum2[None, :]
            grad_v = tl.dot(weights2.to(grad.dtype), grad2, grad_v, input_precision=PRECISION)
            grad_logits2 = weights2 * (tl.dot(v, tl.trans(grad2), input_precision=PRECISION) - delta2[None, :])
            grad_unit = tl.dot(
                (grad_logits2 * (q2_factor * GRAD_SCALE)[None, :]).to(q.dtype), q2, grad_unit, input_precision=PRECISION
            )
        grad_unit = grad_unit * (factor * (1 / GRAD_SCALE))
        unit = k.to(tl.float32) * inverse_norm[:, None]
        grad_k = normalize_back(grad_unit, unit, tl.sum(unit * grad_unit, 1), k_norm, inverse_norm)
        store_rows(grad_qkv, first_row, token, stride, k_column, grad_k, D, DIM)
        store_rows(grad_qkv, first_row, token, stride, v_column, grad_v, D, DIM)
        v_bias_sum += grad_v

    channel = tl.arange(0, DIM)
    sums_offset = ((image_window * shares + share) * heads + head).to(tl.int64) * D
    tl.store(grad_v_bias + sums_offset + channel, tl.sum(v_bias_sum, 0), mask=channel < D)


# --- parts ---------------------------------------------------------------------------------------------------------------


@triton.jit
def columns_of(heads, head, D: tl.constexpr):
    """The row length of qkv, and the first columns of a head's q, k and v."""
    return 3 * heads * D, head * D, (heads + head) * D, (2 * heads + head) * D


@triton.jit
def load_places(
    token_of, region_of, window, label_row, first, N: tl.constexpr, HAS_REGIONS: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK places of a window from `first` on, their tokens, -1 for none, and their labels."""
    place = first + tl.arange(0, BLOCK)
    token = tl.load(token_of + window * N + place, mask=place < N, other=-1)
    region = place
    if HAS_REGIONS:
        region = tl.load(region_of + label_row * N + place, mask=place < N, other=0).to(tl.int32)
    return place, token, region


@triton.jit
def load_rows(x, first_row, token, stride, column, D: tl.constexpr, DIM: tl.constexpr):
    """Rows of x, (tokens, DIM), with zeros for padding."""
    channel = tl.arange(0, DIM)
    pointers = x + (first_row + token)[:, None] * stride + column + channel[None, :]
    valid = (token >= 0)[:, None]
    if DIM > D:
        valid = valid & (channel < D)[None, :]
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def store_rows(x, first_row, token, stride, column, values, D: tl.constexpr, DIM: tl.constexpr):
    """Write rows of x, (tokens, DIM), except padding."""
    channel = tl.arange(0, DIM)
    pointers = x + (first_row + token)[:, None] * stride + column + channel[None, :]
    valid = (token >= 0)[:, None]
    if DIM > D:
        valid = valid & (channel < D)[None, :]
    tl.store(pointers, values.to(x.dtype.element_ty), mask=valid)


@triton.jit
def load_normalizers(normalizers, window_head, place, N: tl.constexpr):
    """The normalizers of a head of a window: largest logits and inverse sums."""
    row_max = tl.load(normalizers + window_head * 2 * N + place, mask=place < N, other=0.0)
    return row_max, tl.load(normalizers + window_head * 2 * N + N + place, mask=place < N, other=0.0)


@triton.jit
def with_bias(x, bias, head, D: tl.constexpr, DIM: tl.constexpr):
    """x + bias, rounded as a linear layer with bias would."""
    channel = tl.arange(0, DIM)
    values = tl.load(bias + head * D + channel, mask=channel < D, other=0.0)
    return (x.to(tl.float32) + values.to(tl.float32)[None, :]).to(x.dtype)


@triton.jit
def norms(x):
    """The norm of each row, float32."""
    x = x.to(tl.float32)
    return tl.sqrt_rn(tl.sum(x * x, 1))


@triton.jit
def inverse(x):
    """1 / x, rounded to nearest, as `norms` is: plain division and root are approximate once they are compiled, which the
    interpreter does not show."""
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def inverse_or_0(norm):
    """1 / norm, or 0 for 0, the norm of padding's keys, whose products are 0. Products with 1e12 would overflow float16."""
    return tl.where(norm == 0, 0.0, inverse(tl.maximum(norm, SMALLEST_NORM)))


@triton.jit
def normalize_back(grad_unit, unit, inner, norm, inverse_norm):
    """The gradient of rows x from grad_unit, that of unit = inverse_norm · x. inner is grad_unit · unit of each row."""
    # A norm below SMALLEST_NORM was replaced by that constant, which has no gradient.
    inner = tl.where(norm < SMALLEST_NORM, 0.0, inner)
    return (grad_unit - unit * inner[:, None]) * inverse_norm[:, None]


@triton.jit
def logits_of(
    x,
    y,
    x_factor,
    y_factor,
    row,
    column,
    row_region,
    column_region,
    bias,
    N: tl.constexpr,
    HAS_REGIONS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    END: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits x_factor · y_factor · x @ yᵀ + bias + mask, (rows, columns). Columns end before END.

    x is queries and y keys; if TRANSPOSED, the other way round. Both orders give the same numbers: the backward pass must
    recompute the weights that the normalizers belong to, and at a logit of 100 the last bit is 1e-5 of a weight.
    """
    logits = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    valid = (row < N)[:, None]
    if END > N:
        valid = valid & (column < N)[None, :]
    if TRANSPOSED:
        logits, last_factor = logits * y_factor[None, :], x_factor[:, None]
        offsets = row[:, None] + column[None, :] * N
    else:
        logits, last_factor = logits * x_factor[:, None], y_factor[None, :]
        offsets = row[:, None] * N + column[None, :]
    # One rounding, said here: of a sum of two products the compiler might round either first.
    logits = tl.fma(logits, last_factor, tl.load(bias + offsets, mask=valid, other=FILLER_LOGIT) * LOG2_E)
    if HAS_REGIONS:
        other = row_region[:, None] ^ column_region[None, :]  # 1 to 3 for another region of the same group
        logits += tl.where(other == 0, 0.0, tl.where(other < REGIONS, MASKED_LOGIT * LOG2_E, OTHER_GROUP_LOGIT))
    return logits
