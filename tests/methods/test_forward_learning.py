"""FF, SymBa, PFF and CaFo: their losses and inputs against hand computation, what they train, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localize
from localize import inference, losses
from localize.errors import MethodError
from localize.heads.goodness import Goodness
from localize.heads.lengths import length_of_input
from localize.heads.streams import PatternStreams, PixelStreams
from localize.runtime.model import LocalModel
from localize.zoo.dcl_nets import ConvNet, FCNet
from tests import nets
from tests.golden import det
from tests.plans import plan

GOODNESS = ["ff", "symba", "pff"]
Y = torch.tensor([0, 2, 1])


def close(found: object, expected: object) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0
    )


def net(width: int = 20) -> FCNet:
    """Two hidden layers, with LayerNorm before the second and before the classifier; images (1, 4, 5), 10 classes."""
    return FCNet(width, 10, input_shape=(1, 4, 5))


def still(local: LocalModel) -> torch.optim.Optimizer:
    return torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0)


# ------------------------------------------------------------------------------------------------------------ losses


def test_the_forward_forward_loss_is_the_negative_log_probability_of_hinton_s_eq_1_over_all_2n_images() -> None:
    goodness = torch.tensor([3.0, 0.5, 2.0, 1.0, 4.0, 2.0, 99.0, -99.0, 7.0])  # positive, negative, and not read

    positive = sum(-math.log(1 / (1 + math.exp(-(g - 1.5)))) for g in (3.0, 0.5, 2.0)) / 3
    negative = sum(-math.log(1 - 1 / (1 + math.exp(-(g - 1.5)))) for g in (1.0, 4.0, 2.0)) / 3

    close(losses.forward_forward_mean(goodness.double(), Y, threshold=1.5), (positive + negative) / 2)
    close(losses.forward_forward(goodness.double(), Y, threshold=1.5), positive + negative)


def test_the_gap_loss_compares_each_image_with_itself() -> None:
    goodness = torch.tensor([3.0, 0.5, 2.0, 1.0, 4.0, 2.0, 99.0, -99.0, 7.0])

    expected = sum(math.log(1 + math.exp(-4 * delta)) for delta in (2.0, -3.5, 0.0)) / 3

    close(losses.goodness_gap(goodness.double(), Y), expected)


def test_the_sparsemax_loss_has_the_projection_on_the_simplex_in_its_gradient() -> None:
    scores = torch.tensor([[0.3, 0.1, -2.0], [1.5, 0.2, 0.1], [0.0, 0.0, 0.0]], dtype=torch.float64).requires_grad_()

    losses.sparsemax(scores, Y).backward()

    # Projections by hand: [0.3, 0.1] share what is left of 1; 1.5 takes all; equal scores share equally.
    projected = torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [1 / 3] * 3], dtype=torch.float64)
    close(scores.grad * 3, projected - torch.eye(3, dtype=torch.float64)[Y])


def test_the_sparsemax_loss_is_zero_beyond_a_margin_of_one() -> None:
    scores = torch.tensor([[1.2, 0.1, 0.2], [0.1, 0.0, 1.1], [-3.0, 2.0, 0.5]], dtype=torch.float64)

    assert losses.sparsemax(scores, Y) == pytest.approx(0.0, abs=1e-15)
    assert losses.sparsemax(scores - 5.0 * F.one_hot(Y, 3), Y) > 1.0


def test_squared_errors_are_summed_over_values_and_averaged_over_rows() -> None:
    scores = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 2.0]], dtype=torch.float64)

    close(losses.squared_error(scores, Y), (0.25 + 0 + 5) / 3)
    close(losses.squared_prediction_error(scores, torch.zeros(3, 1, 3, dtype=torch.float64)), (0.25 + 1 + 6) / 3)


@pytest.mark.parametrize(("form", "expected"), [("sum", [14.0, 9.0]), ("mean", [14 / 4, 9 / 4])])
def test_goodness_is_that_of_all_values_at_a_cut(form: str, expected: list[float]) -> None:
    first, second = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[0.0, -3.0], [3.0, 0.0]])

    close(Goodness(form)(first, second), expected)


def test_the_goodness_of_half_precision_activities_does_not_overflow() -> None:
    close(Goodness("sum")(torch.full((1, 4), 1000.0, dtype=torch.float16)), [4e6])


# ----------------------------------------------------------------------------------------------------------- streams


def test_a_label_is_written_into_the_first_pixels_of_every_channel() -> None:
    images = torch.arange(2 * 2 * 2 * 3.0).reshape(2, 2, 2, 3)
    shown = PixelStreams(4).overlay(images, torch.tensor([1, 3]))

    assert shown[0, 0].tolist() == [[0, 11, 0], [0, 4, 5]]
    assert shown[0, 1].tolist() == [[0, 11, 0], [0, 10, 11]]
    assert shown[1, 0].tolist() == [[12, 12, 12], [23, 16, 17]]


def test_a_flat_input_shows_its_label_in_the_first_values() -> None:
    shown = PixelStreams(2).overlay(torch.tensor([[5.0, 6.0, 7.0], [1.0, 0.5, 0.0]]), torch.tensor([0, 1]))

    assert shown.tolist() == [[7, 5, 7], [0, 1, 0]]


def test_a_pattern_is_added() -> None:
    streams = PatternStreams(3, (1, 30, 30), strength=0.5)
    streams.reset_parameters()
    images = torch.randn(2, 1, 30, 30)

    difference = streams.overlay(images, torch.tensor([2, 0])) - images

    torch.testing.assert_close(difference, streams.patterns[[2, 0]])
    torch.testing.assert_close(streams.patterns.std().item(), 0.5, rtol=0.05, atol=0)
    assert not streams.patterns.requires_grad


@pytest.mark.parametrize("make", [lambda: PixelStreams(4), lambda: PatternStreams(4, (1, 3, 3), strength=1.0)])
def test_streams_are_positive_negative_and_neutral(make) -> None:
    streams = make()
    if isinstance(streams, PatternStreams):
        streams.reset_parameters()
    images, labels = torch.rand(600, 1, 3, 3), torch.arange(600) % 4

    positive, negative, neutral = streams(images, labels).chunk(3)

    assert torch.equal(neutral, images)
    assert torch.equal(positive, streams.overlay(images, labels))
    choices = torch.stack([streams.overlay(images, torch.full_like(labels, z)) for z in range(4)])
    matches = (choices == negative).flatten(2).all(2)  # (class, image)
    assert matches.sum(0).eq(1).all()
    wrong = matches.double().argmax(0)
    assert not (wrong == labels).any()
    counts = torch.bincount((wrong - labels) % 4, minlength=4)
    assert counts[1:].min() > 150  # 200 of each are expected


# ---------------------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("form", ["mean", "sum"])
def test_a_step_of_forward_forward_equals_hand_computation(form: str) -> None:
    x, y = det((6, 1, 4, 5), 1), torch.tensor([0, 1, 2, 3, 9, 0])
    local = localize.transform(net().double(), "ff", example_input=x, goodness=form, threshold=1.2).train()

    torch.manual_seed(3)
    result = local.step(x, y, still(local))
    torch.manual_seed(3)
    inputs = local.heads.streams(x, y)
    h1 = F.relu(F.linear(inputs.flatten(1), local.trunk.layer1.fc.weight, local.trunk.layer1.fc.bias))
    h2 = local.trunk.layer2(h1.detach())
    for name, h, layer in (("loss_0", h1, local.trunk.layer1), ("loss_1", h2, local.trunk.layer2)):
        goodness = (h**2).sum(1) if form == "sum" else (h**2).mean(1)
        signs = torch.cat([goodness[:6] - 1.2, 1.2 - goodness[6:12]])
        loss = -torch.sigmoid(signs).log().mean()
        torch.testing.assert_close(result.losses[name], loss.detach(), rtol=1e-10, atol=0)
        expected = torch.autograd.grad(loss, list(layer.parameters()))
        torch.testing.assert_close([p.grad for p in layer.parameters()], list(expected), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("method", GOODNESS)
def test_the_last_segment_is_the_model_s_own_classifier_on_plain_images(method: str) -> None:
    x, y = det((6, 1, 4, 5), 1), torch.tensor([0, 1, 2, 3, 9, 0])
    local = localize.transform(net().double(), method, example_input=x).train()

    result = local.step(x, y, still(local))

    torch.testing.assert_close(result.logits, local(x).detach(), rtol=1e-12, atol=1e-14)
    expected = torch.autograd.grad(F.cross_entropy(local(x), y), list(local.trunk.fc.parameters()))
    torch.testing.assert_close([p.grad for p in local.trunk.fc.parameters()], list(expected), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("label", ["pattern", "pixels"])
def test_a_step_of_symba_equals_hand_computation(label: str) -> None:
    x, y = det((6, 1, 4, 5), 1), torch.tensor([0, 1, 2, 3, 9, 0])
    local = localize.transform(net().double(), "symba", example_input=x, label=label, alpha=3.0).train()

    torch.manual_seed(3)
    result = local.step(x, y, still(local))
    torch.manual_seed(3)
    h1 = local.trunk.layer1(local.heads.streams(x, y))
    goodness = (h1**2).mean(1)
    loss = (1 + (-3.0 * (goodness[:6] - goodness[6:12])).exp()).log().mean()

    torch.testing.assert_close(result.losses["loss_0"], loss.detach(), rtol=1e-10, atol=0)
    expected = torch.autograd.grad(loss, local.trunk.layer1.fc.weight)[0]
    torch.testing.assert_close(local.trunk.layer1.fc.weight.grad, expected, rtol=1e-9, atol=1e-14)


def test_the_generative_circuit_predicts_what_lies_below_and_trains_nothing_else() -> None:
    x, y = det((6, 1, 4, 5), 1), torch.tensor([0, 1, 2, 3, 9, 0])
    local = localize.transform(net().double(), "pff", example_input=x, noise=0.0).train()

    torch.manual_seed(3)
    result = local.step(x, y, still(local))
    torch.manual_seed(3)
    inputs = local.heads.streams(x, y)
    h1 = local.trunk.layer1(inputs).detach()
    h2 = local.trunk.layer2(h1).detach()
    predictions = [
        (
            "generative_0",
            (h1 / h1.norm(dim=1, keepdim=True)) @ local.heads.generative_0.map.weight.T,
            inputs.flatten(1),
        ),
        ("generative_1", F.relu((h2 / h2.norm(dim=1, keepdim=True)) @ local.heads.generative_1.map.weight.T), h1),
    ]
    goodness = [losses.forward_forward_mean((h**2).mean(1), y) for h in (h1, h2)]

    for (name, prediction, below), own, loss in zip(predictions, goodness, ("loss_0", "loss_1"), strict=True):
        error = ((prediction - below) ** 2).sum() / 18
        weight = local.heads[name].map.weight
        torch.testing.assert_close(result.losses[loss], (own + error).detach(), rtol=1e-10, atol=0)
        torch.testing.assert_close(weight.grad, torch.autograd.grad(error, weight)[0], rtol=1e-9, atol=1e-14)


def test_the_layers_of_predictive_forward_forward_learn_as_those_of_forward_forward() -> None:
    x, y = det((6, 1, 4, 5), 1), torch.tensor([0, 1, 2, 3, 9, 0])
    model = net().double()
    gradients = []
    for method, options in (("ff", {"images": "raw"}), ("pff", {})):
        local = localize.transform(model, method, example_input=x, **options).train()
        torch.manual_seed(3)
        local.step(x, y, still(local))
        gradients.append([p.grad.clone() for p in model.parameters()])

    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_the_generative_circuit_reads_noisy_activities_in_training_only() -> None:
    local = localize.transform(net(), "pff", example_input=torch.empty(2, 1, 4, 5), noise=0.5)
    head, h = local.heads.generative_0, torch.rand(3, 20)

    assert not torch.equal(head.train()(h), head(h))
    assert torch.equal(head.eval()(h), head(h))


def test_labels_can_be_shown_one_by_one() -> None:
    x = det((4, 1, 4, 5), 1)
    local = localize.transform(net().double(), "pff", example_input=x)
    shown = x.clone()
    shown[:, 0].flatten(1)[:, :10] = x.amin((1, 2, 3))[:, None]
    shown[:, 0].flatten(1)[:, 7] = x.amax((1, 2, 3))

    found, later = inference.goodness(local, x, skip_first=False), inference.goodness(local, x)

    h1 = local.trunk.layer1(shown)
    torch.testing.assert_close(found[:, 7], (h1**2).mean(1) + (local.trunk.layer2(h1) ** 2).mean(1))
    torch.testing.assert_close(later[:, 7], (local.trunk.layer2(h1) ** 2).mean(1))


class Hinton(nn.Module):
    """Three hidden layers, each behind a normalisation that the forward computes itself."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.hidden = nn.ModuleList([nn.Linear(20, 16), nn.Linear(16, 16), nn.Linear(16, 12)])
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.hidden:
            x = F.relu(layer(self.normalised(x)))
        return self.fc(self.normalised(x))

    def normalised(self, x: Tensor) -> Tensor:
        match self.form:
            case "hinton":
                return x / (x.norm(2, 1, keepdim=True) + 1e-4)
            case "normalize":
                return F.normalize(x)
            case "rms":
                return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            case "clamped":
                return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=1e-6)
            case "centred":
                return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
            case "over the batch":
                return x / (x.norm(2, 0, keepdim=True) + 1e-4)
            case "not by the length":
                return x / x.exp().sum(1, keepdim=True)
            case "by a shifted length":
                return x / (x.norm(2, 1, keepdim=True) + 1)
        raise AssertionError(self.form)


