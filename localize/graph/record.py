"""Run a forward and write down every torch function and every leaf module that it calls."""

from __future__ import annotations

import contextlib
import math
import operator
import pickle
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction

from localize import ops
from localize.errors import Advice, OptionError, TraceError
from localize.graph.blame import calling_line, calling_lines, user_frames
from localize.graph.cost import Counter
from localize.graph.depth import Operation
from localize.graph.leaves import STACKS, is_leaf, takes_tokens_first
from localize.graph.operations import ACTIVATIONS
from localize.graph.outputs import Outputs, find_outputs
from localize.graph.shapes import Shapes, tensors_in
from localize.graph.targets import name_of, opcode_and_target
from localize.graph.twin import real_copy
from localize.torch_names import (
    RUNNING_NORMS,
    code_of_scripted,
    outside_of_modes,
    own_buffers,
    own_parameters,
    storage_of,
    version_of,
)


@dataclass(frozen=True)
class Ref:
    """The tensor that record number ``index`` returned."""

    index: int


@dataclass
class Record:
    kind: str
    """placeholder | get_attr | kept | call_module | call_function | call_method | property | reflected | output"""
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    scope: tuple[tuple[str, str], ...] = ()
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    storage: int | None = None
    requires_grad: bool = True
    mutates: tuple[int, ...] = ()
    writes: tuple[str, ...] = ()
    """Paths of the model's own tensors whose storage it writes."""
    random: bool = False
    """It draws from torch's random state."""
    activates: bool = False
    """An activation is applied inside a module that is called whole."""
    where: str = ""
    """Line of the user's, of a call that writes."""
    macs: int = 0
    fvcore_flops: int = 0


def _shapes_told(inputs: Mapping[str, Tensor]) -> str:
    shapes = {name: f"({', '.join(('N', *map(str, tensor.shape[1:])))})" for name, tensor in inputs.items()}
    if len(shapes) == 1:
        return f"an input of shape {next(iter(shapes.values()))}"
    return f"inputs of shapes {', '.join(f'{name} {shape}' for name, shape in shapes.items())}"


class Unrecorded(Exception):
    """What happens here cannot be written down as calls on recorded tensors. ``path`` is the innermost module."""

    def __init__(self, reason: str, scope: Sequence[tuple[str, str]]) -> None:
        self.path = scope[-1][0] if scope else ""
        super().__init__(reason)


