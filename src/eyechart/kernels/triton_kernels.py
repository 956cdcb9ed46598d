"""The kernels that :mod:`eyechart.kernels.gpu` launches.

The first is attention with a running softmax, carrying besides the maximum and the sum of each row
the sums that entropy and distance are made of, and the scores of the three keys that are asked for
by name. The second walks down the columns with the row maxima known, so it needs no values. Scores
are in units of log 2 throughout, as exp2 takes them.
"""

# Triton need not be installed.
# pyright: reportMissingImports=false, reportIndexIssue=false

import math
from typing import no_type_check

import triton
import triton.language as tl

# Finite, so that the difference of two masked scores is a number. What a row gathers before it sees
# its first key is wiped out by the rescaling that comes with that key.
MASKED = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1 / math.log(2))
LN_2 = tl.constexpr(math.log(2))


# Here and below: a kernel is compiled from its source and globals, so no checker may wrap it.
@triton.jit
@no_type_check
def _tile(base, at, local, columns, stride, n, width: tl.constexpr, edge: tl.constexpr):
    """Rows ``at + local`` of a matrix ``[n width]``, zero in the columns beyond its width.

    At an edge, rows beyond the matrix repeat its last one: whoever uses them masks them.
    """
    if edge:
        local = tl.minimum(local, n - 1 - at)
    # Only the start of the tile can be far enough away to need 64 bits.
    where = base + tl.cast(at, tl.int64) * stride + local[:, None] * stride + columns[None, :]
    if columns.shape[0] == width:
        tile = tl.load(where)
    else:
        tile = tl.load(where, mask=columns[None, :] < width, other=0.0)
    return tile


# The interpreter multiplies the bits of bfloat16 as if they were integers.
INTERPRETED = tl.constexpr(not isinstance(_tile, triton.JITFunction))


