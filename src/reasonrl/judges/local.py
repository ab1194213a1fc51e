"""Local: a vision-language model in this process, through transformers' own classes.

    Local("Qwen/Qwen2.5-VL-7B-Instruct").ask([Question(SYSTEM, "...", (image,), answer=marks(0, 9))])

A choice is one forward pass and comes with log-probs over the whole vocabulary; anything else is written greedily, the
checkpoint's sampling settings and repetition penalty set aside. Weights are read from safetensors only, and no code of
a checkpoint is run. Pictures go through Pillow, so that scores are the same with and without torchvision.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import final

from attrs import field, frozen, validators

from reasonrl.errors import ConfigError
from reasonrl.judges.local_model import (
    Asked,
    Dtype,
    Model,
    UnanswerableError,
    best_device,
    config_of,
    contents_of,
    loaded,
)
from reasonrl.judges.vlm import SERVER_ERROR, VLM, Coordinates, Question, Reply

BOXES_OF: Mapping[str, Coordinates] = {
    "qwen2_5_vl": "pixels",
    "qwen2_vl": "thousandths",
    "qwen3_vl": "thousandths",
    "qwen3_vl_moe": "thousandths",
    "glm4v": "thousandths",
    "glm4v_moe": "thousandths",
    "florence2": "locations",
    "paligemma": "locations",
}
"""How a family, by its configuration's `model_type`, writes boxes."""


@final
@frozen
class Local(VLM):
    """Any image-text-to-text model of transformers with a chat template; equal settings share one loaded model."""

    checkpoint: str
    """Its name on the hub, or a folder."""
    revision: str | None = field(default=None, kw_only=True)
    """A branch, tag or commit of the hub; None = its main branch."""
    dtype: Dtype | None = field(
        default=None,
        kw_only=True,
        validator=validators.optional(validators.in_(("float32", "bfloat16", "float16"))),
    )
    """None = bfloat16 on a GPU, float32 elsewhere."""
    device: str | None = field(default=None, kw_only=True)
    """None = the calling thread's current GPU, or the CPU where there is none."""
    batch_tokens: int = field(default=16384, kw_only=True, validator=validators.ge(1))
    """Tokens of a batch, padding and replies included; a batch that runs out of memory is halved."""
    box_coordinates: Coordinates | None = field(default=None, kw_only=True)
    """How the model writes boxes; None = as its family does."""

    @cached_property
    def identity(self) -> str:
        """Checkpoint, what it holds, and dtype.

        A hub's checkpoint is told by its commit, a folder by a hash of its JSON and template files and of the size and
        64 samples of 64 KiB of each weight file: another training is another identity, a few edited bytes may not be.
        """
        return f"{self.checkpoint}@{contents_of(self.checkpoint, self.revision)} {self._settings[2]}"

    @property
    def log_probs(self) -> bool:
        """True: a choice's probabilities are at hand."""
        return True

    @property
    def coordinates(self) -> Coordinates:
        """How it writes boxes; ConfigError where neither setting nor family says."""
        kind = config_of(self.checkpoint, self.revision).model_type
        found = self.box_coordinates or BOXES_OF.get(kind)
        if found is None:
            raise ConfigError(
                f"how {kind} writes boxes is not known, known are {', '.join(BOXES_OF)}: set box_coordinates"
            )
        return found

    def load(self) -> None:
        """Loads the weights now; else the first `ask` does.

        Call it where nothing else runs: while it loads, transformers changes torch's default dtype for all threads.
        """
        loaded(*self._settings)

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Returns one reply each, in order; out of memory or context is the note of that question alone."""
        if not questions:
            return []
        model = loaded(*self._settings)
        with model.lock:  # a tokenizer pads as it was told last: callers at once would undo each other's padding
            asked = [Asked(k, q, model.rendered(q)) for k, q in enumerate(questions)]
            lengths = [model.estimated_tokens(a) + a.max_tokens for a in asked]
        pixels = (self.box_coordinates or BOXES_OF.get(model.kind)) == "pixels"
        replies: dict[int, Reply] = {}
        for batch in _batches(asked, lengths, self.batch_tokens):
            replies |= _answered(model, batch, pixels=pixels)
        return [replies[k] for k in range(len(questions))]

    @property
    def _settings(self) -> tuple[str, str | None, Dtype, str]:
        device = self.device or best_device()
        return self.checkpoint, self.revision, self.dtype or ("bfloat16" if "cuda" in device else "float32"), device


# ---- asking ----


def _batches(asked: Sequence[Asked], lengths: Sequence[int], limit: int) -> Iterator[list[Asked]]:
    """Yields questions of one kind and similar length, as many as fit; one question always does. Lengths by place."""
    for kind in dict.fromkeys(a.kind for a in asked):
        batch: list[Asked] = []
        alike = [a for a in asked if a.kind == kind]
        for one in sorted(alike, key=lambda a: lengths[a.place]):  # the one to come is the longest so far
            if batch and (len(batch) + 1) * lengths[one.place] > limit:
                yield batch
                batch = []
            batch.append(one)
        yield batch


def _answered(model: Model, batch: Sequence[Asked], *, pixels: bool, spent_s: float = 0.0) -> dict[int, Reply]:
    """Returns the replies of a batch by place; what cannot be answered together is asked in halves."""
    import torch

    started = time.monotonic()
    try:
        with model.lock, torch.inference_mode(), model.on_device():
            started = time.monotonic()  # waiting for other callers is theirs: seconds add up to the model's
            replies = model.replies(batch, pixels=pixels)
    except (torch.OutOfMemoryError, MemoryError):
        why = "out of memory"
    except UnanswerableError as error:
        why = str(error)
    else:
        seconds = spent_s + (time.monotonic() - started) / len(batch)
        return {a.place: _timed(reply, seconds) for a, reply in zip(batch, replies, strict=True)}
    # Outside the except clause, whose traceback holds the tensors of the batch.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    seconds = spent_s + (time.monotonic() - started) / len(batch)
    if len(batch) == 1:
        return {batch[0].place: Reply(note=f"{SERVER_ERROR}: {why}", cost={"seconds": seconds})}
    middle = len(batch) // 2
    first = _answered(model, batch[:middle], pixels=pixels, spent_s=seconds)
    return first | _answered(model, batch[middle:], pixels=pixels, spent_s=seconds)


def _timed(reply: Reply, seconds: float) -> Reply:
    return Reply(reply.text, reply.top, reply.note, {**reply.cost, "seconds": seconds})
