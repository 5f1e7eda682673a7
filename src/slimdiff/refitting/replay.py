"""Replay: a denoiser that runs on the same calls again and again, what is final only once.

Layers are refit in the order in which they run. What a module puts out before the first layer that
is still to be refit stays as it is: it is kept, and the module is skipped from then on. What is
kept inside a module goes once the module's own output is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimdiff.forwards import replacing
from slimdiff.refitting.sites import Site, watching

Call = tuple[tuple, dict[str, Any]]


class _Reached(Exception):
    """Ends a run where all has been seen."""


class Replay:
    """Runs of a denoiser on calls, given by their keyword arguments.

    Attributes:
        model: the denoiser; between runs its weights may change.
        calls: of equal arguments in every run.
    """

    def __init__(
        self, model: nn.Module, calls: Sequence[Mapping[str, Any]], pending: Sequence[str]
    ) -> None:
        """`pending` are the paths of the layers that will change, in the order they run."""
        self.model, self.calls = model, calls
        self._pending = dict.fromkeys(pending)
        self._kept: list[dict[str, Any]] = [{} for _ in calls]
        self._index, self._clean = 0, True

    def finish(self, path: str) -> None:
        """Say that the layer at `path` will not change any more."""
        self._pending.pop(path, None)

    @contextlib.contextmanager
    def keeping(self, paths: Sequence[str]) -> Iterator[None]:
        """Keep what the modules at `paths` put out, for runs inside; each runs once in a call."""
        modules = {path: self.model.get_submodule(path) for path in paths}
        handles = [self._marking(path) for path in self._pending]
        try:
            with replacing(modules, self._skipping):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._kept = [{} for _ in self.calls]

    def run(self, index: int) -> Any:
        """Output of a call."""
        self._index, self._clean = index, True
        with torch.inference_mode():
            return self.model(**self.calls[index])

    def seen(
        self, index: int, layers: Sequence[str], site: Site
    ) -> tuple[Call, list[Tensor], Tensor]:
        """Arguments of the first of some layers in a call, what each puts out, and the tensor that
        passes at `site`.

        The run ends there.
        """
        met: list[Call] = []
        outputs: list[Tensor] = []
        stream: list[Tensor] = []

        def note(_module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> None:
            met.append((args, kwargs))
            outputs.append(y)

        def see(tensor: Tensor) -> None:
            stream.append(tensor)
            raise _Reached

        modules = [self.model.get_submodule(path) for path in layers]
        handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
        try:
            with watching(self.model, site, see), contextlib.suppress(_Reached):
                self.run(index)
        finally:
            for handle in handles:
                handle.remove()
        return met[0], outputs, stream[0]

    def _marking(self, path: str) -> Any:
        """What comes after a layer that is still to change is not final."""

        def mark(_module: nn.Module, _args: tuple) -> None:
            self._clean = self._clean and path not in self._pending

        return self.model.get_submodule(path).register_forward_pre_hook(mark)

    def _skipping(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            kept = self._kept[self._index]
            if path not in kept:
                output = forward(*args, **kwargs)
                if not self._clean:
                    return output
                for inner in [own for own in kept if own.startswith(f"{path}.")]:
                    del kept[inner]
                kept[path] = output
            return kept[path]

        return run
