"""Start the processes of a run on this machine with torch's elastic launch: ``localize train ... --processes N``.

Each process runs the same command line. They find each other through the same environment variables that ``torchrun``
sets, so ``torchrun`` can also start a command line, with ``--`` before ``localize``; so can SLURM's ``srun``, see
:func:`slurm`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from localize.errors import LocalizeError, MissingError, OptionError, ReportedError

HEARTBEAT = 0.1
"""Seconds between two checks of the processes."""
STAGES = "LOCALIZE_STAGES"
"""Names the file in which the first process of a pipeline says which segments each process trains."""
FINAL = (1, 2, 3)
"""Exit codes of failures that a restart would repeat: a negative answer, wrong use, a model that does not convert."""


def started() -> bool:
    """Return whether ``torchrun`` or this module started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def slurm(processes: int) -> dict[str, str]:
    """Return the variables that ``torchrun`` would set for a SLURM task; none if ``srun`` did not start several tasks.

    Only ``srun`` sets ``SLURM_STEP_NUM_TASKS``. A batch script also has ``SLURM_NTASKS`` and ``SLURM_PROCID``, but is
    one process. Tasks may also each train a run of their own; they form one run only if ``--processes`` is given.

    Args:
        processes: number of processes that the command line asks for.

    Raises:
        OptionError: it differs from the number of tasks.
    """
    values = os.environ
    size = int(values.get("SLURM_STEP_NUM_TASKS", "1"))
    if size == 1 or started():
        return {}
    if size != processes:
        raise OptionError(
            f"--processes is {processes}, but srun started {size} tasks.",
            facts=f"SLURM_STEP_NUM_TASKS is {size}: each task is one process.",
            help=f"--processes {size}; or srun --ntasks 1, so that --processes starts the processes",
            option="processes",
        )
    job, step = (int(values.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    nodes = values.get("SLURM_STEP_NODELIST") or values.get("SLURM_NODELIST") or "localhost"
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", values.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
        for _ in range(int(times or 1))
    ]
    return {
        "RANK": values["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": values["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[int(values.get("SLURM_NODEID", "0"))]),
        "MASTER_ADDR": values.get("MASTER_ADDR") or first_node(nodes),
        "MASTER_PORT": values.get("MASTER_PORT") or str(20000 + (31 * job + step) % 10000),
    }


def first_node(nodes: str) -> str:
    """Return the first node of a list in SLURM's short form: ``node01`` for ``node[01-04,07],gpu1``."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    assert found, "SLURM lists at least one node"
    return "".join(part or "" for part in found.groups())


def check_count(processes: int) -> None:
    """Refuse a number of processes that differs from the number that were started.

    Raises:
        OptionError: it differs.
    """
    size = int(os.environ["WORLD_SIZE"])
    if size != processes:
        raise OptionError(
            f"--processes is {processes}, but {size} were started.",
            facts=f"WORLD_SIZE is {size}: torchrun or a scheduler started this process.",
            help="leave out --processes",
        )


def launch(words: Sequence[str], processes: int, *, max_restarts: int = 0) -> None:
    """Run ``localize WORDS`` in several processes on this machine, and wait for all of them.

    When one fails, the others are stopped. The failed process prints the reason itself; if a signal ended it, the error
    raised here names the signal.

    Args:
        words: the command line after ``localize``.
        processes: number of processes, at least 1.
        max_restarts: how many times all are restarted after one has failed.

    Raises:
        MissingError: a signal ended a process.
        ReportedError: a process failed and has printed why.
        KeyboardInterrupt: this process was asked to stop, and has stopped the others.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: the processes share the cores
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say what is the matter
    with tempfile.TemporaryDirectory() as folder:
        os.environ[STAGES] = str(Path(folder) / "stages.json")
        _launch(words, processes, max_restarts)


def _launch(words: Sequence[str], processes: int, max_restarts: int) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    for restart in range(max_restarts + 1):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=f"localize-{os.getpid()}-{restart}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=HEARTBEAT,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "localize", *words)
            return
        except SignalException as error:
            raise KeyboardInterrupt from error
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            first, _ = error.get_first_failure()
            rank = culprit(codes, first)
            if restart == max_restarts or codes[rank] in FINAL:
                raise told(rank, codes[rank], segments_of(rank)) from error
        print(f"restarting: {restart + 1} of {max_restarts}", file=sys.stderr, flush=True)


def culprit(codes: Mapping[int, int], first: int) -> int:
    """Return which of the failed processes to name.

    One that exits by itself has printed an error, or another one has, which returns the same exit code. If none did, a
    signal ended one of them. The launcher then sends SIGTERM to the others.

    Args:
        codes: exit codes by rank; negative ones are minus the number of a signal.
        first: the rank that was seen to fail first.
    """
    told = [rank for rank, code in sorted(codes.items()) if code > 0]
    ended = [rank for rank, code in sorted(codes.items()) if code < 0 and -code != signal.SIGTERM]
    found = told or ended or [first]
    return first if first in found else found[0]


def say_stages(segments: Sequence[str]) -> None:
    """Tell the process that started this one which segments each process trains, by rank: ``0-2`` or ``3``."""
    if STAGES in os.environ:
        Path(os.environ[STAGES]).write_text(json.dumps(list(segments)))


def segments_of(rank: int) -> str:
    """Return the segments that a process trains, as :func:`say_stages` wrote them; empty if it did not."""
    try:
        told: list[str] = json.loads(Path(os.environ[STAGES]).read_text())
    except (OSError, KeyError, ValueError):
        return ""
    return told[rank] if rank < len(told) else ""


def told(rank: int, exit_code: int, segments: str = "") -> LocalizeError:
    """Return the error for a process that failed; a negative exit code is minus the number of the signal."""
    which = f", which trains segments {segments}," if segments else ""
    if exit_code >= 0:
        return ReportedError(f"process {rank} failed.", exit_code)
    name = signal.Signals(-exit_code).name
    return MissingError(
        f"process {rank} of this run{which} was ended by {name}.",
        facts="the others were stopped too." + (" the system may have run out of memory." * (name == "SIGKILL")),
        help="localize train --resume DIR, to continue from the last checkpoint",
    )
