"""Potentials of SchNetPack: the energy of ethanol by the places of its atoms."""

from __future__ import annotations

import torch
from schnetpack import atomistic, properties, representation
from schnetpack.model import NeuralNetworkPotential
from schnetpack.nn import CosineCutoff, GaussianRBF
from torch import Tensor, nn

from benchmarks.models.model import Catalogue, Problem, by_inputs, by_parameters
from benchmarks.models.molecules import ethanol, pairs

MODELS = Catalogue("schnetpack", ("schnetpack",))

_WIDTH, _REACH = 12, 5.0


def _potential(kind: type[nn.Module]) -> nn.Module:
    # Its layers ask for tensors of float32 by name while they are made.
    torch.set_default_dtype(torch.float32)
    model = NeuralNetworkPotential(
        representation=kind(_WIDTH, 2, GaussianRBF(10, _REACH), CosineCutoff(_REACH), max_z=10),
        input_modules=[atomistic.PairwiseDistances()],
        output_modules=[atomistic.Atomwise(n_in=_WIDTH, output_key=properties.energy)],
        input_dtype_str="float64",
        do_postprocessing=False,
    )
    torch.set_default_dtype(torch.float64)
    return model.to(torch.float64).eval()


def _energy(model: nn.Module, kinds: Tensor, positions: Tensor) -> Tensor:
    count = len(kinds)
    i, j = pairs(count)
    found = model(
        {
            properties.Z: kinds,
            properties.R: positions,
            properties.idx_i: i,
            properties.idx_j: j,
            properties.offsets: torch.zeros(len(i), 3),
            properties.idx_m: torch.zeros(count, dtype=torch.long),
            properties.n_atoms: torch.tensor([count]),
        }
    )
    return found[properties.energy].sum()


def _by_positions(kind: type[nn.Module]) -> Problem:
    model = _potential(kind)
    kinds, places = ethanol()
    return by_inputs(lambda positions: _energy(model, kinds, positions), places)


def _by_parameters(kind: type[nn.Module]) -> Problem:
    model = _potential(kind)
    kinds, places = ethanol()
    forces = torch.randn_like(places)

    def loss() -> Tensor:
        at = places.clone().requires_grad_()
        energy = _energy(model, kinds, at)
        (slope,) = torch.autograd.grad(energy, at, create_graph=True)
        return (slope + forces).square().mean() + 0.01 * (energy - 1).square()

    return by_parameters(model, loss)


@MODELS.row("SchNet, energy of ethanol", "hessian", "positions")
def schnet() -> Problem:
    return _by_positions(representation.SchNet)


@MODELS.row("PaiNN, energy of ethanol", "hessian", "positions")
def painn() -> Problem:
    return _by_positions(representation.PaiNN)


@MODELS.row("PaiNN, misfit of energy and forces of ethanol")
def painn_forces() -> Problem:
    return _by_parameters(representation.PaiNN)
