"""Semantic FPN in PyTorch with the original's names of parameters, to be compared with `create_segmenter`."""

import torch.nn.functional as F
from torch import nn
from torch_reference import FCViT


class Conv(nn.Module):
    """A convolution with its bias alone, or a 3x3 convolution without one, BatchNorm and ReLU."""

    def __init__(self, channels, features, kernel_size, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(channels, features, kernel_size, padding=kernel_size // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(features) if norm else None

    def forward(self, x):
        x = self.conv(x)
        return x if self.bn is None else F.relu(self.bn(x))


class FPN(nn.Module):
    def __init__(self, dims, channels):
        super().__init__()
        self.lateral_convs = nn.ModuleList([Conv(dim, channels, 1) for dim in dims])
        self.fpn_convs = nn.ModuleList([Conv(channels, channels, 3) for _ in dims])

    def forward(self, maps):
        sums = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in reversed(range(1, len(sums))):
            sums[i - 1] = sums[i - 1] + F.interpolate(sums[i], sums[i - 1].shape[2:])
        return [conv(x) for conv, x in zip(self.fpn_convs, sums, strict=True)]


class Head(nn.Module):
    def __init__(self, channels, features, num_classes, dropout_rate):
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for level in range(4):
            steps = [Conv(channels, features, 3, norm=True)]
            for _ in range(level - 1):
                steps += [nn.Upsample(scale_factor=2, mode="bilinear"), Conv(features, features, 3, norm=True)]
            if level:
                steps.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.scale_heads.append(nn.Sequential(*steps))
        self.dropout = nn.Dropout2d(dropout_rate)
        self.conv_seg = nn.Conv2d(features, num_classes, 1)

    def forward(self, maps):
        x = self.scale_heads[0](maps[0])
        for scale_head, y in zip(self.scale_heads[1:], maps[1:], strict=True):
            x = x + F.interpolate(scale_head(y), x.shape[2:], mode="bilinear")
        return self.conv_seg(self.dropout(x))


class SemanticFPN(nn.Module):
    """The logits at a quarter of the image's size; `backbone` holds the arguments of `FCViT`."""

    def __init__(self, num_classes=150, neck_channels=256, head_channels=128, head_dropout_rate=0.1, **backbone):
        super().__init__()
        self.backbone = FCViT(**backbone, pyramid=True)
        self.neck = FPN(backbone["dims"], neck_channels)
        self.decode_head = Head(neck_channels, head_channels, num_classes, head_dropout_rate)

    def forward(self, x):
        return self.decode_head(self.neck(self.backbone(x)))