@pytest.mark.parametrize("form", ["hinton", "normalize", "rms", "clamped", "centred"])
@pytest.mark.parametrize("method", GOODNESS)
def test_a_net_that_divides_by_the_length_itself_is_trained(method: str, form: str) -> None:
    x, y = torch.randn(6, 1, 4, 5), torch.tensor([0, 1, 2, 3, 9, 0])
    local = localize.transform(Hinton(form), method, example_input=x, length="removed").train()
    before = [layer.weight.detach().clone() for layer in local.trunk.hidden]

    local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1))

    assert not any(torch.equal(a, b.weight) for a, b in zip(before, local.trunk.hidden, strict=True))


@pytest.mark.parametrize("form", ["over the batch", "not by the length", "by a shifted length"])
def test_other_divisions_are_no_normalisation(form: str) -> None:
    with pytest.raises(MethodError, match=r"has no normalisation.*\n.*\n.*x / \(x.norm"):
        localize.transform(Hinton(form), "ff", example_input=torch.empty(2, 1, 4, 5))


def test_images_with_a_label_enter_with_a_root_mean_square_of_one() -> None:
    x, y = 3 * det((6, 1, 4, 5), 1), torch.tensor([0, 1, 2, 3, 9, 0])
    scaled, raw = (
        localize.transform(net().double(), "ff", example_input=x, images=images).heads.streams
        for images in ("scaled", "raw")
    )

    torch.manual_seed(3)
    found = scaled(x, y).chunk(3)
    torch.manual_seed(3)
    plain = raw(x, y).chunk(3)

    for one, other in zip(found[:2], plain[:2], strict=True):
        lengths = other.square().mean((1, 2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(one, other / lengths, rtol=1e-12, atol=0)
    assert torch.equal(found[2], x) and torch.equal(plain[2], x)


@pytest.mark.parametrize("method", GOODNESS)
@pytest.mark.parametrize("strict", ["any", "removed"])
def test_a_fully_connected_net_passes_the_whole_audit(method: str, strict: str) -> None:
    local = localize.transform(net(), method, example_input=torch.empty(2, 1, 4, 5), length=strict).train()

    localize.audit(local, (torch.randn(6, 1, 4, 5), torch.tensor([0, 1, 2, 3, 9, 0]))).raise_if_failed()


# --------------------------------------------------------------------------------------------------- refused, counted


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (net, (1, 4, 5), "removed"),
        (lambda: ConvNet((4, 6), 5, input_shape=(3, 8, 8)), (3, 8, 8), "partly kept"),
        (nets.ResNet, (3, 8, 8), "partly kept"),
        (nets.ViT, (3, 8, 8), "partly kept"),
        (nets.Writes, (3, 8, 8), "kept"),
    ],
    ids=["layer-norm", "batch-norm", "shortcut", "pre-norm", "none"],
)
def test_it_is_known_what_a_segment_keeps_of_the_length_of_its_input(model, shape: tuple, expected: str) -> None:
    made = localize.transform(model(), "drtp", example_input=torch.empty(2, *shape)).plan.segments

    assert length_of_input(made.segments[1], made.trunk) == expected


