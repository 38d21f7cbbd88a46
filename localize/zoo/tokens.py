"""The Vision Transformer and the MLP-Mixer for CIFAR-10 of the DCL paper.

Choi et al. (DCL), ICLR 2024, Table V and appendix J.2.3: six modules, 4x4 patches, 512-dimensional tokens; the ViT has
eight heads and one class token. Blocks after Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021,
https://arxiv.org/abs/2010.11929, and Tolstikhin et al., "MLP-Mixer", NeurIPS 2021, https://arxiv.org/abs/2105.01601.

The paper does not state the hidden widths. Ours are inferred: they are those of a public CIFAR-10 configuration
(kentaroy47/vision-transformers-cifar10 @16dda72) with the paper's depth, heads, patch and token size. Table V fits it
at that configuration's batch of 512: keeping one block of the ViT in memory instead of six saves 3,952 MiB, which is 12
float32 token tensors per block; a block saves about 11 for backward with an MLP of 512 units and about 17 with the
2,048 that Dosovitskiy et al. would use. Every width is an argument.

Tokens are ``(N, tokens, channels)``. A block is one local layer.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from localize.errors import OptionError


class Attention(nn.Module):
    """Multi-head self-attention. ``(N, tokens, dim) -> (N, tokens, dim)``.

    Args:
        dim: token size, a multiple of ``heads``.
        heads: number of attention heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        # (N, tokens, 3 * dim) -> three times (N, heads, tokens, dim / heads)
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class ViTBlock(nn.Module):
    """A pre-norm encoder block: attention, then an MLP, both residual. ``(N, tokens, dim) -> (N, tokens, dim)``."""

    def __init__(self, dim: int, heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _mlp(dim, mlp_width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A Vision Transformer that classifies by its class token.

    Args:
        num_classes: width of the logits.
        input_shape: ``(C, H, W)``; H and W are multiples of ``patch``.
        patch: side of a square patch, pixels.
        dim: token size, a multiple of ``heads``.
        depth: number of encoder blocks.
        heads: attention heads per block.
        mlp_width: hidden units of every MLP (inferred, see the module's text).
        dropout: rate in [0, 1) after the embedding, the attention and both layers of the MLP.

    ``blocks.0`` ... carry the class token at position 0; then ``norm`` and ``head``.

    Shapes: ``(N, C, H, W) -> (N, num_classes)``; tokens ``(N, 1 + H * W / patch**2, dim)``.

    Raises:
        OptionError: patches do not tile the image, or heads do not divide the token size.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        patch: int = 4,
        dim: int = 512,
        depth: int = 6,
        heads: int = 8,
        mlp_width: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        patches = _patches("vit", input_shape, patch)
        if dim % heads:
            raise OptionError(f"vit cannot share {dim} channels among {heads} heads.", help=f"dim={heads * 64}")
        self.patch_embed = nn.Conv2d(input_shape[0], dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(ViTBlock(dim, heads, mlp_width, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = self.blocks(self.dropout(x + self.position))
        return self.head(self.norm(x[:, 0]))


class MixerBlock(nn.Module):
    """A pre-norm Mixer block: an MLP over tokens, then one over channels. ``(N, tokens, dim) -> (N, tokens, dim)``."""

    def __init__(self, tokens: int, dim: int, token_width: int, channel_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.token_mixing = _mlp(tokens, token_width, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.channel_mixing = _mlp(dim, channel_width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mixing(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mixing(self.norm2(x))


class Mixer(nn.Module):
    """An MLP-Mixer that classifies by the mean over tokens.

    Args:
        num_classes: width of the logits.
        input_shape: ``(C, H, W)``; H and W are multiples of ``patch``.
        patch: side of a square patch, pixels.
        dim: token size.
        depth: number of Mixer blocks.
        token_width: hidden units of the MLPs over tokens (inferred, see the module's text).
        channel_width: hidden units of the MLPs over channels (inferred, see the module's text).
        dropout: rate in [0, 1) after both layers of every MLP.

    Shapes: ``(N, C, H, W) -> (N, num_classes)``; tokens ``(N, H * W / patch**2, dim)``.

    Raises:
        OptionError: patches do not tile the image.
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        patch: int = 4,
        dim: int = 512,
        depth: int = 6,
        token_width: int = 256,
        channel_width: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        tokens = _patches("mixer", input_shape, patch)
        self.patch_embed = nn.Conv2d(input_shape[0], dim, patch, stride=patch)
        self.blocks = nn.Sequential(
            *(MixerBlock(tokens, dim, token_width, channel_width, dropout) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def _mlp(width: int, hidden: int, dropout: float) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        fc1=nn.Linear(width, hidden),
        act=nn.GELU(),
        dropout1=nn.Dropout(dropout),
        fc2=nn.Linear(hidden, width),
        dropout2=nn.Dropout(dropout),
    )
    if dropout == 0:
        del layers["dropout1"], layers["dropout2"]
    return nn.Sequential(layers)


def _patches(model: str, input_shape: tuple[int, int, int], patch: int) -> int:
    _, height, width = input_shape
    if patch < 1 or height % patch or width % patch:
        raise OptionError(
            f"{model} cannot cut {height}x{width} images into {patch}x{patch} patches.",
            facts=f"patches that tile both sides: {_common_divisors(height, width)}",
            help="give an image size that is a multiple of the patch, or another patch",
        )
    return (height // patch) * (width // patch)


def _common_divisors(a: int, b: int) -> str:
    return ", ".join(str(d) for d in range(1, min(a, b) + 1) if a % d == 0 and b % d == 0)


def vit(
    num_classes: int = 10,
    *,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    patch: int = 4,
    mlp_width: int = 512,
    dropout: float = 0.0,
) -> ViT:
    """Build DCL's ViT: 6 blocks, 8 heads, 512-dimensional tokens. ``(N, 3, 32, 32) -> (N, num_classes)``.

    See :class:`ViT`.
    """
    return ViT(num_classes, input_shape=input_shape, patch=patch, mlp_width=mlp_width, dropout=dropout)


def mixer(
    num_classes: int = 10,
    *,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    patch: int = 4,
    token_width: int = 256,
    channel_width: int = 256,
    dropout: float = 0.0,
) -> Mixer:
    """Build DCL's MLP-Mixer: 6 blocks, 64 tokens of 512 dimensions. ``(N, 3, 32, 32) -> (N, num_classes)``.

    See :class:`Mixer`.
    """
    return Mixer(
        num_classes,
        input_shape=input_shape,
        patch=patch,
        token_width=token_width,
        channel_width=channel_width,
        dropout=dropout,
    )
