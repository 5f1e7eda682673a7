"""What test_travelling_file runs in a process that cannot import slimdiff: facts about loading."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Block:
    """Has `import slimdiff` fail."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "slimdiff":
            raise ImportError("slimdiff is not installed here")


sys.meta_path.insert(0, Block())  # type: ignore[arg-type]  # old finders have no more

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoModel, DiffusionPipeline, UNet2DConditionModel  # noqa: E402

from tiny_pipeline import UNTIED, image, velocity  # noqa: E402


def open_(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def alone(folder: Path) -> Any:
    return AutoModel.from_pretrained(str(folder), trust_remote_code=True)


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The class of what a call returns, or its error."""
    try:
        return type(call(*args, **kwargs)).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def kinds(unet: Any) -> list[type]:
    layer = unet.get_submodule(UNTIED)
    return [type(unet), type(layer), type(layer.processor)]


def releases(root: Path) -> dict[str, Any]:
    """The same folder twice, one that another release saved, and one from before the hash."""
    first = open_(root / "slim")
    own, before = kinds(first.unet), image(first)
    second, other = open_(root / "slim"), open_(root / "other")
    drawn = {"first": before, "other": image(other), "earlier": image(open_(root / "earlier"))}
    for name, picture in drawn.items():
        np.save(root / f"{name}.npy", picture)
    return {
        "same classes": own == kinds(first.unet) == kinds(second.unet),
        "classes in common": [k.__name__ for k in kinds(other.unet) if k in own],
        "draws as before": bool((image(first) == before).all()),
        "alone": type(alone(root / "slim/unet")) is own[0],
    }


def worker(root: Path) -> bool:
    """Whether a spawned process computes with the model what this one does."""
    unet = alone(root / "slim/unet")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return bool(pool.apply(velocity, (unet,)) == velocity(unet))


def interrupted(root: Path, module: str) -> str:
    """Loading for the first time in a process, as another one begins to copy the file."""
    copy = shutil.copyfile

    def twice(source: Any, target: Any) -> None:
        copy(source, target)
        Path(target).write_text("")
        threading.Timer(0.2, copy, (source, target)).start()

    for name in [name for name in sys.modules if name.endswith(module)]:
        del sys.modules[name]
    shutil.copyfile = twice  # type: ignore[assignment]
    try:
        return outcome(alone, root / "slim/unet")
    finally:
        shutil.copyfile = copy


def main(root: Path, module: str) -> None:
    torch.set_num_threads(1)
    facts = releases(root)
    facts["vae"] = outcome(AutoModel.from_pretrained, str(root / "slim"), subfolder="vae")
    facts["dense"] = outcome(UNet2DConditionModel.from_pretrained, root / "slim", subfolder="unet")
    facts["worker"] = worker(root)
    facts["interrupted"] = interrupted(root, module)
    facts["altered"] = outcome(alone, root / "altered")
    facts["imported"] = sorted(name for name in sys.modules if name.startswith("slimdiff"))
    (root / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