@pytest.mark.parametrize("method", GOODNESS)
@pytest.mark.parametrize("model", ["TwoStreams", "MLP", "Writes"])
def test_a_model_without_normalisation_is_refused(method: str, model: str) -> None:
    reason = "fully connected" if method == "pff" and model != "MLP" else "segment_1 of .* has no normalisation"
    with pytest.raises(MethodError, match=reason):
        localize.transform(nets.ALL[model](), method, example_input=torch.empty(2, 3, 8, 8))


@pytest.mark.parametrize("method", ["ff", "symba"])
def test_a_shortcut_around_the_normalisation_is_refused_where_length_has_to_be_removed(method: str) -> None:
    with pytest.raises(MethodError, match="has a path around the normalisation, or a BatchNorm"):
        localize.transform(nets.ViT(), method, example_input=torch.empty(2, 3, 8, 8), length="removed")


def test_maps_have_no_generative_circuit() -> None:
    with pytest.raises(MethodError, match="defined for fully connected layers, and segment_0 .* of shape 4x8x8"):
        localize.transform(nets.ResNet(), "pff", example_input=torch.empty(2, 3, 8, 8))


@pytest.mark.parametrize("method", ["ff", "pff"])
def test_more_classes_than_pixels_are_refused(method: str) -> None:
    with pytest.raises(MethodError, match="has 30 classes, but its images have only 20 pixels"):
        localize.transform(FCNet(8, 30, input_shape=(1, 4, 5)), method, example_input=torch.empty(2, 1, 4, 5))


