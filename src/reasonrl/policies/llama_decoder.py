"""One token a row through a Llama model: `LlamaModel.forward`'s arithmetic over caches that share prefixes.

transformers' forward is its slow twin: it computes the prefixes, and replays what was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from torch import Tensor, nn

from reasonrl.errors import CheckpointError
from reasonrl.kernels.matmul import ready_product
from reasonrl.policies.cascade_cache import Cascade, Layers

if TYPE_CHECKING:
    from transformers import LlamaModel

Product = Callable[[Tensor], tuple[Tensor, ...]]


@frozen(eq=False)
class _Layer:
    before_attention: nn.Module
    query_key_value: Product
    out: Product
    before_mlp: nn.Module
    gate_up: Product
    down: Product
    activation: nn.Module


class Decoder:
    """Feeds one embedded token a row, and returns the state that predicts the next; no gradient.

    It is made anew whenever weights may have changed: on a CPU it holds copies of them in the layout that its matrix
    products are fastest with.
    """

    def __init__(self, model: LlamaModel) -> None:
        from transformers import LlamaModel

        if not isinstance(model, LlamaModel):
            raise CheckpointError(
                f"the sampler decodes Llama models, as in Janus, and this checkpoint's language model is a"
                f" {type(model).__name__}: use another checkpoint"
            )
        self.model = model
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = model.layers[0].self_attn.head_dim
        self.scale = model.layers[0].self_attn.scaling
        self.layers = [_layer(layer) for layer in model.layers]

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Layers]:
        """Returns (P, L, D) states, and keys and values, of right-padded (P, L) tokens, by transformers' forward."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        recomputes = self.model.training  # for backward, in which mode transformers keeps no cache
        self.model.eval()
        try:
            found = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        finally:
            self.model.train(recomputes)
        return found.last_hidden_state, [(layer.keys, layer.values) for layer in cache.layers]

    def step(self, embedded: Tensor, caches: Sequence[Cascade], *, spans: Sequence[int]) -> Tensor:
        """Returns (N, D) states of (N, D) embedded tokens, each at its row's next position.

        The rows are those of the caches one after the other: they meet in every matrix product and part only where
        they attend.
        """
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        positions = torch.cat([cache.positions for cache in caches])
        cos, sin = (part[:, 0] for part in self.model.rotary_emb(embedded, positions[:, None]))
        hidden = [cache.hidden(span) for cache, span in zip(caches, spans, strict=True)]
        cuts = [cache.num_rows for cache in caches]
        sizes = [self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width]
        state = embedded
        for num, layer in enumerate(self.layers):
            query, key, value = layer.query_key_value(layer.before_attention(state))
            query, key, value = (
                part.view(len(part), size // self.width, self.width)
                for part, size in zip((query, key, value), sizes, strict=True)
            )
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            asked = zip(caches, hidden, spans, query.split(cuts), key.split(cuts), value.split(cuts), strict=True)
            found = [
                cache.attend(num, q, k, v, hidden=unseen, span=span, scale=self.scale).flatten(1)
                for cache, unseen, span, q, k, v in asked
            ]
            state = state + layer.out(torch.cat(found) if len(found) > 1 else found[0])[0]
            gate, up = layer.gate_up(layer.before_mlp(state))
            state = state + layer.down(layer.activation(gate) * up)[0]
        for cache in caches:
            cache.advance()
        return self.model.norm(state)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        before_attention=layer.input_layernorm,
        query_key_value=products(attention.q_proj, attention.k_proj, attention.v_proj),
        out=products(attention.o_proj),
        before_mlp=layer.post_attention_layernorm,
        gate_up=products(mlp.gate_proj, mlp.up_proj),
        down=products(mlp.down_proj),
        activation=mlp.act_fn,
    )


def products(*linears: nn.Module) -> Product:
    """Returns a function that gives every linear layer's output of one input; on a CPU the layers become one.

    Layers with adapters stay as they are, and so do those of a GPU: a second copy would cost its memory.
    """
    plain = [linear for linear in linears if type(linear) is nn.Linear]
    if len(plain) < len(linears) or plain[0].weight.device.type != "cpu":
        return lambda value: tuple(linear(value) for linear in linears)
    biases = [linear.bias.detach() for linear in plain if linear.bias is not None]
    weight = torch.cat([linear.weight.detach() for linear in plain])
    whole = ready_product(weight, torch.cat(biases) if biases else None)
    sizes = [linear.out_features for linear in plain]
    return lambda value: whole(value).split(sizes, -1)
