"""How a group of four warps takes column tiles into the maxima and sums of its 128 rows.

``state`` are the running maximum and sum of two times 64 rows, per row and place in a tile of
``UNITS`` key blocks; ``cursor`` the next slot of the ring of column tiles and the parity of its
use: see ``hopper_score_warps``. A tile has ``COLUMNS``: all places of ``UNITS`` key blocks, or some
from ``place`` on.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton import language as tl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from seer_compile.kernels.triton.hopper_steps import next_slot

KEEP_NAN = gl.constexpr(tl.PropagateNan.ALL)

LARGEST = gl.constexpr(65504.0)
"""Of float16, in which maxima are kept."""


@gluon.jit
def larger(left, right):
    """Return the larger number, NaN where either is."""
    return gl.maximum(left, right, propagate_nan=KEEP_NAN)


@gluon.jit
def _products(row, column_smem, slot):
    """Begin the products of 64 rows with a column tile: ``Float32[64 COLUMNS]``."""
    columns: gl.constexpr = column_smem.shape[3] * column_smem.shape[4]
    dim: gl.constexpr = column_smem.shape[5]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])
    zero = gl.zeros([64, columns], gl.float32, layout)
    column = column_smem.index(slot).reshape([columns, dim]).permute((1, 0))
    return hopper.warpgroup_mma(row, column, zero, use_acc=False, is_async=True)


@gluon.jit
def _visible(
    rows,
    step,
    place,
    band,
    num_columns,
    layout: gl.constexpr,
    COLUMNS: gl.constexpr,
    PLACES: gl.constexpr,
    UNITS: gl.constexpr,
    ROW_EXTENT: gl.constexpr,
    COLUMN_EXTENT: gl.constexpr,
):
    """Return ``[64 COLUMNS]``: which columns of a tile a row sees."""
    q_len, k_len, upper, lower = band
    rows = gl.convert_layout(rows, gl.SliceLayout(1, layout))
    within = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    columns = (step * UNITS + within % UNITS) * PLACES + (place + within // UNITS)
    first_key = columns * COLUMN_EXTENT
    last_key = gl.minimum(first_key + COLUMN_EXTENT, k_len) - 1
    first_query = rows * ROW_EXTENT
    last_query = gl.minimum(first_query + ROW_EXTENT, q_len) - 1
    visible = first_key[None, :] <= (last_query + upper)[:, None]
    visible = visible & (last_key[None, :] >= (first_query + lower)[:, None])
    return visible & (columns < num_columns)[None, :]


@gluon.jit
def _largest_of_units(product, qk_scale, UNITS: gl.constexpr, IS_EDGE: gl.constexpr):
    """Return ``Float32[64 UNITS]``, scaled; in the layout of a product of so many columns.

    What float16 has no room for becomes its largest number; a block without a column stays -inf.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, UNITS, 16])
    by_place = product.reshape([64, product.shape[1] // UNITS, UNITS])
    largest = gl.reduce(by_place, 1, larger)
    largest = gl.convert_layout(largest, layout) * qk_scale
    bounded = gl.minimum(largest, LARGEST, propagate_nan=KEEP_NAN)
    bounded = gl.maximum(bounded, -LARGEST, propagate_nan=KEEP_NAN)
    if IS_EDGE:
        bounded = gl.where(largest == float("-inf"), largest, bounded)
    return bounded


@gluon.jit
def _add_units(largest, state, IS_EDGE: gl.constexpr):
    """Add units to the running maximum and sum of each row and place."""
    running_max, running_sum = state
    new_max = larger(running_max, largest)
    base = new_max
    if IS_EDGE:
        base = gl.where(new_max == float("-inf"), 0.0, new_max)
    running_sum = running_sum * gl.exp2(running_max - base) + gl.exp2(largest - base)
    return new_max, running_sum


@gluon.jit
def _largest_of_tile(
    features,
    column_ring,
    rows,
    step,
    place,
    cursor,
    band,
    num_columns,
    qk_scale,
    PLACES: gl.constexpr,
    UNITS: gl.constexpr,
    ROW_EXTENT: gl.constexpr,
    COLUMN_EXTENT: gl.constexpr,
    STAGES: gl.constexpr,
    NEGATE: gl.constexpr,
    IS_EDGE: gl.constexpr,
):
    """Return the maxima of two times 64 rows, those of one behind the products of both."""
    column_smem, full, empty = column_ring
    slot, phase = cursor
    COLUMNS: gl.constexpr = column_smem.shape[3] * UNITS
    mbarrier.wait(full.index(slot), phase)
    first = _products(features[0], column_smem, slot)
    second = _products(features[1], column_smem, slot)
    first = hopper.warpgroup_mma_wait(1, deps=(first,))
    layout: gl.constexpr = first.type.layout
    if NEGATE:
        first = -first
    if IS_EDGE:
        visible = _visible(
            rows, step, place, band, num_columns, layout, COLUMNS, PLACES, UNITS, ROW_EXTENT,
            COLUMN_EXTENT,
        )  # fmt: skip
        first = gl.where(visible, first, float("-inf"))
    first_largest = _largest_of_units(first, qk_scale, UNITS, IS_EDGE)
    # Named here, or the compiler would make it after the wait instead of behind the products.
    second, first_largest = hopper.warpgroup_mma_wait(0, deps=(second, first_largest))
    mbarrier.arrive(empty.index(slot), count=1)
    if NEGATE:
        second = -second
    if IS_EDGE:
        visible = _visible(
            rows + 64, step, place, band, num_columns, layout, COLUMNS, PLACES, UNITS, ROW_EXTENT,
            COLUMN_EXTENT,
        )  # fmt: skip
        second = gl.where(visible, second, float("-inf"))
    second_largest = _largest_of_units(second, qk_scale, UNITS, IS_EDGE)
    return first_largest, second_largest, next_slot(slot, phase, STAGES)


@gluon.jit
def take(
    features,
    column_ring,
    state,
    targets,
    rows,
    step,
    cursor,
    band,
    num_columns,
    qk_scale,
    PLACES: gl.constexpr,
    UNITS: gl.constexpr,
    ROW_EXTENT: gl.constexpr,
    COLUMN_EXTENT: gl.constexpr,
    STAGES: gl.constexpr,
    NEGATE: gl.constexpr,
    IS_EDGE: gl.constexpr,
):
    """Take the column tiles of one step into two times 64 rows.

    ``state`` are the running maximum and sum of both, ``targets`` where their maxima are kept.
    """
    first_state, second_state = state
    TILE_PLACES: gl.constexpr = column_ring[0].shape[3]
    if PLACES > TILE_PLACES:
        first = gl.full([64, UNITS], float("-inf"), gl.float32, first_state[0].type.layout)
        second = first
        # Two tiles in a row would not fit a thread's registers, so no static range.
        for place in range(0, PLACES, TILE_PLACES):
            first_more, second_more, cursor = _largest_of_tile(
                features, column_ring, rows, step, place, cursor, band, num_columns, qk_scale,
                PLACES, UNITS, ROW_EXTENT, COLUMN_EXTENT, STAGES, NEGATE, IS_EDGE,
            )  # fmt: skip
            first, second = larger(first, first_more), larger(second, second_more)
    else:
        first, second, cursor = _largest_of_tile(
            features, column_ring, rows, step, 0, cursor, band, num_columns, qk_scale, PLACES,
            UNITS, ROW_EXTENT, COLUMN_EXTENT, STAGES, NEGATE, IS_EDGE,
        )  # fmt: skip
    first_state = _add_units(first, first_state, IS_EDGE)
    second_state = _add_units(second, second_state, IS_EDGE)
    gl.store(targets[0] + step * (128 * UNITS), first.to(gl.float16))
    gl.store(targets[1] + step * (128 * UNITS), second.to(gl.float16))
    return (first_state, second_state), cursor


@gluon.jit
def normalizer(state, rows, num_rows):
    """Return, per row, what is subtracted from its maxima: +inf where it sees nothing."""
    running_max, running_sum = state
    largest = gl.reduce(running_max, 1, larger)
    is_seeing = (rows < num_rows) & (largest != float("-inf"))
    base = gl.where(is_seeing, largest, 0.0)
    total = gl.sum(running_sum * gl.exp2(running_max - base[:, None]), 1)
    return gl.where(is_seeing, base + gl.log2(gl.where(is_seeing, total, 1.0)), float("inf"))
