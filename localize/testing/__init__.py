"""Try a method of your own by the law that the packaged methods obey."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import nn

from localize import methods, recipes
from localize.compiler import transform
from localize.errors import LocalizeError, MethodError, PlanError
from localize.runtime.model import LocalModel
from localize.testing import laws
from localize.testing.nets import CLASSES, IMAGE, NETS

__all__ = ["NETS", "check_method"]


def check_method(
    method: methods.Method | type | str, *, nets: Mapping[str, Callable[[], nn.Module]] = NETS, lr: float = 0.02
) -> tuple[str, ...]:
    """Hold a method to the common law, on small networks whose cuts are maps, vectors and tokens.

    - It comes back from a recipe with the same options.
    - Converting leaves the model as it was, and gives the same text and the same step twice.
    - The audit holds: on the text, by autograd, and against central differences.
    - A small step on what a loss reaches lowers that loss.
    - SGD on one batch lowers the losses, and the cross-entropy of all class scores.
    - The trained model loads into a fresh one, and a deep copy trains bit for bit as the original does.

    ::

        def test_the_common_law():
            localize.testing.check_method(Prototypes(scale=5.0))

    Args:
        method: an object or a class of the :class:`localize.methods.Method` protocol, or what
            :func:`localize.methods.get` finds one by.
        nets: makes the networks, by name; each takes images of 3x8x8 and answers with scores of 5 classes.
        lr: learning rate of SGD on one batch; a method whose losses are sums over the batch needs less.

    Returns:
        The names of the networks to which the method applies: it may refuse one by a MethodError.

    Raises:
        AuditError: the method breaks the law; the message has a line for each law and network.
        MethodError: it applies to none of the networks.
        LocalizeError: it is not a method, or its options are wrong.
    """
    recipe = recipes.load(method)
    broken = [*_told("", [partial(laws.comes_back_from_its_recipe, recipe)])]
    applies, refused, count = [], [], 1
    cause: Exception | None = None
    state = torch.get_rng_state()
    try:
        for name, net in nets.items():
            torch.manual_seed(0)
            try:
                local = _convert(net(), recipe).train()
            except Exception as error:
                if isinstance(error, MethodError) and not isinstance(error, PlanError):
                    refused.append(f"{name}: {error.problem}")
                    continue
                broken.append(f"{name}: it does not convert: {_problem(error)}")
                applies.append(name)
                count += 1
                cause = cause or error
                continue
            applies.append(name)
            tried = _laws(local, net, recipe, lr)
            count += len(tried)
            broken += _told(f"{name}: ", tried)
    finally:
        torch.set_rng_state(state)
    if broken:
        raise laws.audit_error(recipe.method, broken, count) from cause
    if not applies:
        raise MethodError(f"{recipe.method} applies to none of {', '.join(nets)}.", facts=refused, help="nets={...}")
    return tuple(applies)


def _laws(
    local: LocalModel, net: Callable[[], nn.Module], recipe: recipes.Recipe, lr: float
) -> tuple[Callable[[], None], ...]:
    """Return the laws of a local model, as functions to be called one after the other."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(6, *IMAGE, generator=generator), torch.arange(6) % CLASSES

    def seeded() -> LocalModel:
        torch.manual_seed(0)
        return _convert(net(), recipe)

    return (
        partial(laws.leaves_the_model_alone, lambda model: _convert(model, recipe), net()),
        partial(laws.converts_to_the_same_step, seeded, batch),
        partial(laws.passes_the_audit, local, batch),
        partial(laws.lowers_each_loss, local, batch),
        partial(laws.learns_a_batch, local, batch, lr=lr),
        partial(laws.teaches_the_labels, local, batch, lr=lr),
        partial(laws.gives_the_model_back, local, batch, net()),
        partial(laws.trains_as_its_copy, local, batch),
    )


def _told(prefix: str, tried: Iterable[Callable[[], None]]) -> Iterator[str]:
    """Try laws; yield a line for each that is broken, also by an exception of the method's own."""
    for law in tried:
        try:
            law()
        except AssertionError as error:
            yield f"{prefix}{' '.join(str(error).split())}"
        except Exception as error:
            yield f"{prefix}{_problem(error)}"


def _problem(error: Exception) -> str:
    """Return what an exception says, in a line."""
    if isinstance(error, LocalizeError):
        return f"{error.problem} {' '.join(error.facts)}".rstrip()
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _convert(model: nn.Module, recipe: recipes.Recipe) -> LocalModel:
    return transform(model, recipe, example_input=torch.empty(2, *IMAGE))
