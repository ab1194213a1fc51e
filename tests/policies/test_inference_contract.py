"""GoTR1 draws as the authors' inference code does: against that loop, written plainly, on the original architecture."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from attrs import evolve
from tests.policies.original_janus import OriginalJanus
from tests.policies.published_folder import write_published
from torch import Tensor

from reasonrl import Draw, Prompt, Trajectory
from reasonrl.policies import GoTR1
from reasonrl.policies.got_r1 import TEMPLATE

BEGIN_TEXT, END_TEXT, PAD, BEGIN_IMAGE = range(4)
SIDE = 8
GREEDY = 1e-6
"""A temperature at which only the likeliest token is drawn."""

Pick = Callable[[Tensor], int]


@pytest.fixture(scope="module")
def model(original) -> OriginalJanus:
    """Random weights whose logits differ by whole nats, and which write begin-of-image now and then."""
    lively = copy.deepcopy(original)
    with torch.no_grad():
        for name, value in lively.named_parameters():
            if name.startswith(("language_model.", "gen_")) and value.ndim == 2 and "gen_vision" not in name:
                value.mul_(20 if "embed" in name else 7)
        lively.language_model.lm_head.weight[END_TEXT] = 0
        lively.language_model.lm_head.weight[BEGIN_IMAGE] *= 3
    return lively


@pytest.fixture(scope="module")
def policy(model, tmp_path_factory) -> GoTR1:
    folder = write_published(tmp_path_factory.mktemp("contract") / "published", model)
    return GoTR1(str(folder), guidance=5.0, temperature=GREEDY, max_tokens=25)


# ---- the authors' loop ----


def likeliest(logits: Tensor) -> int:
    return int(logits.argmax())


@torch.no_grad()
def reasoned(model: OriginalJanus, prompt: Sequence[int], pick: Pick, *, most: int) -> list[int]:
    """Text without guidance: at most `most` tokens are drawn, and begin-of-image is put behind where it is missing."""
    written: list[int] = []
    while len(written) < most and (not written or written[-1] != BEGIN_IMAGE):
        written.append(pick(model.language_model(torch.tensor([[*prompt, *written]])).logits[0, -1]))
    return written if written[-1] == BEGIN_IMAGE else [*written, BEGIN_IMAGE]


@torch.no_grad()
def drawn(model: OriginalJanus, text: Sequence[int], picks: Sequence[Pick], *, guidance: float) -> list[list[int]]:
    """An image a pick, all of one plan: rows in pairs, each second with everything blanked but its two ends."""
    blank = [text[0], *[PAD] * (len(text) - 2), text[-1]]
    rows = torch.tensor([row for _ in picks for row in (text, blank)])
    inputs = model.language_model.get_input_embeddings()(rows)
    images: list[list[int]] = [[] for _ in picks]
    for _ in range(SIDE * SIDE):
        logits = model.gen_head(model.language_model.model(inputs_embeds=inputs).last_hidden_state[:, -1])
        seeing, blind = logits[0::2], logits[1::2]
        mixed = blind + guidance * (seeing - blind)
        for image, pick, row in zip(images, picks, mixed, strict=True):
            image.append(pick(row))
        latest = torch.tensor([image[-1] for image in images for _ in range(2)])
        inputs = torch.cat([inputs, model.prepare_gen_img_embeds(latest)[:, None]], 1)
    return images


class Follows:
    """Picks given tokens, and writes down what the logits say of them."""

    def __init__(self, tokens: Tensor, temperature: float) -> None:
        self.tokens, self.temperature = tokens.tolist(), temperature
        self.log_probs: list[float] = []

    def __call__(self, logits: Tensor) -> int:
        token = self.tokens[len(self.log_probs)]
        self.log_probs.append(float((logits / self.temperature).log_softmax(0)[token]))
        return token


def prompt_ids(policy: GoTR1, text: str) -> list[int]:
    """The turns of a conversation without a system prompt, the assistant's left open."""
    turns = f"User: {TEMPLATE.replace('{prompt}', text)}\n\nAssistant:"
    return [BEGIN_TEXT, *policy.tokenizer(turns, add_special_tokens=False)["input_ids"]]


