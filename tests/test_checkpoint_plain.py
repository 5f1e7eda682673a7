"""Saved folders in plain diffusers: another process, in which slimdiff cannot be imported."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from slimdiff.checkpoint import load, load_pipeline, save_pipeline
from slimdiff.slim_denoiser import MODULE
from tiny_pipeline import TIED, UNTIED, image, slim_by_hand, tiny_pipeline

CHILD = """
import json, sys
from pathlib import Path


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "slimdiff":
            raise ImportError("slimdiff is not installed here")


sys.meta_path.insert(0, Block())

import numpy as np
import torch
from diffusers import AutoModel, DiffusionPipeline, StableDiffusionPipeline

sys.path.insert(0, {tests!r})
from tiny_pipeline import TIED, UNTIED, image

torch.set_num_threads(1)
root = Path({root!r})
facts = {{}}


def open_(name, **options):
    pipe = DiffusionPipeline.from_pretrained(root / name, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(one, other):
    theirs = other.state_dict()
    return all(
        v.dtype == theirs[k].dtype and torch.equal(v, theirs[k])
        for k, v in one.state_dict().items()
    )


first = open_("slim")
np.save(root / "plain.npy", image(first))
facts["class"] = [type(first.unet).__module__, type(first.unet).__name__]
facts["processors"] = [
    type(first.unet.get_submodule(path).processor).__name__ for path in (TIED, UNTIED)
]

first.save_pretrained(root / "again")
again = open_("again", device_map="cpu")
np.save(root / "again.npy", image(again))
facts["same weights"] = same(first.unet, again.unet)
facts["index"] = json.loads((root / "again/model_index.json").read_text())["unet"]

np.save(root / "half.npy", image(open_("half", variant="fp16", torch_dtype=torch.float16)))
brain = open_("slim", torch_dtype=torch.bfloat16)
np.save(root / "brain.npy", image(brain))
brain.save_pretrained(root / "brain", variant="bf16", max_shard_size="200KB")
facts["shards"] = len(list((root / "brain/unet").glob("diffusion_pytorch_model.bf16-0*")))
shards = open_("brain", variant="bf16", torch_dtype=torch.bfloat16)
facts["same shards"] = same(brain.unet, shards.unet)

slow = type(first.unet).from_pretrained(root / "slim/unet", low_cpu_mem_usage=False)
facts["without accelerate"] = same(slow, first.unet)
bare = AutoModel.from_pretrained(str(root / "slim/unet"), trust_remote_code=True)
facts["bare"] = [type(bare).__name__, same(bare, first.unet)]
passed = StableDiffusionPipeline.from_pretrained(root / "slim", unet=bare)
facts["passed"] = passed.unet is bare

for name, options in (("untrusted", {{}}), ("future", {{"trust_remote_code": True}})):
    try:
        DiffusionPipeline.from_pretrained(root / name.replace("untrusted", "slim"), **options)
    except Exception as error:
        facts[name] = str(error)
facts["imported"] = sorted(name for name in sys.modules if name.startswith("slimdiff"))
(root / "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders saved here and used there: what the other process saw is beside them."""
    root = tmp_path_factory.mktemp("plain")
    pipe = slim_by_hand(tiny_pipeline())
    np.save(root / "expected.npy", image(pipe))
    save_pipeline(pipe, root / "slim")
    config = save_pipeline(pipe, root / "future") / "unet/config.json"
    data = json.loads(config.read_text())
    data["slimdiff"]["version"] = 99
    config.write_text(json.dumps(data))
    for dtype, name in ((torch.bfloat16, "brain"), (torch.float16, "half")):
        other = slim_by_hand(tiny_pipeline()).to(dtype)
        np.save(root / f"expected_{name}.npy", image(other))
        if name == "half":
            save_pipeline(other, root / "half", variant="fp16")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "1"}
    script = CHILD.format(root=str(root), tests=os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def facts(root):
    return json.loads((root / "facts.json").read_text())


def arrays(root, *names):
    return [np.load(root / f"{name}.npy") for name in names]


def test_plain_diffusers_gives_bit_identical_images(root, facts):
    expected, plain, again = arrays(root, "expected", "plain", "again")
    assert (plain == expected).all() and (again == expected).all()
    assert facts["imported"] == []


@pytest.mark.parametrize("dtype", ["half", "brain"])
def test_and_in_half_precision(root, dtype):
    expected, plain = arrays(root, f"expected_{dtype}", dtype)
    assert (plain == expected).all()


def test_it_uses_the_slim_class_and_stock_processors_where_tied(facts):
    assert facts["class"] == [MODULE, "SlimUNet2DConditionModel"]
    assert facts["processors"] == ["AttnProcessor2_0", "SlimAttnProcessor"]


def test_what_it_saves_loads_again_there_and_here(root, facts):
    assert facts["index"] == [MODULE, "SlimUNet2DConditionModel"]
    assert facts["same weights"] and facts["same shards"] and facts["shards"] > 2
    expected, here = *arrays(root, "expected"), load_pipeline(root / "again")
    assert (image(here) == expected).all()
    original = load(root / "slim/unet").slim_record
    assert here.unet.slim_record.plan == original.plan
    assert all(torch.equal(v, original.maps[k]) for k, v in here.unet.slim_record.maps.items())
    shards = load_pipeline(root / "brain", variant="bf16", torch_dtype=torch.bfloat16)
    assert shards.unet.dtype == torch.bfloat16
    assert shards.unet.get_submodule(TIED).scale == 8**-0.5
    assert type(shards.unet.get_submodule(UNTIED).processor).__name__ == "SlimAttnProcessor"


def test_other_ways_to_load_it(facts):
    assert facts["without accelerate"] and facts["passed"]
    assert facts["bare"] == ["SlimUNet2DConditionModel", True]


def test_errors_name_the_folder_and_the_fix(root, facts):
    assert "trust_remote_code=True" in facts["untrusted"]
    assert f"{root}/future/unet: slim config version 99" in facts["future"]
    assert "upgrade slimdiff" in facts["future"]