@pytest.mark.parametrize("method", GOODNESS)
def test_one_class_is_refused(method: str) -> None:
    with pytest.raises(MethodError, match="has only one class: no label is wrong"):
        localize.transform(FCNet(8, 1, input_shape=(1, 4, 5)), method, example_input=torch.empty(2, 1, 4, 5))


@pytest.mark.parametrize(
    ("method", "model", "shape", "added"),
    [
        ("ff", "cifar/fc_mnist", (1, 28, 28), 0),
        ("symba", "cifar/fc_mnist", (1, 28, 28), 10 * 784),
        ("pff", "cifar/fc_mnist", (1, 28, 28), 1024 * 784 + 1024 * 1024),
        ("ff", "cifar/fc_cifar100", (3, 32, 32), 0),
        ("pff", "cifar/fc_cifar10", (3, 32, 32), 2 * 3072 * 3072),
    ],
)
def test_what_they_add_is_counted(method: str, model: str, shape: tuple, added: int) -> None:
    made = plan(model, method, shape)

    assert sum(block.size for block in made.blocks if block.role != "segment") == added
    trained = sum(block.size for block in made.blocks if block.role != "segment" and block.parameters)
    assert trained == (added if method == "pff" else 0)


# -------------------------------------------------------------------------------------------------------------- CaFo


