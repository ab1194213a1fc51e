import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonrl.data import LONGEST_LINE, read_prompts
from reasonrl.errors import ConfigError, DataError

CATEGORIES = (
    *("color", "shape", "texture", "spatial"),
    *("3d_spatial", "non_spatial", "numeracy", "complex"),
)
COMPBENCH = Path(__file__).parents[2] / "shared" / "data" / "t2i-compbench"
NUL, HALF = chr(0), r"\ud83d"

single_lines = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), min_size=1)
    .map(str.strip)
    .filter(lambda text: text and not text.startswith(("#", "\ufeff")))
)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), path.name)


@given(
    texts=st.lists(single_lines, min_size=1),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    closed=st.booleans(),
)
def test_any_lines_read_back_from_text(tmp_path_factory, texts, end, encoding, closed):
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes((end.join(texts) + end * closed).encode(encoding))
    prompts = read_prompts(path)
    assert [prompt.text for prompt in prompts] == texts
    assert [prompt.id for prompt in prompts] == [f"lines:{n}" for n in range(1, len(texts) + 1)]
    assert not any(prompt.facts for prompt in prompts)


@given(
    texts=st.lists(single_lines, min_size=1),
    field=st.sampled_from(["text", "prompt", "caption"]),
    ascii_only=st.booleans(),
)
def test_any_texts_read_back_from_json_lines(tmp_path_factory, texts, field, ascii_only):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    lines = [json.dumps({field: text}, ensure_ascii=ascii_only) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(path)] == texts


def test_text_lines_skip_blanks_and_comments_but_count_them(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffa cat\r\n\r\n# a note\r\n  a dog \r\n")
    assert [(p.id, p.text) for p in read_prompts(path)] == [("a:1", "a cat"), ("a:4", "a dog")]


def test_json_lines_keep_ids_and_facts(tmp_path):
    lines = [
        {"id": "x", "prompt": "a cat", "facts": {"count": 1}, "split": "val", "count": 2},
        {"id": 7, "caption": "a dog\nin two lines"},
        {"text": "a cow", "prompt": "kept as a fact", "id": None},
    ]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, lines)))
    x, seven, cow = read_prompts(path)
    assert (x.id, x.text, x.facts) == ("x", "a cat", {"count": 1, "split": "val"})
    assert (seven.id, seven.text, seven.facts) == ("7", "a dog\nin two lines", {})
    assert (cow.id, cow.facts) == ("a:5", {"prompt": "kept as a fact"})


def test_geneval_metadata_keeps_its_tag_as_the_category(tmp_path):
    line = {
        "tag": "counting",
        "include": [{"class": "cat", "count": 3}],
        "exclude": [{"class": "cat", "count": 4}],
        "prompt": "a photo of three cats",
    }
    (prompt,) = read_prompts(write(tmp_path / "evaluation_metadata.jsonl", json.dumps(line)))
    assert prompt.text == "a photo of three cats"
    assert prompt.facts == {
        "category": "counting",
        "include": [{"class": "cat", "count": 3}],
        "exclude": [{"class": "cat", "count": 4}],
    }


def test_a_tag_without_an_include_list_is_an_ordinary_fact(tmp_path):
    (prompt,) = read_prompts(write(tmp_path / "a.jsonl", '{"text": "a cat", "tag": "mine"}'))
    assert prompt.facts == {"tag": "mine"}


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("color.txt", "color"),
        ("3d_spatial_train.txt", "3d_spatial"),
        ("non_spatial_val.txt", "non_spatial"),
        ("complex_train_spatialaction.txt", "complex"),
        ("texture_val_unseen.txt", "texture"),
        ("color_wheels.txt", None),
        ("my_color_train.txt", None),
    ],
)
def test_the_category_comes_from_a_compbench_file_name(tmp_path, name, category):
    (prompt,) = read_prompts(write(tmp_path / name, "a red car."))
    assert prompt.facts.get("category") == category
    assert prompt.text == "a red car."


