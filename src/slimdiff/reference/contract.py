"""What reference pipelines differ in: all that training and export ask of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from slimdiff.reference.objective import Denoising
from slimdiff.reference.optim import Rates
from slimdiff.reference.world import World


class Reference(Protocol):
    """A reference pipeline's world, networks, objective and assembly.

    Its trained networks go by two names everywhere: "text", whatever turns captions into
    conditioning, and `denoiser`, the pipeline's own name for its denoiser.
    """

    @property
    def world(self) -> World:
        """What it draws: captions, pictures and their judge."""

    @property
    def rates(self) -> Rates:
        """Learning rates of the networks."""

    @property
    def denoiser(self) -> str:
        """The denoiser's name in the pipeline."""

    @property
    def sampling(self) -> Mapping[str, dict[str, Any]]:
        """Ways to call the pipeline that its model card reports; images are made by the first.

        Each says all that differs from the pipeline's own defaults, but for the steps.
        """

    def vae(self) -> Any:
        """The untrained autoencoder."""

    def networks(self) -> dict[str, nn.Module]:
        """The untrained networks "text" and `denoiser`."""

    def states(self, text: nn.Module, tokens: Tensor) -> Tensor:
        """What the denoiser sees of tokens (n, length): (n, length, width)."""

    def is_matrix(self, name: str, parameter: Tensor) -> bool:
        """Whether Muon trains the parameter, named "text.…" or after the denoiser."""

    def denoising(self, networks: Mapping[str, nn.Module]) -> Denoising:
        """The objective on `networks`, which are put into the form that trains fastest."""

    def assemble(self, vae: Any, networks: Mapping[str, nn.Module], scaling: float) -> Any:
        """The pipeline, its latents those of `vae` times `scaling`."""

    def parts(self, pipe: Any) -> Mapping[str, nn.Module]:
        """The networks of a pipeline, by the names and paths of `networks`; undoes `assemble`."""

    def describe(self, pipe: Any) -> dict[str, str]:
        """What its networks and scheduler are, by component: for the model card."""

    @property
    def training(self) -> str:
        """How the denoiser was trained: for the model card."""
