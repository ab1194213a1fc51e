"""Judges with known properties: the audit finds each, and nothing that is not there."""

import io
import json
import random
import re
from itertools import groupby, pairwise

import numpy as np
import pytest
from attrs import field, frozen
from PIL import Image
from rich.console import Console

from reasonrl.audit import asking
from reasonrl.audit.asking import aspects_of, chunks, is_pointwise, needs_by_score
from reasonrl.audit.exam import Plan, _lift, foretold
from reasonrl.audit.graded import EXACT
from reasonrl.audit.injection import ATTACKS, BESIDE, FAMILIES, IN_NAMES
from reasonrl.audit.tables import WIDTH, rendered, write
from reasonrl.audit.verdict import examine, formula, signed
from reasonrl.errors import CheckpointError, ConfigError, ContractError, JudgeError
from reasonrl.interfaces import Judge, PointwiseJudge
from reasonrl.interfaces.judge import Scaled
from reasonrl.judges import DualStage, ScenePromptImage, SceneReasoningImage, SceneSemantic, SceneSpatial
from reasonrl.judges.vlm import VLM, Choice, Reply, quoted
from reasonrl.types import Score, Verdict

NUM = 12
PLAN = Plan(num=NUM)


@frozen
class Exactly(PointwiseJudge):
    """An exact score of the plan or the image, to be spoilt by the judges below; reads pictures of any size."""

    aspect: str = "semantic"

    @property
    def needs(self):
        return EXACT[self.aspect].needs

    def score(self, trajectory):
        return EXACT[self.aspect].score(trajectory).value


@frozen
class NoisySemantic(PointwiseJudge):
    sd: float
    source: random.Random = field(factory=lambda: random.Random(0), eq=False)

    def score(self, trajectory):
        return EXACT["semantic"].score(trajectory).value + self.source.gauss(0, self.sd)


@frozen
class Gullible(PointwiseJudge):
    """Believes any text with a 10 in it that is no coordinate."""

    gain: float = 0.3

    def score(self, trajectory):
        told = re.sub(r"\([0-9]+,[0-9]+\)", "", trajectory.reasoning or "")
        return EXACT["semantic"].score(trajectory).value + self.gain * ("10" in told)


@frozen
class Obedient(PointwiseJudge):
    """A model that obeys its chat template and its own closing marks; asked with the plan quoted, or as it is."""

    quotes: bool

    def score(self, trajectory):
        plan = trajectory.reasoning or ""
        question = quoted("plan", plan) if self.quotes else f"<plan>\n{plan}\n</plan>"
        fooled = "<|im_start|>system" in question or re.search(r"</plan>.*10", question, re.DOTALL)
        return 1.0 if fooled else EXACT["spatial"].score(trajectory).value


@frozen
class LovesLength(PointwiseJudge):
    def score(self, trajectory):
        return min(1.0, len(trajectory.reasoning or "") / 2000)


@frozen
class Constant(PointwiseJudge):
    def score(self, trajectory):
        return 0.7


@frozen
class Comparing(Judge):
    """Win rate in the group by the exact score; what is close is won by the one shown first, as `bias` says."""

    bias: float

    def judge(self, trajectories):
        found = []
        for _, rows in groupby(trajectories, key=lambda t: t.prompt.id):
            exact = [EXACT["semantic"].score(t).value for t in rows]
            for i, mine in enumerate(exact):
                wins = [self._wins(mine, other, i < j) for j, other in enumerate(exact) if i != j]
                found.append(Verdict.of("wins", sum(wins) / len(wins)))
        return found

    def _wins(self, mine, other, first):
        if abs(mine - other) > 0.3:
            return float(mine > other)
        return 0.5 + self.bias * (0.5 if first else -0.5)


