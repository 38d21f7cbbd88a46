"""Compute a part of a forward again in its backward, instead of keeping what it saves.

As ``torch.utils.checkpoint`` without reentrance, on the same hooks, with one difference: what a function saves and also
returns (the output of a last activation, which a cut passes on anyway) is not computed and held a second time. At a
cut that is one of about ten values of the size of the features.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from localize.torch_names import RUNNING_NORMS, outside_of_modes, own_buffers, tree_leaves, version_of


@dataclass
class Counted:
    """The number of the next call that is counted, where calls of a function are told apart by their order."""

    within: AbstractContextManager[Any]
    """What counts; a backward runs outside of it."""
    next: int = 0


COUNTED: ContextVar[Counted | None] = ContextVar("COUNTED", default=None)
"""What counts calls at the moment: a function that is run again counts from where it began."""


def again(function: Callable[..., Any], *values: Any) -> Any:
    """Return ``function(*values)``; of what it saves for the backward, only ``values`` and what it returns are kept.

    The backward runs the function again, with the same random numbers and under the same autocast; BatchNorms normalise
    by the batch as before, and leave their running statistics and counts alone.

    Raises:
        RuntimeError: in the backward; the function saved other values the second time.
    """
    return _Frame(function, values).run()


class _Saved:
    """What autograd holds in place of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = weakref.ref(tensor.untyped_storage())
        self.version = version_of(tensor)
        self.place = (tensor.size(), tensor.stride(), tensor.storage_offset())
        self.kept: Tensor | None = None
        """The tensor, where it lies in the storage of an output."""
        self.made: Tensor | None = None
        """The tensor, computed again, until it is read."""


class _Frame:
    """One call of a function, and its repetition."""

    def __init__(self, function: Callable[..., Any], values: tuple[Any, ...]) -> None:
        self.function, self.values = function, values
        self.saved: list[weakref.ref[_Saved]] = []
        self.gradient = torch.is_grad_enabled()
        self.counted = COUNTED.get()
        self.begins_at = 0 if self.counted is None else self.counted.next
        self.random = torch.get_rng_state()
        self.devices, self.states = get_device_states(*values)
        kinds = dict.fromkeys(("cpu", *(v.device.type for v in values if isinstance(v, Tensor))))
        cached = torch.is_autocast_cache_enabled()
        self.autocast: list[dict[str, Any]] = [
            {
                "device_type": kind,
                "dtype": torch.get_autocast_dtype(kind),
                "enabled": torch.is_autocast_enabled(kind),
                "cache_enabled": cached,
            }
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ]

    def run(self) -> Any:
        """Call the function for the first time."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            result = self.function(*self.values)
        outputs = {o.untyped_storage(): o for o in tree_leaves(result) if isinstance(o, Tensor)}
        for reference in self.saved:
            saved = reference()
            storage = None if saved is None else saved.storage()
            output = None if storage is None else outputs.get(storage)
            if saved is not None and output is not None and saved.version == version_of(output):
                with outside_of_modes():  # what counts operations of the function does not count these
                    saved.kept = output.detach().as_strided(*saved.place)
        return result

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self.saved.append(weakref.ref(saved))
        return saved

    def _unpack(self, saved: _Saved) -> Tensor:
        if saved.kept is not None:
            return saved.kept
        if saved.made is None:
            self._run_again()
        made, saved.made = saved.made, None
        assert made is not None, "the repetition has made what is missing"
        return made

    def _run_again(self) -> None:
        wanted = {i: saved for i, ref in enumerate(self.saved) if (saved := ref()) is not None and saved.kept is None}
        count = 0

        def pack(tensor: Tensor) -> None:
            nonlocal count
            saved = wanted.pop(count, None)
            count += 1
            if saved is not None:
                saved.made = tensor.detach()
            if not wanted:
                raise _Complete

        inputs = [v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in self.values]
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self.devices))
            torch.set_rng_state(self.random)
            set_device_states(self.devices, self.states)
            for state in self.autocast:
                stack.enter_context(torch.autocast(**state))
            for context in (torch.set_grad_enabled(self.gradient), still_statistics(), self._counting_again(), hooks):
                stack.enter_context(context)
            try:
                self.function(*inputs)
            except _Complete:
                return
        raise RuntimeError(f"{len(wanted)} values that the backward needs were not computed the second time")

    @contextmanager
    def _counting_again(self) -> Iterator[None]:
        """Count calls from where this one began."""
        if self.counted is None:
            yield
            return
        now, self.counted.next = self.counted.next, self.begins_at
        try:
            with self.counted.within:
                yield
        finally:
            self.counted.next = now


class _Complete(Exception):
    """Everything that the backward needs is there."""


@contextmanager
def still_statistics() -> Iterator[None]:
    """Keep BatchNorms that run from moving their running statistics."""
    held: list[tuple[Any, float | None, Tensor | None]] = []

    def still(module: nn.Module, _: Any) -> None:
        if isinstance(module, RUNNING_NORMS) and module.track_running_stats:
            count = module.num_batches_tracked
            held.append((module, module.momentum, count))
            module.momentum = 0.0
            with outside_of_modes():
                own_buffers(module)["num_batches_tracked"] = None if count is None else count.clone()

    hook = nn.modules.module.register_module_forward_pre_hook(still)
    try:
        yield
    finally:
        hook.remove()
        for module, momentum, count in reversed(held):
            module.momentum = momentum
            own_buffers(module)["num_batches_tracked"] = count
