import io
import math
import pickle
import re
import threading
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import reasonrl_preference.clip as clip_module
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reasonrl_preference import HPS, Aesthetic, ClipScore, PickScore
from reasonrl_preference.clip import encoder
from reasonrl_preference.pictures import padded
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from reasonrl import EVERY, ConfigError, Prompt, Trajectory
from reasonrl.config import from_record, to_record
from reasonrl.judges.dual_stage import DualStage
from reasonrl.testing import PLAN, ToyJudge, check_judge

HERE = Path(__file__).parents[1]


def of(image: Image.Image | None, text: str = "a red cup", member: int = 0) -> Trajectory:
    return Trajectory(Prompt("p", text), (member,), images={} if image is None else {"image": image})


def head(folder: Path, *, width: int = 24, name: str = "head.pth") -> tuple[str, nn.Sequential]:
    """A predictor in the published layout: layers.0, .2, .4, .6 and .7, dropout between."""
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Linear(width, 32), nn.Dropout(0.2), nn.Linear(32, 16), nn.Dropout(0.2),
        nn.Linear(16, 8), nn.Dropout(0.1), nn.Linear(8, 4), nn.Linear(4, 1),
    )  # fmt: skip
    weights = {f"layers.{key}": value for key, value in layers.state_dict().items()}
    if name.endswith(".safetensors"):
        save_file(weights, folder / name)
    else:
        torch.save(weights, folder / name)
    return str(folder / name), layers.eval()


@pytest.fixture
def judges(tiny_clip, tmp_path):
    """The four, on tiny weights, with ranges wide enough to leave nothing clamped."""
    wide = {"low": -1.0, "high": 1.0}
    return {
        "hps": HPS(tiny_clip, tiny_clip, **wide),
        "pick-score": PickScore(tiny_clip, None, low=-30.0, high=30.0),
        "clip-score": ClipScore(tiny_clip, **wide),
        "aesthetic": Aesthetic(head(tmp_path)[0], tiny_clip, low=-10.0),
    }


@pytest.mark.parametrize("name", ["hps", "pick-score", "clip-score", "aesthetic"])
def test_each_keeps_the_contract_of_a_judge(judges, name):
    check_judge(judges[name])


def reference(folder: str, image: Image.Image, text: str) -> tuple[float, float]:
    """The cosine and the scaled logit, from the model's own forward pass on the checkpoint's own processor."""
    model = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=image, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)([text], return_tensors="pt", truncation=True, max_length=16)
    with torch.no_grad():
        found = model(**tokens, **pixels)
    return float(found.image_embeds[0] @ found.text_embeds[0]), float(found.logits_per_image)


@pytest.mark.parametrize("text", ["a red cup", "", "a very long description " * 9])
def test_clip_score_and_pick_score_are_the_formulas_on_the_models_outputs(tiny_clip, drawn, judges, text):
    cosine, logit = reference(tiny_clip, drawn, text)
    assert abs(cosine) > 1e-3
    (clip,) = judges["clip-score"].judge([of(drawn, text)])
    (pick,) = judges["pick-score"].judge([of(drawn, text)])
    assert clip.total() == pytest.approx((cosine + 1) / 2, abs=1e-6)
    assert pick.total() == pytest.approx((logit + 30) / 60, abs=1e-6)


def test_defaults_map_the_stated_ranges():
    assert (PickScore().low, PickScore().high) == (0, 26)
    assert (ClipScore().low, ClipScore().high) == (0, 0.4)
    assert (HPS().low, HPS().high) == (0.15, 0.4)
    assert (Aesthetic("x").low, Aesthetic("x").high) == (0, 10)


def test_scores_are_clamped_to_the_unit_interval(tiny_clip, drawn):
    cosine, _ = reference(tiny_clip, drawn, "a red cup")
    above, below = (
        ClipScore(tiny_clip, low=cosine + shift, high=cosine + shift + 0.1).judge([of(drawn)])[0].total()
        for shift in (-0.5, 0.5)
    )
    assert (above, below) == (1.0, 0.0)


@pytest.mark.parametrize("name", ["head.pth", "head.safetensors"])
def test_the_aesthetic_score_is_the_layers_one_after_the_other(tiny_clip, tmp_path, drawn, name):
    path, layers = head(tmp_path, name=name)
    model = CLIPModel.from_pretrained(tiny_clip).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(tiny_clip)(images=drawn, return_tensors="pt")
    with torch.no_grad():
        embedding = functional.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
        rating = float(layers(embedding))
    (verdict,) = Aesthetic(path, tiny_clip, low=-10.0).judge([of(drawn)])
    assert verdict.total() == pytest.approx((rating + 10) / 20, abs=1e-6)


def test_the_aesthetic_score_does_not_see_the_prompt(judges, drawn):
    one, other = judges["aesthetic"].judge([of(drawn, "a cup"), of(drawn, "seven dogs")])
    assert one.total() == pytest.approx(other.total(), abs=1e-6)


