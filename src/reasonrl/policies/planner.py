"""Planner: any causal language model or VLM writes the plan, and a renderer draws it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import torch
from attrs import evolve, field, frozen, validators
from torch import Tensor

from reasonrl.errors import ConfigError, DataError
from reasonrl.formats.files import checkpoint_folder
from reasonrl.interfaces import Policy, Teachable
from reasonrl.noise import Draw, uniform
from reasonrl.plan import BOX_END, BOX_START, CANVAS, OBJ_END, OBJ_START
from reasonrl.policies.janus import DTYPES, quiet
from reasonrl.policies.layout import REASONING
from reasonrl.policies.planner_loading import Loaded, Loader, Settings
from reasonrl.policies.planner_model import INPUT, PROMPT_IDS, PlannerModule, rectangle
from reasonrl.policies.trained_parts import has_adapters, merged_weights, save_adapters
from reasonrl.types import Batch, Prompt, Replay, Segment, Stop, Trajectory

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = (
    "You plan pictures. For the caption you are given, describe the picture in a few sentences, and behind the name of"
    f" each object say where it stands, in this form: {OBJ_START}name{OBJ_END}"
    f" {BOX_START}(x0,y0),(x1,y1){BOX_END}. The numbers are whole, from 0 to {CANVAS}: x from left to right, y from top"
    " to bottom, (x0,y0) the top left corner of the object's box and (x1,y1) its bottom right one. Name every object of"
    " the caption, each with a box of its own, placed as the caption says. Write the plan and nothing else."
)
PLAIN = "Caption: {prompt}\nPlan:\n"
"""How a prompt is put to a tokenizer without a chat template, behind instruction and examples."""
ROWS = 64
"""Plans that are written at once where `sample_rows` says nothing."""
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
"""What a VLM's folder holds besides model and tokenizer; training changes none of it."""

_Pairs = tuple[tuple[str, str], ...]


def _pairs(given: Iterable[Iterable[str]]) -> _Pairs:
    return tuple((prompt, plan) for prompt, plan in given)


