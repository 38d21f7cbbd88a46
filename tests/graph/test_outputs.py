"""Models with more than one output: auxiliary scores are trained as the model's own loss says, or the plan says why."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import localize
from localize import folder, zoo
from localize.errors import ModelError, OptionError, RecipeError
from localize.graph.trace import trace
from localize.ir import CutSpec
from tests.nets import Auxiliary

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, 0])


def made(method: str = "auglocal", model: nn.Module | None = None, **options: Any) -> localize.LocalModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return localize.transform((model or Auxiliary()).train(), method, example_input=X, **options)


def reasons(local: localize.LocalModel) -> list[str]:
    return [line for line in local.plan.deviations if "further output" in line]


# ------------------------------------------------------------------------------------------------- the model's own loss


def test_one_segment_trains_bit_for_bit_as_the_hand_written_loss() -> None:
    model = Auxiliary().train()
    plain = copy.deepcopy(model)
    local = localize.transform(model, "backprop", example_input=X)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain))

    for seed in range(2):
        torch.manual_seed(seed)
        result = local.step(X, Y, mine)
        torch.manual_seed(seed)
        theirs.zero_grad()
        out = plain(X)
        loss = F.cross_entropy(out.logits, Y)
        loss = loss + 0.3 * F.cross_entropy(out.aux_logits1, Y) + 0.3 * F.cross_entropy(out.aux_logits2, Y)
        loss.backward()
        theirs.step()

    assert torch.equal(result.losses["loss_0"], loss.detach())
    assert torch.equal(result.logits, out.logits.detach())
    for (name, found), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.slow
def test_googlenet_has_the_gradients_of_a_hand_written_step() -> None:
    model = torchvision.models.googlenet(num_classes=5, init_weights=False).train()
    plain = copy.deepcopy(model)
    x = torch.randn(2, 3, 64, 64)
    local = localize.transform(model, "backprop", example_input=x)

    torch.manual_seed(1)
    local.step(x, Y[:2], torch.optim.SGD(local.param_groups(lr=0.0)))
    torch.manual_seed(1)
    out = plain(x)
    losses = [F.cross_entropy(scores, Y[:2]) for scores in (out.logits, out.aux_logits1, out.aux_logits2)]
    (losses[0] + 0.3 * losses[1] + 0.3 * losses[2]).backward()

    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad), name


# ----------------------------------------------------------------------------------------------------- local learning


def test_an_output_is_trained_by_the_loss_of_the_segment_that_makes_what_it_reads() -> None:
    local = made("dcl")
    trained = {term.side: loss for loss in local.plan.losses for term in loss.terms if term.side}

    assert {name: loss.name for name, loss in trained.items()} == {"aux_logits1": "loss_1", "aux_logits2": "loss_2"}
    own = local.plan.block("side_aux_logits1")
    assert set(own.parameters) == {f"trunk.aux1.{name}" for name, _ in local.trunk.aux1.named_parameters()}
    assert [loss.name for loss in local.plan.losses if own.name in loss.reach] == ["loss_1"]
    assert not local.plan.segments.unused
    assert "h_1, side_aux_logits1 = segment_1(trunk, x)" in local.source


@pytest.mark.parametrize("method", ["auglocal", "dcl", "checkpoint", "accumulate", "deep-supervision"])
def test_the_whole_audit_holds(method: str) -> None:
    localize.audit(made(method, **({"parts": 2} if method == "accumulate" else {})), (X, Y)).raise_if_failed()


def test_an_output_that_is_trained_moves_its_classifier_and_its_segment_only() -> None:
    local = made("dcl")
    before = copy.deepcopy(local.state_dict())
    optimizer = torch.optim.SGD(local.param_groups(lr=0.1))

    local.step(X, Y, optimizer)

    assert not torch.equal(local.trunk.aux1.fc.weight, before["trunk.aux1.fc.weight"])
    assert {id(p) for p in local.trunk.parameters()} <= {id(p) for g in optimizer.param_groups for p in g["params"]}


def test_features_hold_what_crosses_the_cuts_and_no_further_output() -> None:
    local = made("dcl")

    features = local.features(X)

    assert [len(values) for values in features] == [1] * len(local.plan.segments)
    assert features[-1][0].shape == (6, 5)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda text: re.sub(r"return (\w+), (\w+), (\w+)\n", r"return \1, \3, \2\n", text, count=1), "static.plan"),
        (lambda text: re.sub("h_0, (side_.*), (side_.*) =", r"h_0, \2, \1 =", text),
         "static.terms"),
        (lambda text: text.replace("0.3 * F.cross_entropy(side_aux_logits1", "0.4 * F.cross_entropy(side_aux_logits1"),
         "static.terms"),
        (lambda text: text.replace("F.cross_entropy(side_aux_logits1", "F.cross_entropy(h_0"), "static.used"),
        (lambda text: text.replace("(side_aux_logits1, y)", "(side_aux_logits1.detach(), y)"), "static.reach"),
    ],
)  # fmt: skip
def test_the_audit_catches_a_text_that_trains_them_otherwise(change: Callable[[str], str], check: str) -> None:
    local = made("backprop")
    text = change(local.source)
    assert text != local.source

    report = localize.audit(local.with_source(text), (X, Y))

    assert any(check in found.id for found in report.checks if not found.ok)


# ------------------------------------------------------------------------------------------------------------ weights


def test_weights_are_those_of_the_name_and_the_recipe_overrides_them() -> None:
    assert [side.weight for side in trace(Auxiliary(), X).sides] == [0.3, 0.3]
    local = made({"method": "backprop", "outputs": {"aux_logits1": 0.7}})
    assert [term.weight for term in local.plan.losses[0].terms] == [1.0, 0.7, 0.3]

    none = made({"method": "backprop", "outputs": {"aux_logits1": 0.0, "aux_logits2": 0}})

    assert reasons(none)[0] == "The model's further output aux_logits1 is not trained: its weight is 0."
    assert "aux" not in none.source
    assert {name.split(".")[1] for name in none.plan.segments.unused} == {"aux1", "aux2"}
    localize.audit(none, (X, Y)).raise_if_failed()


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"aux_logit1": 0.1}, r"(?s)no further output 'aux_logit1'.*aux_logits1, aux_logits2.*did you mean"),
        ({"aux_logits1": -1.0}, "cannot have the weight -1.0"),
        ({"aux_logits1": float("nan")}, "nan is not a finite number"),
    ],
)
def test_wrong_weights_are_refused(outputs: dict[str, float], message: str) -> None:
    recipe = localize.Recipe("backprop", outputs=outputs)
    with pytest.raises((OptionError, RecipeError), match=message):
        localize.transform(Auxiliary(), recipe, example_input=X)


# --------------------------------------------------------------------------------------------- what cannot be trained


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("dfa", "the losses wait for the error of the logits"),
        ("fa", "the backward of the model's layers is replaced"),
        ("cafo", "no loss trains segment_1, which makes it"),
    ],
)
def test_where_it_does_not_fit_the_plan_says_why(method: str, why: str) -> None:
    local = made(method)

    assert reasons(local)[0] == f"The model's further output aux_logits1 is not trained: {why}."
    assert not any(term.side for loss in local.plan.losses for term in loss.terms)
    localize.audit(local, (X, Y)).raise_if_failed()


class Late(nn.Module):
    """Convolutions, a classifier that draws, and then an auxiliary one of what left the first convolution."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.conv3, self.conv4 = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.drop, self.fc, self.aux_drop, self.aux = nn.Dropout(), nn.Linear(4, 5), nn.Dropout(), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.conv1(x).relu()
        h = first
        if self.kind == "overwritten":
            first = first + 1
            h = self.conv2(2 * first).relu()
            first.view(-1).add_(1)
        else:
            h = self.conv2(h).relu()
        third = self.conv3(h).relu()
        h = self.conv4(third).relu()
        out = self.fc(self.drop(h.mean((2, 3))))
        if self.kind == "both":
            first = first + third
        read = first.mean((2, 3))
        if self.kind == "functional":
            read = F.dropout(read, 0.5, self.training)
        if self.kind == "shared":
            return {"out": out, "aux": self.fc(read)}
        return {"out": out, "aux": self.aux(self.aux_drop(read))}


