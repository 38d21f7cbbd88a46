"""Nets made of torch's own larger modules, and of names and containers that are rarely used."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from tests.corpus.entry import CLASSES, Entry


def encoder_layer(dropout: float = 0.0, *, batch_first: bool = True) -> nn.TransformerEncoderLayer:
    """Return one of torch's encoder layers."""
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=batch_first, norm_first=batch_first)


class EncoderViT(nn.Module):
    """A ViT of five of torch's encoder layers, held in a Sequential, a list, or an encoder."""

    def __init__(self, held: str, dropout: float = 0.0, *, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, 16) * 0.02)
        layers = [encoder_layer(dropout, batch_first=batch_first) for _ in range(5)]
        if held == "sequential":
            self.encoder: nn.Module = nn.Sequential(*layers)
        elif held == "list":
            self.encoder = nn.ModuleList(layers)
        else:
            norm = nn.LayerNorm(16)
            self.encoder = nn.TransformerEncoder(layers[0], 5, norm, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        if not self.batch_first:
            x = x.transpose(0, 1)
        if isinstance(self.encoder, nn.ModuleList):
            for layer in self.encoder:
                x = layer(x)
        else:
            x = self.encoder(x)
        return self.head(x.mean(1 if self.batch_first else 0))


class Translated(nn.Module):
    """A query that decodes an image, with torch's whole transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.query = nn.Parameter(torch.randn(1, 1, 16))
        self.transformer = nn.Transformer(16, 2, 3, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.transformer(tokens, self.query.expand(len(x), -1, -1)).squeeze(1))


class AttentionList(nn.Module):
    """A list of torch's attention, with norms and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for attention, norm in zip(self.attentions, self.norms, strict=True):
            h = norm(x)
            x = x + attention(h, h, h)[0]
        return self.head(x.mean(1))


class Rows(nn.Module):
    """Recurrent layers that read an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(i, 12, batch_first=True) for i in (48, 12, 12, 12))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 1, 3).flatten(2)
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x[:, -1])


class AutocastBlock(nn.Module):
    """A block that switches automatic types off."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inner, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.relu(self.bn(self.conv(x.float())))


class Clip(torch.autograd.Function):
    """Clips a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1, 1)


class ClippedBlock(nn.Module):
    """A residual block with a function inside whose backward is its own."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inner, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = Clip.apply(F.relu(self.conv1(x)))
        return h + self.conv2(h)


class Blocks(nn.Module):
    """Four blocks of a class."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(i) for i in (3, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Checkpointed(nn.Module):
    """Blocks that are computed again in the backward."""

    def __init__(self, *, reentrant: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for i in (3, 8, 8, 8)
        )
        self.fc = nn.Linear(8, CLASSES)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.fc(x.mean((2, 3)))


class Named(nn.Module):
    """Modules whose names are words of Python, or of a generated text, or hold signs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"class": self.layer(3), 'a "b"': self.layer(8), "it's": self.layer(8)})
        self.step = self.layer(8)
        self.segment_0 = nn.ModuleDict({"train_step": self.layer(8), "y": self.layer(8)})
        self.optimizer = nn.Linear(8, CLASSES)
        self.add_module("lambda", nn.Identity())

    @staticmethod
    def layer(inner: int) -> nn.Sequential:
        """Return a convolution with norm and activation."""
        return nn.Sequential(nn.Conv2d(inner, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x)
        x = self.segment_0["y"](self.segment_0["train_step"](self.step(x)))
        return self.optimizer(getattr(self, "lambda")(x).mean((2, 3)))


class Nested(nn.Module):
    """Weights in lists of lists, and in a dictionary of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.ParameterList([nn.Parameter(torch.randn(8, i, 3, 3) * 0.1), nn.Parameter(torch.zeros(8))])
            for i in (3, 8, 8, 8)
        )
        self.scales = nn.ParameterDict(
            {"class": nn.Parameter(torch.ones(8, 1, 1)), "b": nn.Parameter(torch.ones(8, 1, 1))}
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in self.weights:
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
        return self.fc((x * self.scales["class"] * self.scales["b"]).mean((2, 3)))


class InDicts(nn.Module):
    """Weights in dicts of dicts, under names that Python has taken."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict()
        for i, inner in enumerate((3, 8, 8, 8)):
            weight, bias = nn.Parameter(torch.randn(8, inner, 1, 1) * 0.3), nn.Parameter(torch.zeros(8))
            self.weights[f"l{i}"] = nn.ParameterDict({"class": weight, 'a"b': bias})
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("l0", "l1", "l2", "l3"):
            own = self.weights[name]
            x = F.relu(F.conv2d(x, own["class"], own['a"b']))
        return self.fc(x.mean((2, 3)))


class Alike(nn.Module):
    """Modules whose names differ in what Python quotes."""

    def __init__(self) -> None:
        super().__init__()
        names = ('a"b', "a\\b", "a\nb", "it's")
        layers = (nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.ReLU()) for i in (3, 8, 8, 8))
        self.layers = nn.ModuleDict(dict(zip(names, layers, strict=True)))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class Detached(nn.Module):
    """A layer that is used, and never trained: its result is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.offset, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(x))
            if i == 1:
                x = x + self.offset(x).detach()
        return self.fc(x.mean((2, 3)))


class Old(nn.Module):
    """Variables, and operations by their lowest name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.autograd.Variable(x)
        for layer in self.layers:
            x = torch.ops.aten.mul.Tensor(torch.ops.aten.relu(layer(x)), 1.5)
        return self.fc(torch.squeeze(torch.squeeze(F.adaptive_avg_pool2d(x, (1, 1)), 3), 2))


