"""Decoders that reconstruct the image from local features, with the image as their target.

Source: Y. Wang, Z. Ni, S. Song, L. Yang, G. Huang, "Revisiting locally supervised learning: an alternative to
end-to-end training", ICLR 2021 (InfoPro); sizes as in its code (blackfeather-wang/InfoPro-Pytorch at a38362a).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localize.errors import Advice, MethodError, OptionError
from localize.heads.maps import FeatureMap, is_flat
from localize.ir import Features, Segment, Trunk


class Enlarge(nn.Module):
    """Resize maps to (H, W), bilinearly, with aligned corners.

    Shape:
        (N, C, h, w) -> (N, C, H, W).
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = (height, width)

    def forward(self, values: Tensor) -> Tensor:
        return F.interpolate(values, size=self.size, mode="bilinear", align_corners=True)

    def extra_repr(self) -> str:
        """Show the size."""
        return f"{self.size[0]}x{self.size[1]}"


class Decoder(nn.Module):
    """Two convolutions at the size of the image: C -> 12 -> channels of the image, with a sigmoid.

    Args:
        features: layout of every tensor that crosses the cut.
        image: shape of the image, (channels, H, W).

    Shape:
        (N, C, h, w) or (N, T, C); returns pixels in [0, 1], (N, channels, H, W).
    """

    WIDTH = 12

    def __init__(self, features: Sequence[Features], image: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image
        self.map = FeatureMap(features)
        self.layers = nn.Sequential(
            Enlarge(height, width),
            *_convolution(self.map.shape[0], self.WIDTH),
            nn.Conv2d(self.WIDTH, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, *values: Tensor) -> Tensor:
        return self.layers(self.map(*values))


class DeepDecoder(nn.Module):
    """InfoPro's decoder on ImageNet: narrowing convolutions, between which the map grows to the size of the image.

    The widths are 128 (1x1), 32, 12, and the channels of the image (3x3), and the sizes between them 1/4, 1/2 and 1/1
    of the image. All except the last have BatchNorm and ReLU; the last has a sigmoid.

    Shape:
        (N, C, h, w) or (N, T, C); returns pixels in [0, 1], (N, channels, H, W).
    """

    def __init__(self, features: Sequence[Features], image: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = image
        self.map = FeatureMap(features)
        self.layers = nn.Sequential(
            *_convolution(self.map.shape[0], 128, size=1),
            Enlarge(-(-height // 4), -(-width // 4)),
            *_convolution(128, 32),
            Enlarge(-(-height // 2), -(-width // 2)),
            *_convolution(32, 12),
            Enlarge(height, width),
            nn.Conv2d(12, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, *values: Tensor) -> Tensor:
        return self.layers(self.map(*values))


def _convolution(inputs: int, outputs: int, *, size: int = 3) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, padding=size // 2), nn.BatchNorm2d(outputs), nn.ReLU()]


def require_images(method: str, segment: Segment, trunk: Trunk) -> None:
    """Refuse features from which no image can be reconstructed, and models whose input is not an image.

    Raises:
        MethodError: all output features of the segment are flat vectors, or the model does not take (C, H, W).
    """
    if len(trunk.input_shape) != 3:
        raise MethodError(
            f"{method} reconstructs images (C, H, W); {trunk.name} takes {tuple(trunk.input_shape)}.",
            help="use a method that reconstructs nothing; localize recipes ls",
        )
    if is_flat(segment.features):
        raise MethodError(
            f"{method} reconstructs the image from features with positions; those after {segment.ends_at} have none.",
            facts=f"they are flat vectors of {', '.join(str(f.shape[0]) for f in segment.features)} values.",
            help=Advice(
                "cut=localize.CutSpec(at=(...)), only where the features are maps or tokens",
                "--cut-at, only where the features are maps or tokens (localize inspect shows the shapes)",
            ),
        )


class Pixels(nn.Module):
    """The images as values in [0, 1], the target of a decoder.

    With ``mean`` and ``std`` the normalisation of the data is undone: x * std + mean, clamped to [0, 1]. Without them,
    the smallest value of the batch becomes 0 and the largest 1.

    Args:
        mean: means with which the channels were normalised: one for each channel, or one for all.
        std: standard deviations, in the same form.

    Shape:
        (N, C, H, W) -> (N, C, H, W).
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, mean: Sequence[float] = (), std: Sequence[float] = ()) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            known = torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1) if values else None
            self.register_buffer(name, known, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            return (images * self.std + self.mean).clamp(0, 1)
        low, high = images.min(), images.max()
        return (images - low) / (high - low).clamp(min=torch.finfo(images.dtype).tiny)

    @property
    def whole_batch(self) -> str:
        """The reason why it cannot be called on parts of a batch; empty if it can."""
        known = self.mean is not None and self.std is not None
        return "" if known else "scales the images to the range of the whole batch, unless mean and std are given"

    def extra_repr(self) -> str:
        """Show how pixels are restored."""
        if self.mean is None or self.std is None:
            return "the batch's own range"
        return f"mean {self.mean.flatten().tolist()}, std {self.std.flatten().tolist()}"


def pixels(mean: str, std: str, channels: int) -> Pixels:
    """Make :class:`Pixels` from numbers separated by commas, one for each channel or one for all.

    Raises:
        OptionError: these are not numbers, their count does not match the channels, only one of ``mean`` and ``std``
            was given, or ``std`` is not positive.
    """
    values = {name: _numbers(name, text, channels) for name, text in (("mean", mean), ("std", std))}
    if bool(values["mean"]) != bool(values["std"]):
        given, missing = ("mean", "std") if values["mean"] else ("std", "mean")
        raise OptionError(
            f"{given} was given, but {missing} was not.",
            facts="both are needed to undo the normalisation of the images.",
            help=Advice(
                f"{missing}=... with one number for each channel", f"--{missing} with one number for each channel"
            ),
            option=missing,
        )
    if any(value <= 0 for value in values["std"]):
        raise OptionError(f"std cannot be {std!r}.", facts="a standard deviation is greater than 0.", option="std")
    return Pixels(values["mean"], values["std"])


def _numbers(name: str, text: str, channels: int) -> tuple[float, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        values = tuple(float(part) for part in parts)
    except ValueError as error:
        raise OptionError(
            f"{name} cannot be {text!r}.",
            facts="it must be numbers separated by commas.",
            help=Advice(f"{name}='0.5,0.5,0.5'"),
            option=name,
        ) from error
    if len(values) not in (0, 1, channels):
        raise OptionError(
            f"{name} has {len(values)} numbers.",
            facts=f"the images have {channels} channels.",
            help="one for each",
            option=name,
        )
    return values
