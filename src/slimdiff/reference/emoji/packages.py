"""Makes the atlases of glyphs: `python -m slimdiff.reference.emoji.packages PACKAGES OUT`.

PACKAGES is a folder of three unpacked npm packages (`npm pack NAME@VERSION`, `tar xf`), `google`,
`twitter` and `fluent`: emoji-datasource-google 16.0.0 (Noto Emoji, Apache-2.0),
emoji-datasource-twitter 16.0.0 (Twemoji, CC-BY 4.0) and @lobehub/fluent-emoji-3d 1.1.0 (Fluent
Emoji, MIT). Names are Unicode's; glyphs of one skin tone are Fluent's alone.
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimdiff.reference.emoji.glyphs import LIST, SIDE, STYLES, places_of, to_atlas

SETS = {"noto": "google", "twemoji": "twitter"}
"""Styles whose pictures lie in a datasource package, and its name."""

TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}
QUALITY, COVERAGE_QUALITY = 41, 30
"""Of the bundled atlases, which a clone must not wait for; to train on, 92 and 100 are better."""


def plain(name: str) -> str:
    """A Unicode name in lower-case ASCII words, digits among them."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return " ".join(re.sub(r"[^a-z0-9 ]+", " ", letters).split())


def glyph_files(packages: Path) -> dict[tuple[str, str], Path]:
    """(style, name) -> picture, in the order by which glyphs are numbered."""
    table = json.loads((packages / "google" / "package" / "emoji.json").read_text(encoding="utf-8"))
    named = [(plain(entry["name"] or entry["short_name"]), entry) for entry in table]
    files: dict[tuple[str, str], Path] = {}
    for name, entry in named:
        for style, package in SETS.items():
            path = packages / package / "package" / "img" / package / "64" / entry["image"]
            if name and path.is_file():
                files.setdefault((style, name), path)
    assets = packages / "fluent" / "package" / "assets"
    for name, entry in named:
        for tone, code in _codes(entry):
            path = assets / f"{code.lower()}.webp"
            if name and path.is_file():
                files.setdefault(("fluent", f"{name} {tone}".strip()), path)
    return files


def _codes(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Skin tone or nothing, and a code of the emoji with it; codes of one tone: the best first."""
    yield from (("", code) for code in (entry["unified"], entry.get("non_qualified")) if code)
    for tones, variation in (entry.get("skin_variations") or {}).items():
        if tones in TONES:
            yield TONES[tones], variation["unified"]


def picture(path: Path) -> NDArray[np.uint8]:
    """A picture file as (64, 64, 4), resized with its colours weighed by their coverage."""
    from PIL import Image

    with Image.open(path) as image:
        straight = np.asarray(image.convert("RGBA"), np.float32) / 255
    if straight.shape[:2] == (SIDE, SIDE):
        return _bytes(straight)
    weighed = np.concatenate([straight[..., :3] * straight[..., 3:], straight[..., 3:]], -1)
    planes = [Image.fromarray(weighed[..., k]) for k in range(4)]
    resized = [np.asarray(p.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for p in planes]
    small = np.stack(resized, -1).clip(0, 1)
    colour = np.where(small[..., 3:] > 1e-3, small[..., :3] / small[..., 3:].clip(1e-3), 0)
    return _bytes(np.concatenate([colour, small[..., 3:]], -1))


def _bytes(shares: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.rint(shares.clip(0, 1) * 255).astype(np.uint8)


def make_atlases(packages: Path, out: Path, quality: int, coverage_quality: int) -> int:
    """Write the list and an atlas for each style to `out`; how many glyphs there are."""
    from PIL import Image

    files = glyph_files(packages)
    names, paths = list(files), list(files.values())
    out.mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        atlas = to_atlas(np.stack([picture(paths[i]) for i in places_of(names, style)]))
        how: dict[str, Any] = {"quality": quality, "alpha_quality": coverage_quality, "method": 6}
        Image.fromarray(atlas).save(out / f"{style}.webp", **how)
    lines = "".join(f"{style} {name}\n" for style, name in names)
    (out / LIST).write_text(lines, encoding="utf-8")
    return len(names)


def main() -> None:
    """Make what the command line says."""
    parser = argparse.ArgumentParser(description="Make the atlases of glyphs.")
    parser.add_argument("packages", type=Path, help="folder of google, twitter and fluent")
    parser.add_argument("out", type=Path, help="folder for the atlases")
    parser.add_argument("--quality", type=int, default=QUALITY, help="of WebP, 0 to 100")
    help = "of coverage, 0 to 100 (lossless)"
    parser.add_argument("--coverage-quality", type=int, default=COVERAGE_QUALITY, help=help)
    options = parser.parse_args()
    make_atlases(options.packages, options.out, options.quality, options.coverage_quality)


if __name__ == "__main__":
    main()
