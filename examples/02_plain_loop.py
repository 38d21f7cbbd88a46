"""The smallest loop: ten lines from a model to one that local losses have trained.

Run it with ``python examples/02_plain_loop.py`` (seconds). Only two lines differ from a loop of backpropagation: that
of ``localize.transform``, and that of ``local.step``, which is zero_grad, forward, one backward per loss, and update.
It prints the mean of the local losses in the last step of every epoch, and ends with::

    the model itself is trained: CifarResNet, test accuracy ...
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader

import localize
from localize.train import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    digits = data.load("digits", (3, 8, 8))
    loader = DataLoader(digits.train, batch_size=64, shuffle=True, drop_last=True)
    model = localize.zoo.create_model("cifar/resnet20", num_classes=10)
    local = localize.transform(model, "auglocal", example_input=digits.train[:2][0], cut=localize.CutSpec(4), d=2)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.05, weight_decay=1e-4), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for x, y in loader:
            result = local.step(x, y, optimizer)
        print(f"loss {sum(result.losses.values()) / len(result.losses):.3f}")

    images, labels = digits.test[:]
    accuracy = (model.eval()(images).argmax(1) == labels).float().mean()
    print(f"the model itself is trained: {type(model).__name__}, test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