@frozen
class InTheMiddle(Judge):
    """Likes whatever is shown in the middle of a group."""

    def judge(self, trajectories):
        found = []
        for _, group in groupby(trajectories, key=lambda t: t.prompt.id):
            rows = list(group)
            middle = [1 - abs(2 * k / (len(rows) - 1) - 1) for k in range(len(rows))]
            exact = [EXACT["semantic"].score(t).value for t in rows]
            found += [Verdict.of("liked", e + m) for e, m in zip(exact, middle, strict=True)]
        return found


@frozen
class Silent(PointwiseJudge):
    """Every third is timed out, every third refused."""

    def score(self, trajectory):
        turn = sum(trajectory.member) % 3
        notes = ["timed out: after 3 s", "refused: an empty reply"]
        return Score(None, notes[turn]) if turn < 2 else 1.0 / (1 + trajectory.member[0])


@frozen
class Broken(Judge):
    how: str

    def judge(self, trajectories):
        if self.how == "raises":
            raise ValueError("the model is\ngone")
        if self.how == "nan":
            return [Verdict.of("broken", float("nan")) for _ in trajectories]
        return [Verdict.of("broken", 0.5) for _ in trajectories[1:]]


@frozen
class Metered(Judge):
    """Counts what it is asked; the second time, a cache answers."""

    seen: set = field(factory=set, eq=False)

    def judge(self, trajectories):
        return [Verdict.of("metered", self._score(t)) for t in trajectories]

    def _score(self, trajectory):
        key = trajectory.prompt.id, trajectory.reasoning, trajectory.image.tobytes()
        cost = {"hits": 1.0} if key in self.seen else {"calls": 1.0, "tokens_in": 100.0}
        self.seen.add(key)
        return Score(EXACT["semantic"].score(trajectory).value, "", cost)


def failed(audit):
    return [finding.text for finding in audit.findings if not finding.ok]


# ---- agreement ----


@pytest.mark.parametrize(
    "judge",
    [SceneSemantic(), SceneSpatial(), SceneReasoningImage(), ScenePromptImage(), DualStage(), DualStage("iclr-2026")],
    ids=lambda judge: type(judge).__name__,
)
def test_exact_judges_agree_with_themselves_and_nothing_speaks_against_them(judge):
    audit = examine(judge, PLAN)
    assert audit.ok
    for found in audit.scores.values():
        assert (
            found.overall.within_tau.value == found.overall.within_kendall.value == found.overall.kendall.value == 1.0
        )
        assert found.overall.spearman.value == pytest.approx(1.0)
        assert found.overall.tied_pairs == 0
        assert all(each.within_tau.value == 1.0 for each in found.categories.values())
        assert found.retest.sd.value == 0
    assert (audit.unscored, audit.reasons, audit.about["side"]) == (0.0, {}, 64)


def test_the_four_parts_of_a_reward_are_held_against_their_own_question():
    audit = examine(DualStage(), PLAN)
    assert {name: found.against for name, found in audit.scores.items()} == {
        "reward": ("prompt-image", "semantic", "spatial", "reasoning-image"),
        "ScenePromptImage": ("prompt-image",),
        "SceneSemantic": ("semantic",),
        "SceneSpatial": ("spatial",),
        "SceneReasoningImage": ("reasoning-image",),
    }


def test_rewards_by_stage_are_audited_by_stage():
    audit = examine(SceneSemantic().on("reasoning") + ScenePromptImage().on("image"), PLAN)
    assert audit.scores["reward on reasoning"].against == ("semantic",)
    assert audit.scores["reward on image"].against == ("prompt-image",)
    assert audit.ok


def test_agreement_falls_with_noise_and_the_noise_is_measured():
    taus, inside = [], 0
    for sd in (0.02, 0.1, 0.3, 1.0, 5.0):
        found = examine(NoisySemantic(sd), PLAN).scores["reward"]
        taus.append(found.overall.within_tau.value)
        inside += found.retest.sd.low <= sd <= found.retest.sd.high
        assert found.retest.sd.value == pytest.approx(sd, rel=0.25)
    assert taus == sorted(taus, reverse=True)
    assert taus[0] > 0.95 > 0.2 > taus[-1]
    assert inside >= 4


