"""diffusers' own tests as a gate: what passes on dense models is to pass on slim ones.

    python benchmarks/peer_suite.py                     # fetches the tests of the installed version
    python benchmarks/peer_suite.py --tests DIR         # a checkout of diffusers, or its tests
    python benchmarks/peer_suite.py --tests DIR --only flux --only sd3

The tests of diffusers' models and pipelines run twice, dense and slim, on a CPU and offline: what
would fetch something is skipped. Needs the packages parameterized and requests-mock, and peft for
the tests of LoRA. The command ends with 1 if a test passes dense and fails slim for no reason that
peer_outcomes.py lists; docs/diffusers-tests.md is about those that it lists.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING

from peer_outcomes import Rows, compare, failures, slim_only, table, unexplained

if TYPE_CHECKING:
    from peer_plugin import Suite

HERE = Path(__file__).parent
ARCHIVE = "https://github.com/huggingface/diffusers/archive/refs/tags/{tag}.tar.gz"
MARKS = "not quantization and not compile and not context_parallel and not tensor_parallel"
GENERIC = "mixins on tiny models"

TRANSFORMERS = "models/transformers/test_models_"
FILES: dict[str, tuple[str, ...]] = {
    "unet": ("models/unets/test_models_unet_2d_condition.py",),
    "dit": (f"{TRANSFORMERS}dit_transformer2d.py",),
    "pixart": (f"{TRANSFORMERS}pixart_transformer2d.py",),
    "sd3": (f"{TRANSFORMERS}transformer_sd3.py",),
    "flux": (f"{TRANSFORMERS}transformer_flux.py",),
    "qwen_image": (f"{TRANSFORMERS}transformer_qwenimage.py",),
    "cogvideox": (f"{TRANSFORMERS}transformer_cogvideox.py",),
    "wan": (f"{TRANSFORMERS}transformer_wan.py",),
    "hunyuan_dit": (f"{TRANSFORMERS}transformer_hunyuan_dit.py",),
    "sana": (f"{TRANSFORMERS}transformer_sana.py",),
    "StableDiffusionPipeline": ("pipelines/stable_diffusion/test_stable_diffusion.py",),
    "StableDiffusionXLPipeline": ("pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py",),
    "StableDiffusionControlNetPipeline": ("pipelines/controlnet/test_controlnet.py",),
    "DiTPipeline": ("pipelines/dit/test_dit.py",),
    "PixArtAlphaPipeline": ("pipelines/pixart_alpha/test_pixart.py",),
    "StableDiffusion3Pipeline": (
        "pipelines/stable_diffusion_3/test_pipeline_stable_diffusion_3.py",
    ),
    "FluxPipeline": ("pipelines/flux/test_pipeline_flux.py",),
    "CogVideoXPipeline": ("pipelines/cogvideo/test_cogvideox.py",),
    "WanPipeline": ("pipelines/wan/test_wan.py",),
}
"""The files of diffusers' tests that are about a family, or about the pipeline of one."""


def fetched(tag: str, cache: Path) -> Path:
    """The tests of this tag, from GitHub into a cache folder."""
    name = f"diffusers-{tag.removeprefix('v')}"
    if not (cache / name).is_dir():
        url = ARCHIVE.format(tag=tag)
        print(f"fetching {url} into {cache / name}")
        with tempfile.TemporaryDirectory(dir=_made(cache)) as partial:
            with urllib.request.urlopen(url) as answer:
                extract(answer, Path(partial))
            (Path(partial) / name).rename(cache / name)
    return cache / name / "tests"


def extract(archive: IO[bytes], folder: Path) -> None:
    """The tests alone."""
    with tarfile.open(fileobj=archive, mode="r|gz") as members:
        for member in members:
            if member.name.split("/")[1:2] == ["tests"]:
                members.extract(member, folder, filter="data")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def located(given: Path) -> Path:
    """The tests in a checkout, or the folder itself."""
    tests = given if given.name == "tests" else given / "tests"
    if not (tests / "models" / "testing_utils").is_dir():
        raise SystemExit(f"{tests}: has no models/testing_utils; expected the tests of diffusers")
    return tests.resolve()


def run(paths: list[Path], tests: Path, slim: bool) -> Suite:
    """Run the tests in these files."""
    import pytest

    from peer_plugin import MADE, Suite

    suite, before = Suite(slim), len(MADE)
    options = ["-q", "-q", "--no-header", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore"]
    options += ["--no-summary", "-c", os.devnull, "--rootdir", str(tests.parent), "-m", MARKS]
    code = pytest.main([*options, *map(str, paths)], plugins=[suite])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {code!r}: the tests were not all collected and run")
    if slim and len(MADE) == before:
        raise SystemExit(f"{paths[0]}: no test asked for a slim model")
    return suite


def measured(paths: list[Path], tests: Path, log: Path) -> Rows:
    """Every test of these files, dense and slim; what slim failures say goes to a folder."""
    dense, slim = run(paths, tests, False), run(paths, tests, True)
    rows = compare(dense.outcomes, slim.outcomes, slim.said())
    _made(log)
    for name in slim_only(rows):
        place = log / f"{name.partition('::')[2].replace('/', '-')}.txt"
        place.write_text(slim.messages.get(name, "no message"), encoding="utf-8")
    return rows


def by_class(rows: Rows) -> dict[str, Rows]:
    """The rows of the test classes that peer_generic.py makes, by tiny model."""
    families: dict[str, Rows] = {}
    for name, row in rows.items():
        model = name.split("::")[1].removeprefix("Test_").partition("__")[0]
        families.setdefault(f"tiny {model}", {})[name] = row
    return families


def all_families(tests: Path, only: list[str] | None, log: Path) -> dict[str, Rows]:
    families: dict[str, Rows] = {}
    for family in only or [*FILES, GENERIC]:
        if family == GENERIC:
            families |= by_class(measured([HERE / "peer_generic.py"], tests, log / "tiny"))
        else:
            families[family] = measured(
                [tests / file for file in FILES[family]], tests, log / family
            )
    return families


def keep(families: dict[str, Rows], tag: str, path: Path) -> None:
    """Write the rows; those of other families stay, if they are of the same versions."""
    about = {"diffusers": version("diffusers"), "tests": tag}
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if {key: kept.get(key) for key in about} == about:
        families = kept["families"] | families
    text = json.dumps(about | {"families": families}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=Path, help="a checkout of diffusers, or its tests")
    parser.add_argument("--tag", default=f"v{version('diffusers')}", help="of the tests")
    parser.add_argument("--only", action="append", choices=[*FILES, GENERIC])
    parser.add_argument("--cache", type=Path, default=HERE / "cache" / "peer-suite")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_MODULES_CACHE"] = str(options.cache.resolve() / "modules")
    tests = located(options.tests or fetched(options.tag, options.cache))
    sys.path[:0] = [str(tests.parent), str(HERE.parent / "tests")]
    families = all_families(tests, options.only, options.cache / "failures")
    keep(families, options.tag, options.results / "peer-suite.json")
    print(f"\n{table(families)}\n\n{failures(families)}")
    sys.exit(bool(unexplained(families)))


if __name__ == "__main__":
    main()
