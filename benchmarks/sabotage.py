"""Try every edit that the sabotage engine knows on eight programs, and count those that pass the audit.

An edit that the audit does not refuse is run beside the original, on several batches and from states that have moved:
it counts as passed if anything differs then. Run from the root of the repository::

    python benchmarks/sabotage.py [--most N] [PROGRAM ...]

Prints one line for each program, and each edit that passes. Exit code 1 if any does.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from localize.auditor import static
from tests.auditor.audit_nets import PROGRAMS, make
from tests.auditor.sabotage import edits, same_step


def main() -> int:
    """Try the edits; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", default=list(PROGRAMS))
    parser.add_argument("--most", type=int, default=0, help="edits of each program, drawn at random; 0 is all")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tried, passed = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "marker"
        for program in asked.programs:
            start, local = time.process_time(), make(program)
            made = list(edits(local.source, str(marker)))
            if asked.most:
                made = random.Random(program).sample(made, min(asked.most, len(made)))
            found = {edit.text(): edit.kind for edit in made}
            equal = 0
            for source, kind in found.items():
                edited = local.with_source(source)
                if static(edited).ok:
                    if same_step(local, edited):
                        equal += 1
                    else:
                        passed += 1
                        print(f"{program}: passes: {kind}\n{source}")
            tried += len(found)
            seconds = time.process_time() - start
            print(f"{program}: {len(found)} edits, {equal} leave the step as it is, {seconds:.0f} s of CPU time")
        if marker.exists():
            passed += 1
            print("an audit has run what it was to look at")
    print(f"{tried} edits of {len(asked.programs)} programs, {passed} pass")
    return int(passed > 0)


if __name__ == "__main__":
    sys.exit(main())
