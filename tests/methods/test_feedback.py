"""FA, DFA and DRTP hand layers what their papers say: compared with hand-written passes over a small network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localize
from localize import losses
from localize.errors import MethodError
from localize.heads.feedback import FeedbackConv2d, FeedbackLinear, feedback_module
from localize.runtime.model import LocalModel
from localize.zoo.dcl_nets import FCNet
from tests import nets
from tests.golden import det
from tests.plans import plan

X, Y = det((5, 1, 3, 4), 1), torch.tensor([0, 2, 1, 2, 0])
N, Z = 5, 3


class Net(nn.Module):
    """12-6-4-3, with tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 6), nn.Linear(6, 4), nn.Linear(4, Z)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x.flatten(1))))))


class Activities:
    """The forward of :class:`Net`, written out: inputs of the layers, slopes of tanh, and the error of the output."""

    def __init__(self, net: Net) -> None:
        with torch.no_grad():
            self.x = X.flatten(1)
            self.h1 = torch.tanh(self.x @ net.a.weight.T + net.a.bias)
            self.h2 = torch.tanh(self.h1 @ net.b.weight.T + net.b.bias)
            logits = self.h2 @ net.c.weight.T + net.c.bias
            self.slope1, self.slope2 = 1 - self.h1**2, 1 - self.h2**2
            self.onehot = torch.eye(Z, dtype=torch.float64)[Y]
            self.error = logits.exp() / logits.exp().sum(1, keepdim=True) - self.onehot


def stepped(method: str, **options: object) -> LocalModel:
    local = localize.transform(Net().double(), method, example_input=X, **options).train()
    local.step(X, Y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))
    return local


def assert_gradients(layer: nn.Linear, signal: Tensor, entering: Tensor, by: int = N) -> None:
    """The gradients of a layer are those of a pre-activation signal (N, out), summed over the batch and divided."""
    torch.testing.assert_close(layer.weight.grad, signal.T @ entering / by, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(layer.bias.grad, signal.sum(0) / by, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------------------------------------------------- by hand


def test_feedback_alignment_sends_the_error_back_through_its_own_matrices() -> None:
    local = stepped("fa")
    net, act = local.trunk, Activities(local.trunk)
    b, c = local.heads.feedback_0.feedback, local.heads.feedback_1.feedback

    signal2 = (act.error @ c) * act.slope2
    signal1 = (signal2 @ b) * act.slope1

    assert_gradients(net.c, act.error, act.h2)
    assert_gradients(net.b, signal2, act.h1)
    assert_gradients(net.a, signal1, act.x)
    assert not torch.allclose(signal2, (act.error @ net.c.weight.detach()) * act.slope2)


def test_feedback_alignment_with_the_weights_as_feedback_is_backpropagation() -> None:
    local = localize.transform(Net().double(), "fa", example_input=X).train()
    with torch.no_grad():
        local.heads.feedback_0.feedback.copy_(local.trunk.b.weight)
        local.heads.feedback_1.feedback.copy_(local.trunk.c.weight)
    local.step(X, Y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))
    found = [p.grad.clone() for p in local.trunk.parameters()]

    expected = torch.autograd.grad(F.cross_entropy(local(X), Y), list(local.trunk.parameters()))

    torch.testing.assert_close(found, list(expected), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("reduction", "by"), [("sum", 1), ("mean", N)])
def test_direct_feedback_alignment_sends_the_error_of_the_output_to_every_layer(reduction: str, by: int) -> None:
    local = stepped("dfa", reduction=reduction)
    net, act = local.trunk, Activities(local.trunk)

    assert_gradients(net.c, act.error, act.h2)
    assert_gradients(net.b, (act.error @ local.heads.feedback_1.weight) * act.slope2, act.h1, by)
    assert_gradients(net.a, (act.error @ local.heads.feedback_0.weight) * act.slope1, act.x, by)


@pytest.mark.parametrize(("reduction", "by"), [("sum", 1), ("mean", N)])
def test_direct_random_target_projection_sends_the_label_to_every_layer(reduction: str, by: int) -> None:
    local = stepped("drtp", reduction=reduction)
    net, act = local.trunk, Activities(local.trunk)

    assert_gradients(net.c, act.error, act.h2)
    assert_gradients(net.b, (act.onehot @ local.heads.feedback_1.weight) * act.slope2, act.h1, by)
    assert_gradients(net.a, (act.onehot @ local.heads.feedback_0.weight) * act.slope1, act.x, by)


class Handed(torch.autograd.Function):
    """A layer's output, whose gradient the code of DRTP replaces: by labels.mm(B), or by (y - labels).mm(B) for DFA."""

    @staticmethod
    def forward(ctx, h: Tensor, signal: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(signal, b)
        return h.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        signal, b = ctx.saved_tensors
        return signal.mm(b), None, None


@pytest.mark.parametrize("images", [1, 6, 100])
@pytest.mark.parametrize("method", ["dfa", "drtp"])
def test_hidden_gradients_are_those_of_the_published_code_at_every_batch_size(method: str, images: int) -> None:
    x, y = det((images, 1, 3, 4), 4), torch.arange(images) * 7 % Z
    local = localize.transform(Net().double(), method, example_input=X).train()
    local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))
    net, labels = local.trunk, torch.eye(Z, dtype=torch.float64)[y]
    found = [parameter.grad.clone() for parameter in net.parameters()]

    with torch.no_grad():
        signal = labels if method == "drtp" else net(x).softmax(1) - labels
    h1 = Handed.apply(torch.tanh(net.a(x.flatten(1))), signal, local.heads.feedback_0.weight)
    h2 = Handed.apply(torch.tanh(net.b(h1)), signal, local.heads.feedback_1.weight)
    expected = torch.autograd.grad(F.cross_entropy(net.c(h2), y), list(net.parameters()))

    torch.testing.assert_close(found, list(expected), rtol=1e-12, atol=1e-15)


