"""Scaled cosine attention inside shifted windows and its gradients, for a GPU: what gpu.py launches.

Tokens are read and written where they lie, by index: nothing is rolled, padded or partitioned. A window's keys (or, in
the gradients of keys and values, its queries) are all there at once, so no softmax is made of pieces. Blocks have powers
of two places; so that 144 tokens need no 256, the N of a window are split into a WHOLE block, the largest power of two
in N, and a block for the REST, 0 for none. Places beyond N only fill a block: padding of the map has places.

Matrix products take q, k, v and gradients as they are stored, in half precision too, and sum in float32. q and k are not
normalized before their product but after: a row's and a column's factor, in float32, so logits are not rounded. What has
to be rounded for the next product, attention's weights and gradients of logits, is so once.

Shape letters as in `simmim.encoders.swinv2`: B images, h heads, D channels of a head, M windows of one image, N tokens of one
window; T tokens of an image. A window of an image has the number image · M + window. DIM is D filled to a power of two.

    qkv (B · T, 3, h, D), q_bias, v_bias (h, D), scale (h), bias (h, N, N), mixed (B · T, h, D)
    token_of (M, N), -1 for padding; region_of (M, N), read where DIVIDED
    normalizers (B · M, h, 2, N), each query's largest logit and 1 / the sum of exponentials of what is below it; in float32
    deltas (B · M, h, N), float32
"""

from __future__ import annotations

import triton
import triton.language as tl

from simmim.encoders.swinv2 import geometry

MASKED_LOGIT = tl.constexpr(geometry.MASKED_LOGIT)
# Of pairs one of which only fills a block: no weight. Of infinities differences would be no numbers.
FILLED_LOGIT = tl.constexpr(-1e30)
SMALLEST_NORM = tl.constexpr(1e-12)  # as in torch.nn.functional.normalize
# Every stage of an encoder has others. By default kernels would be compiled anew for those that are 1 or divided by 16.
COUNTS = ["tokens", "windows", "heads", "shares", "numbers", "chunks"]


