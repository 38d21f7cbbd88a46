"""Checkpoints of a pipeline: each rank writes its part under the original names, with ``torch.distributed.checkpoint``.

::

    RUN/checkpoints/step-00000400/            the run after its 400th optimizer step
        .metadata                             which value is in which file: written last, when all parts are complete
        __0_0.distcp, __1_0.distcp, ...       the parts
        run.pt                                values that belong to no parameter: recipe, position, metrics, groups

Keys are ``model.NAME``, ``optimizer.NAME.KEY`` and, for a state that belongs to a single loss, ``own.LOSS.NAME.KEY``;
``losses.LOSS`` and ``right.LOSS`` are results of the epoch so far. They do not depend on ranks: any number of processes
can read them, each what it needs.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from localize.errors import MissingError
from localize.files import VERSION, check_version, replacing
from localize.train.checkpoints import FOLDER, KEPT

FORM = "localize pipeline, 1"
COMPLETE, RUN = ".metadata", "run.pt"


def path_of(run: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return run / FOLDER / f"step-{step:08d}"


def folders(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run by ascending step."""
    found = [path for path in _any(run) if (path / COMPLETE).is_file() and (path / RUN).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _any(run: Path) -> list[Path]:
    return [path for path in (run / FOLDER).glob("step-*") if path.is_dir() and re.fullmatch(r"step-\d+", path.name)]


def clear(run: Path) -> None:
    """Remove all checkpoints of a pipeline."""
    for path in _any(run):
        shutil.rmtree(path)


def prune(run: Path) -> None:
    """Remove all but the last two complete checkpoints, and earlier incomplete ones."""
    whole = folders(run)
    for path in _any(run):
        if whole and path not in whole[-KEPT:] and path.name < whole[-1].name:
            shutil.rmtree(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warning that a single process reads or writes, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


class Writer:
    """Writes the checkpoints of a rank in the background, one at a time.

    Args:
        run: the folder of the run.
        group: the process group in which the ranks coordinate in the background; None for a single one.
        failed: makes the error for a process that has ended or does not answer.
    """

    def __init__(self, run: Path, group: Any, failed: Callable[[BaseException], Exception]) -> None:
        self.run, self.group, self.failed = run, group, failed
        self._last: Any = None

    def save(self, step: int, values: Mapping[str, Any], about: Mapping[str, Any] | None) -> None:
        """Start to write a checkpoint of the current values. All ranks call this after the same step.

        Args:
            step: number of optimizer steps so far.
            values: the values of this rank, by key.
            about: values that belong to no parameter, from the one rank that has them.

        Raises:
            LocalizeError: the previous checkpoint could not be written; see :meth:`wait`.
        """
        self.wait()
        path = path_of(self.run, step)
        copied = {
            key: value.detach().cpu().clone() if isinstance(value, Tensor) else value for key, value in values.items()
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            if about is not None:
                (path / COMPLETE).unlink(missing_ok=True)
                with replacing(path / RUN) as temporary:
                    torch.save({"form": FORM, "version": VERSION, **about}, temporary)
                prune(self.run)
            if self.group is None:
                with _quiet():
                    dcp.save(copied, checkpoint_id=path, no_dist=True)
            else:
                self._last = dcp.async_save(copied, checkpoint_id=path, process_group=self.group)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Wait until the checkpoint that was started last is complete.

        Raises:
            MissingError: a process could not write its part; the message names it.
            LocalizeError: a process has ended or does not answer.
        """
        last, self._last = self._last, None
        if last is not None:
            try:
                last.result()
            except CheckpointException as error:  # which is not an Exception
                raise self._unwritten(error) from error
            except Exception as error:
                raise self.failed(error) from error

    def _unwritten(self, error: BaseException) -> MissingError:
        who, cause = "this process", error
        if isinstance(error, CheckpointException) and error.failures:
            rank, (cause, _) = min(error.failures.items())
            who = f"process {rank}"
        here = f"{shutil.disk_usage(self.run).free / 2**20:,.0f} MiB are free there, as this process sees it."
        return MissingError(
            f"{who} cannot write a checkpoint to {self.run / FOLDER}.",
            facts=[*(str(cause).strip().splitlines()[-1:] or [type(cause).__name__]), here],
            help=f"make room, then localize train --resume {self.run}",
        )


def about(path: Path) -> dict[str, Any]:
    """Return the values of a checkpoint that belong to no parameter.

    Raises:
        MissingError: it cannot be read.
        VersionError: a later version of localize wrote it.
    """
    try:
        found = torch.load(path / RUN, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of another kind may raise anything
        raise MissingError(f"{path / RUN} is incomplete.", facts=str(error).partition("\n")[0]) from error
    if not isinstance(found, dict) or found.get("form") != FORM:
        raise MissingError(f"{path / RUN} does not belong to the checkpoint of a pipeline.")
    check_version(found.get("version"), str(path))
    return found


def keys(path: Path) -> dict[str, Any]:
    """Return the keys of a checkpoint, each with an empty tensor or None, for :func:`read` to fill in.

    Raises:
        MissingError: it cannot be read.
    """
    try:
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # a file of another kind may raise anything
        raise MissingError(f"{path / COMPLETE} is incomplete.", facts=type(error).__name__) from error
    return {
        key: torch.empty(kept.size, dtype=kept.properties.dtype) if isinstance(kept, TensorStorageMetadata) else None
        for key, kept in stored.items()
    }


def read(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Read the values of some keys from a checkpoint, and return them.

    Raises:
        MissingError: they cannot be read.
    """
    try:
        with _quiet():
            dcp.load(values, checkpoint_id=path, no_dist=True)
    except Exception as error:  # a file of another kind may raise anything
        told = str(error).strip().splitlines()[-1:] or type(error).__name__
        raise MissingError(f"{path} is damaged.", facts=told) from error
    return values