def test_a_first_convolution_is_handed_its_map() -> None:
    local = localize.transform(nets.ResNet().double(), "dfa", example_input=torch.empty(2, 3, 8, 8)).train()
    x, y = det((4, 3, 8, 8), 3), torch.tensor([0, 1, 2, 4])
    local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))
    found = local.trunk.conv.weight.grad.clone()

    trunk = local.trunk
    h = trunk.blocks[0](trunk.relu(trunk.bn(trunk.conv(x))))
    with torch.no_grad():
        error = trunk(x).softmax(1) - F.one_hot(y, 5)
    handed = (error @ local.heads.feedback_0.weight).view_as(h)
    (expected,) = torch.autograd.grad(h, trunk.conv.weight, handed)

    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_the_gradient_of_an_alignment_is_its_direction() -> None:
    h, t = det((4, 2, 3), 5).requires_grad_(), det((4, 2, 3), 6)

    value = losses.summed_alignment(h, t)
    value.backward()

    torch.testing.assert_close(value.detach(), sum((h[n] * t[n]).sum() for n in range(4)).detach())
    torch.testing.assert_close(h.grad, t)
    (divided,) = torch.autograd.grad(losses.alignment(h, t), h)
    torch.testing.assert_close(divided, t / 4)


# ------------------------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, padding=(0, 2), groups=2, bias=False),
        nn.Conv2d(4, 4, (3, 5), dilation=2, padding="same", groups=4),
        nn.Conv2d(4, 2, 2, padding="valid"),
    ],
    ids=["plain", "strided-groups", "same-depthwise", "valid"],
)
def test_a_convolution_with_feedback_computes_what_it_replaces(conv: nn.Conv2d) -> None:
    conv = conv.double()
    block = feedback_module(conv, "conv")
    assert isinstance(block, FeedbackConv2d)
    block = block.to_empty(device="cpu").double()
    block.feedback.data.copy_(det(tuple(conv.weight.shape), 7))
    x = det((2, 4, 9, 8), 8).requires_grad_()
    other = nn.Parameter(block.feedback.detach().clone())

    y = block(x, conv.weight, conv.bias)
    given = det(tuple(y.shape), 9)
    found = torch.autograd.grad(y, [x, *conv.parameters()], given)

    assert torch.equal(y, conv(x))
    true = torch.autograd.grad(conv(x), list(conv.parameters()), given)
    (back,) = torch.autograd.grad(conv._conv_forward(x, other, None), x, given)
    torch.testing.assert_close(found, (back, *true), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5)], ids=["vectors", "tokens"])
