"""One vision-language model in memory: questions to its inputs, its outputs to replies, and how it is loaded."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import field, frozen

from reasonrl.errors import CheckpointError, ConfigError
from reasonrl.judges.vlm import UNPARSEABLE, Boxes, Choice, Question, Reply, shown

if TYPE_CHECKING:
    from torch import Tensor

Dtype = Literal["float32", "bfloat16", "float16"]

TOP = 20
"""Likeliest strings of a first token that a reply holds, the options beside them: what servers give at most."""
_PIXELS_A_TOKEN = 28 * 28
"""Qwen2.5-VL's, for sorting questions by length before their pictures are cut up; Qwen3-VL's are 32 x 32."""
_BLOCKS, _BLOCK = 64, 65536
"""Samples of a weight file in a local checkpoint's identity."""


class UnanswerableError(ValueError):
    """A question that the model cannot be asked: no fault of the questions beside it."""


@frozen(eq=False)
class Asked:
    """A question, its place among those asked together, and its prompt in the model's own markup."""

    place: int
    question: Question
    text: str

    @property
    def max_tokens(self) -> int:
        """Of the reply."""
        return self.question.answer.max_tokens

    @property
    def kind(self) -> tuple[bool, bool, int]:
        """What the questions of a batch have in common."""
        return bool(self.question.images), isinstance(self.question.answer, Choice), self.max_tokens


