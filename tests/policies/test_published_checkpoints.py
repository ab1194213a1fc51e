"""Checkpoints in the layout Janus-Pro and GoT-R1 are published in."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.policies.original_janus import CONFIG, IMAGE_VOCAB, SIZE, VOCAB, OriginalJanus
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from reasonrl import CheckpointError, Draw, Prompt
from reasonrl.formats.janus import load_janus
from reasonrl.formats.multi_modality import PLAN_TOKENS
from reasonrl.policies import GoTR1
from reasonrl.policies.got_r1 import TEMPLATE
from reasonrl.renderers import Tokens

SPECIAL = ["<bos>", "<eos>", "<｜▁pad▁｜>", "<begin_of_image>"]
SIDE = 8


@pytest.fixture(scope="module")
def original() -> OriginalJanus:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OriginalJanus().eval()


@pytest.fixture
def folder(original: OriginalJanus, tmp_path: Path) -> Path:
    save_file(dict(original.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(tmp_path)
    return tmp_path


def write_tokenizer(folder: Path, *, size: int = 100) -> None:
    """Bytes and a few whole words, without GoT-R1's tokens and without a padding token, as Janus-Pro's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: size - len(SPECIAL)]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=SPECIAL[0], eos_token=SPECIAL[1])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    tokenizer.save_pretrained(folder)


