"""Graph networks from PyTorch Geometric: nodes are classified, and energies of molecules found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.nn import models
from torch_geometric.nn.conv import GATv2Conv, GCN2Conv, GINEConv, RGCNConv, TransformerConv
from torch_geometric.nn.pool import global_mean_pool

from benchmarks.models.model import Catalogue, Problem, by_inputs, by_parameters
from benchmarks.models.molecules import ethanol, pairs

MODELS = Catalogue("torch_geometric", ("torch-geometric",))

_NODES, _FEATURES, _CLASSES = 20, 5, 3


def _graph(nodes: int = _NODES, edges: int = 50) -> Data:
    """A graph at random, both ways along each edge."""
    one = torch.randint(nodes, (2, edges))
    one = one[:, one[0] != one[1]]
    both = torch.cat([one, one.flip(0)], 1)
    return Data(
        x=torch.randn(nodes, _FEATURES),
        edge_index=both,
        edge_attr=torch.randn(both.shape[1], 2),
        y=torch.arange(nodes) % _CLASSES,
    )


def _nodes(make: Callable[[Data], nn.Module], train: bool) -> Problem:
    """Cross entropy of a network that classifies the nodes of a graph."""
    graph = _graph()
    model = make(graph)

    def loss() -> Tensor:
        return F.cross_entropy(model(graph.x, graph.edge_index), graph.y)

    return by_parameters(model, loss, train)


def _basic(model: type[nn.Module], **options: Any) -> Callable[[Data], nn.Module]:
    return lambda graph: model(_FEATURES, 24, 2, _CLASSES, **options)


def _row(name: str, what: str, make: Callable[[Data], nn.Module], train: bool = False) -> None:
    MODELS.put(name, what, partial(_nodes, make, train))


_row("gcn", "graph convolutions", _basic(models.GCN, act="tanh"))
_row(
    "gcn-train", "graph convolutions with batch norm, in training", _basic(models.GCN, norm="BatchNorm"), True
)
_row("gat", "graph attention", _basic(models.GAT, heads=2, act="elu"))
_row("gat-v2", "graph attention of the second kind", _basic(models.GAT, heads=2, v2=True, act="elu"))
_row("gin", "graph isomorphism network", _basic(models.GIN, train_eps=True, act="silu"))
_row("graph-sage", "GraphSAGE, by the largest of the neighbours", _basic(models.GraphSAGE, aggr="max"))
_row("edge-cnn", "edge convolutions", _basic(models.EdgeCNN, act="gelu"))


def _pna(graph: Data) -> nn.Module:
    degrees = torch.bincount(torch.bincount(graph.edge_index[1], minlength=_NODES))
    return models.PNA(
        _FEATURES,
        8,
        2,
        _CLASSES,
        aggregators=["mean", "min", "max", "std"],
        scalers=["identity", "amplification", "attenuation"],
        deg=degrees,
    )


_row("pna", "principal neighbourhood aggregation", _pna)


class _Stack(nn.Module):
    """Convolutions that look at what belongs to an edge."""

    def __init__(self, convolutions: list[nn.Module], labels: Tensor) -> None:
        super().__init__()
        self.convolutions, self.labels = nn.ModuleList(convolutions), labels

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for i, convolution in enumerate(self.convolutions):
            x = convolution(F.silu(x) if i else x, edges, self.labels)
        return x


_row(
    "transformer-conv",
    "graph transformer, with edges in its attention",
    lambda graph: _Stack(
        [
            TransformerConv(_FEATURES, 6, heads=2, edge_dim=2, beta=True),
            TransformerConv(12, _CLASSES, edge_dim=2),
        ],
        graph.edge_attr,
    ),
)
_row(
    "gat-v2-edges",
    "graph attention with edges",
    lambda graph: _Stack(
        [GATv2Conv(_FEATURES, 6, heads=2, edge_dim=2), GATv2Conv(12, _CLASSES, edge_dim=2)], graph.edge_attr
    ),
)
_row(
    "rgcn",
    "graph convolutions with relations of four kinds, in two bases",
    lambda graph: _Stack(
        [RGCNConv(_FEATURES, 6, 4, num_bases=2), RGCNConv(6, _CLASSES, 4)],
        torch.arange(graph.edge_index.shape[1]) % 4,
    ),
)


class _Deep(nn.Module):
    """GCNII: every layer sees the first features again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(_FEATURES, 8), nn.Linear(8, _CLASSES)
        self.layers = nn.ModuleList([GCN2Conv(8, 0.1, 0.5, k + 1, shared_weights=False) for k in range(3)])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        first = x = torch.tanh(self.first(x))
        for layer in self.layers:
            x = torch.tanh(layer(x, first, edges))
        return self.last(x)


_row("gcn-2", "GCNII, with initial residuals", lambda graph: _Deep())


@MODELS.row("graph isomorphism network that classifies whole graphs, with edges")
def gine_graphs() -> Problem:
    batch = Batch.from_data_list([_graph(6, 8) for _ in range(4)])
    layers = nn.ModuleList(
        [
            GINEConv(nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, 8)), edge_dim=2)
            for width in (_FEATURES, 8)
        ]
    )
    last = nn.Linear(8, _CLASSES)

    def loss() -> Tensor:
        x = batch.x
        for layer in layers:
            x = F.gelu(layer(x, batch.edge_index, batch.edge_attr))
        return F.cross_entropy(last(global_mean_pool(x, batch.batch)), torch.arange(4) % _CLASSES)

    return by_parameters(nn.ModuleList([*layers, last]), loss)


def _schnet() -> tuple[nn.Module, Tensor, Tensor]:
    (kinds, places), edges = ethanol(), pairs(9)

    def graph(positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        # The package's own needs a compiled companion.
        return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)

    model = models.SchNet(
        hidden_channels=16, num_filters=16, num_interactions=2, num_gaussians=10, interaction_graph=graph
    )
    return model.eval(), kinds, places


@MODELS.row("SchNet, energy of ethanol", "hessian", "positions")
def schnet() -> Problem:
    model, kinds, places = _schnet()
    return by_inputs(lambda positions: model(kinds, positions).sum(), places)


@MODELS.row("SchNet, misfit of energy and forces of ethanol")
def schnet_forces() -> Problem:
    model, kinds, places = _schnet()
    forces = torch.randn_like(places)

    def loss() -> Tensor:
        at = places.clone().requires_grad_()
        energy = model(kinds, at).sum()
        (slope,) = torch.autograd.grad(energy, at, create_graph=True)
        return (slope + forces).square().mean() + (energy - 1).square()

    return by_parameters(model, loss)
