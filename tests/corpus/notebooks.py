"""Nets in the style of notebooks of competitions: pooling with a parameter, several dropouts, gates, hooks."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.corpus.entry import CLASSES, Entry


def convolution(inner: int, out: int, stride: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    """Return convolution, norm and activation."""
    return nn.Sequential(nn.Conv2d(inner, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), act or nn.ReLU(True))


def backbone(act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return four convolutions."""
    pairs = ((3, 8, 1), (8, 8, 2), (8, 16, 2), (16, 16, 1))
    return nn.Sequential(*(convolution(i, o, s, act()) for i, o, s in pairs))


class GeM(nn.Module):
    """The generalised mean of a map."""

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p, self.eps = nn.Parameter(torch.ones(1) * p), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x.clamp(min=self.eps).pow(self.p), (x.size(-2), x.size(-1))).pow(1.0 / self.p)


class GeMNet(nn.Module):
    """A backbone, generalised mean, an embedding and a classifier of cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.pooling = backbone(), GeM()
        self.embedding, self.bn = nn.Linear(16, 8), nn.BatchNorm1d(8)
        self.weight = nn.Parameter(torch.empty(CLASSES, 8))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, images: Tensor) -> Tensor:
        embedding = self.bn(self.embedding(self.pooling(self.backbone(images)).flatten(1)))
        return 16.0 * F.linear(F.normalize(embedding), F.normalize(self.weight))


class MultiSampleDropout(nn.Module):
    """The mean of one classifier behind several dropouts."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.dropouts = nn.ModuleList([nn.Dropout(0.2) for _ in range(3)])
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        feature = self.backbone(x).mean((2, 3))
        for i, dropout in enumerate(self.dropouts):
            if i == 0:
                out = self.fc(dropout(feature))
            else:
                out += self.fc(dropout(feature))
        return out / len(self.dropouts)


class AdaptiveConcatPool2d(nn.Module):
    """The mean and the largest of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.ap, self.mp = nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mp(x), self.ap(x)], 1)


class Normalised(nn.Module):
    """Images are normalised by buffers in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.body = nn.Sequential(*backbone(), AdaptiveConcatPool2d(), nn.Flatten())
        self.head = nn.Sequential(nn.BatchNorm1d(32), nn.Dropout(0.0), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body((x - self.mean) / self.std))


class CBAM(nn.Module):
    """Gates for channels, and for places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels))
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        gate = self.mlp(F.adaptive_avg_pool2d(x, 1).view(b, c)) + self.mlp(F.adaptive_max_pool2d(x, 1).view(b, c))
        x = x * torch.sigmoid(gate).view(b, c, 1, 1)
        places = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.conv(places))


class CBAMNet(nn.Module):
    """Convolutions, each with such gates."""

    def __init__(self) -> None:
        super().__init__()
        pairs = ((3, 8, 1), (8, 8, 2), (8, 16, 2), (16, 16, 1))
        self.layers = nn.ModuleList(nn.Sequential(convolution(i, o, s), CBAM(o)) for i, o, s in pairs)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean(dim=(2, 3)))


class SwishImplementation(torch.autograd.Function):
    """Swish that keeps only its input."""

    @staticmethod
    def forward(ctx, i: Tensor) -> Tensor:
        ctx.save_for_backward(i)
        return i * torch.sigmoid(i)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> Tensor:
        (i,) = ctx.saved_tensors
        sigmoid_i = torch.sigmoid(i)
        return grad_output * (sigmoid_i * (1 + i * (1 - sigmoid_i)))


class MemoryEfficientSwish(nn.Module):
    """The activation of an old EfficientNet repository."""

    def forward(self, x: Tensor) -> Tensor:
        return SwishImplementation.apply(x)


def scripted(code: Any) -> Any:
    """Return a function or module, scripted, which torch says is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(code)


@scripted
def swish_jit(x: Tensor) -> Tensor:
    """Return x times its sigmoid."""
    return x.mul(x.sigmoid())


@scripted
def mish_jit(x: Tensor, beta: float = 1.0) -> Tensor:
    """Return x times the hyperbolic tangent of its softplus."""
    return x * torch.tanh(torch.nn.functional.softplus(x * beta))


class SwishJit(nn.Module):
    """A scripted function as activation."""

    def forward(self, x: Tensor) -> Tensor:
        return swish_jit(x)


class MishJit(nn.Module):
    """A scripted function with a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return mish_jit(x, beta=1.5)


class Activated(nn.Module):
    """A backbone with an activation of one's own."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.features, self.fc = backbone(act), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean([2, 3]))


