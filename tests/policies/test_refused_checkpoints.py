"""What is no checkpoint, or not the one that was meant: one line each, and no code of a file is run."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.policies.original_janus import VOCAB
from tests.policies.published_folder import refusal, rewrite, write_tokenizer

from reasonrl import CheckpointError, Draw, Prompt
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4180000000\n"


def reconfigure(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Changes config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_bin(folder: Path, content: object) -> Path:
    """Puts pytorch_model.bin in the place of the weights, and returns its path."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    path = folder / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


# ---- no checkpoint ----


def test_a_folder_of_something_else_says_what_it_lacks(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    said = refusal(tmp_path / "empty")
    assert "holds no config.json: a checkpoint folder has config.json, weights and tokenizer files" in said
    (folder / "model.safetensors").unlink()
    assert "holds no weights: expected model.safetensors or pytorch_model.bin, or their shards" in refusal(folder)


def test_a_file_is_refused_with_its_folder(folder):
    assert f"is a file, a checkpoint is a folder: give its folder {folder}" in refusal(folder / "model.safetensors")


def test_an_adapter_alone_is_refused_with_what_to_give(folder, tmp_path):
    GoTR1(str(folder), trained=("language_model",), lora_rank=2).save(tmp_path / "saved")
    adapter = tmp_path / "saved" / "adapter"
    assert f"is a LoRA adapter without its base model; give {tmp_path / 'saved'}, which has it" in refusal(adapter)
    assert GoTR1(str(tmp_path / "saved")).num_image_tokens == 64
    adapter.rename(tmp_path / "alone")
    assert "merge it into its base with peft, and give that" in refusal(tmp_path / "alone")


def test_a_run_is_refused_with_the_model_in_it(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    assert "it is a run that has not finished" in refusal(run)
    folder.rename(run / "model")
    assert f"give {run / 'model'}, the model in it" in refusal(run)


def test_a_config_of_another_model_is_refused(folder):
    vision = "vision_config"
    cases: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (
            lambda c: c["language_config"].update(vocab_size=999),
            "config.json says 999 words of width 64, the weights hold 120 of width 64",
        ),
        (lambda c: c["language_config"].update(num_attention_heads=5), "not a multiple of the number of attention"),
        (lambda c: c.update(language_config="llama"), "config.json has no language_config"),
        (lambda c: c[vision]["params"].update(model_name="eva"), "vision tower 'eva' is not known: expected one of"),
        (lambda c: c[vision]["params"].update(image_size="big"), "image_size is 'big', expected pixels, as 384"),
        (lambda c: c[vision]["params"].update(image_size=64), "position_embedding.weight (64, 32) where (256, 32) fit"),
        (lambda c: c.pop(vision), "config.json has no vision_config.params"),
        (lambda c: c.update(model_type="llama"), "model_type 'llama', expected 'janus' or 'multi_modality'"),
    ]
    whole = (folder / "config.json").read_text()
    for change, wanted in cases:
        (folder / "config.json").write_text(whole)
        assert wanted in refusal(reconfigure(folder, change))
    for text, wanted in [("{", "config.json cannot be read"), ("[]", "holds list, expected a JSON object")]:
        (folder / "config.json").write_text(text)
        assert wanted in refusal(folder)


def test_a_config_that_transformers_refuses_is_refused_in_one_line(folder, tmp_path):
    GoTR1(str(folder)).save(tmp_path / "saved")
    reconfigure(tmp_path / "saved", lambda c: c["text_config"].update(num_attention_heads=5))
    assert "config.json is no Janus model's" in refusal(tmp_path / "saved")


def test_a_hub_name_that_cannot_be_had_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no folder nobody/nothing, and the Hub did not give it" in refusal("nobody/nothing")


# ---- files that did not arrive ----


def test_missing_shards_are_named(original, folder):
    weights = dict(original.state_dict())
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.bin": names[::2], "b.bin": names[1::2]}
    torch.save({name: weights[name] for name in shards["a.bin"]}, folder / "a.bin")
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "lacks 1 of 2 shards (b.bin): download them" in refusal(folder)
    torch.save({name: weights[name] for name in shards["b.bin"][1:]}, folder / "b.bin")  # the shard of another release
    assert shards["b.bin"][0] == "aligner.layers.0.weight"
    assert "lacks the weight aligner.layers.0.weight: is a shard missing?" in refusal(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_an_index_without_shards_is_refused(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    assert "names no shards: expected a weight_map of weights to files" in refusal(folder)


@pytest.mark.parametrize("frac", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_bin_is_refused(original, folder, frac, zipped):
    torch.save(dict(original.state_dict()), folder / "whole.bin", _use_new_zipfile_serialization=zipped)
    whole = (folder / "whole.bin").read_bytes()
    as_bin(folder, whole[: int(frac * len(whole))])
    assert "it is truncated or no torch file, download it again" in refusal(folder)


def test_truncated_safetensors_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert "it is truncated or no safetensors file, download it again" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_what_git_lfs_has_not_fetched_is_refused(folder, name):
    if name.endswith(".bin"):
        as_bin(folder, POINTER.encode())
    (folder / name).write_text(POINTER)
    assert f"{folder / name} is a Git LFS pointer and not the file: run `git lfs pull` in {folder}" in refusal(folder)


def test_a_page_of_the_web_instead_of_weights_is_refused(folder):
    as_bin(folder, b"<html>Not found</html>")
    assert "it is truncated or no torch file" in refusal(folder)


# ---- files that hold something else ----


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
    ran, refused = tmp_path / "ran", "holds more than weights and was not run"
    bomb = pickle.dumps(Bomb(ran), protocol=2)
    as_bin(folder, {"lm_head.weight": Bomb(ran)})
    assert refused in refusal(folder)
    as_bin(folder, bomb)
    assert refused in refusal(folder)
    torch.save({"a": Bomb(ran)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert refused in refusal(folder)
    assert not ran.exists()
    pickle.loads(bomb)  # noqa: S301 - it does go off
    assert ran.exists()


def test_a_bin_that_is_no_state_dict_is_refused(original, folder):
    as_bin(folder, torch.zeros(3))
    assert "holds Tensor, expected tensors by name: save model.state_dict() alone" in refusal(folder)
    as_bin(folder, {"step": 3, "state_dict": dict(original.state_dict())})
    assert "holds 2 entries that are no tensors (first: step, state_dict)" in refusal(folder)


# ---- weights that do not fit ----


def test_a_missing_weight_is_named(folder):
    rewrite(folder, lambda w: w.pop("language_model.model.layers.1.mlp.up_proj.weight"))
    assert "1 weights missing (first: model.language_model.layers.1.mlp.up_proj.weight);" in refusal(folder)
    rewrite(folder, lambda w: w.pop("gen_embed.weight"))
    assert "lacks the weight gen_embed.weight: is a shard missing?" in refusal(folder)


def test_another_models_weights_are_named(folder):
    rewrite(folder, lambda w: w.update({"language_model.score.weight": torch.zeros(3)}))
    assert "1 weights are none of a Janus model's (first: language_model.score.weight)" in refusal(folder)


def test_a_model_of_another_depth_is_refused(folder):
    reconfigure(folder, lambda c: c["language_config"].update(num_hidden_layers=1))
    assert "9 weights unknown (first: model.language_model.layers.1.input_layernorm.weight);" in refusal(folder)
    reconfigure(folder, lambda c: c["language_config"].update(num_hidden_layers=3))
    assert "9 weights missing (first: model.language_model.layers.2.input_layernorm.weight);" in refusal(folder)


def test_a_weight_of_another_shape_is_named_with_both_shapes(folder):
    rewrite(folder, lambda w: w.update({"gen_head.vision_head.bias": torch.zeros(7)}))
    wanted = "1 weights of another shape (first: model.generation_head.vision_head.bias (7,) where (48,) fits)"
    assert wanted in refusal(folder)
    rewrite(folder, lambda w: w.update({"gen_embed.weight": torch.zeros(48)}))
    assert "the weight gen_embed.weight has the shape (48,), expected 2 axes" in refusal(folder)


def test_a_decoder_of_another_shape_is_refused_by_the_renderer_too(folder):
    name = "gen_vision_model.decoder.conv_out.bias"
    drawn = GoTR1(str(folder), max_tokens=4).sample([Prompt("a", "ab")], group_size=1, draw=Draw(0, 0))
    rewrite(folder, lambda w: w.update({name: torch.zeros(7)}))
    with pytest.raises(CheckpointError) as error:
        Tokens(str(folder)).render(drawn, draw=Draw(0, 0))
    assert "decoder.conv_out.bias (7,) where (3,) fits" in str(error.value)


# ---- tokenizers ----


def test_a_tokenizer_without_room_for_the_plan_tokens_is_refused(folder):
    write_tokenizer(folder, size=VOCAB - 2)
    assert f"end at id {VOCAB + 1}, the model knows {VOCAB} words" in refusal(folder)
    write_tokenizer(folder, size=VOCAB - 4)
    assert GoTR1(str(folder)).tokenizer.convert_tokens_to_ids("<|obj_end|>") == VOCAB - 1


def test_a_tokenizer_with_more_words_than_the_model_is_refused(folder):
    tokenizer = GoTR1(str(folder)).tokenizer  # its plan tokens fit
    tokenizer.add_tokens([f"<word {i}>" for i in range(30)])
    tokenizer.save_pretrained(folder)
    assert f"14 words of the tokenizer are beyond the model (first: '<word 16>', id {VOCAB}), which has" in refusal(
        folder
    )


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert f"{folder} holds no tokenizer" in refusal(folder)
