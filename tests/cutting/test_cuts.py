"""Cuts are found where few values are live; local layers are those of the papers."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import localize
from localize.cutting import cuts
from localize.cutting.cuts import place
from localize.cutting.split import split
from localize.errors import CutError
from localize.graph.trace import trace
from localize.ir import CutSpec, Features, Grain, facts
from tests.nets import ALL, ResNet, TwoStreams, Writes
from tests.plans import trunk

AUGLOCAL = Grain()
DCL = Grain(stem="merged", classifier="own", hidden_linear="own", pool="same")


# The number of local layers that the papers and their code count.
@pytest.mark.parametrize(
    ("name", "size", "auglocal", "dcl"),
    [
        ("cifar/resnet32", 32, 16, 15 + 1),
        ("cifar/resnet110", 32, 55, 54 + 1),
        ("cifar/vgg19", 32, 16, 16 + 1),
        ("cifar/vgg8b", 32, 6, 7 + 1),
        ("cifar/vit", 32, 6, 6 + 1),
        ("cifar/mixer", 32, 6, 6 + 1),
        ("tv/resnet34", 64, 17, 16 + 1),
        ("tv/resnet101", 64, 34, 33 + 1),
        ("tv/vgg13_bn", 64, 10, 10 + 2 + 1),
        ("tv/mobilenet_v2", 64, 19, 18 + 1),
        ("tv/regnet_x_400mf", 64, 23, 22 + 1),
        ("tv/densenet121", 64, 8, 7 + 1),
    ],
)
def test_local_layers_are_those_of_the_papers(name: str, size: int, auglocal: int, dcl: int) -> None:
    recorded = trunk(name, (3, size, size))

    assert len(cuts.local_layers(recorded, AUGLOCAL)) == auglocal
    assert len(cuts.local_layers(recorded, DCL)) == dcl


def test_a_pooling_layer_goes_to_the_next_layer_or_stays() -> None:
    recorded = trunk("cifar/vgg8b")

    assert cuts.local_layers(recorded, AUGLOCAL)[0].end.features[0].shape == (128, 32, 32)
    assert [layer.end.features[0].shape for layer in cuts.local_layers(recorded, DCL)[:3]] == [
        (128, 32, 32),
        (256, 16, 16),
        (256, 16, 16),
    ]


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("tv/resnet18", 64, Features("map", (64, 16, 16), 1)),
        ("timm/swin_tiny_patch4_window7_224", 224, Features("map", (56, 56, 96), 3)),
        ("timm/convnext_atto", 64, Features("map", (40, 16, 16), 1)),
        ("timm/vit_tiny_patch16_224", 224, Features("tokens", (197, 192), 2, "class", 1, (14, 14))),
        ("timm/mixer_s32_224", 224, Features("tokens", (49, 512), 2, "mean", 0, (7, 7))),
    ],
)
def test_the_layout_of_features_is_inferred(name: str, size: int, expected: Features) -> None:
    layers = cuts.local_layers(trunk(name, (3, size, size)), AUGLOCAL)

    assert layers[0].end.features == (expected,)


def test_two_streams_are_cut_through_both() -> None:
    layout = place(trace(TwoStreams(), torch.empty(2, 3, 8, 8)), CutSpec(), grain=AUGLOCAL)

    assert layout.cuts
    assert all(len(cut.values) == 2 for cut in layout.cuts)


def test_a_cut_moves_past_the_operation_that_overwrites_its_value() -> None:
    layout = place(trace(Writes(), torch.empty(2, 3, 8, 8)), CutSpec(by="node"), grain=AUGLOCAL)

    assert [cut.name for cut in layout.cuts] == ["relu_", "relu__1", "relu__2", "relu__3"]
    assert not any(cut.cloned for cut in layout.cuts)


def test_segments_can_be_chosen_by_number_name_and_balance() -> None:
    recorded = trunk("cifar/resnet20")

    def ends(spec: CutSpec) -> list[str]:
        return [cut.name for cut in place(recorded, spec, grain=AUGLOCAL).cuts]

    assert len(ends(CutSpec(segments=3))) == 2
    assert ends(CutSpec(at=("layer2.0", "relu"))) == ["relu", "layer2.0"]
    assert len(ends(CutSpec(by="node"))) > len(ends(CutSpec()))


@pytest.mark.parametrize("by", ["parameters", "macs"])
def test_balanced_cuts_make_the_largest_segment_as_small_as_can_be(by: str) -> None:
    recorded = trunk("cifar/resnet20")

    def largest(*names: str) -> int:
        spec = CutSpec(at=names) if names else CutSpec(segments=3, by=by)
        segments = split(place(recorded, spec, grain=AUGLOCAL)).segments
        if by == "parameters":
            return max(segment.size for segment in segments)
        inner = [[n for n in s.graph.nodes if n.op not in ("placeholder", "output")] for s in segments]
        return max(sum(facts(node).macs for node in nodes) for nodes in inner)

    names = [cut.name for cut in place(recorded, CutSpec(), grain=AUGLOCAL).cuts]
    assert largest() == min(largest(*pair) for pair in itertools.combinations(names, 2))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (CutSpec(segments=40), r"(?s)40 segments were asked for, cifar/resnet20 has 9 cuts.*layer1.0.*cut=10"),
        (CutSpec(segments=0), "cannot have 0 segments"),
        (CutSpec(at=("layer9.0",)), "(?s)no cut 'layer9.0'.*did you mean 'layer"),
        (CutSpec(at=("layer1.0", "layer1.0")), "named twice"),
    ],
)
def test_impossible_cuts_are_refused_with_what_is_possible(spec: CutSpec, message: str) -> None:
    with pytest.raises(CutError, match=message):
        place(trunk("cifar/resnet20"), spec, grain=AUGLOCAL)


def test_a_method_that_keeps_all_layers_together_has_one_segment() -> None:
    recorded = trunk("cifar/resnet20")

    assert place(recorded, CutSpec(segments=1), grain=AUGLOCAL, together=10**9).cuts == ()
    with pytest.raises(CutError, match=r"the method keeps all of cifar/resnet20 in one.*\n.*cut=1"):
        place(recorded, CutSpec(segments=2), grain=AUGLOCAL, together=10**9)


def test_a_parameter_on_both_sides_of_a_cut_is_refused() -> None:
    model = ResNet()
    model.blocks[2].conv2 = model.blocks[2].conv1
    model.blocks[1].conv2.weight = model.blocks[2].conv1.weight

    with pytest.raises(CutError, match="'blocks.1.conv2.weight' .* is used on both sides of a cut"):
        split(place(trace(model, torch.empty(2, 3, 8, 8)), CutSpec(), grain=AUGLOCAL))


@given(net=st.sampled_from(sorted(ALL)), data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_set_of_cuts_owns_every_parameter_once(net: str, data: st.DataObject) -> None:
    recorded = trace(ALL[net](), torch.empty(2, 3, 8, 8))
    names = [cut.name for cut in cuts.candidates(recorded)]
    chosen = data.draw(st.sets(st.sampled_from(names), min_size=1)) if len(set(names)) == len(names) else set(names[:1])

    segments = split(place(recorded, CutSpec(at=tuple(chosen)), grain=AUGLOCAL))

    owned = [name for segment in segments.segments for name in segment.parameters]
    assert sorted(owned) == sorted(f"trunk.{name}" for name, _ in recorded.model.named_parameters())
    assert sum(segment.size for segment in segments.segments) == sum(p.numel() for p in recorded.model.parameters())


class Parts(nn.Module):
    """Two streams, as TNT has them: tokens of parts of the image, (4 N, T, C), and one token for each part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.inner = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.outer = nn.ModuleList(nn.Linear(16 * 6, 16 * 6) for _ in range(4))
        self.fc = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        parts = self.stem(x).reshape(n, 6, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(n, 4, 96)
        inner = parts.reshape(n * 4, 6, 16).transpose(1, 2)
        outer = parts
        for one, other in zip(self.inner, self.outer, strict=True):
            inner = inner + torch.relu(one(inner))
            outer = outer + torch.relu(other(inner.reshape(n, 4, 96)))
        return self.fc(outer.mean(1))


def test_a_batch_that_is_folded_crosses_a_cut_unfolded() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 3, 8, 8), torch.randint(0, 5, (3,))
    local = localize.transform(Parts(), "dcl", example_input=x)

    crossing = [segment.features for segment in local.plan.segments.segments[:-1]]
    assert any(Features("map", (4, 16, 6), 3) in features for features in crossing)
    assert max(len(features) for features in crossing) == 2
    localize.audit(local, (x, y)).raise_if_failed()


