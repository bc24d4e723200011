"""Architectures of Hugging Face's transformers, small, by their own losses.

A row names a model class; what most configurations call their sizes is given to all, and a row adds what is
different. Their norms, scores and losses are computed in float32 whatever the dtype of the model: here in
float64, but for the row that shows what that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.models.model import Catalogue, Problem, by_parameters

MODELS = Catalogue("transformers", ("transformers",))

Inputs = dict[str, Any]
Batch = Callable[[], Inputs]

_WORDS, _WIDTH, _SAMPLES, _LENGTH, _CLASSES = 20, 12, 3, 6, 3

# The sizes of a small text model, by the names that most configurations have for them.
_SMALL: Inputs = {
    "vocab_size": _WORDS,
    "hidden_size": _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SMALL | {"num_key_value_heads": 1, "head_dim": 6}
# The default kernel for all experts at once is one of float32 and narrower dtypes.
_EXPERTS = _GROUPED | {"num_experts_per_tok": 2, "experts_implementation": "eager"}
_GPT: Inputs = {
    "vocab_size": _WORDS,
    "n_embd": _WIDTH,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 20,
    "n_positions": 16,
}
_VISION: Inputs = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": _WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": _CLASSES,
}


class _Double(TorchFunctionMode):
    """What is to be float32 becomes float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Inputs | None = None
    ) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _row(
    name: str,
    what: str,
    model: str,
    batch: Batch,
    train: bool = False,
    casts: type[AbstractContextManager[Any]] = _Double,
    dtype: torch.dtype = torch.float64,
    **sizes: Any,
) -> None:
    MODELS.put(name, what, partial(_loss, model, batch, train, casts, sizes), dtype=dtype)


def _loss(
    model: str,
    batch: Batch,
    train: bool,
    casts: type[AbstractContextManager[Any]],
    sizes: Inputs,
) -> Problem:
    """What a model says of its own loss for a batch."""
    with casts():
        kind = getattr(transformers, model)
        built = kind(kind.config_class(**sizes)).to(torch.get_default_dtype())
    inputs = batch()

    def loss() -> Tensor:
        with casts():
            return built(**inputs).loss

    return by_parameters(built, loss, train)


def _words(low: int = 3) -> Tensor:
    return torch.randint(low, _WORDS, (_SAMPLES, _LENGTH))


def _next_words() -> Inputs:
    """Text whose next words are guessed."""
    words = _words()
    return {"input_ids": words, "labels": words}


def _masked_words() -> Inputs:
    """Text two of whose words are guessed, one sample shorter than the others."""
    words = _words()
    labels = torch.full_like(words, -100)
    labels[:, 1::3] = words[:, 1::3]
    seen = torch.ones_like(words)
    seen[0, -1] = 0
    return {"input_ids": words, "attention_mask": seen, "labels": labels}


def _classified_words() -> Inputs:
    return {"input_ids": _words(), "labels": torch.arange(_SAMPLES) % 2}


def _translated_words() -> Inputs:
    return {"input_ids": _words(), "labels": _words()[:, :5].contiguous()}


def _images(size: int = 8, channels: int = 1) -> Inputs:
    images = torch.randn(_SAMPLES, channels, size, size)
    return {"pixel_values": images, "labels": torch.arange(_SAMPLES) % _CLASSES}


# ---- text whose next word is guessed

