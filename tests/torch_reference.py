"""FCViT in PyTorch, written after docs/model.md: what the tests compare with, and PyTorch's side in the benchmarks.

The fields are those of our `FCViT`, the names in the state dicts the original's. Tensors are NCHW. No initialisation of
its own, no dropout, no drop-path.
"""

import torch
from torch import nn
from torch.nn import functional as F


def depthwise(channels, kernel_size):
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)


def norm(channels):
    return nn.GroupNorm(1, channels)


class GlobalContext(nn.Module):
    def __init__(self, channels, heads=8, reduction=8, weighted=True, competition=True):
        super().__init__()
        self.heads, self.weighted, self.competition = heads, weighted, competition
        hidden = channels // reduction
        if competition:
            self.fc1, self.fc2 = nn.Linear(channels, 2 * hidden), nn.Linear(hidden, channels)
        else:
            self.fc = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
        if weighted:
            self.rescale_weight = nn.Parameter(torch.ones(heads))
            self.rescale_bias = nn.Parameter(torch.zeros(heads))

    def similarity(self, x, mean):
        """(N, heads, H, W), standardised over all but the first axis."""
        per_head = (x * mean[..., None, None]).unflatten(1, (self.heads, -1))
        s = per_head.sum(2) * per_head.shape[2] ** -0.5
        return (s - s.mean((1, 2, 3), keepdim=True)) / (s.std((1, 2, 3), keepdim=True) + 1e-5)

    def forward(self, x):
        mean = x.mean((2, 3))
        if self.competition:
            z = self.fc2(torch.maximum(*self.fc1(mean).chunk(2, dim=1)))
        else:
            z = self.fc(mean)
        z = z[..., None, None]
        if not self.weighted:
            return z.expand_as(x)
        s = self.similarity(x, mean)
        s = s * self.rescale_weight[:, None, None] + self.rescale_bias[:, None, None]
        return s.repeat_interleave(x.shape[1] // self.heads, dim=1) * z


class SpatialAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        hidden = channels // 8
        self.spatial_att = nn.Sequential(
            depthwise(channels, 3),
            nn.Conv2d(channels, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * self.spatial_att(x)


class ChannelAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.channelConv1, self.channelConv2 = nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 5, padding=2)

    def forward(self, x):
        a = F.gelu(x).mean((2, 3))[:, None]
        a = self.channelConv2(F.gelu(self.channelConv1(a)))
        return x + a[:, 0, :, None, None]


class TokenMixer(nn.Module):
    def __init__(
        self,
        channels,
        kernel_sizes=(11, 11),
        use_context=True,
        weighted_context=True,
        competition=True,
        context_heads=8,
        context_reduction=8,
        mix_reduction=8,
        mix_min_dim=16,
        spatial_attention=False,
    ):
        super().__init__()
        self.steps = range(1, len(kernel_sizes) + 1)
        for i, kernel_size in zip(self.steps, kernel_sizes, strict=True):
            if use_context:
                context = GlobalContext(channels, context_heads, context_reduction, weighted_context, competition)
                self.add_module(f"gc{i}", context)
            self.add_module(f"dw{i}", depthwise(channels, kernel_size))
            hidden = max(channels // mix_reduction, mix_min_dim)
            bottleneck = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))
            self.add_module(f"fc{i}", nn.Conv2d(channels, channels, 1) if mix_reduction == 1 else bottleneck)
        if spatial_attention:
            self.spatial_att = SpatialAttention(channels)

    def forward(self, x):
        for i in self.steps:
            if hasattr(self, f"gc{i}"):
                x = x + getattr(self, f"gc{i}")(x)
            x = F.gelu(getattr(self, f"fc{i}")(getattr(self, f"dw{i}")(x)))
        return self.spatial_att(x) if hasattr(self, "spatial_att") else x


class ChannelMixer(nn.Module):
    def __init__(self, channels, ratio, kernel_size=3, channel_attention=False):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, ratio * channels, 1)
        self.dwconv = nn.Identity() if kernel_size is None else depthwise(ratio * channels, kernel_size)
        self.fc2 = nn.Conv2d(ratio * channels, channels, 1)
        self.channel_att = ChannelAttention() if channel_attention else nn.Identity()

    def forward(self, x):
        return self.channel_att(self.fc2(F.gelu(self.dwconv(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, channels, token_mixer, channel_mixer, layer_scale=True):
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.token_mixer, self.channel_mixer = token_mixer, channel_mixer
        self.layer_scale = layer_scale
        if layer_scale:
            self.layer_scale_1 = nn.Parameter(torch.full((channels,), 1e-5))
            self.layer_scale_2 = nn.Parameter(torch.full((channels,), 1e-5))

    def forward(self, x):
        y = self.token_mixer(self.norm1(x))
        x = x + (y * self.layer_scale_1[:, None, None] if self.layer_scale else y)
        y = self.channel_mixer(self.norm2(x))
        return x + (y * self.layer_scale_2[:, None, None] if self.layer_scale else y)


class Downsample(nn.Module):
    def __init__(self, channels, features, kernel_size, stride):
        super().__init__()
        self.proj = nn.Conv2d(channels, features, kernel_size, stride, kernel_size // 2)
        self.norm = nn.BatchNorm2d(features)

    def forward(self, x):
        return self.norm(self.proj(x))


class FCViT(nn.Module):
    """The classifier; with `pyramid` the four stage outputs, each through its own norm."""

    def __init__(
        self,
        depths,
        dims,
        mlp_ratios,
        num_classes=1000,
        pyramid=False,
        mlp_kernel_size=3,
        channel_attention=False,
        layer_scale_init=1e-5,
        **token_mixer,
    ):
        super().__init__()
        self.pyramid = pyramid
        self.patch_embed = Downsample(3, dims[0], 7, 4)
        self.network = nn.ModuleList()
        for s, (depth, dim, ratio) in enumerate(zip(depths, dims, mlp_ratios, strict=True)):
            if s > 0:
                self.network.append(Downsample(dims[s - 1], dim, 3, 2))
            blocks = [
                Block(
                    dim,
                    TokenMixer(dim, **token_mixer),
                    ChannelMixer(dim, ratio, mlp_kernel_size, channel_attention),
                    layer_scale_init is not None,
                )
                for _ in range(depth)
            ]
            self.network.append(nn.Sequential(*blocks))
            if pyramid:
                self.add_module(f"norm{2 * s}", norm(dim))
        if not pyramid:
            self.norm = norm(dims[-1])
            self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def features(self, x):
        x, maps = self.patch_embed(x), []
        for i, module in enumerate(self.network):
            x = module(x)
            if i % 2 == 0:
                maps.append(x)
        return maps

    def forward(self, x):
        maps = self.features(x)
        if self.pyramid:
            return tuple(getattr(self, f"norm{2 * s}")(x) for s, x in enumerate(maps))
        return self.head(self.norm(maps[-1]).mean((2, 3)))
