"""Nets in the style of short attention repositories: functions for norms, residuals as wrappers, few lines."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn

from tests.corpus.entry import CLASSES, Entry


def exists(value: object) -> bool:
    """Say whether something is there."""
    return value is not None


def default(value, other):
    """Return a value, or another where it is None."""
    return value if exists(value) else other


def patches(x: Tensor, size: int = 4) -> Tensor:
    """Return (N, T, size * size * C) of images (N, C, H, W)."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // size, size, w // size, size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // size) * (w // size), size * size * c)


class PreNorm(nn.Module):
    """A norm before a function."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
        return self.fn(self.norm(x), **kwargs)


class Residual(nn.Module):
    """A function beside the identity."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
        return self.fn(x, **kwargs) + x


class FeedForward(nn.Module):
    """Two linear layers."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    """Attention by einsum; heads may talk before and after the softmax."""

    def __init__(self, dim: int, heads: int = 2, *, talking: bool = False, cosine: bool = False) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_qkv, self.to_out = nn.Linear(dim, dim * 3, bias=False), nn.Linear(dim, dim)
        self.mix_pre = nn.Parameter(torch.randn(heads, heads)) if talking else None
        self.mix_post = nn.Parameter(torch.randn(heads, heads)) if talking else None
        self.temperature = nn.Parameter(torch.tensor(1.0)) if cosine else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        n, t, d = x.shape
        q, k, v = (part.reshape(n, t, self.heads, -1).transpose(1, 2) for part in self.to_qkv(x).chunk(3, dim=-1))
        if exists(self.temperature):
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        if exists(self.temperature):
            dots = dots * self.temperature.exp()
        if exists(self.mix_pre):
            dots = einsum("b h i j, h g -> b g i j", dots, self.mix_pre)
        attn = dots.softmax(dim=-1)
        if exists(self.mix_post):
            attn = einsum("b h i j, h g -> b g i j", attn, self.mix_post)
        out = einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(out.transpose(1, 2).reshape(n, t, d))


class LinearAttention(nn.Module):
    """Attention whose cost grows with the number of tokens."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(dim, dim * 3, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (y.view(n, t, self.heads, d // self.heads).transpose(1, 2) for y in self.to_qkv(x).split(d, -1))
        q, k = q.softmax(dim=-1), k.softmax(dim=-2)
        context = torch.einsum("bhnd,bhne->bhde", k, v)
        out = torch.einsum("bhnd,bhde->bhne", q, context)
        return self.to_out(out.transpose(1, 2).flatten(2))


class FourierMixing(nn.Module):
    """A Fourier transform over tokens and channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real


class Transformer(nn.Module):
    """A list of pairs of layers."""

    def __init__(self, dim: int, depth: int, mixing: type[nn.Module] | partial = Attention) -> None:
        super().__init__()
        self.layers = nn.ModuleList([])
        for _ in range(depth):
            mixer = mixing() if mixing is FourierMixing else mixing(dim)
            self.layers.append(nn.ModuleList([PreNorm(dim, mixer), PreNorm(dim, FeedForward(dim, 2 * dim))]))

    def forward(self, x: Tensor) -> Tensor:
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return x


class ViT(nn.Module):
    """A class token or a mean, positions learned or computed."""

    def __init__(self, *, dim: int = 16, depth: int = 4, pool: str = "cls", mixing=Attention) -> None:
        super().__init__()
        self.to_patch_embedding = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, dim), nn.LayerNorm(dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.dropout = nn.Dropout(0.0)
        self.transformer = Transformer(dim, depth, mixing)
        self.pool = pool
        self.to_latent = nn.Identity()
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, CLASSES))

    def forward(self, img: Tensor) -> Tensor:
        x = self.to_patch_embedding(patches(img))
        b, n, _ = x.shape
        x = torch.cat((self.cls_token.repeat(b, 1, 1), x), dim=1)
        x += self.pos_embedding[:, : (n + 1)]
        x = self.transformer(self.dropout(x))
        x = x.mean(dim=1) if self.pool == "mean" else x[:, 0]
        return self.mlp_head(self.to_latent(x))


def posemb_sincos_2d(h: int, w: int, dim: int, device: torch.device, temperature: int = 10000) -> Tensor:
    """Return positions of a grid, (H W, dim)."""
    y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
    omega = torch.arange(dim // 4, device=device) / (dim // 4 - 1)
    omega = 1.0 / (temperature**omega)
    y, x = y.flatten()[:, None] * omega[None, :], x.flatten()[:, None] * omega[None, :]
    return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1).type(torch.float32)


class SimpleViT(nn.Module):
    """Positions by sines, a mean of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 16)
        self.transformer = Transformer(16, 4)
        self.linear_head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, CLASSES))

    def forward(self, img: Tensor) -> Tensor:
        x = self.embed(patches(img))
        x = x + posemb_sincos_2d(4, 4, 16, img.device).to(x.dtype)
        return self.linear_head(self.transformer(x).mean(dim=1))


