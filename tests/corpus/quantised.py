"""Nets with stop-gradients in their own forward: quantised weights, activations and features."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.corpus.entry import CLASSES, Entry


def round_ste(x: Tensor) -> Tensor:
    """Return rounded values with the gradient of the identity."""
    return x + (x.round() - x).detach()


class RoundSTE(torch.autograd.Function):
    """The same, with a backward of its own."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class LSQConv(nn.Conv2d):
    """A convolution whose weights are multiples of a step that is learned."""

    def __init__(self, *args, bits: int = 4, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.limit = 2 ** (bits - 1) - 1
        self.step_size = nn.Parameter(2 * self.weight.detach().abs().mean() / self.limit**0.5)

    def forward(self, x: Tensor) -> Tensor:
        w = round_ste((self.weight / self.step_size).clamp(-self.limit - 1, self.limit)) * self.step_size
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BinaryConv(nn.Conv2d):
    """Weights of one sign and one size."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.abs().mean(dim=(1, 2, 3), keepdim=True)
        signs = size * self.weight.sign()
        clipped = self.weight.clamp(-1, 1)
        return self._conv_forward(x, signs.detach() - clipped.detach() + clipped, self.bias)


class TernaryConv(nn.Conv2d):
    """Weights of three values, with a gain and a mask of its own."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.gain * self.mask * RoundSTE.apply(self.weight * 4) / 4, self.bias)


class Quantised(nn.Module):
    """Four such convolutions."""

    def __init__(self, conv: type[nn.Conv2d]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = torch.relu(bn(conv(x)))
        return self.fc(x.mean((2, 3)))


class Observer(nn.Module):
    """Activations rounded to a range that is averaged in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.low.mul_(0.9).add_(x.detach().amin() * 0.1)
            self.high.mul_(0.9).add_(x.detach().amax() * 0.1)
        scale = (self.high - self.low).clamp(min=1e-4) / 255
        return round_ste((x - self.low) / scale) * scale + self.low


class Observed(nn.Module):
    """Convolutions with such an observer behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Observer())
                for i in (3, 8, 8, 8)
            )
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


class Codebook(nn.Module):
    """Features are replaced by their nearest codes; ``ema`` codes are averages kept in buffers."""

    def __init__(self, width: int, size: int = 8, *, ema: bool = False) -> None:
        super().__init__()
        self.ema = ema
        codes = torch.randn(size, width)
        if ema:
            self.register_buffer("codes", codes)
            self.register_buffer("counts", torch.ones(size))
            self.register_buffer("sums", codes.clone())
        else:
            self.codes = nn.Embedding.from_pretrained(codes, freeze=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.movedim(1, -1)
        codes = self.codes if self.ema else self.codes.weight
        distances = (flat.unsqueeze(-2) - codes).pow(2).sum(-1)
        nearest = distances.argmin(-1)
        if self.ema and self.training:
            with torch.no_grad():
                chosen = F.one_hot(nearest, codes.shape[0]).type(flat.dtype).flatten(0, -2)
                self.counts.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(chosen.t() @ flat.flatten(0, -2), alpha=0.1)
                self.codes.copy_(self.sums / self.counts.clamp(min=1e-3).unsqueeze(1))
        quantised = F.embedding(nearest, codes)
        return (flat + (quantised - flat).detach()).movedim(-1, 1)


class VectorQuantised(nn.Module):
    """Convolutions, a codebook, convolutions."""

    def __init__(self, *, ema: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(layer for i in (3, 8) for layer in (nn.Conv2d(i, 8, 3, 2, 1), nn.ReLU())))
        self.quantise = Codebook(8, ema=ema)
        self.decoder = nn.Sequential(*(layer for i in (8, 8) for layer in (nn.Conv2d(i, 8, 3, 1, 1), nn.ReLU())))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.decoder(self.quantise(self.encoder(x))).mean((2, 3)))


class FiniteScalar(nn.Module):
    """Channels rounded to a few levels in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, 8, 3, 1, 1) for i in (3, 8, 8, 8))
        self.register_buffer("levels", torch.tensor([5.0] * 8).view(1, 8, 1, 1))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            half = (self.levels - 1) / 2
            x = round_ste(torch.tanh(conv(x)) * half) / half
        return self.fc(x.mean((2, 3)))


class Gumbel(nn.Module):
    """Every layer draws which of two convolutions it takes at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, 16, 3, 1, 1) for i in (3, 8, 8, 8))
        self.choice = nn.ModuleList(nn.Conv2d(i, 2, 1) for i in (3, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for conv, choice in zip(self.convs, self.choice, strict=True):
            weights = F.gumbel_softmax(choice(x), tau=1.0, hard=True, dim=1)
            one, two = conv(x).chunk(2, 1)
            x = F.relu(one * weights[:, :1] + two * weights[:, 1:])
        return self.fc(x.mean((2, 3)))


QUANTISED = (
    Entry("lsq", partial(Quantised, LSQConv)),
    Entry("binary", partial(Quantised, BinaryConv)),
    Entry("ternary_with_gain", partial(Quantised, TernaryConv)),
    Entry("observers", Observed),
    Entry("codebook", partial(VectorQuantised, ema=False)),
    Entry("codebook_of_averages", partial(VectorQuantised, ema=True)),
    Entry("finite_scalar", FiniteScalar),
    Entry("gumbel_hard", Gumbel, draws=True),
)
