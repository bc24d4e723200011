"""hesse: exact second derivatives of PyTorch functions."""

from hesse.answer import Result
from hesse.certificate import Certificate
from hesse.errors import HesseError, HesseWarning
from hesse.planning import Estimate, Plan, Share
from hesse.questions.approximate import approximate_diagonal
from hesse.questions.diagonal import hessian_diagonal, model_hessian_diagonal
from hesse.questions.hessian import hessian, hessian_blocks
from hesse.questions.plan import plan
from hesse.questions.products import hvp, second_directional_derivative
from hesse.questions.trace import hessian_trace

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "Estimate",
    "HesseError",
    "HesseWarning",
    "Plan",
    "Result",
    "Share",
    "approximate_diagonal",
    "hessian",
    "hessian_blocks",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
    "model_hessian_diagonal",
    "plan",
    "second_directional_derivative",
]