def test_a_limit_keeps_the_first(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo\nthree")
    assert [p.text for p in read_prompts(str(path), limit=2)] == ["one", "two"]
    assert len(read_prompts(path, limit=9)) == 3
    with pytest.raises(ConfigError, match="limit must be at least 1, got 0"):
        read_prompts(path, limit=0)


def test_a_folder_is_its_prompt_files_in_order(tmp_path):
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a.jsonl", '{"text": "a"}')
    write(tmp_path / "new_objects.txt", "cup - cups")
    write(tmp_path / "LICENSE", "MIT")
    write(tmp_path / "LICENSE.txt", "MIT")
    write(tmp_path / "notes.md", "no")
    (tmp_path / "sub.txt").mkdir()
    assert [p.id for p in read_prompts(tmp_path)] == ["a:1", "b:1"]


def test_files_of_a_folder_that_share_ids_are_refused(tmp_path):
    write(tmp_path / "a.jsonl", '{"text": "a"}')
    write(tmp_path / "a.txt", "a")
    with pytest.raises(DataError, match=r"a\.txt:1: id 'a:1' is taken by .*a\.jsonl:1$"):
        read_prompts(tmp_path)


def test_an_unusable_folder_is_named(tmp_path):
    assert refusal(tmp_path).endswith("the folder holds no .txt or .jsonl file of prompts")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "a.jsonl:2: broken JSON (Expecting ',' delimiter at column 13)"),
        ('["a cat"]', "a.jsonl:2: expected a JSON object, got ['a cat']"),
        ("null", "a.jsonl:2: expected a JSON object, got None"),
        (
            '{"b": 1, "a": 2}',
            "a.jsonl:2: no text or prompt or caption among its fields ['a', 'b']",
        ),
        ('{"text": 3}', "a.jsonl:2: 'text' must be a text, got 3"),
        ('{"prompt": " "}', "a.jsonl:2: 'prompt' must be a text, got ' '"),
        ('{"text": "a\\u0000b"}', "a.jsonl:2: 'text' holds a NUL byte at character 2"),
        (
            '{"text": "' + HALF + '"}',
            "a.jsonl:2: 'text' holds half a surrogate pair at character 1",
        ),
        ('{"text": "a", "id": [1]}', "a.jsonl:2: 'id' must be a text or a whole number, got [1]"),
        ('{"text": "a", "id": true}', "a.jsonl:2: 'id' must be a text or a whole number, got True"),
        ('{"text": "a", "facts": 3}', "a.jsonl:2: 'facts' must be a JSON object, got 3"),
        ('{"text": "a", "id": "first"}', "a.jsonl:2: id 'first' is taken by a.jsonl:1"),
        (
            '{"text": "a", "n": ' + "9" * 5000 + "}",
            "a.jsonl:2: broken JSON (too large a number, or nested too deeply)",
        ),
        (
            '{"text": "%s"}' % ("a" * LONGEST_LINE),
            "a.jsonl:2: 20012 characters, expected at most 20000",
        ),
    ],
    ids=lambda value: value[:40],
)
def test_a_broken_json_line_is_named_with_what_was_found(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "id": "first"}\n' + line)
    assert refusal(path) == message


def test_nesting_beyond_the_interpreter_is_broken_json(tmp_path):
    # Whether 9,000 brackets overflow the parser depends on the Python version: either way one line.
    path = write(tmp_path / "a.jsonl", "[" * 9_000 + "]" * 9_000)
    assert refusal(path).startswith("a.jsonl:1: ")


def test_three_offending_lines_are_shown_and_all_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(["{}"] * 3 + ['{"text": "fine"}'] + ["{}"] * 2))
    message = refusal(path)
    assert [f"a.jsonl:{n}:" in message for n in (1, 2, 3, 5)] == [True, True, True, False]
    assert message.endswith("; and 2 more of 5 lines to fix")


def test_a_text_file_with_a_nul_or_an_endless_line_is_refused(tmp_path):
    assert refusal(write(tmp_path / "a.txt", f"fine\na{NUL}b")) == ("a.txt:2: 'text' holds a NUL byte at character 2")
    assert refusal(write(tmp_path / "b.txt", "a" * (LONGEST_LINE + 1))) == (
        "b.txt:1: 20001 characters, expected at most 20000"
    )


