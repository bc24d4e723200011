"""What hesse raises and warns of.

Every error is a `HesseError` and also what torch or Python raises in the same place, so that code
written for `torch.autograd.functional` keeps catching it.
"""

import contextlib
import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)
_COMPILER = str(Path("torch", "_dynamo"))  # which public functions pass through where it is loaded


class HesseError(Exception):
    """Base of all errors that hesse raises itself."""


class NotATensorError(HesseError, TypeError):
    """An argument holds something that is no tensor, or a tensor of an unsupported layout."""


class DtypeError(HesseError, TypeError, RuntimeError):
    """A tensor's dtype has no second derivative here (integer, boolean, complex)."""


class ArgumentError(HesseError, ValueError, RuntimeError):
    """An argument has the wrong value, shape, structure or device."""


class OutputError(HesseError, RuntimeError):
    """The function's output is no real scalar that can be differentiated."""


class OutputTypeError(OutputError, TypeError):
    """The function's output is no tensor."""


class StructureMismatchError(ArgumentError, TypeError):
    """A container is not like the one it goes with, or not what the function takes."""


class IndependentError(HesseError, RuntimeError):
    """With `strict=True`: a tensor does not require grad, or does not influence the output."""


class NotDeterministicError(HesseError, RuntimeError):
    """Two evaluations of the function at the same point differ."""


class NotTwiceDifferentiableError(HesseError, RuntimeError):
    """An operation has no double backward, or one that is not the derivative of the function."""


class StructureError(HesseError, RuntimeError):
    """The calls of a function cannot be followed, where a question is answered from them alone."""


class BudgetError(HesseError, MemoryError):
    """The memory budget cannot hold the answer itself."""


class HesseWarning(UserWarning):
    """Base of all warnings that hesse gives itself."""


class NonFiniteWarning(HesseWarning):
    """A NaN or an infinity in the inputs, the value, the gradient or the result."""


class PrecisionWarning(HesseWarning):
    """Second derivatives are asked for in half precision, or the function computes in fewer digits."""


class DerivativeWarning(HesseWarning):
    """The derivatives that autograd gives are not those of the function: a part of it is without a graph."""


class IndependentWarning(HesseWarning):
    """None of the tensors requires grad, so that all derivatives are zero."""


class DataWarning(HesseWarning):
    """The loss of data depends on how they lie in batches."""


class BudgetWarning(HesseWarning):
    """The memory budget does not hold what has to be there at once."""


class CertificateWarning(HesseWarning):
    """A result failed its check and was computed again by a slower way."""


def warn(category: type[HesseWarning], message: str) -> None:
    """Warn at the line of the caller's that called hesse, however deep in hesse this is."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, category, stacklevel=depth)


def _is_ours(file: str) -> bool:
    return file.startswith(_PACKAGE) or file == contextlib.__file__ or _COMPILER in file
