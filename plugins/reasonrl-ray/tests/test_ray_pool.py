import pickle
import re
import sys
import threading
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import ray
from PIL import Image
from reasonrl_ray import OnRay

from reasonrl import ConfigError, JudgeError, Prompt, Trajectory
from reasonrl.config import from_record, to_record
from reasonrl.interfaces.judge import checked
from reasonrl.judges.dual_stage import DualStage
from reasonrl.rollout import Guarded
from reasonrl.testing import ToyJudge, check_judge, sample_trajectories

HERE = Path(__file__).parents[1]
IMAGE = Image.new("RGB", (8, 8), "gray")


def rows(*texts, members=2):
    return [
        Trajectory(Prompt(f"p{k}", text), (m,), texts={"reasoning": "x" * (10 * k + m)}, images={"image": IMAGE})
        for k, text in enumerate(texts)
        for m in range(members)
    ]


@pytest.fixture(scope="module", autouse=True)
def running_ray(judges_by_value):
    """One Ray of two CPUs, which the pools find and leave alone."""
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False,
        configure_logging=False,
    )  # fmt: skip
    yield
    assert ray.is_initialized(), "a pool closed a Ray that it had not started"
    ray.shutdown()


@pytest.fixture(scope="module")
def on_two(running_ray, odd_judge):
    with pool(odd_judge, num_actors=2, max_restarts=1, timeout_s=60) as judge:
        yield judge


def pool(judge, **settings):
    """Small enough to stand beside `on_two`."""
    return OnRay(judge, **{"num_cpus": 0.25, **settings})


def notes(verdicts):
    return [verdict.scores["odd"].note for verdict in verdicts]


def test_it_keeps_the_contract_of_a_judge():
    with pool(ToyJudge()) as judge:
        check_judge(judge)


def test_verdicts_are_those_of_the_judge_in_process_in_order():
    with pool(DualStage(), num_actors=2) as judge:
        shown = sample_trajectories()
        assert judge.judge(shown) == DualStage().judge(shown)
        assert judge.judge(shown[::-1]) == DualStage().judge(shown[::-1])
        assert judge.judge([]) == []


def test_both_actors_work_and_costs_come_back(on_two):
    found = on_two.judge(rows("slow", "b", "c", "slow"))
    assert [v.total() for v in found] == [k / 100 for k in (0, 1, 10, 11, 20, 21, 30, 31)]
    costs = [v.scores["odd"].cost for v in found]
    assert all(cost["calls"] == 1 for cost in costs)
    assert len({cost["pid"] for cost in costs}) == 2


def test_abstentions_keep_their_reason_and_cost(on_two):
    (one, _) = on_two.judge(rows("unscored"))
    assert one.total() is None
    assert one.scores["odd"].note == "refused: no comment"
    assert one.scores["odd"].cost == {"calls": 2.0}


def test_groups_stay_whole_even_when_they_are_interleaved(whole_judge):
    shown = rows("a", "b", "c", members=4)
    mixed = shown[::3] + shown[1::3] + shown[2::3]
    with pool(whole_judge, num_actors=2) as judge:
        assert judge.stages == {"reasoning", "image"}
        found = judge.judge(mixed)
    assert [v.total("image") for v in found] == [0.5] * 12
    assert all(v.terms["image"][0] is v.terms["reasoning"][0] for v in found)  # one term, not two alike


def test_an_actor_that_dies_is_replaced_and_what_it_had_is_judged_again(odd_judge, tmp_path):
    with pool(type(odd_judge)(str(tmp_path)), num_actors=2) as judge:
        found = judge.judge(rows("a", "die once", "c"))
    assert [v.total() for v in found] == [k / 100 for k in (0, 1, 10, 11, 20, 21)]
    assert (tmp_path / "died").exists()


def test_what_kills_every_actor_abstains_alone(on_two):
    found = on_two.judge(rows("a", "die", "c", "d", "e"))
    assert [v.total() for v in found] == [0, 0.01, None, None, 0.2, 0.21, 0.3, 0.31, 0.4, 0.41]
    for note in notes(found)[2:4]:
        assert note.startswith("actor died: 2 times, at last: The actor is dead because its worker process has died")
    assert [v.total() for v in on_two.judge(rows("a"))] == [0, 0.01]  # and the pool is whole again


def test_no_restarts_means_that_a_death_takes_its_part(odd_judge):
    with pool(odd_judge, num_actors=1, max_restarts=0) as judge:
        found = judge.judge(rows("a", "die"))
    assert [v.total() for v in found] == [None] * 4
    assert all(note.startswith("actor died: 1 times") for note in notes(found))


