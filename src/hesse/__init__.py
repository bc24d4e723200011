"""hesse: exact second derivatives of PyTorch functions."""

from hesse.answer import Result
from hesse.checks.certificate import Certificate
from hesse.data.loss import Loss
from hesse.errors import HesseError, HesseWarning
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
    "Estimate",
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
    "approximate_diagonal",
    "covariance",
    "hessian",
    "hessian_blocks",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
    "model_hessian_diagonal",
    "plan",
    "second_directional_derivative",
]

approximate_diagonal = _uncompiled(_approximate.approximate_diagonal)
covariance = _uncompiled(_covariance.covariance)
hessian = _uncompiled(_hessian.hessian)
hessian_blocks = _uncompiled(_hessian.hessian_blocks)
hessian_diagonal = _uncompiled(_diagonal.hessian_diagonal)
hessian_trace = _uncompiled(_trace.hessian_trace)
hvp = _uncompiled(_products.hvp)
model_hessian_diagonal = _uncompiled(_diagonal.model_hessian_diagonal)
plan = _uncompiled(_plan.plan)
second_directional_derivative = _uncompiled(_products.second_directional_derivative)
