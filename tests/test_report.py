"""The report says what the run's files say, escapes what models wrote, and survives broken files."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonrl.curves import curve, whiskers
from reasonrl.errors import CheckpointError, DataError
from reasonrl.plan import Plan
from reasonrl.report import accuracy, bootstrap_interval, page, planned_boxes_over, read_run, write_report

PLAN = "<|obj_start|>red circle<|obj_end|> <|box_start|>(0,0),(500,500)<|box_end|> left of nothing"
ATTACK = "</code><script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'too' &amp;"


def answer(step, exact, *, split="test", category="color", prompt_id="1", **changes):
    return {
        "step": step,
        "split": split,
        "category": category,
        "prompt_id": prompt_id,
        "prompt": "a red circle",
        "exact": exact,
        "scores": {"ScenePromptImage": None if exact is None else float(exact)},
        "notes": {"ScenePromptImage": "not a scene"} if exact is None else {},
        "reasoning": PLAN,
        "image": None,
        **changes,
    }


def write(directory, **lines):
    (directory / "recipe.json").write_text(json.dumps({"steps": 2}))
    (directory / "run.json").write_text(json.dumps({"command": "reasonrl train x.py"}))
    for name, found in lines.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return directory


class Collector(HTMLParser):
    """Tags with their attributes, and the text outside style."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.inside = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.inside:
            self.text.append(data)


def parsed(html):
    found = Collector()
    found.feed(html)
    return found


# ---- Accuracy --------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(0, 5))
def test_an_interval_holds_the_mean_and_repeats(values, seed):
    numbers = [float(v) for v in values]
    low, high = bootstrap_interval(numbers, seed=seed, num_resamples=400)
    assert 0 <= low <= np.mean(numbers) <= high <= 1
    assert (low, high) == bootstrap_interval(numbers, seed=seed, num_resamples=400)


def test_an_interval_is_about_the_normal_one_for_many_values():
    numbers = [1.0] * 300 + [0.0] * 700
    low, high = bootstrap_interval(numbers)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.004)
    assert high == pytest.approx(0.3 + half, abs=0.004)


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(DataError, match="at least one value"):
        bootstrap_interval([])


def test_unscored_prompts_are_counted_and_never_averaged():
    lines = [answer(0, True), answer(0, False), answer(0, None), answer(0, False, category="shape")]
    found = {(row.category): row for row in accuracy(lines)}
    assert (found["all"].n, found["all"].unscored, found["all"].mean) == (3, 1, pytest.approx(1 / 3))
    assert (found["color"].n, found["color"].mean) == (2, 0.5)


def test_a_split_in_which_nothing_was_scored_has_no_accuracy():
    (row, _) = accuracy([answer(0, None)])
    assert (row.n, row.unscored, row.mean, row.low) == (0, 1, None, None)


def test_a_category_named_all_is_counted_once():
    (row,) = accuracy([answer(0, True, category="all")])
    assert row.n == 1


# ---- The page --------------------------------------------------------------------------------


def test_the_table_shows_before_and_after_with_intervals(tmp_path):
    lines = [answer(0, i < 1, prompt_id=str(i)) for i in range(4)]
    lines += [answer(2, i < 3, prompt_id=str(i)) for i in range(4)]
    text = " ".join(parsed(page(read_run(write(tmp_path, evaluations=lines)))).text)
    assert "step 0" in text
    assert "step 2" in text
    assert re.search(r"25\.0%\s+\[0\.0%, 75\.0%\] n=4\s+75\.0%\s+\[25\.0%, 100\.0%\] n=4", text)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40) | st.just(ATTACK))
def test_text_of_a_model_stays_text(tmp_path_factory, said):
    lines = [answer(0, True, prompt=said, reasoning=said, category=said, split=said, notes={"j": said})]
    metrics = [{"step": 0, "reward": 0.5, said: 1.0}]
    directory = write(tmp_path_factory.mktemp("run"), evaluations=lines, samples=lines, metrics=metrics)
    harmless = write(
        tmp_path_factory.mktemp("run"),
        evaluations=[answer(0, True, prompt="x", reasoning="x", category="x", split="x", notes={"j": "x"})],
        samples=[answer(0, True, prompt="x", reasoning="x", category="x", split="x", notes={"j": "x"})],
        metrics=[{"step": 0, "reward": 0.5, "x": 1.0}],
    )
    found, expected = parsed(page(read_run(directory))), parsed(page(read_run(harmless)))
    tags = [tag for tag, _ in found.tags]
    # Text that happens to be "all", "reward" or "step" merges with ours: no more tags than ordinary text has.
    assert set(tags) <= {tag for tag, _ in expected.tags}
    assert len(tags) <= len(expected.tags)
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)


