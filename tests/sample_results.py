"""Synthetic results: what `compress` and `evaluate` would write, the same every time."""

import base64
import io
import math
import random

from PIL import Image, ImageDraw

from slimdiff import results

PLACES = ("down_blocks.0", "down_blocks.1", "up_blocks.1", "up_blocks.2", "mid_block")
LAYERS = {"attn1.qk": "query_key", "attn1.vo": "value_output", "attn2.qk": "query_key"}
LAYERS |= {"attn2.vo": "value_output", "ff": "feed_forward", "resnets.0": "resnet"}
UNITS = {"feed_forward": 512, "resnet": 128}
HOSTILE = "<script>alert('1')</script> & a \"red\" ring"
REST = {"params": 7_250_244, "macs": 464_000_000}


def group_of(place, layer, seed):
    """A group whose error falls with its width, and the width that was chosen."""
    random_ = random.Random(seed)
    kind = LAYERS[layer]
    heads = 1 if kind in UNITS else 2 if place.endswith(("0", "2")) else 4
    dense = UNITS.get(kind) or {2: 48, 4: 40}[heads]
    width = max(1, round(dense * random_.uniform(0.35, 1.0)))
    scale, fall = 10 ** random_.uniform(-3, -1), random_.uniform(6, 14)
    widths = sorted({round(dense * step / 24) for step in range(25)})
    errors = [scale * (math.exp(-fall * w / dense) - math.exp(-fall)) for w in widths]
    resnet = kind == "resnet"
    block = f"{place}.{layer}" if resnet else f"{place}.attentions.0.transformer_blocks.0"
    each = 2000 if resnet else 400
    return {
        "name": block if resnet else f"{block}.{layer}",
        "kind": kind,
        "block": block,
        "layer": block if resnet else layer.split(".")[0],
        "width": width,
        "dense_width": dense,
        "heads": heads,
        "dense_heads": heads,
        "params": each * heads * width,
        "params_dense": each * heads * dense,
        "macs": 90_000 * heads * width // 2,
        "macs_dense": 90_000 * heads * dense // 2,
        "gain": 10 ** random_.uniform(-4, -2),
        "curve": {"widths": widths, "errors": errors},
    }


def picture(number, shift):
    """A disc on a lit background as PNG in base64."""
    image = Image.new("RGB", (64, 64), (30 + 25 * number, 40, 90 - 12 * number))
    draw = ImageDraw.Draw(image)
    x, y = 10 + 7 * number + shift, 34 - 4 * number
    draw.ellipse((x, y, x + 18, y + 18), fill=(240, 190 - 20 * number, 60 + 25 * number))
    written = io.BytesIO()
    image.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def scenes(whole, interval):
    names = ("background", "colour", "shape", "size", "position")
    each = {
        name: {"share": whole + 0.001 * n, "interval": interval} for n, name in enumerate(names)
    }
    return {"whole": whole, "interval": interval, "attributes": each, "count": 512}


def made(command, **more):
    versions = {"slimdiff": "0.1.0", "torch": "2.13.0", "diffusers": "0.40.0"}
    told = {"date": "2026-01-02T03:04:05+00:00", "versions": versions, "python": "3.11.2"}
    return {"command": command, **told, "machine": "A CPU of 2 cores", "threads": 1, **more}


def compressed():
    """What `compress` knows."""
    groups = [group_of(place, layer, f"{place}{layer}") for place in PLACES for layer in LAYERS]
    figures = {
        metric: sum(group[metric] for group in groups) + REST[metric.split("_")[0]]
        for metric in ("params", "params_dense", "macs", "macs_dense")
    }
    figures |= {
        "predicted_error": 2.1e-7,
        "error_on_probes": 2.4e-7,
        "seconds": {"calibrate": 150.0, "allocate": 12.5, "rewrite": 0.8},
        "reused": [],
        "calibration": {
            "prompts": 128,
            "prompts_sha256": "a1b2c3",
            "config": {"num_inference_steps": 20, "guidance_scale": 3.0, "height": None},
        },
    }
    how = {"calibration": {"num_probes": 16}, "seed": 0, "prompts": 128}
    return {
        "made": made("slimdiff compress -o scenes-unet-slim --params 0.8", **how),
        "model": {
            "dense": "scenes-unet",
            "slim": "scenes-unet-slim",
            "class": "UNet2DConditionModel",
        },
        "plan": {
            "recipe": "slimdiff",
            "allocation": "probed",
            "budget": "80 % of the parameters",
            "figures": figures,
        },
        "groups": groups,
        "rest": REST,
        "prompt_counts": [
            {"prompts": n, "velocity_error": 3.1e-5 / n} for n in (1, 4, 16, 64, 128)
        ],
    }


def evaluated():
    """What `evaluate` knows."""
    whole = compressed()["plan"]["figures"]
    steps = [[1000 - 50 * n, 1e-8 * 10 ** (n / 9)] for n in range(20)]
    prompts = [f"a large red circle top left and a small ring, {n}" for n in range(5)] + [HOSTILE]
    return {
        "made": made("slimdiff evaluate scenes-unet scenes-unet-slim", dtype="float32", seed=7),
        "model": compressed()["model"],
        "fidelity": {
            "velocity": {"relative": 1.95e-7, "by_timestep": steps, "prompts": 64},
            "pictures": {
                "drawn": 64,
                "measured": 62,
                "left_out": {"dense": {"black": 0}, "slim": {"not_finite": 2}},
                "drawn_without": ["safety_checker"],
            },
            "images": {"psnr": 64.67, "ssim": 0.99978, "count": 62},
            "frechet": {"value": 0.0123, "features": "the judge's", "count": 512},
            "kernel": {"value": 0.00045, "features": "the judge's", "count": 512},
            "clip": {"unavailable": "no CLIP folder at clip-vit; give --clip FOLDER"},
            "scenes": {
                "dense": scenes(0.994, [0.983, 0.998]),
                "slim": scenes(0.982, [0.967, 0.991]),
            },
        },
        "cost": {
            "params": {"dense": whole["params_dense"], "slim": whole["params"]},
            "macs": {"dense": whole["macs_dense"], "slim": whole["macs"]},
            "bytes": {"dense": 39_344_400, "slim": 31_500_000},
            "peak_memory": {"unavailable": "no counter on this platform"},
            "latency": {
                "denoiser": {
                    "dense": 0.0417,
                    "slim": 0.0361,
                    "speedup": 1.155,
                    "runs": 11,
                    "of": "batch 2, 16 x 16 latents",
                },
                "pipeline": {
                    "dense": 1.71,
                    "slim": 1.49,
                    "speedup": 1.148,
                    "runs": 11,
                    "of": "20 steps, one prompt",
                },
            },
            "macs_allow": 1.21,
            "share_reached": 0.95,
        },
        "images": [
            {"prompt": prompt, "seed": 7 + n, "dense": picture(n, 0), "slim": picture(n, n % 2)}
            for n, prompt in enumerate(prompts)
        ],
    }


def complete():
    return results.merged([compressed(), evaluated()])