def test_batches_do_not_change_scores(judges, drawn):
    rows = [of(drawn.rotate(10 * k), f"prompt {k % 3}", k) for k in range(7)]
    for judge in judges.values():
        together = [v.total() for v in judge.judge(rows)]
        apart = [v.total() for v in evolve(judge, batch_size=2).judge(rows)]
        assert together == pytest.approx(apart, abs=1e-6)
        assert len(set(together)) > 1


def test_a_missing_image_is_the_policys_fault_and_loads_nothing(drawn):
    (verdict,) = HPS("nowhere", "nowhere").judge([of(None)])
    assert verdict.total(EVERY) == 0.0
    assert verdict.scores["HPS"].note == "no image"


def test_one_broken_picture_abstains_alone(judges, drawn):
    stream = io.BytesIO()
    drawn.save(stream, "PNG")
    broken = Image.open(io.BytesIO(stream.getvalue()[:-60]))
    for name, judge in judges.items():
        whole, bad, also = judge.judge([of(drawn), of(broken, member=1), of(drawn, member=2)])
        assert whole.total() == pytest.approx(also.total(), abs=1e-6)
        assert bad.total() is None, name
        (score,) = bad.scores.values()
        assert score.note.startswith("failed: ")


def test_a_value_that_is_not_finite_abstains(tiny_clip, tmp_path, drawn):
    path, layers = head(tmp_path)
    layers[0].bias.data[:] = math.nan
    torch.save({f"layers.{k}": v for k, v in layers.state_dict().items()}, path)
    (verdict,) = Aesthetic(path, tiny_clip).judge([of(drawn)])
    assert verdict.scores["Aesthetic"].value is None
    assert verdict.scores["Aesthetic"].note == "not finite: nan"


def test_scores_say_what_they_cost(judges, drawn):
    for judge in judges.values():
        (drawn_verdict, nothing) = judge.judge([of(drawn), of(None, member=1)])
        (score,) = drawn_verdict.scores.values()
        assert score.cost["calls"] == 1
        assert score.cost["seconds"] > 0
        (score,) = nothing.scores.values()
        assert score.cost == {}


# ---- the picture ----


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90))
def test_a_padded_picture_is_whole_and_centred_on_black(width, height):
    image = Image.new("RGB", (width, height), "white")
    mean, deviation = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    found = padded(image, side=28, mean=mean, deviation=deviation)
    assert found.shape == (3, 28, 28)
    gray = found * deviation[:, None, None] + mean[:, None, None]
    scale = 28 / max(width, height)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    expected = torch.zeros(28, 28)
    top, left = (28 - high) // 2, (28 - wide) // 2
    expected[top : top + high, left : left + wide] = 1
    assert (gray - expected).abs().max() < 1e-4


def test_what_clip_crops_away_hps_sees(judges, drawn):
    """Red at the left end of a wide picture: outside CLIP's centre square, inside HPS's padded one."""
    wide = Image.new("RGB", (84, 28), "gray")
    marked = wide.copy()
    marked.paste("red", (0, 0, 20, 28))
    for name, sees in (("hps", True), ("clip-score", False)):
        plain, red = judges[name].judge([of(wide), of(marked, member=1)])
        assert (abs(plain.total() - red.total()) > 1e-6) is sees


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "I;16"])
def test_pictures_of_any_mode_are_scored(judges, mode):
    image = Image.linear_gradient("L").resize((40, 30))
    image = Image.fromarray(np.full((30, 40), 900, dtype=np.uint16)) if mode == "I;16" else image.convert(mode)
    for judge in judges.values():
        (verdict,) = judge.judge([of(image)])
        assert 0 <= verdict.total() <= 1


def test_a_square_picture_of_the_right_size_is_left_as_it_is(tiny_clip):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    stock = CLIPImageProcessorPil.from_pretrained(tiny_clip)(images=noise, return_tensors="pt")["pixel_values"][0]
    clip = encoder(tiny_clip, device=None, dtype="float32", weights=tiny_clip, pad=True)
    torch.testing.assert_close(clip.pixels(noise), stock, atol=1e-5, rtol=0)


# ---- loading ----


def test_equal_settings_share_one_encoder_and_others_do_not(tiny_clip):
    first = encoder(tiny_clip, device=None, dtype="float32")
    assert encoder(tiny_clip, device=None, dtype="float32", processor=tiny_clip) is first
    assert encoder(tiny_clip, device=None, dtype="bfloat16") is not first
    assert not first.model.training
    assert not any(weight.requires_grad for weight in first.model.parameters())


