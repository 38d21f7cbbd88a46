"""MLAAN reproduces the structure, and a whole step, of the reference code (Wendy231015/MLAAN at 70effbe)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import localize
from localize import methods, ops, recipes, zoo
from localize.errors import MethodError, OptionError
from localize.graph.trace import trace
from localize.heads.leap import copy_of, later_blocks
from localize.ir import CutSpec, Plan
from localize.runtime.model import LocalModel
from tests import nets
from tests.golden import det, fill
from tests.plans import gradient_norm, heads, plan, trunk

IMAGES, TARGET = det((4, 3, 32, 32), 2), torch.tensor([0, 3, 7, 9])

LISTED_32 = recipes.load("mlaan-code-resnet32-cifar10").options["chains"]
"""The blocks that the code lists by hand for ResNet-32."""


def listed_110() -> str:
    """Return the blocks that the code lists by hand for ResNet-110, as (stage, block) from 1 and 0."""
    first = [[(2, 0), (3, 0), (3, 2), (3, 17)]] * 18
    second = [[(3, 0), (3, 2), (3, 3), (3, 17)]] * 17 + [[(3, 0), (3, 3), (3, 4), (3, 17)]]
    middles = [8] * 7 + [14] * 4 + [15] * 2 + [16] * 3
    third = [[(3, middle), (3, 17)] for middle in middles] + [[(3, 17)]]
    chains = [*first, *second, *third]
    return ";".join(",".join(f"layer{stage}.{block}" for stage, block in chain) for chain in chains)


LISTED = {"resnet32": LISTED_32, "resnet110": listed_110()}


def code(**options: Any) -> dict[str, Any]:
    """Return the options of the released code, changed by ``options``."""
    return {**recipes.load("mlaan-code").options, **options}


def chain_parameters(made: Plan) -> int:
    """Return the number of elements of the trained copies."""
    return sum(p.numel() for head in heads(made) for p in getattr(head.module, "chain", nn.Module()).parameters())


# ------------------------------------------------------------------------------------------------------ the structure


# The code builds copies of 3,165,376 and 11,439,744 parameters. The first module's 220,224 are never used where copies
# lie before the heads of windows; without windows (its EMAPlus nets) all are. Measured by running it.
@pytest.mark.parametrize(("net", "alone", "cascaded"), [
    ("resnet32", 3165376, 2945152),
    ("resnet110", 11439744, 11219520),
])  # fmt: skip
def test_copied_blocks_have_the_reference_size(net: str, alone: int, cascaded: int) -> None:
    lam = plan(f"cifar/{net}", "mlaan", window=1, chains=LISTED[net])
    whole = plan(f"cifar/{net}", "mlaan", **code(chains=LISTED[net]))

    assert (chain_parameters(lam), chain_parameters(whole)) == (alone, cascaded)


# Heads of the code: resnetMLAAN on ResNet-32 has 26 with 13,380 parameters, on ResNet-110 104 with 53,680; its windows
# of three without copies (resnetDGL_DFLocalPlus) have 24 with 715,632, one convolution and two linear layers each.
@pytest.mark.parametrize(("net", "options", "count", "size"), [
    ("resnet32", {}, 26, 13380),
    ("resnet110", {}, 104, 53680),
    ("resnet32", {"window": 3, "lam": "none", "base": "1c2f"}, 24, 715632),
])  # fmt: skip
def test_heads_are_as_many_and_as_large_as_in_the_reference(net: str, options: dict, count: int, size: int) -> None:
    made = heads(plan(f"cifar/{net}", "mlaan", **code(**options)))

    readers = [getattr(head.module, "head", head.module) for head in made]
    assert (len(made), sum(p.numel() for reader in readers for p in reader.parameters())) == (count, size)


def test_the_rule_chooses_the_blocks_that_the_code_lists_but_for_four_segments() -> None:
    found = [head.facts["copies"] for head in heads(plan("cifar/resnet32", "mlaan", window=1))]

    listed = [chain.strip().split(",") for chain in LISTED_32.split(";")]
    other = {i: (mine, theirs) for i, (mine, theirs) in enumerate(zip(found, listed, strict=True)) if mine != theirs}
    assert set(other) == {0, 1, 3, 10}
    for i in (0, 1, 3):  # one block of the same shape instead of another
        assert other[i] == (["layer2.0", "layer3.0", "layer3.3", "layer3.4"],
                            ["layer2.0", "layer3.0", "layer3.2", "layer3.4"])  # fmt: skip
    assert other[10] == (["layer3.1", "layer3.2", "layer3.3", "layer3.4"], ["layer3.1", "layer3.2", "layer3.4"])


@pytest.mark.parametrize("net", ["cifar/resnet32", "tv/mobilenet_v2", "timm/convnext_atto"])
def test_no_chain_reaches_back_and_every_copy_fits_behind_the_one_before(net: str) -> None:
    made = plan(net, "mlaan", (3, 64, 64), window=1)

    order = {layer.name: layer for layer in made.segments.layout.layers}
    shapes = {name: layer.end.features if layer.end else None for name, layer in order.items()}
    for segment, head in zip(made.segments.segments, heads(made), strict=False):
        chain = head.facts["copies"]
        assert 1 <= len(chain) <= 4
        given = segment.features
        for name in chain:
            if name in order:  # the block in the last segment is called by the output
                assert order[name].index > segment.layers[1]
                assert [f.shape for f in order[name].start.features] == [f.shape for f in given]
                given = shapes[name]


class Unordered(nn.Module):
    """A block whose modules are used in another order than they are made."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.last(self.first(x).relu())

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.blocks = nn.Sequential(*(self.Block() for _ in range(blocks)))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x).relu()).mean((2, 3)))


