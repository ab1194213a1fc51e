import numpy as np
from PIL import Image

from reasonrl.plan import Box
from reasonrl.scenes import codec, detector, parser, splits
from reasonrl.scenes.compose import place
from reasonrl.scenes.grammar import parse_prompt
from reasonrl.scenes.world import Scene, SceneObject, box_at, draw


def test_nearly_all_clean_scenes_are_seen_as_they_are():
    rng, prompts = np.random.default_rng(0), splits.load("test")
    scenes = [place(parse_prompt(prompt), rng) for prompt in prompts]
    right = [
        sorted(o.name for o in detector.read_image(draw(scene)).objects) == sorted(o.name for o in scene.objects)
        for scene in scenes
    ]
    assert sum(right) >= 0.95 * len(right)


def test_boxes_are_those_of_the_pixels():
    square = SceneObject("square", "cyan", "checkered", box_at(1, 4, 3))
    seen = detector.read_image(draw(Scene((square,))))
    assert seen == detector.Detection((detector.Sighting("square", "cyan", "checkered", Box(125, 500, 500, 875)),), 0)
    assert seen.objects[0].name == square.name


def test_it_is_softer_than_the_parser():
    rng = np.random.default_rng(1)
    noise = [np.where(rng.random(64) < 0.15, rng.integers(0, 1101, 64), 0) for _ in range(60)]
    fooled = sum(len(detector.read_image(codec.decode(tokens)).objects) for tokens in noise)
    assert fooled > 10
    assert not any(parser.read_tokens(tokens).objects for tokens in noise)


def test_images_of_other_sizes_are_read():
    scene = Scene((SceneObject("circle", "red", "solid", box_at(2, 2, 3)),))
    large = draw(scene).resize((256, 256), Image.Resampling.NEAREST)
    (seen,) = detector.read_image(large).objects
    assert (seen.name, seen.box) == ("red circle", Box(250, 250, 625, 625))


def test_an_empty_image_shows_nothing():
    assert detector.read_image(draw(Scene(()))) == detector.Detection((), 0)