class Blocks(nn.Module):
    """The three blocks of the CaFo paper's code: conv 3x3, ReLU, pooling, BatchNorm; 32, 128 and 512 channels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in ((3, 32), (32, 128), (128, 512)):
            layers += [nn.Conv2d(inner, outer, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(outer)]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


def test_predictors_have_the_size_of_the_paper_s() -> None:
    local = localize.transform(Blocks().to("meta"), "cafo", example_input=torch.empty(2, 3, 32, 32, device="meta"))

    # 8,192 activities behind each block, 10 classes, no bias: 245,760 (the comparisons of Choi et al. print 243K).
    assert [block.size for block in local.plan.blocks if block.role == "head"] == [81920] * 3


def test_a_block_ends_behind_its_batch_norm() -> None:
    local = localize.transform(Blocks(), "cafo", example_input=torch.empty(2, 3, 32, 32)).eval()
    x = torch.randn(2, 3, 32, 32)

    found = local.features(x)

    h = x
    for k in range(3):
        h = local.trunk.layers[4 * k : 4 * k + 4](h)
        torch.testing.assert_close(found[k], (h,))


def test_the_prediction_is_the_sum_of_the_softmax_of_all_predictors() -> None:
    x = det((64, 3, 8, 8), 1)
    local = localize.transform(nets.ResNet().double(), "cafo", example_input=x).train()
    for _ in range(3):
        local.step(x, torch.arange(64) % 5, torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1))
    local.eval()

    features = local.features(x)
    scores = [features[k][0].flatten(1) @ local.heads[f"predictor_{k}"].linear.weight.T for k in range(3)]
    expected = sum(score.exp() / score.exp().sum(1, keepdim=True) for score in scores)

    assert inference.answers_by(local) == "softmax_sum"
    assert torch.equal(inference.predict(local, x), expected.argmax(1))
    torch.testing.assert_close(inference.answer(local, x).softmax(1), expected.detach() / 3)
    assert not torch.equal(local(x).argmax(1), expected.argmax(1))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error", "sparsemax"])
def test_only_predictors_and_the_classifier_learn(loss: str) -> None:
    local = localize.transform(nets.ResNet(), "cafo", example_input=torch.empty(2, 3, 8, 8), loss=loss).train()
    x, y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    before = {name: p.detach().clone() for name, p in local.named_parameters()}
    optimizer = torch.optim.AdamW(local.param_groups(lr=1e-2, weight_decay=0.1))

    for _ in range(3):
        local.step(x, y, optimizer)

    moved = {name for name, p in local.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"trunk.fc.weight", "trunk.fc.bias", *(f"heads.predictor_{k}.linear.weight" for k in range(3))}


@pytest.mark.parametrize("loss", ["squared_error", "sparsemax"])
def test_predictors_pass_the_whole_audit_with_every_loss(loss: str) -> None:
    local = localize.transform(nets.TwoStreams(), "cafo", example_input=torch.empty(2, 3, 8, 8), loss=loss).train()

    localize.audit(local, (torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0]))).raise_if_failed()


def test_the_gradient_of_a_predictor_is_that_of_logistic_regression() -> None:
    x, y = det((4, 3, 8, 8), 1), torch.tensor([0, 1, 2, 4])
    local = localize.transform(nets.ResNet().double(), "cafo", example_input=x).train()
    local.step(x, y, still(local))

    trunk = local.trunk
    h = trunk.blocks[0](trunk.relu(trunk.bn(trunk.conv(x)))).flatten(1).detach()
    weight = local.heads.predictor_0.linear.weight
    error = (h @ weight.detach().T).softmax(1) - F.one_hot(y, 5)

    torch.testing.assert_close(weight.grad, error.T @ h / 4, rtol=1e-10, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("method", "options", "own", "by_goodness"),
    [
        ("ff", {"goodness": "sum", "threshold": 20.0}, 0.88, 0.93),
        ("ff", {}, 0.80, 0.85),
        ("symba", {}, 0.88, 0.80),
        ("pff", {}, 0.80, 0.85),
        ("cafo", {}, 0.90, None),
    ],
    ids=["ff-sum", "ff", "symba", "pff", "cafo"],
)
def test_a_fully_connected_net_learns_digits(method: str, options: dict, own: float, by_goodness: float | None) -> None:
    images, labels = digits()
    local = localize.transform(FCNet(256, 10, input_shape=(1, 8, 8)), method, example_input=images[:2], **options)
    optimizer = torch.optim.Adam(local.train().param_groups(lr=2e-3), lr=2e-3)
    for _ in range(20):
        for batch in torch.randperm(1437).split(128):
            local.step(images[batch], labels[batch], optimizer)
    test, answers = images[1437:], labels[1437:]

    assert (local.eval()(test).argmax(1) == answers).double().mean() > own
    if by_goodness is not None:
        assert (inference.goodness(local, test).argmax(1) == answers).double().mean() > by_goodness


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run small layers on one thread: two would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 digits, normalised, in random order."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images).float().unsqueeze(1), torch.tensor(data.target)
    order = torch.randperm(len(images))
    return ((images - images.mean()) / images.std())[order], labels[order]
