"""Vision Transformers in PyTorch, written from spec to compare with; tensors are named as timm's."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        self.attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((self.attention @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio, layer_scale):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), MLP(dim, mlp_ratio * dim)
        self.ls1, self.ls2 = (Scale(dim) if layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    def __init__(self, dim, depth, heads, patch_size, image_size, num_classes, mlp_ratio=4, distilled=False, **options):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.prefix, self.side = 2 if distilled else 1, image_size // patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + self.side**2, dim))
        layer_scale = options.get("layer_scale_init") is not None
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio, layer_scale) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.head_dist = nn.Linear(dim, num_classes) if distilled else None

    def positions(self, grid):
        prefix, patches = self.pos_embed.split([self.prefix, self.side**2], dim=1)
        patches = patches.mT.unflatten(-1, (self.side, self.side))
        if grid != (self.side, self.side):
            patches = F.interpolate(patches, grid, mode="bicubic", antialias=True)
        return torch.cat([prefix, patches.flatten(2).mT], dim=1)

    def forward(self, images):
        x = self.patch_embed.proj(images)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        x = torch.cat([*prefix, x.flatten(2).mT], dim=1) + self.positions(x.shape[2:])
        x = self.norm(self.blocks(x))
        logits = self.head(x[:, 0])
        return logits if self.head_dist is None else (logits + self.head_dist(x[:, 1])) / 2
