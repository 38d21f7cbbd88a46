"""Nets in the style of a library of transformers: configurations, embeddings, layers with named outputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.corpus.entry import CLASSES, Entry


@dataclass
class Config:
    """What the nets of this file are built from."""

    hidden_size: int = 16
    num_attention_heads: int = 2
    intermediate_size: int = 32
    num_hidden_layers: int = 4
    patch_size: int = 4
    image_size: int = 16
    hidden_dropout_prob: float = 0.0
    layerscale_value: float = 1.0
    num_register_tokens: int = 2


class ImageClassifierOutput(NamedTuple):
    """What a classifier returns."""

    loss: Tensor | None
    logits: Tensor


class PatchEmbeddings(nn.Module):
    """A convolution that makes tokens of patches."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[1] != 3:
            raise ValueError("Make sure that the channel dimension of the pixel values match the configuration.")
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Attention by its matrices, with an optional bias for each pair of places."""

    def __init__(self, config: Config, *, relative: int = 0) -> None:
        super().__init__()
        self.heads, self.size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.relative = relative
        if relative:
            side = int(relative**0.5)
            rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
            places = torch.stack([rows.flatten(), columns.flatten()])
            distance = (places[:, :, None] - places[:, None, :] + side - 1).permute(1, 2, 0)
            self.register_buffer("index", distance[..., 0] * (2 * side - 1) + distance[..., 1], persistent=False)
            self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, self.heads))

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        """Return (N, heads, T, size) of (N, T, C)."""
        return x.view(*x.size()[:-1], self.heads, self.size).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        query = self.transpose_for_scores(self.query(hidden_states))
        key = self.transpose_for_scores(self.key(hidden_states))
        value = self.transpose_for_scores(self.value(hidden_states))
        scores = torch.matmul(query, key.transpose(-1, -2)) / self.size**0.5
        if self.relative:
            bias = self.table[self.index.view(-1)].view(self.relative, self.relative, -1)
            scores = scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            scores = scores.view(-1, mask.shape[0], self.heads, *mask.shape[1:]) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.heads, *mask.shape[1:])
        probabilities = self.dropout(F.softmax(scores, dim=-1))
        context = torch.matmul(probabilities, value).permute(0, 2, 1, 3).contiguous()
        return (self.dense(context.view(*context.size()[:-2], -1)), probabilities)


class DropPath(nn.Module):
    """Skips the branch of some images."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = keep + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * mask.floor_()


