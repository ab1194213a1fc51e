"""Real diffusers pipelines at tiny random configurations: UNets, Stable Diffusion 3, Sana. No file, no download."""

import inspect
import string
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

LETTERS = string.ascii_lowercase + string.digits + string.punctuation
LATENT_CHANNELS = 4
SEED = 7


def seeded(build: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the builder at the same weights every time; its pipeline has no progress bars."""

    @wraps(build)
    def built(*args: Any, **settings: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            pipe = build(*args, **settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return built


def clip_tokenizer() -> Any:
    """Returns a CLIPTokenizer whose tokens are characters."""
    from transformers import CLIPTokenizer

    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    """Returns a T5Tokenizer whose tokens are characters."""
    from transformers import T5Tokenizer

    tokens = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(token, -1.0 if i > 2 else 0.0) for i, token in enumerate(tokens)], extra_ids=0)


def gemma_tokenizer() -> Any:
    """Returns a GemmaTokenizer of characters and Sana's instructions, a token a line, with <bos> in front."""
    from diffusers import SanaPipeline
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *LETTERS]
    tokenizer = GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], add_bos_token=True)
    tokenizer.add_tokens(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
    return tokenizer


def clip(width: int = 8, *, projected: bool = False) -> Any:
    """Returns a CLIP text encoder over `clip_tokenizer`'s tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return spread((CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval())


def t5(width: int = 16) -> Any:
    """Returns a T5 encoder over `t5_tokenizer`'s tokens."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=4 + len(LETTERS), d_model=width, d_ff=16, d_kv=4, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def gemma2(tokenizer: Any, width: int = 8) -> Any:
    """Returns a Gemma 2 model over the tokenizer's tokens."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=4096,
    )
    return spread(Gemma2Model(config).eval())


def autoencoder(*, shift: float | None = None) -> Any:
    """Returns an AutoencoderKL of two levels: a latent is 2 × 2 pixels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=16,
        scaling_factor=0.5,
        shift_factor=shift,
    ).eval()


def unet(cross_attention_dim: int = 8, **settings: Any) -> Any:
    """Returns a UNet2DConditionModel of two levels, for latents of 8 × 8."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
        **settings,
    )
    return model.eval()


def ddim(prediction_type: str = "epsilon") -> Any:
    """Returns the DDIMScheduler that the published models' settings make."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


@seeded
def stable_diffusion(prediction_type: str = "epsilon") -> Any:
    """Returns a StableDiffusionPipeline that draws 16 × 16 pixels."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=ddim(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@seeded
def stable_diffusion_xl(prediction_type: str = "epsilon", *, force_zeros: bool = True) -> Any:
    """Returns a StableDiffusionXLPipeline that draws 16 × 16 pixels."""
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip(8),
        text_encoder_2=clip(12, projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            20,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 12,
        ),
        scheduler=ddim(prediction_type),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )


@seeded
def gligen() -> Any:
    """Returns a StableDiffusionGLIGENPipeline that draws 16 × 16 pixels; its gates are open, and boxes matter."""
    from diffusers import StableDiffusionGLIGENPipeline

    model = unet(attention_type="gated")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha_" in name or "null_" in name:
                parameter.normal_()
            elif "position_net" in name:
                parameter.mul_(2)
    return StableDiffusionGLIGENPipeline(
        vae=autoencoder(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=model,
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@seeded
def stable_diffusion_3(*, dual: bool = True, by_resolution: bool = False) -> Any:
    """Returns a StableDiffusion3Pipeline that draws 16 × 16 pixels; `dual` attention is that of 3.5 medium."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_projection_dim=8,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        pos_embed_max_size=12,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=by_resolution),
        vae=autoencoder(shift=0.1),
        text_encoder=clip(8, projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(12, projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(24),
        tokenizer_3=t5_tokenizer(),
    )


@seeded
def sana(*, learned_sigma: bool = False) -> Any:
    """Returns a SanaPipeline that draws 32 × 32 pixels; its scheduler is the flow's, as the renderer has it."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel

    vae = AutoencoderDC(
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.5,
    )
    transformer = SanaTransformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS if learned_sigma else LATENT_CHANNELS,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
    )
    tokenizer = gemma_tokenizer()
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma2(tokenizer),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def spread(encoder: Any) -> Any:
    """Returns the encoder with embeddings far enough apart that texts differ; libraries start them near 0."""
    with torch.no_grad():
        encoder.get_input_embeddings().weight.normal_()
    return encoder
