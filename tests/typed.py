"""What a type checker knows of the public functions: `make lint` reads it, and nothing runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import assert_type

    import hesse

    point = torch.ones(3)
    assert_type(hesse.hessian(torch.sum, point, full_output=True), hesse.Result)
    assert_type(hesse.hessian_blocks(torch.sum, point, full_output=True, method="dense"), hesse.Result)
    assert_type(hesse.hessian_diagonal(torch.sum, point, flat=True, full_output=True), hesse.Result)
    assert_type(hesse.hessian_trace(torch.sum, point, check="differences", full_output=True), hesse.Result)
    assert_type(hesse.hessian_trace(torch.sum, point), Tensor)