def rewrite(folder: Path, change) -> None:
    """Changes the weights of a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        GoTR1(str(folder)).module  # noqa: B018
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the same function ----


@torch.no_grad()
def test_both_heads_and_the_pixels_are_those_of_the_original(original, folder):
    ours = load_janus(folder).eval()
    words, codes = torch.randint(VOCAB, (2, 9)), torch.randint(IMAGE_VOCAB, (2, 5))
    text = ours.lm_head(ours.model.language_model(input_ids=words).last_hidden_state)
    torch.testing.assert_close(text, original.language_model(words).logits, atol=1e-5, rtol=0)

    theirs = [original.language_model.get_input_embeddings()(words), original.prepare_gen_img_embeds(codes)]
    mine = [ours.get_input_embeddings()(words), ours.prepare_embeddings_for_image_generation(codes)]
    found = ours.model.language_model(inputs_embeds=torch.cat(mine, 1)).last_hidden_state
    wanted = original.language_model.model(inputs_embeds=torch.cat(theirs, 1)).last_hidden_state
    image = ours.model.generation_head(found)
    torch.testing.assert_close(image, original.gen_head(wanted), atol=1e-5, rtol=0)

    picture = torch.randint(IMAGE_VOCAB, (2, SIDE * SIDE))
    pixels = original.gen_vision_model.decode_code(picture, SIDE)
    torch.testing.assert_close(ours.model.vqmodel.decode(picture), pixels, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_sees_is_converted_too(original, folder):
    ours = load_janus(folder).eval()
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    seen = ours.model.aligner(ours.model.vision_model(pixels).last_hidden_state)
    torch.testing.assert_close(seen, original.seen(pixels), atol=1e-5, rtol=0)
    # Not the codes: transformers 5.23 takes the nearest one without normalising, where the original normalises first.
    found = ours.model.vqmodel.encode(pixels).last_hidden_state
    torch.testing.assert_close(found, original.gen_vision_model.encoder(pixels), atol=1e-5, rtol=0)


def test_the_weights_keep_their_dtype(folder):
    rewrite(folder, lambda w: w.update({k: v.bfloat16() for k, v in w.items()}))
    assert load_janus(folder).lm_head.weight.dtype == torch.bfloat16


# ---- a policy of it ----


def test_a_published_checkpoint_samples_replays_and_is_saved_for_transformers(folder, tmp_path):
    policy = GoTR1(str(folder), max_tokens=6)
    drawn = policy.sample([Prompt("a", "ab")], group_size=2, draw=Draw(0, 0))
    assert drawn[0].segments["image"].actions.shape == (SIDE * SIDE,)
    policy.save(tmp_path / "saved")
    again = JanusForConditionalGeneration.from_pretrained(tmp_path / "saved")
    for name, value in policy.module.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    same = GoTR1(str(tmp_path / "saved"), max_tokens=6).sample([Prompt("a", "ab")], group_size=2, draw=Draw(0, 0))
    assert [t.reasoning for t in same] == [t.reasoning for t in drawn]
    assert torch.equal(same[1].segments["image"].actions, drawn[1].segments["image"].actions)


def test_the_prompt_is_put_as_the_authors_put_it(folder):
    policy = GoTR1(str(folder))
    turn = f"User: {TEMPLATE.replace('{prompt}', 'a red cat')}\n\nAssistant:"
    assert policy._prompt_ids("a red cat ").tolist() == [0, *policy._ids(turn)]


def test_plan_tokens_are_added_behind_the_vocabulary_in_the_authors_order(folder):
    policy = GoTR1(str(folder))
    assert policy.tokenizer.convert_tokens_to_ids(list(PLAN_TOKENS)) == [100, 101, 102, 103]
    assert policy.special.pad == 2


def test_the_renderer_reads_the_decoder_alone(original, folder):
    policy = GoTR1(str(folder), max_tokens=4)
    (drawn,) = policy.sample([Prompt("a", "ab")], group_size=1, draw=Draw(0, 0))
    rewrite(folder, lambda w: [w.pop(k) for k in list(w) if not k.startswith("gen_")])
    (rendered,) = Tokens(str(folder)).render([drawn], draw=Draw(0, 0))
    with torch.no_grad():
        pixels = original.gen_vision_model.decode_code(drawn.segments["image"].actions[None], SIDE)[0]
    wanted = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
    found = torch.from_numpy(np.asarray(rendered.images["image"]).copy())
    assert (found - wanted).abs().max() <= 1


# ---- files ----


def test_shards_and_legacy_files_are_read_as_one(original, folder):
    whole = load_janus(folder).state_dict()
    weights = dict(original.state_dict())
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"a.bin": names[::2], "b.bin": names[1::2]}
    for shard, part in halves.items():
        torch.save({name: weights[name] for name in part}, folder / shard)
    index = {"weight_map": {name: shard for shard, part in halves.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = load_janus(folder).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.items())
    (folder / "b.bin").unlink()
    assert "lacks 1 of 2 shards (b.bin): download them" in refusal(folder)


def test_transformers_checkpoints_may_be_legacy_files_too(folder, tmp_path):
    policy = GoTR1(str(folder))
    policy.save(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    (tmp_path / "saved" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "saved" / "pytorch_model.bin")
    again = GoTR1(str(tmp_path / "saved"))
    assert torch.equal(again.module.model.lm_head.weight, policy.module.model.lm_head.weight)


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("layout", ["published", "transformers"])
def test_a_pickle_is_never_run(folder, tmp_path, layout):
    if layout == "transformers":
        GoTR1(str(folder)).save(tmp_path / "saved")
        folder = tmp_path / "saved"
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "holds more than weights and was not run" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert "pytorch_model.bin" in refusal(folder)
    assert not (tmp_path / "ran").exists()


# ---- what does not fit ----


def test_a_missing_weight_is_named(folder):
    rewrite(folder, lambda w: w.pop("language_model.model.layers.1.mlp.up_proj.weight"))
    assert "1 weights missing (first ['model.language_model.layers.1.mlp.up_proj.weight'])" in refusal(folder)
    rewrite(folder, lambda w: w.pop("gen_embed.weight"))
    assert "lacks the weight gen_embed.weight: is a shard missing?" in refusal(folder)


def test_another_models_weights_are_named(folder):
    rewrite(folder, lambda w: w.update({"language_model.score.weight": torch.zeros(3)}))
    assert "1 weights are none of a Janus model's (first: language_model.score.weight)" in refusal(folder)


def test_a_config_of_another_model_is_refused(folder):
    config = json.loads(json.dumps(CONFIG))
    config["language_config"]["vocab_size"] = 999
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json says 999 words of width 64, the weights hold 120 of width 64" in refusal(folder)
    config = json.loads(json.dumps(CONFIG))
    config["vision_config"]["params"]["model_name"] = "eva"
    (folder / "config.json").write_text(json.dumps(config))
    assert "vision tower 'eva' is not known: expected one of siglip_large_patch16_384" in refusal(folder)
    del config["vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json has no vision_config.params" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "model_type 'llama', expected 'janus' or 'multi_modality'" in refusal(folder)


def test_a_weight_of_another_shape_is_refused(folder):
    rewrite(folder, lambda w: w.update({"gen_head.vision_head.bias": torch.zeros(7)}))
    said = refusal(folder)
    assert "1 of another shape" in said
    assert "model.generation_head.vision_head.bias" in said


def test_a_tokenizer_without_room_for_the_plan_tokens_is_refused(folder):
    write_tokenizer(folder, size=VOCAB - 2)
    assert f"end at id {VOCAB + 1}, the model knows {VOCAB} words" in refusal(folder)


def test_a_hub_name_that_cannot_be_had_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="no folder nobody/nothing, and the Hub did not give it") as error:
        GoTR1("nobody/nothing").module  # noqa: B018
    assert "\n" not in str(error.value)
