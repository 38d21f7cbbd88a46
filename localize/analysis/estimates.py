"""Estimate the information in the features of a layer about the image, about its class, and about everything else.

S. Choi, M. Jeon, Y. Hwang, J. Oh, S. Lim, J. Lee, M. Kang. Dictionary contrastive learning for efficient local
supervision without auxiliary networks. ICLR 2024 (figures 3 and I, appendix J.2.7), after Y. Wang, Z. Ni, S. Song,
L. Yang, G. Huang. Revisiting locally supervised learning. ICLR 2021.

    I(h, x) = 1 - BCE(decoder(h), x)                    how well the image is reconstructed from h
    I(h, y) = test accuracy of a ResNet-32 on h         how well its class is predicted from h
    I(h, r) = I(h, x) - I(h, y) + 1                     an upper bound, shifted by 1 as in the paper

The estimates come from networks trained for this purpose and are not in bits. Use them to compare layers, and runs on
the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize import zoo
from localize.analysis.batches import batches
from localize.errors import OptionError
from localize.heads.decoder import Decoder, Pixels
from localize.heads.maps import FeatureMap
from localize.ir import Features
from localize.train.loaded import LoadedRun

EPOCHS = 10
"""Epochs of both networks; the paper trains the decoder for 10 and ResNet-32 for 160."""
CLASSIFIER = "cifar/resnet32"

Batches = Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]
"""A function that yields features (N, C, H, W), pixels in [0, 1] (N, C', H, W) and class ids (N,) of all the data."""


@dataclass(frozen=True)
class Information:
    """Estimates for the features after one segment."""

    segment: int
    ends_at: str
    of_image: float
    """I(h, x): 1 - BCE of the last epoch; the mean over pixels, in nats."""
    of_class: float
    """I(h, y): test accuracy (0..1) of the best epoch."""

    @property
    def of_rest(self) -> float:
        """I(h, r), an upper bound of the information about the image besides its class."""
        return self.of_image - self.of_class + 1


def information(
    run: LoadedRun,
    segment: int,
    *,
    epochs: int = EPOCHS,
    batch_size: int = 128,
    classifier: str = CLASSIFIER,
    seed: int = 0,
    progress: bool | None = None,
) -> Information:
    """Estimate the information in the features after a segment, by training a decoder and a classifier on them.

    Features are computed again for each batch, so memory does not grow with the data; images are not augmented. Maps
    are resized bilinearly to the size of the image; a vector counts as a map of 1x1.

    Args:
        run: a run from :func:`localize.load`. If it was trained as one segment, its local layers are the segments.
        segment: index of a segment, from 0.
        epochs: passes over the training images, for each network.
        batch_size: images at a time.
        classifier: name of a model, whose first layer gets as many channels as the features have.
        seed: seed of the initial weights and of the order of the images.
        progress: show a progress bar on stderr; default: if stderr is a terminal.

    Returns:
        The estimates: I(h, x) in nats, I(h, y) as an accuracy (0..1).

    Raises:
        OptionError: ``epochs`` is below 1, or there is no such segment.
        MissingError: the images are missing or have changed.
    """
    local = run.layered
    segments = local.plan.segments.segments
    if epochs < 1 or segment not in range(len(segments)):
        raise OptionError(
            f"epochs cannot be {epochs}." if epochs < 1 else f"there is no segment {segment}.",
            facts="it must be at least 1." if epochs < 1 else f"segments are 0 to {len(segments) - 1}.",
            help="epochs=10" if epochs < 1 else "segment=0",
        )
    layout = segments[segment]
    image = run.preprocessing.input_size
    arranged = FeatureMap(layout.features)
    shown = Pixels(run.preprocessing.mean, run.preprocessing.std).to(next(run.model.parameters()).device)
    generator = torch.Generator().manual_seed(seed)

    def drawn(part: str, label: str) -> Batches:
        def call() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
            order = generator if part == "train" else None
            told = f"{layout.ends_at}: {label}"
            for x, y in batches(run, told, batch_size, progress, part=part, shuffled=order):  # type: ignore[arg-type]
                with torch.no_grad():
                    h = arranged(*local.features(x)[segment]).float()
                    h = F.interpolate(h, size=image[1:], mode="bilinear", align_corners=False)
                yield h, shown(x).float(), y

        return call

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        of_image = reconstruction(drawn("train", "reconstruction"), arranged.shape[0], image, epochs=epochs)
        net = zoo.create_model(classifier, len(run.classes), input_shape=(arranged.shape[0], *image[1:]))
        of_class = prediction(drawn("train", "prediction"), drawn("test", "prediction, test"), net, epochs=epochs)
    return Information(segment, layout.ends_at, of_image, of_class)


def reconstruction(train: Batches, channels: int, image: tuple[int, int, int], *, epochs: int) -> float:
    """Train a decoder from features to pixels, and return 1 - BCE, in nats, averaged over the last epoch.

    It has two convolutions, to 12 channels and to those of the image, and uses Adam with default settings (learning
    rate 0.001).

    Args:
        train: features at the size of the image.
        channels: C of the features.
        image: (C', H, W).
        epochs: passes over ``train``.
    """
    layout = Features("map", (channels, *image[1:]), channels=1)
    decoder = Decoder([layout], image).train()
    optimizer: torch.optim.Optimizer | None = None
    total, count = 0.0, 0
    for _ in range(epochs):
        total, count = 0.0, 0
        for h, x, _ in train():
            if optimizer is None:
                decoder = decoder.to(h.device)
                optimizer = torch.optim.Adam(decoder.parameters())
            with torch.enable_grad():
                loss = F.binary_cross_entropy(decoder(h), x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total, count = total + float(loss.detach()) * len(x), count + len(x)
    return 1 - total / count


def prediction(train: Batches, test: Batches, net: nn.Module, *, epochs: int, lr: float = 0.1) -> float:
    """Train a classifier on features, and return its test accuracy (0..1) in the best epoch.

    It uses SGD with Nesterov momentum 0.9, weight decay 1e-4 and a cosine schedule from ``lr``, as in appendix J.2.6,
    where the learning rate is 0.8.
    """
    optimizer: torch.optim.Optimizer | None = None
    best = 0.0
    for _ in range(epochs):
        net.train()
        for h, _, y in train():
            if len(y) < 2:  # BatchNorm needs two
                continue
            if optimizer is None:
                net = net.to(h.device)
                optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
            with torch.enable_grad():
                loss = F.cross_entropy(net(h), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        scheduler.step()
        net.eval()
        right, count = 0, 0
        with torch.no_grad():
            for h, _, y in test():
                right, count = right + int((net(h).argmax(1) == y).sum()), count + len(y)
        best = max(best, right / count)
    return best
