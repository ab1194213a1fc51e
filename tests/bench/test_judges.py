import json
import sys
import threading
from pathlib import Path

import pytest

from reasonrl import cli
from reasonrl.bench import judges
from reasonrl.bench.loopback import Service, rate, served
from reasonrl.errors import ConfigError
from reasonrl.judges.server import Server
from reasonrl.judges.vlm import read


def test_the_server_answers_what_our_client_reads():
    with served(Service(0.001)) as url:
        replies = Server("judge", url).ask(judges.asked(5, per_picture=2))
    values = {read(judges.MARK, reply).value for reply in replies}
    [value] = values
    others = sum(range(10)) - 7
    assert value == pytest.approx((0.5 * 7 + 0.5 / 19 * others) / (0.5 + 9 * 0.5 / 19) / 9)


def test_the_load_generator_cannot_exceed_what_the_service_has_room_for():
    service = Service(0.05, slots=2)
    with served(service) as url:
        found = rate(url, [b"{}", b"x" * 300_000], num_requests=20, concurrency=8)
    assert 0 < found <= service.most * 1.01


def test_questions_share_pictures_as_told():
    asked = judges.asked(15, per_picture=7)
    assert len({id(one.images[0]) for one in asked}) == 3
    assert len({one.prompt for one in asked}) == 15
    assert all(one.images[0].size == (384, 384) for one in asked)


def test_a_service_without_delay_is_refused():
    with pytest.raises(ConfigError, match="takes some time"):
        judges.run([0.1, 0.0])


def test_the_command_prints_tables_and_writes_json(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["reasonrl", "bench", "judges", "--delays", "5", "--seconds", "0", "--repeats", "1"]
    )
    before = threading.active_count()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capfd.readouterr().out
    assert not stopped.value.code
    assert "64 places of 5 ms" in said
    assert "lookups/s" in said
    assert threading.active_count() == before
    result = json.loads(Path("bench-judges.json").read_text())
    [row] = result["services"]
    assert row["share"] == row["ours"] / row["own"]
    assert [one["per_picture"] for one in result["lookups"]] == [1, 7]
