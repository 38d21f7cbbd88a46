"""Start the processes of a run on this machine, by torch's elastic launch: ``localize train ... --processes N``.

Each process runs the same command line. They find each other by the variables that ``torchrun`` sets too, so a command
line may as well be started by ``torchrun``, with ``--`` in front of ``localize``; or by SLURM's ``srun``, see
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
"""Seconds between two looks at the processes."""
STAGES = "LOCALIZE_STAGES"
"""Names the file in which the first process of a pipeline says which segments each process trains."""
FINAL = (1, 2, 3)
"""Exit codes of what would be so again: the answer is no, wrong use, a model that cannot be converted."""


def started() -> bool:
    """Return whether this process is one of those that ``torchrun``, or this module, has started."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def slurm(processes: int) -> dict[str, str]:
    """Return what ``torchrun`` would set for a task of SLURM, or nothing where ``srun`` has not started several.

    Only ``srun`` sets ``SLURM_STEP_NUM_TASKS``: a batch script has ``SLURM_NTASKS`` and ``SLURM_PROCID`` as well, and
    is one process. Tasks may also train a run each: they are one run only where ``--processes`` says how many.

    Args:
        processes: how many the command line asks for.

    Raises:
        OptionError: it is not the number of tasks.
    """
    values = os.environ
    size = int(values.get("SLURM_STEP_NUM_TASKS", "1"))
    if size == 1 or started():
        return {}
    if size != processes:
        raise OptionError(
            f"--processes is {processes}, and srun has started {size} tasks.",
            facts=f"SLURM_STEP_NUM_TASKS is {size}: each task is one process.",
            help=f"--processes {size}; or srun --ntasks 1, and --processes starts them",
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
    """Return the first of the nodes that SLURM lists in its short form: ``node01`` of ``node[01-04,07],gpu1``."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    assert found, "SLURM lists one node at least"
    return "".join(part or "" for part in found.groups())


def check_count(processes: int) -> None:
    """Refuse a number of processes that is not that of the processes that were started.

    Raises:
        OptionError: it is another.
    """
    size = int(os.environ["WORLD_SIZE"])
    if size != processes:
        raise OptionError(
            f"--processes is {processes}, and {size} were started.",
            facts=f"WORLD_SIZE is {size}: torchrun, or a scheduler, has started this process.",
            help="leave out --processes",
        )


def launch(words: Sequence[str], processes: int, *, max_restarts: int = 0) -> None:
    """Run ``localize WORDS`` in several processes on this machine, and wait for all of them.

    When one fails, the others are ended. What it has printed says why; of one that a signal has ended, this does.

    Args:
        words: the command line behind ``localize``.
        processes: how many, 1 or more.
        max_restarts: how often all are started again after one has failed.

    Raises:
        MissingError: a process was ended by a signal.
        ReportedError: a process has failed, and has said why.
        KeyboardInterrupt: this process was asked to end, and has ended the others.
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
        print(f"started again, {restart + 1} of {max_restarts} times", file=sys.stderr, flush=True)


def culprit(codes: Mapping[int, int], first: int) -> int:
    """Return which of the processes that have failed is to be named.

    One that a signal has ended has failed by itself; the others may have failed since it no longer answered, and may
    have been seen to fail at the same time.

    Args:
        codes: exit codes by rank; negative ones are those of signals.
        first: the rank that was seen to fail first.
    """
    ended = [rank for rank, code in sorted(codes.items()) if code < 0]
    return first if codes[first] < 0 or not ended else ended[0]


def say_stages(segments: Sequence[str]) -> None:
    """Tell the process that has started this one which segments each process trains: ``0-2`` or ``3``, by rank."""
    if STAGES in os.environ:
        Path(os.environ[STAGES]).write_text(json.dumps(list(segments)))


def segments_of(rank: int) -> str:
    """Return the segments that a process trains, as :func:`say_stages` was given them; empty where it was not."""
    try:
        told: list[str] = json.loads(Path(os.environ[STAGES]).read_text())
    except (OSError, KeyError, ValueError):
        return ""
    return told[rank] if rank < len(told) else ""


def told(rank: int, exit_code: int, segments: str = "") -> LocalizeError:
    """Return the error that a process has failed with; a negative code is that of the signal that has ended it."""
    which = f", which trains segments {segments}," if segments else ""
    if exit_code >= 0:
        reported = ReportedError(f"process {rank} has failed.")
        reported.exit_code = exit_code
        return reported
    name = signal.Signals(-exit_code).name
    return MissingError(
        f"process {rank} of this run{which} was ended by {name}.",
        facts="the others were ended too." + (" the system may have run out of memory." * (name == "SIGKILL")),
        help="localize train --resume DIR goes on from the last checkpoint",
    )