@pytest.mark.parametrize("content", ["", "\n \r\n", "# only notes\n", "\ufeff"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    assert refusal(write(tmp_path / "a.txt", content)) == "a.txt: holds no prompts, write one a line"


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    latin = write(tmp_path / "a.txt", "a cat\r\na café".encode("latin-1"))
    assert refusal(latin) == ("a.txt:2: not UTF-8: byte 12 of the file is 0xe9; save the file as UTF-8")
    marked = write(tmp_path / "b.txt", b"\xef\xbb\xbfa\n\xe9")
    assert "b.txt:2: not UTF-8: byte 5 of the file is 0xe9" in refusal(marked)
    wide = write(tmp_path / "c.txt", "a cat".encode("utf-16"))
    assert "c.txt:1: not UTF-8: byte 0 of the file is 0xff" in refusal(wide)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path / "color_train.txt", "a red car")
    assert refusal(tmp_path / "colour_train.txt") == (
        "colour_train.txt: no such file in that folder. Did you mean 'color_train.txt'?"
    )
    assert refusal(tmp_path / "zebra.txt") == "zebra.txt: no such file in that folder"
    assert "no folder" in refusal(tmp_path / "nowhere" / "a.txt")


def test_a_file_of_another_kind_is_refused(tmp_path):
    assert refusal(write(tmp_path / "a.csv", "id,prompt\n1,a cat")) == (
        "a.csv: prompts are read from .txt, .jsonl, .json files or a folder of them, got .csv"
    )


@pytest.mark.skipif(not COMPBENCH.is_dir(), reason="the T2I-CompBench files are not beside the repo")
def test_every_compbench_category_loads_with_the_counts_of_the_files():
    prompts = read_prompts(COMPBENCH)
    files = Counter(prompt.id.rpartition(":")[0] for prompt in prompts)
    assert {name: files[f"{name}_train"] for name in CATEGORIES} == dict.fromkeys(CATEGORIES, 700)
    assert {name: files[f"{name}_val"] for name in CATEGORIES} == dict.fromkeys(CATEGORIES, 300)
    assert {prompt.facts["category"] for prompt in prompts} == set(CATEGORIES)
    assert "new_objects" not in files
    for prompt in prompts:
        stem, _, _ = prompt.id.rpartition(":")
        assert stem.startswith(prompt.facts["category"])
    first = read_prompts(COMPBENCH / "color_train.txt", limit=1)
    assert first[0].text == "a green bench and a red car"


def test_a_pattern_keeps_the_files_it_names(tmp_path):
    for name in ("color_train.txt", "shape_train.txt", "color_val.txt", "color_train.csv", "new_objects.txt"):
        write(tmp_path / name, f"a {name}")
    assert [p.id for p in read_prompts(tmp_path / "*_train.txt")] == ["color_train:1", "shape_train:1"]
    assert [p.id for p in read_prompts(tmp_path / "color_*")] == ["color_train:1", "color_val:1"]
    with pytest.raises(DataError, match=r"\*_test\.txt: no \.txt or \.jsonl file of prompts is called so"):
        read_prompts(tmp_path / "*_test.txt")
    with pytest.raises(DataError, match="no folder"):
        read_prompts(tmp_path / "gone" / "*_train.txt")


def test_a_file_whose_name_is_a_pattern_is_read_as_the_file(tmp_path):
    assert [p.text for p in read_prompts(write(tmp_path / "[a].txt", "one"))] == ["one"]


@pytest.mark.skipif(not COMPBENCH.is_dir(), reason="the T2I-CompBench files are not beside the repo")
def test_compbench_training_prompts_are_told_from_its_validation_prompts():
    prompts = read_prompts(COMPBENCH / "*_train.txt")
    assert Counter(p.facts["category"] for p in prompts) == dict.fromkeys(CATEGORIES, 700)
    assert {p.id.rpartition(":")[0] for p in prompts} == {f"{name}_train" for name in CATEGORIES}
