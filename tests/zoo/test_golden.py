"""One iteration of the trunks equals the authors' code, float64, with the deterministic weights of ``tests.golden``.

Recorded with torch 2.15.0 on CPU. Tolerance 1e-6: recordings are exact to float64 round-off, which deep sums amplify.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localize import zoo
from tests.golden import det, fill

IMAGES = det((4, 3, 32, 32), 2)
TARGET = torch.tensor([0, 3, 7, 9])


def close(actual: Tensor | list[float] | float, expected: list[float] | float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


def gradient_norm(module: nn.Module) -> float:
    return torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item()


def test_det_gives_the_values_it_is_defined_by():
    expected = [-0.97841295, -0.96582051, -0.94003598, -0.90105936, -0.84889067, -0.78352988]
    torch.testing.assert_close(det((2, 3), 1).flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-9)


# ChenxiangMA/AugLocal @98c90d6, ResNet-32 with local_module_num 1.
def test_backpropagation_through_resnet32_equals_the_reference():
    model = zoo.create_model("cifar/resnet32").double()
    assert fill([model]) == 135

    logits = model(IMAGES)
    loss = F.cross_entropy(logits, TARGET)
    loss.backward()

    close(loss.detach(), 3.629341714422564)
    close(
        logits[0].detach(),
        [
            -1.8608064756259883,
            0.7860058708296345,
            -2.3581218562601096,
            0.43538998379270233,
            1.3485896925524739,
            1.808197217424251,
            1.5917531897893318,
            0.7533689468989229,
            -0.8106437387068965,
            -1.597537549064699,
        ],
    )
    stem = nn.ModuleList([model.conv1, model.bn1])
    blocks = [stem, *model.layer1, *model.layer2, *model.layer3]
    close(
        [gradient_norm(block) for block in blocks],
        [
            15.052043877365906,
            14.270503449207844,
            10.381790147520698,
            7.608227428911547,
            5.962349987827939,
            4.827680544742574,
            8.04542933584052,
            5.984857547454147,
            4.4938511456342,
            3.5040304001214047,
            2.862681016537422,
            4.4286399416296724,
            3.3496262834464927,
            2.6479836236092713,
            2.1070709296889256,
            1.705953957885233,
        ],
    )
    close(gradient_norm(model.fc), 6.44846244811558)


# anokland/local-loss @7b3b40b, VGG8B on CIFAR-10, dropout 0. schoi828/DCL @ef169c8 gives the same loss with ReLU.
@pytest.mark.parametrize(
    ("activation", "loss", "logits"),
    [
        (
            "relu",
            7.296055201368857,
            [
                -1.2882379494037384,
                -3.5419417929487174,
                -1.5999576364199495,
                5.331219595925092,
                -3.687337994589644,
                0.8163862336059304,
                3.155426894747025,
                -5.033314664016751,
                0.5842238553976555,
                2.2964608728390283,
            ],
        ),
        (
            "leaky",
            7.3398894094949405,
            [
                -1.5100554685837295,
                -3.488929441221271,
                -1.6849104700192872,
                5.00102515036487,
                -3.3350634954096536,
                1.3181863320441944,
                3.342893286174949,
                -5.400498927187974,
                0.7884518801918974,
                2.255517693562333,
            ],
        ),
    ],
)
def test_the_forward_of_vgg8b_equals_the_reference(activation: str, loss: float, logits: list[float]):
    model = zoo.create_model("cifar/vgg8b", activation=activation).double()
    assert fill([model]) == 116

    with torch.no_grad():
        output = model(IMAGES)

    close(F.cross_entropy(output, TARGET), loss)
    close(output[0], logits)


# schoi828/DCL @ef169c8, FC on MNIST; the reference applies ReLU to the logits.
@pytest.mark.parametrize(("relu_logits", "loss"), [(True, 6.1152985144502106), (False, 6.346761091522502)])
def test_the_forward_of_the_fc_net_equals_the_reference(relu_logits: bool, loss: float):
    model = zoo.create_model("cifar/fc_mnist", relu_logits=relu_logits).double()
    assert fill([model]) == 106

    with torch.no_grad():
        close(F.cross_entropy(model(det((4, 1, 28, 28), 3)), TARGET), loss)