@triton.jit(do_not_specialize=COUNTS)
def forward(
    qkv,
    q_bias,
    v_bias,
    scale,
    bias,
    token_of,
    region_of,
    mixed,
    normalizers,
    tokens,
    windows,
    heads,
    shares,
    N: tl.constexpr,
    D: tl.constexpr,
    DIVIDED: tl.constexpr,
    WHOLE: tl.constexpr,
    REST: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a share of a window's queries make of all its keys: a program (image's window, share of the query blocks,
    head). Heads come next to each other, for those of a token share lines of the cache."""
    head = tl.program_id(0) % heads
    share = tl.program_id(0) // heads % shares
    number = tl.program_id(0) // heads // shares
    window, first_row = number % windows, tl.cast(number // windows, tl.int64) * tokens
    pair = tl.cast(number, tl.int64) * heads + head
    factor = tl.load(scale + head)
    stride, q_at, k_at, v_at = columns_of(heads, head, D)

    k_place, k_token, k_region = places(token_of, region_of, window, 0, N, DIVIDED, WHOLE)
    k = load_rows(qkv, first_row, k_token, stride, k_at, D, DIM)
    v = with_bias(load_rows(qkv, first_row, k_token, stride, v_at, D, DIM), v_bias, head, D, DIM)
    k_by = inverse_or_0(norms(k))
    if REST > 0:
        k2_place, k2_token, k2_region = places(token_of, region_of, window, WHOLE, N, DIVIDED, REST)
        k2 = load_rows(qkv, first_row, k2_token, stride, k_at, D, DIM)
        v2 = with_bias(load_rows(qkv, first_row, k2_token, stride, v_at, D, DIM), v_bias, head, D, DIM)
        k2_by = inverse_or_0(norms(k2))

    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    for block in range(blocks * share // shares, blocks * (share + 1) // shares):
        place, token, region = places(token_of, region_of, window, block * BLOCK, N, DIVIDED, BLOCK)
        q = with_bias(load_rows(qkv, first_row, token, stride, q_at, D, DIM), q_bias, head, D, DIM)
        q_by = inverse_or_0(norms(q)) * factor
        logits = logits_of(
            q, k, q_by, k_by, place, k_place, region, k_region, bias + head * N * N, N, DIVIDED, False, WHOLE, PRECISION
        )
        most = tl.max(logits, 1)
        if REST > 0:
            logits2 = logits_of(
                q,
                k2,
                q_by,
                k2_by,
                place,
                k2_place,
                region,
                k2_region,
                bias + head * N * N,
                N,
                DIVIDED,
                False,
                WHOLE + REST,
                PRECISION,
            )
            most = tl.maximum(most, tl.max(logits2, 1))
        weights = tl.exp(logits - most[:, None])
        total = tl.sum(weights, 1)
        if REST > 0:
            weights2 = tl.exp(logits2 - most[:, None])
            total += tl.sum(weights2, 1)
        out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        if REST > 0:
            out = tl.dot(weights2.to(v.dtype), v2, out, input_precision=PRECISION)
        store_rows(mixed, first_row, token, heads * D, head * D, out * (1 / total)[:, None], D, DIM)
        tl.store(normalizers + pair * 2 * N + place, most, mask=place < N)
        tl.store(normalizers + pair * 2 * N + N + place, 1 / total, mask=place < N)


@triton.jit(do_not_specialize=COUNTS)
def backward_of_queries(
    qkv,
    q_bias,
    v_bias,
    scale,
    bias,
    token_of,
    region_of,
    normalizers,
    grad_mixed,
    grad_qkv,
    deltas,
    grad_bias,
    grad_q_bias,
    grad_scale,
    tokens,
    windows,
    heads,
    numbers,
    chunks,
    N: tl.constexpr,
    D: tl.constexpr,
    DIVIDED: tl.constexpr,
    WHOLE: tl.constexpr,
    REST: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of queries, and of all that windows share: a program (chunk of all images' windows, block of queries,
    head), which keeps the sums over its windows. For `backward_of_keys`, deltas: of each query the mean, by its weights, of
    their gradients, which softmax takes off each.

    grad_bias (chunks, h, N, N), grad_q_bias (chunks, blocks, h, D), grad_scale (chunks, blocks, h): sums of one program,
    float32.
    """
    head = tl.program_id(0) % heads
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    block = tl.program_id(0) // heads % blocks
    chunk = tl.program_id(0) // heads // blocks
    factor = tl.load(scale + head)
    stride, q_at, k_at, v_at = columns_of(heads, head, D)
    # Gradients of logits are about 1 / N of the weights', and may be too small for float16 where those are not.
    LIFT: tl.constexpr = WHOLE

    of_bias = tl.zeros((BLOCK, WHOLE), tl.float32)
    if REST > 0:
        of_bias2 = tl.zeros((BLOCK, REST), tl.float32)
    of_q_bias = tl.zeros((BLOCK, DIM), tl.float32)
    of_scale = tl.zeros((BLOCK,), tl.float32)
    first = (chunk.to(tl.int64) * numbers // chunks).to(tl.int32)
    last = ((chunk + 1).to(tl.int64) * numbers // chunks).to(tl.int32)
    for number in range(first, last):
        window, first_row = number % windows, tl.cast(number // windows, tl.int64) * tokens
        place, token, region = places(token_of, region_of, window, block * BLOCK, N, DIVIDED, BLOCK)
        q = with_bias(load_rows(qkv, first_row, token, stride, q_at, D, DIM), q_bias, head, D, DIM)
        grad = load_rows(grad_mixed, first_row, token, heads * D, head * D, D, DIM)
        q_norm = norms(q)
        by = 1 / tl.maximum(q_norm, SMALLEST_NORM)
        pair = tl.cast(number, tl.int64) * heads + head
        most, part = load_normalizers(normalizers, pair, place, N)

        k_place, k_token, k_region = places(token_of, region_of, window, 0, N, DIVIDED, WHOLE)
        k = load_rows(qkv, first_row, k_token, stride, k_at, D, DIM)
        v = with_bias(load_rows(qkv, first_row, k_token, stride, v_at, D, DIM), v_bias, head, D, DIM)
        k_by = inverse_or_0(norms(k))
        logits = logits_of(
            q,
            k,
            by * factor,
            k_by,
            place,
            k_place,
            region,
            k_region,
            bias + head * N * N,
            N,
            DIVIDED,
            False,
            WHOLE,
            PRECISION,
        )
        weights = tl.exp(logits - most[:, None]) * part[:, None]
        of_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        delta = tl.sum(weights * of_weights, 1)
        if REST > 0:
            k2_place, k2_token, k2_region = places(token_of, region_of, window, WHOLE, N, DIVIDED, REST)
            k2 = load_rows(qkv, first_row, k2_token, stride, k_at, D, DIM)
            v2 = with_bias(load_rows(qkv, first_row, k2_token, stride, v_at, D, DIM), v_bias, head, D, DIM)
            k2_by = inverse_or_0(norms(k2))
            logits2 = logits_of(
                q,
                k2,
                by * factor,
                k2_by,
                place,
                k2_place,
                region,
                k2_region,
                bias + head * N * N,
                N,
                DIVIDED,
                False,
                WHOLE + REST,
                PRECISION,
            )
            weights2 = tl.exp(logits2 - most[:, None]) * part[:, None]
            of_weights2 = tl.dot(grad, tl.trans(v2), input_precision=PRECISION)
            delta += tl.sum(weights2 * of_weights2, 1)
        tl.store(deltas + pair * N + place, delta, mask=place < N)

        of_logits = weights * (of_weights - delta[:, None])
        of_bias += of_logits
        of_unit = tl.dot((of_logits * (k_by * LIFT)[None, :]).to(k.dtype), k, input_precision=PRECISION)
        if REST > 0:
            of_logits2 = weights2 * (of_weights2 - delta[:, None])
            of_bias2 += of_logits2
            of_unit = tl.dot((of_logits2 * (k2_by * LIFT)[None, :]).to(k2.dtype), k2, of_unit, input_precision=PRECISION)
        of_unit = of_unit * (1 / LIFT)
        unit = q.to(tl.float32) * by[:, None]
        along = tl.sum(unit * of_unit, 1)
        of_scale += along
        of_q = normalize_back(of_unit, unit, along, q_norm, by) * factor
        of_q_bias += of_q
        store_rows(grad_qkv, first_row, token, stride, q_at, of_q, D, DIM)

    place = block * BLOCK + tl.arange(0, BLOCK)
    pairs = grad_bias + (chunk.to(tl.int64) * heads + head) * N * N + place[:, None] * N
    column = tl.arange(0, WHOLE)
    tl.store(pairs + column[None, :], of_bias, mask=(place < N)[:, None] & (column < N)[None, :])
    if REST > 0:
        column2 = WHOLE + tl.arange(0, REST)
        tl.store(pairs + column2[None, :], of_bias2, mask=(place < N)[:, None] & (column2 < N)[None, :])
    sums_at = (chunk * blocks + block) * heads + head
    channel = tl.arange(0, DIM)
    tl.store(grad_q_bias + sums_at * D + channel, tl.sum(of_q_bias, 0), mask=channel < D)
    tl.store(grad_scale + sums_at, tl.sum(of_scale, 0))


@triton.jit(do_not_specialize=COUNTS)
def backward_of_keys(
    qkv,
    q_bias,
    v_bias,
    scale,
    bias,
    token_of,
    region_of,
    normalizers,
    deltas,
    grad_mixed,
    grad_qkv,
    grad_v_bias,
    tokens,
    windows,
    heads,
    shares,
    N: tl.constexpr,
    D: tl.constexpr,
    DIVIDED: tl.constexpr,
    WHOLE: tl.constexpr,
    REST: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of keys and values: a program (image's window, share of the key blocks, head) and all its queries. Logits
    and weights stand here turned: a row for each key.

    grad_v_bias (B · M, shares, h, D): sums of one program, float32. Of padding tokens too, whose values are the bias.
    """
    head = tl.program_id(0) % heads
    share = tl.program_id(0) // heads % shares
    number = tl.program_id(0) // heads // shares
    window, first_row = number % windows, tl.cast(number // windows, tl.int64) * tokens
    factor = tl.load(scale + head)
    stride, q_at, k_at, v_at = columns_of(heads, head, D)
    pair = tl.cast(number, tl.int64) * heads + head
    LIFT: tl.constexpr = WHOLE

    q_place, q_token, q_region = places(token_of, region_of, window, 0, N, DIVIDED, WHOLE)
    q = with_bias(load_rows(qkv, first_row, q_token, stride, q_at, D, DIM), q_bias, head, D, DIM)
    grad = load_rows(grad_mixed, first_row, q_token, heads * D, head * D, D, DIM)
    q_by = inverse_or_0(norms(q))
    most, part = load_normalizers(normalizers, pair, q_place, N)
    delta = tl.load(deltas + pair * N + q_place, mask=q_place < N, other=0.0)
    if REST > 0:
        q2_place, q2_token, q2_region = places(token_of, region_of, window, WHOLE, N, DIVIDED, REST)
        q2 = with_bias(load_rows(qkv, first_row, q2_token, stride, q_at, D, DIM), q_bias, head, D, DIM)
        grad2 = load_rows(grad_mixed, first_row, q2_token, heads * D, head * D, D, DIM)
        q2_by = inverse_or_0(norms(q2))
        most2, part2 = load_normalizers(normalizers, pair, q2_place, N)
        delta2 = tl.load(deltas + pair * N + q2_place, mask=q2_place < N, other=0.0)

    of_v_bias = tl.zeros((BLOCK, DIM), tl.float32)
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK
    for block in range(blocks * share // shares, blocks * (share + 1) // shares):
        place, token, region = places(token_of, region_of, window, block * BLOCK, N, DIVIDED, BLOCK)
        k = load_rows(qkv, first_row, token, stride, k_at, D, DIM)
        v = with_bias(load_rows(qkv, first_row, token, stride, v_at, D, DIM), v_bias, head, D, DIM)
        k_norm = norms(k)
        by = 1 / tl.maximum(k_norm, SMALLEST_NORM)
        logits = logits_of(
            k,
            q,
            by,
            q_by * factor,
            place,
            q_place,
            region,
            q_region,
            bias + head * N * N,
            N,
            DIVIDED,
            True,
            WHOLE,
            PRECISION,
        )
        weights = tl.exp(logits - most[None, :]) * part[None, :]
        of_v = tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
        of_logits = weights * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        of_unit = tl.dot((of_logits * (q_by * LIFT)[None, :]).to(q.dtype), q, input_precision=PRECISION)
        if REST > 0:
            logits2 = logits_of(
                k,
                q2,
                by,
                q2_by * factor,
                place,
                q2_place,
                region,
                q2_region,
                bias + head * N * N,
                N,
                DIVIDED,
                True,
                WHOLE + REST,
                PRECISION,
            )
            weights2 = tl.exp(logits2 - most2[None, :]) * part2[None, :]
            of_v = tl.dot(weights2.to(grad.dtype), grad2, of_v, input_precision=PRECISION)
            of_logits2 = weights2 * (tl.dot(v, tl.trans(grad2), input_precision=PRECISION) - delta2[None, :])
            of_unit = tl.dot((of_logits2 * (q2_by * LIFT)[None, :]).to(q.dtype), q2, of_unit, input_precision=PRECISION)
        of_unit = of_unit * (factor / LIFT)
        unit = k.to(tl.float32) * by[:, None]
        of_k = normalize_back(of_unit, unit, tl.sum(unit * of_unit, 1), k_norm, by)
        store_rows(grad_qkv, first_row, token, stride, k_at, of_k, D, DIM)
        store_rows(grad_qkv, first_row, token, stride, v_at, of_v, D, DIM)
        of_v_bias += of_v

    channel = tl.arange(0, DIM)
    sums_at = ((number * shares + share) * heads + head).to(tl.int64) * D
    tl.store(grad_v_bias + sums_at + channel, tl.sum(of_v_bias, 0), mask=channel < D)


# --- Parts ---------------------------------------------------------------------------------------------------------------


@triton.jit
def columns_of(heads, head, D: tl.constexpr):
    """Of qkv: numbers in a row, and where in it this head's q, k and v begin."""
    return 3 * heads * D, head * D, (heads + head) * D, (2 * heads + head) * D


@triton.jit
def places(token_of, region_of, window, first, N: tl.constexpr, DIVIDED: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK places of a window from `first` on, their tokens, -1 for none, and their regions."""
    place = first + tl.arange(0, BLOCK)
    token = tl.load(token_of + window * N + place, mask=place < N, other=-1)
    region = place
    if DIVIDED:
        region = tl.load(region_of + window * N + place, mask=place < N, other=0)
    return place, token, region


@triton.jit
def load_rows(x, first_row, token, stride, column, D: tl.constexpr, DIM: tl.constexpr):
    """(tokens, DIM), 0 for padding."""
    channel = tl.arange(0, DIM)
    at = x + (first_row + token)[:, None] * stride + column + channel[None, :]
    there = (token >= 0)[:, None]
    if DIM > D:
        there = there & (channel < D)[None, :]
    return tl.load(at, mask=there, other=0.0)


@triton.jit
def store_rows(x, first_row, token, stride, column, values, D: tl.constexpr, DIM: tl.constexpr):
    """Writes (tokens, DIM), nothing for padding."""
    channel = tl.arange(0, DIM)
    at = x + (first_row + token)[:, None] * stride + column + channel[None, :]
    there = (token >= 0)[:, None]
    if DIM > D:
        there = there & (channel < D)[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=there)


@triton.jit
def load_normalizers(normalizers, pair, place, N: tl.constexpr):
    """Of a window and head: each query's largest logit, and its part of one."""
    most = tl.load(normalizers + pair * 2 * N + place, mask=place < N, other=0.0)
    return most, tl.load(normalizers + pair * 2 * N + N + place, mask=place < N, other=0.0)


@triton.jit
def with_bias(x, bias, head, D: tl.constexpr, DIM: tl.constexpr):
    """x + bias, rounded as the linear layer's own sum would be."""
    channel = tl.arange(0, DIM)
    added = tl.load(bias + head * D + channel, mask=channel < D, other=0.0)
    return (x.to(tl.float32) + added.to(tl.float32)[None, :]).to(x.dtype)


@triton.jit
def norms(x):
    """The length of each row, float32."""
    x = x.to(tl.float32)
    return tl.sqrt(tl.sum(x * x, 1))


@triton.jit
def inverse_or_0(norm):
    """1 / norm, for products in which a row of zeros counts nothing: padding's keys. By 1e12 it would overflow float16."""
    return tl.where(norm == 0, 0.0, 1 / tl.maximum(norm, SMALLEST_NORM))


@triton.jit
def normalize_back(of_unit, unit, along, norm, by):
    """The gradient of rows x from that of unit = by · x, by = 1 / norm; along is their product with unit."""
    # A norm too small to divide by is a constant.
    along = tl.where(norm < SMALLEST_NORM, 0.0, along)
    return (of_unit - unit * along[:, None]) * by[:, None]


@triton.jit
def logits_of(
    x,
    y,
    x_by,
    y_by,
    row,
    column,
    row_region,
    column_region,
    bias,
    N: tl.constexpr,
    DIVIDED: tl.constexpr,
    TURNED: tl.constexpr,
    END: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_by · y_by · x @ yᵀ and what is added for a pair's places and regions: (rows, columns); columns end before END.

    x is queries and y keys, or where TURNED the other way round. Both come to the same numbers: weights computed again are
    to have the sum that they had. At a logit of 100 the last bit is 1e-5 of a weight.
    """
    logits = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    inside = (row < N)[:, None]
    if END > N:
        inside = inside & (column < N)[None, :]
    if TURNED:
        logits = logits * y_by[None, :] * x_by[:, None]
        at = row[:, None] + column[None, :] * N
    else:
        logits = logits * x_by[:, None] * y_by[None, :]
        at = row[:, None] * N + column[None, :]
    logits += tl.load(bias + at, mask=inside, other=FILLED_LOGIT)
    if DIVIDED:
        logits += tl.where(row_region[:, None] == column_region[None, :], 0.0, MASKED_LOGIT)
    return logits