def whole(policy: GoTR1, trajectory: Trajectory) -> list[int]:
    plan = trajectory.segments["reasoning"].actions.tolist()
    return [*prompt_ids(policy, trajectory.prompt.text), *plan]


# ---- the same tokens ----


PROMPTS = [Prompt(text, text) for text in ("ab", "cd ef", "a fig", "bead", "chef", "gh ij kl")]


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_the_likeliest_tokens_are_the_authors_in_both_phases(model, policy, guidance):
    found = evolve(policy, guidance=guidance).sample(PROMPTS, group_size=1, draw=Draw(0, 0))
    lengths = set()
    for trajectory in found:
        plan = reasoned(model, prompt_ids(policy, trajectory.prompt.text), likeliest, most=policy.max_tokens - 1)
        assert END_TEXT not in plan
        assert trajectory.segments["reasoning"].actions.tolist() == plan
        (image,) = drawn(model, whole(policy, trajectory), [likeliest], guidance=guidance)
        assert trajectory.segments["image"].actions.tolist() == image
        assert len(set(image)) > 2
        lengths.add(len(plan))
    # Some plans ended by themselves, and some were ended.
    assert max(lengths) == policy.max_tokens
    assert len(lengths) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_is_drawn_has_the_authors_probabilities(model, policy, temperature):
    warm = evolve(policy, temperature=temperature, images_per_plan=3)
    for plan_of_three in batched(warm.sample(PROMPTS[:2], group_size=6, draw=Draw(0, 0)), 3):
        first = plan_of_three[0]
        plan = first.segments["reasoning"]
        assert all(torch.equal(t.segments["reasoning"].actions, plan.actions) for t in plan_of_three)
        assert len({tuple(t.segments["image"].actions.tolist()) for t in plan_of_three}) > 1

        follows = Follows(plan.actions, temperature)
        reasoned(model, prompt_ids(policy, first.prompt.text), follows, most=int(plan.mask.sum()))
        close(plan.log_probs[plan.mask], follows.log_probs)

        picks = [Follows(t.segments["image"].actions, temperature) for t in plan_of_three]
        drawn(model, whole(policy, first), picks, guidance=5.0)
        for trajectory, pick in zip(plan_of_three, picks, strict=True):
            close(trajectory.segments["image"].log_probs, pick.log_probs)


def batched(found: Sequence[Trajectory], size: int) -> list[Sequence[Trajectory]]:
    return [found[i : i + size] for i in range(0, len(found), size)]


def close(found: Tensor, wanted: Sequence[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted), atol=2e-4, rtol=0)


# ---- where they part ----


def test_an_end_of_text_ends_a_plan_here_where_the_authors_write_on(model, policy, tmp_path):
    ends = copy.deepcopy(model)
    usual = reasoned(ends, prompt_ids(policy, PROMPTS[0].text), likeliest, most=4)[2]
    with torch.no_grad():  # end of text is written where that token was
        ends.language_model.lm_head.weight[END_TEXT] = 1.2 * ends.language_model.lm_head.weight[usual]
    ending = GoTR1(str(write_published(tmp_path / "ends", ends)), temperature=GREEDY, max_tokens=12)
    found = ending.sample(PROMPTS, group_size=1, draw=Draw(0, 0))
    parted = 0
    for trajectory in found:
        plan = reasoned(ends, prompt_ids(policy, trajectory.prompt.text), likeliest, most=11)
        if END_TEXT in plan[:-2]:
            end = plan.index(END_TEXT)
            assert trajectory.segments["reasoning"].actions.tolist() == [*plan[: end + 1], BEGIN_IMAGE]
            parted += 1
    assert parted
