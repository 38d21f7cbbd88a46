"""Peak memory of a compiled step, as the allocator of the CPU sees it: workspaces of convolutions included.

A compiled graph takes its memory past torch's dispatcher, so nothing predicts it; here it is measured by torch's
profiler in the third step, on random images. The peak is what lives beside the step (parameters, buffers, the state of
SGD with momentum, the batch: :class:`localize.estimate.memory.Footprint`) and the most bytes that the step has taken at
one time. Backprop's is the prediction for its plain step, workspaces not included::

    python benchmarks/compiled_memory.py --batch-size 1024
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from measuring import allocated

import localize
from localize import build
from localize.estimate import memory
from localize.ir import CutSpec
from localize.recipes import Recipe
from localize.runtime.model import LocalModel

NODE = CutSpec("max", by="node")
RECIPES = {
    "dcl": Recipe("dcl"),
    "dcl --cut-by node": Recipe("dcl", cut=NODE),
    "auglocal --d 2": Recipe("auglocal", {"d": 2}),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar/resnet110")
    parser.add_argument("--batch-size", type=int, default=1024, metavar="N")
    parser.add_argument("--bf16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--steps", default="dcl --cut-by node", help=f"some of {', '.join(RECIPES)}, with commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count = arguments.batch_size
    base = memory.predict(build.build(Recipe("backprop", model=arguments.model), data=False), count).peak
    dtype = torch.bfloat16 if arguments.bf16 else None
    print("| step | layout | plain, MiB | compiled, MiB | of backprop's | graphs |\n|---|---|---:|---:|---:|---:|")
    for name in arguments.steps.split(","):
        for form in (torch.contiguous_format, torch.channels_last):
            local = build.build(replace(RECIPES[name], model=arguments.model)).train().to(memory_format=form)
            plain = memory.predict(local, count, autocast=dtype)
            compiled = localize.compile(local)
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                found = plain.resident + taken(compiled, count, form)
            sizes = f"{plain.peak / 2**20:,.1f} | {found / 2**20:,.1f} | {found / base:.4f}"
            graphs = f"{compiled.graphs} of {len(compiled.functions)}"
            print(f"| `{name}` | {str(form).removeprefix('torch.')} | {sizes} | {graphs} |", flush=True)


def taken(local: LocalModel, count: int, form: torch.memory_format) -> int:
    """Return the most bytes that a step takes at one time."""
    x, y = build.random_batch(local, count)
    x = x.contiguous(memory_format=form)
    optimizer = memory.sgd(local.param_groups(lr=0.01))
    for _ in range(2):
        local.step(x, y, optimizer)
    return allocated(local, x, y, optimizer)


if __name__ == "__main__":
    main()