def test_a_copy_computes_what_its_source_computes_and_orders_its_parameters_alike() -> None:
    model = Unordered(4)
    local = localize.transform(model, "mlaan", example_input=torch.empty(2, 3, 8, 8), window=1)
    x = torch.randn(2, 4, 8, 8)

    assert local.plan.copies
    for copy in local.plan.copies:
        part, source = local.heads[copy.block].get_submodule(copy.part), model.get_submodule(copy.source)
        assert [name for name, _ in part.named_parameters()] == [name for name, _ in source.named_parameters()]
        assert torch.equal(part(x), source(x))


def test_a_layer_of_several_modules_is_copied_module_by_module() -> None:
    made = plan("tv/vgg11_bn", "mlaan", (3, 32, 32), window=1)

    parts = {(copy.part, copy.source) for copy in made.copies if copy.block == "head_1"}
    assert {source for _, source in parts} >= {"features.8", "features.9"}  # a convolution and its BatchNorm
    copied = {f"{copy.block}.{copy.part}" for copy in made.copies}
    for head in heads(made):
        held = {f"{head.name}.chain.{name}" for name, _ in head.module.chain.named_parameters()}
        assert all(any(name.startswith(f"{part}.") for part in copied) for name in held)


@pytest.mark.parametrize("net", nets.ALL)
def test_blocks_of_small_nets_can_be_copied_whole(net: str) -> None:
    recorded = trace(nets.ALL[net](), torch.empty(2, 3, 8, 8), name=net)

    found = later_blocks(recorded, methods.create("mlaan").grain)

    assert found
    for block in found:
        copy = copy_of(block.part, recorded)
        held = [p for part, _ in block.sources for p in copy.get_submodule(part).parameters()]
        assert sum(p.numel() for p in held) == sum(p.numel() for p in copy.parameters())


# ---------------------------------------------------------------------------------------------------- who trains what


def local_resnet(**options: Any) -> LocalModel:
    return localize.transform(zoo.create_model("cifar/resnet20"), "mlaan", example_input=IMAGES.float(), **options)


def test_a_window_trains_its_segments_and_the_output_is_the_last_window() -> None:
    made = plan("cifar/resnet20", "mlaan")  # 9 segments

    routes = {loss.name: (loss.route.start, loss.route.stop) for loss in made.losses}
    assert list(routes.values()) == [(0, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7), (7, 7), (6, 8)]
    assert made.losses[0].reach == ("segment_0", "segment_1", "segment_2", "head_0", "cascade_2")
    assert [(term.head, term.at) for term in made.losses[0].terms] == [("head_0", 0), ("cascade_2", None)]
    assert [(term.head, term.at) for term in made.losses[-1].terms] == [("head_6", 6), (None, None)]


@pytest.mark.parametrize(("options", "kinds"), [
    ({}, {"head": 8, "cascade": 6}),
    ({"lam": "none"}, {"head": 8, "cascade": 6}),
    ({"window": 1}, {"head": 8}),
    ({"window": 2}, {"head": 8, "cascade": 7}),
    ({"independent": "windows"}, {"head": 6, "cascade": 6}),
    ({"w_indep": 0.0, "lam": "none"}, {"cascade": 6}),
])  # fmt: skip
def test_options_reach_both_modules_alone(options: dict, kinds: dict) -> None:
    made = plan("cifar/resnet20", "mlaan", **options)

    assert Counter(head.name.split("_")[0] for head in heads(made)) == kinds
    augmented = {head.name.split("_")[0] for head in heads(made) if "copies" in head.facts}
    assert augmented == (set() if options.get("lam") == "none" else {"head"})
    trained = {block for loss in made.losses for block in loss.reach}
    assert trained == {block.name for block in made.blocks}


