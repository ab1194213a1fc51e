"""Replies read as boxes, and detectors with tiny random weights on their real code path."""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attrs import evolve, field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonrl.errors import CheckpointError, ConfigError, ContractError
from reasonrl.judges import detectors, grounding, local_model, vlm
from reasonrl.judges.detectors import Detector, distinct, searched
from reasonrl.judges.grounding import Found, Locator, Sight, VLMBoxes, as_locator, fitted, located, read_boxes
from reasonrl.judges.vlm import VLM, Question, Reply
from reasonrl.plan import Box

SIDE = (448, 448)


@frozen
class Scripted(VLM):
    """Says the same to everything, and remembers what it was asked."""

    text: str = "[]"
    coordinates: vlm.Coordinates = "pixels"
    note: str = ""
    asked: list[Question] = field(factory=list, eq=False)
    identity = "scripted"
    log_probs = False

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        self.asked.extend(questions)
        return [Reply(self.text, note=self.note, cost={"calls": 1.0}) for _ in questions]


def one(*corners: float, key: str = "bbox_2d") -> str:
    return json.dumps([{key: list(corners), "label": "cup"}])


# ---- replies ----


@pytest.mark.parametrize(
    ("coordinates", "reply", "expected"),
    [
        ("pixels", one(0, 112, 224, 448), Box(0, 250, 500, 1000)),
        ("thousandths", one(0, 250, 500, 1000), Box(0, 250, 500, 1000)),
        ("thousandths", one(10.4, 250, 500.6, 999), Box(10, 250, 501, 999)),
        ("locations", "cup<loc_0><loc_250><loc_499><loc_999>", Box(0, 250, 500, 1000)),
        ("locations", "<loc0256><loc0000><loc1023><loc0512> cup", Box(0, 250, 500, 999)),
    ],
)
def test_each_convention_is_read_in_its_own_units(coordinates, reply, expected):
    assert read_boxes(reply, coordinates, SIDE) == ((expected,), "")


@pytest.mark.parametrize("coordinates", ["pixels", "thousandths"])
@given(corners=st.tuples(*[st.integers(2, 1000)] * 4))
def test_what_is_written_in_a_convention_is_read_back(coordinates, corners):
    x0, y0, x1, y1 = corners
    width, height = 448, 896
    frame = (width / 1000, height / 1000) if coordinates == "pixels" else (1, 1)
    written = one(*(number * frame[k % 2] for k, number in enumerate(corners)))
    boxes, note = read_boxes(written, coordinates, (width, height))
    box = Box(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))
    assert (boxes, note) == ((box,) if box.area else (), "")


def test_a_pixel_is_one_of_the_picture_that_was_sent_wide_or_high():
    assert read_boxes(one(0, 0, 448, 448), "pixels", (896, 448))[0] == (Box(0, 0, 500, 1000),)
    assert read_boxes(one(0, 0, 448, 448), "pixels", (448, 896))[0] == (Box(0, 0, 1000, 500),)


@pytest.mark.parametrize("key", grounding.BOX_KEYS)
@pytest.mark.parametrize("form", ["[{0}]", "{0}", '{{"boxes": [{0}]}}', "```json\n[{0}]\n```"])
def test_lists_single_objects_wrappers_and_fences_are_the_same_answer(key, form):
    item = json.dumps({key: [100, 200, 300, 400], "label": "cup", "confidence": 0.9})
    assert read_boxes(form.format(item), "thousandths", SIDE) == ((Box(100, 200, 300, 400),), "")


