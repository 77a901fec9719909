"""A range of a model's layers, ready to run: what one shard holds.

One forward pass takes any number of tokens, a chain or a tree, behind the committed prefix of a cache. Splitting a
model into stages changes no bit of its output: the same operations run on the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lattica_infer.errors import WeightsError
from lattica_infer.model.attention import Placement, attend, place
from lattica_infer.model.config import ModelConfig, stage_tensors
from lattica_infer.model.kv_cache import KVCache
from lattica_infer.model.linear import Linear, packing_works
from lattica_infer.model.norm import RmsNorm

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Stage:
    """Layers `layers` of a model, with the embedding if it has layer 0 and the head if it has the last one.

    Args:
        weights: at least the tensors of `stage_tensors(config, layers)`; read, never written to.
        dtype: of weights and activations inside; default fp32 on CPU (with bf16 about 1 % of the argmaxes differ
            from step-by-step decoding), bf16 on CUDA.
        packed: use packed weights where they work (CPU, fp32).

    Raises:
        WeightsError: a tensor is missing or has another shape than the config says.
        ValueError: the layers are not in the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        layers: range,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        packed: bool = True,
    ) -> None:
        if not (layers.step == 1 and 0 <= layers.start < layers.stop <= config.num_layers):
            raise ValueError(f"layers {layers.start}:{layers.stop} are not in 0:{config.num_layers}")
        _check_weights(config, weights, layers)
        self.config = config
        self.layers = layers
        self.first = layers.start == 0
        self.last = layers.stop == config.num_layers
        self.device = torch.device(device)
        self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else torch.bfloat16)
        self._packed = (
            packed and self.device.type == "cpu" and self.dtype == torch.float32 and packing_works()
        )
        frequencies = config.rope.inverse_frequencies(config.head_dim)
        self._inverse_frequencies = torch.from_numpy(frequencies).to(self.device)
        with torch.inference_mode():
            self._blocks = [self._block(weights, layer) for layer in layers]
            # Rows are looked up in the plain table, on CPU a view of the mapped file. A tied head is multiplied with
            # that same table, unless it is packed: then the model's largest matrix is held twice.
            table, head = "model.embed_tokens.weight", "lm_head.weight"
            self._embedding: Tensor | None = None
            if self.first:
                on_cpu = self.device.type == "cpu"
                self._embedding = weights[table] if on_cpu else self._tensor(weights, table)
                weights = {**weights, table: self._embedding}
            self._head: Linear | None = None
            if self.last:
                self._norm = self._rms_norm(weights, "model.norm")
                matrix = self._tensor(weights, table if config.tied else head)
                self._head = Linear(matrix, None, packed=self._packed)

    @property
    def numeric_class(self) -> str:
        """Stages of one class compute the same bits for the same input, such as "cpu-fp32-packed"."""
        name = f"{self.device.type}-{_NAMES.get(self.dtype, str(self.dtype).removeprefix('torch.'))}"
        return name + "-packed" if self._packed else name

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache for a session of at most `rows` rows, scratch included."""
        return KVCache(self.config, self.layers, rows=rows, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def forward(
        self, inputs: Tensor, cache: KVCache, parents: Tensor | None = None, *, rows: Tensor | None = None
    ) -> Tensor:
        """Run new tokens through the layers; their keys and values become the cache's scratch rows.

        Args:
            inputs: on the first stage token ids, int64 [tokens]; else the stage before's output,
                [tokens, hidden].
            cache: made by this stage's `new_cache`; its earlier scratch rows are dropped.
            parents: of each token in the draft tree, [tokens]: an earlier token, or -1 for one that continues the
                committed prefix. None: a chain. A token stands at committed + depth.
            rows: on the last stage, which tokens' logits are wanted, int64; None: all.

        Returns:
            Activations float32 or `dtype`, [tokens, hidden]; on the last stage logits float32, [rows, vocab].

        Raises:
            CacheFullError: the cache has no room for so many tokens.
        """
        count = inputs.shape[0]
        cache.reserve(count)
        tree = None if parents is None else parents.tolist()
        placement = place(self.config, self._inverse_frequencies, cache.committed, count, tree, self.dtype)
        if self._embedding is None:
            x = inputs.to(self.device, self.dtype)  # [tokens, hidden]
        else:
            x = F.embedding(inputs.to(self.device), self._embedding).to(self.dtype)
        for index, block in enumerate(self._blocks):
            mask = placement.masks[self.config.windows[self.layers.start + index]]
            x = block.forward(x, cache, index, placement, mask)
        if self._head is None:
            return x
        if rows is not None:
            x = x[rows.to(self.device)]
        if not x.shape[0]:
            return torch.empty(0, self.config.vocab_size)
        return self._head(self._norm(x)).float()

    def _block(self, weights: Mapping[str, Tensor], layer: int) -> _Block:
        name = f"model.layers.{layer}."
        config = self.config
        return _Block(
            config=config,
            attention_norm=self._rms_norm(weights, name + "input_layernorm"),
            qkv=self._linear(weights, *(f"{name}self_attn.{part}_proj" for part in "qkv")),
            query_norm=self._rms_norm(weights, name + "self_attn.q_norm") if config.qk_norm else None,
            key_norm=self._rms_norm(weights, name + "self_attn.k_norm") if config.qk_norm else None,
            out=self._linear(weights, name + "self_attn.o_proj"),
            mlp_norm=self._rms_norm(weights, name + "post_attention_layernorm"),
            gate_up=self._linear(weights, name + "mlp.gate_proj", name + "mlp.up_proj"),
            down=self._linear(weights, name + "mlp.down_proj"),
        )

    def _tensor(self, weights: Mapping[str, Tensor], name: str) -> Tensor:
        return weights[name].to(self.device, self.dtype)

    def _rms_norm(self, weights: Mapping[str, Tensor], name: str) -> RmsNorm:
        return RmsNorm(self._tensor(weights, name + ".weight"), self.config.norm_eps)

    def _linear(self, weights: Mapping[str, Tensor], *names: str) -> Linear:
        """Several matrices that take the same input become one."""
        weight = torch.cat([self._tensor(weights, name + ".weight") for name in names])
        bias = None
        if names[0] + ".bias" in weights and names[0] + ".bias" in stage_tensors(self.config, self.layers):
            bias = torch.cat([self._tensor(weights, name + ".bias") for name in names])
        return Linear(weight, bias, packed=self._packed)


class _Block:
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        attention_norm: RmsNorm,
        qkv: Linear,
        query_norm: RmsNorm | None,
        key_norm: RmsNorm | None,
        out: Linear,
        mlp_norm: RmsNorm,
        gate_up: Linear,
        down: Linear,
    ) -> None:
        self._heads, self._kv_heads, self._dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._attention_norm, self._mlp_norm = attention_norm, mlp_norm
        self._qkv, self._out, self._gate_up, self._down = qkv, out, gate_up, down
        self._query_norm, self._key_norm = query_norm, key_norm

    def forward(
        self, x: Tensor, cache: KVCache, index: int, placement: Placement, mask: Tensor | None
    ) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]; writes the layer's scratch rows."""
        x = x + self._attention(self._attention_norm(x), cache, index, placement, mask)
        gate, up = self._gate_up(self._mlp_norm(x)).chunk(2, -1)
        return x + self._down(F.silu(gate).mul_(up))

    def _attention(
        self, x: Tensor, cache: KVCache, index: int, placement: Placement, mask: Tensor | None
    ) -> Tensor:
        heads, kv_heads, dim, tokens = self._heads, self._kv_heads, self._dim, x.shape[0]
        mixed = self._qkv(x).view(tokens, heads + 2 * kv_heads, dim)
        turned = mixed[:, : heads + kv_heads]  # queries and keys: [tokens, heads + kv_heads, dim]
        if self._query_norm is not None and self._key_norm is not None:
            turned = torch.cat([self._query_norm(turned[:, :heads]), self._key_norm(turned[:, heads:])], 1)
        swapped = torch.cat([turned[..., dim // 2 :], turned[..., : dim // 2]], -1)
        turned = (turned * placement.cos).add_(swapped.mul_(placement.sin))
        new_keys = turned[:, heads:].transpose(0, 1)  # [kv_heads, tokens, dim]
        new_values = mixed[:, heads + kv_heads :].transpose(0, 1)
        keys, values = cache.write(index, new_keys, new_values)
        seen = attend(turned[:, :heads].transpose(0, 1), keys, values, mask)  # [heads, tokens, dim]
        return self._out(seen.transpose(0, 1).reshape(tokens, heads * dim))


def _check_weights(config: ModelConfig, weights: Mapping[str, Tensor], layers: range) -> None:
    for name, shape in stage_tensors(config, layers).items():
        if name not in weights:
            raise WeightsError(f"the model has no tensor {name}")
        if tuple(weights[name].shape) != shape:
            raise WeightsError(
                f"tensor {name} is {list(weights[name].shape)}, config.json says {list(shape)}"
            )
