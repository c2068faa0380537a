"""The second stage of a deterministic reduction: partial rows to their sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch.conv import MAX_REGISTERS
from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import round_to, sum_lanes, to_fp32
from resnet_fused.ops.reduce_rows import Args


def row_blocks(rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of a tile of 4,096 elements: as many rows as there are, up to 256, since a program's latency is
    its number of steps.
    """
    block_rows = min(256, triton.next_power_of_2(max(rows, 1)))
    return block_rows, min(4096 // block_rows, 1024, triton.next_power_of_2(max(columns, 1)))


def row_spans(rows: int) -> int:
    """How many ranges of rows are reduced side by side: one program a column tile takes too many steps for thousands of
    rows, such as a data gradient at 56x56 leaves, and a second launch too long for few.
    """
    return min(64, triton.cdiv(rows, 256)) if rows > 1024 else 1


@triton.jit
def _sum_rows(
    first,
    first_sum,
    second,
    second_sum,
    third,
    third_sum,
    program,
    rows,
    columns,
    span,
    INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The `program`'s tile of columns of one range of `span` rows; row r is added to lane r % BLOCK_ROWS, in the order
    of r, and the lanes by a tree: one fixed order.
    """
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    range_index = (program // blocks).to(INDEX)
    column = (program % blocks).to(INDEX) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < columns
    begin = range_index * span
    end = tl.minimum(begin + span, rows)
    lane = begin + tl.arange(0, BLOCK_ROWS)
    out = range_index * columns + column
    first_acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    second_acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    third_acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, span, BLOCK_ROWS):
        row = start + lane
        valid = (row < end)[:, None] & exists[None, :]
        offset = row[:, None] * columns + column[None, :]
        first_acc += to_fp32(tl.load(first + offset, mask=valid, other=0.0))
        if second is not None:
            second_acc += to_fp32(tl.load(second + offset, mask=valid, other=0.0))
        if third is not None:
            third_acc += to_fp32(tl.load(third + offset, mask=valid, other=0.0))
    tl.store(first_sum + out, round_to(sum_lanes(first_acc), first_sum.dtype.element_ty), mask=exists)
    if second is not None:
        tl.store(second_sum + out, round_to(sum_lanes(second_acc), second_sum.dtype.element_ty), mask=exists)
    if third is not None:
        tl.store(third_sum + out, round_to(sum_lanes(third_acc), third_sum.dtype.element_ty), mask=exists)


@triton.jit
def _reduce_rows_kernel(
    first,  # [rows, columns]
    first_sum,  # [spans, columns]
    second,  # the same again, or None
    second_sum,
    third,  # the same again, or None
    third_sum,
    other,  # [other_rows, other_columns], or None
    other_sum,  # [other_columns]
    rows,
    columns,
    span,
    other_rows,
    other_columns,
    INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    OTHER_ROWS: tl.constexpr,
    OTHER_COLUMNS: tl.constexpr,
):
    """A program owns a tile of columns of `other`, or one of the others' and one range of their rows."""
    program = tl.program_id(0)
    if other is None:
        alike = (first, first_sum, second, second_sum, third, third_sum, program)
        _sum_rows(*alike, rows, columns, span, INDEX, BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        others = tl.cdiv(other_columns, OTHER_COLUMNS)
        if program < others:
            alone = (other, other_sum, None, None, None, None, program)
            _sum_rows(*alone, other_rows, other_columns, other_rows, INDEX, OTHER_ROWS, OTHER_COLUMNS)
        else:
            alike = (first, first_sum, second, second_sum, third, third_sum, program - others)
            _sum_rows(*alike, rows, columns, span, INDEX, BLOCK_ROWS, BLOCK_COLUMNS)


def _reduce(partials: tuple[Tensor, ...], dtype: torch.dtype, other: Tensor | None = None) -> tuple[Tensor, ...]:
    """The sums over dimension 0 of contiguous tensors of one shape, and last that of `other`, which is small in it."""
    first = partials[0]
    rows, columns = first.shape[0], first.new_empty(first.shape[1:]).numel()
    spans = row_spans(rows)
    kind = dtype if spans == 1 else torch.float32
    shape = first.shape[1:] if spans == 1 else (spans, *first.shape[1:])
    sums = tuple(first.new_empty(shape, dtype=kind) for _ in partials)
    span = triton.cdiv(rows, spans)
    block_rows, block_columns = row_blocks(span, columns)
    programs = triton.cdiv(columns, block_columns) * spans
    other_sum, other_rows, other_columns, other_blocks = None, 0, 0, (1, 1)
    if other is not None:
        other_sum = other.new_empty(other.shape[1:])
        other_rows, other_columns = other.shape[0], other_sum.numel()
        other_blocks = row_blocks(other_rows, other_columns)
        programs += triton.cdiv(other_columns, other_blocks[1])
    pairs = [t for pair in zip(partials, sums, strict=True) for t in pair]
    launch(
        _reduce_rows_kernel,
        programs,
        *pairs,
        *(None,) * (6 - len(pairs)),
        other,
        other_sum,
        rows,
        columns,
        span,
        other_rows,
        other_columns,
        INDEX=index_type(first.numel(), 0 if other is None else other.numel()),
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        OTHER_ROWS=other_blocks[0],
        OTHER_COLUMNS=other_blocks[1],
        maxnreg=MAX_REGISTERS,
    )
    sums = sums if spans == 1 else _reduce(sums, dtype)
    return sums if other_sum is None else (*sums, other_sum)


def reduce_rows(a: Args) -> Tensor:
    """Launch `ops.reduce_rows`."""
    return reduce_alike(a.partials.contiguous())[0]


def reduce_alike(*partials: Tensor, other: Tensor | None = None) -> tuple[Tensor, ...]:
    """`reduce_rows` of up to three contiguous tensors of one shape, and of one of another, in one launch.

    Args:
        partials: [rows, ...] each.
        other: [rows, ...] of any other shape, contiguous, or None.

    Returns:
        The sum of each, in this order.
    """
    return _reduce(partials, partials[0].dtype, other)
