"""Models of several inputs: called as recorded, inputs handed on behind cuts, and batches of another form refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localize
from localize import folder
from localize.cutting.cuts import candidates
from localize.errors import InputError, MethodError, OptionError, TraceError
from localize.graph.trace import trace
from tests.nets import ResNet, TwoInputs

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(4, 3, 8, 8, generator=GENERATOR), torch.tensor([0, 1, 2, 3])
FACTS, KNOWN = torch.randn(4, 6, generator=GENERATOR), torch.randint(2, (4, 6), generator=GENERATOR)
SEVERAL = (X, FACTS, KNOWN)
NAMED = {"image": X, "facts": FACTS, "known": KNOWN, "scale": 2.0}
IDS = torch.randint(9, (4, 7), generator=GENERATOR)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])


class Text(nn.Module):
    """Reads token ids; positions that the mask leaves out change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.layers, self.fc = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.embedding(input_ids)
        for layer in self.layers:
            h = h + layer(h).relu()
        if attention_mask is None:
            return self.fc(h.mean(1))
        weights = attention_mask[:, :, None].to(h.dtype)
        return self.fc((h * weights).sum(1) / weights.sum(1))


TOKENS = {"input_ids": IDS, "attention_mask": MASK}


def made(model: nn.Module, method: str, example: Any, **options: Any) -> localize.LocalModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return localize.transform(model.train(), method, example_input=example, **options)


def sgd(local: localize.LocalModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(local.param_groups(lr=0.1))


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("batch", [SEVERAL, list(SEVERAL), NAMED], ids=["tuple", "list", "dict"])
def test_one_segment_trains_bit_for_bit_as_a_plain_loop(batch: Any) -> None:
    model = TwoInputs()
    plain = copy.deepcopy(model)
    local = made(model, "backprop", batch)

    result = local.step(batch, Y, sgd(local))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    logits = plain(**batch) if isinstance(batch, dict) else plain(*batch)
    F.cross_entropy(logits, Y).backward()
    optimizer.step()

    assert torch.equal(result.logits, logits)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


AUDITED = [
    ("backprop", {}), ("accumulate", {"parts": 2}), ("checkpoint", {}), ("dcl", {}), ("auglocal", {"d": 2}),
    ("predsim", {}), ("mlaan", {"window": 2}), ("dfa", {}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), AUDITED)
def test_the_whole_audit_holds_for_an_image_with_facts(method: str, options: dict[str, Any]) -> None:
    localize.audit(made(TwoInputs(), method, SEVERAL, **options), (SEVERAL, Y)).raise_if_failed()


@pytest.mark.parametrize(("method", "options"), [("backprop", {}), ("dcl", {}), ("auglocal", {"d": 2}), ("dfa", {})])
def test_the_whole_audit_holds_for_token_ids_with_a_mask(method: str, options: dict[str, Any]) -> None:
    local = made(Text(), method, TOKENS, **options)

    localize.audit(local, (TOKENS, Y)).raise_if_failed()


def test_the_whole_audit_holds_for_token_ids_alone() -> None:
    localize.audit(made(Text(), "dcl", IDS), (IDS, Y)).raise_if_failed()


# ----------------------------------------------------------------------------------------------------------- the text


def test_the_step_takes_the_inputs_by_the_names_of_the_forward() -> None:
    source = made(TwoInputs(), "dcl", SEVERAL).source

    assert "def train_step(trunk, heads, image, facts, known, y, optimizer):" in source
    assert "def segment_0(trunk, image, facts, known):" in source
    assert "input: image 3x8x8, facts 6, known 6, 5 classes" in source


def test_a_constant_is_recorded_and_said() -> None:
    local = made(TwoInputs(), "backprop", NAMED)

    assert "input: image 3x8x8, facts 6, known 6, scale=2.0, 5 classes" in local.source
    assert " * 2.0" in local.source
    plan = folder.describe(local)
    assert [(one["name"], one["shape"]) for one in plan["inputs"]] == [
        ("image", [3, 8, 8]),
        ("facts", [6]),
        ("known", [6]),
    ]
    assert plan["constants"] == {"scale": "2.0"}
    left_out = {name: value for name, value in NAMED.items() if name != "scale"}
    local.step(left_out, Y, sgd(local))
    with pytest.raises(InputError, match=r"(?s)input 'scale' is 3.0.*constant of this training step: 2.0"):
        local.step(NAMED | {"scale": 3.0}, Y, sgd(local))


class Renamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, y: Tensor, labels: Tensor, x_1: Tensor, input: Tensor) -> Tensor:
        return self.fc(y + labels + x_1 + input)


def test_names_that_the_text_needs_itself_get_an_underscore() -> None:
    batch = tuple(torch.randn(4, 4) for _ in range(4))
    local = made(Renamed(), "backprop", batch)

    assert "def train_step(trunk, heads, y_, labels_, x_1_, input_, y, optimizer):" in local.source
    localize.audit(local, (batch, Y % 2)).raise_if_failed()


def test_a_single_input_by_position_is_called_x() -> None:
    alone, tupled = (made(ResNet(), "dcl", example).source for example in (X, (X,)))

    assert alone == tupled
    assert "def train_step(trunk, heads, x, y, optimizer):" in alone


# ------------------------------------------------------------------------------------------------------ behind the cuts


