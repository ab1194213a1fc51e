from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from reasonrl import CheckpointError, ContractError, Draw, Prompt, Segment, Trajectory
from reasonrl.policies import GoTR1
from reasonrl.renderers import Tokens
from reasonrl.scenes import compose, world
from reasonrl.scenes.grammar import parse_prompt


def with_tokens(tokens) -> Trajectory:
    ids = torch.as_tensor(tokens)
    segment = Segment("image", (0,), ids, torch.ones(len(ids), dtype=torch.bool))
    return Trajectory(Prompt("a", "a circle"), (0,), segments={"image": segment})


def test_patch_tokens_become_the_drawn_scene_pixel_by_pixel():
    rng = np.random.default_rng(0)
    scene = compose.place(parse_prompt("a red circle above a blue square"), rng)
    from reasonrl.scenes import codec

    drawn = world.draw(scene)
    (rendered,) = Tokens().render([with_tokens(codec.encode(drawn))], draw=Draw(0, 0))
    assert np.array_equal(np.asarray(rendered.image), np.asarray(drawn))


def test_a_trajectory_without_tokens_comes_back_without_an_image():
    (same,) = Tokens().render([Trajectory(Prompt("a", "a circle"))], draw=Draw(0, 0))
    assert same.image is None


def test_vq_tokens_become_what_janus_decodes(tmp_path):
    policy = GoTR1("nano")
    policy.save(tmp_path)
    tokens = torch.randint(0, 1101, (3, 64), generator=torch.Generator().manual_seed(0))
    rendered = Tokens(str(tmp_path), num_rows=2).render([with_tokens(t) for t in tokens], draw=Draw(0, 0))
    with torch.no_grad():
        pixels = policy.module.model.decode_image_tokens(tokens).float()
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    for trajectory, array in zip(rendered, expected, strict=True):
        assert isinstance(trajectory.image, Image.Image)
        assert np.abs(np.asarray(trajectory.image).astype(int) - array).max() <= 1


def test_a_wrong_number_of_tokens_is_refused(tmp_path):
    GoTR1("nano").save(tmp_path)
    with pytest.raises(ContractError, match="8x8 tokens an image, got 10"):
        Tokens(str(tmp_path)).render([with_tokens(torch.zeros(10, dtype=torch.long))], draw=Draw(0, 0))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        Tokens(str(tmp_path)).render([with_tokens(torch.zeros(64, dtype=torch.long))], draw=Draw(0, 0))
