"""Memory: bytes of weights, and the most that one call holds above them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights' files in a folder, maps and all: what a download takes."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def activation_peak(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call holds at once, above what was there before it.

    On CUDA the allocator knows. Elsewhere it is the peak of the tensors that operators return;
    what an operator uses inside itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveStorages() as live:
        call()
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages that operators make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _key(leaf) not in self._seen | given:
                self._hold(leaf.untyped_storage())
        return result

    def _hold(self, storage: Any) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._seen.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.held -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
