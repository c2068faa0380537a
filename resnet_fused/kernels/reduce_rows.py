"""The second stage of a deterministic reduction: partial rows to their sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._launch import MAX_REGISTERS, index_type, launch
from resnet_fused.kernels._tile import round_to, sum_lanes, to_fp32


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
def _reduce_rows_kernel(
    first,  # [rows, columns]
    first_sum,  # [spans, columns]
    second,  # the same again, or None
    second_sum,
    rows,
    columns,
    span,
    INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A program owns a tile of columns of one range of `span` rows; row r is added to lane r % BLOCK_ROWS, in the order
    of r, and the lanes by a tree: one fixed order.
    """
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    range_index = (tl.program_id(0) // blocks).to(INDEX)
    column = (tl.program_id(0) % blocks).to(INDEX) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < columns
    begin = range_index * span
    end = tl.minimum(begin + span, rows)
    lane = begin + tl.arange(0, BLOCK_ROWS)
    out = range_index * columns + column
    first_acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    second_acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, span, BLOCK_ROWS):
        row = start + lane
        valid = (row < end)[:, None] & exists[None, :]
        offset = row[:, None] * columns + column[None, :]
        first_acc += to_fp32(tl.load(first + offset, mask=valid, other=0.0))
        if second is not None:
            second_acc += to_fp32(tl.load(second + offset, mask=valid, other=0.0))
    tl.store(first_sum + out, round_to(sum_lanes(first_acc), first_sum.dtype.element_ty), mask=exists)
    if second is not None:
        tl.store(second_sum + out, round_to(sum_lanes(second_acc), second_sum.dtype.element_ty), mask=exists)


def _reduce(first: Tensor, second: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    rows, columns = first.shape[0], first[0].numel() if first.shape[0] else first.new_empty(first.shape[1:]).numel()
    spans = row_spans(rows)
    if spans > 1:
        first_sum = first.new_empty(spans, *first.shape[1:], dtype=torch.float32)
    else:
        first_sum = first.new_empty(first.shape[1:], dtype=dtype)
    second_sum = None if second is None else torch.empty_like(first_sum)
    span = triton.cdiv(rows, spans)
    block_rows, block_columns = row_blocks(span, columns)
    launch(
        _reduce_rows_kernel,
        triton.cdiv(columns, block_columns) * spans,
        first,
        first_sum,
        second,
        second_sum,
        rows,
        columns,
        span,
        INDEX=index_type(first.numel()),
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        maxnreg=MAX_REGISTERS,
    )
    return (first_sum, second_sum) if spans == 1 else _reduce(first_sum, second_sum, dtype)


def reduce_rows(partials: Tensor) -> Tensor:
    """The sum over dimension 0, in fp32 and in one fixed order: bit-identical run to run.

    Args:
        partials: [rows, ...], fp32, fp16 or bf16.

    Returns:
        [...], in the dtype of partials.
    """
    return _reduce(partials.contiguous(), None, partials.dtype)[0]


def reduce_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`reduce_rows` of two contiguous tensors of one shape, in one launch."""
    first_sum, second_sum = _reduce(first, second, first.dtype)
    assert second_sum is not None
    return first_sum, second_sum