def test_half_a_surrogate_pair_does_not_keep_a_run_from_its_page(tmp_path):
    directory = write(tmp_path, evaluations=[answer(0, True, prompt="a \ud800 cup")])  # a data set's JSON can spell it
    assert "a ? cup" in write_report(directory).read_text(encoding="utf-8")


def test_an_attack_arrives_on_the_page_as_it_was_written(tmp_path):
    directory = write(tmp_path, evaluations=[answer(0, True, prompt=ATTACK)])
    assert ATTACK in "".join(parsed(page(read_run(directory))).text)


def test_the_page_fetches_and_runs_nothing(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    lines = [answer(0, True, image="a.png")]
    metrics = [{"step": s, "reward": s / 2} for s in range(3)]
    found = parsed(page(read_run(write(tmp_path, evaluations=lines, samples=lines, metrics=metrics))))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    sources = [a["src"] for tag, a in found.tags if "src" in a]
    assert sources
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_a_picture_on_the_page_has_the_planned_box_over_it(tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    html = page(read_run(write(tmp_path, evaluations=[answer(0, True, image="a.png")])))
    (source,) = [a["src"] for tag, a in parsed(html).tags if tag == "img"]
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")
    white = Image.new("RGB", picture.size, "white")
    assert picture.size == (192, 192)
    assert picture.getpixel((95, 50)) != (255, 255, 255)  # the right edge of a box of half the width
    assert picture.getpixel((150, 150)) == white.getpixel((150, 150))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "broken.png", "missing.png", "note.txt", 7])
def test_a_picture_that_is_not_the_runs_own_is_left_out(tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (run / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (run / "note.txt").write_text("no picture")
    html = page(read_run(write(run, evaluations=[answer(0, True, image=name)])))
    assert "no picture" in html
    assert "<img" not in html


def test_broken_lines_are_named_and_the_rest_is_shown(tmp_path):
    directory = write(tmp_path, evaluations=[answer(0, True)])
    with (directory / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 1, "spl\n[1]\n"text"\n{"no": "step"}\n')
    (directory / "run.json").write_text("{")
    run = read_run(directory)
    assert len(run.evaluations) == 1
    for number in (2, 3, 4, 5):
        assert f"evaluations.jsonl line {number} cannot be read: left out" in run.notes
    text = "".join(parsed(page(run)).text)
    assert "line 2 cannot be read" in text
    assert "run.json cannot be read" in text


def test_reasons_for_silence_are_counted(tmp_path):
    lines = [answer(0, None, prompt_id=str(i)) for i in range(3)]
    assert "unscored, 3 times: ScenePromptImage: not a scene" in page(read_run(write(tmp_path, evaluations=lines)))


def test_a_run_of_nothing_has_a_page(tmp_path):
    path = write_report(write(tmp_path))
    assert path.read_text().startswith("<!doctype html>")
    assert not list(tmp_path.glob("*partial*"))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = write_report(write(tmp_path))
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reasonrl.report.os.replace", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_report(tmp_path)
    assert path.read_text() == before
    assert not list(tmp_path.glob("*partial*"))


# ---- Pictures and curves ---------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60), st.integers(1, 80), st.integers(1, 80))
def test_any_plan_can_be_drawn_over_any_picture(text, width, height):
    plan = Plan.parse(f"{PLAN}<|obj_start|>{text}<|obj_end|> <|box_start|>(900,900),(1000,1000)<|box_end|>")
    found = planned_boxes_over(Image.new("RGB", (width, height)), plan, scale=2)
    assert found.size == (2 * width, 2 * height)


def test_a_picture_without_a_plan_is_only_enlarged():
    image = Image.new("RGB", (2, 2), "blue")
    assert planned_boxes_over(image, None).getcolors() == [(64, (0, 0, 255))]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.floats(-1e9, 1e9), min_size=1, max_size=30))
def test_any_curve_stays_inside_its_panel(values):
    found = curve("reward", [float(i) for i in range(len(values))], values)
    assert bool(found) == any(v is not None for v in values)
    for points in re.findall(r"points='([^']*)'", found):
        for x, y in (map(float, p.split(",")) for p in points.split()):
            assert 48 <= x <= 252
            assert 22 <= y <= 110


def test_a_gap_breaks_the_line():
    assert curve("x", [0, 1, 2, 3, 4], [1, 2, None, 3, 4]).count("<polyline") == 4  # two parts, raw and averaged


def test_whiskers_skip_what_was_not_measured():
    found = whiskers([("test", [(False, 0.25, 0.1, 0.4), (True, None, None, None)]), ("<b>", [(True, 1.0, 1.0, 1.0)])])
    assert found.count("<circle") == 2
    assert "<b>" not in found