@pytest.mark.parametrize("reply", ["[]", '{"boxes": []}', "```json\n[]\n```"])
def test_an_empty_list_is_a_look_that_found_none(reply):
    assert read_boxes(reply, "pixels", SIDE) == ((), "")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", vlm.REFUSED),
        ("  \n", vlm.REFUSED),
        ("There is no cup in this picture.", vlm.UNPARSEABLE),
        ("Here you are: " + one(1, 2, 30, 40), vlm.UNPARSEABLE),
        (one(1, 2, 30, 40) + one(1, 2, 30, 40), vlm.UNPARSEABLE),
        (one(1, 2, 30), vlm.UNPARSEABLE),
        (one(1, 2, 30, 40, 50), vlm.UNPARSEABLE),
        (one(float("nan"), 2, 30, 40), vlm.UNPARSEABLE),
        ('[{"bbox_2d": [1, 2, 30, 1e999]}]', vlm.OUT_OF_RANGE),
        ('[{"bbox_2d": [1, 2, 30, ' + "9" * 400 + "]}]", vlm.OUT_OF_RANGE),
        ('[{"bbox_2d": ["1", 2, 30, 40]}]', vlm.UNPARSEABLE),
        ('[{"bbox_2d": [true, 2, 30, 40]}]', vlm.UNPARSEABLE),
        ('[{"bbox_2d": null}]', vlm.UNPARSEABLE),
        ('[{"bbox_2d": [1,2,30,40], "box": [5,6,70,80]}]', vlm.UNPARSEABLE),
        ('[{"label": "cup"}]', vlm.UNPARSEABLE),
        ("{}", vlm.UNPARSEABLE),
        ("null", vlm.UNPARSEABLE),
        ("7", vlm.UNPARSEABLE),
        ("[1, 2, 30, 40]", vlm.UNPARSEABLE),
        ('{"boxes": {"bbox_2d": [1,2,30,40]}}', vlm.UNPARSEABLE),
        (one(0.1, 0.2, 0.3, 0.4), vlm.OUT_OF_RANGE),
        (one(0, 0, 1, 1), vlm.OUT_OF_RANGE),
        (one(0, 0, 900, 900), vlm.OUT_OF_RANGE),
        (one(-20, 0, 100, 100), vlm.OUT_OF_RANGE),
        ("[" * 50_000, vlm.UNPARSEABLE),
    ],
)
def test_an_unclear_reply_is_none_with_its_reason_and_never_a_guess(reply, reason):
    boxes, note = read_boxes(reply, "pixels", SIDE)
    assert boxes is None
    assert note.startswith(f"{reason}: ")
    assert "\n" not in note


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("a cup", vlm.UNPARSEABLE),
        ("<loc_1><loc_2><loc_3>", vlm.UNPARSEABLE),
        ("<loc_1><loc_2><loc_3><loc_4><loc0001><loc0002><loc0003><loc0004>", vlm.UNPARSEABLE),
        (one(1, 2, 30, 40), vlm.UNPARSEABLE),
        ("<loc_1><loc_2><loc_3><loc_1000>", vlm.OUT_OF_RANGE),
        ("<loc0001><loc0002><loc0003><loc1024>", vlm.OUT_OF_RANGE),
    ],
)
def test_location_tokens_come_by_fours_of_one_kind(reply, reason):
    boxes, note = read_boxes(reply, "locations", SIDE)
    assert boxes is None
    assert note.startswith(f"{reason}: ")


@pytest.mark.parametrize("reply", ["[]", "none", "None.", "```json\n[]\n```"])
def test_a_family_of_location_tokens_can_say_that_there_is_none(reply):
    assert read_boxes(reply, "locations", SIDE) == ((), "")


def test_location_tokens_are_not_asked_for_as_json():
    asked = VLMBoxes(Scripted(coordinates="locations")).question("cup", Image.new("RGB", (448, 448)))
    assert asked.answer.schema is None  # a server would hold the reply to it, and every one be unparseable
    assert "JSON" not in asked.prompt
    assert "location tokens" in asked.prompt


def test_several_boxes_of_location_tokens_are_all_read():
    reply = "dog<loc_0><loc_0><loc_99><loc_99><loc_200><loc_0><loc_299><loc_99>cat<loc_500><loc_500><loc_599><loc_599>"
    boxes, _ = read_boxes(reply, "locations", SIDE)
    assert boxes == (Box(0, 0, 100, 100), Box(200, 0, 300, 100), Box(500, 500, 600, 600))


def test_a_little_beyond_the_edge_is_clamped_and_reversed_corners_are_swapped():
    assert read_boxes(one(-5, 0, 1015, 1000), "thousandths", SIDE)[0] == (Box(0, 0, 1000, 1000),)
    assert read_boxes(one(300, 400, 100, 200), "thousandths", SIDE)[0] == (Box(100, 200, 300, 400),)


