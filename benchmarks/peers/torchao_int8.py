"""Weights of all linears as int8, by torchao: one scale a row, arithmetic in the model's dtype.

torchao's `Int8WeightOnlyConfig` at its defaults, which quantises every linear of the denoiser, not
attention and feed-forward alone, and no convolution. It keeps all parameters: what it saves is
bytes, and it goes on top of any slim denoiser.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from peers.job import Job


def int8_of(job: Job) -> nn.Module:
    """The dense denoiser with int8 weights."""
    return int8(job.pipe.unet)


def int8(denoiser: nn.Module) -> nn.Module:
    """A copy of any denoiser, dense or slim, with int8 weights in its linears."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantised = copy.deepcopy(denoiser)
    quantize_(quantised, Int8WeightOnlyConfig(set_inductor_config=False))
    return quantised


def weight_bytes(module: nn.Module) -> int:
    """Bytes that parameters and buffers hold; of a quantised one, its integers and scales."""
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: Tensor) -> int:
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    inner = (getattr(tensor, name) for name in names)
    return sum(_bytes(part) for part in inner if isinstance(part, torch.Tensor))
