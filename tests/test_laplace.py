"""The backend of laplace-torch: posterior precisions beside explicit matrices by autograd."""

import copy

import pytest
import torch
from laplace import Laplace
from laplace.curvature import BackPackGGN, CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hesse.errors import ArgumentError
from hesse.integrations.laplace import HesseGGN, HesseHessian
from oracle import hessian_matrix, relative_error

PRIOR, SIGMA = 0.75, 0.5  # exact in float32, which laplace-torch keeps them in


class Residual(nn.Module):
    """What BackPACK refuses: a sum of two branches, layer norm, GELU, attention."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x).unsqueeze(1) * torch.arange(1, 4, dtype=x.dtype).view(1, 3, 1)
        h = h + self.attention(*[nn.functional.gelu(self.norm(h))] * 3, need_weights=False)[0]
        return self.last(h.mean(1))


def perceptron():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def problem(make, likelihood):
    model, x = make().double(), torch.randn(7, 3, dtype=torch.float64)
    y = torch.randint(0, 2, (7,)) if likelihood == "classification" else torch.randn(7, 2).double()
    return model, DataLoader(TensorDataset(x, y), batch_size=4), x, y


def jacobian(outputs, parameters):
    """Of all outputs [K, P], by plain autograd."""
    rows = [torch.autograd.grad(z, parameters, retain_graph=True) for z in outputs.flatten()]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def exact(backend, model, likelihood, x, y, parameters):
    """The curvature of the negative log-likelihood, a sum over samples, without its noise."""
    z = model(x)
    if backend is HesseHessian:

        def nll(*leaves):
            named = dict(zip(names, leaves, strict=True))
            out = torch.func.functional_call(model, named, x)
            if likelihood == "regression":
                return (out - y).square().sum() / 2
            return nn.functional.cross_entropy(out, y, reduction="sum")

        names = [name for name, p in model.named_parameters() if any(p is q for q in parameters)]
        return hessian_matrix(nll, parameters)
    J = jacobian(z, parameters)
    if likelihood == "regression":
        return J.T @ J
    p = z.softmax(1).detach()
    of_output = torch.block_diag(*(row.diag() - row.outer(row) for row in p))
    return J.T @ of_output @ J


def precision(model, likelihood, data, structure, backend, subset="all", **options):
    noise = {"sigma_noise": SIGMA} if likelihood == "regression" else {}
    la = Laplace(
        model, likelihood, subset, structure, prior_precision=PRIOR, backend=backend, **noise, **options
    )
    la.fit(data)
    return la.posterior_precision.detach(), la


def assert_is(found, curvature, likelihood):
    scale = 1 / SIGMA**2 if likelihood == "regression" else 1.0
    matrix = scale * curvature
    expected = matrix.diagonal() + PRIOR if found.dim() == 1 else matrix + PRIOR * torch.eye(len(matrix))
    assert relative_error(found, expected) < 1e-12


both = pytest.mark.parametrize("likelihood", ["classification", "regression"])
structures = pytest.mark.parametrize("structure", ["diag", "full"])


@both
@structures
@pytest.mark.parametrize("backend", [HesseGGN, HesseHessian])
@pytest.mark.parametrize("make", [perceptron, Residual])
def test_posterior_precision_is_that_of_autograd(make, backend, structure, likelihood):
    model, data, x, y = problem(make, likelihood)
    found, la = precision(model, likelihood, data, structure, backend)
    assert_is(found, exact(backend, model, likelihood, x, y, list(model.parameters())), likelihood)
    own = {"classification": nn.CrossEntropyLoss, "regression": nn.MSELoss}[likelihood](reduction="sum")
    assert torch.isclose(la.loss, own(model(x), y) * (0.5 if likelihood == "regression" else 1))


@both
@structures
@pytest.mark.parametrize("backend", [HesseGGN, HesseHessian])
def test_last_layer_and_frozen_parameters(backend, structure, likelihood):
    model, data, x, y = problem(Residual, likelihood)
    found, _ = precision(model, likelihood, data, structure, backend, "last_layer")
    assert_is(found, exact(backend, model, likelihood, x, y, list(model.last.parameters())), likelihood)
    model.attention.requires_grad_(False)
    left = [p for p in model.parameters() if p.requires_grad]
    found, _ = precision(model, likelihood, data, structure, backend)
    assert_is(found, exact(backend, model, likelihood, x, y, left), likelihood)


@both
@structures
def test_a_subnetwork(structure, likelihood):
    model, data, x, y = problem(Residual, likelihood)
    chosen = torch.tensor([3, 0, 17, 40])
    found, _ = precision(
        model, likelihood, data, structure, HesseGGN, "subnetwork", subnetwork_indices=chosen
    )
    whole = exact(HesseGGN, model, likelihood, x, y, list(model.parameters()))
    assert_is(found, whole[chosen][:, chosen], likelihood)


hooks = pytest.mark.filterwarnings("ignore:.*(full|module|Full) backward hook:Warning")  # BackPACK's


@both
@structures
@hooks
@pytest.mark.parametrize("theirs", [BackPackGGN, CurvlinopsGGN])
def test_it_agrees_with_the_backends_of_laplace_on_a_perceptron(theirs, structure, likelihood):
    model, data, *_ = problem(perceptron, likelihood)
    found, la = precision(model, likelihood, data, structure, HesseGGN)
    expected, other = precision(copy.deepcopy(model), likelihood, data, structure, theirs)
    # CurvlinopsGGN multiplies by an identity in float32.
    single = theirs is CurvlinopsGGN and structure == "full"
    assert relative_error(found, expected) < (1e-6 if single else 1e-12)
    assert torch.isclose(la.log_marginal_likelihood(), other.log_marginal_likelihood())


@hooks
def test_backpack_refuses_the_residual_network():
    model, data, *_ = problem(Residual, "classification")
    with pytest.raises(NotImplementedError, match="does not have an extension"):
        precision(model, "classification", data, "diag", BackPackGGN)


@both
def test_stochastic_has_the_exact_matrix_for_its_mean(likelihood):
    model, data, *_ = problem(perceptron, likelihood)
    expected, _ = precision(model, likelihood, data, "diag", HesseGGN)
    options = {"backend_kwargs": {"stochastic": True, "num_samples": 30}}
    found, _ = precision(model, likelihood, data, "diag", HesseGGN, **options)
    assert 1e-3 < abs(found.sum() / expected.sum() - 1) < 0.3


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # laplace-torch's Jacobians
def test_predictions():
    model, data, x, _ = problem(Residual, "regression")
    found, la = precision(model, "regression", data, "full", HesseGGN)
    mean, variance = la(x)
    J = jacobian(model(x), list(model.parameters())).view(7, 2, -1)
    assert torch.allclose(mean, model(x))
    assert torch.allclose(variance, J @ found.inverse() @ J.mT)


def test_a_dict_of_inputs():
    class OfDict(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.last = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, batch):
            return self.last(torch.tanh(self.table(batch["input_ids"])).mean(1))

    model = OfDict().double()
    ids, labels = torch.randint(0, 5, (6, 3)), torch.randint(0, 2, (6,))
    samples = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    found, _ = precision(model, "classification", DataLoader(samples, batch_size=4), "full", HesseGGN)
    expected = exact(HesseGGN, model, "classification", {"input_ids": ids}, labels, list(model.parameters()))
    assert_is(found, expected, "classification")


@pytest.mark.parametrize("backend", [HesseGGN, HesseHessian])
def test_kron_is_refused(backend):
    model, data, *_ = problem(perceptron, "regression")
    with pytest.raises(ArgumentError, match="hessian_structure"):
        precision(model, "regression", data, "kron", backend)