@frozen(eq=False)
class Model:
    """Weights and processor on a device, one caller at a time."""

    module: Any
    processor: Any
    lock: threading.Lock = field(factory=threading.Lock)

    @property
    def kind(self) -> str:
        """The family: `model_type` of its configuration."""
        return str(self.module.config.model_type)

    @property
    def context(self) -> float:
        """Tokens that prompt and reply may have together."""
        stated = self.module.config.get_text_config().to_dict().get("max_position_embeddings")
        return math.inf if stated is None else stated

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Makes the weights' GPU the thread's current one."""
        import torch

        if self.module.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.module.device):
            yield

    def rendered(self, question: Question) -> str:
        """Returns the prompt in the model's own markup, placeholders for pictures.

        Where a template refuses a system's turn, leaves it out or prints it as Python would, the user says it first.
        ConfigError where it refuses that, too.
        """
        from jinja2 import TemplateError

        pictures = [{"type": "image"} for _ in question.images]
        system = [{"type": "text", "text": question.system}]
        if question.system:
            with suppress(TemplateError):
                user = [*pictures, {"type": "text", "text": question.prompt}]
                text = self._templated(("system", system), ("user", user))
                if question.system in text and str(system) not in text:
                    return text
        both = "\n\n".join(filter(None, (question.system, question.prompt)))
        try:
            return self._templated(("user", [*pictures, {"type": "text", "text": both}]))
        except TemplateError as error:
            why = " ".join(str(error).split())
            raise ConfigError(
                f"the chat template of {self.kind} refuses a question ({why}): give an instruction-tuned model"
            ) from error

    def _templated(self, *turns: tuple[str, list[dict[str, str]]]) -> str:
        conversation = [{"role": role, "content": content} for role, content in turns]
        return str(self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))

    def estimated_tokens(self, asked: Asked) -> int:
        """Returns about how many tokens a prompt has."""
        pictures = sum(math.ceil(i.width * i.height / _PIXELS_A_TOKEN) for i in asked.question.images)
        return pictures + len(self.processor.tokenizer(asked.text, add_special_tokens=False)["input_ids"])

    def replies(self, batch: Sequence[Asked], *, pixels: bool) -> list[Reply]:
        """Returns one reply each, without their seconds; UnanswerableError where one of them cannot be asked."""
        inputs = self._inputs(batch, pixels=pixels)
        lengths = inputs["attention_mask"].sum(1).tolist()
        _refuse_long(lengths, batch[0].max_tokens, self.context)
        width = inputs["input_ids"].shape[1]
        out = self.module.generate(
            **inputs.to(self.module.device, dtype=self.module.dtype),
            max_new_tokens=batch[0].max_tokens,
            output_logits=isinstance(batch[0].question.answer, Choice),
            return_dict_in_generate=True,
        )
        first = out.logits[0].float().log_softmax(-1).cpu() if out.logits else [None] * len(batch)
        rows = out.sequences[:, width:].tolist()
        return [self._reply(*one) for one in zip(batch, lengths, rows, first, strict=True)]

    def _inputs(self, batch: Sequence[Asked], *, pixels: bool) -> Any:
        images = [list(a.question.images) for a in batch]
        try:
            inputs = self.processor(
                text=[a.text for a in batch],
                images=images if any(images) else None,
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,  # the template wrote them
            )
        except (ValueError, OSError, ArithmeticError) as error:
            # A picture that is broken, empty or of odd proportions, placeholders that do not match.
            raise UnanswerableError(" ".join(f"{type(error).__name__}: {error}".split())) from error
        if pixels and any(isinstance(a.question.answer, Boxes) for a in batch):
            self._refuse_resized(images, inputs)
        return inputs

    def _refuse_resized(self, images: Sequence[Sequence[Any]], inputs: Any) -> None:
        patch, merged = self.processor.image_processor.patch_size, self.processor.image_processor.merge_size
        sent = [image.size for row in images for image in row]
        grids = inputs["image_grid_thw"].tolist() if sent else []
        seen = [(columns * patch, rows * patch) for _, rows, columns in grids]
        for (width, height), other in zip(sent, seen, strict=True):
            if (width, height) != other:
                raise UnanswerableError(
                    f"boxes in pixels need the picture as it is, but {width}x{height} is seen as"
                    f" {other[0]}x{other[1]}: send sides that are multiples of {patch * merged}"
                )

    def _reply(self, asked: Asked, tokens_in: int, row: list[int], log_probs: Tensor | None) -> Reply:
        ends = _listed(self.module.generation_config.eos_token_id)
        length = next((k + 1 for k, token in enumerate(row) if token in ends), len(row))
        text = str(self.processor.tokenizer.decode(row[:length], skip_special_tokens=True))
        cost = {"calls": 1.0, "tokens_in": float(tokens_in), "tokens_out": float(length)}
        answer = asked.question.answer
        if isinstance(answer, Choice) and log_probs is not None:
            return Reply(text, _top(log_probs, self.processor.tokenizer, answer.options), cost=cost)
        cut = row[length - 1] not in ends
        return Reply(text, note=f"{UNPARSEABLE}: cut at {length} tokens: {shown(text)}" if cut else "", cost=cost)


def _refuse_long(lengths: Sequence[int], max_tokens: int, context: float) -> None:
    longest = max(lengths)
    if longest + max_tokens > context:
        raise UnanswerableError(f"{longest} tokens and {max_tokens} for the reply, the context holds {context:g}")


def _listed(ids: int | Sequence[int]) -> Sequence[int]:
    return [ids] if isinstance(ids, int) else ids


def _top(log_probs: Tensor, tokenizer: Any, options: Sequence[str]) -> dict[str, float]:
    """Returns log-probs by string, likeliest first: the top ones, and every token that says an option."""
    wanted = dict.fromkeys(log_probs.topk(min(TOP, len(log_probs))).indices.tolist())
    wanted |= dict.fromkeys(_tokens_of(tokenizer, options))
    found: dict[str, float] = {}
    for token in wanted:
        text, log_prob = str(tokenizer.decode([token])), float(log_probs[token])
        if log_prob > -math.inf:
            found[text] = _log_add(found[text], log_prob) if text in found else log_prob
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _tokens_of(tokenizer: Any, options: Sequence[str]) -> list[int]:
    spelt = [space + case for o in options for case in (o, o.lower(), o.upper(), o.capitalize()) for space in ("", " ")]
    ids = tokenizer(spelt, add_special_tokens=False)["input_ids"]
    return [row[0] for row in ids if len(row) == 1]


def _log_add(a: float, b: float) -> float:
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


# ---- loading ----

LOADING = threading.Lock()
"""Held by whoever loads weights: loading changes torch's default dtype, and two at once could leave it changed."""


