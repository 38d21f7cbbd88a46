"""The whole path: a model in, a training step as text out, and the step does what the text says."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import traceback
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import localize
from localize import zoo
from localize.errors import CutError, InputError, ModelError, OptionError, UnknownNameError
from localize.ir import CutSpec
from tests import daily
from tests.nets import Recurrent, ResNet, TwoStreams

pytestmark = pytest.mark.lowest

X, Y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


def sgd(local: localize.LocalModel, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(local.param_groups(lr=lr, momentum=0.9, weight_decay=1e-4))


@pytest.mark.parametrize(
    ("cut", "same"), [(3, CutSpec(segments=3)), (1, CutSpec(segments=1)), ("max", CutSpec()), ("sqrt", CutSpec("sqrt"))]
)
def test_a_number_of_segments_may_stand_for_a_cut(cut: Any, same: CutSpec) -> None:
    method = "backprop" if cut == 1 else "dgl"

    local = localize.transform(ResNet(), method, example_input=X, cut=cut)

    assert local.source == localize.transform(ResNet(), method, example_input=X, cut=same).source
    assert not isinstance(cut, int) or len(local.plan.segments) == cut


@pytest.mark.parametrize(
    ("cut", "help"),
    [
        ("4", "cut=4"),
        (2.0, "cut=4"),
        (True, "cut=4"),
        ({"segments": 4}, "cut=4"),
        (torch.tensor([1, 2]), "cut=4"),
        ("layer1", r"CutSpec\(at=\('layer1',\)\)"),
        (["layer1", "layer2"], r"CutSpec\(at=\('layer1', 'layer2'\)\)"),
    ],
)
def test_a_cut_of_another_type_is_refused_with_what_to_type(cut: Any, help: str) -> None:
    with pytest.raises(
        OptionError, match=rf"cut cannot be [^§]*\n  it is a number of segments.*\n  help: .*{help}"
    ) as caught:
        localize.transform(ResNet(), "dgl", example_input=X, cut=cut)

    assert caught.value.option == "cut"


@pytest.mark.parametrize("cut", [0, -2, 99])
def test_a_number_of_segments_that_cannot_be_is_refused(cut: int) -> None:
    with pytest.raises(CutError, match=rf"{cut} segments(.*\n)*  help: "):
        localize.transform(ResNet(), "dgl", example_input=X, cut=cut)


def test_backprop_trains_bit_for_bit_as_a_plain_loop() -> None:
    model = ResNet()
    plain = copy.deepcopy(model)
    local = localize.transform(model, "backprop", example_input=X).train()
    mine, theirs = sgd(local), torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    for _ in range(3):
        result = local.step(X, Y, mine)
        theirs.zero_grad()
        loss = F.cross_entropy(plain(X), Y)
        loss.backward()
        theirs.step()

    assert torch.equal(result.losses["loss_0"], loss.detach())
    for (name, found), (_, expected) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize(
    ("method", "options"), [("dcl", {"dictionary": "layerwise"}), ("auglocal", {"d": 2}), ("infopro", {})]
)
def test_immediate_updates_and_one_update_at_the_end_are_equal_where_nothing_is_shared(
    method: str, options: dict[str, Any]
) -> None:
    results = []
    for update in ("immediate", "end"):
        torch.manual_seed(5)
        local = localize.transform(ResNet(), method, example_input=X, update=update, **options).train()
        assert ("optimizer[0].step()" in local.source) == (update == "immediate")
        optimizer = sgd(local)
        for _ in range(2):
            local.step(X, Y, optimizer)
        results.append(local.state_dict())

    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_under_autocast_no_segment_reads_a_dictionary_from_before_its_last_update() -> None:
    """Autocast keeps the casts of weights; a dictionary that every segment updates would be the one of the start."""
    kept = localize.transform(ResNet(), "dcl", example_input=torch.empty(2, 3, 8, 8)).train()
    fresh = copy.deepcopy(kept)
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    for local, cached in ((kept, True), (fresh, False)):
        optimizer = torch.optim.SGD(local.param_groups(lr=0.5), lr=0.5)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            for _ in range(2):
                local.step(x, y, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_what_runs_is_the_text() -> None:
    local = localize.transform(ResNet(), "auglocal", example_input=X)

    step = inspect.getsource(local.functions_of_text["step_1"])

    assert step in local.source
    assert "loss_1.backward()" in step
    assert re.search(r"return h_1.detach\(\), loss_1.detach\(\), scores_1.detach\(\)", step)


def test_a_traceback_shows_the_line_of_the_text() -> None:
    local = localize.transform(ResNet(), "auglocal", example_input=X)
    local.heads["head_0"].register_forward_hook(lambda module, inputs, scores: scores[:-1])

    with pytest.raises(ValueError, match="batch_size") as caught:
        local.step(X, Y, sgd(local))

    assert "loss_0 = F.cross_entropy(scores_0, y)" in "".join(traceback.format_exception(caught.value))


def test_another_text_runs_over_the_same_modules() -> None:
    local = localize.transform(ResNet(), "auglocal", example_input=X)

    loss = "F.cross_entropy(scores_0, y)"
    doubled = local.with_source(local.source.replace(loss, f"2 * {loss}"))

    torch.manual_seed(0)
    once = local.step(X, Y, sgd(local, lr=0.0)).losses["loss_0"]
    assert torch.equal(doubled.step(X, Y, sgd(local, lr=0.0)).losses["loss_0"], 2 * once)
    with pytest.raises(SyntaxError, match="invalid syntax"):
        _ = local.with_source("def train_step(:").functions_of_text


@pytest.mark.parametrize("method", ["auglocal", "dcl"])
def test_a_pickled_model_goes_on_as_the_original_does(method: str) -> None:
    local = localize.transform(ResNet(), method, example_input=X).train()

    restored = pickle.loads(pickle.dumps(local))

    for one in (local, restored):
        one.step(X, Y, sgd(one))
    assert all(torch.equal(a, b) for a, b in zip(local.parameters(), restored.parameters(), strict=True))
    localize.audit(restored, (X, Y)).raise_if_failed()


def test_cuts_through_several_tensors_detach_each() -> None:
    local = localize.transform(TwoStreams(), "dcl", example_input=X)

    assert "h_0_0, h_0_1 = segment_0(trunk, x)" in local.source
    assert "return h_0_0.detach(), h_0_1.detach(), loss_0.detach(), scores_0.detach()" in local.source


def test_a_user_s_recipe_as_a_dict_is_as_good_as_arguments() -> None:
    recipe = {"method": "auglocal", "options": {"d": 3}, "cut": {"segments": 2}}

    by_recipe = localize.transform(ResNet(), recipe, example_input=X)
    by_arguments = localize.transform(ResNet(), "auglocal", example_input=X, d=3, cut=CutSpec(segments=2))

    assert by_recipe.source == by_arguments.source


def test_recurrent_modules_and_tensors_made_in_the_forward_pass_the_audit() -> None:
    local = localize.transform(Recurrent(), "dcl", example_input=X).train()

    localize.audit(local, (X, Y)).raise_if_failed()


def test_an_optimizer_without_the_heads_is_refused() -> None:
    model = ResNet()
    local = localize.transform(model, "auglocal", example_input=X)

    with pytest.raises(OptionError, match="lacks .* parameters that this step trains(?s:.*)local.param_groups"):
        local.step(X, Y, torch.optim.SGD(model.parameters(), lr=0.1))


def test_parameters_that_thaw_behind_the_step_are_refused() -> None:
    model = ResNet()
    model.conv.requires_grad_(False)
    local = localize.transform(model, "dcl", example_input=X)
    model.conv.requires_grad_(True)

    with pytest.raises(OptionError, match="1 parameters have become trainable"):
        local.step(X, Y, sgd(local))


def test_a_local_model_is_not_transformed_again() -> None:
    with pytest.raises(ModelError, match=r"local.export\(\)"):
        localize.transform(localize.transform(ResNet(), "dcl", example_input=X), "dcl", example_input=X)


def test_frozen_parameters_belong_to_no_loss() -> None:
    model = ResNet()
    model.conv.requires_grad_(False)
    local = localize.transform(model, "auglocal", example_input=X).train()
    before = model.conv.weight.clone()

    localize.audit(local, (X, Y)).raise_if_failed()
    local.step(X, Y, sgd(local))

    assert torch.equal(before, model.conv.weight)
    assert "trunk.conv.weight" not in local.plan.segments.segments[0].parameters


def test_optimizers_with_several_groups_and_schedulers_work_with_immediate_updates() -> None:
    local = localize.transform(ResNet(), "dcl", example_input=X).train()
    optimizer = torch.optim.AdamW(local.param_groups(lr=1e-2))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    local.step(X, Y, optimizer)
    scheduler.step()

    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 5e-3]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(local.parameters()))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.randn(4, 3, 9, 9), Y), r"images of shape \(3, 9, 9\)(?s:.*)generated for \(3, 8, 8\)"),
        ((X, Y[:3]), "4 images and 3 labels"),
        ((X[:0], Y[:0]), "the batch holds no images"),
        ((X.half(), Y), r"'x' of the batch is of type torch.float16(?s:.*)help: x = x.to\(torch.float32\)"),
        ((X.double(), Y), "'x' of the batch is of type torch.float64"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch: tuple, message: str) -> None:
    local = localize.transform(ResNet(), "auglocal", example_input=X)

    with pytest.raises(InputError, match=message):
        local.step(*batch, sgd(local))


def test_images_may_have_the_type_that_the_model_has_now_or_one_that_autocast_casts() -> None:
    local = localize.transform(ResNet(), "auglocal", example_input=X)

    with torch.autocast("cpu"):
        local.step(X.bfloat16(), Y, sgd(local))
        with pytest.raises(InputError, match="type torch.float64"):
            local.step(X.double(), Y, sgd(local))
    assert local.bfloat16().step(X.bfloat16(), Y, sgd(local)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("batch", [(1, 1), (0, 0), (3, 2), (-1, 2)])
def test_a_number_that_none_of_the_batches_of_an_update_has_is_refused(batch: tuple[int, int]) -> None:
    local = localize.transform(ResNet(), "auglocal", example_input=X)

    with pytest.raises(OptionError, match=rf"batch cannot be \({batch[0]}, {batch[1]}\)(?s:.*)help: batch=\(0, 2\)"):
        local.step(X, Y, sgd(local), batch=batch)


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("auglocl", {}, UnknownNameError, "did you mean 'auglocal' or 'dgl-auglocal'"),
        ("auglocal", {"dd": 3}, OptionError, "has no option 'dd'(?s:.*)did you mean 'd'"),
        ("auglocal", {"d": "3"}, OptionError, r"\n  d: depth of .*; it takes whole numbers; default"),
        ("auglocal", {"d": 1}, OptionError, r"\n  d: depth of .*; the lowest value is 2"),
        ("auglocal", {"tail": "cut"}, OptionError, "its values are joint, isolated"),
    ],
)
def test_wrong_words_are_answered_with_the_right_ones(method: str, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        localize.transform(ResNet(), method, example_input=X, **options)


# The models that a first user will try: all three methods convert, pass the static audit, and train a step.
MODELS = [
    ("cifar/resnet32", 32, {}), ("cifar/vgg8b", 32, {}), ("cifar/vit", 32, {}), ("cifar/mixer", 32, {}),
    ("tv/resnet18", 64, {}), ("tv/resnet50", 64, {}), ("tv/vgg11_bn", 64, {}), ("tv/vit_b_16", 32, {"image_size": 32}),
    ("tv/mobilenet_v2", 64, {}), ("tv/efficientnet_b0", 64, {}), ("tv/regnet_x_400mf", 64, {}),
    ("tv/densenet121", 64, {}), ("timm/vit_tiny_patch16_224", 224, {}), ("timm/mixer_s32_224", 224, {}),
    ("timm/convnext_atto", 64, {}), ("timm/swin_tiny_patch4_window7_224", 224, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size", "options", "method"),
    daily.in_turn([(*model, method) for model in MODELS for method in ("backprop", "auglocal", "dcl")], 4),
)
def test_the_models_that_users_try_convert_and_train(name: str, size: int, options: dict, method: str) -> None:
    model = zoo.create_model(name, 10, **options)
    keys = list(model.state_dict())
    x, y = torch.randn(2, 3, size, size), torch.tensor([1, 2])
    local = localize.transform(model, method, example_input=x, name=name).train()

    result = local.step(x, y, torch.optim.SGD(local.param_groups(lr=1e-3), lr=1e-3))

    assert all(torch.isfinite(loss) for loss in result.losses.values())
    assert result.logits.shape == (2, 10)
    assert list(local.export().state_dict()) == keys
    if local.plan.update == "end":
        assert not [name for name, p in local.named_parameters() if p.requires_grad and p.grad is None]
    assert all(isinstance(module, nn.Module) for module in local.heads.values())


def test_a_part_of_a_sequential_is_read_by_the_places_of_its_modules() -> None:
    whole = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    net = nn.Sequential(nn.Flatten(), whole[2:], nn.Linear(6, 3))  # the part's modules are called 2, 3, 4 and 5

    local = localize.transform(net, "dcl", example_input=torch.zeros(2, 6))

    assert "trunk[1][0](" in local.source
    assert localize.audit(local, (torch.randn(4, 6), torch.arange(4) % 3)).ok


class Masked(nn.Module):
    """As torchvision's Swin v2: a part of a copy of a bias is overwritten through a view, in front of each use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.flatten(1)[:, :6]
        for layer in self.layers:
            bias = layer.bias.clone()
            h = h + bias
            bias[2:4].zero_()
            h = F.linear(h.relu(), layer.weight, bias)
        return self.head(h)


def test_what_is_written_into_copies_of_parameters_is_written_in_every_segment() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 4, 4), torch.arange(4)
    local = localize.transform(Masked(), "deep-supervision", example_input=x)

    assert local.source.count(".zero_()") == 3
    localize.audit(local, (x, y)).raise_if_failed()


def test_members_of_a_sliced_sequential_are_called_by_their_places() -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(5)))
    model = nn.Sequential(layers[1:], nn.Flatten(), nn.Linear(3 * 16, 4))
    x, y = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 3])
    local = localize.transform(model, "dcl", example_input=x)

    assert "trunk[0][3][0](" in local.source  # its name is 0.4.0
    localize.audit(local, (x, y)).raise_if_failed()
