"""A molecule, for the potentials of several packages."""

from __future__ import annotations

import torch
from torch import Tensor


def ethanol() -> tuple[Tensor, Tensor]:
    """The atomic numbers of ethanol, and the places of its atoms in Angstrom, each moved a little."""
    atoms = [
        (6, 0.01, -0.57, 0.0),
        (6, -1.3, 0.24, 0.0),
        (8, 1.14, 0.35, 0.0),
        (1, 0.04, -1.21, 0.89),
        (1, 0.04, -1.21, -0.89),
        (1, -2.17, -0.42, 0.0),
        (1, -1.34, 0.88, 0.88),
        (1, -1.34, 0.88, -0.88),
        (1, 1.94, -0.18, 0.0),
    ]
    places = torch.tensor([atom[1:] for atom in atoms])
    return torch.tensor([atom[0] for atom in atoms]), places + 0.05 * torch.randn_like(places)


def pairs(count: int) -> Tensor:
    """All pairs of different atoms, each both ways."""
    return torch.nonzero(~torch.eye(count, dtype=torch.bool)).T