def test_an_actor_that_hangs_times_out_and_the_others_are_scored(odd_judge):
    with pool(odd_judge, num_actors=2, timeout_s=6) as judge:
        assert judge.judge(rows("a"))[0].total() == 0
        found = judge.judge(rows("a", "hang"))
        assert [v.total() for v in found] == [0, 0.01, None, None]
        assert set(notes(found)[2:]) == {"timed out after 6 s on Ray"}
        again = judge.judge(rows("a", "b"))  # the hung actor is gone, nobody waits for it
        assert [v.total() for v in again] == [0, 0.01, 0.1, 0.11]


def test_actors_that_find_no_room_time_out_with_what_they_asked_for(odd_judge):
    with pool(odd_judge, num_actors=1, num_cpus=64, timeout_s=1) as judge:
        found = judge.judge(rows("a"))
    assert found[0].total() is None
    assert found[0].scores["odd"].note == (
        "timed out after 1 s on Ray: no actor started, each reserves 64 CPUs and 0 GPUs"
    )


def test_more_actors_than_room_are_served_by_those_that_started(odd_judge):
    with pool(odd_judge, num_actors=5, num_cpus=0.4, timeout_s=60) as judge:
        found = judge.judge(rows("a", "b", "c", "d", "e"))
    assert None not in [v.total() for v in found]


def test_a_judge_that_cannot_be_built_in_an_actor_abstains_with_the_reason(unbuildable_judge):
    with pool(unbuildable_judge, num_actors=1, max_restarts=1, timeout_s=60) as judge:
        (found,) = judge.judge(rows("a", members=1))
    (score,) = found.scores.values()
    assert score.value is None
    assert score.note.startswith("actor died: while starting: ")
    assert found.total() is None


def test_errors_of_the_configuration_come_back_with_type_and_message(on_two):
    with pytest.raises(ConfigError, match=re.escape("judge.url is 'x': give a URL")) as caught:
        on_two.judge(rows("a", "misconfigured", "c"))
    assert type(caught.value) is ConfigError
    assert [v.total() for v in on_two.judge(rows("a"))] == [0, 0.01]


def test_any_other_exception_of_the_judge_is_a_judge_error_of_one_line(on_two):
    message = "judge Odd raised ZeroDivisionError: a bug of the judge on Ray"
    with pytest.raises(JudgeError, match=f"^{message}$"):
        on_two.judge(rows("broken"))


def test_an_exception_that_does_not_pickle_is_no_death_of_the_actor(on_two):
    with pytest.raises(JudgeError, match=r"^judge Odd raised TwoWordsError: out of memory on Ray$"):
        on_two.judge(rows("unpicklable"))


def test_an_unscored_part_of_a_sum_leaves_the_sum_unscored(odd_judge):
    """The first batch of a pool has no verdict to imitate, and still must not vanish from an expression."""
    with pool(odd_judge, num_actors=1, max_restarts=0) as judge:
        found = (judge + ToyJudge()).judge(rows("die"))
    assert [v.total() for v in found] == [None, None]


def test_a_run_judges_from_threads_that_end(on_two):
    guarded = Guarded(on_two, 60)
    for _ in range(2):
        assert [v.total() for v in guarded.judge(rows("a", "b"))] == [0, 0.01, 0.1, 0.11]


def test_threads_take_turns(on_two):
    found = []

    def work():
        found.append([v.total() for v in on_two.judge(rows("a", "b"))])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0, 0.01, 0.1, 0.11]] * 3


def test_it_pickles_without_its_actors_and_judges_again(on_two, judges_by_value):
    copy = pickle.loads(pickle.dumps(on_two))  # noqa: S301 - bytes of this line
    assert copy == on_two
    with copy:
        assert [v.total() for v in copy.judge(rows("a"))] == [0, 0.01]


def test_it_is_written_down_by_name_and_built_again():
    judge = OnRay(ToyJudge(), num_actors=3, num_gpus=0.5)
    assert to_record(judge)["use"] == "judges/on-ray"
    plain = OnRay(DualStage(), num_actors=3, num_gpus=0.5)
    assert from_record(to_record(plain)) == plain


def test_it_forwards_what_the_judge_needs(odd_judge):
    judge = OnRay(odd_judge)
    assert judge.needs == {"image"}
    assert judge.stages == odd_judge.stages


@pytest.mark.parametrize("wrong", [{"num_actors": 0}, {"num_gpus": -1}, {"max_restarts": -1}, {"timeout_s": 0}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OnRay(ToyJudge(), **wrong)


def test_the_entry_point_is_the_judge():
    entries = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["entry-points"]["reasonrl.judges"]
    assert EntryPoint("on-ray", entries["on-ray"], "reasonrl.judges").load() is OnRay


def test_a_copy_in_process_agrees_with_the_contract_check(odd_judge):
    assert [v.total() for v in checked(odd_judge, rows("a"))] == [0, 0.01]
    assert sys.modules[type(odd_judge).__module__]


def test_the_python_blocks_of_the_readme_run():
    blocks = re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})  # noqa: S102 - our own page
