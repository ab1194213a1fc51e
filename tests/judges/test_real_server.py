"""Server against servers that run real models, and Local on the same weights: the same replies, the same scores."""

import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from PIL import Image
from tests.judges.test_local import THINGS, judge, picture
from tests.judges.tiny_vlm import BOXES, DIGITS, SCORES, Family, build
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reasonrl import Prompt, Trajectory
from reasonrl.judges import DualStage, PromptImage, ReasoningImage, Semantic, Spatial
from reasonrl.judges.server import Server
from reasonrl.judges.vlm import GUARD, VLM, Boxes, Question, Rubric, marks, quoted, read

FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Callable[..., str]:
    """Returns a folder of a family whose answers are digits, scores or boxes."""
    root = tmp_path_factory.mktemp("served")

    def folder(family: Family, answers: tuple[str, ...]) -> str:
        path = root / f"{family}-{len(answers)}"
        return str(path if path.exists() else build(path, family, answers, seed=4))

    return folder


def questions(answer: Any) -> list[Question]:
    """Text alone, one picture and two, of different sizes."""
    system = f"You judge pictures. {GUARD}"
    sizes = ((448, 448), (224, 448), (448, 224), (224, 224))
    texts = [Question(system, f"How well?\n{quoted('plan', thing)}", answer=answer) for thing in THINGS]
    pictured = [
        Question(system, f"Where is it?\n{quoted('prompt', THINGS[k % 6])}", (picture(k, sizes[k % 4]),), answer=answer)
        for k in range(10)
    ]
    pair = Question("", "Which is better?", (picture(3, (448, 448)), picture(4, (224, 224))), answer=answer)
    return [*texts, *pictured, pair]


# ---- `transformers serve` ----