def test_threads_load_once_and_agree(tiny_clip, drawn, monkeypatch):
    clip_module._loaded.cache_clear()
    judge, rows = ClipScore(tiny_clip, low=-1.0, high=1.0), [of(drawn, f"text {'x' * k}", k) for k in range(6)]
    expected = [v.total() for v in judge.judge(rows)]
    clip_module._loaded.cache_clear()
    found, gate = [], threading.Barrier(4)

    def work():
        gate.wait()
        found.append([v.total() for v in judge.judge(rows)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(one == pytest.approx(expected, abs=1e-6) for one in found)
    assert clip_module._loaded.cache_info().misses == 1


def test_features_are_read_from_a_tensor_and_from_an_output_object(tiny_clip):
    model = CLIPModel.from_pretrained(tiny_clip)
    found = model.get_image_features(pixel_values=torch.ones(1, 3, 28, 28))
    torch.testing.assert_close(clip_module._unit(found), clip_module._unit(found.pooler_output))


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (ClipScore("/nowhere/at/all"), "cannot load CLIP '/nowhere/at/all'"),
        (HPS("/nowhere.pt"), "no weights at '/nowhere.pt': give a file that exists, or owner/name:file on the hub"),
    ],
)
def test_weights_that_are_not_there_are_a_config_error(judge, said, tiny_clip, drawn):
    judge = evolve(judge, model=tiny_clip) if isinstance(judge, HPS) else judge
    with pytest.raises(ConfigError, match=re.escape(said)):
        judge.judge([of(drawn)])


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tiny_clip, tmp_path, drawn):
    path = tmp_path / "hostile.pt"
    torch.save({"layers.0.weight": torch.zeros(1, 24), "extra": Payload()}, path)
    with pytest.raises(ConfigError, match="is no file of tensors"):
        Aesthetic(str(path), tiny_clip).judge([of(drawn)])
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(ConfigError, match="is no file of tensors"):
        HPS(str(path), tiny_clip).judge([of(drawn)])
    assert not Payload.ran


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"layers.0.weight": torch.zeros(4, 24), "layers.0.bias": torch.zeros(4)}, "expected linear layers that end"),
        ({"layers.0.weight": torch.zeros(1, 24)}, "expected linear layers that end in one number"),
        ({"layers.0.weight": torch.zeros(1, 9), "layers.0.bias": torch.zeros(1)}, "width 9, got 24"),
        ({}, "holds no tensors"),
        ([1], "holds a list"),
    ],
)
def test_a_head_of_another_shape_is_refused(tiny_clip, tmp_path, drawn, weights, said):
    torch.save(weights, tmp_path / "head.pt")
    with pytest.raises(ConfigError, match=said):
        Aesthetic(str(tmp_path / "head.pt"), tiny_clip).judge([of(drawn)])


@pytest.mark.parametrize("range_", [(0.4, 0.4), (0.5, 0.4), (math.nan, 0.4), (0.0, math.inf)])
def test_a_range_goes_up(range_):
    with pytest.raises(ValueError, match="high must be above low"):
        HPS(low=range_[0], high=range_[1])


# ---- in a reward ----


def test_hps_is_the_preference_factor_of_the_dual_stage_reward(judges, drawn):
    names = ("prompt_image", "semantic", "spatial", "reasoning_image")
    parts = {name: ToyJudge(k + 200).named(name) for k, name in enumerate(names)}
    reward = DualStage(preset="iclr-2026", preference=judges["hps"], **parts)
    row = Trajectory(Prompt("p", "a red cup"), (0,), texts={"reasoning": PLAN}, images={"image": drawn})
    (verdict,) = reward.judge([row])
    scores = {name: score.value for name, score in verdict.scores.items()}
    product = scores["semantic"] + scores["spatial"]
    product *= scores["prompt_image"] * scores["reasoning_image"] * scores["HPS"] / 2
    assert verdict.total() == pytest.approx(product)
    assert 0 < verdict.total() < 1


def test_a_judge_is_written_down_by_name_and_built_again(judges):
    for name, judge in judges.items():
        record = to_record(judge)
        assert record["use"] == f"judges/{name}"
        assert from_record(record) == judge


def test_the_entry_points_are_the_judges():
    entries = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["entry-points"]["reasonrl.judges"]
    loaded = {name: EntryPoint(name, value, "reasonrl.judges").load() for name, value in entries.items()}
    assert loaded == {"hps": HPS, "pick-score": PickScore, "clip-score": ClipScore, "aesthetic": Aesthetic}


def test_the_python_blocks_of_the_readme_run():
    blocks = re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})  # noqa: S102 - our own page


@pytest.mark.parametrize("content", [b"hello", b"<html></html>", b"version https://git-lfs.github.com/spec/v1", b""])
def test_a_page_or_a_pointer_in_place_of_weights_is_named_as_such(tiny_clip, tmp_path, drawn, content):
    path = tmp_path / "page.pt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"page\.pt is no file of tensors"):
        HPS(str(path), tiny_clip).judge([of(drawn)])