def loaded(checkpoint: str, revision: str | None, dtype: Dtype, device: str) -> Model:
    """Returns the model of these settings, the same one each time; CheckpointError where it cannot be loaded."""
    with LOADING:  # lru_cache alone would let two threads load the same weights
        return _load(checkpoint, revision, dtype, device)


@lru_cache(maxsize=4)
def _load(checkpoint: str, revision: str | None, dtype: Dtype, device: str) -> Model:
    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    processor = _processor(checkpoint, revision)
    try:
        module, read = AutoModelForImageTextToText.from_pretrained(
            checkpoint,
            revision=revision,
            dtype=getattr(torch, dtype),
            device_map=device,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise _no_checkpoint(checkpoint, error) from error
    if read["missing_keys"]:
        missing = ", ".join(sorted(read["missing_keys"])[:3])
        raise CheckpointError(
            f"{checkpoint} lacks {len(read['missing_keys'])} weights ({missing}, ...): give a whole one"
        )
    module.eval().requires_grad_(False)
    end = module.generation_config.eos_token_id
    end = processor.tokenizer.eos_token_id if end is None else end
    pad = processor.tokenizer.pad_token_id
    pad = _listed(end)[0] if pad is None else pad
    module.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False)
    return Model(module, processor)


def _processor(checkpoint: str, revision: str | None) -> Any:
    """Returns the family's processor for pictures and text, Pillow doing the pictures."""
    from transformers import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind = type(config_of(checkpoint, revision))
    if kind not in PROCESSOR_MAPPING:
        raise ConfigError(f"{checkpoint} is {kind.__name__}, which has no processor for pictures: give a VLM")
    try:
        processor = _without_video(PROCESSOR_MAPPING[kind]).from_pretrained(checkpoint, revision=revision or "main")
        images = AutoImageProcessor.from_pretrained(checkpoint, revision=revision, backend="pil")
    except (OSError, ValueError) as error:
        raise _no_checkpoint(checkpoint, error) from error
    processor.image_processor = images
    processor.tokenizer.padding_side = "left"
    if processor.chat_template is None:
        raise ConfigError(f"{checkpoint} has no chat template: give an instruction-tuned model")
    return processor


def _without_video(kind: Any) -> Any:
    """Returns a processor class that asks for no video processor: transformers has those only with torchvision."""
    if "video_processor" not in kind.get_attributes():
        return kind

    class Stills(kind):
        # A processor loads the parts that its constructor names.
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    return Stills


@lru_cache(maxsize=16)
def config_of(checkpoint: str, revision: str | None) -> Any:
    """Returns the configuration alone; CheckpointError where there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _no_checkpoint(checkpoint, error) from error


def _no_checkpoint(checkpoint: str, error: Exception) -> CheckpointError:
    line = " ".join(str(error).split())
    return CheckpointError(f"{checkpoint} cannot be loaded as an image-text-to-text model from safetensors: {line}")


def best_device() -> str:
    """Returns the calling thread's current GPU, or "cpu"."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def contents_of(checkpoint: str, revision: str | None) -> str:
    """Returns the commit of a hub's checkpoint, or a folder's hash."""
    if not Path(checkpoint).is_dir():
        from transformers.utils import cached_file

        config_of(checkpoint, revision)  # says what is wrong where there is none
        found = cached_file(checkpoint, "config.json", revision=revision)
        return Path(found).parent.name  # .../snapshots/<commit>/config.json
    whole = hashlib.blake2b(digest_size=8)
    for file in sorted(Path(checkpoint).iterdir()):
        if file.suffix == ".safetensors":
            whole.update(file.name.encode() + _sampled(file))
        elif file.suffix in (".json", ".jinja"):
            whole.update(file.name.encode() + file.read_bytes())
    return whole.hexdigest()


def _sampled(file: Path) -> bytes:
    size = file.stat().st_size
    found = hashlib.blake2b(str(size).encode())
    with file.open("rb") as content:
        for place in range(_BLOCKS):
            content.seek(place * max(size - _BLOCK, 0) // (_BLOCKS - 1))
            found.update(content.read(_BLOCK))
    return found.digest()
