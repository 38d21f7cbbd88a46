"""Honest nets in the styles that people write convert, train, and move their buffers as they do by themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import localize
from localize.errors import LocalizeError
from localize.runtime.model import LocalModel
from tests.corpus import ALL
from tests.corpus.entry import CLASSES, Entry, images
from tests.daily import in_turn

METHODS = ("auglocal", "dcl")
DAYS = 50
"""Days on which every net has been audited by both methods; all others are slow."""


def _name(value: Entry | str) -> str:
    return value.name if isinstance(value, Entry) else value


CASES = [(entry, METHODS[i % 2]) for i, entry in enumerate(ALL)]
"""Every net with one of two methods in turn."""


def drawn(make: Callable[[], Any]) -> Any:
    """Return what a function makes, always with the same random numbers."""
    torch.manual_seed(0)
    return make()


def called(model: nn.Module, batch: Any) -> Any:
    """Return what a model makes of a batch of one input or several."""
    if isinstance(batch, Tensor):
        return model(batch)
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def labels(batch: int) -> Tensor:
    """Return class ids."""
    return torch.arange(batch) % CLASSES


def converted(entry: Entry, method: str) -> LocalModel:
    """Return the net as a local model, and check what it warns of.

    Conversion audits the text, and raises where that does not hold.
    """
    model, batch = drawn(entry.make).train(), entry.inputs(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        local = localize.transform(model, method, example_input=batch, **entry.options)
    told = [str(warning.message) for warning in caught]
    if entry.warns:
        assert any(entry.warns in text for text in told), told
    else:
        assert not told, told
    return local


def check(entry: Entry, method: str) -> LocalModel | None:
    """Convert a net and train it for three steps; return it, or None if it is refused as expected."""
    refused = entry.refused or entry.refused_by.get(method, "")
    if refused:
        with pytest.raises(LocalizeError, match=refused):
            converted(entry, method)
        return None
    local = converted(entry, method)

    assert len(local.plan.segments.layout.layers) >= entry.layers

    plain, batch, y = drawn(entry.make).train(), entry.inputs(4), labels(4)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0)  # weights stay, statistics move
    for step in range(3):
        torch.manual_seed(step)
        called(plain, batch)
        torch.manual_seed(step)
        local.step(batch, y, optimizer)
    if not entry.draws:  # heads draw from the same generator
        torch.testing.assert_close(dict(local.trunk.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)

    optimizer = torch.optim.SGD(local.param_groups(lr=0.01), lr=0.01)
    for _ in range(3):
        result = local.step(batch, y, optimizer)
    assert all(torch.isfinite(loss) for loss in result.losses.values())
    return local


@pytest.mark.parametrize(("entry", "method"), CASES, ids=_name)
def test_a_net_converts_trains_and_moves_its_buffers_as_by_itself(entry: Entry, method: str) -> None:
    check(entry, method)


@pytest.mark.parametrize(("entry", "method"), in_turn([(e, m) for e in ALL for m in METHODS], DAYS), ids=_name)
def test_the_measured_audit_of_a_net_is_clean(entry: Entry, method: str) -> None:
    local = check(entry, method)
    if local is not None:
        for batch in (2, 4, 7):
            localize.audit(local, (entry.inputs(batch), labels(batch))).raise_if_failed()


ONCE_WRONG = ("written_clipped", "written_foreach", "written_registered", "tokens_first", "scripted_blocks")
ONCE_WRONG += ("nested_parameter_dicts", "names_alike", "used_without_gradient", "old_weight_norm", "counter_in_eval")


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_the_measured_audit_is_clean_where_it_once_was_not(name: str) -> None:
    entry = next(entry for entry in ALL if entry.name == name)
    model = drawn(entry.make).train()
    local = localize.transform(model, "dcl" if "auglocal" in entry.refused_by else "auglocal", example_input=images(2))

    localize.audit(local, (images(2), labels(2))).raise_if_failed()


def test_there_are_at_least_sixty_nets_of_different_names() -> None:
    assert len({entry.name for entry in ALL}) == len(ALL) >= 60
