"""Finished parts of an analysis, kept in a folder: a killed analysis resumes after the last finished part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from localize import recipes
from localize.files import replacing
from localize.train import runs
from localize.train.loaded import LoadedRun

PARTS = "parts"
"""The folder of the parts, inside that of the pictures."""


class Parts:
    """Results that are computed only once; without a folder nothing is kept."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder) / PARTS

    def get(self, what: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """Return the result of ``make`` for this key, from now or from an earlier process.

        Args:
            what: name of the analysis.
            key: everything that the result depends on.
            make: computes the result, plain values for JSON; floats are restored exactly.
        """
        if self.folder is None:
            return make()
        told = json.dumps(key, sort_keys=True, default=str)
        path = self.folder / f"{what}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["result"]
        result = make()
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"key": key, "result": result}, default=str), encoding="utf-8")
        return result


def identity(run: LoadedRun) -> dict[str, str]:
    """Return digests of a run's recipe, weights and metrics, which identify it."""
    files = (recipes.FILE_NAME, runs.BACKBONE, runs.HEADS, runs.METRICS)
    return {str(name): _digest(run.folder / name) for name in files if (run.folder / name).is_file()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
