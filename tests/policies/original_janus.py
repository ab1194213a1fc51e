"""The published Janus architecture under its own names, small: what a `multi_modality` checkpoint was saved from.

Written from the description of the layers, as an independent reference for the conversion to transformers' model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, VOCAB, IMAGE_VOCAB, CODE, SIZE, PATCH = 64, 120, 48, 8, 32, 4
BASE, LEVELS, BLOCKS, LATENT = 32, (1, 1, 2), 2, 16

CONFIG = {
    "model_type": "multi_modality",
    "architectures": ["MultiModalityCausalLM"],
    "vision_config": {
        "cls": "CLIPVisionTower",
        "params": {"image_size": SIZE, "model_name": "siglip_large_patch16_384", "select_layer": -1},
    },
    "aligner_config": {"cls": "MlpProjector", "params": {"depth": 2, "n_embed": WIDTH, "projector_type": "mlp_gelu"}},
    "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": IMAGE_VOCAB, "n_embed": CODE}},
    "gen_aligner_config": {"cls": "MlpProjector", "params": {"depth": 2, "n_embed": WIDTH}},
    "gen_head_config": {"cls": "vision_head", "params": {"image_token_embed": WIDTH, "n_embed": WIDTH}},
    "language_config": {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "torch_dtype": "bfloat16",
        "_attn_implementation": "flash_attention_2",
    },
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Tower(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2, heads: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.pos_embed = nn.Parameter(torch.randn(1, (SIZE // PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attn_pool = nn.ModuleDict({"q": nn.Linear(width, width)})  # saved, and unused by the model

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(patches + self.pos_embed))


class Mlp(nn.Module):
    def __init__(self, given: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(given, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(given), nn.Conv2d(given, made, 3, padding=1)
        self.norm2, self.conv2 = norm(made), nn.Conv2d(made, made, 3, padding=1)
        if given != made:
            self.nin_shortcut = nn.Conv2d(given, made, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class Resampled(nn.Module):
    def __init__(self, channels: int, *, down: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2 if down else 1, 0 if down else 1)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0))


class Level(nn.Module):
    def __init__(self, given: int, made: int, blocks: int, *, attends: bool, resampled: str | None) -> None:
        super().__init__()
        self.res = nn.ModuleList(Residual(given if i == 0 else made, made) for i in range(blocks))
        self.attn = nn.ModuleList(PixelAttention(made) for _ in range(blocks if attends else 0))
        if resampled:
            setattr(self, resampled, Resampled(made, down=resampled == "downsample"))
        self.resampled = resampled

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return getattr(self, self.resampled)(x) if self.resampled else x


class Pixels(nn.Module):
    """Encoder and decoder are the same layers in opposite order."""

    def __init__(self, given: int, made: int, *, encodes: bool) -> None:
        super().__init__()
        widths = [BASE * m for m in LEVELS]
        deepest, last = widths[-1], len(widths) - 1
        order = range(len(widths)) if encodes else reversed(range(len(widths)))
        self.conv_in = nn.Conv2d(given, BASE if encodes else deepest, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        width = BASE if encodes else deepest
        for i in order:
            ends = i == (last if encodes else 0)
            how = None if ends else ("downsample" if encodes else "upsample")
            count = BLOCKS if encodes else BLOCKS + 1
            self.conv_blocks.append(Level(width, widths[i], count, attends=i == last, resampled=how))
            width = widths[i]
        middle = Residual(deepest, deepest), PixelAttention(deepest), Residual(deepest, deepest)
        self.mid = nn.ModuleList(middle)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, made, 3, padding=1)
        self.encodes = encodes

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        parts = [*self.conv_blocks, *self.mid] if self.encodes else [*self.mid, *self.conv_blocks]
        for part in parts:
            x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Pixels(3, LATENT, encodes=True), Pixels(LATENT, 3, encodes=False)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(IMAGE_VOCAB, CODE)})
        self.quantize.register_buffer("codebook_used", torch.zeros(7))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(LATENT, CODE, 1), nn.Conv2d(CODE, LATENT, 1)

    def decode_code(self, tokens: Tensor, side: int) -> Tensor:
        """Returns pixels (N, 3, S, S) in about −1..1 of (N, side·side) tokens."""
        codes = F.normalize(self.quantize["embedding"].weight, dim=-1)[tokens]
        return self.decoder(self.post_quant_conv(codes.transpose(1, 2).reshape(len(tokens), CODE, side, side)))


class VisionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = Tower()


class GenHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output_mlp_projector, self.vision_head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, IMAGE_VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_head(F.gelu(self.output_mlp_projector(x)))


class OriginalJanus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_model, self.aligner = VisionModel(), Mlp(32)
        self.gen_vision_model, self.gen_aligner, self.gen_head = Codes(), Mlp(CODE), GenHead()
        self.gen_embed = nn.Embedding(IMAGE_VOCAB, CODE)
        language = {
            k: v for k, v in CONFIG["language_config"].items() if k not in ("torch_dtype", "_attn_implementation")
        }
        self.language_model = LlamaForCausalLM(LlamaConfig(**language, tie_word_embeddings=False))

    def prepare_gen_img_embeds(self, tokens: Tensor) -> Tensor:
        return self.gen_aligner(self.gen_embed(tokens))

    def seen(self, pixels: Tensor) -> Tensor:
        return self.aligner(self.vision_model.vision_tower(pixels))
