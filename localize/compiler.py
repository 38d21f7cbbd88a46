"""The compiler, read from top to bottom: each stage takes what the one before it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from localize import auditor, methods, recipes
from localize.codegen.emit import emit
from localize.codegen.lower import lower
from localize.cutting import cuts
from localize.cutting.split import split
from localize.errors import MethodError, ModelError, OptionError, UnknownNameError, did_you_mean
from localize.graph.inputs import Inputs
from localize.graph.trace import trace
from localize.heads.initial import Undrawn, materialize
from localize.ir import CutSpec, Plan, Segments, Trunk
from localize.methods import Method
from localize.passes import freeze as freezing
from localize.passes import labels, schedule
from localize.passes.compose import Addition, compose
from localize.passes.dense import fit_to_pixels
from localize.passes.formed import checked
from localize.passes.labels import LabelLoss
from localize.passes.sides import attach
from localize.passes.stated import override_features
from localize.passes.tied import declare_tied
from localize.runtime.collector import no_collections
from localize.runtime.model import LocalModel


@no_collections()
def transform(
    model: nn.Module,
    recipe: recipes.Source = "backprop",
    *,
    example_input: Inputs,
    cut: CutSpec | int | Literal["max", "sqrt"] | None = None,
    shared: bool = False,
    leaf: Sequence[str] = (),
    output: str | None = None,
    loss: str | Mapping[str, Any] | Callable[..., Any] | LabelLoss | None = None,
    name: str | None = None,
    **options: Any,
) -> LocalModel:
    """Turn a model into one that is trained by local losses.

    Args:
        model: any image model; its class, keys and eval output stay as they are, and so do its parameters, which the
            result shares. Those that require no gradient are not trained. A recipe's ``freeze`` lets more of them
            require none.
        recipe: name of a method or a recipe, path of a recipe file, dict, or :class:`localize.Recipe`; or a method of
            your own, an object or class of the :class:`localize.methods.Method` protocol, or where its class is:
            ``module:Class``, ``FILE.py:Class``.
        example_input: a batch (N, C, H, W) of the size and type that will be trained on; its values are not used. For
            a model of several inputs a tuple of what its forward takes by position, or a dict of what it takes by
            keyword, each tensor with the batch first; what is not a tensor stays what it is in every step.
        cut: number and place of the cuts; default is the recipe's, or the method's: one segment per local layer. A
            number (or ``"max"``, ``"sqrt"``) is that of the segments.
        shared: parameters that are used on both sides of a cut are trained by every loss that runs a segment with
            them; otherwise such cuts are refused. The recipe may say so as well.
        leaf: dotted names of modules that are called whole: no cut lies in them, and they may do what no straight-line
            code does, such as to decide on values. Default is the recipe's.
        output: of a model that returns several tensors, the one that holds the class scores: its field, or ``output_1``
            by its place. Default is the recipe's, or what is found by shape and depth.
        loss: what class scores are trained by, in the place of each cross-entropy with labels: ``"cross-entropy"``,
            ``"focal"`` or ``"bce"``, or a dict with this ``name`` and with ``smoothing``, ``weights`` (one for each
            class) or ``gamma`` (of focal); see :class:`localize.passes.labels.LabelLoss`. Default is the recipe's, or
            the plain cross-entropy. Where the method has an option of this name, its own values are that option's.
        name: how reports call the model; default is its class.
        options: options of the method, and of its schedule (``recompute``, ``micro_batch``, ...: see
            :class:`localize.passes.schedule.Schedule`); they win over those of the recipe.

    Returns:
        A :class:`localize.LocalModel` whose ``step`` runs exactly its ``source``.

    Raises:
        LocalizeError: see :mod:`localize.errors`; the message says what to do next.

    Example:
        >>> local = localize.transform(model, "auglocal", example_input=x, d=4)
        >>> optimizer = torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1)
        >>> result = local.step(x, y, optimizer)
    """
    if isinstance(model, LocalModel):
        raise ModelError("the model has local heads already.", help="pass local.export(), the model itself")
    recipe = recipes.load(recipe)
    own = labels.own(recipe.method)
    if loss in own:
        options, loss = {**options, "loss": loss}, None
    scheduled = {**recipe.schedule, **{name: options.pop(name) for name in schedule.names() if name in options}}
    recipe = replace(
        recipe,
        options={**recipe.options, **options},
        cut=_cut_spec(cut) or recipe.cut,
        shared=shared or recipe.shared,
        leaf=tuple(leaf) or recipe.leaf,
        output=output or recipe.output,
        loss=recipe.loss if loss is None else labels.create(loss, own).told,
        schedule=scheduled,
    )
    methods.create(recipe.method, **recipe.options)  # what is wrong with them is said before the model is traced
    labels.create(recipe.loss)
    if isinstance(example_input, Tensor) and example_input.dim() < 2:
        raise OptionError("example_input has to be a batch of images, (N, C, H, W).", option="example_input")

    freeze_parameters(model, recipe.freeze)
    trunk = trace(
        model,
        example_input,
        name=name or recipe.model,
        leaves=recipe.leaf,
        output=recipe.output,
        further=tuple(recipe.outputs),
    )
    return convert(trunk, recipe)


def freeze_parameters(model: nn.Module, names: Sequence[str]) -> None:
    """Let parameters of a model require no gradient.

    Args:
        model: is changed.
        names: of parameters; ``*`` and ``?`` stand for other characters, dots included.

    Raises:
        UnknownNameError: one of them stands for no parameter. Nothing has changed then.
        OptionError: no parameter would be left to train. Nothing has changed then.
    """
    parameters = dict(model.named_parameters())
    frozen = set()
    for name in names:
        found = [parameter for parameter in parameters if fnmatchcase(parameter, name)]
        if not found:
            inside = [parameter for parameter in parameters if parameter.startswith(f"{name}.")]
            raise UnknownNameError(
                f"no parameter is called {name!r}.",
                facts=f"the model has {len(parameters)}, e.g. {', '.join(list(parameters)[:3])}.",
                help=f"'{name}.*', for all in {name}" if inside else did_you_mean(name, parameters),
            )
        frozen.update(found)
    if frozen and not any(p.requires_grad for name, p in parameters.items() if name not in frozen):
        raise OptionError("no parameter is left to train.", facts=f"frozen are {', '.join(names)}.", help="freeze less")
    for name in frozen:
        parameters[name].requires_grad_(False)


def _cut_spec(cut: Any) -> CutSpec | None:
    """Return the cuts that were asked for; a number, ``max`` and ``sqrt`` say how many segments."""
    if cut is None or isinstance(cut, CutSpec):
        return cut
    if isinstance(cut, int) and not isinstance(cut, bool):
        return CutSpec(segments=cut)
    match cut:
        case "max" | "sqrt":
            return CutSpec(segments=cut)
    names = (cut,) if isinstance(cut, str) else cut if isinstance(cut, list | tuple) else ()
    named = tuple(name for name in names if isinstance(name, str)) or ("layer1",)
    raise OptionError(
        f"cut cannot be {cut!r}.",
        facts="it is a number of segments, 'max', 'sqrt', or a localize.CutSpec, which also names places.",
        help=f"cut=4, or cut=localize.CutSpec(at={named!r})",
        option="cut",
    )


@no_collections()
def convert(trunk: Trunk, recipe: recipes.Recipe, *, audited: bool = True) -> LocalModel:
    """Turn a traced model into one that is trained by local losses: the stages of :func:`transform` after the first.

    Args:
        trunk: the recorded model.
        recipe: method, cuts, terms, schedule.
        audited: False leaves the audit of the text to a later conversion, for one of many that are only looked at.

    Raises:
        LocalizeError: see :mod:`localize.errors`.
    """
    return assemble(schedule.apply(planned(trunk, recipe), recipe.schedule), audited=audited)


@no_collections()
def planned(trunk: Trunk, recipe: recipes.Recipe) -> Plan:
    """Return the plan of a recipe, before its schedule is applied.

    Raises:
        LocalizeError: see :mod:`localize.errors`.
    """
    method = methods.create(recipe.method, **recipe.options)
    if recipe.features:
        ends = [layer.end for layer in cuts.local_layers(trunk, method.grain) if layer.end is not None]
        trunk = override_features(trunk, recipe.features, (*cuts.candidates(trunk), *ends))
    layout = cuts.place(trunk, recipe.cut or method.cut, grain=method.grain, together=method.together)
    segments = split(layout, shared=recipe.shared)
    without_data = all(parameter.is_meta for parameter in trunk.model.parameters())
    with Undrawn() if without_data else nullcontext():
        return design(segments, method, recipe.terms, recipe.outputs, labels.create(recipe.loss))


def design(
    segments: Segments,
    method: Method,
    terms: Sequence[Addition] = (),
    outputs: Mapping[str, float] = MappingProxyType({}),
    loss: LabelLoss = LabelLoss(),  # noqa: B008  frozen
) -> Plan:
    """Attach heads and losses to the segments: those of the method, and what the passes after it add.

    Args:
        segments: the trunk, cut.
        method: decides what trains which segment.
        terms: added to every local loss, see :func:`localize.passes.compose.compose`.
        outputs: weights of further outputs of the model, see :func:`localize.passes.sides.attach`.
        loss: what class scores are trained by, see :func:`localize.passes.labels.supervise`.

    Raises:
        MethodError: the method makes what enters the first segment, and the model takes more than images.
        PlanError: what it returns is not a plan that a step can be made of, see :mod:`localize.passes.formed`.
    """
    plan = attach(declare_tied(compose(checked(method.plan(segments), method), terms)), outputs)
    plan = labels.declare_labels(fit_to_pixels(labels.supervise(plan, loss)))
    names = [argument.name for argument in segments.trunk.inputs]
    if plan.input is not None and len(names) > 1:
        raise MethodError(
            f"{plan.method} makes what enters the first segment from images and labels.",
            facts=f"{segments.trunk.name} takes {', '.join(names)}.",
            help="another method",
        )
    return plan


@no_collections()
def assemble(plan: Plan, *, audited: bool = True) -> LocalModel:
    """Turn a plan into a local model that runs it: make the heads, lower, emit, load, and audit the text.

    Args:
        plan: which loss trains what.
        audited: False leaves the audit out, see :func:`convert`.

    Raises:
        AuditError: the text does not do what the plan declares.
    """
    model = plan.segments.trunk.model
    return (_loaded if audited else unaudited)(plan, model, _heads(plan, model))


def freeze(local: LocalModel, *names: str) -> LocalModel:
    """Return a local model over the same modules whose step leaves some blocks as they are.

    Their parameters no longer require a gradient, as after ``requires_grad_(False)``, and no optimizer moves them.
    Losses that would train nothing else are left out, with their heads. A frozen segment that a trained one reads from
    still runs, in the mode that it is in: in train mode its BatchNorms normalise by the batch and move their
    statistics, as they do in PyTorch. A segment that no trained one reads from does not run. The optimizer can stay the
    same one.

    Args:
        local: is not stepped any more until ``freeze(local)``, with other names or none, has set which of its
            parameters require a gradient again.
        names: of blocks (``local.plan.blocks``), such as ``"segment_0"``, ``"head_0"``; ``*`` stands for anything.

    Raises:
        UnknownNameError: a name is not that of a block that is trained.
        OptionError: nothing would be left to train.
        MethodError: see :func:`localize.passes.freeze.freeze`.

    Example:
        >>> local = localize.freeze(local, "segment_0")  # segment 0 and its head stay; the others go on
    """
    plan = freezing.freeze(local.plan, names)
    trainable = {name for block in plan.blocks for name in block.parameters}
    parameters = dict(local.named_parameters())
    for name in (name for block in local.plan.blocks for name in block.parameters):
        parameters[name].requires_grad_(name in trainable)
        if name not in trainable:
            parameters[name].grad = None
    made = _loaded(plan, local.trunk, local.heads)
    made.training = local.training
    return made


def _loaded(plan: Plan, model: nn.Module, heads: nn.ModuleDict) -> LocalModel:
    """Return the local model that runs the text of a plan.

    Raises:
        AuditError: the text does not do what the plan declares.
    """
    local = unaudited(plan, model, heads)
    auditor.static(local).raise_if_failed()
    return local


def unaudited(plan: Plan, model: nn.Module, heads: nn.ModuleDict) -> LocalModel:
    """Return the local model that runs the text of a plan over given modules; the text is not audited."""
    program = lower(plan)
    return LocalModel(model, heads, plan, program, emit(program))


def _heads(plan: Plan, model: nn.Module) -> nn.ModuleDict:
    """Give every head and shared block of the plan real parameters, where and of the type that the model has them.

    They are freshly drawn, but for the declared copies of parts of the model.
    """
    like = next(p for p in model.parameters() if p.requires_grad)
    device, dtype = like.device, like.dtype if like.dtype.is_floating_point else torch.float32
    heads = nn.ModuleDict()
    for block in plan.blocks:
        if block.module is not None:
            heads[block.name] = materialize(block.module, device=device, dtype=dtype)
    with torch.no_grad():
        for copy in plan.copies:
            part = heads.get_submodule(f"{copy.block}.{copy.part}".rstrip("."))
            root = heads if copy.of == "heads" else model
            part.load_state_dict(root.get_submodule(copy.source).state_dict())
    return heads.train(model.training)
