"""Chat completions as vLLM, SGLang, `transformers serve` and OpenAI speak them: a request's body, a reply's bytes.

What a server sent is untrusted: every type is checked, and nothing but text and numbers leaves here.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reasonrl.judges.png import png
from reasonrl.judges.vlm import REFUSED, UNPARSEABLE, Choice, Question, Reply, shown

if TYPE_CHECKING:
    from PIL.Image import Image


class MalformedError(ValueError):
    """What came is no completion; the message says what was found."""


def image_part(image: Image) -> str:
    """Returns a picture as JSON text, a part of a message; PNG, since what a lossy format adds would be judged too.

    Raises OSError or ValueError for a picture that cannot be read.
    """
    url = f"data:image/png;base64,{base64.b64encode(png(image)).decode('ascii')}"
    return f'{{"type": "image_url", "image_url": {{"url": "{url}"}}}}'


def request_body(question: Question, parts: Sequence[str], *, settings: Mapping[str, Any]) -> bytes:
    """Returns the body of a request: the pictures' parts first, then the text.

    The parts are JSON already: a picture's hundreds of kilobytes are escaped once, not for each question about it.
    """
    said = json.dumps({"type": "text", "text": _clean(question.prompt)})  # a tokenizer takes no half of a pair
    user = f'{{"role": "user", "content": [{", ".join((*parts, said))}]}}'
    system = f"{json.dumps({'role': 'system', 'content': _clean(question.system)})}, " if question.system else ""
    return f'{{"messages": [{system}{user}], {json.dumps(dict(settings))[1:]}'.encode()


def completion(raw: bytes, question: Question) -> Reply:
    """Returns the reply in a completion's bytes, its cost without the seconds; raises MalformedError."""
    body = _json(raw)
    choice = _first(body, "choices")
    message = _mapping(choice, "message")
    cost = {"calls": 1.0, **_tokens(body.get("usage"))}
    text, finish = message.get("content"), choice.get("finish_reason")
    if refusal := message.get("refusal"):
        return Reply(note=f"{REFUSED}: {shown(str(refusal))}", cost=cost)
    if finish == "content_filter":
        return Reply(note=f"{REFUSED}: filtered by the server", cost=cost)
    if not isinstance(text, str | None):
        raise MalformedError(f"expected text as content, got {shown(repr(text))}")
    if not text or not text.strip():
        return Reply(note=f"{REFUSED}: the reply has no text", cost=cost)
    if finish == "length" and not isinstance(question.answer, Choice):
        cut = f"cut at {question.answer.max_tokens} tokens"
        return Reply(note=f"{UNPARSEABLE}: {cut}: {shown(text)}", cost=cost)
    return Reply(_clean(text), _top(choice.get("logprobs")), cost=cost)


def complaint(raw: bytes) -> str:
    """Returns what a server said in the body of an error, quoted and short."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return shown(raw[:1000].decode("utf-8", "replace"))
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return shown(_clean(found if isinstance(found, str) else repr(found)[:1000]))


def _json(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"no JSON: {shown(raw[:1000].decode('utf-8', 'replace'))}") from error
    if not isinstance(found, dict):
        raise MalformedError(f"expected an object, got {shown(repr(found)[:1000])}")
    return found


def _first(holder: dict[str, Any], name: str) -> dict[str, Any]:
    listed = holder.get(name)
    if not isinstance(listed, list) or not listed or not isinstance(listed[0], dict):
        raise MalformedError(f"expected {name}, a list of objects, got {shown(repr(listed)[:1000])}")
    return listed[0]


def _mapping(holder: dict[str, Any], name: str) -> dict[str, Any]:
    found = holder.get(name)
    if not isinstance(found, dict):
        raise MalformedError(f"expected {name}, an object, got {shown(repr(found)[:1000])}")
    return found


def _tokens(usage: object) -> dict[str, float]:
    if not isinstance(usage, dict):
        return {}
    told = {"tokens_in": usage.get("prompt_tokens"), "tokens_out": usage.get("completion_tokens")}
    return {name: float(n) for name, n in told.items() if type(n) is int and 0 <= n < 2**53}


def _top(log_probs: object) -> dict[str, float] | None:
    """Log-probs of the first token's likeliest strings; the same string from other bytes is one string."""
    if log_probs is None:
        return None
    if not isinstance(log_probs, dict):
        raise MalformedError(f"expected logprobs, an object, got {shown(repr(log_probs)[:1000])}")
    if not log_probs.get("content"):
        return None
    token = _first(log_probs, "content")
    listed = token.get("top_logprobs") or []
    if not isinstance(listed, list):
        raise MalformedError(f"expected top_logprobs, a list, got {shown(repr(listed)[:1000])}")
    pairs = [_pair(entry) for entry in listed]
    said = _pair(token)
    if said[0] not in dict(pairs):  # a server may list the likeliest without what it said
        pairs.append(said)
    top: dict[str, float] = {}
    for text, log_prob in pairs:
        top[text] = _log_add_exp(top[text], log_prob) if text in top else log_prob
    return top


def _pair(entry: object) -> tuple[str, float]:
    text = entry.get("token") if isinstance(entry, dict) else None
    log_prob = entry.get("logprob") if isinstance(entry, dict) else None
    if not isinstance(text, str) or isinstance(log_prob, bool) or not isinstance(log_prob, int | float):
        raise MalformedError(f"expected a token and its logprob, got {shown(repr(entry)[:1000])}")
    if not -1e30 < log_prob < 1e30 and log_prob != -math.inf:  # NaN, or a number too big for a float
        raise MalformedError(f"expected a log-prob, got {shown(repr(log_prob)[:1000])}")
    return _clean(text), float(log_prob)


def _log_add_exp(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _clean(text: str) -> str:
    """Text without halves of surrogate pairs, which JSON can spell and no file can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
