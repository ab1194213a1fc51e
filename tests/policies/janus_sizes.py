"""Sizes of Janus models as published: the real ones, and one small enough for a test."""

from typing import Any

from attrs import frozen


@frozen
class Sizes:
    """What `OriginalJanus` is built from."""

    width: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    tower_width: int
    tower_layers: int
    pixels: int
    patch: int
    num_codes: int
    code: int
    base: int
    levels: tuple[int, ...]
    blocks: int
    latent: int
    used: int
    """Length of the buffer `codebook_used`, which no model needs."""
    config: dict[str, Any]
    """config.json, as published: sizes that are LlamaConfig's defaults are left out there."""

    @property
    def side(self) -> int:
        """Image tokens a row."""
        return self.pixels // 2 ** (len(self.levels) - 1)


def config(width: int, num_codes: int, code: int, pixels: int, tower_width: int, **language: Any) -> dict[str, Any]:
    """Returns a config.json with the fields that deepseek-ai/Janus-Pro-7B's has (sgl-project/sglang#4534 prints it)."""
    mlp = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    return {
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {**mlp, "input_dim": tower_width},
        },
        "architectures": ["MultiModalityCausalLM"],
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": {**mlp, "input_dim": code},
        },
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {"image_token_embed": width, "image_token_size": num_codes, "n_embed": width},
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": num_codes, "n_embed": code},
        },
        "language_config": {"model_type": "llama", "torch_dtype": "bfloat16", **language},
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "image_size": pixels,
                "model_name": "siglip_large_patch16_384",
                "select_feature": "same",
                "select_layer": -1,
            },
        },
    }


TINY = Sizes(
    width=64,
    layers=2,
    heads=4,
    mlp=96,
    vocab=120,
    tower_width=32,
    tower_layers=2,
    pixels=32,
    patch=4,
    num_codes=48,
    code=8,
    base=32,
    levels=(1, 1, 2),
    blocks=2,
    latent=16,
    used=7,
    config=config(
        64,
        48,
        8,
        32,
        32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=120,
        max_position_embeddings=512,
        _attn_implementation="flash_attention_2",
    ),
)

_PRO: dict[str, Any] = {
    "vocab": 102400,
    "tower_width": 1024,
    "tower_layers": 24,
    "pixels": 384,
    "patch": 16,
    "num_codes": 16384,
    "code": 8,
    "base": 128,
    "levels": (1, 1, 2, 2, 4),
    "blocks": 2,
    "latent": 256,
    "used": 65536,
}
PRO_1B = Sizes(
    width=2048,
    layers=24,
    heads=16,
    mlp=5632,
    config=config(
        2048,
        16384,
        8,
        384,
        1024,
        hidden_size=2048,
        intermediate_size=5632,
        max_position_embeddings=16384,
        num_attention_heads=16,
        num_hidden_layers=24,
        num_key_value_heads=16,
        vocab_size=102400,
    ),
    **_PRO,
)
PRO_7B = Sizes(
    width=4096,
    layers=30,
    heads=32,
    mlp=11008,
    config=config(4096, 16384, 8, 384, 1024, max_position_embeddings=16384, num_hidden_layers=30, vocab_size=102400),
    **_PRO,
)