LAUNCH = """
import sys
import transformers.models.qwen2_5_vl, transformers.models.qwen3_vl
from transformers.cli.transformers import main
from transformers.utils import is_torchvision_available

def without_video(kind):
    class Stills(kind):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, chat_template=chat_template)
    return Stills

if not is_torchvision_available():  # the families' video processors need it, and their processors need those
    families = transformers.models.qwen2_5_vl, transformers.models.qwen3_vl
    for family, name in zip(families, ("Qwen2_5_VLProcessor", "Qwen3VLProcessor")):
        setattr(family, name, without_video(getattr(family, name)))
sys.argv[0] = "transformers"
main()
"""


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def serve(tmp_path_factory) -> Iterator[str]:
    """Returns the address of a running `transformers serve`, which loads what a request names."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (
        log.open("wb") as written,
        subprocess.Popen(
            [sys.executable, "-c", LAUNCH, "serve", *options], env=environment, stdout=written, stderr=written
        ) as process,
    ):
        try:
            await_health(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            stop(process)


def await_health(url: str, process: subprocess.Popen[bytes], log: Path, *, most_s: float = 120.0) -> None:
    end = time.monotonic() + most_s
    while time.monotonic() < end:
        assert process.poll() is None, f"transformers serve ended: {log.read_text()[-2000:]}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert json.load(answer) == {"status": "ok"}
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"transformers serve is not up after {most_s:g} s: {log.read_text()[-2000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_serve_and_local_give_the_same_scores(serve, checkpoint, family):
    folder, answer = checkpoint(family, SCORES), Rubric()
    asked = questions(answer)
    served, ours = Server(folder, serve, log_probs=False).ask(asked), judge(folder).ask(asked)
    assert [reply.text for reply in served] == [reply.text for reply in ours]
    assert [reply.note for reply in served] == [""] * len(asked)
    scores = [[read(answer, reply).value for reply in replies] for replies in (served, ours)]
    assert scores[0] == scores[1]
    assert None not in scores[0]
    assert len(set(scores[0])) > 2
    for theirs, here in zip(served, ours, strict=True):
        assert {k: theirs.cost[k] for k in ("calls", "tokens_in", "tokens_out")} == {
            k: here.cost[k] for k in ("calls", "tokens_in", "tokens_out")
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_serve_and_local_give_the_same_boxes(serve, checkpoint, family):
    folder = checkpoint(family, BOXES)
    asked = [question for question in questions(Boxes()) if question.images]
    served, ours = Server(folder, serve, log_probs=False).ask(asked), judge(folder).ask(asked)
    assert [(reply.text, reply.note) for reply in served] == [(reply.text, reply.note) for reply in ours]
    assert {reply.text for reply in ours} <= set(BOXES)
    assert len({reply.text for reply in ours}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dual_stage_reward_is_the_same_through_transformers_serve_and_local(serve, checkpoint, family):
    def reward(scores: VLM, boxes: VLM) -> DualStage:
        parts = (part(scores, scoring="json") for part in (PromptImage, Semantic, Spatial))
        prompt_image, semantic, spatial = parts
        return DualStage(
            prompt_image=prompt_image, semantic=semantic, spatial=spatial, reasoning_image=ReasoningImage(boxes)
        )

    folders = checkpoint(family, SCORES), checkpoint(family, BOXES)
    coordinates = judge(folders[1]).coordinates
    servers = [Server(f, serve, log_probs=False, box_coordinates=coordinates) for f in folders]
    drawn = [trajectory(k) for k in range(6)]
    through, here = reward(*servers).judge(drawn), reward(*map(judge, folders)).judge(drawn)
    assert [verdict.terms for verdict in through] == [verdict.terms for verdict in here]
    scores = [[(name, s.value, s.note) for name, s in v.scores.items()] for v in through]
    assert scores == [[(name, s.value, s.note) for name, s in v.scores.items()] for v in here]
    assert len({verdict.total() for verdict in through}) > 2
    assert {name for name, _, _ in scores[0]} == {"PromptImage", "Semantic", "Spatial", "ReasoningImage"}


def trajectory(k: int) -> Trajectory:
    """A prompt, a plan of two boxes and a picture."""
    chance = random.Random(k)
    boxes = [[chance.randrange(0, 500), chance.randrange(0, 500)] for _ in range(2)]
    plan = " ".join(
        f"<|obj_start|>{name}<|obj_end|> <|box_start|>({x},{y}),({x + 400},{y + 300})<|box_end|>"
        for name, (x, y) in zip(THINGS[k % 3 :], boxes, strict=False)
    )
    return Trajectory(
        Prompt(str(k), THINGS[k]), texts={"reasoning": f"There are {plan}."}, images={"image": picture(k)}
    )


def test_transformers_serve_gives_no_log_probs_and_the_score_abstains(serve, checkpoint):
    answer = marks(0, 9)
    asked = [Question("", "How well?", answer=answer)]
    [reply] = Server(checkpoint("qwen2_5_vl", DIGITS), serve).ask(asked)
    assert reply.top is None
    assert reply.text in DIGITS
    score = read(answer, reply)
    assert score.value is None
    assert score.note.startswith("no log-probs: ")


def test_a_model_that_transformers_serve_cannot_load_is_a_note(serve, tmp_path):
    vlm = evolve(Server(str(tmp_path), serve, log_probs=False), attempts=1)
    [reply] = vlm.ask([Question("", "How well?", answer=Rubric())])
    assert reply.note.startswith("server error: status 500")
    assert read(Rubric(), reply).value is None


# ---- a server with log-probs, written without Local ----


class Reference:
    """One prompt at a time, its markup, tokens and patches put together by hand."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.patches = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answers a chat completion of one token, as OpenAI words it."""
        assert body["max_tokens"] == 1
        assert body["logprobs"] is True
        images = [image for message in body["messages"] for image in _images(message["content"])]
        inputs = self.patches(images=images, return_tensors="pt") if images else {}
        counts = iter(int(grid.prod()) // 4 for grid in inputs.get("image_grid_thw", ()))
        text = "".join(
            f"<|im_start|>{message['role']}\n{_said(message['content'], counts)}<|im_end|>\n"
            for message in body["messages"]
        )
        ids = self.tokenizer(text + "<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
        kinds = (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        with torch.no_grad():
            logits = self.model(input_ids=ids, mm_token_type_ids=kinds, **inputs).logits[0, -1].double()
        log_probs = logits - torch.logsumexp(logits, 0)
        best = log_probs.topk(body["top_logprobs"])
        listed = [self._token(i, p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        return {
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": listed[0]["token"]},
                    "logprobs": {"content": [{**listed[0], "top_logprobs": listed}]},
                    "finish_reason": "length",
                }
            ],
            "usage": {"prompt_tokens": ids.shape[1], "completion_tokens": 1, "total_tokens": ids.shape[1] + 1},
        }

    def _token(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}


def _images(content: str | list[dict[str, Any]]) -> list[Image.Image]:
    urls = (
        [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        if isinstance(content, list)
        else []
    )
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def _said(content: str | list[dict[str, Any]], counts: Iterator[int]) -> str:
    if isinstance(content, str):
        return content
    shown = (
        f"<|vision_start|>{'<|image_pad|>' * next(counts)}<|vision_end|>" if p["type"] == "image_url" else p["text"]
        for p in content
    )
    return "".join(shown)


@pytest.fixture
def reference() -> Iterator[Callable[[str], str]]:
    """Returns a way to serve a folder, at the address it returns."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def serve(folder: str) -> str:
        model, turn = Reference(folder), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with turn:
                    answer = json.dumps(model.completion(body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, name="reference server")
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield serve
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_server_with_log_probs_and_local_give_the_same_expected_values(reference, checkpoint, family):
    folder, answer = checkpoint(family, DIGITS), marks(0, 9)
    asked = questions(answer)
    served, ours = Server(folder, reference(folder)).ask(asked), judge(folder).ask(asked)
    values = [[read(answer, reply).value for reply in replies] for replies in (served, ours)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert len({round(value, 3) for value in values[0]}) > len(asked) // 2
    assert [reply.cost["tokens_in"] for reply in served] == [reply.cost["tokens_in"] for reply in ours]
