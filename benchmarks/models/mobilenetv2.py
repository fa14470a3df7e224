"""A network of MobileNetV2's shape (arXiv 1801.04381): inverted residuals with ReLU6; random weights."""

from torch import Tensor, nn

# expansion, channels, blocks, stride of the first block
STAGES = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]


def _conv(inputs: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a residual where the shape is kept."""

    def __init__(self, inputs: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*_conv(inputs, hidden, 1), nn.ReLU6(inplace=True)]
        layers += [
            *_conv(hidden, hidden, 3, stride, hidden),
            nn.ReLU6(inplace=True),
            *_conv(hidden, channels, 1),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """[n, 3, size, size] -> [n, classes]; at size 32 the stem and the first stage keep the resolution."""

    def __init__(self, width: float = 1.0, size: int = 224, classes: int = 1000) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, int(channels * width + 4) // 8 * 8)

        small = size <= 64
        channels = scaled(32)
        layers: list[nn.Module] = [*_conv(3, channels, 3, 1 if small else 2), nn.ReLU6(inplace=True)]
        for index, (expansion, base, blocks, stride) in enumerate(STAGES):
            for block in range(blocks):
                step = stride if block == 0 and not (small and index == 1) else 1
                layers.append(InvertedResidual(channels, scaled(base), step, expansion))
                channels = scaled(base)
        last = max(1280, scaled(1280)) if width > 1 else scaled(1280)
        self.features = nn.Sequential(*layers, *_conv(channels, last, 1), nn.ReLU6(inplace=True))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
