"""An evaluation as a table and as JSON."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from resnet_fused.evaluate.error_rate import ErrorRate
from resnet_fused.evaluate.loading import Loaded
from resnet_fused.evaluate.run import Evaluation, Settings

SHOWN = 5  # unreadable pictures listed on the terminal; the JSON has all


def render(evaluation: Evaluation, console: Console) -> None:
    """Print the errors, and how many pictures they leave out."""
    ks = sorted({k for row in evaluation.rows for k in row.errors})
    title = f"error on {evaluation.pictures} pictures [95 % confidence interval]"
    table = Table(title=title, title_justify="left")
    for heading in ("model", "protocol", *(f"top-{k}" for k in ks)):
        table.add_column(heading, justify="right" if heading.startswith("top") else "left")
    for row in evaluation.rows:
        table.add_row(row.model, row.protocol, *(str(row.errors.get(k, "-")) for k in ks))
    console.print(table)
    for row in evaluation.rows:
        if row.problem:
            text = f"failed: {row.model}, {row.protocol}: {row.problem}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    if evaluation.unreadable:
        count = len(evaluation.unreadable)
        text = f"{count} picture{'s' * (count != 1)} could not be read and {'were' if count != 1 else 'was'} left out:"
        console.print(text, highlight=False)
        for one in evaluation.unreadable[:SHOWN]:
            console.print(f"  {one.name}: {one.reason}", markup=False, highlight=False, soft_wrap=True)
        if count > SHOWN:
            console.print(f"  and {count - SHOWN} more", highlight=False)


def to_json(
    evaluation: Evaluation, models: Sequence[Loaded], data: str, settings: Settings, command: str
) -> dict[str, Any]:
    """Everything that the table says, and what it was made with."""
    device = settings.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "schema": 1,
        "command": command,
        "date_utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "device": f"{device} ({where})",
        "data": data,
        "settings": {**asdict(settings), "device": str(device), "dtype": str(settings.dtype)},
        "models": [{"name": m.name, "checkpoint": m.checkpoint, "sha256": m.sha256} for m in models],
        "pictures": evaluation.pictures,
        "unreadable": [asdict(one) for one in evaluation.unreadable],
        "results": [
            {
                "model": row.model,
                "protocol": row.protocol,
                "errors": {f"top{k}": _error(error) for k, error in row.errors.items()},
                "problem": row.problem,
            }
            for row in evaluation.rows
        ],
    }


def _error(error: ErrorRate) -> dict[str, Any]:
    return {"rate": error.rate, "wrong": error.wrong, "total": error.total, "interval_95": list(error.interval())}
