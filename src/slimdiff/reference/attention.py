"""Attention processors for training: on CPU, explicit products have the fastest backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PlainAttention:
    """Self-attention or cross-attention by explicit products."""

    def __call__(
        self,
        attn: Any,
        x: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """Tokens (n, t, c) to tokens (n, t, c)."""
        context = x if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(x))
        key = attn.head_to_batch_dim(attn.to_k(context))
        value = attn.head_to_batch_dim(attn.to_v(context))
        shares = (torch.bmm(query * attn.scale, key.mT)).softmax(-1)
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(shares, value)))


class PlainJointAttention:
    """Joint attention by explicit products, in which the last context token stands for several.

    n equal tokens without a position draw the attention of one whose logits are larger by ln n.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        copies: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image (n, t, c) and context (n, s, c), whose last token stands for `copies` (n,)."""
        n, length, _ = hidden_states.shape
        own = (attn.to_q, attn.to_k, attn.to_v)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = (attn.norm_q, attn.norm_k, None), (attn.norm_added_q, attn.norm_added_k, None)
        image = [_heads(f(hidden_states), attn.heads, g) for f, g in zip(own, norms[0])]
        context = [_heads(f(encoder_hidden_states), attn.heads, g) for f, g in zip(added, norms[1])]
        joint = [torch.cat(pair, 1) for pair in zip(image, context)]
        query, key, value = [image[0], *joint[1:]] if attn.context_pre_only else joint
        bias = key.new_zeros(n, 1, key.shape[1])
        if copies is not None:
            bias[:, 0, -1] = copies.log()
        bias = bias.repeat_interleave(attn.heads, 0)
        shares = torch.baddbmm(bias, query, key.mT, alpha=attn.scale).softmax(-1)
        mixed = torch.bmm(shares, value).unflatten(0, (n, attn.heads)).transpose(1, 2).flatten(2)
        out = attn.to_out[0](mixed[:, :length])
        rest = mixed[:, length:]
        return out, rest if attn.context_pre_only else attn.to_add_out(rest)


def _heads(x: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
    """(n, t, heads * e) to (n * heads, t, e), normalised."""
    split = x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)
    return split if norm is None else norm(split)
