"""Architectures of x-transformers: next words, and classified images."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from x_transformers import (
    AutoregressiveWrapper,
    Decoder,
    Encoder,
    TransformerWrapper,
    ViTransformerWrapper,
    XTransformer,
)

from benchmarks.models.model import Catalogue, Problem, by_parameters

MODELS = Catalogue("x_transformers", ("x-transformers",))

_WORDS, _WIDTH, _LENGTH = 16, 12, 6
_SMALL = {"dim": _WIDTH, "depth": 2, "heads": 2, "attn_dim_head": 6, "ff_mult": 2}


def _next_words(**options: Any) -> Problem:
    model = AutoregressiveWrapper(
        TransformerWrapper(
            num_tokens=_WORDS, max_seq_len=_LENGTH + 1, attn_layers=Decoder(**_SMALL, **options)
        )
    )
    words = torch.randint(_WORDS, (3, _LENGTH + 1))

    def loss() -> Tensor:
        return model(words)

    return by_parameters(model, loss)


def _row(name: str, what: str, **options: Any) -> None:
    MODELS.put(name, what, partial(_next_words, **options))


_row("gpt", "decoder as in GPT")
_row(
    "llama",
    "decoder with rotary positions, SwiGLU, root mean square norms and grouped queries",
    rotary_pos_emb=True,
    ff_swish=True,
    ff_glu=True,
    use_rmsnorm=True,
    attn_kv_heads=1,
)
_row(
    "normalised",
    "decoder with ALiBi, norms of queries and keys, sandwich norms and squared ReLU",
    alibi_pos_bias=True,
    alibi_num_heads=2,
    attn_qk_norm=True,
    sandwich_norm=True,
    ff_relu_squared=True,
)
_row(
    "gated",
    "decoder with gated residuals, talking heads and gated values",
    gate_residual=True,
    attn_pre_talking_heads=True,
    attn_gate_values=True,
    attn_on_attn=True,
)


@MODELS.row("encoder and decoder")
def encoder_decoder() -> Problem:
    model = XTransformer(
        dim=_WIDTH,
        enc_num_tokens=_WORDS,
        enc_depth=1,
        enc_heads=2,
        enc_max_seq_len=_LENGTH,
        enc_attn_dim_head=6,
        dec_num_tokens=_WORDS,
        dec_depth=1,
        dec_heads=2,
        dec_max_seq_len=_LENGTH,
        dec_attn_dim_head=6,
    )
    source, target = torch.randint(_WORDS, (3, _LENGTH)), torch.randint(_WORDS, (3, _LENGTH))

    def loss() -> Tensor:
        return model(source, target)

    return by_parameters(model, loss)


@MODELS.row("vision transformer")
def vit() -> Problem:
    model = ViTransformerWrapper(
        image_size=8, patch_size=4, channels=1, num_classes=3, attn_layers=Encoder(**_SMALL)
    )
    images, kinds = torch.randn(4, 1, 8, 8), torch.arange(4) % 3

    def loss() -> Tensor:
        return F.cross_entropy(model(images), kinds)

    return by_parameters(model, loss)