def test_what_a_layer_with_feedback_returns_can_be_written_to(shape: tuple[int, ...]) -> None:
    linear, x = nn.Linear(5, 4).double(), det(shape, 10).requires_grad_()
    block = FeedbackLinear((4, 5)).double()
    block.feedback.data.copy_(linear.weight)

    found = torch.autograd.grad(block(2 * x, linear.weight, linear.bias).relu_().square().sum(), [x, linear.weight])
    expected = torch.autograd.grad(linear(2 * x).relu().square().sum(), [x, linear.weight])

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_feedback_has_the_distribution_of_new_weights_and_is_not_trained() -> None:
    local = localize.transform(nn.Sequential(nn.Flatten(), nn.Linear(8, 400), nn.Linear(400, 300)), "fa",
                               example_input=torch.empty(2, 8))  # fmt: skip
    (block,) = (b for b in local.plan.blocks if b.role == "shared")
    drawn = local.heads[block.name].feedback

    assert drawn.shape == (300, 400)
    assert not drawn.requires_grad
    assert drawn.abs().max() <= 1 / 400**0.5
    torch.testing.assert_close(drawn.std().item(), 1 / (3 * 400) ** 0.5, rtol=0.02, atol=0)
    assert not torch.equal(drawn, local.trunk[2].weight)


@pytest.mark.parametrize(("method", "scale"), [("dfa", 1.0), ("drtp", 6**0.5)])
def test_projections_are_drawn_by_the_width_of_the_layer(method: str, scale: float) -> None:
    local = localize.transform(FCNet(500, 10, input_shape=(1, 8, 8)), method, example_input=torch.empty(2, 1, 8, 8))
    drawn = local.heads.feedback_0.weight

    assert drawn.shape == (10, 500)
    assert not drawn.requires_grad
    assert drawn.abs().max() <= scale / 500**0.5
    torch.testing.assert_close(drawn.std().item(), scale / (3 * 500) ** 0.5, rtol=0.03, atol=0)


def test_a_convolution_whose_padding_has_no_feedback_is_refused() -> None:
    with pytest.raises(MethodError, match="the convolution stem pads by 'reflect'"):
        feedback_module(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "stem")
    with pytest.raises(MethodError, match="the convolution stem pads by different numbers left and right"):
        feedback_module(nn.Conv2d(3, 4, 2, padding="same"), "stem")


def test_a_derived_layer_with_a_forward_of_its_own_keeps_its_backward() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    assert feedback_module(Scaled(3, 4), "scaled") is None
    assert feedback_module(nn.BatchNorm2d(3), "norm") is None


# ------------------------------------------------------------------------------------------------------------- plans


def test_every_layer_but_the_first_gets_feedback() -> None:
    local = localize.transform(nets.ResNet(), "fa", example_input=torch.empty(2, 3, 8, 8))

    assert [path for path, _ in local.plan.feedback] == [
        "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "blocks.1.shortcut",
        "blocks.2.conv1", "blocks.2.conv2", "fc",
    ]  # fmt: skip
    assert all(local.plan.block(name).feedback for _, name in local.plan.feedback)
    assert len(local.plan.losses) == 1


def test_feedback_has_the_size_of_the_weights_that_it_replaces() -> None:
    made = plan("cifar/vgg8b", "fa")

    # 6 convolutions and 2 linear layers of VGG8B without biases, less the first convolution (3 x 128 x 3 x 3).
    weights = 3 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512 * 2
    expected = 9 * weights + 2048 * 1024 + 1024 * 10 - 9 * 3 * 128
    assert sum(block.size for block in made.blocks if block.feedback) == expected
    assert not any(block.parameters for block in made.blocks if block.feedback)


