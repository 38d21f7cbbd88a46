"""L_feat reproduces the numbers of the reference code (schoi828/DCL at ef169c8)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import localize
from localize import losses, zoo
from localize.heads.projection import MeanVector
from localize.ir import Features
from tests.golden import det, fill
from tests.plans import gradient_norm, plan

Y6 = torch.tensor([0, 1, 2, 0, 1, 2])
IMAGES = det((4, 3, 32, 32), 2)


def close(found: Tensor | float, expected: float, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=0
    )


def test_the_loss_of_a_feature_map_and_its_gradient_equal_the_reference() -> None:
    h = det((6, 5, 2, 2), 21).requires_grad_()

    loss = losses.supervised_contrastive(MeanVector([Features("map", (5, 2, 2), 1)])(h), Y6)
    loss.backward()

    close(loss.detach(), 9.376482183514407)
    close(h.grad.norm(), 17.22842011023051)


def test_a_flat_vector_is_taken_whole() -> None:
    vectors = MeanVector([Features("flat", (12,), 1)])(det((6, 12), 22))

    close(losses.supervised_contrastive(vectors, Y6), 3.4713160091170905)


def step(labels: list[int], **options: object) -> tuple[localize.LocalModel, dict[str, Tensor]]:
    model = zoo.create_model("cifar/vgg8b").double()
    local = localize.transform(model, "feat", example_input=IMAGES, update="end", **options).train()
    fill([local.trunk])
    result = local.step(IMAGES, torch.tensor(labels), torch.optim.SGD(local.param_groups(lr=0.0), lr=0.0))
    return local, result.losses


# One iteration of the reference code: four images of four classes have nothing in common; only the classifier trains.
def test_images_of_different_classes_give_no_gradient() -> None:
    local, found = step([0, 3, 7, 9])

    assert [found[f"loss_{i}"].item() for i in range(7)] == [0.0] * 7
    assert [gradient_norm(getattr(local.trunk, f"layer{i}")) for i in range(1, 8)] == [0.0] * 7
    close(found["loss_7"], 7.296055201368857, rtol=1e-6)
    close(gradient_norm(local.trunk.fc), 13.265491158368691, rtol=1e-6)


def test_the_loss_of_a_layer_is_read_behind_its_pooling() -> None:
    local, found = step([0, 0, 1, 1])

    h = local.trunk.layer2(local.trunk.layer1(IMAGES)).mean((2, 3))
    expected = losses.supervised_contrastive(torch.nn.functional.normalize(h, dim=1), torch.tensor([0, 0, 1, 1]))
    close(found["loss_1"], expected.item())


def test_the_mean_over_pairs_of_the_equation_is_an_option() -> None:
    labels = [0, 0, 0, 1]
    (_, code), (local, pairs) = step(labels), step(labels, form="pairs")

    h = torch.nn.functional.normalize(local.trunk.layer1(IMAGES).mean((2, 3)), dim=1)
    close(pairs["loss_0"], losses.pair_contrastive(h, torch.tensor(labels)).item())
    close(code["loss_0"], losses.supervised_contrastive(h, torch.tensor(labels)).item())


@pytest.mark.parametrize(
    ("net", "shape", "layers"),
    [("cifar/vgg8b", (3, 32, 32), 7), ("cifar/conv256", (3, 32, 32), 2), ("cifar/fc_mnist", (1, 28, 28), 2)],
)
def test_it_adds_no_parameters(net: str, shape: tuple, layers: int) -> None:
    made = plan(net, "feat", shape)

    assert sum(block.size for block in made.blocks if block.role != "segment") == 0
    assert len(made.losses) == layers + 1
