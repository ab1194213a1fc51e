"""Janus checkpoints: a `transformers` model, its tokenizer, and the two heads' log-probs inside one forward."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, frozen
from torch import Tensor, nn

from reasonrl.errors import CheckpointError, ConfigError
from reasonrl.formats.files import checkpoint_folder, first_line
from reasonrl.formats.janus import is_published, load_janus
from reasonrl.formats.multi_modality import prepare_tokenizer
from reasonrl.kernels import linear_log_prob
from reasonrl.policies.trained_parts import Trained

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration, PreTrainedTokenizerBase

NANO = "nano"


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

    key: tuple[str, Trained] | None = None
    _loaded: tuple[JanusModule, PreTrainedTokenizerBase] | None = None

    def load(self, path: str, trained: Trained) -> tuple[JanusModule, PreTrainedTokenizerBase]:
        """Returns module and tokenizer, loading them once; raises CheckpointError."""
        if self._loaded is None or self.key != (path, trained):
            self._loaded = load_checkpoint(path)
            trained.prepare(self._loaded[0].model)
            self.key = (path, trained)
        return self._loaded


class JanusModule(nn.Module):
    """Wraps a Janus model so that log-probs, guidance included, are computed inside forward."""

    def __init__(self, model: JanusForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        lengths: Tensor,
        text_at: Tensor,
        image_at: Tensor,
        *,
        blank: Tensor,
        guidance: float,
        detached: bool,
        temperature: float,
        entropy: bool,
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Returns float32 log-probs (and entropies) of the wanted text and image tokens, each flat.

        text (N, L) is the right-padded prompt and reasoning, `lengths` (N,) its true length up to and
        including begin-of-image; image (N, T) follows it. text_at (N, L) and image_at (N, T) mark the
        wanted tokens. `blank` (N,) rows see the unconditional prefix instead of their own. `detached` leaves the
        unconditional branch without gradient.
        """
        rows = torch.where(blank, 1, 0)
        has_image = bool(image_at.any())
        prefix = text if not blank.any() else torch.where(rows.bool()[:, None], self.unconditional(text, lengths), text)
        hidden = self._hidden(prefix, image if has_image else image[:, :0], lengths)
        out: dict[str, tuple[Tensor, Tensor | None]] = {}
        if bool(text_at.any()):
            # The token at position t is predicted by the hidden state at t - 1.
            states = hidden[:, : text.shape[1] - 1][text_at[:, 1:]]
            head = self.model.lm_head
            found = linear_log_prob(
                states,
                head.weight,
                text[:, 1:][text_at[:, 1:]],
                bias=head.bias,
                temperature=temperature,
                return_entropy=entropy,
            )
            out["reasoning"] = (found.log_prob, found.entropy)
        if has_image:
            where = _image_positions(lengths, image.shape[1])
            states = self._image_states(hidden, where, image_at)
            uncond = None
            if guidance != 1.0:
                with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
                    other = self._hidden(self.unconditional(text, lengths), image, lengths)
                    uncond = self._image_states(other, where, image_at)
            head = self.model.model.generation_head.vision_head
            found = linear_log_prob(
                states,
                head.weight,
                image[image_at],
                bias=head.bias,
                uncond_hidden=uncond,
                cfg_weight=guidance,
                temperature=temperature,
                return_entropy=entropy,
            )
            out["image"] = (found.log_prob, found.entropy)
        return out

    def unconditional(self, text: Tensor, lengths: Tensor) -> Tensor:
        """Returns (N, L) prefixes of the same lengths with all but the first and last token blanked (GoT-R1)."""
        at = torch.arange(text.shape[1], device=text.device)
        keep = (at == 0) | (at == lengths[:, None] - 1)
        return torch.where(keep, text, self.model.config.text_config.pad_token_id)

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Returns (..., D) input embeddings of image tokens."""
        return self.model.prepare_embeddings_for_image_generation(tokens)

    def before_image_head(self, states: Tensor) -> Tensor:
        """Returns what the image head's last linear layer reads: guidance mixes there, where logits are linear."""
        head = self.model.model.generation_head
        return head.activation_fn(head.proj_out(states))

    def _image_states(self, hidden: Tensor, where: Tensor, image_at: Tensor) -> Tensor:
        states = hidden.gather(1, where[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.before_image_head(states[image_at])

    def _hidden(self, text: Tensor, image: Tensor, lengths: Tensor) -> Tensor:
        """Returns (N, L + T, D) states of text rows each followed at once by its image tokens.

        Padding is on the right and attention is causal, so no mask is needed.
        """
        embedded = self.model.get_input_embeddings()(text)
        if image.shape[1]:
            space = embedded.new_zeros(*image.shape, embedded.shape[-1])
            at = _image_positions(lengths, image.shape[1]) + 1
            embedded = torch.cat([embedded, space], 1).scatter(
                1,
                at[..., None].expand(-1, -1, embedded.shape[-1]),
                self.embed_image(image).to(embedded.dtype),
            )
        return self.model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state


def _image_positions(lengths: Tensor, num_tokens: int) -> Tensor:
    """(N, T) positions of the states that predict each image token: begin-of-image first."""
    return lengths[:, None] - 1 + torch.arange(num_tokens, device=lengths.device)


@contextlib.contextmanager
def packaged_or(name: str) -> Iterator[Path]:
    """Yields the folder of a checkpoint: "nano" is the packaged one, otherwise a folder or a Hub name."""
    if name == NANO:
        with as_file(files("reasonrl.scenes") / "nano") as folder:
            yield folder
    else:
        yield checkpoint_folder(name)


def load_checkpoint(name: str) -> tuple[JanusModule, PreTrainedTokenizerBase]:
    """Returns the module in its own dtype, and the tokenizer; in transformers' layout or the authors' own.

    No pickle is run and no remote code. Raises CheckpointError.
    """
    with packaged_or(name) as folder, quiet():
        model = load_janus(folder)
        _refuse_dropout(model, folder)
        return JanusModule(model.eval()), _tokenizer(folder, vocab=len(model.lm_head.weight))


def _refuse_dropout(model: JanusForConditionalGeneration, folder: Path) -> None:
    rates = {"attention_dropout": getattr(model.config.text_config, "attention_dropout", 0.0)}
    live = {name: rate for name, rate in rates.items() if rate}
    if live:
        raise ConfigError(f"{folder} uses dropout {live}: sampling and replay would differ, set it to 0 in config.json")


def _tokenizer(folder: Path, *, vocab: int) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # The published layout's config.json is of a type that transformers does not know.
    reader = PreTrainedTokenizerFast if is_published(folder) else AutoTokenizer
    try:
        found = reader.from_pretrained(str(folder), padding_side="left")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a JSON file of another shape
        raise CheckpointError(f"{folder} holds no tokenizer: {first_line(error)}") from error
    return prepare_tokenizer(found, vocab)


def special_tokens(tokenizer: PreTrainedTokenizerBase, module: JanusModule) -> SpecialTokens:
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
    if module.model.config.text_config.pad_token_id is None:
        module.model.config.text_config.pad_token_id = found["pad"]
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