class Mixed(nn.Module):
    """Dimension 0 holds four views of all images, one behind the other: rows of one image do not lie together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens, tokens.flip(1)])
        for layer in self.layers:
            tokens = torch.relu(layer(tokens))
        first, second = tokens.chunk(2)
        return self.fc((first + second).mean(1))


def test_a_folded_batch_of_unknown_order_is_not_cut() -> None:
    recorded = trace(Mixed(), torch.empty(2, 3, 4, 4))

    assert [cut.name for cut in cuts.candidates(recorded)] == ["stem", "add"]


def test_the_pieces_between_cuts_hold_every_parameter_once() -> None:
    recorded = trunk("cifar/resnet20")
    pieces = cuts.pieces(recorded)

    assert [piece.cut for piece in pieces] == [*cuts.candidates(recorded), None]
    assert sum(piece.parameters for piece in pieces) == sum(p.numel() for p in recorded.model.parameters())
    assert sum(piece.macs_share for piece in pieces) == pytest.approx(1)
    assert cuts.notes(recorded) == ()


def test_it_is_said_why_cuts_go_through_several_tensors_and_what_they_cannot_divide() -> None:
    streams = cuts.notes(trace(TwoStreams(), torch.empty(2, 3, 8, 8)))
    assert any("no place is passed by fewer tensors: cuts go through 2 of them" in note for note in streams)

    (note,) = cuts.notes(trunk("tv/vgg11", (3, 64, 64)))
    assert note == "classifier.0 alone holds 77% of the model: no cut makes it smaller"


class Positions(nn.Module):
    """Every layer adds a table that is made of parameters and dropped at random, as vit_srelpos does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.table = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.5))
        self.register_buffer("places", torch.arange(8.0).reshape(4, 2))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        table = self.table(self.places)
        x = self.stem(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = torch.relu(layer(x) + table)
        return self.fc(x.mean(1))


@pytest.mark.parametrize(("method", "options"), [("dcl", {}), ("auglocal", {"d": 2})])
def test_what_is_made_by_chance_and_of_parameters_is_drawn_once_and_handed_on(method: str, options: dict) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 3, 2, 2), torch.randint(0, 5, (3,))
    local = localize.transform(Positions(), method, example_input=x, **options)

    assert all(len(segment.features) == 1 for segment in local.plan.segments.segments[:-1])
    assert any(len(segment.outputs) == 2 for segment in local.plan.segments.segments[:-1])
    localize.audit(local, (x, y)).raise_if_failed()
