import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from PIL import Image
from reasonrl_contrast import Contrast

from reasonrl import EVERY, Prompt, Trajectory
from reasonrl.testing import check_judge

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def with_image(image: Image.Image) -> Trajectory:
    return Trajectory(Prompt("p", "a red cup"), (0,), images={"image": image})


def test_contrast_keeps_the_contract_of_a_judge():
    check_judge(Contrast())


def test_half_black_half_white_has_full_contrast_and_flat_gray_none():
    halves = Image.new("RGB", (8, 8), "white")
    halves.paste("black", (0, 0, 4, 8))
    assert Contrast().score(with_image(halves)) == 1.0
    assert Contrast().score(with_image(Image.new("RGB", (8, 8), "gray"))) == 0.0


def test_gain_scales_up_to_one():
    ramp = with_image(Image.linear_gradient("L"))
    # Gray levels 0..255 are uniform: their standard deviation is sqrt((256**2 - 1) / 12) / 255.
    assert Contrast().score(ramp) == pytest.approx(0.5796, abs=1e-4)
    assert Contrast(gain=0.5).score(ramp) == pytest.approx(0.2898, abs=1e-4)
    assert Contrast(gain=9).score(ramp) == 1.0


def test_a_missing_image_is_the_policys_fault():
    (verdict,) = Contrast().judge([Trajectory(Prompt("p", "a red cup"))])
    assert verdict.total(EVERY) == 0.0
    assert verdict.scores["Contrast"].note == "no image"


@pytest.mark.parametrize("gain", [0, -1.0, float("nan")])
def test_gain_must_be_positive(gain):
    with pytest.raises(ValueError, match="'gain' must be > 0"):
        Contrast(gain=gain)


def test_the_entry_point_is_the_judge():
    project = tomllib.loads(PROJECT.read_text())["project"]
    entries = project["entry-points"]["reasonrl.judges"]
    loaded = EntryPoint("contrast", entries["contrast"], "reasonrl.judges").load()
    assert loaded is Contrast