_causal = partial(_row, batch=_next_words)
_causal("gpt2", "GPT-2, tied embeddings", "GPT2LMHeadModel", **_GPT)
_causal(
    "gpt-neo",
    "GPT-Neo, global and local attention",
    "GPTNeoForCausalLM",
    **_SMALL
    | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
)
_causal("bloom", "BLOOM, positions by ALiBi", "BloomForCausalLM", **_SMALL | {"n_layer": 2, "n_head": 2})
_causal("falcon", "Falcon, one key for all heads", "FalconForCausalLM", **_SMALL)
_causal("llama", "Llama, grouped queries", "LlamaForCausalLM", **_GROUPED)
_causal("llama-cast", "Llama, its norms in float32", "LlamaForCausalLM", casts=nullcontext, **_GROUPED)
_causal("gemma2", "Gemma 2, capped scores", "Gemma2ForCausalLM", **_GROUPED | {"sliding_window": 4})
_causal("nemotron", "Nemotron, squared ReLU", "NemotronForCausalLM", **_GROUPED)
_causal("mixtral", "Mixtral, four experts", "MixtralForCausalLM", **_EXPERTS | {"num_local_experts": 4})
_causal(
    "mixtral-grouped",
    "Mixtral, one kernel for all experts",
    "MixtralForCausalLM",
    casts=nullcontext,
    dtype=torch.float32,
    **_GROUPED | {"num_local_experts": 4},
)
_causal(
    "gpt-oss",
    "gpt-oss, four experts and sinks",
    "GptOssForCausalLM",
    **_EXPERTS | {"num_local_experts": 4, "sliding_window": 4},
)
_causal(
    "deepseek-v3",
    "DeepSeek V3, latent attention and experts",
    "DeepseekV3ForCausalLM",
    **_EXPERTS
    | {
        "num_key_value_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "head_dim": 4,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 1,
    },
)
_causal(
    "qwen3-next",
    "Qwen 3 Next, a gated delta rule and attention",
    "Qwen3NextForCausalLM",
    **_EXPERTS
    | {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
)
_causal(
    "recurrent-gemma",
    "RecurrentGemma, a linear recurrence and attention",
    "RecurrentGemmaForCausalLM",
    **_SMALL
    | {
        "num_key_value_heads": 1,
        "lru_width": _WIDTH,
        "attention_window_size": 4,
        "block_types": ["recurrent", "attention"],
    },
)
_causal(
    "mamba",
    "Mamba, a selective state space",
    "MambaForCausalLM",
    **_SMALL | {"state_size": 4, "time_step_rank": 2},
)
_causal(
    "mamba2",
    "Mamba 2",
    "Mamba2ForCausalLM",
    **_SMALL
    | {"hidden_size": 8, "state_size": 4, "num_heads": 4, "head_dim": 4, "n_groups": 1, "chunk_size": 4},
)
_row(
    "rwkv",
    "RWKV, a recurrence of weighted keys",
    "RwkvForCausalLM",
    lambda: _next_words() | {"use_cache": False},  # which is written in place
    **_SMALL | {"attention_hidden_size": _WIDTH},
)
_causal(
    "xlnet",
    "XLNet, relative positions",
    "XLNetLMHeadModel",
    vocab_size=_WORDS,
    d_model=_WIDTH,
    n_layer=2,
    n_head=2,
    d_inner=20,
)
_causal(
    "reformer",
    "Reformer, reversible layers",
    "ReformerModelWithLMHead",
    train=True,  # which it insists on for a gradient
    **_SMALL
    | {
        "attention_head_size": 6,
        "feed_forward_size": 20,
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
        "local_attn_chunk_length": 3,
        "is_decoder": True,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
)

# ---- text some of whose words are guessed, or its class

_masked = partial(_row, batch=_masked_words)
_masked("bert", "BERT", "BertForMaskedLM", **_SMALL)
_masked("albert", "ALBERT, one layer used twice", "AlbertForMaskedLM", **_SMALL | {"embedding_size": 8})
_masked(
    "deberta",
    "DeBERTa, disentangled attention",
    "DebertaForMaskedLM",
    **_SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
)
_masked(
    "longformer",
    "Longformer, windows of attention",
    "LongformerForMaskedLM",
    **_SMALL | {"attention_window": 4},
)
_row(
    "bigbird",
    "BigBird, blocks of attention",
    "BigBirdForSequenceClassification",
    lambda: {"input_ids": torch.randint(3, _WORDS, (1, 64)), "labels": torch.tensor([1])},
    **_SMALL
    | {
        "max_position_embeddings": 64,
        "attention_type": "block_sparse",
        "block_size": 4,
        "num_random_blocks": 1,
        "num_hidden_layers": 1,
    },
)
_row(
    "nystromformer",
    "Nyströmformer, attention by landmarks",
    "NystromformerForMaskedLM",
    _next_words,
    **_SMALL | {"num_landmarks": 2, "segment_means_seq_len": 6, "conv_kernel_size": 3},
)
_masked(
    "convbert",
    "ConvBERT, convolutions of spans",
    "ConvBertForMaskedLM",
    **_SMALL | {"embedding_size": _WIDTH, "head_ratio": 1, "conv_kernel_size": 3},
)
_masked(
    "modernbert",
    "ModernBERT",
    "ModernBertForMaskedLM",
    **_SMALL | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
)
_row(
    "fnet",
    "FNet, Fourier transforms for attention",
    "FNetForSequenceClassification",
    _classified_words,
    **_SMALL,
)


def _symbols() -> Inputs:
    batch = _masked_words()
    return {"inputs": batch.pop("input_ids"), **batch}


_row(
    "perceiver",
    "Perceiver, for text",
    "PerceiverForMaskedLM",
    _symbols,
    vocab_size=_WORDS,
    num_latents=4,
    d_latents=8,
    d_model=8,
    num_blocks=1,
    num_self_attends_per_block=1,
    num_self_attention_heads=2,
    num_cross_attention_heads=2,
    max_position_embeddings=_LENGTH,
    qk_channels=8,
    v_channels=8,
)

# ---- text from text

_translated = partial(_row, batch=_translated_words)
_T5: Inputs = {
    "vocab_size": _WORDS,
    "d_model": _WIDTH,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_BART: Inputs = {
    "vocab_size": _WORDS,
    "d_model": _WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_translated("t5", "T5, positions by buckets", "T5ForConditionalGeneration", **_T5)
_translated("bart", "BART", "BartForConditionalGeneration", **_BART)

# ---- images

_image = partial(_row, batch=_images)
_larger_image = partial(_row, batch=partial(_images, 16))
_STAGES: Inputs = {"num_channels": 1, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": _CLASSES}
_image("vit", "ViT", "ViTForImageClassification", **_VISION)
_image(
    "swin",
    "Swin, shifted windows",
    "SwinForImageClassification",
    image_size=8,
    patch_size=2,
    num_channels=1,
    embed_dim=8,
    depths=[2, 1],
    num_heads=[2, 2],
    window_size=2,
    mlp_ratio=2.0,
    num_labels=_CLASSES,
)
_image("convnext", "ConvNeXt", "ConvNextForImageClassification", num_stages=2, patch_size=2, **_STAGES)
_larger_image(
    "resnet",
    "ResNet, basic blocks",
    "ResNetForImageClassification",
    embedding_size=8,
    layer_type="basic",
    **_STAGES,
)
_larger_image(
    "bit",
    "BiT, group norms and standardised weights",
    "BitForImageClassification",
    embedding_size=8,
    num_groups=2,
    num_channels=1,
    hidden_sizes=[8, 16],
    depths=[1, 1],
    num_labels=_CLASSES,
)
_larger_image(
    "poolformer",
    "PoolFormer, pooling for attention",
    "PoolFormerForImageClassification",
    num_encoder_blocks=2,
    patch_sizes=[3, 3],
    strides=[2, 2],
    padding=[1, 1],
    mlp_ratio=2.0,
    **_STAGES,
)
_row(
    "mobilenet-v2",
    "MobileNet V2",
    "MobileNetV2ForImageClassification",
    partial(_images, 32),
    num_channels=1,
    depth_multiplier=0.1,
    min_depth=4,
    depth_divisible_by=4,
    num_labels=_CLASSES,
)
_row(
    "levit",
    "LeViT, batch norms in training",
    "LevitForImageClassification",
    partial(_images, 32, 3),
    train=True,  # in evaluation it keeps a graph from one call to the next
    image_size=32,
    hidden_sizes=[8, 8, 8],
    num_attention_heads=[2, 2, 2],
    depths=[1, 1, 1],
    key_dim=[4, 4, 4],
    mlp_ratio=[1, 1, 1],
    attention_ratio=[1, 1, 1],
    drop_path_rate=0,
    num_labels=_CLASSES,
)
_row(
    "efficientnet",
    "EfficientNet, squeezed channels",
    "EfficientNetForImageClassification",
    partial(_images, 16, 3),
    image_size=16,
    width_coefficient=0.02,
    depth_coefficient=0.1,
    hidden_dim=24,
    depth_divisor=4,
    kernel_sizes=[3, 3],
    in_channels=[4, 4],
    out_channels=[4, 8],
    depthwise_padding=[],
    strides=[1, 2],
    num_block_repeats=[1, 1],
    expand_ratios=[1, 4],
    num_labels=_CLASSES,
)
_row(
    "segformer",
    "SegFormer, classes of pixels",
    "SegformerForSemanticSegmentation",
    lambda: {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(_CLASSES, (2, 32, 32))},
    num_labels=_CLASSES,
    num_encoder_blocks=2,
    depths=[1, 1],
    sr_ratios=[2, 1],
    hidden_sizes=[8, 8],
    patch_sizes=[7, 3],
    strides=[4, 2],
    num_attention_heads=[1, 2],
    mlp_ratios=[2, 2],
    decoder_hidden_size=8,
)

# ---- images with text


def _pairs() -> Inputs:
    return {"input_ids": _words(), "pixel_values": torch.randn(_SAMPLES, 1, 8, 8), "return_loss": True}


_row(
    "clip",
    "CLIP, contrastive loss of images and texts",
    "CLIPModel",
    _pairs,
    text_config=_SMALL,
    vision_config=_VISION,
    projection_dim=8,
)
_row(
    "siglip",
    "SigLIP, sigmoid loss of all pairs",
    "SiglipModel",
    _pairs,
    text_config=_SMALL,
    vision_config=_VISION,
)

# ---- sounds

_SOUND: Inputs = {
    "hidden_size": _WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "conv_dim": [8, 8],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "num_labels": _CLASSES,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
}


def _sounds() -> Inputs:
    return {"input_values": torch.randn(_SAMPLES, 160), "labels": torch.arange(_SAMPLES)}


_row(
    "wav2vec2",
    "Wav2Vec 2, weight-normed positions",
    "Wav2Vec2ForSequenceClassification",
    _sounds,
    **_SOUND,
)
_row(
    "wav2vec2-ctc",
    "Wav2Vec 2, connectionist loss",
    "Wav2Vec2ForCTC",
    lambda: {"input_values": torch.randn(2, 160), "labels": torch.randint(3, 8, (2, 2))},
    **_SOUND | {"vocab_size": 8},
)
_row(
    "wavlm",
    "WavLM, gated relative positions",
    "WavLMForSequenceClassification",
    _sounds,
    **_SOUND | {"num_buckets": 8, "max_bucket_distance": 16},
)
_row(
    "whisper",
    "Whisper",
    "WhisperForConditionalGeneration",
    lambda: {"input_features": torch.randn(2, 8, 16), "labels": _words()[:2, :4].contiguous()},
    **_BART
    | {
        "num_mel_bins": 8,
        "max_source_positions": 8,
        "max_target_positions": 8,
        "begin_suppress_tokens": None,
        "suppress_tokens": None,
    },
)


@MODELS.row("EnCodec, convolutions and an LSTM, before its quantiser")
def encodec() -> Problem:
    config = transformers.EncodecConfig(
        num_filters=2,
        hidden_size=8,
        upsampling_ratios=[2, 2],
        num_lstm_layers=1,
        kernel_size=3,
        codebook_dim=8,
    )
    model = transformers.EncodecModel(config)
    model.quantizer.requires_grad_(False)
    sound = torch.randn(2, 1, 32)
    return by_parameters(model, lambda: (model.decoder(model.encoder(sound)) - sound).square().mean())


# ---- series in time

_PATCHES: Inputs = {
    "num_input_channels": 2,
    "context_length": 16,
    "patch_length": 4,
    "patch_stride": 4,
    "prediction_length": 4,
    "d_model": 8,
}
_FORECAST: Inputs = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
    "d_model": _WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}


def _series() -> Inputs:
    return {"past_values": torch.randn(_SAMPLES, 16, 2), "future_values": torch.randn(_SAMPLES, 4, 2)}


def _history() -> Inputs:
    return {
        "past_values": torch.randn(_SAMPLES, 10).abs() + 0.5,
        "past_time_features": torch.randn(_SAMPLES, 10, 1),
        "past_observed_mask": torch.ones(_SAMPLES, 10),
        "future_values": torch.randn(_SAMPLES, 4).abs() + 0.5,
        "future_time_features": torch.randn(_SAMPLES, 4, 1),
    }


_row(
    "patchtst",
    "PatchTST, forecast by patches",
    "PatchTSTForPrediction",
    _series,
    **_PATCHES | {"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16},
)
_row(
    "patchtsmixer",
    "PatchTSMixer, MLPs over patches",
    "PatchTSMixerForPrediction",
    _series,
    **_PATCHES | {"num_layers": 2},
)
_row(
    "informer",
    "Informer, sampled attention",
    "InformerForPrediction",
    _history,
    **_FORECAST | {"sampling_factor": 100},
)
_row(
    "autoformer",
    "Autoformer, autocorrelation",
    "AutoformerForPrediction",
    _history,
    **_FORECAST | {"label_length": 2, "moving_average": 3},
)
