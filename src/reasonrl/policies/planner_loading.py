"""Loading a planner: any causal language model of transformers, one that sees, or the language part of a Janus."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from reasonrl.errors import CheckpointError, ConfigError
from reasonrl.formats.files import first_line, last_line, read_config, weight_files
from reasonrl.formats.multi_modality import MODEL_TYPE
from reasonrl.policies.janus import DTYPES, load_checkpoint, packaged_or, quiet, special_tokens
from reasonrl.policies.planner_model import INPUT, KINDS, PROMPT_IDS, PlannerModule
from reasonrl.policies.trained_parts import SCALE_SEED
from reasonrl.scenes.nano import SENTENCE

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

JANUS = ("janus", MODEL_TYPE)


@frozen
class Settings:
    """What decides the weights in memory."""

    checkpoint: str
    dtype: str
    rank: int
    alpha: float
    recomputes: bool
    sees_image: bool


@frozen(eq=False)
class Loaded:
    """A model with all that reads for it."""

    module: PlannerModule
    tokenizer: PreTrainedTokenizerBase
    processor: Any
    """Of pictures and text; None = text alone."""
    ends: tuple[int, ...]
    """Ids that end a plan, the tokenizer's own first."""

    @property
    def pad(self) -> int:
        """What fills a row; no place of it is attended to."""
        found = self.tokenizer.pad_token_id
        return self.ends[0] if found is None else int(found)

    @cached_property
    def control(self) -> dict[int, str]:
        """Tokens that no prompt may hold, by id."""
        added = self.tokenizer.added_tokens_decoder.items()
        found = {int(number): str(token) for number, token in added if token.special}
        known = zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens, strict=True)
        return found | {int(number): str(token) for number, token in known}

    @property
    def context(self) -> int | None:
        """Tokens that prompt and plan may have together; None = no limit is stated."""
        return getattr(self.module.model.config.get_text_config(), "max_position_embeddings", None)

    def read(self, text: str, image: Image | None, *, bare: bool) -> dict[str, Tensor]:
        """Returns what replay needs of a prompt; `bare` = the text has no markup, the tokenizer adds its own.

        Without a picture the inputs for pictures are there, and empty: the rows of a batch have the same.
        """
        if self.processor is None:
            ids = list(self.tokenizer(text, add_special_tokens=bare)["input_ids"])
            while bare and ids and ids[-1] in self.ends:  # some tokenizers end every text
                ids.pop()
            bos = self.tokenizer.bos_token_id
            if bare and bos is not None and ids[:2] == [bos, bos]:  # the template's own, and the tokenizer's
                ids = ids[1:]
            return {PROMPT_IDS: torch.tensor(ids, dtype=torch.long)}
        found = self._processed(text, image)
        length = len(found[PROMPT_IDS])
        if image is None:
            for name, value in self._blank.items():
                if name != PROMPT_IDS:
                    found[name] = value.new_zeros(length) if name.endswith(KINDS) else value[:0]
        return found

    @cached_property
    def _blank(self) -> dict[str, Tensor]:
        from PIL import Image

        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}]
        text = self.processor.apply_chat_template(turn, tokenize=False)
        return self._processed(text, Image.new("RGB", (64, 64)))

    def _processed(self, text: str, image: Image | None) -> dict[str, Tensor]:
        images = None if image is None else [[image.convert("RGB")]]
        found = self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        rows = {n: v for n, v in found.items() if n not in ("input_ids", "attention_mask")}
        rows = {INPUT + name: value[0] if name.endswith(KINDS) else value for name, value in rows.items()}
        return {PROMPT_IDS: found["input_ids"][0], **rows}


@define(eq=False)
class Loader:
    """Holds what was loaded, so that variants of a policy (`attrs.evolve`) share its weights."""

    _loaded: dict[Settings, Loaded] = field(factory=dict, init=False)

    def load(self, settings: Settings) -> Loaded:
        """Returns the model, loading it once; raises CheckpointError or ConfigError."""
        if settings not in self._loaded:
            self._loaded[settings] = _load(settings)
        return self._loaded[settings]


def _load(settings: Settings) -> Loaded:
    with packaged_or(settings.checkpoint) as folder, quiet():
        of_janus = read_config(folder).get("model_type") in JANUS
        found = _of_janus(settings) if of_janus else _of_folder(folder, settings)
        model, tokenizer, processor = found
        end = tokenizer.eos_token_id
        if end is None:
            raise ConfigError(f"{settings.checkpoint}'s tokenizer has no end of text: set its eos_token")
        rows, words = len(model.get_input_embeddings().weight), max(tokenizer.get_vocab().values()) + 1
        if words > rows:
            raise CheckpointError(
                f"{settings.checkpoint}'s tokenizer knows {words} words, the model {rows}: they are of two checkpoints"
            )
        module = PlannerModule(_prepared(model.eval(), settings), recomputes=settings.recomputes)
    listed = model.generation_config.eos_token_id
    others = listed if isinstance(listed, list | tuple) else [listed]
    ends = tuple(dict.fromkeys(int(e) for e in (end, *others) if e is not None))
    return Loaded(module, tokenizer, processor, ends)


