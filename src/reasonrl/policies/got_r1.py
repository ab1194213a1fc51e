"""GoT-R1: a multimodal LLM writes a Generation Chain-of-Thought, then the image's tokens (arXiv 2505.17022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

import torch
from attrs import evolve, field, frozen, validators
from torch import Tensor

from reasonrl.errors import ConfigError, DataError
from reasonrl.interfaces import Policy, Teachable
from reasonrl.noise import Draw, uniform
from reasonrl.policies.janus import DTYPES, Loader, SpecialTokens, quiet, special_tokens
from reasonrl.policies.janus_sampler import Reasoned, Sampler, Tokens
from reasonrl.policies.layout import IMAGE, REASONING, laid_out
from reasonrl.policies.sampling_plan import SamplingPlan, planned
from reasonrl.policies.trained_parts import PARTS, Trained, has_adapters, merged_weights, save_adapters
from reasonrl.types import Batch, Member, Prompt, Replay, Segment, Stop, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reasonrl.policies.janus import JanusModule

TEMPLATE = "Follow the caption to generate an image through a chain of thought process: {prompt}"
TURN = "User: {content}\n\nAssistant:"
"""How GoT-R1's inference code puts a prompt to the model: no system prompt, the assistant's name last."""


@final
@frozen
class GoTR1(Policy, Teachable):
    """Reasoning tokens until begin-of-image, then image tokens under classifier-free guidance.

    The defaults are those of the authors' inference code: temperature 1, guidance 5, at most 600 reasoning tokens and
    begin-of-image behind them. Unlike there, end-of-text ends a plan too, and begin-of-image is appended. Text is drawn
    without guidance. The unconditional branch is the sequence with everything between its first and last token blanked:
    prompt and plan are dropped together.
    """

    checkpoint: str = "nano"
    """"nano" (packaged), a folder, or a Hub name: in transformers' Janus format or the authors' `multi_modality`."""
    guidance: float = field(default=5.0, validator=validators.ge(0))
    """w of l = u + w (c − u) for image tokens; 1 = the conditional branch alone, at half the cost."""
    log_probs: Literal["guided", "detached", "conditional"] = field(
        default="guided", validator=validators.in_(("guided", "detached", "conditional"))
    )
    """What is trained of tokens drawn under guidance. guided: what they were drawn from. detached: the same, without
    gradient through the unconditional branch: a third less work, not the exact gradient. conditional: the log-probs
    without guidance, as peers do; those they were drawn from are recorded, and the objective corrects by weights."""
    temperature: float = field(default=1.0, validator=validators.gt(0))
    max_tokens: int = field(default=601, validator=validators.ge(1))
    """Most reasoning tokens, begin-of-image included."""
    packed: bool = True
    """Replay rows on one line, without padding and with shared prefixes once; False: padded rows, the slow twin."""
    images_per_plan: int = field(default=1, validator=validators.ge(1))
    """Images drawn after each plan; a group of 16 trajectories with 4 a plan has 4 plans."""
    template: str = field(default=TEMPLATE)
    sample_rows: int | None = field(default=None, validator=validators.optional(validators.ge(1)))
    """Trajectories drawn at once; None = as many as free memory holds when the first are drawn, at most 256. Part of
    the batch composition, so of bit-exactness: pin it where free memory may differ between a run and its resume."""
    trained: tuple[str, ...] = field(
        default=tuple(PARTS), converter=tuple, validator=validators.deep_iterable(validators.in_(PARTS))
    )
    """Parts that learn: language_model, embeddings, heads. The tower that sees and the image decoder never do."""
    lora_rank: int = field(default=0, validator=validators.ge(0))
    """Above 0, adapters of the language model's linear layers learn instead of the layers (32 in GoT-R1's paper)."""
    lora_alpha: float = field(default=32.0, validator=validators.gt(0))
    dtype: Literal["checkpoint", "float32", "bfloat16"] = field(
        default="checkpoint", validator=validators.in_(tuple(DTYPES))
    )
    """Of the weights. Adapters learn in float32 whatever it is; log-probs are float32 too."""
    gradient_checkpointing: bool = False
    """Compute each layer again in backward instead of keeping its insides: a fourth more work, far less memory."""
    blank_frac: float = field(default=0.1, validator=[validators.ge(0), validators.le(1)])
    """Share of demonstrations whose prompt and plan are blanked: they teach the unconditional branch."""
    _loader: Loader = field(factory=Loader, eq=False, repr=False)

    @lora_rank.validator
    def _has_layers(self, _: object, value: int) -> None:
        if value and "language_model" not in self.trained:
            raise ConfigError(
                f"lora_rank={value} adapts the language model, and trained={self.trained} leaves it out: add"
                " 'language_model', or set lora_rank=0"
            )

    @template.validator
    def _has_prompt(self, _: object, value: str) -> None:
        if value.count("{prompt}") != 1:
            raise ConfigError(f"template must contain {{prompt}} once, got {value!r}")

    @property
    def stages(self) -> tuple[str, ...]:
        """Reasoning, then image."""
        return (REASONING, IMAGE)

    @property
    def offers(self) -> Mapping[str, frozenset[str]]:
        """Log-probs and entropies of both stages."""
        both = frozenset({"log_probs", "entropy"})
        return {REASONING: both, IMAGE: both}

    @property
    def module(self) -> JanusModule:
        """The Janus model, loaded on first use."""
        return self._loader.load(self.checkpoint, self._trained, self.dtype)[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return self._loader.load(self.checkpoint, self._trained, self.dtype)[1]

    @property
    def special(self) -> SpecialTokens:
        """Ids of the tokens the policy writes itself."""
        return special_tokens(self.tokenizer)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens a picture: 576 for Janus-Pro, 64 for nano."""
        return int(self.module.model.config.vision_config.num_image_tokens)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises DataError for prompts with words the tokenizer does not know, or with control tokens."""
        wrong = [f"{p.id} ({why})" for p in prompts if (why := self._complaint(p.text))]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise DataError(f"{self.checkpoint} cannot read prompt {'; '.join(wrong[:3])}{more}: reword or remove them")

    def sample(self, prompts: Sequence[Prompt], *, group_size: int, draw: Draw) -> list[Trajectory]:
        """Draws whole groups: `group_size / images_per_plan` plans a prompt, the images of a plan side by side."""
        self._per_plan(group_size)
        self.check(prompts)
        size = self._groups_at_once(prompts, group_size)
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return [t for chunk in chunks for t in self._sample(chunk, group_size, draw)]

    def foretell(self, prompts: Sequence[Prompt], *, group_size: int) -> list[str]:
        """Says how many trajectories are drawn at once; ConfigError where memory does not hold one group."""
        self._per_plan(group_size)
        return [] if self.sample_rows else [str(self._plan(prompts, group_size))]

    def replay(self, batch: Batch, needs: Mapping[str, frozenset[str]]) -> dict[str, Replay]:
        """Returns log-probs of the tempered, guided distribution that `sample` drew from; one pass for both stages."""
        entropy = any("entropy" in wanted for wanted in needs.values())
        guidance = 1.0 if self.log_probs == "conditional" else self.guidance
        layout = laid_out(
            batch,
            needs,
            self.special,
            guided=guidance != 1.0,
            packed=self.packed,
            apart=self.log_probs == "detached",
        )
        found = self.module(layout, guidance=guidance, temperature=self.temperature, entropy=entropy)
        return {name: _scattered(batch.stages[name].mask, found.get(name), entropy) for name in needs}

    def encode(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """Adds segments for texts["reasoning"] and artifacts["image_tokens"] ((T,) ids); no log-probs: it is data."""
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

    def _per_plan(self, group_size: int) -> int:
        """Returns the images of each plan; a group of one, as in evaluation, is a plan with an image."""
        if group_size > 1 and group_size % self.images_per_plan:
            raise ConfigError(
                f"group_size must be a multiple of images_per_plan={self.images_per_plan}, got {group_size}:"
                " every plan of a group has as many images"
            )
        return 1 if group_size == 1 else self.images_per_plan

    def _groups_at_once(self, prompts: Sequence[Prompt], group_size: int) -> int:
        rows = self.sample_rows
        return max(1, rows // group_size) if rows else self._plan(prompts, group_size).groups

    def _plan(self, prompts: Sequence[Prompt], group_size: int) -> SamplingPlan:
        longest = max((len(self._prompt_ids(p.text)) for p in prompts), default=1)
        longest = 2 ** (longest - 1).bit_length()  # so that a few tokens more are no other plan
        asked = (group_size, longest, self.max_tokens, self.guidance != 1.0, self._per_plan(group_size))
        module, plans = self.module, self._loader.plans
        if asked not in plans:
            plans[asked] = planned(
                module,
                group_size=group_size,
                prompt_tokens=longest,
                max_tokens=self.max_tokens,
                guided=self.guidance != 1.0,
                images_per_plan=self._per_plan(group_size),
            )
        return plans[asked]

    @property
    def _trained(self) -> Trained:
        return Trained(self.trained, self.lora_rank, self.lora_alpha, self.gradient_checkpointing)

    def _sample(self, prompts: Sequence[Prompt], group_size: int, draw: Draw) -> list[Trajectory]:
        per_plan = self._per_plan(group_size)
        num_plans = group_size // per_plan
        plans = [(p, (g,)) for p in prompts for g in range(num_plans)]
        leaves = [(p, (*m, k) if per_plan > 1 else m) for p, m in plans for k in range(per_plan)]
        ids = [self._prompt_ids(p.text) for p in prompts]
        sampler = Sampler(
            self.module,
            self.special,
            guidance=self.guidance,
            temperature=self.temperature,
            conditional=self.log_probs == "conditional",
        )
        text_keys = [draw.key(p.id, m, REASONING) for p, m in plans]
        reasoned = sampler.reason(ids, num_plans, uniform(text_keys, self.max_tokens))
        image_keys = [draw.key(p.id, m, IMAGE) for p, m in leaves]
        images = sampler.images_of(reasoned, per_plan, uniform(image_keys, self.num_image_tokens)).cpu()
        segments = self._reasoning(reasoned, [m for _, m in plans], [ids[i // num_plans] for i in range(len(plans))])
        return [
            self._trajectory(prompt, member, segments[row // per_plan], images, row)
            for row, (prompt, member) in enumerate(leaves)
        ]

    def _reasoning(self, found: Reasoned, members: Sequence[Member], prompt_ids: Sequence[Tensor]) -> list[Segment]:
        tokens, lengths, forced = found.tokens.cpu(), found.lengths.tolist(), found.forced.cpu()
        return [
            Segment(
                REASONING,
                member,
                tokens.ids[row, :length],
                ~forced[row, :length],
                tokens.log_probs[row, :length],
                {"prompt_ids": prompt_ids[row], "entropy": tokens.entropy[row, :length]},
            )
            for row, (member, length) in enumerate(zip(members, lengths, strict=True))
        ]

    def _trajectory(self, prompt: Prompt, member: Member, plan: Segment, images: Tokens, row: int) -> Trajectory:
        context = {"blank": torch.tensor(False), "entropy": images.entropy[row]}
        mask = torch.ones(images.ids.shape[1], dtype=torch.bool)
        drawn, alone = images.log_probs[row], images.conditional
        image = Segment(
            IMAGE,
            member,
            images.ids[row],
            mask,
            drawn if alone is None else alone[row],
            context,
            behaviour=None if alone is None else drawn,
        )
        return Trajectory(
            prompt=prompt,
            member=member,
            segments={REASONING: plan, IMAGE: image},
            texts={REASONING: self._decode(plan.actions)},
            stop=Stop.END if self._ended(plan) else Stop.LENGTH,
        )

    def _ended(self, plan: Segment) -> bool:
        """Whether begin-of-image was drawn, or forced behind an end of text: else the plan was cut."""
        return bool(plan.mask[-1]) or self.special.end_text in plan.actions[-2:-1]

    def _decode(self, ids: Tensor) -> str:
        special = self.special
        control = {special.begin_image, special.end_text, special.pad, special.begin_text}
        kept = [i for i in ids.tolist() if i not in control]
        # The box and object tokens are ordinary added tokens: skip_special_tokens would drop them in some tokenizers.
        return str(self.tokenizer.decode(kept, skip_special_tokens=False)).strip()

    def _encoded(self, trajectory: Trajectory) -> Trajectory:
        prompt_ids = self._prompt_ids(trajectory.prompt.text)
        text = torch.tensor([*self._ids(trajectory.texts[REASONING]), self.special.begin_image])
        image = torch.as_tensor(trajectory.artifacts["image_tokens"]).long()
        member = trajectory.member or (0,)
        # Addressed noise decides which demonstrations are blanked, so that the choice survives a resume.
        key = Draw(0, 0).key(trajectory.prompt.id, member, IMAGE, "blank")
        blank = bool(uniform([key], 1).item() < self.blank_frac)
        trained = torch.full((len(text),), not blank)
        segments = {
            REASONING: Segment(REASONING, member, text, trained, None, {"prompt_ids": prompt_ids}),
            IMAGE: Segment(
                IMAGE,
                member,
                image,
                torch.ones(len(image), dtype=torch.bool),
                None,
                {"blank": torch.tensor(blank)},
            ),
        }
        return evolve(trajectory, member=member, segments=segments)

    def _prompt_ids(self, text: str) -> Tensor:
        filled = self.template.replace("{prompt}", text)
        if self._converses:
            filled = TURN.replace("{content}", filled.strip())
        ids = self._ids(filled)
        begin = self.special.begin_text
        return torch.tensor(ids if ids[:1] == [begin] else [begin, *ids])

    @property
    def _converses(self) -> bool:
        # The drawn world's words know no "User:".
        return self.tokenizer.unk_token_id is None or self.tokenizer.unk_token_id not in self._ids("User: Assistant:")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _complaint(self, text: str) -> str:
        control = [t for t in self.tokenizer.all_special_tokens if t in text]
        if control:
            return f"contains the control token {control[0]!r}"
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return ""
        words = [w for w in text.split() if unknown in self._ids(w)]
        return f"unknown word {', '.join(repr(w) for w in dict.fromkeys(words))}" if words else ""


def _scattered(mask: Tensor, found: tuple[Tensor, Tensor | None] | None, entropy: bool) -> Replay:
    """Returns flat results in their (N, T) places, 0 elsewhere."""
    zeros = torch.zeros(mask.shape, device=mask.device)
    if found is None:
        return Replay(zeros, zeros if entropy else None)
    log_prob, spread = found
    return Replay(
        zeros.masked_scatter(mask, log_prob.float()),
        None if spread is None else zeros.masked_scatter(mask, spread.float()),
    )