@pytest.mark.parametrize("name", ["mlaan", "mlaan-code", "mlm", "lam"])
def test_recipes_say_where_copies_lie(name: str) -> None:
    made = plan("cifar/resnet20", "mlaan", **recipes.load(name).options)

    augmented = {head.name.split("_")[0] for head in heads(made) if "copies" in head.facts}
    assert augmented == {"mlaan": {"head"}, "mlaan-code": {"cascade"}, "mlm": set(), "lam": {"head"}}[name]
    assert {loss.route.stop - loss.route.start for loss in made.losses} == (
        {"mlaan": {0, 2}, "mlaan-code": {1}, "mlm": {0, 2}, "lam": {0}}[name]
    )


# The code runs the segments once more, for the independent losses: 2, 3, 3, ..., 3, 2 times with windows of two, and
# 2, 3, 4, ..., 4, 3, 2 with windows of three. Measured by running it.
@pytest.mark.parametrize(("window", "runs"), [
    (1, [1, 1, 1, 1, 1, 1, 1, 1, 1]),
    (2, [1, 2, 2, 2, 2, 2, 2, 2, 1]),
    (3, [1, 2, 3, 3, 3, 3, 3, 3, 1]),
])  # fmt: skip
def test_a_segment_runs_once_for_every_window_that_holds_it(window: int, runs: list) -> None:
    local = local_resnet(window=window).train()
    blocks = [*local.trunk.layer1, *local.trunk.layer2, *local.trunk.layer3]
    counts = [0] * len(blocks)

    def count(i: int) -> Any:
        def hook(*_: Any) -> None:
            counts[i] += 1

        return hook

    for i, block in enumerate(blocks):
        block.conv1.register_forward_hook(count(i))

    local.step(IMAGES.float(), TARGET, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))

    assert counts == runs
    assert [block.bn1.num_batches_tracked.item() for block in blocks] == runs


VARIANTS = {
    "defaults": {"window": 2},
    "lam": {"window": 1},
    "code": {"window": 2, "lam": "cascade", "lam_form": "parallel", "pull": "before"},
    "last_only": {"window": 2, "lam_form": "parallel", "ema_update": "last_only"},
    "mlm": {"window": 2, "lam": "none", "independent": "windows"},
}
PAIRS = [(net, variant) for net in nets.ALL for variant in VARIANTS if net != "TwoStreams" or variant == "mlm"]


@pytest.mark.parametrize(("net", "variant"), PAIRS)
def test_it_passes_the_whole_audit_with_windows_that_fit(net: str, variant: str) -> None:
    example = torch.empty(2, 3, 8, 8)
    local = localize.transform(nets.ALL[net](), "mlaan", example_input=example, **VARIANTS[variant]).train()

    localize.audit(local, (torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0]))).raise_if_failed()


def test_a_net_whose_last_segment_is_no_block_is_refused() -> None:
    with pytest.raises(MethodError, match="no block after segment 5 .* can be copied.*\n.*\n.*\n.*lam='none'"):
        localize.transform(nets.TwoStreams(), "mlaan", example_input=torch.empty(2, 3, 8, 8))


@pytest.mark.parametrize("window", [3, 4])
def test_segments_that_begin_no_window_have_losses_of_their_own(window: int) -> None:
    local = localize.transform(Unordered(6), "mlaan", example_input=torch.empty(2, 3, 8, 8), window=window).train()

    alone = [loss.route.start for loss in local.plan.losses if loss.route.start == loss.route.stop]
    assert alone == list(range(7 - window, 5))
    localize.audit(local, (torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0]))).raise_if_failed()


# ----------------------------------------------------------------------------------------------------------- the pulls


def test_a_pull_is_the_reference_s_moving_average() -> None:
    copy, source = nn.Linear(4, 1, bias=False).double(), nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        copy.weight.copy_(det((1, 4), 60))
        source.weight.copy_(det((1, 4), 61))

    # numbers of the code's moving average with m = 0.995
    ops.pull(copy, source, 0.995)
    close(copy.weight[0], [0.21277333599840095, 0.4022746352188687, 0.652143713771737, 0.9623805716570057], 1e-9)
    ops.pull(copy, source, 0.995)
    close(copy.weight[0], [0.21287377073755745, 0.402389986008395, 0.652277958225065, 0.9625376873875674], 1e-9)


