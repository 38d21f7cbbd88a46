"""Record the forward of a model as a graph over the user's own modules.

One real forward is run on a copy without data (meta device), in train mode, while every torch function and every leaf
module that is called is written down. Nothing is a proxy, so control flow, shapes, lists and in-place writes behave as
they do in training. Differences are taken between recordings, so that nothing is baked in:

- batch sizes 3 and 7 (verified at 5): a constant that differs is ``a * batch + b``;
- train and eval: a constant that differs is chosen by ``training`` when the graph runs;
- one forward after the other on the same copy: where the first leaves something for the next, what does not
  depend on the input is computed again in every forward; a model that keeps more is refused;
- the random states of Python and NumPy: a model that draws from them, outside of leaves, is refused.

The user's model is never touched: no attribute, no cache entry, no mode, no random state.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx, nn

from localize.errors import Advice, ModelError, Notice, OptionError, UnknownNameError, did_you_mean
from localize.graph.builder import Builder, result_nodes, returning, side_outputs
from localize.graph.features import add_features
from localize.graph.inputs import Inputs, arguments_of
from localize.graph.leaves import is_leaf, is_of_torch
from localize.graph.recordings import Recorded, record_model
from localize.graph.twin import meta_twin
from localize.ir import Trunk, dtype_of, facts, shape_of
from localize.torch_names import is_compiled


def trace(
    model: nn.Module,
    example_input: Inputs,
    *,
    name: str | None = None,
    leaves: Sequence[str] = (),
    output: str | None = None,
    further: Collection[str] = (),
) -> Trunk:
    """Record the forward of ``model``.

    Args:
        model: any module; it is not changed.
        example_input: a batch (N, C, H, W) of the shape and type that the model will be trained on, a tuple of all that
            the forward takes by position, or a dict of what it takes by keyword; values of tensors are unused.
        name: how reports call the model; default is its class.
        leaves: dotted names of modules that are called whole, and not looked into. They may read values of tensors: one
            that does not run without data is run on zeros and on random numbers to find what shapes it returns.
        output: name of the output that holds the class scores, see :func:`localize.graph.outputs.find_outputs`; None
            finds it, and warns where several look alike.
        further: names of outputs that are not the class scores.

    Raises:
        ModelError: the model is wrapped (DDP, compiled, scripted) or is not a module, or returns no class scores.
        OptionError: the example holds no tensor, or tensors of several batch sizes.
        UnknownNameError: one of ``leaves`` is not a module of the model that its forward calls.
        OptionError: ``leaves`` is a string.
        TraceError: the forward reads values of tensors, is not deterministic, or leaves torch.
    """
    check_model(model)
    _check_names(leaves, model)
    _warn_of_hooks(model)
    arguments = arguments_of(model, example_input)
    recorded = record_model(model, arguments, frozenset(leaves), output, further)
    _check_called(leaves, recorded, model)
    whole = Builder(recorded).graph()
    logits, _ = result_nodes(whole)
    images = next(argument.shape for argument in arguments if argument.shape is not None)
    num_classes, *output_size = _scores_shape(logits, model, images)
    twin = meta_twin(model)
    graph = returning(whole, logits)
    add_features(graph, twin, images)
    sides = tuple(side_outputs(whole, graph))
    _warn_of_outputs(recorded, model)
    _warn_of_checkpoints(recorded, model)
    return Trunk(
        model=model,
        twin=twin,
        graph=graph,
        name=name or type(model).__name__,
        arguments=arguments,
        num_classes=num_classes,
        output_size=tuple(output_size),
        state_keys=tuple(model.state_dict()),
        eval_differs=recorded.eval_differs,
        leaves=_taken_whole(whole, twin),
        sides=sides,
        whole=whole if sides else None,
        output=recorded.outputs.name,
        output_in_eval=recorded.output_in_eval,
    )


def _scores_shape(logits: fx.Node, model: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the model's class scores without the batch: (Z,), or (Z, H, W) for the pixels of an image.

    Raises:
        ModelError: the output is not class scores.
    """
    shape = shape_of(logits)
    dense = len(shape) > 1 and tuple(shape[1:]) == input_shape[1:]
    if not facts(logits).batched or not (len(shape) == 1 or dense) or not dtype_of(logits).is_floating_point:
        told = ", ".join(("N", *map(str, shape)) if facts(logits).batched else map(str, shape))
        size = ", ".join(("N", "classes", *map(str, input_shape[1:])))
        raise ModelError(
            f"{type(model).__name__} returns {facts(logits).dtype} of shape ({told}), not class scores (N, classes).",
            facts=f"losses compare one vector of class scores with the label of each image, or of each pixel ({size}).",
            help="pass a model with a classifier: num_classes=..., or nn.Sequential(model, classifier)",
        )
    return tuple(shape)


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be taken as it is.

    Raises:
        ModelError: with the attribute that holds the plain model, where there is one.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected an nn.Module, got {type(model).__name__} {str(model)[:60]!r}.",
            help="localize.zoo.create_model(name) makes a model from its name",
        )
    kind = type(model).__name__
    if is_compiled(model):
        raise ModelError(
            "the model is compiled (torch.compile).",
            facts="a compiled module hides the graph that is to be cut.",
            help="pass the module you compiled, model._orig_mod",
        )
    if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        raise ModelError(
            f"the model is wrapped in {kind}.",
            facts="its single backward hook is wrong for one backward per segment.",
            help="pass the module inside, model.module",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is a ScriptModule.", help="pass the Python module it was scripted from")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"{kind} has no trainable parameter.", help="set requires_grad=True on what is to be trained")
    for path, module in model.named_modules():
        lazy: Any = module if isinstance(module, nn.modules.lazy.LazyModuleMixin) else None
        if lazy is not None and lazy.has_uninitialized_params():
            raise ModelError(
                f"module {path!r} is lazy and has no shape yet.", help="run one forward on the model before"
            )


def _check_names(leaves: Sequence[str], model: nn.Module) -> None:
    if isinstance(leaves, str):
        raise OptionError(f"leaves are named by a tuple, not by {leaves!r}.", help=f"leaf=({leaves!r},)")
    known = [path for path, _ in model.named_modules() if path]
    for path in leaves:
        if path not in known:
            raise UnknownNameError(
                f"{type(model).__name__} has no module {path!r}.",
                facts="a leaf is named by its path in the model, as in the keys of its state_dict.",
                help=did_you_mean(path, known)
                or Advice(f"for example leaf=({known[0]!r},)", f"for example --leaf {known[0]}"),
            )


def _check_called(leaves: Sequence[str], recorded: Recorded, model: nn.Module) -> None:
    called = {record.target for record in recorded.records if record.kind == "call_module"}
    for path in leaves:
        if path not in called:
            raise UnknownNameError(
                f"the forward of {type(model).__name__} does not call module {path!r}.",
                facts="it is a list of modules, or not used, or inside another module that is taken whole.",
                help=did_you_mean(path, called),
            )


def _taken_whole(graph: fx.Graph, twin: nn.Module) -> tuple[str, ...]:
    """Return the modules with children that are called whole, but for those of torch."""
    called = {node.target: twin.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    return tuple(path for path, part in called.items() if any(part.children()) and not is_of_torch(part))


def _warn_of_outputs(recorded: Recorded, model: nn.Module) -> None:
    name, others = recorded.outputs.name, recorded.outputs.alike
    if others:
        notice = Notice(
            f"{type(model).__name__} returns {len(others) + 1} outputs that look like class scores: "
            f"{name}, {'the first of the deepest' if recorded.outputs.even else 'the deepest'}, is taken for the class "
            f"scores; {', '.join(others)} {'is a further output' if len(others) == 1 else 'are further outputs'}.",
            Advice(f"output={others[-1]!r} takes another.", f"--output-field {others[-1]} takes another."),
        )
        warnings.warn(notice, stacklevel=3)


def _warn_of_checkpoints(recorded: Recorded, model: nn.Module) -> None:
    if recorded.checkpoints:
        count = len(recorded.checkpoints)
        notice = Notice(
            f"{count} checkpoint{'' if count == 1 else 's'} in the forward of {type(model).__name__} (torch.utils."
            f"checkpoint) {'is' if count == 1 else 'are'} not part of the training step: it keeps the up to "
            f"{sum(recorded.checkpoints) / 1024:.0f} KiB for each image that are computed there.",
            Advice("recompute='body' keeps what enters each segment instead."),
        )
        warnings.warn(notice, stacklevel=3)


def _hooks_of(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _warn_of_hooks(model: nn.Module) -> None:
    hooked = [p for p, m in model.named_modules() if not is_leaf(m) and _hooks_of(m)]
    if hooked:
        notice = Notice(
            f"hooks on {', '.join(map(repr, hooked))} are recorded once and not called in training: the "
            "generated step calls their inner modules. Put them on a torch.nn module, or remove them.",
        )
        warnings.warn(notice, stacklevel=3)
