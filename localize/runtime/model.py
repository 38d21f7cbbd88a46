"""Run the generated text: a model with heads, and the step that trains them.

The text is executed as it is, from the file it was read from or through ``linecache``, so that tracebacks, pdb and
``inspect.getsource`` show the lines that ran.
"""

from __future__ import annotations

import copy
import hashlib
import linecache
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from localize.errors import Advice, InputError, OptionError
from localize.graph.inputs import Inputs, tensors_of
from localize.graph.outputs import output_called
from localize.graph.twin import meta_twin
from localize.ir import LocalLoss, Plan, Program, Segment
from localize.runtime.graph import step_graph
from localize.runtime.labels import check_labels
from localize.runtime.updates import Updates
from localize.torch_names import is_fake

SINGLE_VALUE = "more than 1 value per channel"
"""What torch's error says where BatchNorm gets one value for each channel."""
MODULES = ("trunk", "heads")
"""What a local model holds: the user's model, and what was added to it."""


@dataclass(frozen=True)
class StepResult:
    """What one training step returns: everything is detached.

    It holds what the step was made to return, ``transform(..., scores=)``, for as long as it lives: ``all`` class
    scores, their ``argmax`` (8 bytes for each image and loss, however many classes there are), or ``none``.
    """

    losses: dict[str, Tensor]
    """Every loss by its name, in the order in which they are differentiated."""
    returned: dict[str, Tensor | None]
    """What the text returns for every loss: class scores (N, Z), or classes (N,); None where a loss has none."""
    kept: Literal["all", "argmax", "none"] = "all"
    """Which of them: see :attr:`localize.ir.Plan.scores`."""
    outputs: tuple[str, ...] = ()
    """Names of the losses at the model's output: one, or one for each part of the batch."""

    @property
    def scores(self) -> dict[str, Tensor | None]:
        """Class scores (N, Z) at the depth of every loss; None where a loss has none.

        Raises:
            OptionError: the step does not return them.
        """
        if self.kept != "all":
            raise self._without("class scores")
        return self.returned

    @property
    def logits(self) -> Tensor:
        """The model's own output on the batch, (N, Z); where its classifier is not trained, the deepest scores.

        Raises:
            OptionError: the step does not return them.
        """
        if self.kept != "all":
            raise self._without("logits")
        return self._at_output(self.returned)

    @property
    def classes(self) -> dict[str, Tensor | None]:
        """The class (N,) of the highest score at the depth of every loss; None where a loss has no scores.

        Raises:
            OptionError: the step does not return them.
        """
        if self.kept == "none":
            raise self._without("classes")
        if self.kept == "argmax":
            return self.returned
        return {name: None if one is None else one.argmax(1) for name, one in self.returned.items()}

    @property
    def predicted(self) -> Tensor:
        """The class (N,) that the model's own output predicts; where its classifier is not trained, the deepest scores.

        Raises:
            OptionError: the step does not return it.
        """
        if self.kept == "none":
            raise self._without("predicted classes")
        found = self._at_output(self.returned)
        return found if self.kept == "argmax" else found.argmax(1)

    def _at_output(self, values: dict[str, Tensor | None]) -> Tensor:
        """Return the value at the model's output, those of all parts of the batch one after another."""
        found = [part for name in self.outputs if (part := values[name]) is not None]
        if not found:
            found = [part for part in values.values() if part is not None][-1:]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _without(self, what: str) -> OptionError:
        left = {"argmax": "the class of the highest score: result.classes, result.predicted", "none": "result.losses"}
        return OptionError(
            f"this step returns no {what}.",
            facts=f"it was made with scores={self.kept!r}, which keeps {left[self.kept]}.",
            help=Advice("localize.transform(..., scores='all')", "--scores all"),
            option="scores",
        )


