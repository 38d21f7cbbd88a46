"""Train a ResNet by local losses in a plain PyTorch loop, check every gradient, and take the plain model out.

Run it with ``python examples/01_train_digits.py`` (a few minutes on two cores). It prints, for its three epochs, the
loss of the last segment and the test accuracy at the first, a middle and the last segment, then::

    audit: all checks hold
    exported: CifarResNet with 272474 parameters, original keys
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch.utils.data import DataLoader

import localize
from localize.train import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="two steps, for the tests")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    digits = data.load("digits", (3, 32, 32))
    loader = DataLoader(digits.train, batch_size=64, shuffle=True, drop_last=True)
    images, labels = digits.test[:]

    model = localize.zoo.create_model("cifar/resnet20", num_classes=digits.num_classes)
    local = localize.transform(model, "auglocal", example_input=images[:2], d=2)
    optimizer = torch.optim.SGD(local.param_groups(lr=0.05, weight_decay=1e-4), lr=0.05, momentum=0.9, nesterov=True)

    for epoch in range(1 if arguments.smoke else arguments.epochs):
        local.train()
        for x, y in itertools.islice(loader, 2 if arguments.smoke else None):
            result = local.step(x, y, optimizer)
        local.eval()
        scores = local.scores(images)
        depths = list(scores)[:: len(scores) // 2]
        accuracies = {name: float((scores[name].argmax(1) == labels).float().mean()) for name in depths}
        print(f"epoch {epoch}: loss {float(list(result.losses.values())[-1]):.3f}", accuracies)

    local.train()
    localize.audit(local, (x[:8], y[:8])).raise_if_failed()
    print("audit: all checks hold")
    trained = local.export()
    size = sum(parameter.numel() for parameter in trained.parameters())
    print(f"exported: {type(trained).__name__} with {size} parameters, original keys")


if __name__ == "__main__":
    main()
