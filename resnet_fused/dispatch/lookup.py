"""What a table says about one problem."""

from __future__ import annotations

from resnet_fused.dispatch.table import Choice, Entry, Problem, Table

# An entry of a table also speaks for batches up to this factor larger or smaller.
NEAR = 2


def measured(problem: Problem, table: Table | None, backend: str | None = None, margin: float = 1.0) -> Choice | None:
    """The fastest choice of a table, of one backend or of all, for this problem or for the nearest batch of it.

    Args:
        problem: what is to run.
        table: where to look, or None.
        backend: only of this one.
        margin: native PyTorch is the answer unless it takes this many times as long.
    """
    entry = entry_of(problem, table)
    if entry is None:
        return None
    if backend is not None:
        best = entry.best(backend)
        return best and best[0]
    winner, plain = entry.winner, entry.best("aten")
    if plain is not None and plain[1] < margin * entry.ms(winner):
        return plain[0]
    return winner


def entry_of(problem: Problem, table: Table | None) -> Entry | None:
    """The entry of a problem, or of its nearest batch up to a factor `NEAR` away."""
    if table is None:
        return None
    return table.entries.get(problem) or _nearest(problem, table)


def _nearest(problem: Problem, table: Table) -> Entry | None:
    batch = problem.batch
    near = {
        max(batch, other.batch) / min(batch, other.batch): entry
        for other, entry in table.entries.items()
        if other.op == problem.op and other.with_batch(batch) == problem
    }
    return near[min(near)] if near and min(near) <= NEAR else None
