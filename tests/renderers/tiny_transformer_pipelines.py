"""Diffusers' pipelines of transformers, at random weights and the smallest sizes their classes allow."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PaddleOCRVLProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 16
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def flux(*, guidance_embeds: bool = True) -> DiffusionPipeline:
    return _seeded(FluxPipeline, lambda: _flux_parts(guidance_embeds))


def flux_kontext() -> DiffusionPipeline:
    return _seeded(FluxKontextPipeline, lambda: _flux_parts(True))


def flux_2_klein() -> DiffusionPipeline:
    def parts() -> dict[str, Any]:
        vae = AutoencoderKLFlux2(**_vae_sizes(), batch_norm_eps=1e-4)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        return {
            "vae": vae,
            "text_encoder": Qwen3ForCausalLM(_qwen_3(num_layers=27)),  # layers 9, 18 and 27 are read
            "tokenizer": _qwen_tokenizer(),
            "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "transformer": Flux2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=3 * WIDTH,
                timestep_guidance_channels=8,
                axes_dims_rope=(2, 2, 2, 2),
                guidance_embeds=False,
            ),
        }

    return _seeded(Flux2KleinPipeline, parts)


def qwen_image() -> DiffusionPipeline:
    return _seeded(QwenImagePipeline, _qwen_parts)


def qwen_image_edit() -> DiffusionPipeline:
    """The published pipeline's Qwen2VLProcessor cannot be made without torchvision; this one treats pictures alike."""

    def parts() -> dict[str, Any]:
        found = _qwen_parts()
        images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096})
        return {**found, "processor": PaddleOCRVLProcessor(images, found["tokenizer"])}

    return _seeded(QwenImageEditPipeline, parts)


def z_image() -> DiffusionPipeline:
    def parts() -> dict[str, Any]:
        return {
            "vae": AutoencoderKL(**_vae_sizes(), scaling_factor=0.36, shift_factor=0.12),
            "text_encoder": Qwen3Model(_qwen_3(num_layers=2)),
            "tokenizer": _qwen_tokenizer(),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
            "transformer": ZImageTransformer2DModel(
                in_channels=4,
                dim=WIDTH,
                n_layers=1,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=WIDTH,
                axes_dims=[4, 2, 2],
                axes_lens=[1024, 32, 32],
            ),
        }

    return _seeded(ZImagePipeline, parts)


# ---- Parts -------------------------------------------------------------------------------------------


def _seeded(pipeline: type[DiffusionPipeline], parts: Callable[[], dict[str, Any]]) -> DiffusionPipeline:
    """Returns a pipeline of the same weights every time: all of them matter, and attention tells tokens apart."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = parts()
        for module in built.values():
            if isinstance(module, torch.nn.Module):
                module.eval().requires_grad_(False)
        for weight in built["transformer"].parameters():
            random = 0.2 * torch.randn_like(weight)
            weight.copy_(weight + random if weight.ndim == 1 else random)  # scales of norms stay near 1
        pipe = pipeline(**built)
    pipe.transformer.requires_grad_(True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _vae_sizes() -> dict[str, Any]:
    return {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 32,
    }


def _flux_parts(guidance_embeds: bool) -> dict[str, Any]:
    letters, words = _clip_tokenizer(), _t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(letters),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=letters.bos_token_id,
        eos_token_id=letters.eos_token_id,
        pad_token_id=letters.pad_token_id,
    )
    t5 = T5Config(vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    return {
        "vae": AutoencoderKL(**_vae_sizes(), scaling_factor=0.36, shift_factor=0.12),
        "text_encoder": CLIPTextModel(clip),
        "tokenizer": letters,
        "text_encoder_2": T5EncoderModel(t5),
        "tokenizer_2": words,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "transformer": FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        ),
    }


def _qwen_parts() -> dict[str, Any]:
    tokenizer = _qwen_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_heads": 2, "patch_size": 4}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": WIDTH, "window_size": 16, "fullatt_block_indexes": [0]},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
    )
    return {
        "vae": AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.7, 0.1, 0.9, -0.2],
            latents_std=[2.8, 1.4, 0.6, 1.2],
        ),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": tokenizer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        "transformer": QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 2, 2),
        ),
    }


def _qwen_3(*, num_layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(_qwen_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


def _letters() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _clip_tokenizer() -> CLIPTokenizer:
    names = ["<|startoftext|>", "<|endoftext|>", *_letters(), *(f"{letter}</w>" for letter in _letters())]
    return CLIPTokenizer({name: i for i, name in enumerate(names)}, [], model_max_length=77)


def _t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    return T5Tokenizer([(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    names = ["<|endoftext|>", *_letters()]
    return Qwen2Tokenizer(
        {name: i for i, name in enumerate(names)},
        [],
        additional_special_tokens=list(SPECIAL),
        extra_special_tokens={"image_token": "<|image_pad|>"},
        chat_template=CHAT,
    )
