"""How values are laid out is read from the graph: channels, grid, prefix, and what the model reads in the end."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import timm
import torch
from torch import Tensor, nn

import localize
from localize import recipes, zoo
from localize.cutting import cuts
from localize.errors import MethodError, OptionError, RecipeError
from localize.graph.features import describe
from localize.graph.trace import trace
from localize.ir import Features, Trunk
from tests.zoo.families import FAMILIES

IMAGE = (3, 16, 24)
GRID = (4, 6)


class Tokens(nn.Module):
    """Patches of an image as tokens, two blocks, and a classifier.

    ``prefix`` tokens are put before the patches, ``late`` of them between the blocks; ``reading`` says what is
    classified.
    """

    def __init__(self, prefix: int, reading: str, *, late: bool = False, width: int = 10) -> None:
        super().__init__()
        self.prefix, self.reading, self.late = prefix, reading, late
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.extra = nn.Parameter(torch.zeros(1, prefix, width))
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.arrange(self.patches(x))
        for number, block in enumerate(self.blocks):
            if self.prefix and number == int(self.late):
                x = torch.cat((self.extra.expand(x.shape[0], -1, -1), x), 1)
            x = block(x)
        return self.head(self.read(x))

    def arrange(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def read(self, x: Tensor) -> Tensor:
        if self.reading == "class":
            return x[:, 0]
        if self.reading == "split":
            first, _ = x.split([1, x.shape[1] - 1], 1)
            return first.squeeze(1)
        if self.reading == "both":
            return x[:, 0] + x[:, 1]
        if self.reading == "narrow":
            return x.narrow(1, 0, 1).reshape(x.shape[0], -1)
        return x[:, self.prefix :].mean(1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).reshape(n, t, c))


class ByEinops(Tokens):
    """Patches made by reshapes alone, as einops does, and a linear map."""

    def __init__(self) -> None:
        super().__init__(1, "class", width=48)
        self.patches = nn.Identity()

    def arrange(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(n, (h // 4) * (w // 4), 16 * c)


class Shuffled(Tokens):
    """Tokens window by window: they are no rows of a grid."""

    def arrange(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, c)


def ends(net: nn.Module, shape: tuple[int, ...] = IMAGE) -> dict[str, tuple[Features, ...]]:
    return {cut.name: cut.features for cut in cuts.candidates(recorded(net, shape))}


def recorded(net: nn.Module, shape: tuple[int, ...] = IMAGE) -> Trunk:
    return trace(net, torch.zeros(2, *shape, device="meta"))


@pytest.mark.parametrize("reading", ["class", "split", "narrow", "mean"])
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_a_prefix_and_how_tokens_are_read_are_told_from_the_patches(prefix: int, reading: str) -> None:
    (found,) = ends(Tokens(prefix, reading))["blocks.0"]

    token = "mean" if reading == "mean" else "class"
    assert found == Features("tokens", (24 + prefix, 10), 2, token, prefix, GRID)


def test_of_several_tokens_that_are_read_the_first_counts() -> None:
    assert ends(Tokens(2, "both"))["blocks.0"] == (Features("tokens", (26, 10), 2, "class", 2, GRID),)


def test_a_class_token_that_comes_late_is_not_looked_for_before() -> None:
    found = ends(Tokens(1, "class", late=True))

    assert found["blocks.0"] == (Features("tokens", (24, 10), 2, "mean", 0, GRID),)
    assert found["blocks.1"] == (Features("tokens", (25, 10), 2, "class", 1, GRID),)


def test_a_grid_is_known_where_reshapes_keep_its_rows_and_only_there() -> None:
    assert ends(Tokens(0, "mean"))["blocks.1"][0].grid == GRID
    assert ends(ByEinops())["blocks.0"] == (Features("tokens", (25, 48), 2, "class", 1, GRID),)
    assert ends(Shuffled(0, "mean"))["blocks.0"] == (Features("tokens", (24, 10), 2),)


class Last(nn.Module):
    """A net whose maps have their channels last between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 8), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.first(x).permute(0, 2, 3, 1)).relu()
        return self.head(self.last(x.permute(0, 3, 1, 2)).mean((2, 3)))


def test_channels_of_a_map_are_told_by_what_makes_and_takes_them() -> None:
    found = ends(Last(), (3, 8, 8))  # as wide as high as it has channels: shapes do not tell

    assert found["first"][0].channels == 1
    assert found["relu"][0].channels == 3
    assert found["last"][0].channels == 1