class LayerScale(nn.Module):
    """A scale for every channel in front of a function."""

    def __init__(self, dim: int, fn: nn.Module, depth: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1, 1, dim).fill_(0.1 if depth <= 18 else 1e-5))
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
        return self.fn(x, **kwargs) * self.scale


class CaiT(nn.Module):
    """Layers of patches, and behind them layers in which the class token reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                LayerScale(16, PreNorm(16, fn), i) for fn in (Attention(16, talking=True), FeedForward(16, 32))
            )
            for i in range(4)
        )
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.last = Attention(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, img: Tensor) -> Tensor:
        x = self.embed(patches(img))
        for attn, ff in self.blocks:
            x = attn(x) + x
            x = ff(x) + x
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1)
        return self.head((self.last(x) + x)[:, 0])


def rotate_half(x: Tensor) -> Tensor:
    """Return channels with the halves swapped, one of them negated."""
    one, two = x.chunk(2, dim=-1)
    return torch.cat((-two, one), dim=-1)


class RotaryBlock(nn.Module):
    """A block that computes its own rotation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ff = Residual(PreNorm(dim, FeedForward(dim, 2 * dim)))
        self.register_buffer("inv_freq", 1.0 / (100 ** (torch.arange(0, dim, 2).float() / dim)))

    def forward(self, x: Tensor) -> Tensor:
        freqs = torch.outer(torch.arange(x.shape[1], device=x.device).type_as(self.inv_freq), self.inv_freq)
        freqs = torch.cat((freqs, freqs), dim=-1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k = (t * freqs.cos() + rotate_half(t) * freqs.sin() for t in (q, k))
        return self.ff(x + self.out(F.scaled_dot_product_attention(q, k, v)))


class Rotary(nn.Module):
    """Four blocks with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(48, 16), nn.ModuleList(RotaryBlock(16) for _ in range(4))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, img: Tensor) -> Tensor:
        x = self.embed(patches(img))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class RotaryShared(nn.Module):
    """One rotation, computed from images' size and used in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 16)
        self.qkvs = nn.ModuleList(nn.Linear(16, 48) for _ in range(4))
        self.ffs = nn.ModuleList(PreNorm(16, FeedForward(16, 32)) for _ in range(4))
        self.register_buffer("inv_freq", 1.0 / (100 ** (torch.arange(0, 16, 2).float() / 16)), persistent=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, img: Tensor) -> Tensor:
        x = self.embed(patches(img))
        t = torch.arange(x.shape[1], device=x.device, dtype=self.inv_freq.dtype)
        freqs = torch.einsum("i,j->ij", t, self.inv_freq).repeat(1, 2)
        cos, sin = freqs.cos(), freqs.sin()
        for qkv, ff in zip(self.qkvs, self.ffs, strict=True):
            q, k, v = qkv(x).chunk(3, -1)
            q, k = (q * cos) + (rotate_half(q) * sin), (k * cos) + (rotate_half(k) * sin)
            x = x + F.scaled_dot_product_attention(q, k, v)
            x = x + ff(x)
        return self.head(x.mean(1))


class Perceiver(nn.Module):
    """Latents that read the image once, and then themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, 16))
        self.embed = nn.Linear(3, 16)
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True)
        self.layers = nn.ModuleList(
            nn.ModuleList([PreNorm(16, Attention(16)), PreNorm(16, FeedForward(16, 32))]) for _ in range(4)
        )
        self.to_logits = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, CLASSES))

    def forward(self, data: Tensor) -> Tensor:
        data = self.embed(data.flatten(2).transpose(1, 2))
        x = self.latents.unsqueeze(0).expand(data.shape[0], -1, -1)
        x = self.cross(x, data, data)[0] + x
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        return self.to_logits(x.mean(dim=-2))


class Mixer(nn.Module):
    """Linear layers over tokens, and over channels, all in one Sequential."""

    def __init__(self) -> None:
        super().__init__()

        def block() -> nn.Sequential:
            tokens = nn.Sequential(nn.Conv1d(16, 32, 1), nn.GELU(), nn.Conv1d(32, 16, 1))
            return nn.Sequential(Residual(PreNorm(16, tokens)), Residual(PreNorm(16, FeedForward(16, 32))))

        self.net = nn.Sequential(nn.Linear(48, 16), *(block() for _ in range(4)), nn.LayerNorm(16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, img: Tensor) -> Tensor:
        return self.head(self.net(patches(img)).mean(1))


ATTENTION = (
    Entry("vit", ViT),
    Entry("vit_mean", partial(ViT, pool="mean")),
    Entry("vit_talking_heads", partial(ViT, mixing=partial(Attention, talking=True))),
    Entry("vit_cosine_attention", partial(ViT, mixing=partial(Attention, cosine=True))),
    Entry("vit_linear_attention", partial(ViT, mixing=LinearAttention)),
    Entry("fnet", partial(ViT, mixing=FourierMixing)),
    Entry("simple_vit", SimpleViT),
    Entry("cait", CaiT),
    Entry("rotary", Rotary),
    Entry("rotary_shared", RotaryShared),
    Entry("perceiver", Perceiver),
    Entry("mixer", Mixer),
)
