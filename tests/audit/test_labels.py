"""Labels: what is wrong is refused with every line's number, and no path leads out of the folder."""

import json

import pytest
from PIL import Image

from reasonrl.audit.labels import read_labels
from reasonrl.errors import DataError


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "inside"
    (inside / "pictures").mkdir(parents=True)
    picture = Image.new("RGB", (8, 6), (200, 30, 30))
    for name in ("a.png", "b.jpg", "c.webp", "d.bmp", "e.gif"):
        picture.save(inside / "pictures" / name)
    picture.save(tmp_path / "secret.png")
    return inside


def line(**changes):
    return {"prompt": "a red cup", "image": "pictures/a.png", "score": 3} | changes


def write(folder, *lines):
    path = folder / "labels.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines))
    return path


def test_good_lines_become_trajectories_with_groups_whole(folder):
    path = write(
        folder,
        line(),
        line(prompt="a dog", image="pictures/b.jpg", score=1.5, reasoning="a dog at (1,2)"),
        "",
        line(image="pictures/c.webp", score=-2, rater="someone"),
        line(group="g", score=0),
    )
    labels = read_labels(path)
    assert [(label.group, label.score) for label in labels] == [
        ("a red cup", 3.0),
        ("a red cup", -2.0),
        ("a dog", 1.5),
        ("g", 0.0),
    ]
    shown = labels[2].trajectory(1)
    assert (shown.prompt.text, shown.reasoning, shown.member) == ("a dog", "a dog at (1,2)", (1,))
    assert (shown.image.size, shown.image.mode) == ((8, 6), "RGB")
    assert labels[0].trajectory(0).reasoning is None


WRONG = {
    "no JSON": ("{nope", "no JSON"),
    "no object": ("[1]", "expected a JSON object"),
    "no prompt": (line(prompt=" "), "'prompt' must be a text"),
    "no image": (line(image="pictures/z.png"), "no image"),
    "a folder": (line(image="pictures"), "no image"),
    "no score": ({"prompt": "a", "image": "pictures/a.png"}, "'score' must be a finite number, got None"),
    "a score in words": (line(score="3"), "'score' must be a finite number"),
    "a truth as score": (line(score=True), "'score' must be a finite number"),
    "not a number": (json.dumps(line()).replace("3", "NaN"), "'score' must be a finite number"),
    "a huge number": (json.dumps(line()).replace("3", "9" * 400), "'score' must be a finite number"),
    "reasoning of another kind": (line(reasoning=5), "'reasoning' must be a text"),
    "group of another kind": (line(group=[1]), "'group' must be a text"),
    "up and out": (line(image="../secret.png"), "outside the file's folder"),
    "a root": (line(image="/etc/hostname"), "outside the file's folder"),
    "a NUL": (line(image="a\0.png"), "no path"),
    "another format": (line(image="pictures/d.bmp"), "is no PNG, JPEG, WEBP"),
    "a GIF": (line(image="pictures/e.gif"), "is no PNG, JPEG, WEBP"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_malformed_line_is_refused_by_its_number(folder, wrong):
    said, why = WRONG[wrong]
    path = write(folder, line(), said)
    with pytest.raises(DataError) as caught:
        read_labels(path)
    message = str(caught.value)
    assert "1 malformed lines (2)" in message
    assert why in message
    assert "\n" not in message


def test_every_malformed_line_is_listed_and_the_first_three_explained(folder):
    path = write(folder, "x", line(), "y", line(score=None), line(prompt=""), line())
    with pytest.raises(DataError, match=r"4 malformed lines \(1, 3, 4, 5\)") as caught:
        read_labels(path)
    assert str(caught.value).count("no JSON") == 2
    assert "prompt" not in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(folder):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    with pytest.raises(DataError, match="outside the file's folder"):
        read_labels(write(folder, line(image="link.png")))


def test_a_picture_cut_short_is_refused(folder):
    whole = folder / "pictures" / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (folder / "pictures" / "half.png").write_bytes(whole.read_bytes()[:900])
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(write(folder, line(image="pictures/half.png")))


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(folder):
    Image.new("1", (20000, 8000)).save(folder / "pictures" / "vast.png")
    with pytest.raises(DataError, match="pixels"):
        read_labels(write(folder, line(image="pictures/vast.png")))


def test_a_group_of_two_prompts_is_refused(folder):
    with pytest.raises(DataError, match=r"\(2\).*another prompt"):
        read_labels(write(folder, line(group=1), line(group=1, prompt="a blue cup")))


@pytest.mark.parametrize(("content", "why"), [(b"", "holds no labels"), (b"\xff\xfe\x00", "not UTF-8")])
def test_a_file_without_labels_is_refused(folder, content, why):
    path = folder / "labels.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=why):
        read_labels(path)


def test_a_missing_file_is_refused(folder):
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(folder / "none.jsonl")


def test_an_image_name_longer_than_any_file_may_have_is_a_malformed_line(folder):
    with pytest.raises(DataError, match=r"1 malformed lines .*no path: 'aaa"):
        read_labels(write(folder, line(image="a" * 5000 + ".png")))


def test_a_palette_with_transparency_is_read_in_silence(folder):
    Image.new("P", (8, 6), 1).save(folder / "pictures" / "a.png", transparency=b"\x00\x01")
    [label] = read_labels(write(folder, line()))
    assert label.trajectory(0).image.mode == "RGB"
