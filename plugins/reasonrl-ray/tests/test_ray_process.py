"""A Ray that a pool starts, finds or is given: what it leaves behind."""

import logging
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest
import ray
from reasonrl_ray import OnRay
from reasonrl_ray.cluster import cluster

from reasonrl import ConfigError, Prompt, Trajectory
from reasonrl.rollout import Guarded
from reasonrl.testing import ToyJudge

ROWS = [Trajectory(Prompt(f"p{k}", "text"), (0,), texts={"reasoning": "x" * 20 * k}) for k in range(3)]
EXPECTED = [0.0, 0.1, 0.2]


def children():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def state():
    """What a library has no business to change in its user's process."""
    root = logging.getLogger()
    return (
        signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.excepthook, threading.excepthook,
        list(root.handlers), root.level, os.environ.get("PYTHONBREAKPOINT"),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_ray():
    assert not ray.is_initialized()
    yield
    assert not ray.is_initialized()


def test_a_local_ray_starts_with_the_first_judgement_outlives_its_thread_and_leaves_nothing():
    before, settings = children(), state()
    threads = {thread.name for thread in threading.enumerate()}
    judge = OnRay(ToyJudge(), num_actors=2, address="local")
    assert children() == before
    guarded = Guarded(judge, 120)
    assert [v.total() for v in guarded.judge(ROWS)] == EXPECTED
    assert len(children()) > len(before)
    assert state() == settings
    assert [v.total() for v in guarded.judge(ROWS)] == EXPECTED  # the first call's thread has ended meanwhile
    other = OnRay(ToyJudge(100), num_actors=1, num_cpus=0)
    assert [v.total() for v in other.judge(ROWS)] == [0.0, 0.2, 0.4]
    judge.close()
    assert ray.is_initialized()  # the other one still uses it
    other.close()
    assert children() == before
    assert {thread.name for thread in threading.enumerate()} == threads
    judge.close()  # twice does no harm


def test_closing_without_having_judged_imports_and_starts_nothing():
    before = children()
    with OnRay(ToyJudge()):
        pass
    assert children() == before


def test_gpus_that_are_not_there_are_a_config_error():
    before = children()
    with pytest.raises(ConfigError, match="the actors of 1 pools reserve 64 GPUs, the Ray started here has"):
        OnRay(ToyJudge(), num_actors=2, num_gpus=32, address="local").judge(ROWS)
    assert children() == before


def test_a_pool_beyond_what_others_left_is_refused_and_a_ray_that_somebody_shut_down_is_started_again():
    cpus = float(os.cpu_count() or 1)
    with OnRay(ToyJudge(), num_actors=1, num_cpus=cpus, address="local") as judge:
        assert [v.total() for v in judge.judge(ROWS)] == EXPECTED
        with pytest.raises(ConfigError, match=f"of 2 pools reserve {cpus + 1:g} CPUs"):
            OnRay(ToyJudge(100), num_actors=1).judge(ROWS)
        assert [v.total() for v in judge.judge(ROWS)] == EXPECTED
        ray.shutdown()
        assert [v.total() for v in judge.judge(ROWS)] == EXPECTED


def test_an_address_where_nobody_is_is_a_config_error():
    with pytest.raises(ConfigError, match="cannot connect to Ray at 'nowhere'"):
        OnRay(ToyJudge(), address="nowhere").judge(ROWS)
    assert cluster()._keeper is None


RUNNING = """
import ray, sys
context = ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20,
                   configure_logging=False, log_to_driver=False)
print(context.address_info["address"], flush=True)
sys.stdin.read()
print(len([n for n in ray.nodes() if n["Alive"]]), flush=True)
"""


def test_a_running_ray_is_joined_and_left_running():
    with subprocess.Popen(
        [sys.executable, "-c", RUNNING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        address = running.stdout.readline().strip()
        with OnRay(ToyJudge(), num_actors=1, address=address) as judge:
            assert [v.total() for v in judge.judge(ROWS)] == EXPECTED
        still_alive, _ = running.communicate(timeout=60)
    assert still_alive.strip() == "1"
