"""Every element of a head has an origin: it is drawn, or it is the trunk's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localize
from localize import zoo
from tests.corpus import ALL


@pytest.fixture
def _marked_memory() -> Iterator[None]:
    """Let torch fill new memory with a marker: not a number."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def unset(local: localize.LocalModel) -> list[str]:
    """Return the names of parameters and buffers of heads that hold the marker."""
    named = (*local.heads.named_parameters(), *local.heads.named_buffers())
    return [name for name, value in named if value.is_floating_point() and bool(value.isnan().any())]


class Gained(nn.Conv2d):
    """A convolution with a gain for each channel, and a mask that is not trained."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.75))
        self.mask = nn.Parameter((torch.rand_like(self.weight) < 0.5).float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.gain * self.mask, self.bias)


class Scaled(nn.BatchNorm2d):
    """A BatchNorm with a scale of its own, that inherits how it is reset."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Adapted(nn.Linear):
    """A linear layer with two small matrices beside it, that inherits how it is reset."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__(inner, out)
        self.down, self.up = nn.Parameter(torch.randn(2, inner)), nn.Parameter(torch.zeros(out, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


def convolutional(
    conv: type[nn.Conv2d], norm: type[nn.BatchNorm2d], widths: tuple[int, ...] = (8, 8, 8, 8)
) -> nn.Module:
    """Return a net of four convolutions."""
    layers = [
        nn.Sequential(conv(i, o, 3, padding=1), norm(o), nn.ReLU()) for i, o in zip((3, *widths), widths, strict=False)
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5))


@pytest.mark.usefixtures("_marked_memory")
@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (8, 16, 16, 32)])
def test_what_a_derived_layer_adds_is_the_trunks(widths: tuple[int, ...]) -> None:
    model = convolutional(Gained, Scaled, widths)

    local = localize.transform(model.train(), "auglocal", example_input=torch.randn(2, 3, 12, 12), d=2)

    assert not unset(local)
    masks = {name: p for name, p in local.heads.named_parameters() if name.endswith("mask")}
    gains = [p for name, p in local.heads.named_parameters() if name.endswith("gain")]
    assert masks and all(torch.equal(gain, torch.full_like(gain, 0.75)) for gain in gains)
    assert all(set(mask.unique().tolist()) == {0.0, 1.0} for mask in masks.values())


@pytest.mark.usefixtures("_marked_memory")
def test_matrices_that_a_derived_layer_adds_are_drawn() -> None:
    model = nn.Sequential(
        nn.Flatten(), *(m for i in (27, 8, 8, 8) for m in (Adapted(i, 8), nn.ReLU())), nn.Linear(8, 5)
    )

    local = localize.transform(model.train(), "auglocal", example_input=torch.randn(2, 3, 3, 3), d=2)

    assert not unset(local)
    drawn = [p for name, p in local.heads.named_parameters() if name.endswith(("up", "down"))]
    assert drawn and all(0 < p.std() < 0.1 for p in drawn)


@pytest.mark.usefixtures("_marked_memory")
@pytest.mark.parametrize("name", ["spectral_norm", "old_spectral_norm", "weight_norm", "ternary_with_gain", "pruned"])
def test_heads_of_layers_with_computed_weights_are_set(name: str) -> None:
    entry = next(entry for entry in ALL if entry.name == name)

    local = localize.transform(entry.make().train(), "auglocal", example_input=entry.inputs(2))
    optimizer = torch.optim.SGD(local.param_groups(lr=0.1), lr=0.1)
    result = local.step(entry.inputs(4), torch.arange(4), optimizer)

    assert not unset(local)
    assert all(torch.isfinite(loss) for loss in result.losses.values())


@pytest.mark.slow
@pytest.mark.usefixtures("_marked_memory")
@pytest.mark.parametrize(
    "name", ["tv/resnet18", "tv/mobilenet_v3_small", "timm/resnetv2_18", "timm/test_vit", "timm/test_convnext"]
)
@pytest.mark.parametrize("method", ["auglocal", "dcl", "dgl"])
def test_no_head_of_a_library_model_holds_what_nothing_set(name: str, method: str) -> None:
    model = zoo.create_model(name, num_classes=5)
    shape = zoo.input_shape_of(zoo.resolve(name), model, None)

    assert not unset(localize.transform(model, method, example_input=torch.zeros(2, *shape)))