def pruned() -> nn.Module:
    """Return a net some of whose weights are masked."""
    model = nn.Sequential(
        *(layer for i in (3, 8, 8, 8) for layer in (nn.Conv2d(i, 8, 3, padding=1), nn.ReLU())),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    for i in (0, 2, 4):
        prune.l1_unstructured(model[i], "weight", amount=0.3)
    return model


class SamePadded(nn.Module):
    """Residual blocks whose padding is a word, some with dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same")
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding="same", dilation=1 + i % 2) for i in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if i == 1:
                x = self.pool(x)
        return self.fc(x.mean((2, 3)))


TORCHS_OWN = (
    Entry("encoder_layers_in_sequential", partial(EncoderViT, "sequential")),
    Entry("encoder_layers_in_list", partial(EncoderViT, "list")),
    Entry("encoder", partial(EncoderViT, "encoder")),
    Entry("tokens_first_in_sequential", partial(EncoderViT, "sequential", batch_first=False)),
    Entry("tokens_first_in_list", partial(EncoderViT, "list", batch_first=False)),
    Entry("tokens_first", partial(EncoderViT, "encoder", batch_first=False)),
    Entry("encoder_with_dropout", partial(EncoderViT, "encoder", 0.1), draws=True),
    Entry("transformer", Translated),
    Entry("attention_list", AttentionList),
    Entry("lstm_rows", Rows),
    Entry("autocast_blocks", partial(Blocks, AutocastBlock)),
    Entry("clipped_blocks", partial(Blocks, ClippedBlock)),
    Entry("checkpointed", Checkpointed, warns="checkpoint"),
    Entry("checkpointed_reentrant", partial(Checkpointed, reentrant=True), refused="use_reentrant=False"),
    Entry("odd_names", Named),
    Entry("nested_parameter_lists", Nested),
    Entry("nested_parameter_dicts", InDicts),
    Entry("names_alike", Alike),
    Entry("used_without_gradient", Detached),
    Entry("variables_and_aten", Old),
    Entry("pruned", pruned),
    Entry("padding_same", SamePadded),
)
