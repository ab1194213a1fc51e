import numpy as np
import pytest

from reasonrl.errors import DataError
from reasonrl.plan import Box
from reasonrl.scenes.world import BACKGROUND, INK, Scene, SceneObject, box_at, draw, inked


def red_circle(box: Box) -> SceneObject:
    return SceneObject("circle", "red", "solid", box)


def test_solid_goes_without_saying_in_a_name():
    assert red_circle(box_at(0, 0, 2)).name == "red circle"
    assert SceneObject("cross", "pink", "striped", box_at(0, 0, 2)).name == "striped pink cross"


def test_a_misspelt_word_is_refused_with_the_nearest_known_one():
    with pytest.raises(DataError, match=r"unknown shape 'circel': did you mean 'circle'\?"):
        SceneObject("circel", "red", "solid", box_at(0, 0, 2))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (Box(0, 0, 260, 250), "off the grid"),
        (Box(0, 0, 500, 500), "square of side 250"),
        (Box(0, 0, 250, 375), "square of side 250"),
        (Box(875, 0, 1125, 250), "off the grid"),
    ],
)
def test_a_box_off_the_grid_is_refused(box, message):
    with pytest.raises(DataError, match=message):
        red_circle(box)


def test_objects_without_an_empty_cell_between_them_are_refused():
    Scene((red_circle(box_at(0, 0, 2)), red_circle(box_at(3, 0, 2))))
    with pytest.raises(DataError, match="125 apart"):
        Scene((red_circle(box_at(0, 0, 2)), red_circle(box_at(2, 2, 2))))


def test_drawing_stays_in_its_box_and_is_blended_at_the_edge():
    pixels = np.asarray(draw(Scene((red_circle(box_at(2, 3, 2)),))))
    assert pixels.shape == (64, 64, 3)
    outside = pixels.copy()
    outside[24:40, 16:32] = BACKGROUND
    assert (outside == BACKGROUND).all()
    assert tuple(pixels[32, 24]) == (220, 40, 40)
    edge = pixels[24, 22, 0]
    assert 205 <= edge <= 220


def test_stripes_run_as_their_names_say():
    banded, striped, checkered = (inked(t, 16) for t in ("banded", "striped", "checkered"))
    assert (banded == banded[:, :1]).all()
    assert banded[:, 0].tolist() == ([False] * 4 + [True] * 4) * 2
    assert (striped == banded.T).all()
    assert (checkered == banded ^ striped).all()
    square = Scene((SceneObject("square", "blue", "banded", box_at(0, 0, 2)),))
    assert tuple(np.asarray(draw(square))[5, 1]) == INK
