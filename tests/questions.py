"""The questions as data: how each is asked, and what its answer is, read off the exact matrix."""

from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

import hesse
from oracle import relative_error


def _blocks(matrix, sizes):
    return [row.split(sizes, dim=1) for row in matrix.split(sizes)]


@dataclass(frozen=True)
class Question:
    """`ask` it; `exact` is its answer's parts, in the order of the answer."""

    name: str
    ask: object
    exact: object

    def error(self, value, matrix, tensors):
        """How far an answer is from the exact matrix, relative to the largest entry."""
        parts = self.exact(matrix, [tensor.numel() for tensor in tensors])
        expected = torch.cat([part.flatten() for part in parts])
        return relative_error(torch.cat([part.flatten() for part in pytree.tree_leaves(value)]), expected)


DIAGONAL = Question("diagonal", hesse.hessian_diagonal, lambda matrix, sizes: matrix.diagonal().split(sizes))
BLOCKS = Question(
    "blocks",
    hesse.hessian_blocks,
    lambda matrix, sizes: [row[i] for i, row in enumerate(_blocks(matrix, sizes))],
)
HESSIAN = Question(
    "hessian", hesse.hessian, lambda matrix, sizes: [b for row in _blocks(matrix, sizes) for b in row]
)
QUESTIONS = [DIAGONAL, BLOCKS, HESSIAN]