class ScriptedBlock(nn.Module):
    """A block that is scripted as a whole."""

    def __init__(self, inner: int, out: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inner, out, 3, padding=1), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Scripted(nn.Module):
    """A model of scripted parts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(scripted(ScriptedBlock(i, 8)) for i in (3, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class SpatialTransformer(nn.Module):
    """A small net that says how images are moved, and a backbone on what is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.localization = nn.Sequential(nn.Conv2d(3, 4, 7), nn.MaxPool2d(2, stride=2), nn.ReLU(True))
        self.fc_loc = nn.Sequential(nn.Linear(100, 8), nn.ReLU(True), nn.Linear(8, 6))
        self.fc_loc[2].weight.data.normal_(0, 1e-3)
        self.fc_loc[2].bias.data.copy_(torch.tensor([0.9, 0.05, 0.013, 0.021, 0.95, 0.017]))
        self.backbone, self.fc = backbone(), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.fc_loc(self.localization(x).view(-1, 100)).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.size()), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        return F.log_softmax(self.fc(self.backbone(x).mean((2, 3))), dim=1)


class CoordConv(nn.Module):
    """Convolutions that read where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i + 2, 8, 3, 1, 1) for i in (3, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)

    def add(self, x: Tensor) -> Tensor:
        """Return a map with its coordinates."""
        n, _, h, w = x.shape
        xx = torch.linspace(-1, 1, w).repeat(n, h, 1).unsqueeze(1).type_as(x)
        yy = torch.linspace(-1, 1, h).repeat(n, w, 1).transpose(1, 2).unsqueeze(1).type_as(x)
        return torch.cat([x, xx, yy], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(self.add(x)), 0.1)
        return self.fc(x.amax((2, 3)))


class HyperColumn(nn.Module):
    """The means of all layers, gathered in a tensor that is empty at first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = backbone()
        self.fc = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tensor([], device=x.device)
        for layer in self.layers:
            x = layer(x)
            features = torch.cat([features, x.mean((2, 3))], dim=-1)
        return self.fc(features)


class AttentionPool(nn.Module):
    """Places are weighted before they are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone(nn.SiLU)
        self.score = nn.Conv2d(16, 1, 1)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.PReLU(), nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        f = self.backbone(x)
        w = self.score(f).flatten(2).softmax(-1)
        return self.head((f.flatten(2) * w).sum(-1))


class Hooked(nn.Module):
    """A hook keeps the features of a layer, from which a part of the classifier reads."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.f: dict[str, Tensor] = {}
        self.backbone[1].register_forward_hook(self.keep)
        self.fc = nn.Linear(24, CLASSES)

    def keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep what a layer returns."""
        self.f["early"] = output

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        early = self.f["early"].mean((2, 3))
        return self.fc(torch.cat([x.mean((2, 3)), early], 1))


class Metadata(nn.Module):
    """Images, and numbers that are known of them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.meta = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
        self.output = nn.Linear(24, CLASSES)

    def forward(self, image: Tensor, meta: Tensor) -> Tensor:
        return self.output(torch.cat((self.backbone(image).mean((2, 3)), self.meta(meta)), dim=1))


class Siamese(nn.Module):
    """Two images through one backbone, compared."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = backbone(), nn.Linear(16, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        one, two = (self.backbone(x) for x in (left, right))
        return self.fc((one - two).abs().mean((2, 3)))


def image_and_numbers(batch: int) -> tuple[Tensor, Tensor]:
    """Return images and numbers."""
    return torch.randn(batch, 3, 16, 16), torch.randn(batch, 4)


def two_images(batch: int) -> dict[str, Tensor]:
    """Return two images by name."""
    return {"left": torch.randn(batch, 3, 16, 16), "right": torch.randn(batch, 3, 16, 16)}


NOTEBOOKS = (
    Entry("gem", GeMNet),
    Entry("multi_sample_dropout", MultiSampleDropout, draws=True),
    Entry("normalised_by_buffers", Normalised),
    Entry("cbam", CBAMNet),
    Entry("memory_efficient_swish", partial(Activated, MemoryEfficientSwish)),
    Entry("scripted_swish", partial(Activated, SwishJit)),
    Entry("scripted_mish", partial(Activated, MishJit)),
    Entry("scripted_blocks", Scripted, refused_by={"auglocal": "is scripted"}),
    Entry("spatial_transformer", SpatialTransformer),
    Entry("coord_conv", CoordConv),
    Entry("hyper_column", HyperColumn),
    Entry("attention_pool", AttentionPool),
    Entry("hook_that_keeps", Hooked, warns="hooks on"),
    Entry("image_and_numbers", Metadata, inputs=image_and_numbers),
    Entry(
        "siamese",
        Siamese,
        inputs=two_images,
        options={"shared": True},
        refused_by={"auglocal": "reads an input of the model besides"},
    ),
)
