"""The common law: what holds for every method, on every network to which it applies.

Each function takes a local model and raises AssertionError with a sentence where its law is broken.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize import auditor, recipes
from localize.auditor.differences import has_replaced_backward
from localize.auditor.reference import Reference
from localize.errors import AuditError
from localize.runtime.model import LocalModel

Batch = tuple[Tensor, Tensor]
"""Images (N, C, H, W) and class ids (N,)."""


def passes_the_audit(local: LocalModel, batch: Batch) -> None:
    """Every check of the audit holds, on the text and by running it."""
    report = auditor.audit(local, batch)
    assert report.ok, str(report)


def lowers_each_loss(local: LocalModel, batch: Batch) -> None:
    """A small step on what a loss reaches, against its gradient, lowers that loss, while all else stays.

    Losses whose backward the plan replaces (feedback alignment) are left out: they have another direction.
    """
    local = without_dropout(copy.deepcopy(local)).double()
    x, y = batch
    parameters = dict(local.named_parameters())
    reference = Reference(local.plan, local.trunk, local.heads, x.device)
    lowered = 0
    for here in reference.run((x.double(),), y):
        loss = here.loss
        if any(has_replaced_backward(local.plan, loss, local.plan.block(name)) for name in loss.reach):
            continue
        own = [parameters[name] for name in local.plan.reach(loss)]
        gradients = torch.autograd.grad(here.value, own, retain_graph=local.plan.waits)
        here = here.without_history()
        shared = {use.block for term in loss.terms for use in term.uses}
        slope = sum(gradient.square().sum() for gradient in gradients)
        step = 1e-5 * max(1.0, abs(float(here.value))) / slope
        with torch.no_grad():
            fixed = {name: local.heads.get_submodule(name)().clone() for name in shared}
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.sub_(step * gradient)
            now = torch.get_rng_state()
            here.before.restore()
            features = reference.segments(loss, here.entering)
            here.between.restore()
            value = reference.terms(here, features, fixed)[0]
            torch.set_rng_state(now)
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.add_(step * gradient)
        assert value < here.value or slope < 1e-20, (
            f"a small step against the gradient of {loss.name} does not lower it: {float(here.value):.6g} became "
            f"{float(value):.6g}"
        )
        lowered += 1
    replaced = local.plan.feedback or any(block.feedback for block in local.plan.blocks)
    assert lowered or replaced, "no loss has a gradient of its own"


def learns_a_batch(local: LocalModel, batch: Batch, *, lr: float = 0.02, steps: int = 30) -> None:
    """Steps of SGD on one batch lower the sum of the losses."""
    local = without_dropout(copy.deepcopy(local))
    x, y = batch
    optimizer = torch.optim.SGD(local.param_groups(lr=lr), lr=lr)
    first = last = sum(float(value) for value in local.step(x, y, optimizer).losses.values())
    for _ in range(steps):
        last = sum(float(value) for value in local.step(x, y, optimizer).losses.values())
    assert last < first, f"{steps} steps of SGD (lr {lr:g}) on one batch took the losses from {first:.6g} to {last:.6g}"


def teaches_the_labels(local: LocalModel, batch: Batch, *, lr: float = 0.02, steps: int = 30) -> None:
    """Steps of SGD on one batch move the class scores that a loss trains, and not away from the labels.

    Their cross-entropy may rise by a quarter: what enters a segment changes with the segments before it. Losses on
    parts of the batch are left out.
    """
    local = without_dropout(copy.deepcopy(local)).train()
    x, y = batch
    optimizer = torch.optim.SGD(local.param_groups(lr=lr), lr=lr)
    first = last = local.step(x, y, optimizer).scores
    for _ in range(steps):
        last = local.step(x, y, optimizer).scores
    trained = {one.name for one in local.plan.losses if one.scored and one.scored.weight and not one.part}
    for name in (name for name in first if name in trained):
        earlier, later = first[name], last[name]
        if earlier is None or later is None:
            continue
        before, after = (float(F.cross_entropy(scores, y)) for scores in (earlier, later))
        assert after < 1.25 * before and after != before, (
            f"{steps} steps of SGD (lr {lr:g}) on one batch took the cross-entropy of the scores of {name} from "
            f"{before:.6g} to {after:.6g}"
        )


def gives_the_model_back(local: LocalModel, batch: Batch, fresh: nn.Module) -> None:
    """After a step the trained model loads into a fresh one, key by key, and answers the same."""
    local = copy.deepcopy(local)
    x, y = batch
    local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1))
    exported = local.export()
    fresh.load_state_dict(exported.state_dict(), strict=True)
    assert type(exported) is type(fresh), f"the exported model is {type(exported).__name__}"
    assert torch.equal(fresh.eval()(x), local.eval()(x)), "the exported weights answer otherwise in a fresh model"


def trains_as_its_copy(local: LocalModel, batch: Batch) -> None:
    """A deep copy takes the same step, bit for bit, and shares no parameter."""
    twins = copy.deepcopy(local), copy.deepcopy(local)
    different = _after_a_step(*twins, batch)
    assert not different, f"a copy that takes the same step differs in {', '.join(different[:3])}"
    shared = {p.data_ptr() for p in twins[0].parameters()} & {p.data_ptr() for p in twins[1].parameters()}
    assert not shared, "a deep copy shares parameters with the original"


def converts_to_the_same_step(convert: Callable[[], LocalModel], batch: Batch) -> None:
    """The same model and options give the same text, the same plan, and a step to the same weights, bit for bit."""
    first, second = convert(), convert()
    assert first.source == second.source, "two conversions of the same model give two texts"
    assert first.plan.options == second.plan.options, "two conversions of the same model have other options"
    different = _after_a_step(first, second, batch)
    assert not different, (
        f"two conversions of the same model from one seed train {', '.join(different[:3])} differently"
    )


def _after_a_step(first: LocalModel, second: LocalModel, batch: Batch) -> list[str]:
    """Let two local models take the same step; return the names of what differs then."""
    for one in (first, second):
        torch.manual_seed(0)
        one.step(*batch, torch.optim.SGD(one.param_groups(lr=0.1), lr=0.1))
    mine, theirs = (one.state_dict() for one in (first, second))
    return [name for name, value in mine.items() if not torch.equal(value, theirs[name])]


def leaves_the_model_alone(convert: Callable[[nn.Module], LocalModel], model: nn.Module) -> None:
    """A conversion writes neither into the model's parameters and buffers nor over its forward."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    convert(model)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert not changed, f"the conversion has written into {', '.join(changed[:3])} of the model"


def comes_back_from_its_recipe(recipe: recipes.Recipe) -> None:
    """What a recipe file says of a method and its options makes the same method again."""
    again = recipes.parse(recipes.dump(recipe), "recipe.yaml")
    assert recipes.resolve(again) == recipes.resolve(recipe), "a recipe file does not give the same options back"


def without_dropout(local: LocalModel) -> LocalModel:
    """Switch dropout off in a local model, and return it."""
    for part in local.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return local


def audit_error(name: str, broken: list[str], laws: int) -> AuditError:
    """Return the error about laws that a method breaks."""
    return AuditError(
        f"{name} breaks {len(broken)} of {laws} laws.",
        facts=broken,
        help="docs/extending.md says what each law asks for",
    )
