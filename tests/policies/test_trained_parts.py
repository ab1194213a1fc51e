"""What of a Janus model learns: whole parts, or adapters."""

import pytest
import torch
from attrs import evolve
from peft import PeftModel
from transformers import JanusForConditionalGeneration

from reasonrl import ConfigError, Draw, Prompt
from reasonrl.batch import Row, collate
from reasonrl.objectives import GRPO
from reasonrl.policies import GoTR1
from reasonrl.session import run

HEADS = ("lm_head.", "model.generation_head.", "model.language_model.embed_tokens.")
"""The last is tied to the first in the nano checkpoint."""
PROMPT = Prompt("a", "a red circle left of a blue square")


def learning(policy: GoTR1) -> set[str]:
    return {name for name, p in policy.module.model.named_parameters() if p.requires_grad}


def stirred(policy: GoTR1) -> GoTR1:
    """Moves everything that learns, as training would."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    return policy


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[2, 20, 30, 40, 4]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_everything_that_draws_learns_by_default(nano_folder):
    frozen = {n for n, _ in GoTR1(str(nano_folder)).module.model.named_parameters()} - learning(GoTR1(str(nano_folder)))
    towers = ("model.vision_model.", "model.aligner.", "model.vqmodel.")
    assert frozen
    assert all(name.startswith(towers) for name in frozen)


@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        (("heads",), HEADS),
        (("language_model",), ("model.language_model.layers.", "model.language_model.norm.")),
    ],
)
def test_a_part_learns_alone(nano_folder, parts, prefixes):
    found = learning(GoTR1(str(nano_folder), trained=parts))
    assert found
    assert all(name.startswith(prefixes) for name in found)


def test_a_weight_that_is_tied_learns_with_either_of_its_parts(nano_folder):
    for part in ("heads", "embeddings"):
        model = GoTR1(str(nano_folder), trained=(part,)).module.model
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.lm_head.weight.requires_grad


def test_a_part_that_is_none_is_refused(nano_folder):
    with pytest.raises(ValueError, match="language"):
        GoTR1(str(nano_folder), trained=("language",))
    with pytest.raises(ConfigError, match="lora_rank=4 adapts the language model, and trained="):
        GoTR1(str(nano_folder), trained=("heads",), lora_rank=4)


def test_adapters_learn_instead_of_their_layers_and_begin_as_nothing(nano_folder):
    plain, adapted = GoTR1(str(nano_folder)), GoTR1(str(nano_folder), trained=("language_model", "heads"), lora_rank=4)
    found = learning(adapted)
    assert any(".lora_A." in name for name in found)
    assert any(name.startswith("model.generation_head.") for name in found)
    assert all(".lora_" in name or name.startswith(HEADS) for name in found)
    assert torch.equal(logits(plain.module.model), logits(adapted.module.model))
    again = GoTR1(str(nano_folder), trained=("language_model", "heads"), lora_rank=4)
    for (name, one), (_, other) in zip(adapted.module.named_parameters(), again.module.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_adapters_are_replayed_as_they_were_sampled(nano_folder):
    policy = stirred(GoTR1(str(nano_folder), guidance=5.0, max_tokens=12, lora_rank=4))
    drawn = policy.sample([PROMPT], group_size=3, draw=Draw(0, 0))
    batch = collate([Row(t, {}, {}, frozenset(policy.stages)) for t in drawn], policy.stages)
    with torch.no_grad():
        found = policy.replay(batch, dict(policy.offers))
    for name in policy.stages:
        stage = batch.stages[name]
        assert (found[name].log_probs - stage.log_probs)[stage.mask].abs().max() <= 1e-4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers
def test_adapters_are_saved_merged_for_transformers_and_apart_for_peft(nano_folder, tmp_path):
    policy = stirred(GoTR1(str(nano_folder), trained=("language_model",), lora_rank=4, lora_alpha=8.0))
    wanted = logits(policy.module.model)
    policy.save(tmp_path / "saved")
    merged = JanusForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=0)
    base = JanusForConditionalGeneration.from_pretrained(nano_folder).eval()
    peft = PeftModel.from_pretrained(base, tmp_path / "saved" / "adapter").eval()
    torch.testing.assert_close(logits(peft), wanted, atol=1e-6, rtol=0)
    again = GoTR1(str(tmp_path / "saved")).module.model
    torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=0)


def test_a_run_with_adapters_moves_nothing_else_and_resumes_to_the_same_bits(tiny, nano_folder, tmp_path, capsys):
    def recipe(steps):
        policy = GoTR1(str(nano_folder), guidance=1.0, max_tokens=12, trained=("language_model",), lora_rank=4)
        return evolve(tiny(objective=GRPO(kl=0.05)), policy=policy, steps=steps)

    base = JanusForConditionalGeneration.from_pretrained(nano_folder).state_dict()
    whole = recipe(3)
    run(whole, tmp_path / "whole", quiet=False)
    said = capsys.readouterr().err
    count = sum(p.numel() for p in whole.policy.module.parameters() if p.requires_grad)
    assert f"GoTR1: {count:,} of " in said
    moved = 0
    for name, value in whole.policy.module.model.state_dict().items():
        if ".lora_B." in name:
            moved += int(value.any())
        elif ".lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer.", ".")]), name
    assert moved

    run(recipe(2), tmp_path / "parts", quiet=True)
    rest = recipe(3)
    run(rest, tmp_path / "parts", resume=True, quiet=True)
    for (name, one), (_, other) in zip(
        whole.policy.module.named_parameters(), rest.policy.module.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def slopes(policy: GoTR1) -> tuple[float, dict[str, torch.Tensor], int]:
    """Returns a loss, its gradients, and the bytes that autograd kept."""
    drawn = GoTR1(policy.checkpoint, guidance=policy.guidance, max_tokens=12).sample(
        [PROMPT], group_size=2, draw=Draw(0, 0)
    )
    batch = collate([Row(t, {}, {}, frozenset(policy.stages)) for t in drawn], policy.stages)
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        found = policy.replay(batch, dict(policy.offers))
        loss = sum(replay.log_probs.sum() for replay in found.values())
    loss.backward()
    return (
        loss.item(),
        {n: p.grad for n, p in policy.module.named_parameters() if p.grad is not None},
        sum(kept.values()),
    )


def test_recomputed_layers_have_the_same_gradients_and_keep_less(nano_folder):
    plain = slopes(GoTR1(str(nano_folder), guidance=5.0))
    again = slopes(GoTR1(str(nano_folder), guidance=5.0, gradient_checkpointing=True))
    assert again[0] == plain[0]
    assert plain[1].keys() == again[1].keys()
    for name, slope in plain[1].items():
        torch.testing.assert_close(again[1][name], slope, atol=1e-6, rtol=1e-5)
    assert again[2] < 0.7 * plain[2]


def test_a_detached_branch_changes_the_gradient_and_not_the_log_probs(nano_folder):
    policy = GoTR1(str(nano_folder), guidance=5.0)
    both, alone = slopes(policy), slopes(GoTR1(str(nano_folder), guidance=5.0, log_probs="detached"))
    assert both[0] == pytest.approx(alone[0], rel=1e-6)
    assert alone[2] < both[2]
    head = "model.model.generation_head.vision_head.weight"
    torch.testing.assert_close(alone[1][head], both[1][head])  # of the mix, which is the same
    name = "model.model.language_model.layers.0.self_attn.q_proj.weight"
    assert (both[1][name] - alone[1][name]).norm() > 0.1 * both[1][name].norm()
