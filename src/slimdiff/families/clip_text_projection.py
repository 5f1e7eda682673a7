"""CLIPTextModelWithProjection: the second text encoder of SDXL, the first two of SD3."""

from slimdiff.families import clip_text
from slimdiff.groups import Family

FAMILY = Family(
    denoiser="CLIPTextModelWithProjection",
    blocks=clip_text.FAMILY.blocks,
    inputs=clip_text.FAMILY.inputs,
    kept=clip_text.FAMILY.kept,
    text=True,
)
