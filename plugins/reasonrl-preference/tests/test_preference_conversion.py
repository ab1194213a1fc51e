"""open_clip's forward pass, written out from its published definition, gives what the converted CLIPModel gives."""

import math

import pytest
import torch
from reasonrl_preference import HPS
from reasonrl_preference.clip import encoder
from reasonrl_preference.open_clip import converted
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from reasonrl import ConfigError, Prompt, Trajectory

HEADS = {"visual.": 3, "": 4}


def open_clip_weights(config, *, seed=0):
    """Random float64 weights under open_clip's names and shapes."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.2 * torch.randn(*shape, generator=random, dtype=torch.float64)

    text, vision, out = config.text_config, config.vision_config, config.projection_dim
    patches = (vision.image_size // vision.patch_size) ** 2
    weights = {
        "positional_embedding": draw(text.max_position_embeddings, text.hidden_size),
        "text_projection": draw(text.hidden_size, out),
        "logit_scale": torch.tensor(math.log(100.0), dtype=torch.float64),
        "token_embedding.weight": draw(text.vocab_size, text.hidden_size),
        "visual.class_embedding": draw(vision.hidden_size),
        "visual.positional_embedding": draw(patches + 1, vision.hidden_size),
        "visual.proj": draw(vision.hidden_size, out),
        "visual.conv1.weight": draw(vision.hidden_size, 3, vision.patch_size, vision.patch_size),
    }
    for name, width in (
        ("ln_final", text.hidden_size),
        ("visual.ln_pre", vision.hidden_size),
        ("visual.ln_post", vision.hidden_size),
    ):
        weights |= {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}
    for prefix, tower in (("", text), ("visual.", vision)):
        d = tower.hidden_size
        for k in range(tower.num_hidden_layers):
            home = f"{prefix}transformer.resblocks.{k}"
            for name, shape in {
                "attn.in_proj_weight": (3 * d, d),
                "attn.in_proj_bias": (3 * d,),
                "attn.out_proj.weight": (d, d),
                "attn.out_proj.bias": (d,),
                "ln_1.weight": (d,),
                "ln_1.bias": (d,),
                "ln_2.weight": (d,),
                "ln_2.bias": (d,),
                "mlp.c_fc.weight": (4 * d, d),
                "mlp.c_fc.bias": (4 * d,),
                "mlp.c_proj.weight": (d, 4 * d),
                "mlp.c_proj.bias": (d,),
            }.items():
                weights[f"{home}.{name}"] = draw(*shape)
    return weights


def norm(w, name, x):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def blocks(w, prefix, x, *, causal):
    """Pre-norm residual blocks on (T, D)."""
    length, width = x.shape
    heads = HEADS[prefix]
    k = 0
    while f"{prefix}transformer.resblocks.{k}.ln_1.weight" in w:
        home = f"{prefix}transformer.resblocks.{k}"
        fused = norm(w, f"{home}.ln_1", x) @ w[f"{home}.attn.in_proj_weight"].T + w[f"{home}.attn.in_proj_bias"]
        query, key, value = (
            fused[:, i * width : (i + 1) * width].reshape(length, heads, -1).permute(1, 0, 2) for i in range(3)
        )
        logits = query @ key.transpose(1, 2) / math.sqrt(width // heads)
        if causal:
            logits = logits + torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)
        mixed = (logits.softmax(-1) @ value).permute(1, 0, 2).reshape(length, width)
        x = x + mixed @ w[f"{home}.attn.out_proj.weight"].T + w[f"{home}.attn.out_proj.bias"]
        hidden = gelu(norm(w, f"{home}.ln_2", x) @ w[f"{home}.mlp.c_fc.weight"].T + w[f"{home}.mlp.c_fc.bias"])
        x = x + hidden @ w[f"{home}.mlp.c_proj.weight"].T + w[f"{home}.mlp.c_proj.bias"]
        k += 1
    assert k == 2
    return x


def image_embedding(w, pixels):
    """(C, H, W) to the unit embedding."""
    kernel = w["visual.conv1.weight"]
    side = kernel.shape[-1]
    patches = [
        (kernel * pixels[None, :, y : y + side, x : x + side]).sum((1, 2, 3))
        for y in range(0, pixels.shape[1], side)
        for x in range(0, pixels.shape[2], side)
    ]
    x = torch.stack([w["visual.class_embedding"], *patches]) + w["visual.positional_embedding"]
    x = blocks(w, "visual.", norm(w, "visual.ln_pre", x), causal=False)
    found = norm(w, "visual.ln_post", x[0]) @ w["visual.proj"]
    return found / found.norm()


def text_embedding(w, ids):
    """Ids padded with 0 after the end of text, which is the highest, to the unit embedding."""
    x = w["token_embedding.weight"][ids] + w["positional_embedding"]
    x = norm(w, "ln_final", blocks(w, "", x, causal=True))
    found = x[int(ids.argmax())] @ w["text_projection"]
    return found / found.norm()


def test_the_converted_model_computes_what_open_clip_computes(tiny_clip):
    config = CLIPConfig.from_pretrained(tiny_clip)
    weights = open_clip_weights(config)
    model = CLIPModel(config).double().eval()
    model.load_state_dict(converted(weights), strict=True)
    random = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 28, 28, generator=random, dtype=torch.float64)
    end = config.text_config.eos_token_id
    ids = torch.zeros(3, 16, dtype=torch.int64)
    for row, length in zip(ids, (1, 7, 14), strict=True):
        row[: length + 2] = torch.tensor([end - 1, *torch.randint(0, end - 1, (length,), generator=random), end])
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=pixels)
    images = torch.stack([image_embedding(weights, each) for each in pixels])
    texts = torch.stack([text_embedding(weights, each) for each in ids])
    torch.testing.assert_close(found.image_embeds, images, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.text_embeds, texts, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.logits_per_image, 100 * images @ texts.T, atol=1e-7, rtol=0)


def test_quick_gelu_would_be_another_model(tiny_clip):
    config = CLIPConfig.from_pretrained(tiny_clip)
    config.vision_config.hidden_act = "quick_gelu"
    weights = open_clip_weights(config)
    model = CLIPModel(config).double().eval()
    model.load_state_dict(converted(weights), strict=True)
    pixels = torch.ones(1, 3, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        found = functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    assert (found[0] - image_embedding(weights, pixels[0])).abs().max() > 1e-4


@pytest.mark.parametrize("nested", [True, False])
def test_an_open_clip_file_is_scored_as_open_clip_scores_it(tiny_clip, tmp_path, nested, drawn):
    config = CLIPConfig.from_pretrained(tiny_clip)
    weights = open_clip_weights(config)
    single = {name: weight.float() for name, weight in weights.items()}
    single["attn_mask"] = torch.zeros(16, 16)  # a buffer that older versions save
    torch.save({"state_dict": single, "epoch": 3} if nested else single, tmp_path / "hps.pt")
    judge = HPS(str(tmp_path / "hps.pt"), tiny_clip, low=-1.0, high=1.0)
    (verdict,) = judge.judge([Trajectory(Prompt("p", "a red cup"), (0,), images={"image": drawn})])
    clip = encoder(tiny_clip, device=None, dtype="float32", weights=judge.weights, pad=True)
    ids = torch.tensor(clip.tokenizer("a red cup").input_ids)
    ids = torch.cat([ids, torch.zeros(16 - len(ids), dtype=torch.int64)])
    cosine = image_embedding(weights, clip.pixels(drawn).double()) @ text_embedding(weights, ids)
    assert verdict.total() == pytest.approx((float(cosine) + 1) / 2, abs=1e-5)


def test_weights_that_do_not_fit_are_named(tiny_clip, tmp_path):
    weights = open_clip_weights(CLIPConfig.from_pretrained(tiny_clip))
    del weights["visual.ln_post.bias"]
    torch.save(weights, tmp_path / "less.pt")
    with pytest.raises(ConfigError, match=r"does not fit.*post_layernorm\.bias"):
        encoder(tiny_clip, device=None, dtype="float32", weights=str(tmp_path / "less.pt"))
    torch.save({**weights, "visual.trunk.stem": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"cannot load CLIP.*visual\.trunk\.stem"):
        encoder(tiny_clip, device=None, dtype="float32", weights=str(tmp_path / "other.pt"))


def test_open_clip_weights_want_an_architecture_with_gelu(tmp_path, build_clip):
    quick = str(build_clip(tmp_path / "quick", act="quick_gelu"))
    torch.save(open_clip_weights(CLIPConfig.from_pretrained(quick)), tmp_path / "hps.pt")
    with pytest.raises(ConfigError, match="computes \\['quick_gelu'\\], but open_clip's ViT-H-14 gelu"):
        encoder(quick, device=None, dtype="float32", weights=str(tmp_path / "hps.pt"))


def test_positions_of_another_picture_size_are_named(tiny_clip, tmp_path):
    weights = open_clip_weights(CLIPConfig.from_pretrained(tiny_clip))
    weights["visual.positional_embedding"] = torch.zeros(10, 48)
    torch.save(weights, tmp_path / "wider.pt")
    with pytest.raises(
        ConfigError, match=r"wider\.pt does not fit.*vision_model\.embeddings\.position_embedding"
    ) as caught:
        encoder(tiny_clip, device=None, dtype="float32", weights=str(tmp_path / "wider.pt"))
    assert "\n" not in str(caught.value)