class Sequence(nn.Module):
    """A net of one spatial dimension: values are (N, C, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(2))


def test_a_sequence_has_its_channels_first() -> None:
    assert {f.channels for found in ends(Sequence(), (4, 6)).values() for f in found if f.kind == "tokens"} == {1}


# ------------------------------------------------------------------------------------------ an oracle: another size


def two_sizes(name: str, *factors: int) -> list[tuple[Features, Features]]:
    """Return the layouts of a model, each with that of the same value where height and width are so many times larger.

    Of a model that computes something else at the other size, those before it does.
    """
    (channels, *size), found = zoo.resolve(name).input_shape, []
    for shape in ((channels, *size), (channels, *(f * side for f, side in zip(factors, size, strict=True)))):
        with torch.device("meta"):
            net = zoo.create_model(name, input_shape=shape)
        layers = cuts.candidates(recorded(net, shape))
        found.append([(value, f) for cut in layers for value, f in zip(cut.values, cut.features, strict=True)])
    same = itertools.takewhile(lambda pair: pair[0][0] == pair[1][0], zip(*found, strict=False))
    return [(one, two) for (_, one), (_, two) in same]


def holds_at_both_sizes(small: Features, large: Features, times: int = 2) -> bool:
    """Tell whether what was inferred agrees with what an image of so many times the area changes: places alone."""
    if small.kind == "flat" or small.shape == large.shape:
        return True
    same = (small.kind, small.channels, small.token, small.prefix) == (
        *(large.kind, large.channels, large.token, large.prefix),
    )
    if small.kind == "map" or not same:
        return same and small.width == large.width
    tokens, more = (f.shape[2 - f.channels] - f.prefix for f in (small, large))
    if small.grid:
        return small.width == large.width and [math.prod(f.grid) for f in (small, large)] == [tokens, more]
    lost = times * tokens - more
    return small.width == large.width and (lost == 0 or lost**2 == tokens)  # a row may be lost in rounding


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_mambaout", "timm/test_convnext", "timm/test_vit_relpos"])
def test_what_grows_with_the_image_are_places(name: str) -> None:
    if not timm.is_model(name.removeprefix("timm/")):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    pairs = two_sizes(name, 2, 1)

    assert any(small.shape != large.shape for small, large in pairs)
    assert [pair for pair in pairs if not holds_at_both_sizes(*pair)] == []


@pytest.mark.zoo
@pytest.mark.parametrize("name", FAMILIES.values())
def test_what_grows_with_the_image_are_places_in_every_family(name: str) -> None:
    for times, factors in ((2, (2, 1)), (4, (2, 2))):
        try:
            pairs = two_sizes(f"timm/{name}", *factors)
        except localize.errors.LocalizeError as error:
            problem = error.problem
            continue
        assert [pair for pair in pairs if not holds_at_both_sizes(*pair, times)] == []
        return
    pytest.skip(f"no second size: {problem}")  # a model of one size only has nothing to compare


def test_the_oracle_notices_wrong_layouts() -> None:
    small, large = (
        Features("tokens", (17, 8), 2, "class", 1, (4, 4)),
        Features("tokens", (33, 8), 2, "class", 1, (8, 4)),
    )

    assert holds_at_both_sizes(small, large)
    assert not holds_at_both_sizes(*(dataclasses.replace(f, prefix=0, grid=()) for f in (small, large)))
    assert not holds_at_both_sizes(*(dataclasses.replace(f, channels=1) for f in (small, large)))
    assert not holds_at_both_sizes(Features("map", (8, 4, 4), 3), Features("map", (8, 8, 4), 2))


# -------------------------------------------------------------------------------------------------- stated layouts


def features_of(local: localize.LocalModel) -> list[Features]:
    return [f for segment in local.plan.segments.segments for f in segment.features]


def test_a_stated_layout_wins_over_what_is_inferred() -> None:
    stated = {"blocks.0": {"kind": "tokens", "token": "mean", "prefix": 4, "grid": [3, 7]}}

    local = localize.transform(
        Tokens(1, "class"), {"method": "dcl", "features": stated}, example_input=torch.zeros(2, *IMAGE)
    )

    assert Features("tokens", (25, 10), 2, "mean", 4, (3, 7)) in features_of(local)
    local.step(torch.randn(2, *IMAGE), torch.tensor([0, 1]), torch.optim.SGD(local.param_groups(lr=0.1)))


def test_a_pattern_states_what_it_fits() -> None:
    recipe = {"method": "dcl", "features": {"*": {"token": "mean"}}}

    local = localize.transform(Tokens(1, "class"), recipe, example_input=torch.zeros(2, *IMAGE))

    assert {f.token for f in features_of(local)} == {"mean"}
    assert {f.grid for f in features_of(local) if f.kind == "tokens"} == {GRID}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"blocks.7": {"token": "mean"}}, r"no cut of this name\.\n  cuts: .*\n  help: did you mean .*'blocks\.0'"),
        ({"blocks.*": {"kind": "map"}}, "no such cut whose values they fit"),
        ({"blocks.0": {"kind": "map"}}, "a value of 2 dimensions is tokens"),
        ({"blocks.0": {"channels": 3}}, "channels lie in dimension 1 or 2"),
        ({"blocks.0": {"prefix": 25}}, "a prefix of 25 leaves none of 25 tokens"),
        ({"blocks.0": {"grid": [5, 5]}}, "24 tokens are left after the prefix"),
        ({"patches": {"token": "mean"}}, "token is said of tokens"),
        ({"blocks.0": [{}, {}]}, "stated for 2 values, and 1 cross there"),
    ],
)
def test_a_statement_that_does_not_fit_is_refused(stated: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        localize.transform(
            Tokens(1, "class"), {"method": "dcl", "features": stated}, example_input=torch.zeros(2, *IMAGE)
        )


def test_statements_stand_in_the_recipe_as_they_were_given() -> None:
    text = "version: 1\nmethod: dcl\nfeatures:\n  blocks.0:\n    token: mean\n    grid: [3, 8]\n"

    recipe = recipes.parse(text, "mine.yaml")

    assert recipes.dump(recipe) == text
    with pytest.raises(RecipeError, match=r"no key 'tokn' in features\.\n  at features\.blocks\.0\.tokn .*, line 5"):
        recipes.parse(text.replace("token", "tokn"), "mine.yaml")
    with pytest.raises(RecipeError, match="mine.yaml, line 4"):
        recipes.parse(text.replace("mean", "median"), "mine.yaml")


def test_layouts_are_described_in_the_words_of_a_recipe() -> None:
    assert describe(Features("map", (3, 4, 5), 1)) == "map, channels 1"
    assert describe(Features("flat", (3,), 1)) == "flat"
    tokens = Features("tokens", (25, 10), 2, "class", 1, (4, 6))
    assert describe(tokens) == "tokens, channels 2, token class, prefix 1, grid 4x6"


# --------------------------------------------------------------------------------------------------------- volumes

VIDEO = (3, 4, 8, 8)


class Video(nn.Module):
    """Three residual blocks of 3-D convolutions, on videos (N, C, T, H, W); with ``tokens``, a block on tokens."""

    def __init__(self, *, tokens: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 6, 3, stride=(1, 2, 2), padding=1), nn.BatchNorm3d(6), nn.ReLU())
        self.blocks = nn.ModuleList([Residual(6) for _ in range(3)])
        self.mix = Block(6) if tokens else None
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = x.flatten(2).transpose(1, 2)
        if self.mix is not None:
            x = self.mix(x)
        return self.head(x.mean(1))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(width, width, 3, padding=1), nn.BatchNorm3d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def test_volumes_are_maps_and_tokens_lie_on_their_grid_of_three_dimensions() -> None:
    found = ends(Video(tokens=True), VIDEO)

    assert found["blocks.1"] == (Features("map", (6, 4, 4, 4), 1),)
    assert found["mix"] == (Features("tokens", (64, 6), 2, "mean", 0, (4, 4, 4)),)


@pytest.mark.parametrize("method", ["auglocal", "dcl", "dgl", "predsim", "cfl"])
def test_methods_train_on_videos(method: str) -> None:
    net, x, y = Video(tokens=method == "auglocal"), torch.randn(4, *VIDEO), torch.tensor([0, 1, 0, 1])
    local = localize.transform(net, method, example_input=x)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    local.step(x, y, torch.optim.SGD(local.param_groups(lr=0.1)))

    assert len(local.plan.segments) > 2
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert {f"blocks.{i}.conv.weight" for i in range(3)} <= changed


def test_a_method_for_images_says_so() -> None:
    with pytest.raises(MethodError, match=r"reconstructs images \(C, H, W\); Video takes \(3, 4, 8, 8\)"):
        localize.transform(Video(), "infopro", example_input=torch.zeros(2, *VIDEO))
    with pytest.raises(MethodError, match="auxiliary nets of convolutions need one feature map"):
        localize.transform(Video(), "auglocal", example_input=torch.zeros(2, *VIDEO), construction="conv3x3")