class LayerScale(nn.Module):
    """Multiplies every channel by a number that is learned."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(config.layerscale_value * torch.ones(config.hidden_size))

    def forward(self, hidden_state: Tensor) -> Tensor:
        return hidden_state * self.lambda1


class Layer(nn.Module):
    """One layer of an encoder; with ``scaled``, each branch has a scale, and paths are dropped."""

    def __init__(self, config: Config, *, scaled: bool = False, gated: bool = False, relative: int = 0) -> None:
        super().__init__()
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(config.hidden_size, eps=1e-12) for _ in "ab")
        self.attention = SelfAttention(config, relative=relative)
        self.gated = gated
        self.weights_in = nn.Linear(config.hidden_size, config.intermediate_size * (2 if gated else 1))
        self.weights_out = nn.Linear(config.intermediate_size, config.hidden_size)
        self.scale1, self.scale2 = (LayerScale(config) if scaled else nn.Identity() for _ in "ab")
        self.drop_path = DropPath(0.1) if scaled else nn.Identity()

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        outputs = self.attention(self.layernorm_before(hidden_states))
        hidden_states = self.drop_path(self.scale1(outputs[0])) + hidden_states
        inner = self.weights_in(self.layernorm_after(hidden_states))
        if self.gated:
            gate, value = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * value
        else:
            inner = F.gelu(inner)
        layer_output = self.drop_path(self.scale2(self.weights_out(inner))) + hidden_states
        return (layer_output, *outputs[1:]) if output_attentions else (layer_output,)


class ViTForImageClassification(nn.Module):
    """Embeddings with a class token, layers, norm, classifier."""

    def __init__(self, config: Config, *, registers: bool = False, pooled: bool = False, **options) -> None:
        super().__init__()
        count = (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.hidden_size) * 0.02)
        self.registers = (
            nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size)) if registers else None
        )
        self.position_embeddings = nn.Parameter(torch.randn(1, count + 1, config.hidden_size) * 0.02)
        self.patch_embeddings = PatchEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        relative = options.pop("relative", False)
        tokens = count + 1
        self.layer = nn.ModuleList(
            Layer(config, relative=0 if not relative else count, **options) for _ in range(config.num_hidden_layers)
        )
        self.class_token = not relative
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.classifier = nn.Linear(config.hidden_size * (2 if pooled else 1), CLASSES)
        self.pooled, self.tokens = pooled, tokens

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool = True):
        h = self.patch_embeddings(pixel_values)
        if self.class_token:
            h = torch.cat((self.cls_token.expand(h.shape[0], -1, -1), h), dim=1)
            h = h + self.position_embeddings
        if self.registers is not None:
            h = torch.cat((h[:, :1], self.registers.expand(h.shape[0], -1, -1), h[:, 1:]), dim=1)
        h = self.dropout(h)
        for layer_module in self.layer:
            h = layer_module(h)[0]
        h = self.layernorm(h)
        if self.pooled:
            skipped = 1 + (0 if self.registers is None else self.registers.shape[1])
            logits = self.classifier(torch.cat([h[:, 0], h[:, skipped:].mean(dim=1)], dim=1))
        else:
            logits = self.classifier(h[:, 0, :] if self.class_token else h.mean(1))
        return ImageClassifierOutput(None, logits) if return_dict else (logits,)


class SwinLayer(nn.Module):
    """Attention in windows, which are shifted in every other layer."""

    def __init__(self, config: Config, resolution: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift, self.resolution = 2, shift, resolution
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention = SelfAttention(config, relative=4)
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)

    def get_attn_mask(self, height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return what keeps places of different windows apart."""
        if self.shift == 0:
            return None
        mask = torch.zeros((1, height, width, 1), dtype=dtype, device=device)
        count = 0
        for rows in (slice(0, -2), slice(-2, -1), slice(-1, None)):
            for columns in (slice(0, -2), slice(-2, -1), slice(-1, None)):
                mask[:, rows, columns, :] = count
                count += 1
        windows = self.partition(mask).view(-1, 4)
        mask = windows.unsqueeze(1) - windows.unsqueeze(2)
        return mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)

    def partition(self, x: Tensor) -> Tensor:
        """Return windows (k N, 4, C) of a map (N, H, W, C)."""
        n, h, w, c = x.shape
        x = x.view(n, h // 2, 2, w // 2, 2, c)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, c)

    def forward(self, hidden_states: Tensor) -> Tensor:
        n, _, c = hidden_states.size()
        side = self.resolution
        shortcut = hidden_states
        x = self.layernorm_before(hidden_states).view(n, side, side, c)
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        mask = self.get_attn_mask(side, side, x.dtype, x.device)
        windows = self.attention(self.partition(x), mask)[0]
        x = windows.view(n, side // 2, side // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(n, side, side, c)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x.view(n, side * side, c)
        return x + self.output(F.gelu(self.intermediate(self.layernorm_after(x))))


class Swin(nn.Module):
    """Four layers of windows, patches merged once."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(SwinLayer(config, 4, i % 2) for i in range(4))
        self.layernorm, self.pooler = nn.LayerNorm(config.hidden_size), nn.AdaptiveAvgPool1d(1)
        self.classifier = nn.Linear(config.hidden_size, CLASSES)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        h = self.norm(self.embeddings(pixel_values))
        for layer in self.layers:
            h = layer(h)
        pooled = torch.flatten(self.pooler(self.layernorm(h).transpose(1, 2)), 1)
        return {"logits": self.classifier(pooled)}


class ChannelsFirstNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNextLayer(nn.Module):
    """Depthwise convolution, norm, two linear layers on channels-last, a scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.layernorm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.layer_scale_parameter = nn.Parameter(1e-1 * torch.ones(dim), requires_grad=True)
        self.drop_path = nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.dwconv(hidden_states).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.layernorm(x))))
        if self.layer_scale_parameter is not None:
            x = self.layer_scale_parameter * x
        return hidden_states + self.drop_path(x.permute(0, 3, 1, 2))


