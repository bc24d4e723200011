"""A potential of TorchANI: symmetry functions of ethanol, and a network for each element."""

from __future__ import annotations

from torch import Tensor, nn
from torchani.aev import ANIAngular, ANIRadial
from torchani.arch import Assembler
from torchani.nn import ANINetworks

from benchmarks.models.model import Catalogue, Problem, by_inputs, by_parameters
from benchmarks.models.molecules import ethanol

MODELS = Catalogue("torchani", ("torchani",))


def _potential() -> nn.Module:
    assembler = Assembler(symbols=("H", "C", "O"))
    assembler.set_zeros_as_self_energies()
    assembler.set_aev_computer(
        radial=ANIRadial.cover_linearly(num_shifts=6),
        angular=ANIAngular.cover_linearly(num_shifts=2, num_sections=2),
    )
    assembler.set_atomic_networks(
        ANINetworks, "build", {"dims": {}, "default_dims": (12, 8), "activation": "celu", "bias": True}
    )
    return assembler.assemble()


@MODELS.row("ANI, energy of ethanol", "hessian", "positions")
def energy() -> Problem:
    model = _potential().eval()
    kinds, places = ethanol()
    return by_inputs(lambda positions: model((kinds[None], positions[None])).energies.sum(), places)


@MODELS.row("ANI, misfit of four energies of ethanol")
def energies() -> Problem:
    model = _potential()
    molecules = [ethanol()[1] for _ in range(4)]
    kinds = ethanol()[0]

    def loss() -> Tensor:
        found = [model((kinds[None], places[None])).energies.sum() for places in molecules]
        return sum((energy - 1).square() for energy in found) / len(found)

    return by_parameters(model, loss)
