"""The file that is saved with a model, in a process that cannot import slimdiff."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from slimdiff import slim_denoiser, slim_text_encoder
from slimdiff.checkpoint import load, load_pipeline, save_pipeline
from slimdiff.slim_denoiser import MODULE, write_manifest
from tiny_pipeline import UNTIED, image, slim_by_hand, tiny_pipeline, velocity


def renamed(pipeline: Path, module: str, source: bytes) -> Path:
    """Have a pipeline's folder look as if another release had saved its denoiser."""
    for path in (pipeline / "model_index.json", pipeline / "unet/config.json"):
        path.write_text(path.read_text().replace(MODULE, module))
    (pipeline / f"unet/{MODULE}.py").unlink()
    (pipeline / f"unet/{module}.py").write_bytes(source)
    write_manifest(pipeline / "unet")
    manifest = pipeline / "unet/slimdiff_manifest.json"
    listed = json.loads(manifest.read_text())
    listed["files"][f"{module}.py"] = slim_denoiser.fingerprint(pipeline / f"unet/{module}.py")
    manifest.write_text(json.dumps(listed))
    return pipeline


def another_release() -> tuple[str, bytes]:
    """A release whose untied attention puts out twice as much."""
    source = Path(slim_denoiser.__file__).read_bytes()
    changed = source.replace(b"    output = _attend(attn, ", b"    output = 2 * _attend(attn, ")
    assert changed != source
    return f"slim_denoiser_{hashlib.sha256(changed).hexdigest()[:6]}", changed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders saved here and used there: what the other process saw is beside them."""
    root = tmp_path_factory.mktemp("travelling")
    pipe = slim_by_hand(tiny_pipeline())
    np.save(root / "expected.npy", image(pipe))
    source = Path(slim_denoiser.__file__).read_bytes()
    save_pipeline(pipe, root / "slim")
    renamed(save_pipeline(pipe, root / "other"), *another_release())
    renamed(save_pipeline(pipe, root / "earlier"), "slim_denoiser", source)
    shutil.copytree(root / "slim/unet", root / "altered")
    (root / f"altered/{MODULE}.py").write_bytes(b"# mended by hand\n" + source)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "1"}
    child = Path(__file__).with_name("travelling_child.py")
    done = subprocess.run(
        [sys.executable, child, root, MODULE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def facts(root):
    facts = json.loads((root / "facts.json").read_text())
    assert facts["imported"] == []
    return facts


def test_it_is_named_by_its_content(root):
    text = (root / f"slim/unet/{MODULE}.py").read_bytes()
    assert f"slim_denoiser_{hashlib.sha256(text).hexdigest()[:6]}" == MODULE
    assert text == Path(slim_denoiser.__file__).read_bytes()
    index = json.loads((root / "slim/model_index.json").read_text())
    assert index["unet"] == [MODULE, "SlimUNet2DConditionModel"]
    assert MODULE in (root / "slim/README.md").read_text()
    manifest = json.loads((root / "slim/unet/slimdiff_manifest.json").read_text())
    assert f"{MODULE}.py" in manifest["files"]


def test_loaded_again_it_defines_the_same_classes(root, facts):
    assert facts["same classes"] and facts["alone"]


def test_two_releases_live_side_by_side(root, facts):
    assert facts["classes in common"] == []
    assert facts["draws as before"]
    expected, first, other = (np.load(root / f"{n}.npy") for n in ("expected", "first", "other"))
    assert (first == expected).all()
    assert np.abs(other - first).max() > 1e-4


def test_folders_of_releases_before_still_load(root, facts):
    expected = np.load(root / "expected.npy")
    assert (np.load(root / "earlier.npy") == expected).all()
    assert (image(load_pipeline(root / "earlier")) == expected).all()


def test_components_load_alone(facts):
    assert facts["alone"]
    assert facts["vae"] == "AutoencoderKL"  # model_index.json has no auto_map that would break it


def test_the_dense_class_says_how_to_load_it(facts):
    assert "AutoModel.from_pretrained(folder, trust_remote_code=True)" in facts["dense"]
    assert "ignore_mismatched_sizes" not in facts["dense"]


def test_spawned_workers_get_the_model(facts):
    assert facts["worker"]


def test_it_loads_while_another_process_copies_it(facts):
    assert facts["interrupted"] == "SlimUNet2DConditionModel"


def test_an_altered_copy_is_not_taken_for_what_it_was(facts):
    assert facts["altered"].startswith("ImportError") and "was altered" in facts["altered"]


def test_the_folder_of_another_release_loads_here_by_this_ones_code(root, tmp_path):
    module, _ = another_release()
    pipe = load_pipeline(root / "other")
    assert type(pipe.unet) is slim_denoiser.SlimUNet2DConditionModel
    assert module not in sys.modules
    assert (image(pipe) == np.load(root / "expected.npy")).all()
    again = save_pipeline(pipe, tmp_path / "again")
    assert json.loads((again / "model_index.json").read_text())["unet"][0] == MODULE
    load(root / "other/unet").save_pretrained(root / "other/unet")  # over that release's file
    assert [path.stem for path in (root / "other/unet").glob("*.py")] == [MODULE]


def test_the_worker_sees_what_this_process_sees(root):
    unet = load_pipeline(root / "slim").unet
    assert velocity(unet) != velocity(tiny_pipeline().unet)
    assert type(unet.get_submodule(UNTIED).processor).__name__ == "SlimAttnProcessor"


def test_text_encoders_travel_the_same_way():
    text = Path(slim_text_encoder.__file__).read_bytes()
    name = f"slim_text_encoder_{hashlib.sha256(text).hexdigest()[:6]}"
    assert name == slim_text_encoder.MODULE and sys.modules[name] is slim_text_encoder