def test_inputs_that_are_needed_behind_a_cut_cross_it_and_no_head_reads_them() -> None:
    local = made(TwoInputs(), "dcl", SEVERAL)
    first, last = local.plan.segments.segments[0], local.plan.segments.segments[-1]

    assert first.outputs[1:] == first.handed_on == ("facts", "gt")
    assert [features.kind for features in first.features] == ["map"]
    assert not last.handed_on
    assert "scores_0 = heads.head_0(h_0_0, heads.dictionary())" in local.source
    assert [len(values) for values in local.features(SEVERAL)] == [1] * len(local.plan.segments)
    assert list(local.scores(SEVERAL)) == [loss.name for loss in local.plan.losses]


def test_images_are_not_handed_on() -> None:
    class Rereads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 5, 3, 1, 1)

        def forward(self, image: Tensor, facts: Tensor) -> Tensor:
            return self.second(self.first(image).relu() + image).mean((2, 3)) + facts.mean()

    assert [cut.values for cut in candidates(trace(Rereads(), (X, FACTS)))] == [("add", "facts")]


class Gated(nn.Module):
    """Every layer reads the second input."""

    def __init__(self) -> None:
        super().__init__()
        self.convs, self.fc = nn.ModuleList([nn.Conv2d(3, 3, 3, 1, 1) for _ in range(4)]), nn.Linear(3, 5)

    def forward(self, image: Tensor, gate: Tensor) -> Tensor:
        for conv in self.convs:
            image = conv(image).relu() * gate[:, :, None, None]
        return self.fc(image.mean((2, 3)))


def test_layers_that_read_an_input_are_not_built_again() -> None:
    batch = X, torch.rand(4, 3)
    with pytest.raises(MethodError, match="reads an input of the model besides what leaves the layer before it"):
        made(Gated(), "auglocal", batch, d=2)

    localize.audit(made(Gated(), "dcl", batch), (batch, Y)).raise_if_failed()


def test_a_method_that_makes_what_enters_takes_images_alone() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.ReLU()) for _ in range(3)))
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.fc(self.layers(x)) + shift

    with pytest.raises(MethodError, match=r"(?s)ff makes what enters the first segment.*takes x, shift"):
        made(Normed(), "ff", (FACTS, torch.randn(4, 5)))


# ------------------------------------------------------------------------------------------------------- wrong batches


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, r"(?s)the batch is a Tensor.*takes a tuple of 3: image, facts, known"),
        ((X, FACTS), "the batch is a tuple of 2"),
        ((X, FACTS[:, :5], KNOWN), r"(?s)input 'facts' of the batch is of shape \(5,\).*generated for \(6,\)"),
        ((X, FACTS, KNOWN.float()), r"(?s)input 'known' .* torch.float32.*known = known.to\(torch.int64\)"),
        ((X.byte(), FACTS, KNOWN), "input 'image' of the batch is of type torch.uint8"),
        ((X, FACTS[:3], KNOWN), "input 'facts' has 3 rows, and 'image' has 4"),
        ((X, None, KNOWN), "input 'facts' is a NoneType, and no tensor"),
    ],
)
def test_a_batch_of_another_form_is_refused_by_step_and_audit(batch: Any, message: str) -> None:
    local = made(TwoInputs(), "backprop", SEVERAL)

    with pytest.raises(InputError, match=message):
        local.step(batch, Y, sgd(local))
    with pytest.raises(InputError, match=message):
        localize.audit(local, (batch, Y))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (SEVERAL, r"(?s)the batch is a tuple.*takes a dict of image, facts, known, scale"),
        ({"image": X, "facts": FACTS}, "the batch has no 'known'"),
        (NAMED | {"mask": KNOWN}, "the batch has 'mask'"),
        (NAMED | {"scale": X}, "input 'scale' is a Tensor"),
    ],
)
def test_and_so_is_a_dict(batch: Any, message: str) -> None:
    local = made(TwoInputs(), "backprop", NAMED)

    with pytest.raises(InputError, match=message):
        local.step(batch, Y, sgd(local))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X[:, :, :4], Y), r"(?s)the batch has images of shape \(3, 4, 8\).*resize the images"),
        ((X.long(), Y), "the batch has images of type torch.int64"),
        ((X[0, 0, 0, 0], Y), r"images of shape \(\)"),
        (([1.0], Y), "the batch is a list of 1|the batch is a float"),
        ((X, Y[:3]), "4 images and 3 labels"),
        ((X, Y.float()), r"the labels are torch.float32 of shape \(4,\)"),
        ((X, [0, 1, 2, 3]), "the labels are list"),
        ((X, Y + 3), r"(?s)label 6 is not a class id.*ids 0 to 4; labels of the batch go from 3 to 6"),
        (X, "a batch to audit on is a pair"),
    ],
)
def test_the_audit_refuses_a_wrong_batch_in_words(batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        localize.audit(made(ResNet(), "backprop", X), batch)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((X, FACTS[:3], KNOWN), r"(?s)input 'facts' has 3 rows, and 'image' has 4.*first dimension of every tensor"),
        ((X, torch.tensor(1.0), KNOWN), "input 'facts' has no dimension"),
        ((None, 1), "example_input holds no tensor"),
        ((X, [FACTS, FACTS]), "input 'facts' is a list of tensors"),
        ("images", "example_input cannot be str|holds no tensor"),
        (3, "example_input cannot be int"),
    ],
)
def test_an_example_that_is_no_batch_is_refused(example: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        localize.transform(TwoInputs(), "backprop", example_input=example)


def test_integers_that_the_model_does_not_take_are_refused_with_what_to_do() -> None:
    with pytest.raises(
        TraceError, match=r"(?s)fails on an input of shape \(N, 3, 8, 8\).*x is torch.uint8: x.float\(\)"
    ):
        trace(ResNet(), X.byte())