class LocalModel(nn.Module):
    """The user's model with local heads, and the training step as text.

    Its forward is the trunk's own. ``source`` is the text that :meth:`step` runs.
    """

    def __init__(
        self, trunk: nn.Module, heads: nn.ModuleDict, plan: Plan, program: Program, source: str, filename: str = ""
    ) -> None:
        super().__init__()
        self.trunk, self.heads = trunk, heads
        self.plan, self.program, self.source = plan, program, source
        self.filename = filename or f"<localize {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
        self._functions: dict[str, Callable[..., Any]] | None = None
        self._updated: Updates | None = None
        self._labels_seen = False
        self._takes_single: bool | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the trunk, and only it.

        Args:
            args: what the model takes.
            kwargs: the same, by keyword.

        Returns:
            What the model returns, in the mode that it is in.
        """
        return self.trunk(*args, **kwargs)

    def logits(self, x: Inputs) -> Tensor:
        """Run the trunk in the current mode, and return the class scores (N, Z) of all that it returns.

        Args:
            x: images (N, C, H, W); for a model of several inputs a tuple or dict of them, as in :meth:`step`.
        """
        trunk = self.plan.segments.trunk
        returned = self(x) if isinstance(x, Tensor) else self(**x) if isinstance(x, Mapping) else self(*x)
        return output_called(returned, trunk.output if self.trunk.training else trunk.output_in_eval)

    def step(
        self,
        x: Inputs,
        y: Tensor,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        batch: tuple[int, int] = (0, 1),
        scaler: torch.amp.GradScaler | None = None,
    ) -> StepResult:
        """Train on one batch: forward, one backward per loss, update.

        Several batches make one update with ``batch=(i, n)``: this is batch i = 0 ... n - 1 of n, in that order.
        Gradients are dropped in the first and averaged over all in the last, where alone the optimizer steps. In a step
        that updates after each segment, a block that several losses update in turn has changed by then only in the last
        batch, as it would within one large batch.

        Under ``torch.autocast`` the forward and the losses run in its type; weights are cast whenever they are used.

        In float16 small gradients become zero, unless losses are scaled: a step made with ``loss_scaling=True`` takes a
        ``scaler``, as PyTorch describes for several losses and optimizers. All losses are multiplied by its scale.
        Each update (of all, or of what one loss reaches) is left out if its own gradients are not finite; copies are
        pulled all the same. ``scaler.update()`` is called after the last update, which halves the scale if any was
        left out. Before the optimizer's hooks run, gradients are divided by the scale. Losses are returned unscaled.

        Args:
            x: images (N, C, H, W), of the size the step was generated for; for a model of several inputs a tuple or
                dict of them, as ``example_input`` was.
            y: class ids (N,); of a model that classifies pixels (N, H, W), where 255 is no label. Where
                ``plan.labels`` says so, also soft labels (N, Z), shares of the classes that sum to 1; and with the loss
                ``bce`` multi-label targets (N, Z), from 0 to 1 for each class by itself.
            optimizer: any torch optimizer over :meth:`param_groups`, or several that hold them between them. Where a
                step updates after each segment, only what that loss reaches is updated. Each of several is cleared and
                stepped as one would be; with a scaler each is left out by its own gradients.
            batch: number of this batch, and of all that make one update.
            scaler: a ``torch.amp.GradScaler``; one that is not enabled is none.

        Returns:
            Losses and class scores of the batch, detached.

        Raises:
            InputError: images of another size; or of another type than the step was generated for, unless all
                parameters have that type now, or autocast casts it; or labels that are not class ids of the model, or
                soft where a loss needs class ids; or a single image, where a BatchNorm cannot take one. Nothing has
                changed then.
            OptionError: the optimizers lack parameters that the step trains, or two of them hold the same one, or
                frozen parameters have become trainable; or ``batch`` is not (i, n) with 0 <= i < n, or does not follow
                the batch before; or several batches are to make one update in a step that pulls copies, which it does
                once per batch; or there is a scaler, and the step does not scale its losses; or nothing that a loss
                trains requires a gradient any more (losses before it have been trained then).
        """
        if batch[0] not in range(batch[1]):
            raise OptionError(
                f"batch cannot be {batch}.",
                facts="it is (i, n): this is batch i = 0 ... n - 1 of n that make one update.",
                help="batch=(0, 2), then batch=(1, 2)",
                option="batch",
            )
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if scaler is not None and not self.plan.scaled:
            raise OptionError(
                "this step does not scale its losses, and was given a gradient scaler.",
                facts="the scaler would divide gradients by a scale that nothing was multiplied by.",
                help=Advice(
                    "localize.transform(..., loss_scaling=True)", "--loss-scaling; --amp-dtype float16 to train"
                ),
                option="scaler",
            )
        inputs = self.check(x, y)
        updates = self.updates(optimizer)
        if batch[1] > 1:
            self.check_batches(batch[1])
        if batch[0] > 0 and (updates.batch, updates.batches) != (batch[0] - 1, batch[1]):
            raise OptionError(
                f"batch {batch} does not follow batch {(updates.batch, updates.batches)}.",
                facts="the batches that make one update come one after the other, from 0 on.",
                help=f"batch=(0, {batch[1]}), and then the others",
            )
        self._check_single(inputs, y)
        updates.batch, updates.batches, updates.scaler = *batch, scaler
        run = self._functions_for(inputs, y)["train_step"]
        try:
            with fresh_casts(inputs[0].device.type):
                losses, scores = run(self.trunk, self.heads, *inputs, y, updates)
        except RuntimeError as error:
            self._refuse_frozen(error)
            raise
        except ValueError as error:
            if SINGLE_VALUE in str(error):
                raise self._too_small(y) from error
            raise
        if scaler is not None and updates.is_last:
            scaler.update()
        return StepResult(losses, scores, self.plan.scores, tuple(loss.name for loss in self.plan.outputs))

    def _refuse_frozen(self, error: RuntimeError) -> None:
        """Say so where the step failed because all that a loss trains was frozen after the step was generated."""
        parameters = dict(self.named_parameters())
        for loss, names in zip(self.plan.losses, self.reached(), strict=True):
            if names and not any(parameters[name].requires_grad for name in names):
                raise OptionError(
                    f"nothing that {loss.name} trains requires a gradient any more.",
                    facts=f"frozen are {', '.join(loss.reach)}.",
                    help=f'localize.freeze(local, "{loss.reach[0]}") returns a step without this loss',
                ) from error

    def _functions_for(self, inputs: tuple[Tensor, ...], y: Tensor) -> dict[str, Callable[..., Any]]:
        """Return the functions of the text, by name, as this batch runs them."""
        functions: dict[str, Callable[..., Any]] = self.functions_of_text
        return functions

    def check(self, x: Inputs, y: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of a batch that a step takes, in the order of the text.

        Args:
            x: images (N, C, H, W); for a model of several inputs a tuple or dict of them, as in :meth:`step`.
            y: labels, as in :meth:`step`.

        Raises:
            InputError: see :meth:`step`.
        """
        inputs = tensors_of(self.plan.segments.trunk.arguments, x)
        self._check_types(inputs)
        count = len(inputs[0])
        # Reading values waits for a GPU: there, those of the first batch are looked at. Tensors without data have none.
        on_cpu = isinstance(y, Tensor) and type(y) is Tensor and y.device.type == "cpu"
        readable = isinstance(y, Tensor) and type(y) is Tensor and y.device.type != "meta"
        values = on_cpu or (readable and not self._labels_seen)
        check_labels(y, count, self.plan, values=values)
        self._labels_seen = self._labels_seen or readable
        if count == 0:
            raise InputError("the batch holds no images.", help="batches of 1 or more")
        parts = max((loss.part[1] for loss in self.plan.losses if loss.part), default=1)
        if count < parts:
            raise InputError(
                f"the batch has {count} images, and is taken in {parts} parts.", help=f"batches of {parts} or more"
            )
        return inputs

    def _check_single(self, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        """Refuse a single image where a normalisation over the batch cannot take one, before any statistics move.

        The step is tried once, on a copy without data; not where the values are without data already.

        Raises:
            InputError: it cannot.
        """
        if len(y) // self._parts != 1 or not self.training or inputs[0].device.type == "meta" or is_fake(inputs[0]):
            return
        if self._takes_single is None:
            self._takes_single = self._try_single(inputs, y)
        if not self._takes_single:
            raise self._too_small(y)

    @property
    def _parts(self) -> int:
        """The number of parts of the batch that losses have of their own."""
        return max((loss.part[1] for loss in self.plan.losses if loss.part), default=1)

    def _too_small(self, y: Tensor) -> InputError:
        """Return the error for a batch that a normalisation cannot take."""
        told = f"{len(y)} images in {self._parts} parts" if self._parts > 1 else "one image"
        return InputError(
            f"a batch of {told} is too small for this step.",
            facts="a BatchNorm of the model or of a head has one value for each channel, whose variance is 0.",
            help=f"batches of {2 * self._parts} images or more; DataLoader(..., drop_last=True) drops a small last one",
        )

    def _try_single(self, inputs: tuple[Tensor, ...], y: Tensor) -> bool:
        """Return whether the step takes a single image, as far as normalisations go."""
        twin = meta_twin(self)
        assert isinstance(twin, LocalModel)
        updates = Updates([torch.optim.SGD(twin.param_groups(lr=0.0))], {loss.name: {} for loss in self.plan.losses})
        values = [value.to("meta") for value in inputs]
        try:
            load(self.source, self.filename)["train_step"](twin.trunk, twin.heads, *values, y.to("meta"), updates)
        except ValueError as error:
            return SINGLE_VALUE not in str(error)
        except Exception:  # what cannot be followed without values says nothing about normalisations
            return True
        return True

    def _check_types(self, inputs: tuple[Tensor, ...]) -> None:
        """Refuse inputs of a floating type that is neither the one recorded nor the one that all parameters have now.

        Autocast casts every type but float64. Only for a type that the first parameter has not, all are looked at.
        """
        recorded = [argument for argument in self.plan.segments.trunk.arguments if argument.shape is not None]
        for argument, value in zip(recorded, inputs, strict=True):
            if value.dtype in (argument.dtype, next(self.parameters()).dtype) or not value.is_floating_point():
                continue
            if value.dtype != torch.float64 and autocast_dtype(value.device.type) is not None:
                continue
            own, *others = {parameter.dtype for parameter in self.parameters()}
            if not others:
                raise InputError(
                    f"input {argument.name!r} of the batch is of type {value.dtype}.",
                    facts=f"the parameters of the model are of type {own}.",
                    help=f"{argument.name} = {argument.name}.to({own})",
                )

    def check_batches(self, count: int) -> None:
        """Refuse to make one update of ``count`` batches where the step does more than updates.

        Raises:
            OptionError: the step pulls copies, which it does once per batch.
        """
        pulled = [copy for copy in self.plan.copies if copy.decay is not None]
        if count > 1 and pulled:
            raise OptionError(
                f"{self.plan.method} pulls {len(pulled)} copies once per batch, not once per update.",
                facts=f"{count} batches are to make one update.",
                help=Advice(
                    "larger batches, and micro_batch=... for less memory",
                    "larger batches, and --micro-batch for less memory",
                ),
            )

    @property
    def functions_of_text(self) -> dict[str, Callable[..., Any]]:
        """The functions of the text by name, as they were loaded: ``segment_0``, ``step_0``, ..., ``train_step``.

        The text is executed when they are first asked for, and not before.

        Raises:
            SyntaxError: the text is not Python.
        """
        if self._functions is None:
            self._functions = load(self.source, self.filename)
        return self._functions

    def updates(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> Updates:
        """Return the optimizers of a step as the text sees them; made once for the same ones.

        Args:
            optimizer: one optimizer over :meth:`param_groups`, or several that hold them between them.

        Raises:
            OptionError: the optimizers lack parameters that the step trains, or two of them hold the same one, or
                frozen parameters have become trainable.
        """
        several = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
        known = () if self._updated is None else self._updated.optimizers
        if self._updated is None or len(known) != len(several) or any(map(operator.is_not, known, several)):
            parameters = dict(self.named_parameters())
            self._check_optimizers(several, parameters)
            names = dict(zip((loss.name for loss in self.plan.losses), self.reached(), strict=True))
            reach = {loss: {name: parameters[name] for name in found} for loss, found in names.items()}
            self._updated = Updates(several, reach, shared=self._with_own_states())
        return self._updated

    def _with_own_states(self) -> set[str]:
        """Return the names of the parameters of which an optimizer has one state for each loss."""
        if self.plan.moments != "per-loss":
            return set()
        losses = (*self.plan.losses, *self.plan.left_out)  # whichever are frozen, it is the same state
        counts = Counter(name for loss in losses for name in self.plan.reach(loss))
        return {name for name, count in counts.items() if count > 1}

    def reached(self) -> list[list[str]]:
        """Return the names of the parameters that each loss trains, sorted, in the order of the plan's losses."""
        return [sorted(self.plan.reach(loss)) for loss in self.plan.losses]

    def _check_optimizers(
        self, optimizers: Sequence[torch.optim.Optimizer], parameters: dict[str, nn.Parameter]
    ) -> None:
        """Refuse optimizers that do not hold what the step trains, each once, and parameters that it does not train."""
        reached = {name for names in self.reached() for name in names}
        held = Counter(id(p) for one in optimizers for group in one.param_groups for p in group["params"])
        twice = sorted(name for name, p in parameters.items() if held[id(p)] > 1)
        if twice:
            raise OptionError(
                f"{len(twice)} parameters are held by two optimizers.",
                facts=f"e.g. {', '.join(twice[:3])}",
                help='[SGD([group]) for group in local.param_groups(by="block")] shares them out',
            )
        missing = sorted(n for n in reached if id(parameters[n]) not in held and parameters[n].requires_grad)
        if missing:
            told = "the optimizer lacks" if len(optimizers) == 1 else "the optimizers lack"
            raise OptionError(
                f"{told} {len(missing)} parameters that this step trains.",
                facts=f"e.g. {', '.join(missing[:3])}",
                help="make it from local.param_groups(lr=...)",
            )
        unfrozen = [n for n, p in parameters.items() if p.requires_grad and n not in reached]
        idle = {*self.plan.segments.unused, *(n for name in self.plan.frozen for n in self.plan.block(name).parameters)}
        unfrozen = [n for n in unfrozen if n not in idle]
        if unfrozen:
            raise OptionError(
                f"{len(unfrozen)} parameters have become trainable since the step was generated.",
                facts=f"e.g. {', '.join(unfrozen[:3])}",
                help="localize.transform the model again",
            )

    def param_groups(self, *, by: Literal["module", "block"] = "module", **options: Any) -> list[dict[str, Any]]:
        """Return every parameter that some loss trains once, in parameter groups that have a ``name``.

        Args:
            by: ``module``: two groups, ``trunk`` and ``heads``. ``block``: one for each block of the plan that is
                trained, such as ``segment_0``, ``head_0``, ``segment_1``.
            options: set in every group, e.g. ``lr=0.1, weight_decay=1e-4``.

        Raises:
            OptionError: ``by`` is something else.
        """
        trained = {name for names in self.reached() for name in names}
        parameters = dict(self.named_parameters())
        if by == "module":
            names = {part: [n for n in parameters if n in trained and n.startswith(f"{part}.")] for part in MODULES}
        elif by == "block":
            names = {block.name: [n for n in block.parameters if n in trained] for block in self.plan.blocks}
        else:
            raise OptionError(
                f"by cannot be {by!r}.", facts="it is 'module' or 'block'.", help='by="block"', option="by"
            )
        groups = {name: [parameters[n] for n in members] for name, members in names.items()}
        return [{"params": members, "name": name, **options} for name, members in groups.items() if members]

    def scores(self, x: Inputs) -> dict[str, Tensor]:
        """Predict at every depth: class scores (N, Z) of every loss that has them, in the current mode.

        For DCL this is the layer-wise prediction of eq. 3. A loss with scores at several depths gives the last under
        its own name, and the others under ``LOSS.HEAD``.

        Args:
            x: images (N, C, H, W); for a model of several inputs a tuple or dict of them, as in :meth:`step`.

        Returns:
            Class scores (N, Z) by the name of the loss.

        Raises:
            InputError: the model computes other operations in eval mode, and the segments hold those of train mode.
        """
        if self.plan.segments.trunk.eval_differs and not self.trunk.training:
            raise InputError(
                f"{self.plan.segments.trunk.name} computes other operations in eval mode than its segments do.",
                help="local(x) gives its logits; local.train() before local.scores(x)",
            )
        with torch.no_grad():
            return self.scores_from(dict(enumerate(self.features(x))), self.plan.losses)

    def scores_from(self, features: Mapping[int, tuple[Tensor, ...]], losses: Sequence[LocalLoss]) -> dict[str, Tensor]:
        """Return the scores (N, Z) of some losses, see :meth:`scores`, from the features that their heads read.

        Args:
            features: the tensors (N, ...) that heads read after a segment, by the index of the segment.
            losses: some of ``plan.losses``.
        """
        found: dict[str, Tensor] = {}
        for loss in losses:
            if loss.part is not None and loss.part[0] > 0:
                continue
            for term in (term for term in loss.terms if term.scores and not term.labels):
                values = features[loss.route.stop if term.at is None else term.at]
                shared = [self.heads[use.block]() for use in term.uses]
                name = loss.name if term is loss.scored else f"{loss.name}.{term.head}"
                found[name] = values[0] if term.head is None else self.heads[term.head](*values, *shared)
        return found

    def features(self, x: Inputs) -> list[tuple[Tensor, ...]]:
        """Return what heads read after each segment, on the images (N, C, H, W), in the current mode.

        Args:
            x: images (N, C, H, W); for a model of several inputs a tuple or dict of them, as in :meth:`step`.

        Returns:
            For each segment, the tensors that its heads read.
        """
        found: list[tuple[Tensor, ...]] = []
        values = tensors_of(self.plan.segments.trunk.arguments, x)
        for segment in self.plan.segments.segments:
            features, values = self.run_segment(segment, values)
            found.append(features)
        return found

    def run_segment(
        self, segment: Segment, values: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Run a segment, and return the tensors (N, ...) that heads read after it, and those that enter the next one.

        Args:
            segment: one of ``plan.segments.segments``.
            values: the tensors (N, ...) at the cut before it; for the first segment, the inputs of the model.
        """
        roots = (self.trunk, self.heads) if self.plan.feedback else (self.trunk,)
        result = self.functions_of_text[segment.name](*roots, *values)
        results = result if isinstance(result, tuple) else (result,)
        returned = results[: len(results) - len(segment.sides)]
        names = zip(returned, segment.outputs, strict=False)
        entering = tuple(value.clone() if name in segment.cloned else value for value, name in names)
        return returned[: len(returned) - len(segment.handed_on)], entering

    def graph_module(self) -> fx.GraphModule:
        """Return the forward of a whole step as an fx graph: cuts as ``detach`` nodes, heads called.

        It takes the inputs and the labels, shares all parameters, and returns the losses by name, with their history,
        and the logits (N, Z). All losses are computed at the same weights: where a step updates after each segment,
        the losses of its text differ from the second on. :func:`localize.audit` compares it with the text.
        """
        return step_graph(self, self.plan)

    def export(self) -> nn.Module:
        """Return the user's own model: original class, original keys, trained weights."""
        return self.trunk

    def with_source(self, source: str, filename: str = "") -> LocalModel:
        """Return a local model over the same modules that runs another text: from its first step on, not before.

        Args:
            source: Python, such as ``local.source`` with your changes.
            filename: where the text is read from, for tracebacks; without it the text has no file.
        """
        return LocalModel(self.trunk, self.heads, self.plan, self.program, source, filename)

    def with_functions(self, around: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> LocalModel:
        """Return a local model over the same modules that calls ``around(name, function)`` for what trains.

        That is each of ``step_0``, ``step_1``, ..., or ``train_step`` itself where all backwards are in it. Where parts
        are swept, it is the word that sweeps them, ``exact_parts``.
        """
        made = LocalModel(self.trunk, self.heads, self.plan, self.program, self.source, self.filename)
        made.training = self.training
        made._functions = load(self.source, self.filename, around)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_functions", "_updated")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # as PyTorch declares it
        self._functions, self._updated = None, None

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalModel:
        computed = (value for module in self.modules() for value in vars(module).values() if isinstance(value, Tensor))
        # A weight that a hook computes (pruning, the old spectral norm) is not copied by torch; it is computed again.
        memo.update({id(value): value.detach().clone() for value in computed if not value.is_leaf})
        trunk, heads = copy.deepcopy(self.trunk, memo), copy.deepcopy(self.heads, memo)
        copied = LocalModel(trunk, heads, self.plan, self.program, self.source, self.filename)
        copied.training = self.training
        return copied


def fresh_casts(device_type: str) -> AbstractContextManager[Any]:
    """Under autocast, cast weights whenever they are used: what autocast has kept is stale once they are updated."""
    dtype = autocast_dtype(device_type)
    return nullcontext() if dtype is None else torch.autocast(device_type, dtype, cache_enabled=False)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the type that autocast casts to on a kind of device; None: it is off, or not to be had."""
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


def load(
    source: str, filename: str, around: Callable[[str, Callable[..., Any]], Callable[..., Any]] | None = None
) -> dict[str, Callable[..., Any]]:
    """Execute the text and return its functions by name. The text is what runs: nothing is rewritten.

    With ``around``, what it makes of the name and the function stands for every function that trains: ``step_0``,
    ``step_1``, ..., or ``train_step`` itself where all backwards are in it; or for ``exact_parts``.
    """
    namespace: dict[str, Any] = {"__name__": "localize.generated", "__file__": filename}
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(_compiled(source, filename), namespace)
    if around is not None:
        for name in [name for name in namespace if re.fullmatch(r"step_\d+|exact_parts", name)] or ["train_step"]:
            namespace[name] = around(name, namespace[name])
    return {name: value for name, value in namespace.items() if callable(value) and not name.startswith("__")}


@lru_cache(maxsize=4)
def _compiled(source: str, filename: str) -> CodeType:
    """Compile a text once for all copies of a model."""
    return compile(source, filename, "exec")
