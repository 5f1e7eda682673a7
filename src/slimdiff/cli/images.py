"""`slimdiff generate` and `slimdiff compare`: images from a pipeline, dense or slim."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from slimdiff.cli import console, models, options
from slimdiff.errors import SlimdiffError

GENERATE = """Make images with a pipeline, dense or slim.

The seed alone decides an image's initial noise, whatever the batch size and the device.

**Examples**

- `slimdiff generate --prompt "a large red circle top left on navy background" --seed 7`
- `slimdiff generate scenes-unet-slim --prompts captions.txt -o out.png`
"""

COMPARE = """Draw the same prompts and seeds with two pipelines, dense above slim, in one PNG.

Also prints how alike the images are, if torchmetrics is installed (`slimdiff[metrics]`). They are
drawn without safety checker and watermark.

**Examples**

- `slimdiff compare scenes-unet scenes-unet-slim`
- `slimdiff compare ./stable-diffusion-v1-5 ./slim --prompt "a cat" --prompt "a tram" --steps 30`
"""

logger = logging.getLogger(__name__)

ImageOut = Annotated[
    Path, typer.Option("--out", "-o", help="PNG file; several images get -1, -2, ... before it.")
]
GridOut = Annotated[Path, typer.Option("--out", "-o", help="PNG file of the grid.")]


def generate(
    model: options.Model = None,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    seed: options.ImageSeed = 0,
    out: ImageOut = Path("image.png"),
    steps: options.Steps = 20,
    guidance: options.Guidance = None,
    text_tokens: options.TextTokens = None,
    batch_size: options.BatchSize = 4,
    height: options.Height = None,
    width: options.Width = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    variant: options.Variant = None,
) -> None:
    """Images of prompts; `GENERATE` is what the command line shows."""
    where = models.source(model)
    texts = _texts(where, prompt, prompts)
    out.parent.mkdir(parents=True, exist_ok=True)
    pipe = models.load(where, dtype, device, variant)
    call = models.sampling(where, guidance, text_tokens, pipe)
    images = _images(pipe, texts, seed, steps, batch_size, height=height, width=width, **call)
    for number, image in enumerate(images, start=1):
        name = out if len(images) == 1 else out.with_stem(f"{out.stem}-{number}")
        image.save(name)
        if not image.convert("L").getbbox():
            logger.warning(
                "warning: %s is wholly black; a safety checker does that, and NaN from a VAE in "
                "half precision: --dtype float32 or bfloat16 has none",
                name,
            )
        console.out().print(f"{name}: {texts[number - 1]}", soft_wrap=True, markup=False)


def compare(
    dense: options.Dense,
    slim: options.Slim,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    num_prompts: options.NumPrompts = 6,
    seed: options.ImageSeed = 0,
    out: GridOut = Path("compare.png"),
    steps: options.Steps = 20,
    guidance: options.Guidance = None,
    text_tokens: options.TextTokens = None,
    batch_size: options.BatchSize = 4,
    height: options.Height = None,
    width: options.Width = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    variant: options.Variant = None,
) -> None:
    """Dense above slim; `COMPARE` is what the command line shows."""
    sources = {"dense": models.source(dense), "slim": models.source(slim)}
    where = sources["dense"]
    texts = _texts(where, prompt, prompts, num_prompts)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Any]] = {}
    for label in ("slim", "dense"):  # slim first: it knows how it was calibrated
        pipe = models.load(sources[label], dtype, device, variant)
        call = models.sampling(where, guidance, text_tokens, pipe)
        guidance, text_tokens = call.values()
        given = {"height": height, "width": width, **call}
        rows[label] = _images(pipe, texts, seed, steps, batch_size, measured=True, **given)
    from slimdiff.picture import image_grid

    shown = {label: [picture.image for picture in rows[label]] for label in sources}
    image_grid(shown, texts).save(out)
    console.out().print(_likeness(rows), soft_wrap=True)
    console.out().print(f"{out}: {len(texts)} prompts, dense above slim", soft_wrap=True)


def _texts(
    where: models.Source, given: list[str] | None, path: Path | None, n: int | None = None
) -> list[str]:
    """Prompts of the command line, of a file, or `n` test prompts of the bundled reference."""
    if given and path is not None:
        raise SlimdiffError("--prompt and --prompts are both given; give one of them")
    if given:
        return given
    if path is None and n is None:
        raise SlimdiffError('nothing to draw; give --prompt "..." or --prompts FILE')
    return models.prompts(where, path, n, "test")


def _images(
    pipe: Any,
    prompts: list[str],
    seed: int,
    steps: int,
    batch_size: int,
    measured: bool = False,
    **call: Any,
) -> list[Any]:
    """Images, or if they are to be measured on, pictures drawn without what covers them."""
    from slimdiff.evaluate import generate
    from slimdiff.evaluate.pictures import draw

    run = draw if measured else generate
    return run(
        pipe,
        prompts,
        range(seed, seed + len(prompts)),
        num_inference_steps=steps,
        batch_size=batch_size,
        **call,
    )


def _likeness(rows: dict[str, list[Any]]) -> str:
    """How alike the pictures are, of the pairs that can be measured on."""
    from slimdiff.evaluate.pictures import fit_pairs, left_out_told
    from slimdiff.metrics import psnr, ssim

    fit, counted = fit_pairs(rows)
    told = left_out_told(counted)
    left = f"; {len(fit)} of {counted['drawn']} pairs measured ({told} left out)" if told else ""
    if not fit:
        return f"nothing to measure{left}"
    dense, slim = ([rows[label][i].image for i in fit] for label in ("dense", "slim"))
    try:
        decibels, similarity = psnr(slim, dense), ssim(slim, dense)
    except SlimdiffError as error:
        return str(error)
    return f"PSNR {decibels:.1f} dB, SSIM {similarity:.4f} to the dense images{left}"
