"""Nets with several ways through: experts, adapters, exits, random depth."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.corpus.entry import CLASSES, Entry


class Experts(nn.Module):
    """Experts of which every token takes some, weighted; loads are counted in a buffer."""

    def __init__(self, dim: int, count: int = 3, top: int = 0) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(count)
        )
        self.top = top
        self.register_buffer("load", torch.zeros(count))

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.gate(x), dim=-1)
        if self.top:
            best, chosen = weights.topk(self.top, dim=-1)
            weights = torch.zeros_like(weights).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        if self.training:
            self.load += weights.detach().sum(dim=(0, 1))
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class ExpertBlock(nn.Module):
    """Attention of torch, and experts."""

    def __init__(self, dim: int, top: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.moe = nn.MultiheadAttention(dim, 2, batch_first=True), Experts(dim, top=top)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.moe(self.norm2(x))


class MixtureOfExperts(nn.Module):
    """A small ViT of such blocks."""

    def __init__(self, top: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(*(ExpertBlock(16, top) for _ in range(4)))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))


class LoRALinear(nn.Module):
    """A linear layer that is fixed, and two small matrices beside it."""

    def __init__(self, linear: nn.Linear, r: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.base = linear.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, linear.in_features) / math.sqrt(r))
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, r) * 0.01)
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


class LoRA(nn.Module):
    """Blocks whose linear layers are adapted so."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4).requires_grad_(False)
        self.norms = nn.ModuleList(nn.LayerNorm(16).requires_grad_(False) for _ in range(4))
        self.ups = nn.ModuleList(LoRALinear(nn.Linear(16, 32)) for _ in range(4))
        self.downs = nn.ModuleList(LoRALinear(nn.Linear(32, 16)) for _ in range(4))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(x.mean(1))


class FrozenBackbone(nn.Module):
    """The first layers are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(*(layer for i in (3, 8) for layer in (nn.Conv2d(i, 8, 3, 1, 1), nn.ReLU())))
        self.frozen.requires_grad_(False)
        self.body = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.frozen(x)).mean((2, 3)))


class MultiExit(nn.Module):
    """A classifier behind every stage; all are returned, the last one last."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for i in (3, 8, 8, 8)
        )
        self.exits = nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(4))
        self.form = form

    def forward(self, x: Tensor) -> list[Tensor] | dict[str, Tensor] | Tensor:
        scores = []
        for stage, leave in zip(self.stages, self.exits, strict=True):
            x = stage(x)
            scores.append(leave(x.mean((2, 3))))
        if self.form == "list":
            return scores
        if self.form == "reversed":
            return scores[::-1]
        if self.form == "mean":
            return torch.stack(scores).mean(0)
        return {f"exit{i}": score for i, score in enumerate(scores)}


class WithFeatures(nn.Module):
    """Features are returned before the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(layer for i in (3, 8, 8, 8) for layer in (nn.Conv2d(i, 8, 3, 1, 1), nn.ReLU())))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.body(x)
        return feature, self.fc(feature.mean((2, 3)))


class RandomDepth(nn.Module):
    """Blocks whose branch is dropped for some images, drawn in the block's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(4)
        )
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            out = block(x)
            if self.training:
                out = out * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.9, device=x.device)) / 0.9
            x = x + out
        return self.fc(x.mean((2, 3)))


class Noisy(nn.Module):
    """Noise is added to features in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8, 8))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
            if self.training:
                x = x + torch.randn_like(x) * 0.1
                x = x * torch.empty_like(x).uniform_(0.9, 1.1)
        return self.fc(x.mean((2, 3)))


class Looped(nn.Module):
    """One block with the same weights, several times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(4):
            x = self.block(x) + x
        return self.fc(x.mean((2, 3)))


class ByValue(nn.Module):
    """How often a block runs depends on the values that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        while x.abs().mean() > 0.5:
            x = self.block(x) * 0.5
        return self.fc(x.mean((2, 3)))


EXPERTS = (
    Entry("experts_soft", partial(MixtureOfExperts, 0)),
    Entry("experts_top_2", partial(MixtureOfExperts, 2)),
    Entry("lora", LoRA),
    Entry("frozen_backbone", FrozenBackbone),
    Entry("exits_list", partial(MultiExit, "list"), warns="taken for the class scores"),
    Entry("exits_reversed", partial(MultiExit, "reversed"), warns="taken for the class scores"),
    Entry("exits_dict", partial(MultiExit, "dict"), warns="taken for the class scores"),
    Entry("exits_mean", partial(MultiExit, "mean")),
    Entry("features_and_scores", WithFeatures),
    Entry("random_depth", RandomDepth, draws=True),
    Entry("noisy", Noisy, draws=True),
    Entry("looped", Looped, layers=1, options={"shared": True}),
    Entry("looped_unshared", Looped, refused="is used on both sides of a cut"),
    Entry("by_value", ByValue, refused="reads the value of a tensor"),
)
