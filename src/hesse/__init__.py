"""hesse: exact second derivatives of PyTorch functions."""

from hesse.answer import Result
from hesse.checks.certificate import Certificate
from hesse.data.loss import Loss
from hesse.errors import HesseError, HesseWarning
from hesse.estimators import eigsh as _eigsh
from hesse.estimators import estimate as _estimate
from hesse.estimators import logdet as _logdet
from hesse.estimators import solve as _solve
from hesse.estimators import spectrum as _spectrum
from hesse.estimators.eigsh import Eigenpairs
from hesse.estimators.estimate import Estimated
from hesse.estimators.solve import Solution
from hesse.estimators.spectrum import Spectrum
from hesse.operators import covariance as _covariance
from hesse.operators.covariance import Covariance
from hesse.operators.curvature import FisherOperator, GaussNewtonOperator, HessianOperator
from hesse.operators.objective import Objective
from hesse.planning.plan import Estimate, Plan, Share
from hesse.questions import approximate as _approximate
from hesse.questions import diagonal as _diagonal
from hesse.questions import hessian as _hessian
from hesse.questions import plan as _plan
from hesse.questions import products as _products
from hesse.questions import trace as _trace
from hesse.runtime.uncompiled import uncompiled as _uncompiled

__version__ = "0.2.0"

__all__ = [
    "Certificate",
    "Covariance",
    "Eigenpairs",
    "Estimate",
    "Estimated",
    "FisherOperator",
    "GaussNewtonOperator",
    "HesseError",
    "HesseWarning",
    "HessianOperator",
    "Loss",
    "Objective",
    "Plan",
    "Result",
    "Share",
    "Solution",
    "Spectrum",
    "approximate_diagonal",
    "covariance",
    "eigsh",
    "estimate_diagonal",
    "estimate_trace",
    "hessian",
    "hessian_blocks",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
    "logdet",
    "model_hessian_diagonal",
    "plan",
    "second_directional_derivative",
    "solve",
    "spectral_density",
]

approximate_diagonal = _uncompiled(_approximate.approximate_diagonal)
eigsh = _uncompiled(_eigsh.eigsh)
estimate_diagonal = _uncompiled(_estimate.estimate_diagonal)
estimate_trace = _uncompiled(_estimate.estimate_trace)
covariance = _uncompiled(_covariance.covariance)
hessian = _uncompiled(_hessian.hessian)
hessian_blocks = _uncompiled(_hessian.hessian_blocks)
hessian_diagonal = _uncompiled(_diagonal.hessian_diagonal)
hessian_trace = _uncompiled(_trace.hessian_trace)
hvp = _uncompiled(_products.hvp)
logdet = _uncompiled(_logdet.logdet)
model_hessian_diagonal = _uncompiled(_diagonal.model_hessian_diagonal)
plan = _uncompiled(_plan.plan)
second_directional_derivative = _uncompiled(_products.second_directional_derivative)
solve = _uncompiled(_solve.solve)
spectral_density = _uncompiled(_spectrum.spectral_density)
