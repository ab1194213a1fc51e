"""The published Janus architecture under its own names, small: what a `multi_modality` checkpoint was saved from.

Written from the description of the layers, as an independent reference for the conversion to transformers' model.
"""

import torch
from tests.policies.janus_sizes import TINY, Sizes
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, VOCAB, IMAGE_VOCAB, CODE, SIZE, CONFIG = (
    TINY.width,
    TINY.vocab,
    TINY.num_codes,
    TINY.code,
    TINY.pixels,
    TINY.config,
)


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


class Pooled(nn.Module):
    """What SigLIP pools its patches with: saved, and unused by the model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 1, width))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})


class Tower(nn.Module):
    def __init__(self, sizes: Sizes, heads: int = 16) -> None:
        super().__init__()
        width, patch = sizes.tower_width, sizes.patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.pos_embed = nn.Parameter(torch.randn(1, (sizes.pixels // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(sizes.tower_layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attn_pool = Pooled(width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(patches + self.pos_embed))


class Mlp(nn.Module):
    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(given, width), nn.GELU(), nn.Linear(width, width))

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

    def __init__(self, sizes: Sizes, given: int, made: int, *, encodes: bool) -> None:
        super().__init__()
        base, blocks = sizes.base, sizes.blocks
        widths = [base * m for m in sizes.levels]
        deepest, last = widths[-1], len(widths) - 1
        order = range(len(widths)) if encodes else reversed(range(len(widths)))
        self.conv_in = nn.Conv2d(given, base if encodes else deepest, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        width = base if encodes else deepest
        for i in order:
            ends = i == (last if encodes else 0)
            how = None if ends else ("downsample" if encodes else "upsample")
            count = blocks if encodes else blocks + 1
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
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        latent, code = sizes.latent, sizes.code
        self.encoder, self.decoder = Pixels(sizes, 3, latent, encodes=True), Pixels(sizes, latent, 3, encodes=False)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(sizes.num_codes, code)})
        self.quantize.register_buffer("codebook_used", torch.zeros(sizes.used))
        self.quant_conv, self.post_quant_conv = nn.Conv2d(latent, code, 1), nn.Conv2d(code, latent, 1)

    def decode_code(self, tokens: Tensor, side: int) -> Tensor:
        """Returns pixels (N, 3, S, S) in about −1..1 of (N, side·side) tokens."""
        codes = F.normalize(self.quantize["embedding"].weight, dim=-1)[tokens]
        return self.decoder(self.post_quant_conv(codes.transpose(1, 2).reshape(len(tokens), -1, side, side)))


class VisionModel(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.vision_tower = Tower(sizes)


class GenHead(nn.Module):
    def __init__(self, width: int, num_codes: int) -> None:
        super().__init__()
        self.output_mlp_projector, self.vision_head = nn.Linear(width, width), nn.Linear(width, num_codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_head(F.gelu(self.output_mlp_projector(x)))


class OriginalJanus(nn.Module):
    def __init__(self, sizes: Sizes = TINY) -> None:
        super().__init__()
        width = sizes.width
        self.vision_model, self.aligner = VisionModel(sizes), Mlp(sizes.tower_width, width)
        self.gen_vision_model, self.gen_aligner = Codes(sizes), Mlp(sizes.code, width)
        self.gen_head = GenHead(width, sizes.num_codes)
        self.gen_embed = nn.Embedding(sizes.num_codes, sizes.code)
        language = LlamaConfig(
            hidden_size=width,
            intermediate_size=sizes.mlp,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads,
            vocab_size=sizes.vocab,
            tie_word_embeddings=False,
        )
        self.language_model = LlamaForCausalLM(language)

    def prepare_gen_img_embeds(self, tokens: Tensor) -> Tensor:
        return self.gen_aligner(self.gen_embed(tokens))

    def seen(self, pixels: Tensor) -> Tensor:
        return self.aligner(self.vision_model.vision_tower(pixels))
