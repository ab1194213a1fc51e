"""Checkpoints in the layout Janus-Pro and GoT-R1 are published in."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.policies.original_janus import IMAGE_VOCAB, SIZE, VOCAB
from tests.policies.published_folder import rewrite
from transformers import JanusForConditionalGeneration, PreTrainedTokenizerFast

from reasonrl import Draw, Prompt
from reasonrl.formats.janus import load_janus
from reasonrl.formats.multi_modality import PLAN_TOKENS
from reasonrl.policies import GoTR1
from reasonrl.policies.got_r1 import TEMPLATE
from reasonrl.renderers import Tokens

SIDE = 8


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


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_adapters_of_a_published_checkpoint_load_with_transformers_and_with_peft_alone(folder, tmp_path, dtype, atol):
    rewrite(folder, lambda w: w.update({k: v.to(dtype) for k, v in w.items()}))
    policy = GoTR1(str(folder), trained=("language_model",), lora_rank=4, lora_alpha=8.0)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    words = torch.randint(VOCAB, (2, 9), generator=noise)

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=words).logits.float()

    wanted = logits(policy.module.model)
    policy.save(tmp_path / "saved")
    merged = JanusForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert merged.dtype == dtype
    torch.testing.assert_close(logits(merged), wanted, atol=atol, rtol=0)
    GoTR1(str(folder)).save(tmp_path / "base")
    base = JanusForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    plain = logits(base)
    assert (plain - wanted).abs().max() > 4 * atol
    peft = PeftModel.from_pretrained(base, tmp_path / "saved" / "adapter").eval()
    torch.testing.assert_close(logits(peft), wanted, atol=1e-6, rtol=0)
    assert torch.equal(logits(GoTR1(str(tmp_path / "saved")).module.model), logits(merged))


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


def test_transformers_checkpoints_may_be_legacy_files_too(folder, tmp_path):
    policy = GoTR1(str(folder))
    policy.save(tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    (tmp_path / "saved" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "saved" / "pytorch_model.bin")
    again = GoTR1(str(tmp_path / "saved"))
    assert torch.equal(again.module.model.lm_head.weight, policy.module.model.lm_head.weight)


def test_files_from_before_zip_archives_are_read(original, folder):
    wanted = load_janus(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(dict(original.state_dict()), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = load_janus(folder).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


# ---- the tokenizer ----


def test_a_tokenizer_that_has_the_plan_tokens_keeps_its_ids(folder):
    tokenizer = GoTR1(str(folder)).tokenizer
    own = tokenizer.get_vocab()
    tokenizer.save_pretrained(folder)
    assert GoTR1(str(folder)).tokenizer.get_vocab() == own


def test_plan_tokens_that_are_there_already_are_not_added_again(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["<|obj_start|>"])  # the authors' third is here the first
    tokenizer.save_pretrained(folder)
    found = GoTR1(str(folder)).tokenizer.convert_tokens_to_ids(list(PLAN_TOKENS))
    assert found == [101, 102, 100, 103]


def test_the_unconditional_branch_is_blanked_with_the_authors_padding(folder):
    # Some tokenizers and configs pad with the end of text; the authors look the padding token up by its name.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["pad_token_id"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    policy = GoTR1(str(folder))
    assert policy.special.pad == 2
    assert policy.module.model.get_input_embeddings().padding_idx is None  # with one, its row would not learn