@triton.jit
@no_type_check
def _product(a, b):
    """``a @ b`` in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
@no_type_check
def _scores(a, b, inner, outer):
    """Scores of ``a @ b`` in units of log 2, as exp2 takes them."""
    scores = _product(a, b) * inner
    if outer is not None:
        scores = outer * _tanh(scores)
    return scores


@triton.jit
@no_type_check
def _tanh(x):
    """Good to a few units in the last place, also near zero, where (t - 1) / (t + 1) is not."""
    x = tl.minimum(tl.maximum(x, -10.0), 10.0)
    square = x * x
    small = square < 0.4
    t = tl.exp2(x * (2 * LOG2_E))
    # Near zero the continued fraction x / (1 + x²/(3 + x²/(5 + x²/(7 + x²/9)))).
    above = tl.where(small, x * (945 + square * (105 + square)), t - 1)
    below = tl.where(small, 945 + square * (420 + square * 15), t + 1)
    return above / below


@triton.jit
@no_type_check
def _pass_keys(
    top, total, entropy, distance, mixed, first, diagonal, previous,
    q, k, v, row, start, low, high, n, k_stride, v_stride, inner, outer,
    d: tl.constexpr, d_block: tl.constexpr, dv: tl.constexpr, dv_block: tl.constexpr,
    passing: tl.constexpr, edge: tl.constexpr,
):  # fmt: skip
    """Lets the blocks of keys from ``low`` to ``high`` pass a block of queries.

    Off the edges every query sees every key, and none of the keys is one that is asked for.
    """
    local = tl.arange(0, passing)
    for at in range(low, high, passing):
        keys = _tile(k, at, local, tl.arange(0, d_block), k_stride, n, d, edge)
        scores = _scores(q, tl.trans(keys), inner, outer)
        key = at + local
        if edge:
            away = row[:, None] - key[None, :]
            scores = tl.where((away >= 0) & (key[None, :] >= start[:, None]), scores, MASKED)
            origin = tl.where(key[None, :] == 0, scores, MASKED)
            first = tl.maximum(first, tl.max(origin, 1))
            diagonal = tl.maximum(diagonal, tl.max(tl.where(away == 0, scores, MASKED), 1))
            previous = tl.maximum(previous, tl.max(tl.where(away == 1, scores, MASKED), 1))
        risen = tl.maximum(top, tl.max(scores, 1))
        fall = top - risen
        shrink = tl.exp2(fall)
        scores -= risen[:, None]
        mass = tl.exp2(scores)
        steps = row.to(tl.float32)[:, None] - key.to(tl.float32)[None, :]
        # sum of mass * (score - top), moved to the new top before it shrinks.
        entropy = shrink * (entropy + fall * total) + tl.sum(mass * scores, 1)
        distance = shrink * distance + tl.sum(mass * steps, 1)
        total = shrink * total + tl.sum(mass, 1)
        values = _tile(v, at, local, tl.arange(0, dv_block), v_stride, n, dv, edge)
        mixed = shrink[:, None] * mixed + _product(mass.to(values.dtype), values)
        top = risen
    return top, total, entropy, distance, mixed, first, diagonal, previous


@triton.jit(do_not_specialize=["n"])
@no_type_check
def rows_kernel(
    q, k, v, starts, sinks, out, rows, peaks, virtual,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    plane, n, heads, group, inner, outer,
    d: tl.constexpr, d_block: tl.constexpr, dv: tl.constexpr, dv_block: tl.constexpr,
    kept: tl.constexpr, passing: tl.constexpr,
):  # fmt: skip
    """Output and row statistics of one block of queries of one head.

    ``rows`` holds planes in the order of ``gpu.ROWS``; ``peaks`` gets the largest score in units of
    log 2, which the second kernel needs.
    """
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    # The last queries see most keys: longest jobs first.
    at = (tl.num_programs(1) - 1 - tl.program_id(1)) * kept
    local = tl.arange(0, kept)
    row = at + local
    q += tl.cast(batch, tl.int64) * q_batch + tl.cast(head, tl.int64) * q_head
    k += tl.cast(batch, tl.int64) * k_batch + tl.cast(head // group, tl.int64) * k_head
    v += tl.cast(batch, tl.int64) * v_batch + tl.cast(head // group, tl.int64) * v_head
    queries = _tile(q, at, local, tl.arange(0, d_block), q_row, n, d, True)
    start = tl.zeros_like(row)
    if starts is not None:
        start = tl.load(starts + tl.cast(batch, tl.int64) * n + tl.minimum(row, n - 1))

    # Masks are needed up to the last start, from the key before the first query on, and for key 0.
    low = tl.min(start, 0) // passing * passing
    high = tl.minimum(at + kept, n)
    right = tl.maximum(tl.maximum(at - 1, 0) // passing * passing, low)
    left = tl.minimum(tl.maximum(tl.cdiv(tl.max(start, 0), passing), 1) * passing, right)

    masked = tl.full([kept], MASKED, tl.float32)
    zero = tl.zeros([kept], tl.float32)
    mixed = tl.zeros([kept, dv_block], tl.float32)
    top, total, entropy, distance, mixed, first, diagonal, previous = _pass_keys(
        masked, zero, zero, zero, mixed, masked, masked, masked,
        queries, k, v, row, start, low, left, n, k_row, v_row, inner, outer,
        d, d_block, dv, dv_block, passing, True,
    )  # fmt: skip
    top, total, entropy, distance, mixed, first, diagonal, previous = _pass_keys(
        top, total, entropy, distance, mixed, first, diagonal, previous,
        queries, k, v, row, start, left, right, n, k_row, v_row, inner, outer,
        d, d_block, dv, dv_block, passing, False,
    )  # fmt: skip
    top, total, entropy, distance, mixed, first, diagonal, previous = _pass_keys(
        top, total, entropy, distance, mixed, first, diagonal, previous,
        queries, k, v, row, start, right, high, n, k_row, v_row, inner, outer,
        d, d_block, dv, dv_block, passing, True,
    )  # fmt: skip

    here = tl.cast(tl.program_id(0), tl.int64) * n + row
    real = row < n
    # All relative to the largest logit, the sink's too: the sum, and what the keys have of it.
    reference = top
    by_keys = total
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2_E
        reference = tl.maximum(top, sink)
        by_keys = total * tl.exp2(top - reference)
        sunk = tl.exp2(sink - reference)
        total = by_keys + sunk
        tl.store(virtual + here, sunk / total, mask=real)
    log_total = tl.log2(total)
    share = tl.exp2(top - reference) / total
    lse = reference - top + log_total
    tl.store(peaks + here, top, mask=real)
    rows += here
    plane = tl.cast(plane, tl.int64)
    tl.store(rows, tl.exp2(first - top) * share, mask=real)
    tl.store(rows + plane, tl.exp2(diagonal - top) * share, mask=real)
    tl.store(rows + 2 * plane, tl.exp2(previous - top) * share, mask=real)
    tl.store(rows + 3 * plane, (by_keys / total * lse - entropy * share) * LN_2, mask=real)
    tl.store(rows + 4 * plane, share, mask=real)
    tl.store(rows + 5 * plane, distance * share, mask=real)
    tl.store(rows + 6 * plane, (reference + log_total) * LN_2, mask=real)
    column = tl.arange(0, dv_block)
    tl.store(
        out + here[:, None] * dv + column[None, :],
        (mixed * share[:, None]).to(out.dtype.element_ty),
        mask=real[:, None] & (column < dv)[None, :],
    )


@triton.jit
@no_type_check
def _pass_queries(
    sums, keys, q, key, starts, peaks, largest, low, high, n, length, q_stride, inner, outer,
    d: tl.constexpr, d_block: tl.constexpr, passing: tl.constexpr, edge: tl.constexpr,
):  # fmt: skip
    """Lets the blocks of queries from ``low`` to ``high`` pass a block of keys.

    Off the edges every query is real and sees every key.
    """
    local = tl.arange(0, passing)
    for at in range(low, high, passing):
        queries = _tile(q, at, local, tl.arange(0, d_block), q_stride, n, d, edge)
        scores = _scores(keys, tl.trans(queries), inner, outer)
        row = at + local
        if edge:
            real = row < length
            peak = tl.load(peaks + row, mask=real, other=0.0)
            weight = tl.load(largest + row, mask=real, other=0.0)
            seen = (row[None, :] >= key[:, None]) & real[None, :]
            if starts is not None:
                start = tl.load(starts + row, mask=real, other=0)
                seen &= key[:, None] >= start[None, :]
            scores = tl.where(seen, scores, MASKED)
        else:
            peak = tl.load(peaks + row)
            weight = tl.load(largest + row)
        sums += tl.exp2(scores - peak[None, :]) * weight[None, :]
    return sums


@triton.jit(do_not_specialize=["n"])
@no_type_check
def columns_kernel(
    q, k, starts, seers, lengths, peaks, largest, received,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    n, heads, group, inner, outer,
    d: tl.constexpr, d_block: tl.constexpr,
    kept: tl.constexpr, passing: tl.constexpr,
):  # fmt: skip
    """What one block of keys of one head receives from the real queries.

    The mass on a key is exp2 of how far its score is below the row's ``peaks``, times the row's
    ``largest`` mass: nearer the first kernel's than with the rounded log-sum-exp.
    """
    batch = tl.cast(tl.program_id(0) // heads, tl.int64)
    head = tl.cast(tl.program_id(0) % heads, tl.int64)
    at = tl.program_id(1) * kept
    local = tl.arange(0, kept)
    length = tl.load(lengths + batch)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head // group * k_head
    keys = _tile(k, at, local, tl.arange(0, d_block), k_row, n, d, True)

    low = at // passing * passing
    high = length
    whole = length // passing * passing
    if seers is not None:
        starts += batch * n
        seers += (batch * tl.num_programs(1) + tl.program_id(1)) * 2
        whole = tl.minimum(whole, tl.load(seers))
        high = tl.minimum(high, tl.load(seers + 1))
    # Past the diagonal, where the first query of a block sees the last key.
    past = tl.minimum(tl.cdiv(at + kept - 1, passing) * passing, high)
    whole = tl.maximum(tl.minimum(whole, high), past)

    here = tl.cast(tl.program_id(0), tl.int64) * n
    peaks += here
    largest += here
    # Kept apart by query within the block, and added up once, at the end.
    sums = tl.zeros([kept, passing], tl.float32)
    sums = _pass_queries(
        sums, keys, q, at + local, starts, peaks, largest, low, past, n, length, q_row,
        inner, outer, d, d_block, passing, True,
    )  # fmt: skip
    sums = _pass_queries(
        sums, keys, q, at + local, starts, peaks, largest, past, whole, n, length, q_row,
        inner, outer, d, d_block, passing, False,
    )  # fmt: skip
    sums = _pass_queries(
        sums, keys, q, at + local, starts, peaks, largest, whole, high, n, length, q_row,
        inner, outer, d, d_block, passing, True,
    )  # fmt: skip
    tl.store(received + here + at + local, tl.sum(sums, 1), mask=at + local < n)