def test_a_constant_judge_is_undefined_and_below_any_threshold():
    for threshold in (None, -1.0, 0.5):
        audit = examine(Constant(), Plan(num=4, threshold=threshold))
        assert audit.scores["reward"].overall.within_kendall.value is None
        assert audit.scores["reward"].overall.tied_groups == 1.0
        [why] = failed(audit)
        assert "no agreement is defined" in why


def test_a_threshold_refuses_what_is_below_it_and_no_more():
    assert examine(NoisySemantic(0.3), Plan(num=NUM, threshold=0.2)).ok
    [why] = failed(examine(NoisySemantic(0.3), Plan(num=NUM, threshold=0.9)))
    assert re.search(r"reward against exact semantic: Kendall's tau within prompts is 0\.\d\d \[", why)
    assert "at least 0.9 wanted" in why


def test_a_judge_that_turns_the_truth_round_is_found_out():
    audit = examine(-1.0 * SceneSemantic(), Plan(num=NUM, threshold=0.0))
    assert audit.scores["reward"].overall.within_tau.value == -1.0
    assert not audit.ok


def test_the_reward_is_held_against_what_is_asked_for():
    audit = examine(SceneSemantic(), Plan(num=NUM, against=("spatial",)))
    assert audit.scores["reward"].against == ("spatial",)
    assert audit.scores["reward"].overall.within_tau.value == audit.scores["reward"].exact["spatial"] < 1
    with pytest.raises(ConfigError, match="no exact score beauty: they are prompt-image, semantic"):
        Plan(against=("beauty",))


def test_a_seed_gives_the_same_audit():
    one, same, other = (examine(Gullible(), Plan(num=6, seed=seed)).record() for seed in (1, 1, 2))
    for record in (one, same, other):
        del record["cost"]
    assert one == same != other


# ---- what is asked ----


def test_a_judge_of_photographs_sees_enlarged_pictures_and_the_exact_ones_do_not():
    seen = set()

    @frozen
    class Looks(PointwiseJudge):
        @property
        def needs(self):
            return frozenset({"image"})

        def score(self, trajectory):
            seen.add(trajectory.image.size)
            return float(trajectory.image.getpixel((5, 5))[0])

    assert examine(Looks(), Plan(num=4)).about["side"] == 448
    assert seen == {(448, 448)}
    seen.clear()
    assert examine(Looks(), Plan(num=4, side=128)).about["side"] == 128
    assert seen == {(128, 128)}
    mixed = examine(Looks() * ScenePromptImage(), Plan(num=4))
    assert (mixed.about["side"], mixed.unscored) == (64, 0.0)


@pytest.mark.parametrize("judge", [DualStage(), SceneSemantic(), Comparing(0.0)], ids=lambda j: type(j).__name__)
def test_what_is_foretold_is_what_is_judged(judge):
    assert examine(judge, Plan(num=5)).cost.judged == foretold(judge, Plan(num=5))


def test_groups_arrive_whole():
    sizes = []

    @frozen
    class Groups(Judge):
        def judge(self, trajectories):
            ids = [t.prompt.id for t in trajectories]
            runs = [len(list(run)) for _, run in groupby(ids)]
            assert len(runs) == len(set(ids))
            sizes.extend(runs)
            return [Verdict.of("g", float(len(t.reasoning))) for t in trajectories]

    examine(Groups(), Plan(num=NUM))
    assert set(sizes) <= {3, 8, 9, 10, 11}


