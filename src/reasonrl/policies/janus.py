"""Janus checkpoints: a `transformers` model, its tokenizer, and the two heads' log-probs inside one forward."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from reasonrl.errors import CheckpointError, ConfigError
from reasonrl.formats.files import checkpoint_folder, first_line
from reasonrl.formats.janus import is_published, load_janus
from reasonrl.formats.multi_modality import prepare_tokenizer
from reasonrl.kernels import linear_log_prob
from reasonrl.policies.layout import IMAGE, REASONING, Asked, Layout, Line
from reasonrl.policies.packed_attention import no_mask, use_packed_attention
from reasonrl.policies.sampling_plan import SamplingPlan
from reasonrl.policies.trained_parts import Trained

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration, PreTrainedTokenizerBase

NANO = "nano"
DTYPES = {"checkpoint": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@frozen
class SpecialTokens:
    """Ids that the policy writes or looks for."""

    begin_text: int
    end_text: int
    pad: int
    begin_image: int


@define(eq=False)
class Loader:
    """Holds one loaded checkpoint, so that variants of a policy (`attrs.evolve`) share its weights."""

    key: tuple[str, Trained, str] | None = None
    _loaded: tuple[JanusModule, PreTrainedTokenizerBase] | None = None
    plans: dict[object, SamplingPlan] = field(factory=dict, init=False)
    """What was decided when rows were first drawn, by what they were."""

    def load(self, path: str, trained: Trained, dtype: str) -> tuple[JanusModule, PreTrainedTokenizerBase]:
        """Returns module and tokenizer, loading them once; raises CheckpointError."""
        if self._loaded is None or self.key != (path, trained, dtype):
            self._loaded = load_checkpoint(path, dtype=DTYPES[dtype])
            trained.prepare(self._loaded[0].model)
            self.key = (path, trained, dtype)
            self.plans.clear()
        return self._loaded


class JanusModule(nn.Module):
    """Wraps a Janus model so that log-probs, guidance included, are computed inside forward."""

    def __init__(self, model: JanusForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        use_packed_attention(model.model.language_model)

    def forward(
        self, layout: Layout, *, guidance: float, temperature: float, entropy: bool
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Returns float32 log-probs (and entropies) of the tokens that the layout asks for, each flat.

        A line of its own for the unconditional branch is read without gradient.
        """

        def answer(asked: Asked, states: Tensor, head: nn.Linear, **guided: Any) -> tuple[Tensor, Tensor | None]:
            found = linear_log_prob(
                states,
                head.weight,
                asked.ids,
                bias=head.bias,
                temperature=temperature,
                return_entropy=entropy,
                **guided,
            )
            return found.log_prob, found.entropy

        states = self._states(layout.line)
        out: dict[str, tuple[Tensor, Tensor | None]] = {}
        if layout.words is not None:
            out[REASONING] = answer(layout.words, states[layout.words.places], self.model.lm_head)
        if layout.codes is not None:
            out[IMAGE] = answer(
                layout.codes,
                self.before_image_head(states[layout.codes.places]),
                self.model.model.generation_head.vision_head,
                uncond_hidden=self._blind(layout, states),
                cfg_weight=guidance,
            )
        return out

    def _blind(self, layout: Layout, states: Tensor) -> Tensor | None:
        """Returns what the image head's last layer reads of the unconditional branch, or None."""
        places = None if layout.codes is None else layout.codes.blind
        if places is None:
            return None
        if layout.blind is None:
            return self.before_image_head(states[places])
        with torch.no_grad():
            return self.before_image_head(self._states(layout.blind)[places])

    def _states(self, line: Line) -> Tensor:
        """Returns (R * L, D) states of a line's rows; only tokens that are wanted go on to a head."""
        embedded = self.model.get_input_embeddings()(line.words)
        if len(line.codes):
            embedded = torch.cat([embedded, self.embed_image(line.codes).to(embedded.dtype)])
        rows = embedded[line.source]
        packed = {} if line.runs is None else {"runs": line.runs, "attention_mask": no_mask(rows)}
        found = self.model.model.language_model(
            inputs_embeds=rows, position_ids=line.positions, use_cache=False, **packed
        )
        return found.last_hidden_state.flatten(0, 1)

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Returns (..., D) input embeddings of image tokens."""
        return self.model.prepare_embeddings_for_image_generation(tokens)

    def before_image_head(self, states: Tensor) -> Tensor:
        """Returns what the image head's last linear layer reads: guidance mixes there, where logits are linear."""
        head = self.model.model.generation_head
        return head.activation_fn(head.proj_out(states))


@contextlib.contextmanager
def packaged_or(name: str) -> Iterator[Path]:
    """Yields the folder of a checkpoint: "nano" is the packaged one, otherwise a folder or a Hub name."""
    if name == NANO:
        with as_file(files("reasonrl.scenes") / "nano") as folder:
            yield folder
    else:
        yield checkpoint_folder(name)


def load_checkpoint(name: str, *, dtype: torch.dtype | None = None) -> tuple[JanusModule, PreTrainedTokenizerBase]:
    """Returns the module in its own dtype or another, and the tokenizer; of transformers' layout or the authors' own.

    No pickle is run and no remote code. Raises CheckpointError.
    """
    with packaged_or(name) as folder, quiet():
        model = load_janus(folder, dtype=dtype)
        _refuse_dropout(model, folder)
        return JanusModule(model.eval()), _tokenizer(folder, vocab=len(model.lm_head.weight))


def _refuse_dropout(model: JanusForConditionalGeneration, folder: Path) -> None:
    rates = {"attention_dropout": getattr(model.config.text_config, "attention_dropout", 0.0)}
    live = {name: rate for name, rate in rates.items() if rate}
    if live:
        raise ConfigError(f"{folder} uses dropout {live}: sampling and replay would differ, set it to 0 in config.json")


def _tokenizer(folder: Path, *, vocab: int) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise CheckpointError(f"{folder} holds no tokenizer: expected tokenizer.json beside the weights")
    # The published layout's config.json is of a type that transformers does not know.
    reader = PreTrainedTokenizerFast if is_published(folder) else AutoTokenizer
    try:
        found = reader.from_pretrained(str(folder), padding_side="left")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a JSON file of another shape
        raise CheckpointError(f"{folder} holds no tokenizer: {first_line(error)}") from error
    return prepare_tokenizer(found, vocab)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """Returns the ids of the tokens that the policy writes itself."""
    begin_image = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "boi_token", None) or "<begin_of_image>")
    found: dict[str, Any] = {
        "begin_text": tokenizer.bos_token_id,
        "end_text": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "begin_image": begin_image,
    }
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise CheckpointError(f"the tokenizer has no {', '.join(missing)} token: it is not a Janus tokenizer")
    return SpecialTokens(**found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' loading bars and warnings: what matters is raised by us."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
