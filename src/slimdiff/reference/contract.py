"""What reference pipelines differ in: all that training and export ask of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from slimdiff.reference.objective import Denoising


class Reference(Protocol):
    """A reference pipeline's networks, objective and assembly.

    Its trained networks go by two names everywhere: "text", whatever turns captions into
    conditioning, and `denoiser`, the pipeline's own name for its denoiser.
    """

    @property
    def denoiser(self) -> str:
        """The denoiser's name in the pipeline."""

    @property
    def sampling(self) -> Mapping[str, dict[str, Any]]:
        """Ways to call the pipeline that its model card reports; images are made by the first."""

    def vae(self) -> Any:
        """The untrained autoencoder."""

    def networks(self) -> dict[str, nn.Module]:
        """The untrained networks "text" and `denoiser`."""

    def states(self, text: nn.Module, tokens: Tensor) -> Tensor:
        """What the denoiser sees of tokens (n, 20): (n, 20, width)."""

    def is_matrix(self, name: str, parameter: Tensor) -> bool:
        """Whether Muon trains the parameter, named "text.…" or after the denoiser."""

    def denoising(self, networks: Mapping[str, nn.Module]) -> Denoising:
        """The objective on `networks`, which are put into the form that trains fastest."""

    def assemble(self, vae: Any, networks: Mapping[str, nn.Module], scaling: float) -> Any:
        """The pipeline, its latents those of `vae` times `scaling`."""

    def describe(self, pipe: Any) -> dict[str, str]:
        """What its networks and scheduler are, by component: for the model card."""

    @property
    def training(self) -> str:
        """How the denoiser was trained: for the model card."""