class TakeWhole(Exception):
    """The inside of these modules cannot be recorded."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        super().__init__(", ".join(paths))


class Recorder(TorchFunctionMode):
    """Write down the calls of one forward.

    Args:
        twin: a copy of ``model`` without data.
        model: the user's, for a leaf that does not run without data.
        leaves: paths of modules that are called whole.
        output: name of the output that holds the class scores; None finds it.
        further: names of outputs that do not.
        before: the recorder of the last forward that was run on this twin; None where there was none.
        watch: look for draws from the random states of Python and NumPy before every call.
    """

    def __init__(
        self,
        twin: nn.Module,
        model: nn.Module,
        leaves: frozenset[str],
        *,
        output: str | None = None,
        further: Collection[str] = (),
        before: Recorder | None = None,
        watch: bool = False,
    ) -> None:
        super().__init__()
        self.output, self.further = output, further
        self.twin, self.model, self.leaves, self.before = twin, model, leaves, before
        self.records: list[Record] = []
        self.refs: dict[int, Ref] = {}
        self.alive: list[Any] = []  # keeps every tensor, so that an id names one tensor only
        self.scope: list[tuple[str, str]] = []
        self.inside_leaf = self.activated = False
        self.whole: list[str] = []
        self.failed_in = ""
        self.open: list[int] = []
        self.checkpoints: list[int] = []
        """For every checkpoint of torch in the forward, the bytes that are computed in it for each image."""
        self.watched = python_random_states() if watch else None
        self.counter, self.shapes = Counter(), Shapes()
        self.paths: dict[int, str] = (
            {id(module): path for path, module in twin.named_modules()} if before is None else before.paths
        )
        self.attributes: dict[int, tuple[str, Tensor]] = _attributes(twin) if before is None else before.attributes
        self.owners = {_storage(tensor): path for path, tensor in reversed(self.attributes.values())}
        """Paths of the model's own tensors by the storage that they live in."""
        self.unlike: dict[str, str] = {}
        """Buffers to which a tensor of another shape or type was assigned, and the line of the assignment."""
        self.replaced: dict[int, str] = {}
        """What an assignment to a buffer has replaced in this forward, and the line of the assignment."""

    def record(self, inputs: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Record]:
        """Run the twin on ``args`` and ``kwargs``, which hold ``inputs``, and return the calls.

        Raises:
            TakeWhole: modules whose inside cannot be recorded; the recording goes on after each to find all of them.
            Unrecorded: the same, of the model itself.
            TraceError: the forward reads values, fails, keeps what depends on its input, or writes into it.
        """
        for name, tensor in inputs.items():
            self._add(Record("placeholder", name), tensor)
        self.inputs = {record.storage for record in self.records}
        self.autocast = torch.is_autocast_enabled("cpu")
        buffers = [(module, dict(own_buffers(module))) for module in self.twin.modules()]
        with _calls_go_to(self), torch.device("meta"), self.shapes, self:  # new tensors lie beside those of the twin
            result = self._run(inputs, args, kwargs)
        if self.replaced:  # their values are written in place instead
            for module, before in buffers:
                own_buffers(module).update({name: b for name, b in before.items() if id(b) in self.replaced})
        if self.whole:
            raise TakeWhole(self.whole)
        self.outputs = self._outputs(result)
        further = {name: self._argument(value) for name, value in self.outputs.others.items()}
        self.records.append(Record("output", "output", (self._argument(self.outputs.scores),), further))
        return self.records

    def _outputs(self, result: Any) -> Outputs:
        """Find the class scores in what the forward returned; in eval mode, which may return less, by the rules."""
        try:
            return find_outputs(result, self, self.output, self.further)
        except OptionError:
            if self.twin.training:
                raise
            return find_outputs(result, self)

    def made_of(self, tensor: Tensor) -> frozenset[int]:
        """Return the numbers of the records that a tensor is made of."""
        found: set[int] = set()
        front = [self._tensor(tensor).index]
        while front:
            index = front.pop()
            if index not in found:
                found.add(index)
                record = self.records[index]
                front += [reference.index for reference in _references((record.args, record.kwargs))]
        return frozenset(found)

    def operations(self) -> list[Operation]:
        """Return what is known of every record of a forward that has ended."""
        kinds = {
            path: "" if type(module).__module__.startswith("torch.") else type(module).__name__
            for path, module in self.twin.named_modules()
        }
        found = []
        for record in self.records:
            paths = [path for path, _ in record.scope]
            weighted = record.macs > 0
            if record.kind == "call_module":
                paths.append(record.target)
                weighted = weighted or any(p.dim() > 1 for p in self.twin.get_submodule(record.target).parameters())
            modules = tuple((path, kinds.get(path, "")) for path in paths)
            found.append(Operation(modules, weighted, record.shape is None or len(record.shape) > 2))
        return found

    def _run(self, inputs: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the twin; say where in the user's code it fails."""
        try:
            return self.twin(*args, **kwargs)
        except Unrecorded:
            raise
        except TraceError as error:
            if self.whole:  # its reason may be that they were called a second time
                raise TakeWhole(self.whole) from error
            raise
        except Exception as error:
            where = user_frames(error)
            facts = [*where, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
            name = type(self.twin).__name__
            if isinstance(error, NotImplementedError) or "meta" in str(error):
                raise TraceError(
                    f"the forward of {name} needs the values of a tensor.", facts=facts, help=_leaf_help(self.failed_in)
                ) from error
            integer = next((name for name, tensor in inputs.items() if not tensor.is_floating_point()), None)
            retyped = f"; {integer} is {inputs[integer].dtype}: {integer}.float(), if it is numbers" if integer else ""
            raise TraceError(
                f"the forward of {name} fails on {_shapes_told(inputs)}.",
                facts=facts,
                help=f"check that model(example_input) runs{retyped}",
            ) from error

    @cached_property
    def depends(self) -> list[bool]:
        """Say of every record whether its value depends on the input, on chance, on when it is computed, or on an
        attribute that is replaced.

        To be asked after the forward. A tensor that something dependent is written into depends itself, unless it
        belongs to the model: what is read from such a tensor depends on when it is read, and a write depends on when
        it is made.
        """
        tensors = dict(self.attributes.values())
        replaced = {path for path, tensor in tensors.items() if _attribute(self.twin, path) is not tensor}
        owned = {_storage(tensor) for tensor in tensors.values()}
        changing = owned.intersection(storage for record in self.records for storage in record.mutates)
        written: set[int] = set()
        while True:
            found: list[bool] = []
            for record in self.records:
                source = record.kind == "placeholder" or record.random or record.storage in written
                state = record.kind == "get_attr" and record.target in replaced
                parents = [reference.index for reference in _references((record.args, record.kwargs))]
                read = any(found[index] for index in parents)
                timely = record.storage not in changing and any(self.records[i].storage in changing for i in parents)
                found.append(source or state or read or timely or bool(record.writes))
            grown = {s for record, own in zip(self.records, found, strict=True) if own for s in record.mutates} - owned
            if grown == written:
                return found
            written = grown

    def made_from_input(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was made in this forward, and depends on its input."""
        reference = self.refs.get(id(tensor))
        return reference is not None and self.depends[reference.index]

    # -- modules

    def _module(self, original: Callable, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        path = self.paths.get(id(module))
        if self.inside_leaf or not path:
            return original(module, *args, **kwargs)
        if path in self.leaves or is_leaf(module):
            return self._leaf(original, path, module, args, kwargs)
        self.scope.append((path, type(module).__name__))
        try:
            result = original(module, *args, **kwargs)
            self._refuse_draws()
            return result
        except Unrecorded:  # of this module itself: those of modules inside do not come here
            self.whole.append(path)
        except Exception:
            if not isinstance(module, STACKS):
                self.failed_in = self.failed_in or path
                raise
            self.whole.append(path)
        finally:
            self.scope.pop()
        return self._leaf(original, path, module, args, kwargs)

    def _leaf(self, original: Callable, path: str, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        counted = self.counter.macs, self.counter.fvcore_flops

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(module, *args, **kwargs)
            except Exception as error:
                self.counter.macs, self.counter.fvcore_flops = counted
                return self._run_with_data(path, module, args, kwargs, error)

        self._refuse_draws()
        self.inside_leaf = True
        try:
            result = self._call("call_module", path, run, args, kwargs, (module, *args))
        finally:
            self.inside_leaf = False
            if self.watched:
                self.watched = python_random_states()
        if takes_tokens_first(module) and isinstance(result, Tensor) and result.dim() == 3:
            return result.transpose(0, 1).transpose(0, 1)  # what lies between begins with the batch: it can be cut
        return result

    def _run_with_data(self, path: str, module: nn.Module, args: tuple, kwargs: dict, error: Exception) -> Any:
        """Find what a leaf returns by running it on numbers, as it does not run without: on zeros, and on random ones.

        Raises:
            TraceError: what it returns has other shapes for other numbers.
        """
        results = []
        counted = self.counter.macs, self.counter.fvcore_flops
        for fill in (torch.zeros_like, _random_like):
            self.counter.macs, self.counter.fvcore_flops = counted
            real = real_copy(self.model.get_submodule(path)).train(module.training)
            filled = _map_tensors((args, kwargs), partial(fill, device="cpu"))
            try:
                with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    results.append(real(*filled[0], **filled[1]))
            except Exception:
                raise error from None
        shapes = [[tensor.shape for tensor in tensors_in(result)] for result in results]
        if shapes[0] != shapes[1]:
            raise TraceError(
                f"module {path!r} returns other shapes for other values.",
                facts=f"{[tuple(s) for s in shapes[0]]} for zeros, {[tuple(s) for s in shapes[1]]} for random numbers",
                help=Advice(
                    *(f"{flag} with a module around it whose output has one shape" for flag in ("leaf=", "--leaf"))
                ),
            )
        return _map_tensors(results[1], _without_data)

    # -- functions

    def __torch_function__(self, func: Callable, types_: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.inside_leaf:
            self.activated = self.activated or name_of(func) in ACTIVATIONS
            result = func(*args, **kwargs)
            self.counter.count(func, args, kwargs, result)
            return result
        if func in _READS_VALUES:
            self._refuse_value(func, args)
        if func is Tensor.register_hook:
            self._refuse_region("a hook on a tensor changes its gradient")
        if name_of(func) == "__set__":
            return self._set(func, *args)
        if name_of(func).startswith("_foreach_") and name_of(func).endswith("_"):
            return self._of_each(name_of(func).removeprefix("_foreach_"), args, kwargs)
        if isinstance(kwargs.get("out"), Tensor):
            return self._written_out(func, args, kwargs)
        self._refuse_draws()
        kind, target = opcode_and_target(func, args, kwargs)
        return self._call(kind, target, func, args, kwargs, args)

    def _of_each(self, name: str, args: tuple, kwargs: dict) -> list[Tensor]:
        """Record a write into a list of tensors (``torch._foreach_...``) as one write into each."""
        count = len(args[0])
        for i in range(count):
            own = [arg[i] if isinstance(arg, list | tuple) and len(arg) == count else arg for arg in args]
            self.__torch_function__(getattr(Tensor, name), (), tuple(own), kwargs)
        return list(args[0])

    def _written_out(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        """Record ``function(..., out=tensor)`` as the function, and a write of its result into the tensor."""
        out = kwargs["out"]
        result = self.__torch_function__(func, (), args, {key: v for key, v in kwargs.items() if key != "out"})
        if not isinstance(result, Tensor) or (result.shape, result.dtype) != (out.shape, out.dtype):
            self._refuse_region(f"{name_of(func)} writes to a tensor of another shape or type (out=)")
        return self.__torch_function__(Tensor.copy_, (), (out, result))

    def _set(self, func: Callable, tensor: Tensor, value: Any) -> None:
        """Record ``tensor.data = value`` as a write into the tensor.

        Raises:
            TraceError: another property is set, or the value has another shape or type.
        """
        fits = isinstance(value, Tensor) and (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
        if getattr(func, "__self__", None) is not Tensor.data or not fits:
            name = getattr(getattr(func, "__self__", None), "__name__", "a property")
            raise TraceError(
                f"the forward of {type(self.twin).__name__} sets {name} of a tensor.",
                facts=[calling_line(), "a training step could not repeat it."],
                help="write into the tensor in place, e.g. x.data.copy_(...)",
            )
        target = self.__torch_function__(Tensor.data.__get__, (), (tensor,))
        self.__torch_function__(Tensor.copy_, (), (target, value))

    def assigned(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Record ``module.name = value``, where a buffer has this name, as a write into the buffer.

        What reads the buffer later in this forward reads ``value``; what reads it before reads the buffer.

        A value of another shape or type is not recorded: such a buffer has to be one that every forward makes.
        """
        buffer, path = own_buffers(module)[name], f"{self.paths.get(id(module), '')}.{name}".removeprefix(".")
        original = next((tensor for known, tensor in self.attributes.values() if known == path), None)
        if self.inside_leaf or buffer is value or original is None or id(value) in self.attributes:
            return
        if (value.shape, value.dtype) != (original.shape, original.dtype):
            self.unlike[path] = calling_line()  # fine for what is computed again in every forward
            return
        where = calling_line()
        with outside_of_modes(), torch.no_grad():
            self.__torch_function__(Tensor.copy_, (), (original, value))
        self.replaced[id(original)] = where

    def enter_hooks(self, hooks: Any) -> None:
        """Note where a checkpoint of torch begins, which shows by the hooks that it sets on what is saved."""
        if type(hooks).__module__ == checkpoint.__name__ and not self.inside_leaf:
            self.open.append(len(self.records))

    def leave_hooks(self, hooks: Any) -> None:
        """Note how much was computed in a checkpoint that ends here."""
        if type(hooks).__module__ == checkpoint.__name__ and not self.inside_leaf and self.open:
            first = self.open.pop()
            made = {r.storage: r for r in self.records[first:] if r.shape and r.dtype and r.kind != "get_attr"}
            sizes = [math.prod(r.shape[1:]) * r.dtype.itemsize for r in made.values() if r.shape and r.dtype]
            self.checkpoints.append(sum(sizes))

    def _refuse_region(self, what: str) -> None:
        """Refuse to look into a module that does what a list of calls does not show; it is called whole instead."""
        raise Unrecorded(f"{what} at {calling_line()}", self.scope)

    def _refuse_value(self, func: Callable, args: tuple) -> None:
        reference = self.refs.get(id(args[0])) if args else None
        if reference is not None:
            raise TraceError(
                f"the forward of {type(self.twin).__name__} reads the value of a tensor ({name_of(func)}).",
                facts=[*calling_lines(), "a generated training step is straight-line code."],
                help=_leaf_help(self.scope[-1][0] if self.scope else ""),
            )

    def _refuse_draws(self) -> None:
        """Refuse random numbers that the generated step would not draw."""
        if self.watched and self.watched != python_random_states():
            raise TraceError(
                f"the forward of {type(self.twin).__name__} draws random numbers from Python or NumPy.",
                facts=[
                    f"before this line, or in it: {calling_line()}",
                    "a generated training step would never draw them again.",
                ],
                help=_leaf_help(self.scope[-1][0] if self.scope else "", before="draw with torch functions; or "),
            )

    # -- the common part: run, compare versions, write down

    def _call(self, kind: str, target: Any, func: Callable, args: tuple, kwargs: dict, call_args: tuple) -> Any:
        with outside_of_modes():  # or else each look at a tensor would come here as well
            before = self._before(kind, target, args, kwargs, call_args)
        result = func(*call_args, **kwargs)
        with outside_of_modes():
            self._write_down(kind, target, func, (args, kwargs), call_args, result, before)
        return result

    def _before(self, kind: str, target: Any, args: tuple, kwargs: dict, call_args: tuple) -> _Before:
        """Return what a call can change. Refuse to look into a module that turns gradients or autocast off and on."""
        own = call_args[0].parameters() if kind == "call_module" and not torch.is_grad_enabled() else ()
        if any(parameter.requires_grad for parameter in own):
            self._refuse_region(
                f"gradients of {target!r} are switched off (torch.no_grad), whose parameters are trained"
            )
        if torch.is_autocast_enabled("cpu") != self.autocast:
            self._refuse_region("autocast is switched on or off")
        self.shapes.random = self.activated = False
        return _Before(
            [(tensor, version_of(tensor)) for tensor in tensors_in((args, kwargs))],
            _own_state(call_args[0], target) if kind == "call_module" else {},
            (self.counter.macs, self.counter.fvcore_flops),
        )

    def _write_down(
        self,
        kind: str,
        target: Any,
        func: Callable,
        arguments: tuple[tuple, dict],
        call_args: tuple,
        result: Any,
        before: _Before,
    ) -> None:
        """Add the record of a call that has returned ``result``."""
        args, kwargs = arguments
        drawn = self.shapes.random
        if kind != "call_module":
            self.counter.count(func, args, kwargs, result)
        mutated = tuple(_storage(tensor) for tensor, version in before.tensors if version_of(tensor) != version)
        writes = kind != "call_module" and name_of(func) == "__setitem__"
        if not mutated and not any(True for _ in tensors_in(result)):
            return  # sizes, dtypes, flags: constants of this recording
        if self.inputs.intersection(mutated):
            raise TraceError(
                f"the forward of {type(self.twin).__name__} writes into its input.",
                facts=[calling_line(), "methods and checks read the images again."],
                help="x = x.clone() first, or the same operation without writing in place",
            )
        written = [self.owners[storage] for storage in mutated if storage in self.owners]
        if before.state:
            written += _changed(before.state, _own_state(call_args[0], target))
        if not torch.is_grad_enabled():
            args, kwargs = _map_tensors((args, kwargs), self._without_history)
        record = Record(
            kind,
            target,
            tuple(self._argument(a) for a in args),
            {key: self._argument(value) for key, value in kwargs.items()},
            tuple(self.scope),
            mutates=mutated,
            writes=tuple(dict.fromkeys(written)),
            where=calling_line() if written else "",
            random=drawn,
            activates=self.activated,
            macs=self.counter.macs - before.counted[0],
            fvcore_flops=self.counter.fvcore_flops - before.counted[1],
        )
        if writes:
            record.kind, record.target = "call_function", ops.set_item
            self._add(record, args[0])
        elif result is None and mutated:
            self._add(record, before.tensors[0][0])
        elif isinstance(result, Tensor):
            self._add(record, result)
        else:
            self._add(record, None)
            self._unpack(result, Ref(len(self.records) - 1))

    def _add(self, record: Record, tensor: Tensor | None) -> None:
        self.records.append(record)
        if tensor is None:
            return
        record.shape, record.dtype, record.storage = tuple(tensor.shape), tensor.dtype, _storage(tensor)
        record.requires_grad = tensor.requires_grad
        self.alive.append(tensor)
        # What was written into still goes by its own name: it is the model's, or it has a history that a write
        # without gradients is not a part of.
        kept = id(tensor) in self.refs and (record.writes or (record.mutates and not torch.is_grad_enabled()))
        if not (kept and record.kind != "call_module"):
            self.refs[id(tensor)] = Ref(len(self.records) - 1)

    def _unpack(self, result: Any, reference: Ref) -> None:
        items = result.items() if isinstance(result, dict) else enumerate(result)
        for key, item in items:
            if isinstance(item, Tensor | list | tuple | dict) and any(True for _ in tensors_in(item)):
                record = Record("call_function", operator.getitem, (reference, key), {}, tuple(self.scope))
                if isinstance(item, Tensor):
                    self._add(record, item)
                else:
                    self._add(record, None)
                    self._unpack(item, Ref(len(self.records) - 1))

    def _argument(self, value: Any) -> Any:
        """Return ``value`` with every tensor replaced by a reference."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, list | tuple):
            items = [self._argument(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self._argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self._argument(item) for item in (value.start, value.stop, value.step)))
        if isinstance(value, numpy.generic):
            return value.item()
        if value is None or value is Ellipsis or isinstance(value, _CONSTANTS):
            return value
        raise Unrecorded(f"an argument of type {type(value).__name__} at {calling_line()}", self.scope)

    def _without_history(self, tensor: Tensor) -> Tensor:
        """Return a tensor, or, if it has a history or collects gradients, what ``detach`` makes of it, recorded."""
        if not tensor.requires_grad:
            return tensor
        detached = tensor.detach()
        self._add(Record("call_method", "detach", (self._argument(tensor),), {}, tuple(self.scope)), detached)
        return detached

    def _tensor(self, tensor: Tensor) -> Ref:
        if id(tensor) in self.replaced:
            raise TraceError(
                f"the forward of {type(self.twin).__name__} reads a buffer after another tensor was assigned to it.",
                facts=[f"assigned at {self.replaced[id(tensor)]}", f"read at {calling_line()}"],
                help="write into the buffer in place, e.g. self.mean.copy_(...), and read it before",
            )
        if id(tensor) in self.refs:
            return self.refs[id(tensor)]
        if id(tensor) in self.attributes:
            self._add(Record("get_attr", self.attributes[id(tensor)][0], scope=tuple(self.scope)), tensor)
            return self.refs[id(tensor)]
        if self._is_kept(tensor):
            self._add(Record("kept", "", scope=tuple(self.scope)), tensor)
            return self.refs[id(tensor)]
        raise Unrecorded(f"a tensor that is neither a buffer nor a parameter at {calling_line()}", self.scope)

    def _is_kept(self, tensor: Tensor) -> bool:
        """Tell whether an earlier forward has made a tensor, which the model has kept.

        Raises:
            TraceError: it depends on the input of that forward.
        """
        earlier = self.before
        while earlier is not None and id(tensor) not in earlier.refs:
            earlier = earlier.before
        if earlier is None:
            return False
        if earlier.made_from_input(tensor):
            raise TraceError(
                f"a second forward of {type(self.twin).__name__} is not the same as the first.",
                facts=[calling_line(), "it reads a tensor that the first has made from its input, and kept."],
                help="keep it in a buffer that is written in place, e.g. self.mean.copy_(...)",
            )
        return True


@dataclass(frozen=True)
class _Before:
    """What a call found: its tensors with their versions, a leaf's own state, and what had been counted."""

    tensors: list[tuple[Tensor, int]]
    state: dict[str, tuple[int, int]]
    counted: tuple[int, int]


def _attributes(twin: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """Return the tensors of a model by their ids, each with its path."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, module in twin.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in (*own_parameters(module).items(), *own_buffers(module).items(), *vars(module).items()):
            if isinstance(value, Tensor):
                found.setdefault(id(value), (prefix + name, value))
    return found


def _own_state(module: nn.Module, path: str) -> dict[str, tuple[int, int]]:
    """Return identity and version of the buffers and parameters of a leaf, but for the statistics of norms."""
    found = {}
    for name, part in module.named_modules(prefix=path):
        norm = isinstance(part, RUNNING_NORMS)
        owned = (*own_parameters(part).items(), *(() if norm else own_buffers(part).items()))
        found.update({f"{name}.{key}": (id(value), version_of(value)) for key, value in owned if value is not None})
    return found


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [path for path, known in before.items() if after.get(path) != known]


@contextlib.contextmanager
def _calls_go_to(recorder: Recorder) -> Iterator[None]:
    """Let the recorder run every module and see what happens outside of torch functions.

    These are assignments to buffers, functions with a backward of their own, and scripted functions, of which it
    records the Python code that they were made from.
    """
    modules: Any = nn.Module  # Any, here and below, since their methods are replaced while a forward is recorded
    functions: Any = torch.autograd.Function
    scripts: Any = torch.jit.ScriptFunction
    original, apply = nn.Module.__call__, functions.__dict__["apply"]
    assign, register = nn.Module.__setattr__, nn.Module.register_buffer

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder._module(original, module, args, kwargs)

    def apply_custom(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            raise TraceError(
                f"the forward of {type(recorder.twin).__name__} uses a reentrant checkpoint.",
                facts=[calling_line(), "it trains nothing in a segment whose input has no history."],
                help="checkpoint(..., use_reentrant=False)",
            )
        if not recorder.inside_leaf:
            recorder._refuse_region(f"{cls.__name__} has a backward of its own (torch.autograd.Function)")
        return apply.__get__(None, cls)(*args, **kwargs)

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and isinstance(own_buffers(module).get(name), Tensor):
            recorder.assigned(module, name, value)
        modules.register_buffer = register  # which this may call
        assign(module, name, value)
        modules.register_buffer = set_buffer

    def set_buffer(module: nn.Module, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if isinstance(tensor, Tensor) and isinstance(own_buffers(module).get(name), Tensor):
            recorder.assigned(module, name, tensor)
        register(module, name, tensor, persistent)

    def call_scripted(function: torch.jit.ScriptFunction, *args: Any, **kwargs: Any) -> Any:
        written = code_of_scripted(function)
        if recorder.inside_leaf:
            return scripted(function, *args, **kwargs)
        if written is None:
            recorder._refuse_region("a function without Python code is called (torch.jit.trace)")
        return written(*args, **kwargs)

    scripted = scripts.__call__
    scripts.__call__ = call_scripted

    def enter(hooks: Any) -> Any:
        recorder.enter_hooks(hooks)
        return entered(hooks)

    def leave(hooks: Any, *error: Any) -> Any:
        recorder.leave_hooks(hooks)
        return left(hooks, *error)

    hooks: Any = torch.autograd.graph.saved_tensors_hooks
    entered, left = hooks.__enter__, hooks.__exit__
    hooks.__enter__, hooks.__exit__ = enter, leave
    modules.__setattr__, modules.register_buffer = set_attribute, set_buffer
    modules.__call__ = call
    functions.apply = classmethod(apply_custom)
    try:
        yield
    finally:
        modules.__call__ = original
        modules.__setattr__, modules.register_buffer = assign, register
        hooks.__enter__, hooks.__exit__ = entered, left
        scripts.__call__ = scripted
        functions.apply = apply


def _attribute(twin: nn.Module, path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(twin.get_submodule(module), name, None)


def _references(value: Any) -> Iterator[Ref]:
    """Yield the references in an argument."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        yield from _references(tuple(value.values()))
    elif isinstance(value, slice):
        yield from _references((value.start, value.stop, value.step))


def map_items(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return a list, tuple, dict or slice with ``function`` applied to its items; anything else as it is."""
    if isinstance(value, list | tuple):
        items = [function(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(function(item) for item in (value.start, value.stop, value.step)))
    return value


def python_random_states() -> bytes:
    """Return the random states of Python and NumPy, to compare."""
    return pickle.dumps((random.getstate(), numpy.random.get_state()))


def _leaf_help(path: str, before: str = "") -> Advice:
    """Say how to take a module whole; the model itself cannot be."""
    if path:
        what = "takes the module around it whole"
        return Advice(f"{before}leaf=({path!r},) {what}", f"{before}--leaf {path} {what}")
    what = f"{before}move it into the forward of a submodule, and take that whole"
    return Advice(f"{what}: leaf=(PATH,)", f"{what}: --leaf PATH")


_CONSTANTS = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format, torch.layout)


_READS_VALUES = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
}


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with every tensor in it replaced."""
    return function(value) if isinstance(value, Tensor) else map_items(value, lambda v: _map_tensors(v, function))


def _random_like(tensor: Tensor, device: str) -> Tensor:
    """Return normal random numbers; zeros where they have to be whole."""
    drawn = tensor.is_floating_point() or tensor.is_complex()
    return torch.randn_like(tensor, device=device) if drawn else torch.zeros_like(tensor, device=device)


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
    return empty.clone() if tensor.requires_grad else empty  # no leaf of autograd: it may be written in place


def _storage(tensor: Tensor) -> int:
    return storage_of(tensor)