def _of_janus(settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, None]:
    """Returns the language part of a Janus checkpoint, and its tokenizer with the form that GoT-R1 was trained on."""
    from transformers import AutoModelForCausalLM

    if settings.sees_image:
        raise ConfigError(
            f"{settings.checkpoint} is a Janus checkpoint, of which the language part is read: set sees_image=False"
        )
    module, tokenizer = load_checkpoint(settings.checkpoint, dtype=DTYPES[settings.dtype])
    janus, special = module.model, special_tokens(tokenizer)
    config = copy.deepcopy(janus.config.text_config)
    config.tie_word_embeddings = janus.config.tie_word_embeddings
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=janus.dtype)
    model.model, model.lm_head = janus.model.language_model, janus.lm_head
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = [special.begin_image, special.end_text]
    model.generation_config.pad_token_id = special.pad
    # A plan ends where the picture would begin.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(special.begin_image)
    unknown = tokenizer.unk_token_id
    words = tokenizer("User: Assistant:", add_special_tokens=False)["input_ids"]
    converses = unknown is None or unknown not in words  # the drawn world's words know no "User:"
    tokenizer.chat_template = CHAT if converses else BARE
    return model, tokenizer, None


_ASKED = f"('{SENTENCE} ' ~ turn.content)"
_TURNS = (
    "{{{{ bos_token }}}}{{% for turn in messages if turn.role != 'system' %}}{{% if turn.role == 'user' %}}"
    "{{{{ {asked} }}}}{{% else %}}{{{{ ' ' ~ turn.content ~ eos_token }}}}{{% endif %}}{{% endfor %}}"
)
CHAT = _TURNS.format(asked=f"'User: ' ~ ({_ASKED} | trim) ~ '\\n\\nAssistant:'")
"""How GoT-R1's inference code puts a prompt, as a chat template: saved with the tokenizer."""
BARE = _TURNS.format(asked=_ASKED)


def _of_folder(folder: Path, settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Any]:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer

    name = settings.checkpoint
    weight_files(folder)  # says what is missing
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        kind = _class_of(name, config, sees_image=settings.sees_image)
        model, read = kind.from_pretrained(
            str(folder), dtype=DTYPES[settings.dtype] or "auto", trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{name} cannot be loaded as a language model: {last_line(error)}") from error
    if missing := sorted(read["missing_keys"]):
        raise CheckpointError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__} (first: {missing[0]}): is it a model"
            " without a head, or is a shard missing?"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        processor = _processor(folder, config) if settings.sees_image else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name} holds no tokenizer or processor that fits: {first_line(error)}") from error
    return model, tokenizer if processor is None else processor.tokenizer, processor


def _class_of(name: str, config: Any, *, sees_image: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    kind, found = type(config), config.model_type
    if config.is_encoder_decoder:
        raise ConfigError(f"{name} is an encoder-decoder ({found}): give a causal language model")
    sees, writes = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, kind in MODEL_FOR_CAUSAL_LM_MAPPING
    if not sees and not writes:
        raise ConfigError(f"{name} has no head that writes text ({found}): give a causal language model")
    if sees_image and not sees:
        raise ConfigError(f"{name} is a model of text alone ({found}): give a VLM, or set sees_image=False")
    return AutoModelForImageTextToText if sees_image or not writes else AutoModelForCausalLM


def _processor(folder: Path, config: Any) -> Any:
    """Returns the family's processor of pictures and text, Pillow doing the pictures: torchvision is not needed."""
    from transformers import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind = PROCESSOR_MAPPING[type(config)]
    if "video_processor" in kind.get_attributes():  # those exist with torchvision only
        kind = _without_video(kind)
    processor = kind.from_pretrained(str(folder))
    processor.image_processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil")
    if processor.chat_template is None:
        raise ConfigError(f"{folder} has no chat template, which says where a picture stands: give a tuned VLM")
    return processor


def _without_video(kind: Any) -> Any:
    class Stills(kind):
        # A processor loads the parts that its constructor names.
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(image_processor, tokenizer, chat_template=chat_template)

    return Stills


# ---- what learns ----


def _prepared(model: PreTrainedModel, settings: Settings) -> PreTrainedModel:
    """Returns the model with its words and their language model trainable, or adapters of the latter; eyes are not."""
    model.requires_grad_(False)
    if settings.rank:
        _add_adapters(model, settings.rank, settings.alpha)
        return model
    for part in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()):
        if part is not None:
            part.requires_grad_(True)
    return model


def _add_adapters(model: PreTrainedModel, rank: int, alpha: float) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from transformers.pytorch_utils import Conv1D

    inside = set(model.get_decoder().modules()) - {model.get_output_embeddings()}
    layers = {n: m for n, m in model.named_modules() if m in inside and isinstance(m, nn.Linear | Conv1D)}
    turned = any(isinstance(layer, Conv1D) for layer in layers.values())
    chosen = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=list(layers), fan_in_fan_out=turned
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SCALE_SEED)
        inject_adapter_in_model(chosen, model)
    cast_adapter_dtype(model, "default")  # to float32: a step of 1e-5 is lost on most bfloat16 weights
