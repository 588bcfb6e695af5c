"""The networks of the zoo: plain modules, every activation a module of its own.

Activations are never in place and never shared between layers, so that hooks, BackPACK and
per-layer methods see each of them. Where a model takes positions, they are given for every
sample, which keeps the first axis of every intermediate value the sample axis.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(
    widths: Sequence[int], activation: type[nn.Module], *, plain: Sequence[int] = ()
) -> nn.Module:
    """Linear layers ``fc1 ... fcL`` with ``activation`` between them.

    ``widths`` holds ``L + 1`` sizes. No activation follows the last layer, nor the layers whose
    numbers (from 1) are in ``plain``. Input ``[N, widths[0]]``, output ``[N, widths[-1]]``.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    last = len(widths) - 1
    for number in range(1, last + 1):
        layers[f"fc{number}"] = nn.Linear(widths[number - 1], widths[number])
        if number < last and number not in plain:
            layers[f"act{number}"] = activation()
    return nn.Sequential(layers)


def autoencoder() -> nn.Module:
    """784-1000-500-250-30-250-500-1000-784, ReLU except after the code layer and the output.

    The network of Hinton and Salakhutdinov (Science 2006) as used by Goldfarb, Ren and Bahamou
    (NeurIPS 2020), with ReLU and PyTorch's default initialisation. Output: logits ``[N, 784]``.
    """
    return mlp((784, 1000, 500, 250, 30, 250, 500, 1000, 784), nn.ReLU, plain=(4,))


def digits_cnn() -> nn.Module:
    """Two convolutions with ReLU and max-pooling, then one linear layer; 1,898 parameters.

    Input ``[N, 1, 8, 8]``, output ``[N, 10]``.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 3, padding=1),
            act1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(8, 16, 3, padding=1),
            act2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(64, 10),
        )
    )


class PadShortcut(nn.Module):
    """Option A of He et al.: every second pixel, new channels zero; no parameters."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C + extra, H / stride, W / stride]``."""
        x = x[:, :, :: self.stride, :: self.stride]
        before = self.extra // 2
        return F.pad(x, (0, 0, 0, 0, before, self.extra - before))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else PadShortcut(outputs - inputs, stride)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images (He et al., CVPR 2016, section 4.2).

    One 3x3 convolution, stages of ``depth`` residual blocks with the given ``widths`` (each stage
    but the first halves the image), the mean over positions, one linear layer. ``widths=(16, 32,
    64)`` and ``depth=3`` on 3-channel images is ResNet-20 with the parameter-free shortcuts
    ("option A"). Convolutions start from He's normal distribution (fan out).
    """

    def __init__(self, channels: int, widths: Sequence[int], depth: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.act = nn.ReLU()
        stages, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            blocks = []
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(ResidualBlock(inputs, width, stride))
                inputs = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to logits ``[N, classes]``."""
        return self.fc(self.stages(self.act(self.bn(self.conv(x)))).mean(dim=(2, 3)))


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a position sees itself and what came before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` to ``[N, T, width]``."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a two-layer GELU network, each behind LayerNorm and added to its input."""

    def __init__(self, width: int, hidden: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` to ``[N, T, width]``."""
        h = self.norm1(x)
        if isinstance(self.attention, nn.MultiheadAttention):
            x = x + self.attention(h, h, h, need_weights=False)[0]
        else:
            x = x + self.attention(h)
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class DigitsTransformer(nn.Module):
    """A transformer on the 8 patches of 2x4 pixels of an 8x8 image; class from the mean token."""

    def __init__(self, width: int = 12, heads: int = 2, hidden: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Linear(8, width)
        self.position = nn.Embedding(8, width)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(
                    width, hidden, nn.MultiheadAttention(width, heads, batch_first=True)
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        nn.init.normal_(self.position.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 8, 8]`` to logits ``[N, 10]``."""
        n = x.shape[0]
        patches = x.reshape(n, 4, 2, 2, 4).transpose(2, 3).reshape(n, 8, 8)
        positions = torch.arange(8, device=x.device).expand(n, 8)
        tokens = self.blocks(self.patch(patches) + self.position(positions))
        return self.head(self.norm(tokens).mean(dim=1))


class CharTransformer(nn.Module):
    """A small GPT on characters: causal attention, learned positions, untied output layer.

    Linear and embedding weights start from a normal distribution of standard deviation 0.02, as
    in GPT-2. The output is ``[N, vocabulary, T]``, the class axis second, where
    ``nn.CrossEntropyLoss`` expects it.
    """

    def __init__(
        self, vocabulary: int, context: int = 64, width: int = 64, heads: int = 4, depth: int = 4
    ) -> None:
        super().__init__()
        self.context = context
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(width, 4 * width, CausalAttention(width, heads))
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Characters ``[N, T]`` (``T`` at most ``context``) to logits ``[N, vocabulary, T]``."""
        positions = torch.arange(x.shape[1], device=x.device).expand_as(x)
        h = self.blocks(self.token(x) + self.position(positions))
        return self.head(self.norm(h)).transpose(1, 2)
