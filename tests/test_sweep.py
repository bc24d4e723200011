import pytest
import torch
import torch.nn.functional as F
from cases import classes, of_model, x
from sweeping import check
from torch import nn


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU])
def test_mlp(activation):
    targets = classes(3, 7)
    model = nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3))
    check(*of_model(model, lambda out: F.cross_entropy(out, targets), x(7, 4)), 7)


def net(model, *shape, loss=None, outputs=3, covered=None):
    """Check a classifier of 5 samples."""
    targets = classes(outputs, 5)
    loss = loss or (lambda out: F.cross_entropy(out, targets))
    check(*of_model(model, loss, x(5, *shape)), 5, covered)


class Residual(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, h):
        return h + self.inside(h)


class Dense(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, h):
        return torch.cat([h, self.inside(h)], 1)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, h):
        return self.one(h).sigmoid() * torch.tanh(self.two(h))


class Chunked(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Linear(4, 8)

    def forward(self, h):
        one, two = self.both(h).chunk(2, 1)
        return F.silu(one) * two


def block():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))


NETS = {
    "residual": lambda: nn.Sequential(nn.Linear(3, 4), Residual(block()), Residual(block()), nn.Linear(4, 3)),
    "residual relu": lambda: nn.Sequential(
        nn.Linear(3, 4), Residual(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))), nn.Linear(4, 3)
    ),
    "nested": lambda: nn.Sequential(
        nn.Linear(3, 4), Residual(nn.Sequential(block(), Residual(block()))), nn.Linear(4, 3)
    ),
    "dense": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), Dense(nn.Linear(4, 2)), nn.Tanh(), Dense(nn.Linear(6, 2)), nn.Linear(8, 3)
    ),
    "gated": lambda: nn.Sequential(nn.Linear(3, 4), Gated(), nn.Linear(4, 3)),
    "chunked": lambda: nn.Sequential(nn.Linear(3, 4), Chunked(), nn.Linear(4, 3)),
    "in place": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.SiLU(inplace=True), nn.Linear(4, 3)
    ),
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
    "rms norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Tanh(), nn.Linear(4, 3)),
    "group norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Linear(4, 3)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    ).eval(),
    "softmax": lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 3), nn.LogSoftmax(1)),
    "bottleneck": lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1), nn.Linear(1, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_networks(name):
    net(NETS[name](), 3)


CONVOLUTIONS = {
    "plain": lambda: [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)],
    "strides": lambda: [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 2)],
    "groups, dilation": lambda: [nn.Conv2d(2, 4, 3, groups=2, dilation=2, padding=2), nn.SiLU()],
    "same": lambda: [nn.Conv2d(2, 2, 3, padding="same"), nn.GELU()],
    "max pool": lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)],
    "average pool": lambda: [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AvgPool2d(2)],
    "batch norm": lambda: [nn.Conv2d(2, 4, 3).eval(), nn.BatchNorm2d(4).eval(), nn.ReLU(inplace=True)],
    "group norm": lambda: [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()],
    "transposed": lambda: [nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Tanh(), nn.AvgPool2d(3)],
    "residual": lambda: [nn.Conv2d(2, 3, 3), Residual(nn.Conv2d(3, 3, 3, padding=1)), nn.ReLU()],
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    torch.manual_seed(1)
    model = nn.Sequential(*CONVOLUTIONS[name](), nn.Flatten(), nn.LazyLinear(3))
    model.double()(x(1, 2, 5, 5))
    net(model, 2, 5, 5)
