"""DCL reproduces the numbers of the reference code (schoi828/DCL at ef169c8)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import localize
from localize import zoo
from localize.errors import OptionError
from localize.heads.dictionary import DictionaryScores
from localize.ir import Features
from localize.runtime.model import LocalModel
from tests.golden import det, fill
from tests.plans import gradient_norm, heads, plan

IMAGES, TARGET = det((4, 3, 32, 32), 2), torch.tensor([0, 3, 7, 9])
Y6 = torch.tensor([0, 1, 2, 0, 1, 2])


def close(found: Any, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=0
    )


# --------------------------------------------------------------------------------------------------- scores and losses

MAP = Features("map", (4, 2, 3), 1)


@pytest.mark.parametrize(
    ("features", "h", "dictionary", "options", "loss"),
    [
        (MAP, det((6, 4, 2, 3), 31), det((3, 8), 30), {}, 1.1313126440994121),
        (MAP, det((6, 4, 2, 3), 31), det((3, 10), 32), {}, 1.057681780440107),
        (MAP, det((6, 4, 2, 3), 31), det((3, 3), 33), {}, 1.11685343570237),
        (MAP, det((6, 4, 2, 3), 31), det((3, 8), 30), {"cosine": True}, 1.668057569242564),
        (Features("flat", (12,), 1), det((6, 12), 34), det((3, 4), 35), {"k": 3}, 1.3106721510060206),
        (Features("flat", (12,), 1), det((6, 12), 34), det((3, 12), 36), {}, 1.8957051252931336),
        (Features("tokens", (4, 5), 1), det((6, 4, 5), 37), det((3, 8), 30), {}, 1.1106972872961276),
        (Features("tokens", (5, 4), 2), det((6, 4, 5), 37).transpose(1, 2), det((3, 8), 30), {}, 1.1106972872961276),
        (Features("map", (2, 3, 4), 3), det((6, 4, 2, 3), 31).movedim(1, 3), det((3, 8), 30), {}, 1.1313126440994121),
    ],
    ids=["map", "not-divisible", "narrower", "cosine", "segments", "one-segment", "channels-first", "tokens", "nhwc"],
)
def test_the_dictionary_loss_equals_the_reference(
    features: Features, h: torch.Tensor, dictionary: torch.Tensor, options: dict, loss: float
) -> None:
    scores = DictionaryScores([features], dictionary.shape[1], **options)(h, dictionary)

    close(F.cross_entropy(scores, Y6), loss)


def test_the_gradient_of_the_dictionary_equals_the_reference() -> None:
    h, dictionary = det((6, 4, 2, 3), 31).requires_grad_(), det((3, 8), 30).requires_grad_()

    F.cross_entropy(DictionaryScores([MAP], 8)(h, dictionary), Y6).backward()

    close(h.grad.norm(), 0.10269117278324381)
    close(dictionary.grad.norm(), 0.07281593532047191)
    close(dictionary.grad[0, :4], [0.006515019221358245] * 2 + [-0.010831012021141367] * 2)


def test_a_class_token_is_the_only_vector_that_is_read() -> None:
    tokens, dictionary = det((6, 5, 4), 41), det((3, 4), 42)

    scores = DictionaryScores([Features("tokens", (5, 4), 2, "class")], 4)(tokens, dictionary)

    close(scores, tokens[:, 0] @ dictionary.T)


# ---------------------------------------------------------------------------------------------------------- one step

LOSSES = [6.794383342344053, 33.435289455231114, 12.919501115185344, 66.36923341670834, 66.76349222074484,
          72.29148930661427, 32.67041763826103, 7.296055201368857]  # fmt: skip
MOVING = [6.794383342344053, 33.16906173538556, 12.714681654859447, 64.78469631291172, 64.65756092397642,
          69.82231098890166, 31.88433872587269, 7.296055201368857]  # fmt: skip
NORMS = [6.966039509689592, 48.735924165060005, 20.578911096377276, 156.80504764793147]


def vgg8b(images: torch.Tensor = IMAGES, net: str = "cifar/vgg8b", **options: Any) -> LocalModel:
    local = localize.transform(zoo.create_model(net).double(), "dcl", example_input=images, **options).train()
    fill([local.trunk])
    with torch.no_grad():
        local.heads.dictionary.weight.copy_(3 * det(tuple(local.heads.dictionary.weight.shape), 90))
    return local


def adamw(local: LocalModel, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(local.param_groups(lr=lr, weight_decay=0.01))


@pytest.mark.parametrize(
    ("lr", "options", "expected"),
    [
        (0.0, {}, LOSSES),
        (5e-4, {}, MOVING),
        (5e-4, {"dictionary": "static"}, LOSSES),
        (5e-4, {"update": "end"}, LOSSES),
        (5e-4, {"dictionary": "last"}, LOSSES),
    ],
    ids=["lr0", "adaptive", "static", "end", "last"],
)
def test_the_dictionary_moves_after_every_layer_as_in_the_reference(lr: float, options: dict, expected: list) -> None:
    local = vgg8b(**options)

    result = local.step(IMAGES, TARGET, adamw(local, lr))

    close(list(result.losses.values()), expected, rtol=1e-6)


def test_a_delayed_dictionary_is_that_of_the_batch_before_last() -> None:
    """Layers before the last intermediate one read what it was when the batch before began."""
    local = vgg8b(dictionary="last", delay=1)
    with torch.no_grad():
        local.heads.delayed_dictionary.weight.copy_(local.heads.dictionary.weight)
    optimizer, was = adamw(local, 5e-4), []

    for _ in range(3):
        was.append(local.heads.dictionary.weight.detach().clone())
        read = local.heads.delayed_dictionary.weight.detach().clone()
        local.step(IMAGES, TARGET, optimizer)

        assert torch.equal(read, was[max(0, len(was) - 2)])
    assert not torch.equal(was[1], was[2])


def test_without_a_delay_the_first_step_is_the_same_bit_for_bit() -> None:
    late, now = vgg8b(dictionary="last", delay=1), vgg8b(dictionary="last")
    with torch.no_grad():
        late.heads.delayed_dictionary.weight.copy_(late.heads.dictionary.weight)
    for local in (late, now):
        local.step(IMAGES, TARGET, adamw(local, 5e-4))

    found = late.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in now.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delay": 1}, "delay=1 is for dictionary=last, and dictionary is adaptive"),
        ({"delay": 1, "dictionary": "static"}, "nothing trains it"),
        ({"delay": 2, "dictionary": "last"}, "one batch late at most"),
    ],
)
def test_what_a_delay_is_not_for_is_refused(options: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        vgg8b(**options)


def test_the_dictionary_after_one_step_equals_the_reference() -> None:
    local = vgg8b()

    local.step(IMAGES, TARGET, adamw(local, 5e-4))

    close(local.heads.dictionary.weight.detach().sum(), 117.56546404332076)
    close(local.heads.dictionary.weight.detach().square().sum(), 15774.441668102301)


def test_gradients_of_the_layers_equal_the_reference() -> None:
    local = vgg8b(update="end")

    local.step(IMAGES, TARGET, adamw(local, 0.0))

    layers = [local.trunk.layer1, local.trunk.layer2, local.trunk.layer3, local.trunk.layer4]
    close([gradient_norm(layer) for layer in layers], NORMS, rtol=1e-6)


def test_fully_connected_nets_take_segments_of_their_features() -> None:
    images = det((4, 1, 28, 28), 3)
    local = vgg8b(images, "cifar/fc_mnist", k=8)

    result = local.step(images, TARGET, adamw(local, 0.0))

    # The reference has a ReLU on the logits, which makes its last loss 6.115; without it, this is its value.
    expected = [25.735183903727393, 62.902599700320756, 6.346761091522502]
    close(list(result.losses.values()), expected, rtol=1e-6)


def test_shared_moments_differ_from_the_reference_from_the_third_layer_on() -> None:
    local = vgg8b(moments="shared")

    losses = torch.stack(list(local.step(IMAGES, TARGET, adamw(local, 5e-4)).losses.values()))

    close(losses[:2], MOVING[:2], rtol=1e-6)
    assert not torch.allclose(losses[2:7], torch.tensor(MOVING[2:7], dtype=torch.float64), rtol=1e-6)


def test_the_states_of_the_dictionary_survive_a_checkpoint() -> None:
    torch.manual_seed(1)
    local = vgg8b()
    optimizer = adamw(local, 5e-4)
    local.step(IMAGES, TARGET, optimizer)
    saved = copy.deepcopy({"model": local.state_dict(), "optimizer": optimizer.state_dict()})
    local.step(IMAGES, TARGET, optimizer)

    resumed = vgg8b()
    resumed.load_state_dict(saved["model"])
    optimizer = adamw(resumed, 5e-4)
    optimizer.load_state_dict(saved["optimizer"])
    resumed.step(IMAGES, TARGET, optimizer)

    assert torch.equal(resumed.heads.dictionary.weight, local.heads.dictionary.weight)


# --------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("net", "shape", "options", "dictionary"),
    [
        ("cifar/conv256_mnist", (1, 28, 28), {}, (10, 256)),
        ("cifar/conv512_cifar100", (3, 32, 32), {}, (100, 512)),
        ("cifar/fc_mnist", (1, 28, 28), {"k": 8}, (10, 128)),
        ("cifar/fc_cifar10", (3, 32, 32), {"k": 48}, (10, 64)),
        ("cifar/fc_cifar100", (3, 32, 32), {"k": 12}, (100, 256)),
        ("cifar/vgg8b", (3, 32, 32), {}, (10, 512)),
        ("cifar/vgg8b_stl10", (3, 96, 96), {}, (10, 512)),
        ("cifar/resnet32", (3, 32, 32), {}, (10, 64)),
        ("cifar/vit", (3, 32, 32), {}, (10, 512)),
    ],
)
def test_the_dictionary_is_all_that_dcl_adds(net: str, shape: tuple, options: dict, dictionary: tuple) -> None:
    made = plan(net, "dcl", shape, **options)

    added = sum(block.size for block in made.blocks if block.role != "segment")
    assert added == dictionary[0] * dictionary[1]
    assert made.block("dictionary").facts["shape"] == list(dictionary)


def test_layerwise_dictionaries_have_the_width_of_their_layer() -> None:
    made = plan("cifar/vgg8b", "dcl", dictionary="layerwise")

    # 10 classes x (128 + 256 + 256 + 512 + 512 + 512) as the paper counts, and fc7, which it leaves out.
    assert sum(block.size for block in made.blocks if block.role == "shared") == 21760 + 5120


def test_resnet32_has_fifteen_local_losses() -> None:
    assert len(plan("cifar/resnet32", "dcl").losses) == 15 + 1


def test_averaging_scales_the_dictionary_s_gradient_by_the_number_of_layers() -> None:
    summed, averaged = vgg8b(update="end"), vgg8b(dictionary="averaged")
    for local in (summed, averaged):
        local.step(IMAGES, TARGET, adamw(local, 0.0))

    close(averaged.heads.dictionary.weight.grad * 7, summed.heads.dictionary.weight.grad)


def test_projection_heads_are_trained_by_their_own_loss() -> None:
    made = plan("cifar/vgg8b", "dcl", reduce="projection")

    assert [head.size for head in heads(made)][:2] == [512 * 128 + 128, 512 * 256 + 256]
    assert "head_0" in made.losses[0].reach


def test_layerwise_prediction_needs_no_classifier() -> None:
    local = vgg8b()
    optimizer = adamw(local, 0.0)

    scores = local.scores(IMAGES)

    assert scores["loss_6"].argmax(1).tolist() == [5, 4, 2, 3]
    close(scores["loss_6"], local.step(IMAGES, TARGET, optimizer).scores["loss_6"])


def test_features_that_do_not_divide_are_refused() -> None:
    with pytest.raises(OptionError, match="1024 features of .* cannot be cut into k=3 equal parts"):
        plan("cifar/fc_mnist", "dcl", (1, 28, 28), k=3)


def test_static_embeddings_start_orthogonal_and_as_long_as_asked_for() -> None:
    model = zoo.create_model("cifar/conv256")
    local = localize.transform(
        model, "dcl-s", example_input=torch.empty(2, 3, 32, 32), start="orthogonal", norm=16.52**0.5
    )

    gram = local.heads.dictionary.weight @ local.heads.dictionary.weight.T
    torch.testing.assert_close(gram, 16.52 * torch.eye(10), rtol=1e-4, atol=1e-4)


def test_a_vector_that_the_widest_map_does_not_divide_is_cut_into_fewer_segments() -> None:
    local = localize.transform(zoo.create_model("tv/alexnet"), "dcl", example_input=torch.zeros(2, 3, 64, 64))

    widths = {f.shape for s in local.plan.segments.segments for f in s.features if f.kind == "flat"}
    ks = [head.k for head in local.heads.values() if getattr(head, "k", 1) > 1]
    assert (widths, ks) == ({(4096,)}, [8, 8])  # 4096 // 384 is 10, which does not divide 4096
