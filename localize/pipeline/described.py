"""A partition as plain values, and the files that say it."""

from __future__ import annotations

import json
from typing import Any

from localize.files import VERSION
from localize.ir import Partition
from localize.pipeline.texts import texts
from localize.runtime.model import LocalModel

FILE = "partition.json"


def describe(local: LocalModel, partition: Partition) -> dict[str, Any]:
    """Return who computes what, and what goes from whom to whom: the object of ``partition.json``.

    ``cost`` is the predicted share of the time of a step; ``bytes`` of a message are those of one image. What is
    ``delayed`` goes to an earlier rank once in a step, of the batch before, and has the same size in every batch.
    """
    plan = local.plan
    held = dict(local.named_parameters(remove_duplicate=False)) | dict(local.named_buffers(remove_duplicate=False))
    return {
        "version": VERSION,
        "speedup": round(partition.speedup, 4),
        "ranks": [
            {
                "rank": rank,
                "losses": [plan.losses[i].name for i in stage.losses],
                "segments": list(stage.segments),
                "images": stage.images,
                "cost": round(stage.cost, 4),
                "values": sum(held[name].numel() for name in (*stage.tensors, *stage.copied)),
                "copied": list(stage.copied),
            }
            for rank, stage in enumerate(partition.stages)
        ],
        "messages": [
            {
                "name": message.name,
                "from": message.sender,
                "to": message.receiver,
                "shape": list(message.shape),
                "rows": message.rows,
                "type": str(message.dtype).removeprefix("torch."),
                "bytes": message.bytes_of(1),
            }
            for message in partition.messages
        ],
        "delayed": [
            {"name": one.name, "from": one.sender, "to": one.receiver, "bytes": one.bytes_of(1)}
            for one in partition.delayed
        ],
    }


def files(local: LocalModel, partition: Partition) -> dict[str, str]:
    """Return the text of every rank, ``rank_0.py``, ..., and ``partition.json``, by their names."""
    told = json.dumps(describe(local, partition), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return {FILE: told, **{f"rank_{rank}.py": text for rank, text in enumerate(texts(local, partition))}}
