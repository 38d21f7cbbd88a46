"""Every word of a plan is lowered to text that the whole audit accepts, and no change of that text passes it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import localize
from localize.codegen.emit import emit
from tests import daily, nets
from tests.auditor.audit_mutants import mutants
from tests.vocabulary import WORDS, build

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, 0])
PARTS = 5
"""Parts of the changes of a text; each holds every fifth."""
COPYING = ("pulled", "pulled_before")
ONE_VALUE = ("errors", "streams", "targets")


def nets_for(word: str) -> list[str]:
    """Return the nets that the small plan of a word is written for."""
    if word in COPYING:
        return ["Writes"]
    if word.startswith("sides") or word == "labels_focal":
        return ["Auxiliary"]
    if "exact" in word:
        return ["Auxiliary", "Dense", "ResNet"]
    if word.startswith(("scaled", "labels")):
        return ["MLP"]
    if word == "feedback":
        return ["ResNet", "TwoStreams", "MLP"]
    return [name for name in nets.ALL if not (name == "TwoStreams" and word in ONE_VALUE)]


SEVERAL_INPUTS = [
    (word, "TwoInputs") for word in ("windows", "recomputed", "parts", "micro_batches", "errors", "frozen")
]
PAIRS = [*((word, net) for word in WORDS for net in nets_for(word)), *SEVERAL_INPUTS]
MUTATED = [*((word, nets_for(word)[-1]) for word in WORDS), *SEVERAL_INPUTS[:3]]


def batch(net: str) -> tuple[Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    facts = torch.randn(6, 6, generator=generator)
    return ((X, facts, torch.randint(2, (6, 6), generator=generator)) if net == "TwoInputs" else X), Y


def made(word: str, net: str) -> localize.LocalModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(getattr(nets, net)().train(), word)


@pytest.mark.parametrize(("word", "net"), PAIRS)
def test_it_passes_the_whole_audit(word: str, net: str) -> None:
    localize.audit(made(word, net), batch(net)).raise_if_failed()


@pytest.mark.parametrize("part", daily.parts(PARTS))
@pytest.mark.parametrize(("word", "net"), MUTATED)
def test_no_change_of_one_statement_passes_the_audit(word: str, net: str, part: int) -> None:
    local = made(word, net)
    texts = {local.source: ""}
    for told, program in mutants(local.program, segments=False):
        texts.setdefault(emit(program), told)
    changes = list(texts.items())[1:]

    survivors = []
    for source, told in changes[part::PARTS]:
        mutant = local.with_source(source)
        if localize.audit(mutant).ok and localize.audit(mutant, batch(net)).ok:
            survivors.append(told)

    if net == "TwoInputs":  # an input that a segment hands on is the input itself: either name reads the same
        survivors = [told for told in survivors if not told.endswith((" = facts", " = facts.detach()"))]
    assert len(changes) > 20
    assert not survivors, "\n".join(survivors)


def test_recomputing_leaves_the_same_model_bit_for_bit() -> None:
    model = nets.ALL["ViT"]().train()
    twin = copy.deepcopy(model)
    local, whole = build(model, "recomputed"), localize.transform(twin, "backprop", example_input=X)

    for one in (local, whole):
        torch.manual_seed(3)
        one.step(X, Y, torch.optim.SGD(one.param_groups(lr=0.1)))

    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_recomputing_moves_the_statistics_of_batchnorm_once() -> None:
    model = nets.ALL["ResNet"]().train()
    twin = copy.deepcopy(model)

    build(model, "recomputed").step(X, Y, torch.optim.SGD(model.parameters(), lr=0.1))
    localize.transform(twin, "backprop", example_input=X).step(X, Y, torch.optim.SGD(twin.parameters(), lr=0.1))

    for (name, mine), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_parts_of_any_size_add_up_to_the_mean_over_the_batch() -> None:
    model = nets.ALL["MLP"]().train()
    twin = copy.deepcopy(model)
    local = build(model, "parts")

    result = local.step(X[:5], Y[:5], torch.optim.SGD(local.param_groups(lr=0.1)))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    (0.5 * nn.functional.cross_entropy(twin(X[:5]), Y[:5])).backward()
    optimizer.step()

    assert result.logits.shape == (5, 5)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_batch_of_fewer_images_than_parts_is_refused() -> None:
    local = made("parts", "MLP")

    with pytest.raises(localize.errors.InputError, match="1 images, and is taken in 2 parts"):
        local.step(X[:1], Y[:1], torch.optim.SGD(local.param_groups(lr=0.1)))


def test_a_copy_starts_as_what_it_copies_and_is_pulled_after_the_update() -> None:
    local = made("pulled", "Writes")
    source, copied = local.trunk.convs[2], local.heads.head_0.copied
    assert torch.equal(source.weight, copied.weight)
    before = copied.weight.detach().clone()

    local.step(X, Y, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1))

    moved = before - 0.1 * copied.weight.grad
    torch.testing.assert_close(copied.weight, 0.9 * moved + 0.1 * source.weight)


def test_frozen_segments_are_not_given_to_the_optimizer_and_stay_as_they_are() -> None:
    local = made("frozen", "MLP")
    before = copy.deepcopy(local.trunk.state_dict())
    groups = local.param_groups(lr=0.1, weight_decay=0.5)

    local.step(X, Y, torch.optim.SGD(groups))

    changed = {f"trunk.{k}" for k, value in local.trunk.state_dict().items() if not torch.equal(value, before[k])}
    assert changed == set(local.plan.segments.segments[-1].parameters)
