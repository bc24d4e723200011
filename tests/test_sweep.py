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