@final
@frozen
class Planner(Policy, Teachable):
    """Reasoning tokens until the model ends its turn: one stage, "reasoning", for a renderer that draws plans.

    Tokens are drawn from the model's own distribution at `temperature`, with no top-k, top-p or penalty: what is
    replayed is what was drawn from. A Janus checkpoint, "nano" among them, gives its language part, asked in GoT-R1's
    form; it ends a plan by begin-of-image or end-of-text.
    """

    checkpoint: str = "nano"
    """"nano" (packaged), a folder, or a Hub name."""
    instruction: str = INSTRUCTION
    """What is asked of the model, as the system's turn, or first in the user's where a chat template refuses that.
    A chat template that leaves it out (GoT-R1's own, of "nano") leaves it out here too; a run says so."""
    examples: _Pairs = field(default=(), converter=_pairs)
    """(prompt, plan) pairs shown before the prompt, as turns of the conversation."""
    template: str | None = field(default=None)
    """None = the tokenizer's chat template, else `PLAIN` behind the instruction. A string is all that is put, with
    {prompt} filled in: no instruction, no chat template."""
    temperature: float = field(default=1.0, validator=validators.gt(0))
    max_tokens: int = field(default=400, validator=validators.ge(1))
    """Most tokens of a plan; one that is longer is cut there (`Stop.LENGTH`)."""
    sees_image: bool = field(default=False)
    """Show a VLM the prompt's picture, where it has one. False: a prompt's picture is left to renderer and judge."""
    sample_rows: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    """Plans written at once, in whole groups; None = 64. Part of the batch composition, so of bit-exactness."""
    lora_rank: int = field(default=0, validator=validators.ge(0))
    """Above 0, adapters of the language model's linear layers learn; 0 = the whole language model. Eyes never do."""
    lora_alpha: float = field(default=32.0, validator=validators.gt(0))
    dtype: Literal["checkpoint", "float32", "bfloat16"] = field(
        default="checkpoint", validator=validators.in_(tuple(DTYPES))
    )
    """Of the weights. Adapters learn in float32 whatever it is; log-probs are float32 too."""
    gradient_checkpointing: bool = False
    """Compute each layer again in backward instead of keeping its insides: a fourth more work, far less memory."""
    _loader: Loader = field(factory=Loader, eq=False, repr=False)

    @template.validator
    def _has_prompt(self, _: object, value: str | None) -> None:
        if value is not None and value.count("{prompt}") != 1:
            raise ConfigError(f"template must contain {{prompt}} once, got {value!r}")

    @sees_image.validator
    def _has_a_place(self, _: object, value: bool) -> None:
        if value and self.template is not None:
            raise ConfigError(
                "sees_image=True needs the chat template, which says where a picture stands: leave out template"
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """Reasoning."""
        return (REASONING,)

    @property
    def offers(self) -> Mapping[str, frozenset[str]]:
        """Log-probs and entropies."""
        return {REASONING: frozenset({"log_probs", "entropy"})}

    @property
    def module(self) -> PlannerModule:
        """The model, loaded on first use."""
        return self._loaded.module

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return self._loaded.tokenizer

    @property
    def ends(self) -> tuple[int, ...]:
        """Ids that end a plan, the one that demonstrations end with first."""
        return self._loaded.ends

    @property
    def _loaded(self) -> Loaded:
        return self._loader.load(
            Settings(
                self.checkpoint,
                self.dtype,
                self.lora_rank,
                self.lora_alpha,
                self.gradient_checkpointing,
                self.sees_image,
            )
        )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises DataError for prompts with control tokens or words the tokenizer lacks, and for too long ones."""
        wrong = [f"{p.id} ({why})" for p in prompts if (why := self._complaint(p.text))]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise DataError(f"{self.checkpoint} cannot read prompt {'; '.join(wrong[:3])}{more}: reword or remove them")

    def foretell(self, prompts: Sequence[Prompt], *, group_size: int) -> list[str]:
        """Says where the model will not be told the instruction."""
        asked = self.template is None and self.instruction.strip()
        if not asked or self.instruction.strip() in self._rendered("a red circle", seen=False):
            return []
        return [f"the chat template of {self.checkpoint} leaves the instruction out: plans come as the model learned"]

    def sample(self, prompts: Sequence[Prompt], *, group_size: int, draw: Draw) -> list[Trajectory]:
        """Writes `group_size` plans a prompt, members (0,), (1,) and so on."""
        self.check(prompts)
        size = max(1, (self.sample_rows or ROWS) // group_size)
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return [t for chunk in chunks for t in self._sample(chunk, group_size, draw)]

    def replay(self, batch: Batch, needs: Mapping[str, frozenset[str]]) -> dict[str, Replay]:
        """Returns log-probs of the tempered distribution that `sample` drew from; one forward of padded rows."""
        if REASONING not in needs:
            return {}
        stage, entropy = batch.stages[REASONING], "entropy" in needs[REASONING]
        mask, device = stage.mask, stage.mask.device
        rows = [
            {
                name: values[row]
                for name, values in stage.context.items()
                if name == PROMPT_IDS or name.startswith(INPUT)
            }
            for row in range(len(mask))
        ]
        lengths = stage.present.sum(1).tolist()
        plans = [stage.actions[row, :length] for row, length in enumerate(lengths)]
        inputs = rectangle(rows, plans, pad=self._loaded.pad, device=device)
        first = torch.tensor([len(row[PROMPT_IDS]) - 1 for row in rows], device=device)
        first = first + torch.arange(len(rows), device=device) * inputs["input_ids"].shape[1]
        places = first[:, None] + torch.arange(mask.shape[1], device=device)
        found = self.module(inputs, places[mask], stage.actions[mask], temperature=self.temperature, entropy=entropy)
        zeros = torch.zeros(mask.shape, device=device)
        spread = None if found.entropy is None else zeros.masked_scatter(mask, found.entropy.float())
        return {REASONING: Replay(zeros.masked_scatter(mask, found.log_prob.float()), spread)}

    def encode(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Adds segments for texts["reasoning"], the end of the turn behind them; no log-probs: it is data."""
        self.check([t.prompt for t in trajectories])
        return [self._encoded(t) for t in trajectories]

    def save(self, folder: Path) -> None:
        """Writes a transformers checkpoint: config, safetensors, tokenizer; adapters merged, and apart in adapter/."""
        model = self.module.model
        with quiet():
            if has_adapters(model):
                model.save_pretrained(folder, state_dict=merged_weights(model))
                save_adapters(model, folder / "adapter")
            else:
                model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        if self.sees_image:
            source = checkpoint_folder(self.checkpoint)
            for name in PROCESSOR_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, Path(folder) / name)

    def _sample(self, prompts: Sequence[Prompt], group_size: int, draw: Draw) -> list[Trajectory]:
        contexts = [self._context(p) for p in prompts]
        self._refuse_outgrown(prompts, contexts)
        rows = [(p, (g,), context) for p, context in zip(prompts, contexts, strict=True) for g in range(group_size)]
        keys = [draw.key(p.id, member, REASONING) for p, member, _ in rows]
        found, lengths = self.module.write(
            contexts,
            group_size,
            uniform(keys, self.max_tokens),
            temperature=self.temperature,
            ends=self.ends,
            pad=self._loaded.pad,
        )
        tokens = found.cpu()
        segments = [
            Segment(
                REASONING,
                member,
                tokens.ids[row, :length],
                torch.ones(length, dtype=torch.bool),
                tokens.log_probs[row, :length],
                {**context, "entropy": tokens.entropy[row, :length]},
            )
            for row, ((_, member, context), length) in enumerate(zip(rows, lengths.tolist(), strict=True))
        ]
        return [
            Trajectory(
                prompt=prompt,
                member=member,
                segments={REASONING: segment},
                texts={REASONING: self._decode(segment.actions)},
                stop=Stop.END if int(segment.actions[-1]) in self.ends else Stop.LENGTH,
            )
            for (prompt, member, _), segment in zip(rows, segments, strict=True)
        ]

    def _decode(self, ids: Tensor) -> str:
        control = {*self.ends, self.tokenizer.bos_token_id, self.tokenizer.pad_token_id}
        kept = [i for i in ids.tolist() if i not in control]
        # Some tokenizers have a plan's marks among their special tokens: skip_special_tokens would drop them.
        return str(self.tokenizer.decode(kept, skip_special_tokens=False)).strip()

    def _encoded(self, trajectory: Trajectory) -> Trajectory:
        actions = torch.tensor([*self._ids(trajectory.texts[REASONING]), self.ends[0]])
        member = trajectory.member or (0,)
        trained = torch.ones(len(actions), dtype=torch.bool)
        segment = Segment(REASONING, member, actions, trained, None, self._context(trajectory.prompt))
        return evolve(trajectory, member=member, segments={REASONING: segment})

    # ---- how a prompt is put ----

    def _context(self, prompt: Prompt) -> dict[str, Tensor]:
        image = prompt.image if self.sees_image else None
        try:
            return self._read(prompt.text, image)
        except (ValueError, OSError, ArithmeticError) as error:  # a picture that is broken, empty or of odd proportions
            why, what = " ".join(str(error).split()), "prompt" if image is None else "the picture of prompt"
            raise DataError(f"{self.checkpoint} cannot read {what} {prompt.id}: {why}") from error

    def _refuse_outgrown(self, prompts: Sequence[Prompt], contexts: Sequence[Mapping[str, Tensor]]) -> None:
        """Refuses prompts whose pictures leave the plan too little room: `check` has read the text alone."""
        most = self._loaded.context
        lengths = {prompt.id: len(context[PROMPT_IDS]) for prompt, context in zip(prompts, contexts, strict=True)}
        long = [f"{i} ({n} tokens)" for i, n in lengths.items() if most is not None and n + self.max_tokens > most]
        if long:
            raise DataError(
                f"{self.checkpoint}'s context holds {most} tokens, {self.max_tokens} of them for the plan; too long"
                f" with their pictures: {', '.join(long[:3])}: give smaller pictures or fewer max_tokens"
            )

    def _read(self, text: str, image: Image | None) -> dict[str, Tensor]:
        return self._loaded.read(self._rendered(text, seen=image is not None), image, bare=not self._chats)

    @property
    def _chats(self) -> bool:
        return self.template is None and self._chat.chat_template is not None

    @property
    def _chat(self) -> Any:
        """What has the chat template: a VLM's processor, else the tokenizer."""
        return self.tokenizer if self._loaded.processor is None else self._loaded.processor

    def _rendered(self, text: str, *, seen: bool) -> str:
        """Returns all that is put to the model, in its own markup, with a place for a picture where it is seen."""
        if not self._chats:
            turn = self.template or PLAIN
            before = [self.instruction] if self.template is None and self.instruction else []
            shown = [turn.replace("{prompt}", prompt) + plan for prompt, plan in self.examples]
            return "\n\n".join([*before, *shown, turn.replace("{prompt}", text)])
        from jinja2 import TemplateError

        said = [turn for prompt, plan in self.examples for turn in (("user", prompt), ("assistant", plan))]
        if not self.instruction:
            return self._chatted([*said, ("user", text)], seen=seen)
        try:
            return self._chatted([("system", self.instruction), *said, ("user", text)], seen=seen)
        except (TemplateError, TypeError):  # some refuse a system's turn, some join strings to what is none
            (role, first), *rest = [*said, ("user", text)]
            both = f"{self.instruction}\n\n{first}"
        try:
            return self._chatted([(role, both), *rest], seen=seen)
        except (TemplateError, TypeError) as error:
            why = " ".join(str(error).split())
            raise ConfigError(
                f"the chat template of {self.checkpoint} refuses a prompt ({why}): give template="
            ) from error

    def _chatted(self, turns: Sequence[tuple[str, str]], *, seen: bool) -> str:
        conversation: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
        if self._loaded.processor is not None:
            for turn in conversation:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
        if seen:
            conversation[-1]["content"].insert(0, {"type": "image"})
        return str(self._chat.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _complaint(self, text: str) -> str:
        control, unknown, ids = self._loaded.control, self.tokenizer.unk_token_id, self._ids(text)
        found = [token for token in control.values() if token in text]
        # What a text is normalized to may be a control token though the text itself has none.
        found += [control[i] for i in ids if i in control and i != unknown]
        if found:
            return f"contains the control token {found[0]!r}"
        if unknown is not None and unknown in ids:
            words = [word for word in text.split() if unknown in self._ids(word)]
            return f"unknown word {', '.join(repr(word) for word in dict.fromkeys(words))}"
        length, most = len(self._read(text, None)[PROMPT_IDS]), self._loaded.context
        if not length:
            return "no tokens are left of it"
        if most is not None and length + self.max_tokens > most:
            return f"{length} tokens and {self.max_tokens} for the plan, the context holds {most}"
        return ""