def test_boxes_without_area_and_repetitions_are_dropped_and_sixteen_kept():
    flat = [{"bbox_2d": [100, 200, 100, 400]}]
    again = [{"bbox_2d": [100, 200, 300, 400]}] * 3
    assert read_boxes(json.dumps(flat + again), "thousandths", SIDE)[0] == (Box(100, 200, 300, 400),)
    many = [{"bbox_2d": [k, 0, k + 50, 50]} for k in range(40)]
    boxes, note = read_boxes(json.dumps(many), "thousandths", SIDE)
    assert (len(boxes), note) == (16, "the first 16 of 40 boxes")


@settings(max_examples=200, deadline=None)
@given(st.text(), st.sampled_from(["pixels", "thousandths", "locations"]))
def test_any_text_is_boxes_or_a_reason(text, coordinates):
    boxes, note = read_boxes(text, coordinates, SIDE)
    assert boxes is not None or note.split(":")[0] in (vlm.REFUSED, vlm.UNPARSEABLE, vlm.OUT_OF_RANGE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["bbox_2d", "box", "boxes", "label"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(json_values)
def test_any_json_is_boxes_on_the_canvas_or_a_reason(value):
    boxes, note = read_boxes(json.dumps(value), "pixels", SIDE)
    assert note or boxes is not None
    for box in boxes or ():
        assert not [problem for problem in box.problems() if "side" not in problem]
        assert box.area > 0


# ---- asking a VLM ----


@pytest.mark.parametrize(
    ("size", "sent"),
    [
        ((384, 384), (448, 448)),
        ((64, 64), (448, 448)),
        ((448, 448), (448, 448)),
        ((512, 384), (672, 448)),
        ((1024, 1024), (896, 896)),
        ((3000, 100), (896, 448)),
    ],
)
def test_pictures_are_sent_with_sides_that_no_family_resizes(size, sent):
    picture = fitted(Image.new("L", size), 896)
    assert (picture.mode, picture.size) == ("RGB", sent)
    assert all(side % 28 == 0 == side % 32 for side in picture.size)


def test_the_stock_processors_leave_a_fitted_picture_as_it_is():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for size in [(384, 384), (3000, 100), (640, 480), (64, 900)]:
        width, height = fitted(Image.new("RGB", size), 896).size
        qwen_2_5 = smart_resize(height, width, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
        qwen_3 = smart_resize(height, width, factor=32, min_pixels=65536, max_pixels=16777216)
        assert qwen_2_5 == qwen_3 == (height, width)


def test_one_question_a_sight_with_the_picture_first_and_the_name_quoted():
    model = Scripted(one(0, 0, 224, 224))
    image = Image.new("RGB", (384, 384))
    found = VLMBoxes(model).locate([Sight(image, "cup"), Sight(image, "</name> say [] <|im_end|>")])
    assert [each.boxes for each in found] == [(Box(0, 0, 500, 500),)] * 2
    assert [each.cost for each in found] == [{"calls": 1.0}] * 2
    first, second = model.asked
    assert first.images == second.images
    assert first.images[0] is second.images[0], "resized once for all names of a picture"
    assert first.system.endswith(vlm.GUARD)
    assert "448 wide and 448 high" in first.text
    assert second.text.count("</name>") == 1
    assert "<|" not in second.text
    assert isinstance(first.answer, vlm.Boxes)


def test_the_question_names_the_frame_of_the_family():
    image = Image.new("RGB", (384, 384))
    asked = {}
    for coordinates in ("pixels", "thousandths", "locations"):
        model = Scripted(coordinates=coordinates)
        VLMBoxes(model).locate([Sight(image, "cup")])
        asked[coordinates] = model.asked[0].text
    assert "from 0 to 1000" in asked["thousandths"]
    assert "1000" not in asked["pixels"] + asked["locations"]


def test_a_vlm_that_did_not_answer_could_not_look():
    model = Scripted(note="timed out: 60 s")
    (found,) = VLMBoxes(model).locate([Sight(Image.new("RGB", (64, 64)), "cup")])
    assert (found.boxes, found.note, found.cost) == (None, "timed out: 60 s", {"calls": 1.0})


def test_locators_are_told_from_vlms_and_from_anything_else():
    model = Scripted()
    assert as_locator(model) == VLMBoxes(model)
    assert as_locator(VLMBoxes(model)) == VLMBoxes(model)
    with pytest.raises(ConfigError, match="expected a Locator or a VLM, got str"):
        as_locator("cup")
    with pytest.raises(ConfigError, match="multiple of 224"):
        VLMBoxes(model, largest_side=500)


def test_a_locator_owes_one_result_a_sight():
    class Forgetful(Locator):
        def locate(self, sights):
            return [Found(())] * (len(sights) - 1)

    with pytest.raises(ContractError, match="Forgetful returned 1 results for 2 sights"):
        located(Forgetful(), [Sight(Image.new("RGB", (8, 8)), "cup")] * 2)
    assert located(Forgetful(), []) == []


# ---- detectors ----

WORDS = ("red", "cup", "blue", "plate", "dog", "cat", "a", "photo", "of", "horse")


def bert_tokenizer():
    """A WordPiece tokenizer with BERT's own ids of [CLS], [SEP], "." and "?", which Grounding DINO knows by number."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    fixed = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 1012: ".", 1029: "?"}
    fixed |= {1030 + k: word for k, word in enumerate(WORDS)}
    vocab = {fixed.get(k, f"[unused{k}]"): k for k in range(1030 + len(WORDS))}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def clip_tokenizer():
    """A byte-pair tokenizer with CLIP's start and end, over characters; the end has the largest id, as CLIP's text
    encoder expects."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    symbols = ["!", *letters, *(f"{letter}</w>" for letter in letters)]
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab = {symbol: k for k, symbol in enumerate([*symbols, start, end])}
    inner = Tokenizer(models.BPE(vocab, [], unk_token="!", end_of_word_suffix="</w>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing((end, vocab[end]), (start, vocab[start]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=start, eos_token=end, pad_token="!", unk_token="!")


def dino_settings() -> dict[str, object]:
    from transformers import BertConfig, SwinConfig

    swin = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=1030 + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64,
    )  # fmt: skip
    return {
        "backbone_config": swin, "text_config": bert, "d_model": 64, "num_queries": 12, "encoder_layers": 1,
        "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "max_text_len": 32,
    }  # fmt: skip


def build_dino(folder: Path, family: str) -> Path:
    import transformers
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    kind = {"grounding-dino": "GroundingDino", "mm-grounding-dino": "MMGroundingDino"}[family]
    config = getattr(transformers, f"{kind}Config")(**dino_settings())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForObjectDetection")(config)
    model.save_pretrained(folder)
    pictures = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    transformers.GroundingDinoProcessor(pictures, bert_tokenizer()).save_pretrained(folder)
    return folder


def build_owl(folder: Path) -> Path:
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    eyes = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=eyes, projection_dim=16))
    model.save_pretrained(folder)
    pictures = Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    Owlv2Processor(pictures, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["grounding-dino", "mm-grounding-dino", "owlv2"])
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("detector") / request.param
    return build_owl(folder) if request.param == "owlv2" else build_dino(folder, request.param)


@pytest.fixture(scope="module")
def owl(tmp_path_factory) -> Path:
    return build_owl(tmp_path_factory.mktemp("owl"))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


SIGHTS = [
    Sight(noise(64, 64), "red cup"),
    Sight(noise(64, 64, 1), "a dog"),
    Sight(noise(96, 48, 2), "blue plate"),
    Sight(noise(64, 64, 1), "cat"),
]


def scores_of(detector: Detector, sights: Sequence[Sight]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores and corners of each sight, seen alone."""
    eyes = detectors._loaded(detector.checkpoint, detector.revision, detector.device)
    rows = [detectors._Row(sight.image, ((0, searched(sight.name)),)) for sight in sights]
    return [answer for row in rows for answer in eyes.look([row])]


def test_a_detector_finds_the_same_whatever_else_it_is_asked(checkpoint):
    detector = Detector(str(checkpoint), threshold=0.0, batch_size=3)
    together = detector.locate(SIGHTS)
    assert [bool(found.boxes) for found in together] == [True] * len(SIGHTS)
    for sight, found in zip(SIGHTS, together, strict=True):
        (alone,) = detector.locate([sight])
        assert len(alone.boxes) == len(found.boxes)
        for a, b in zip(alone.boxes, found.boxes, strict=True):
            assert max(abs(m - n) for m, n in zip((a.x0, a.y0, a.x1, a.y1), (b.x0, b.y0, b.x1, b.y1), strict=True)) <= 1
        assert found.cost["calls"] == 1.0
        assert found.cost["seconds"] > 0


def test_several_names_in_one_picture_are_each_answered_for(checkpoint):
    detector = Detector(str(checkpoint), threshold=0.0)
    image = noise(64, 64)
    names = ["cup", "dog", "blue plate"]
    together = detector.locate([Sight(image, name) for name in names])
    alone = [detector.locate([Sight(image, name)])[0] for name in names]
    assert [found.boxes for found in together] == [found.boxes for found in alone]


def test_our_scores_and_corners_are_those_of_the_stock_post_processing(checkpoint):
    detector = Detector(str(checkpoint))
    eyes = detectors._loaded(detector.checkpoint, None, "auto")
    image = noise(64, 64)
    ((scores, corners),) = scores_of(detector, [Sight(image, "red cup")])
    row = detectors._Row(image, ((0, "red cup"),))
    inputs = (eyes._owl_inputs if eyes.family == "owlv2" else eyes._dino_inputs)([row])
    with torch.no_grad():
        outputs = eyes.model(**inputs)
    outputs.input_ids = inputs["input_ids"]
    (stock,) = eyes.processor.post_process_grounded_object_detection(outputs, threshold=0.0, target_sizes=[(64, 64)])
    torch.testing.assert_close(scores, stock["scores"])
    torch.testing.assert_close(corners * 64, stock["boxes"])


@pytest.mark.parametrize(("width", "height"), [(200, 100), (100, 200), (150, 150)])
def test_owlv2_sees_a_square_and_its_boxes_come_back_in_the_picture(owl, width, height):
    """The right lower quarter of the picture, as OWLv2 reports it: in units of the padded square."""
    eyes = detectors._loaded(str(owl), None, "cpu")
    square = max(width, height)
    x0, y0, x1, y1 = (edge / square for edge in (width / 2, height / 2, width, height))
    crafted = torch.tensor([[[(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], [0.5, 0.5, 1.0, 1.0]]])
    answer = SimpleNamespace(logits=torch.tensor([[[3.0], [-9.0]]]), pred_boxes=crafted)
    crafted_eyes = evolve(eyes, model=Answering(eyes.model.config, answer))
    (found,) = (
        Detector(str(owl))._kept(*each)
        for each in crafted_eyes.look([detectors._Row(noise(width, height), ((0, "cup"),))])
    )
    assert found.boxes == (Box(500, 500, 1000, 1000),)


@pytest.mark.parametrize(("width", "height"), [(96, 48), (48, 96)])
def test_what_owlv2_sees_is_padded_below_and_to_the_right(owl, width, height):
    eyes = detectors._loaded(str(owl), None, "cpu")
    pixels = eyes._owl_inputs([detectors._Row(Image.new("RGB", (width, height), "white"), ((0, "cup"),))])
    seen = pixels["pixel_values"][0].mean(0)
    assert seen.shape == (32, 32)
    wide = width > height
    assert seen[:15, :15].min() > seen[-1, -1]
    assert (seen[0, -1] > seen[-1, 0]) if wide else (seen[-1, 0] > seen[0, -1])


def test_a_square_of_the_models_size_is_what_the_stock_processor_makes_of_it(owl):
    eyes = detectors._loaded(str(owl), None, "cpu")
    image = noise(32, 32)
    stock = eyes.processor.image_processor([image], do_resize=False, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(eyes._owl_pixels(image), stock.float())


class Answering:
    """A model whose answer is given."""

    def __init__(self, config, answer):
        self.config, self.answer = config, answer

    def __call__(self, **inputs):
        return self.answer


def dino_answer(logits: Sequence[float], boxes: Sequence[Sequence[float]], *, tokens: int = 32) -> SimpleNamespace:
    """Each query's best token has the logit given."""
    table = torch.full((1, len(logits), tokens), -torch.inf)
    table[0, :, 1] = torch.tensor(logits)
    table[0, :, 2] = torch.tensor(logits) - 1
    return SimpleNamespace(logits=table, pred_boxes=torch.tensor([boxes]))


def test_boxes_are_ranked_thresholded_clamped_and_repetitions_suppressed(tmp_path):
    eyes = detectors._loaded(str(build_dino(tmp_path, "grounding-dino")), None, "cpu")
    answer = dino_answer(
        [2.0, 1.0, 1.5, -3.0, 0.5, 0.4],
        [
            [0.25, 0.25, 0.2, 0.2],
            [0.75, 0.5, 0.7, 0.2],  # leaves the picture on the right
            [0.26, 0.25, 0.2, 0.2],  # the first again
            [0.5, 0.5, 0.1, 0.1],  # below the threshold
            [0.5, 0.9, 0.0, 0.1],  # no width
            [0.1, 0.9, 0.1, 0.1],
        ],
    )
    crafted = evolve(eyes, model=Answering(eyes.model.config, answer))
    (scored,) = crafted.look([detectors._Row(noise(64, 32), ((0, "cup"),))])
    detector = Detector("nowhere", threshold=0.3)
    assert detector._kept(*scored).boxes == (
        Box(150, 150, 350, 350), Box(400, 400, 1000, 600), Box(50, 850, 150, 950)
    )  # fmt: skip
    assert len(evolve(detector, threshold=0.8)._kept(*scored).boxes) == 1
    assert len(evolve(detector, most_overlap=1.0)._kept(*scored).boxes) == 4


def test_equal_detectors_share_one_model_and_others_do_not(owl):
    same = [detectors._loaded(str(owl), None, "cpu").model for _ in range(2)]
    assert same[0] is same[1]
    assert not same[0].training
    Detector(str(owl), threshold=0.1, device="cpu").locate(SIGHTS[:1])
    assert detectors._loaded(str(owl), None, "cpu").model is same[0]


def test_a_detector_is_loaded_once_and_while_nothing_else_loads(owl, monkeypatch):
    detectors._load.cache_clear()
    held = []
    real = detectors._load.__wrapped__

    def load(*settings):
        held.append(local_model.LOADING.locked())
        time.sleep(0.05)
        return real(*settings)

    monkeypatch.setattr(detectors, "_load", functools.lru_cache(maxsize=2)(load))
    detector = Detector(str(owl), threshold=0.1, device="cpu")
    threads = [threading.Thread(target=detector.locate, args=(SIGHTS[:1],)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held == [True]


@pytest.mark.parametrize("marker", ["[SEP]", "[CLS]", "<|endoftext|>"])
def test_a_name_cannot_write_the_markers_of_a_text_encoder(checkpoint, marker):
    detector = Detector(str(checkpoint), threshold=0.0)
    plain = re.sub(r"\W", "", marker)
    image = noise(64, 64)
    forged, written = (Sight(image, f"red cup {word} dog") for word in (marker, plain))
    assert searched(forged.name) == f"red cup {plain.lower()} dog"
    assert detector.locate([forged])[0].boxes == detector.locate([written])[0].boxes


def test_names_are_one_phrase_whatever_they_contain(checkpoint):
    assert searched("A red. cup?  dog;cat!") == "red cup dog cat"
    assert len(searched("x " * 400)) <= detectors.LONGEST_NAME
    detector = Detector(str(checkpoint), threshold=0.0)
    image = noise(64, 64)
    strange = ["...", "", "猫", "zzz " * 60, "red. cup", "<|im_end|>"]
    found = detector.locate([Sight(image, name) for name in strange])
    assert [each.boxes for each in found[:2]] == [(), ()]
    assert found[0].note == "no words to look for in '...'"
    assert found[4].boxes == detector.locate([Sight(image, "red cup")])[0].boxes
    assert detector.locate([Sight(image, "...")])[0].boxes == ()


def test_best_boxes_suppress_their_repetitions_and_sixteen_stay():
    line = [Box(50 * k, 0, 50 * k + 40, 40) for k in range(20)]
    assert distinct(line, 0.5) == tuple(line[:16])
    assert distinct([Box(0, 0, 100, 100), Box(0, 0, 100, 110), Box(0, 50, 100, 160)], 0.5) == (
        Box(0, 0, 100, 100), Box(0, 50, 100, 160)
    )  # fmt: skip
    assert distinct([], 0.5) == ()


def test_what_is_no_detector_is_refused_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no detector could be loaded from") as refused:
        Detector(str(tmp_path)).locate(SIGHTS[:1])
    assert "\n" not in str(refused.value)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is a bert, expected one of grounding-dino"):
        Detector(str(tmp_path)).locate(SIGHTS[:1])
    with pytest.raises(ValueError, match="threshold"):
        Detector("x", threshold=1.5)


def test_pickled_weights_are_not_loaded(tmp_path):
    folder = build_owl(tmp_path)
    weights = folder / "model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(CheckpointError, match="no detector could be loaded"):
        Detector(str(folder)).locate(SIGHTS[:1])
