"""ConvNeXt in PyTorch, written from the paper to compare with; tensors are named as timm's."""

import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W)."""

    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x.movedim(1, -1)))).movedim(-1, 1)


class Block(nn.Module):
    def __init__(self, dim, layer_scale):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm, self.mlp = Norm(dim), MLP(dim)
        self.gamma = nn.Parameter(torch.ones(dim)) if layer_scale else None

    def forward(self, x):
        y = self.mlp(self.norm(self.conv_dw(x)))
        return x + (y if self.gamma is None else y * self.gamma[:, None, None])


class Stage(nn.Module):
    def __init__(self, before, dim, depth, layer_scale):
        super().__init__()
        self.downsample = nn.Sequential(Norm(before), nn.Conv2d(before, dim, 2, 2)) if before else nn.Identity()
        self.blocks = nn.Sequential(*(Block(dim, layer_scale) for _ in range(depth)))

    def forward(self, x):
        return self.blocks(self.downsample(x))


class Head(nn.Module):
    def __init__(self, dim, num_classes):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, num_classes)

    def forward(self, x):
        return self.fc(self.norm(x.mean((2, 3))))


class ConvNeXt(nn.Module):
    def __init__(self, depths, dims, num_classes, layer_scale_init=1e-6):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), Norm(dims[0]))
        befores, layer_scale = (None, *dims[:-1]), layer_scale_init is not None
        stages = (Stage(*sizes, layer_scale) for sizes in zip(befores, dims, depths, strict=True))
        self.stages = nn.Sequential(*stages)
        self.head = Head(dims[-1], num_classes)

    def forward(self, images):
        return self.head(self.stages(self.stem(images)))