class ConvNext(nn.Module):
    """Stages of such layers, with a norm and a convolution between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Sequential(nn.Conv2d(3, 8, 4, 4), ChannelsFirstNorm(8))
        self.stages = nn.ModuleList(
            (
                nn.Sequential(ConvNextLayer(8), ConvNextLayer(8)),
                nn.Sequential(ChannelsFirstNorm(8), nn.Conv2d(8, 16, 2, 2), ConvNextLayer(16), ConvNextLayer(16)),
            )
        )
        self.layernorm, self.classifier = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        h = self.embeddings(pixel_values)
        for stage in self.stages:
            h = stage(h)
        return self.classifier(self.layernorm(h.mean([-2, -1])))


class MobileViTLayer(nn.Module):
    """A convolution, attention within places of patches, and a fusion with what entered."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_kxk = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.SiLU())
        self.transformer = Layer(Config(hidden_size=dim))
        self.norm = nn.LayerNorm(dim)
        self.fusion = nn.Sequential(nn.Conv2d(2 * dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.SiLU())

    def forward(self, features: Tensor) -> Tensor:
        residual = features
        x = self.conv_kxk(features)
        batch, channels, height, width = x.shape
        p = 2
        x = x.reshape(batch * channels * (height // p), p, width // p, p).transpose(1, 2)
        x = x.reshape(batch, channels, (height // p) * (width // p), p * p).transpose(1, 3)
        x = x.reshape(batch * p * p, -1, channels)
        x = self.norm(self.transformer(x)[0])
        x = x.contiguous().view(batch, p * p, -1, channels).transpose(1, 3)
        x = x.reshape(batch * channels * (height // p), width // p, p, p).transpose(1, 2)
        x = x.reshape(batch, channels, height, width)
        return self.fusion(torch.cat((residual, x), dim=1))


class MobileViT(nn.Module):
    """Convolutions and such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.layer = nn.ModuleList(MobileViTLayer(8) for _ in range(4))
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        h = self.stem(pixel_values)
        for layer in self.layer:
            h = layer(h)
        return self.classifier(h.mean(dim=(-2, -1)))


class EfficientNetBlock(nn.Module):
    """Expansion, depthwise convolution (padded to the same size), squeeze, projection."""

    def __init__(self, inner: int, out: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * inner
        self.expand = nn.Sequential(
            nn.Conv2d(inner, hidden, 1, padding="same", bias=False), nn.BatchNorm2d(hidden), nn.SiLU()
        )
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else None
        self.depthwise = nn.Conv2d(
            hidden, hidden, 3, stride, groups=hidden, padding="valid" if stride == 2 else "same", bias=False
        )
        self.bn = nn.BatchNorm2d(hidden)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.widen = (
            nn.Conv2d(hidden, inner, 1, padding="same"),
            nn.Conv2d(inner, hidden, 1, padding="same"),
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, out, 1, padding="same", bias=False), nn.BatchNorm2d(out))
        self.residual = stride == 1 and inner == out

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.expand(hidden_states)
        x = self.pad(x) if self.pad is not None else x
        x = F.silu(self.bn(self.depthwise(x)))
        x = x * torch.sigmoid(self.widen(F.silu(self.reduce(self.squeeze(x)))))
        x = self.project(x)
        return x + hidden_states if self.residual else x


class EfficientNet(nn.Module):
    """Blocks of an efficient net, with padding as a word."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.blocks = nn.ModuleList(
            EfficientNetBlock(i, o, s) for i, o, s in ((8, 8, 1), (8, 8, 2), (8, 8, 1), (8, 16, 2))
        )
        self.top = nn.Sequential(nn.Conv2d(16, 32, 1, padding="same", bias=False), nn.BatchNorm2d(32), nn.SiLU())
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        h = self.stem(pixel_values)
        for block in self.blocks:
            h = block(h)
        h = F.avg_pool2d(self.top(h), 4)
        return self.classifier(h.reshape(h.shape[:2]))


class PoolFormerLayer(nn.Module):
    """Pooling in place of attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pooling = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.before, self.after = nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(2 * dim, dim, 1)
        self.layer_scale_1, self.layer_scale_2 = (nn.Parameter(0.1 * torch.ones(dim)) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before(x)
        x = x + self.layer_scale_1.unsqueeze(-1).unsqueeze(-1) * (self.pooling(normed) - normed)
        return x + self.layer_scale_2.unsqueeze(-1).unsqueeze(-1) * self.conv2(F.gelu(self.conv1(self.after(x))))


class PoolFormer(nn.Module):
    """Patches, four such layers, norm, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.block = nn.Sequential(*(PoolFormerLayer(8) for _ in range(4)))
        self.norm, self.classifier = nn.GroupNorm(1, 8), nn.Linear(8, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.classifier(self.norm(self.block(self.patch(pixel_values))).mean([-2, -1]))


class Distilled(nn.Module):
    """Two tokens, each with a classifier; what is returned is their mean, and each."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch_embeddings = PatchEmbeddings(config)
        self.tokens = nn.Parameter(torch.randn(1, 2, config.hidden_size) * 0.02)
        self.layer = nn.ModuleList(Layer(config) for _ in range(4))
        self.layernorm = nn.LayerNorm(config.hidden_size)
        self.cls_classifier, self.distillation_classifier = (nn.Linear(config.hidden_size, CLASSES) for _ in "ab")

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        h = self.patch_embeddings(pixel_values)
        h = torch.cat((self.tokens.expand(h.shape[0], -1, -1), h), 1)
        for layer in self.layer:
            h = layer(h)[0]
        h = self.layernorm(h)
        cls, distillation = self.cls_classifier(h[:, 0]), self.distillation_classifier(h[:, 1])
        return {"logits": (cls + distillation) / 2, "cls_logits": cls, "distillation_logits": distillation}


TRANSFORMERS = (
    Entry("hf_vit", partial(ViTForImageClassification, Config())),
    Entry("hf_vit_dropout", partial(ViTForImageClassification, Config(hidden_dropout_prob=0.1)), draws=True),
    Entry(
        "hf_dinov2",
        partial(ViTForImageClassification, Config(), registers=True, pooled=True, scaled=True, gated=True),
        draws=True,
    ),
    Entry("hf_beit", partial(ViTForImageClassification, Config(), relative=True)),
    Entry("hf_swin", partial(Swin, Config())),
    Entry("hf_convnext", ConvNext),
    Entry("hf_mobilevit", MobileViT),
    Entry("hf_efficientnet", EfficientNet),
    Entry("hf_poolformer", PoolFormer),
    Entry("hf_deit_distilled", partial(Distilled, Config())),
)