def test_a_model_of_one_layer_has_no_feedback() -> None:
    with pytest.raises(MethodError, match="no error is passed back through a linear or convolutional layer"):
        localize.transform(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), "fa", example_input=torch.empty(2, 8))


@pytest.mark.parametrize(("net", "shape", "sizes"), [
    ("cifar/fc_mnist", (1, 28, 28), [10240, 10240]),
    ("cifar/conv256", (3, 32, 32), [10 * 64 * 32 * 32, 10 * 256 * 16 * 16]),
])  # fmt: skip
@pytest.mark.parametrize("method", ["dfa", "drtp"])
def test_projections_have_the_size_of_classes_times_activities(
    method: str, net: str, shape: tuple, sizes: list[int]
) -> None:
    made = plan(net, method, shape)

    assert [block.size for block in made.blocks if block.role == "shared"] == sizes
    assert not any(block.parameters for block in made.blocks if block.role != "segment")
    assert made.waits == (method == "dfa")


def test_values_that_cross_a_cut_together_are_handed_one_vector() -> None:
    local = localize.transform(nets.TwoStreams(), "drtp", example_input=torch.empty(2, 3, 8, 8))

    assert local.heads.feedback_0.weight.shape == (5, 4 * 8 * 8 + 6 * 4 * 4)
    localize.audit(local, (torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0]))).raise_if_failed()


# ---------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("net", ["ResNet", "Dense", "TwoStreams", "ViT", "MLP", "Writes"])
def test_a_step_of_one_layer_moves_its_activities_against_the_label_s_vector(net: str) -> None:
    """The loss of a layer falls where what enters it stays: the others move only what enters the next."""
    local = localize.transform(nets.ALL[net](), "drtp", example_input=torch.empty(2, 3, 8, 8)).train()
    for dropout in (m for m in local.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    x, y = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    parameters = dict(local.named_parameters())
    for loss in local.plan.losses:
        own = [parameters[name] for name in sorted(local.plan.reach(loss))]
        optimizer = torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0)
        before = local.step(x, y, optimizer).losses[loss.name]
        with torch.no_grad():
            for parameter in own:
                parameter -= 1e-3 * parameter.grad
        after = local.step(x, y, optimizer).losses[loss.name]

        assert after < before, loss.name


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_the_weights_align_with_the_feedback(method: str) -> None:
    """The papers' finding: what random feedback hands to a layer becomes similar to the gradient (angle below 90)."""
    images, labels = digits()
    local = localize.transform(perceptron(), method, example_input=images[:2]).train()
    optimizer = torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1, momentum=0.9)

    before = similarity_to_the_gradient(local, images[:512], labels[:512])
    for batch in torch.randperm(1437).repeat(3).split(64):
        local.step(images[batch], labels[batch], optimizer)
    after = similarity_to_the_gradient(local, images[:512], labels[:512])

    assert all(abs(cosine) < 0.1 for cosine in before), before
    assert all(cosine > 0.12 for cosine in after), after


@pytest.mark.usefixtures("one_thread")
def test_random_target_projection_learns_digits() -> None:
    images, labels = digits()
    local = localize.transform(perceptron(), "drtp", example_input=images[:2]).train()
    optimizer = torch.optim.Adam(local.param_groups(lr=1e-3), lr=1e-3)

    for batch in torch.randperm(1437).repeat(4).split(64):
        local.step(images[batch], labels[batch], optimizer)

    assert (local.eval()(images[1437:]).argmax(1) == labels[1437:]).double().mean() > 0.8


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)
    )


def similarity_to_the_gradient(local: LocalModel, x: Tensor, y: Tensor) -> list[float]:
    """Return, for both hidden layers, the cosine between what a step hands to the weight and the true gradient."""
    weights = [local.trunk[1].weight, local.trunk[3].weight]
    local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))
    found = [weight.grad.clone() for weight in weights]
    true = torch.autograd.grad(F.cross_entropy(local.trunk(x), y), weights)
    return [float(F.cosine_similarity(f.flatten(), t.flatten(), dim=0)) for f, t in zip(found, true, strict=True)]


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