def test_an_output_behind_the_others_is_computed_in_its_segment() -> None:
    local = made("dcl", Late("module"))

    assert [loss.name for loss in local.plan.losses for term in loss.terms if term.side] == ["loss_0"]
    assert local.plan.losses[0].terms[-1].weight == 0.5
    report = localize.audit(local, (X, Y)).raise_if_failed()
    assert any("also aux" in check.evidence for check in report.checks if check.id == "measured.forward-train")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("functional", "it draws random numbers outside of segment_0"),
        ("overwritten", "it is computed outside of segment_0, where its values are overwritten"),
        ("both", "it reads relu, which does not enter segment_2, as well as values made there"),
        ("shared", "it shares parameter fc.weight with another part of the model"),
    ],
)
def test_and_where_it_would_be_another_value_there_it_is_left_out(kind: str, why: str) -> None:
    local = made("dcl", Late(kind))

    assert reasons(local) == [f"The model's further output aux is not trained: {why}."]


def test_and_with_one_segment_all_of_them_are_trained() -> None:
    for kind in ("functional", "both", "shared", "overwritten"):
        local = made("backprop", Late(kind))
        assert not reasons(local)
        localize.audit(local, (X, Y)).raise_if_failed()


class Pixels(nn.Module):
    """Classifies pixels, from the last layer and from an earlier one, as segmentation models do."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 4, 4, 3, 1, 1) for i in range(3)])
        self.drop, self.fc, self.aux = nn.Dropout(0.1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.convs[0](x).relu()
        out = self.fc(self.drop(self.convs[2](self.convs[1](first).relu()).relu()))
        return {"out": out, "aux": self.aux(first)}


@pytest.mark.parametrize("method", ["backprop", "dcl"])
def test_scores_of_pixels_are_trained_the_same_way(method: str) -> None:
    labels = torch.randint(5, (6, 8, 8), generator=torch.Generator().manual_seed(1))
    labels[:, 0] = 255
    local = made(method, Pixels())

    term = local.plan.losses[0].terms[-1]
    assert (term.side, term.weight, dict(term.options)) == ("aux", 0.5, {"ignore_index": 255})
    localize.audit(local, (X, labels)).raise_if_failed()


# -------------------------------------------------------------------------------------------------------------- names


class Returns(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form = form
        self.body, self.fc, self.other = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        maps = self.body(x).relu()
        h = maps.mean((2, 3))
        return self.form(self.fc(h), self.other(h), maps)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda a, b, h: (a, b), ["output_1"]),
        (lambda a, b, h: [a, h, b], ["output_2"]),
        (lambda a, b, h: (a, [h, b]), ["output_1_1"]),
        (lambda a, b, h: {"maps": h, "second-head": b, "logits": a}, ["second_head"]),
        (lambda a, b, h: {"out": a, "aux": b}, ["aux"]),
        (lambda a, b, h: (a, a, h), []),
    ],
)
def test_outputs_are_called_by_their_fields_or_their_places(form: Callable[..., Any], names: list[str]) -> None:
    model = Returns(form)
    trunk = trace(model, X)

    assert [side.name for side in trunk.sides] == names
    assert [node.target for node in trunk.graph.nodes if node.op == "call_module"] == ["body", "fc"]
    if names:
        localize.audit(made("backprop", model), (X, Y)).raise_if_failed()


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            lambda a, b, h: h,
            r"(?s)Returns returns torch.float32 of shape \(N, 4, 6, 6\), not class scores.*num_classes",
        ),
        (lambda a, b, h: a.mean(), r"shape \(\), not class scores \(N, classes\)"),
        (lambda a, b, h: a.argmax(1), r"torch.int64 of shape \(N\)"),
        (lambda a, b, h: {"logits": None}, "returns dict, which holds no tensor"),
    ],
)
def test_what_is_no_class_scores_is_refused_early(form: Callable[..., Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        trace(Returns(form), X)


def test_a_distilled_transformer_trains_both_of_its_heads() -> None:
    model = zoo.create_model("timm/deit_tiny_distilled_patch16_224", 5, img_size=32, depth=3, drop_rate=0.1)
    model.set_distilled_training(True)
    x = torch.randn(2, 3, 32, 32)
    local = localize.transform(model.train(), "dcl", example_input=x)

    assert local.plan.losses[-1].terms[-1].side == "output_1"
    assert local.plan.losses[-1].terms[-1].weight == 1.0
    localize.audit(local, (x, Y[:2])).raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "method"),
    [
        *(("googlenet", 64, method) for method in ("backprop", "auglocal", "dcl", "checkpoint")),
        ("inception_v3", 299, "dcl"),
    ],
)
def test_the_inceptions_pass_the_whole_audit(name: str, size: int, method: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=5, init_weights=False).train()
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    local = localize.transform(model, method, example_input=x, **({"d": 2} if method == "auglocal" else {}))

    assert not reasons(local)
    localize.audit(local, (x, Y[:3])).raise_if_failed()


# ------------------------------------------------------------------------------------------------------- what is said


def test_plan_card_and_recipe_say_what_is_done_with_them() -> None:
    recipe = localize.Recipe("dcl", outputs={"aux_logits2": 0.0}, cut=CutSpec(2))
    local = localize.transform(Auxiliary(), recipe, example_input=X)

    texts = folder.texts(local, recipe, localize.auditor.static(local))
    plan = folder.describe(local)

    assert plan["outputs"] == [
        {"name": "aux_logits1", "trained_by": ["loss_0"], "weight": 0.3},
        {"name": "aux_logits2", "trained_by": [], "weight": 0.0},
    ]
    assert plan["losses"][0]["terms"][-1]["output"] == "aux_logits1"
    assert "`aux_logits1` (weight 0.3) by loss_0." in texts["README.md"]
    assert "Further outputs that nothing trains (audit.md says why): `aux_logits2`." in texts["README.md"]
    assert "further output aux_logits2 is not trained: its weight is 0." in texts["audit.md"]
    assert folder.resolved(local, recipe).outputs == {"aux_logits1": 0.3, "aux_logits2": 0.0}
