"""ControlNetModel: the copy of a UNet's encoder that ControlNets run beside it."""

from collections.abc import Mapping
from typing import Any

from slimdiff.families import unet
from slimdiff.groups import Family, Shapes


def inputs(config: Mapping[str, Any]) -> Shapes:
    """Shapes of one forward: those of the UNet at 64 by 64 latents, and the control image."""
    shapes = unet.inputs({"sample_size": 64, **config})
    height, width = shapes["sample"][2:]
    control = (1, config["conditioning_channels"], 8 * height, 8 * width)
    return shapes | {"controlnet_cond": control}


FAMILY = Family(denoiser="ControlNetModel", blocks=unet.FAMILY.blocks, inputs=inputs)
