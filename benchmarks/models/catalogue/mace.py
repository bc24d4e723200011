"""Potentials of MACE: the energy of a molecule or crystal by the places of its atoms."""

from __future__ import annotations

from typing import Any

# First, as it tells torch that the constants of e3nn may be loaded.
from mace import modules

# isort: split
import numpy as np
import torch
from e3nn import o3
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.model import Catalogue, Problem, by_inputs, by_parameters
from benchmarks.models.molecules import ethanol, pairs

MODELS = Catalogue("mace", ("mace-torch", "e3nn"))

_KINDS = [1, 6, 8]


def _options(elements: list[int], **more: Any) -> dict[str, Any]:
    return {
        "r_max": 5.0,
        "num_bessel": 4,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        "interaction_cls_first": modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        "num_interactions": 2,
        "num_elements": len(elements),
        "hidden_irreps": o3.Irreps("4x0e + 4x1o"),
        "MLP_irreps": o3.Irreps("4x0e"),
        "atomic_energies": np.zeros(len(elements)),
        "avg_num_neighbors": 8.0,
        "atomic_numbers": elements,
        "correlation": 2,
        "gate": F.silu,
        "radial_MLP": [8, 8],
        **more,
    }


def _graph(
    kinds: Tensor, elements: list[int], edges: Tensor, shifts: Tensor, cell: Tensor
) -> dict[str, Tensor]:
    which = torch.tensor([elements.index(kind) for kind in kinds.tolist()])
    count = len(kinds)
    return {
        "node_attrs": F.one_hot(which, len(elements)).to(torch.get_default_dtype()),
        "edge_index": edges,
        "shifts": shifts @ cell,
        "unit_shifts": shifts,
        "cell": cell,
        "batch": torch.zeros(count, dtype=torch.long),
        "ptr": torch.tensor([0, count]),
        "head": torch.zeros(1, dtype=torch.long),
    }


def _energy(model: nn.Module, graph: dict[str, Tensor], positions: Tensor) -> Tensor:
    return model({**graph, "positions": positions}, compute_force=False)["energy"].sum()


def _molecule() -> tuple[dict[str, Tensor], Tensor]:
    kinds, places = ethanol()
    edges = pairs(len(kinds))
    return _graph(kinds, _KINDS, edges, torch.zeros(edges.shape[1], 3), torch.eye(3)), places


@MODELS.row("MACE, energy of ethanol", "hessian", "positions")
def energy() -> Problem:
    model = modules.MACE(**_options(_KINDS)).eval()
    graph, places = _molecule()
    return by_inputs(lambda positions: _energy(model, graph, positions), places)


@MODELS.row("MACE with scale and shift, energy of 8 silicon atoms of a crystal", "hessian", "positions")
def crystal() -> Problem:
    length = 5.43
    corners = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
    places = length * torch.cat([corners, corners + 0.25])
    cells = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3).to(places.dtype)
    apart = places[None, :, None] + length * cells - places[:, None, None]
    i, j, k = torch.nonzero((apart.norm(dim=-1) < 4.5) & (apart.norm(dim=-1) > 0.1)).T
    graph = _graph(torch.full((8,), 14), [14], torch.stack([i, j]), cells[k], length * torch.eye(3))
    model = modules.ScaleShiftMACE(
        **_options([14], r_max=4.5, avg_num_neighbors=16.0), atomic_inter_scale=0.8, atomic_inter_shift=-0.1
    ).eval()
    return by_inputs(lambda positions: _energy(model, graph, positions), places + 0.05 * torch.randn(8, 3))


@MODELS.row("MACE, misfit of energy and forces of ethanol")
def forces() -> Problem:
    model = modules.MACE(**_options(_KINDS, hidden_irreps=o3.Irreps("2x0e + 2x1o"), max_ell=1))
    graph, places = _molecule()
    wanted = torch.randn_like(places)

    def loss() -> Tensor:
        at = places.clone().requires_grad_()
        energy = _energy(model, graph, at)
        (slope,) = torch.autograd.grad(energy, at, create_graph=True)
        return (slope + wanted).square().mean() + 0.01 * (energy - 1).square()

    return by_parameters(model, loss)