def close(found: Any, expected: Any, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=0
    )


@pytest.mark.parametrize("pull", ["after", "before"])
@pytest.mark.parametrize("form", ["pulled", "parallel"])
def test_copies_are_trained_and_pulled_in_the_order_that_is_asked_for(pull: str, form: str) -> None:
    m, lr = 0.9, 0.1
    local = local_resnet(ema=m, pull=pull, lam_form=form).double().train()
    with torch.no_grad():
        for parameter in local.heads.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    before = {name: p.detach().clone() for name, p in local.named_parameters()}

    local.step(IMAGES, TARGET, torch.optim.SGD(local.param_groups(lr=lr), lr=lr))

    pulled = [copy for copy in local.plan.copies if copy.decay is not None]
    assert {copy.part.split(".")[0] for copy in pulled} == {"chain" if form == "pulled" else "average"}
    for copy in pulled:
        path = f"heads.{copy.block}.{copy.part}"
        for name, after in local.get_submodule(path).named_parameters():
            own, theirs = before[f"{path}.{name}"], before[f"trunk.{copy.source}.{name}"]
            trained = 0.0 if after.grad is None else lr * after.grad
            assert (form == "parallel") == (after.grad is None)
            if pull == "after":
                now = local.get_parameter(f"trunk.{copy.source}.{name}").detach()
                expected = m * (own - trained) + (1 - m) * now
                assert not torch.equal(now, theirs)
            else:
                expected = m * own + (1 - m) * theirs - trained
            torch.testing.assert_close(after.detach(), expected, rtol=1e-12, atol=1e-14)


def test_only_the_last_chain_is_pulled_if_asked_for() -> None:
    for options in ({}, code()):
        made = plan("cifar/resnet20", "mlaan", **{**options, "ema_update": "last_only"})
        pulled = {copy.block for copy in made.copies if copy.decay is not None}
        assert pulled == {"cascade_7" if options else "head_7"}
        assert len({copy.block for copy in made.copies}) > 1


# --------------------------------------------------------------------------------------------------------- a whole step

# One iteration of resnetMLAAN (windows of two, weights 0.001 and 0.999) on ResNet-32 in float64, with the weights and
# images of tests.golden: independent and cascaded loss of the modules 1 to 13, then the norms of gradients.
LOSSES = [2.3104241281948608, 4.148938363366073, 3.1799752979527107, 4.10131030234813, 2.3948441007851677,
          3.545482712121668, 2.5476406207777114, 1.8836833243334643, 2.259360636822683, 4.849505841639791,
          2.2375666289553937, 4.698058921586769, 2.375859054200144, 6.307470584606786, 2.258906170628056,
          1.8343586243503882, 2.6204375144784624, 3.7884161583819695, 2.535568609037755, 3.7649898621270355,
          3.81717569584508, 5.243457215222817, 3.0517045510402747, 7.01375715036138, 3.7947615354503212,
          5.335127250756352]  # fmt: skip
FINAL = 3.629341714422564
STEM, CLASSIFIER = 4.24877922365664, 6.44846244811558
BLOCKS = [3.901165790985593, 4.2523577828564125, 3.3089599060969266, 2.6291007764554744, 3.0736762200547663,
          6.532118164653665, 6.424698207808477, 5.064488696948875, 4.397833192361304, 4.451761349951451,
          9.264777688326166, 8.331301691570944, 7.022022457266932, 4.766826050577435, 1.705953957885233]  # fmt: skip
CHAINS = [5.217368374434195, 4.703067522501051, 4.251123478322133, 4.092970174860852, 4.389795783338875,
          4.362531962296427, 4.80053695872341, 3.7790587604780406, 4.205149439150415, 3.5844352228203267,
          3.728419973122344, 2.9451015773408904, 1.899167980978308]  # fmt: skip
SUM_BEFORE, SUM_AFTER, SUM_OF_THE_SOURCE = 74140.6040637606, 73770.6840637606, 156.60406376060985


def parameter_sum(module: nn.Module) -> float:
    return sum(parameter.sum().item() for parameter in module.parameters())