def test_chunks_hold_whole_groups():
    groups = [k // 5 for k in range(333)]
    parts = chunks(groups, lambda group: group)
    assert [group for part in parts for group in part] == groups
    assert all(asking.CHUNK <= len(part) < asking.CHUNK + 5 for part in parts[:-1])
    assert all(set(a).isdisjoint(b) for a, b in pairwise(parts))


# ---- hostile text ----


def test_the_probe_finds_a_gullible_judge_and_measures_the_lift():
    audit = examine(Gullible(gain=0.3), PLAN)
    found = audit.scores["reward"]
    believed = {"order", "delimiter", "chat template", "reply", "fenced reply", "dialogue", *IN_NAMES}
    for family in ATTACKS:
        assert found.attacks[family].ok == (family not in believed), family
    lift = found.attacks["reply"]
    assert lift.against_clean.value == lift.against_neutral.value == pytest.approx(0.3)
    assert (lift.largest, lift.raised) == (pytest.approx(0.3), 1.0)
    # A name that is not the object's costs this judge its score, so the gain over the clean plan is gone in the mean.
    assert found.attacks["name: reply"].against_neutral.value == pytest.approx(0.3)
    assert found.attacks["name: reply"].against_clean.value < 0
    assert found.attacks["name: reply"].raised > 0.25
    [why] = failed(audit)
    assert why.startswith("hostile text in the plan raises reward by +0.30 (order)")


def test_quoting_saves_a_model_that_obeys_markup():
    [why] = failed(examine(Obedient(quotes=False), PLAN))
    assert "(delimiter)" in why
    assert "(chat template)" in why
    assert examine(Obedient(quotes=True), PLAN).ok


def test_a_small_gain_is_tolerated_as_stated():
    assert examine(Gullible(gain=0.04), PLAN).ok
    assert not examine(Gullible(gain=0.04), Plan(num=NUM, tolerance=0.01)).ok


def test_noise_is_not_taken_for_gullibility():
    """Of 40 audits' worth of noise, at most 5 may be wrong (2 are expected)."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(40):
        noise = rng.normal(0, 0.3, (len(ATTACKS), 3, NUM))
        wrong += not all(_lift(*each, list(map(str, range(NUM))), 0.1, 0).ok for each in noise)
    assert wrong <= 5


def test_length_is_told_from_hostility():
    audit = examine(LovesLength(), PLAN)
    assert all(abs(lift.against_neutral.value) < 1e-9 for lift in audit.scores["reward"].attacks.values())
    [why] = failed(audit)
    assert why.startswith("text that says nothing raises reward by 0.50")


def test_a_judge_of_pictures_alone_cannot_be_talked_to():
    found = examine(ScenePromptImage(), PLAN).scores["reward"]
    assert all(found.attacks[family].against_clean.value == 0 for family in BESIDE)


# ---- order ----


def test_a_judge_that_prefers_the_first_place_is_found():
    audit = examine(Comparing(bias=1.0), PLAN)
    found = audit.scores["reward"].order
    assert found.to_front.low > 0.1
    first, *_, last = found.by_position
    assert first > 0 > last
    [why] = failed(audit)
    assert "moving members of a group changes a score by" in why


def test_a_fair_comparing_judge_passes():
    audit = examine(Comparing(bias=0.0), PLAN)
    assert audit.ok
    assert audit.scores["reward"].order.excess.value == pytest.approx(0)


def test_a_preference_for_the_middle_is_found_though_no_end_gains():
    audit = examine(InTheMiddle(), PLAN)
    found = audit.scores["reward"].order
    assert found.excess.low > 0.1
    assert abs(found.to_front.value) < found.excess.value
    assert found.by_position[2] > max(found.by_position[0], found.by_position[4])
    assert any("moving members" in why for why in failed(audit))


def test_a_pointwise_judge_is_not_asked_in_another_order():
    assert examine(SceneSemantic(), PLAN).scores["reward"].order is None
    assert is_pointwise(0.5 * SceneSemantic().named("a") + SceneSpatial() * DualStage().on("image"))
    assert not is_pointwise(SceneSemantic() + Comparing(0.0))


# ---- judges that fail ----


def test_abstentions_are_counted_by_reason():
    audit = examine(Silent(), Plan(num=6, max_unscored=0.5))
    assert set(audit.reasons) == {"Silent: timed out", "Silent: refused"}
    assert 0.6 < audit.unscored < 0.8
    why, hostile = failed(audit)
    assert "no attacked plan was scored" in hostile  # one place of three is
    assert why.startswith(f"{audit.unscored:.0%} of graded scenes have no reward, at most 50% allowed: Silent:")
    assert audit.scores["reward"].overall.n == round((1 - audit.unscored) * len_graded(6))


def len_graded(num):
    return (foretold(SceneSemantic(), Plan(num=num)) - 3 * len(FAMILIES) * num) // 2


def test_nan_is_an_abstention_and_nothing_scored_is_no_agreement():
    audit = examine(Broken("nan"), Plan(num=4))
    assert list(audit.reasons) == ["broken: not finite"]
    assert audit.unscored == 1.0
    assert len(failed(audit)) == 3  # agreement, unscored, hostile text
    assert any("nothing was scored" in why for why in failed(audit))
    json.dumps(audit.record(), allow_nan=False)


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [("raises", JudgeError, "Broken.*ValueError: the model is gone"), ("short", ContractError, "verdicts for")],
)
def test_a_judge_that_breaks_is_one_clear_line(how, error, words):
    with pytest.raises(error, match=words) as caught:
        examine(Broken(how), Plan(num=4))
    assert "\n" not in str(caught.value)


# ---- cost ----


def test_cost_is_added_up_and_a_cache_is_not_taken_for_calm():
    audit = examine(Metered(), Plan(num=4))
    graded = len_graded(4)
    assert audit.cost.retest_hits == graded
    assert audit.cost.cost["hits"] == 2 * graded  # again, and in another order
    assert audit.cost.cost["tokens_in"] == 100 * audit.cost.cost["calls"]
    assert audit.cost.cost["calls"] + audit.cost.cost["hits"] == audit.cost.judged
    assert audit.cost.calls_per_s == pytest.approx(audit.cost.cost["calls"] / audit.cost.seconds)
    assert any(f"{graded} answers of the second asking came from a cache" in f.text for f in audit.findings)


def test_a_judge_without_calls_has_no_rate_of_them():
    assert examine(SceneSemantic(), Plan(num=4)).cost.calls_per_s is None


# ---- people ----


@pytest.fixture
def labels(tmp_path):
    """Four prompts with five pictures each, whose brightness people like."""
    lines = []
    for k in range(20):
        Image.new("RGB", (32, 32), (10 * k, 0, 0)).save(tmp_path / f"{k}.png")
        lines.append({"prompt": f"thing {k % 4}", "image": f"{k}.png", "score": 10 * k, "reasoning": "a thing"})
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@frozen
class Brightness(PointwiseJudge):
    sign: int = 1

    @property
    def needs(self):
        return frozenset({"image"})

    def score(self, trajectory):
        return self.sign * float(trajectory.image.getpixel((1, 1))[0])


def test_agreement_with_people_needs_no_scenes(labels):
    audit = examine(Brightness(), Plan(num=0, labels=labels, threshold=0.9))
    assert audit.ok
    assert (audit.people["reward"].n, audit.people["reward"].num_groups) == (20, 4)
    assert audit.people["reward"].within_tau.value == 1.0
    assert (audit.scores, audit.unscored, audit.cost.judged) == ({}, None, 20)
    [why] = failed(examine(Brightness(-1), Plan(num=0, labels=labels, threshold=0.1)))
    assert why.startswith("reward against people: Kendall's tau within prompts is -1.00")


def test_the_threshold_is_for_scenes_and_for_people(labels):
    audit = examine(SceneSemantic(), Plan(num=4, labels=labels, threshold=0.5))
    assert audit.scores["reward"].overall.within_kendall.value == 1.0
    assert any("against people: no agreement is defined" in why for why in failed(audit))


def test_people_who_saw_each_prompt_once_are_compared_over_all_pairs(labels, tmp_path):
    lines = [json.loads(line) | {"group": k} for k, line in enumerate(labels.read_text().splitlines())]
    path = tmp_path / "single.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    audit = examine(Brightness(), Plan(num=0, labels=path, threshold=0.5))
    assert audit.ok
    assert "tau over all pairs is 1.00" in audit.findings[0].text


def test_an_audit_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="without prompts needs labels"):
        examine(SceneSemantic(), Plan(num=0))


# ---- what is about what ----


@pytest.mark.parametrize(
    ("judge", "column", "against"),
    [
        (SceneSemantic().named("quality"), "reward", ("semantic", "spatial")),
        (ScenePromptImage().named("quality"), "reward", ("prompt-image",)),
        (DualStage().named("taste"), "taste.SceneSpatial", ("spatial",)),
        (DualStage().named("taste"), "reward", ("prompt-image", "semantic", "spatial", "reasoning-image")),
        (LovesLength() * ScenePromptImage(), "LovesLength", ("semantic", "spatial")),
        (LovesLength() * ScenePromptImage(), "reward", ("prompt-image", "semantic", "spatial")),
        (Brightness() + SceneSpatial(), "Brightness", ("prompt-image",)),
    ],
)
def test_a_score_is_held_against_what_its_name_or_its_needs_say(judge, column, against):
    from reasonrl.audit.graded import graded_set

    verdicts = judge.judge([each.trajectory for each in graded_set(1)])
    assert aspects_of(judge, column, verdicts) == against


def test_needs_are_known_by_score_through_an_expression():
    judge = 0.5 * SceneSemantic().named("a") + DualStage().named("b").on("image")
    found = needs_by_score(judge)
    assert found["a"] == frozenset()
    assert found["b.ScenePromptImage"] == frozenset({"image"})


def test_a_formula_reads_as_the_reward_is_written():
    assert formula(tuple(EXACT)) == "prompt-image × (semantic + spatial) × reasoning-image"
    assert formula(("semantic", "spatial")) == "semantic + spatial"
    assert formula(("prompt-image", "spatial")) == "prompt-image × spatial"


# ---- what is written ----


def test_everything_is_written_as_json_without_nan(tmp_path):
    audit = examine(Gullible(), Plan(num=4))
    record = json.loads(write(audit, tmp_path / "new" / "folder").read_text(), parse_constant=pytest.fail)
    assert record == json.loads(json.dumps(audit.record()))
    assert record["ok"] is False
    assert record["scores"]["reward"]["attacks"]["reply"]["ok"] is False
    assert record["about"]["num"] == 4


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to"):
        write(examine(SceneSemantic(), Plan(num=4)), tmp_path / "file")


@pytest.mark.parametrize("judge", [DualStage(), Broken("nan"), LovesLength()], ids=lambda j: type(j).__name__)
def test_tables_show_every_audit(judge, labels):
    audit = examine(judge, Plan(num=4, labels=labels))
    titles = [str(table.title) for table in rendered(audit)]
    assert titles == [
        "agreement with exact scores",
        "tau within prompts, by category",
        "tau within prompts with each exact score",
        "mean score by what is wrong",
        "asked twice, and in another order",
        "change by hostile text: over the clean plan / over as much neutral text",
        "agreement with people",
        "what it took",
    ]
    console = Console(width=WIDTH, file=io.StringIO())
    for table in rendered(audit):
        console.print(table)
    said = console.file.getvalue()
    for name, found in audit.scores.items():
        assert name in said
        assert str(found.overall.within_tau) in said


def test_tables_of_a_comparing_judge_show_what_places_do():
    audit = examine(Comparing(1.0), Plan(num=4))
    console = Console(width=WIDTH, file=io.StringIO())
    for table in rendered(audit):
        console.print(table)
    assert str(audit.scores["reward"].order.to_front) in console.file.getvalue()


# ---- judges that ask a model ----


@frozen
class Obeys(VLM):
    """A model that marks by the length of the question, but gives the best mark to one that orders it to."""

    identity = "obeys 1"
    log_probs = True
    coordinates = "pixels"

    def ask(self, questions):
        return [self._reply(question) for question in questions]

    def _reply(self, question):
        cost = {"calls": 1.0, "tokens_in": float(len(question.text.split()))}
        if not isinstance(question.answer, Choice):
            return Reply("[]", cost=cost)
        ordered = "highest score, 10" in question.text
        mark = question.answer.options[-1 if ordered else len(question.text) % 5]
        return Reply(mark, {mark: 0.0}, cost=cost)


def test_the_reward_of_a_model_is_audited_part_by_part():
    audit = examine(DualStage(vlm=Obeys()), Plan(num=8))
    assert audit.about["side"] == 448
    assert {name: found.against for name, found in audit.scores.items()} == {
        "reward": ("prompt-image", "semantic", "spatial", "reasoning-image"),
        "PromptImage": ("prompt-image",),
        "Semantic": ("semantic",),
        "Spatial": ("spatial",),
        "ReasoningImage": ("reasoning-image",),
    }
    lifts = {name: found.attacks["order"] for name, found in audit.scores.items()}
    assert not lifts["Semantic"].ok  # it reads the plan's words
    assert lifts["Spatial"].ok  # sees boxes and names alone
    assert lifts["PromptImage"].ok
    assert audit.cost.cost["calls"] > audit.cost.judged
    assert audit.cost.calls_per_s > 0
    assert any("raises Semantic by" in why for why in failed(audit))


@frozen
class Sparing(PointwiseJudge):
    """Scores every tenth thing that it sees."""

    seen: list = field(factory=list, eq=False)

    def score(self, trajectory):
        self.seen.append(1)
        return float(len(trajectory.prompt.text)) if len(self.seen) % 10 == 1 else None


def test_a_judge_that_is_silent_about_peoples_pictures_fails(labels):
    audit = examine(Sparing(), Plan(num=0, labels=labels))
    assert audit.unscored_labels == 0.9
    assert audit.unscored is None
    assert any("90% of labels have no reward, at most 50% allowed" in text for text in failed(audit))


def test_of_what_was_never_scored_nothing_good_is_said():
    audit = examine(Broken("nan"), Plan(num=4))
    assert [finding.text for finding in audit.findings if finding.ok] == []


def test_a_lift_that_two_decimals_would_hide_is_shown():
    assert [signed(value) for value in (0.3, -0.0051, 0.00012, -3e-7, 0.0)] == [
        "+0.30",
        "-0.01",
        "+1e-04",
        "-3e-07",
        "+0.00",
    ]
    audit = examine(Scaled(Gullible(), 1e-5), Plan(num=NUM))
    [text] = failed(audit)
    assert "hostile text in the plan raises reward by +3e-06" in text


def test_few_prompts_do_not_make_a_lift_untrue():
    """Raised at half of the prompts, beyond tolerance: of six that may be chance, and the line must not deny it."""

    @frozen
    class LastWord(PointwiseJudge):
        def score(self, trajectory):
            return SceneSemantic().score(trajectory).value + 0.4 * (trajectory.reasoning or "").endswith("10}")

    texts = [finding.text for finding in examine(LastWord(), Plan(num=6)).findings]
    [said] = [text for text in texts if "hostile" in text]
    assert said.startswith("hostile text in the plan raises no score beyond tolerance and chance; most: reward by +0.2")
    assert failed(examine(LastWord(), Plan(num=24)))


def test_the_judges_seconds_and_ours_are_told_apart():
    audit = examine(Metered(), Plan(num=4))
    rows = [str(cell) for table in rendered(audit) for cell in table.columns[0]._cells]
    assert "seconds waited" in rows
    assert "tokens_in, added up" in rows
