"""Fine-tune a pretrained timm backbone by local losses.

The weights come from timm (``--pretrained``, which downloads them) or from a file (``--initial-checkpoint FILE``: a
state dict of the plain model; without a network, copy it here). The heads are new, and so is a classifier of another
number of classes: heads learn at 10 times the rate of the backbone::

    python examples/03_finetune_pretrained.py timm/resnet18 --pretrained
    python examples/03_finetune_pretrained.py timm/test_resnet --initial-checkpoint weights.pt -o tuned.pt

It prints what was loaded, the mean of the local losses and the test accuracy after every epoch, and where it has
written the fine-tuned model, under timm's own keys.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader

import localize
from localize.train import data
from localize.zoo import weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="timm/NAME: localize models 'timm/*'")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pretrained", action="store_true", help="weights that timm publishes")
    source.add_argument("--initial-checkpoint", metavar="FILE", help="weights in a file")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=0.01, help="of the backbone")
    parser.add_argument("--output", "-o", metavar="FILE", help="where to write the fine-tuned state dict")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    digits = data.load("digits", (3, arguments.size, arguments.size))
    loader = DataLoader(digits.train, batch_size=64, shuffle=True, drop_last=True)
    images, labels = digits.test[:]

    shape = tuple(images.shape[1:])
    model = localize.zoo.create_model(
        arguments.model, digits.num_classes, input_shape=shape, pretrained=arguments.pretrained
    )
    if arguments.initial_checkpoint:
        print(weights.load_file(model, arguments.initial_checkpoint, digits.num_classes))

    cut = localize.CutSpec(segments=arguments.segments)
    local = localize.transform(model, "auglocal", example_input=images[:2], cut=cut, d=2)
    trunk, heads = local.param_groups(lr=arguments.lr, weight_decay=1e-4)
    heads["lr"] = 10 * arguments.lr
    optimizer = torch.optim.SGD([trunk, heads], lr=arguments.lr, momentum=0.9)

    for epoch in range(arguments.epochs):
        local.train()
        total = 0.0
        for x, y in loader:
            total += float(torch.stack(list(local.step(x, y, optimizer).losses.values())).mean())
        with torch.no_grad():
            accuracy = (local.eval()(images).argmax(1) == labels).float().mean()
        print(f"epoch {epoch}: loss {total / len(loader):.3f}, test accuracy {accuracy:.3f}")

    if arguments.output:
        torch.save(local.export().state_dict(), arguments.output)
        print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