def test_one_step_equals_the_reference() -> None:
    model = zoo.create_model("cifar/resnet32").double()
    options = code(chains=LISTED_32, ema_update="last_only")
    local = localize.transform(model, "mlaan", example_input=IMAGES, **options).train()
    numbered = [(local.heads[f"head_{i}"], local.heads[f"cascade_{i}"]) for i in range(1, 14)]
    linear = [layer for independent, cascaded in numbered for layer in (independent, cascaded.head)]
    assert fill([model, *linear]) == 187
    for copy in local.plan.copies:
        part = local.heads[copy.block].get_submodule(copy.part)
        part.load_state_dict(model.get_submodule(copy.source).state_dict())
    averages = [cascaded.average for _, cascaded in numbered]
    with torch.no_grad():
        for parameter in averages[-1].parameters():
            parameter.add_(1.0)
    others = [parameter_sum(average) for average in averages[:-1]]
    close([parameter_sum(averages[-1]), parameter_sum(model.layer3[4])], [SUM_BEFORE, SUM_OF_THE_SOURCE])
    found: dict[nn.Module, Tensor] = {}
    for head in local.heads.values():
        head.register_forward_hook(lambda head, _, scores: found.update({head: F.cross_entropy(scores, TARGET)}))

    result = local.step(IMAGES, TARGET, torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))

    losses = [found[head].item() for pair in numbered for head in pair]
    close([*losses, F.cross_entropy(result.logits, TARGET)], [*LOSSES, FINAL])
    blocks = [*model.layer1, *model.layer2, *model.layer3]
    close([gradient_norm(model.conv1, model.bn1), gradient_norm(model.fc)], [STEM, CLASSIFIER])
    close([gradient_norm(block) for block in blocks], BLOCKS)
    close([gradient_norm(cascaded.chain) for _, cascaded in numbered], CHAINS)
    close(parameter_sum(averages[-1]), SUM_AFTER)
    assert [parameter_sum(average) for average in averages[:-1]] == others


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_window_that_is_the_whole_model_is_refused() -> None:
    with pytest.raises(MethodError, match="a window of 9 segments is all of cifar/resnet20.*\n.*window=5 or less$"):
        plan("cifar/resnet20", "mlaan", window=9)
    with pytest.raises(MethodError, match="window=8 or less$"):
        plan("cifar/resnet20", "mlaan", window=9, independent="windows")


def test_a_window_that_is_most_of_the_model_leaves_no_place_for_the_independent_losses_behind_it() -> None:
    with pytest.raises(
        MethodError,
        match="segment_4 lies inside the first window and begins no window.*\n.*\n.*window=5 or less, or indep",
    ):
        plan("cifar/resnet20", "mlaan", window=6)

    assert plan("cifar/resnet20", "mlaan", window=5)
    assert plan("cifar/resnet20", "mlaan", window=6, independent="windows")


@pytest.mark.parametrize(("options", "message"), [
    ({"ema": 1.5}, "cannot keep ema=1.5"),
    ({"window": 1, "w_indep": 0.0, "lam": "none"}, "nothing is trained"),
    ({"w_indep": 0.0}, "w_indep=0 leaves these out"),
    ({"window": 1, "lam": "cascade"}, "window=1 has none"),
    ({"chains": "layer2.0"}, "chains does not name the blocks of every segment.*\n.*has 8 such segments, .* of 1"),
    ({"chains": ";;;;;;;"}, "chains names no block for segment 0"),
    ({"chains": "layer2.9;;;;;;;"}, "no block 'layer2.9'.*\n.*\n.*did you mean"),
    ({"chains": "layer3.0;;;;;;;"}, "a copy of 'layer3.0' does not fit after layer1.0.\n.*takes 32x16x16.*16x32x32"),
    ({"chains": "layer2.0,layer2.2,layer3.1;;;;;;;"}, "'layer3.1' does not fit after layer2.2"),
    ({"chains": "layer1.1;layer1.1;;;;;;"}, "'layer1.1' does not lie after segment 1"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan("cifar/resnet20", "mlaan", **options)


class Narrowing(nn.Module):
    """A chain of convolutions no two of which have the same shapes; nothing behind the third cut is a block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3 if i == 0 else 4 + i, 5 + i, 3, 1, 1) for i in range(4)])
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.fc(x.mean((2, 3)))


def test_a_segment_without_a_block_to_copy_behind_it_is_refused() -> None:
    transform = {"example_input": torch.empty(2, 3, 8, 8), "cut": CutSpec(by="node"), "window": 1}
    with pytest.raises(
        MethodError, match="no block after segment .* of Narrowing can be copied.*\n.*\n.*\n.*lam='none'"
    ):
        localize.transform(Narrowing(), "mlaan", **transform)

    assert localize.transform(Narrowing(), "mlaan", lam="none", **transform)


def test_recorded_trunks_stay_as_they_are() -> None:
    recorded = trunk("cifar/resnet20")
    text = str(recorded.graph)

    plan("cifar/resnet20", "mlaan")

    assert str(recorded.graph) == text
