"""Slim text encoders: from the command line, beside a slim denoiser, and in plain diffusers."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import slimdiff
from slimdiff import slim_denoiser
from slimdiff.cli import main
from slimdiff.evaluate.sampling import encode
from slimdiff.shapes import slim_config
from slimdiff.slim_text_encoder import MODULE, SlimConfigError, become_slim_, reshape_, slim_class
from tiny_models import TINY_MODELS
from tiny_pipeline import image, tiny_pipeline, tiny_sd3_pipeline

QUICK = ("--steps", "2", "--num-probes", "4", "--device", "cpu", "--no-report")

PLAIN = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
from tiny_pipeline import image

torch.set_num_threads(1)
folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
np.save(f"{out}/first.npy", image(pipe))
pipe.save_pretrained(f"{out}/again")
np.save(f"{out}/second.npy", image(DiffusionPipeline.from_pretrained(
    f"{out}/again", trust_remote_code=True
)))
try:
    DiffusionPipeline.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded without trust_remote_code")
assert not any(name.startswith("slimdiff") for name in sys.modules)
"""


def shell(*arguments: Any) -> subprocess.CompletedProcess[str]:
    settings = {"COLUMNS": "120", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | settings,
        cwd=Path(__file__).parent,
    )


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "tiny"
    tiny_pipeline(seed=0).save_pretrained(folder)
    (folder.parent / "prompts.txt").write_text("a cat\na dog\nthe sea\na tram\n")
    return folder


def options(dense: Path, out: Path, *more: str) -> list[Any]:
    prompts = dense.parent / "prompts.txt"
    return ["compress", dense, "--prompts", prompts, "-o", out, *QUICK, *more]


@pytest.fixture(scope="module")
def slim(dense: Path) -> Path:
    """Its text encoder is slim, its denoiser dense."""
    out = dense.parent / "slim"
    more = ("--component", "text_encoder", "--params", "0.8")
    done = shell("-m", "slimdiff", *options(dense, out, *more))
    assert done.returncode == 0, done.stderr
    assert "error of the encoder's output on held-out prompts" in done.stdout
    assert "velocity" not in done.stdout
    return out


def quietly(*arguments: Any) -> int:
    """The command line in this process: its exit code."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return int(exit.value.code or 0)


def test_a_slim_text_encoder_loads_here_and_in_plain_diffusers(
    dense: Path, slim: Path, tmp_path: Path
) -> None:
    pipe, before = slimdiff.load_pipeline(slim), slimdiff.load_pipeline(dense)
    assert type(pipe.text_encoder).__name__ == "SlimCLIPTextModel"
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    assert parameters(pipe.text_encoder) <= 0.8 * parameters(before.text_encoder)
    plan = pipe.text_encoder.slim_record.plan
    assert plan.figures["params"] == parameters(pipe.text_encoder)
    assert plan.figures["component"] == "text_encoder"
    index = json.loads((slim / "model_index.json").read_text())
    assert index["text_encoder"] == [MODULE, "SlimCLIPTextModel"]
    assert f"text_encoder/{MODULE}.py" in (slim / "README.md").read_text()

    done = shell("-c", PLAIN, slim, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    mine, theirs = image(pipe), image(before)
    for name in ("first", "second"):
        assert np.abs(np.load(tmp_path / f"{name}.npy") - mine).max() < 1e-4
    assert np.abs(mine - theirs).max() > 1e-4
    again = tmp_path / "again" / "text_encoder"
    assert slimdiff.load(again).slim_record.plan == plan  # all of the folder came along


@pytest.mark.parametrize("first", ["text_encoder", "unet"])
def test_denoiser_and_text_encoder_one_after_the_other(
    dense: Path, tmp_path: Path, first: str
) -> None:
    second = {"text_encoder": "unet", "unet": "text_encoder"}[first]
    one, both = tmp_path / "one", tmp_path / "both"
    smaller = ("--params", "0.9", "--allocation", "uniform")
    alike = ("--guidance", "2.5")
    assert quietly(*options(dense, one, *smaller, *alike, "--component", first)) == 0
    again = options(dense, both, *smaller, *(("--component", second) if "text" in second else ()))
    again[1] = one
    assert quietly(*again) == 0
    plans = [slimdiff.Plan.read(both / name / "slimdiff.json") for name in (first, second)]
    sampled = [plan.figures["calibration"]["config"]["guidance_scale"] for plan in plans]
    assert sampled == [2.5, 2.5]  # the second compression samples as the first one did
    pipe, before = slimdiff.load_pipeline(both), slimdiff.load_pipeline(dense)
    for name in (first, second):
        module = getattr(pipe, name)
        assert parameters(module) <= 0.9 * parameters(getattr(before, name))
        assert module.slim_record.plan.figures["params"] == parameters(module)
    card = (both / "README.md").read_text()
    assert f"{MODULE}.py" in card and f"{slim_denoiser.MODULE}.py" in card
    alone = slimdiff.load(one / first).state_dict()
    assert all(torch.equal(v, alone[k]) for k, v in getattr(pipe, first).state_dict().items())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--component", "vae"), "expected one of unet, transformer, text_encoder"),
        (
            ("--component", "text_encoder_2"),
            "no component 'text_encoder_2' that can shrink; expected one of unet, text_encoder",
        ),
        (("--component", "text_encoder", "--params", "0.1"), "the smallest possible is"),
        (("--component", "text_encoder", "--speedup", "2"), "only denoisers are timed"),
        (("--component", "text_encoder", "--timestep-weights", "log"), "sees no timesteps"),
        (("--component", "text_encoder", "--layers", "resnet"), "has no layer of resnet"),
    ],
)
def test_what_cannot_work_is_said(
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    words: str,
) -> None:
    assert quietly(*options(dense, tmp_path / "out", *more)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_slim_encoder_is_slimmed_again(slim: Path, tmp_path: Path) -> None:
    arguments = options(slim.parent / "tiny", tmp_path / "out", "--component", "text_encoder")
    arguments[1] = slim
    assert quietly(*arguments) == 0
    before, after = (slimdiff.load(f / "text_encoder") for f in (slim, tmp_path / "out"))
    assert parameters(after) <= 0.9 * parameters(before)
    plan = after.slim_record.plan
    assert plan.figures["params_dense"] == before.slim_record.plan.figures["params_dense"]


def test_inspect_shows_an_encoder(slim: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quietly("inspect", slim, "--component", "text_encoder", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["denoiser"] == "SlimCLIPTextModel"
    assert {group["kind"] for group in found["groups"]} == {
        "query_key",
        "value_output",
        "feed_forward",
    }
    assert found["params"] == parameters(slimdiff.load(slim / "text_encoder"))


def test_an_encoder_of_an_unknown_class_is_refused() -> None:
    pipe = tiny_pipeline()
    pipe.text_encoder = nn.Linear(2, 2)
    with pytest.raises(slimdiff.SlimdiffError, match="no family describes Linear; known: .*CLIP"):
        slimdiff.compress(pipe, ["a"], slimdiff.Budget(params=0.9), component="text_encoder")


def test_encoders_read_what_they_would_to_draw() -> None:
    """Prompts and, with guidance, the empty prompt; nothing is drawn."""
    pipe, seen, drawn = tiny_pipeline(), [], []
    pipe.text_encoder.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    pipe.unet.register_forward_hook(lambda *_: drawn.append(1))
    encode(pipe, ["a cat", "a dog", "the sea"], guidance_scale=5.0)
    assert [len(ids) for ids in seen] == [3, 3] and not drawn
    seen.clear()
    encode(pipe, ["a cat"], guidance_scale=1.0)
    assert [len(ids) for ids in seen] == [1]


def test_all_three_encoders_of_a_pipeline(tmp_path: Path) -> None:
    """Two CLIPs whose last but one hidden states are used, and a T5; as a variant, in 16 bits."""
    pipe, before = tiny_sd3_pipeline(), tiny_sd3_pipeline()
    how = slimdiff.CalibrationConfig(
        num_inference_steps=2, num_probes=4, guidance_scale=4.0, max_sequence_length=24
    )
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    for name in names:
        budget = slimdiff.Budget(params=0.8)
        plan = slimdiff.compress(pipe, ["a cat", "the sea"], budget, component=name, config=how)
        assert parameters(getattr(pipe, name)) == plan.figures["params"]
        assert plan.figures["params"] <= 0.8 * parameters(getattr(before, name))
        assert plan.figures["error_on_probes"] < 0.05
    out = slimdiff.save_pipeline(pipe, tmp_path / "slim", variant="fp16")
    loaded = slimdiff.load_pipeline(out, variant="fp16")
    latents = [image(p, max_sequence_length=24, output_type="latent") for p in (pipe, loaded)]
    assert torch.equal(*latents)
    brain = slimdiff.load_pipeline(out, variant="fp16", torch_dtype=torch.bfloat16)
    assert {p.dtype for name in names for p in getattr(brain, name).parameters()} == {
        torch.bfloat16
    }


def test_a_damaged_encoder_is_refused(slim: Path, tmp_path: Path) -> None:
    shutil.copytree(slim, tmp_path / "slim")
    code = tmp_path / "slim" / "text_encoder" / f"{MODULE}.py"
    code.write_text(code.read_text() + "\n# altered\n")
    with pytest.raises(slimdiff.SlimdiffError, match=f"{MODULE}.py: "):
        slimdiff.load_pipeline(tmp_path / "slim")
    with pytest.raises(slimdiff.SlimdiffError, match="model.fp16.safetensors: no such file"):
        slimdiff.load(slim / "text_encoder", variant="fp16")


def narrow(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny encoder and a slim config that halves its first attention layer."""
    model, _ = TINY_MODELS[name]()
    groups = slimdiff.groups_of(model)
    layer = groups[0].layer
    entries = {
        g.name: slimdiff.Entry(g.kind, g.width // 2, g.width, g.heads, g.heads)
        for g in groups
        if g.layer == layer
    }
    return model, slim_config(model, groups, entries)


@pytest.mark.parametrize("name", ["clip_text", "clip_text_projection", "t5"])
def test_wrong_shapes_are_refused(name: str) -> None:
    model, config = narrow(name)
    with pytest.raises(SlimConfigError, match="put the narrow weights in first"):
        become_slim_(model, config)
    (path,) = config["attentions"]
    for sizes, words in (
        ({"heads": 2, "qk": 8, "vo": 4}, "takes one width"),
        ({"heads": 2, "qk": 4, "vo": 4}, "contradicts itself"),
    ):
        with pytest.raises(SlimConfigError, match=words):
            reshape_(copy.deepcopy(model), config | {"attentions": {path: sizes}})
    with pytest.raises(SlimConfigError, match="has no such Linear"):
        reshape_(model, config | {"linears": {"nowhere": [1, 1]}})
    with pytest.raises(SlimConfigError, match="upgrade slimdiff"):
        reshape_(model, config | {"version": 99})
    with pytest.raises(SlimConfigError, match="is a .*MLP|is a .*Dense|expected one of"):
        reshape_(model, config | {"attentions": {groupless(model): {"heads": 1, "qk": 1, "vo": 1}}})


def groupless(model: nn.Module) -> str:
    """The path of a layer that is no attention."""
    return next(g.layer for g in slimdiff.groups_of(model) if g.kind == "feed_forward")


def test_only_classes_of_transformers_have_slim_ones() -> None:
    with pytest.raises(TypeError, match="Linear is not a model class of transformers"):
        slim_class(nn.Linear)


@pytest.mark.parametrize("name", ["clip_text", "t5"])
def test_a_slim_encoder_still_gives_hidden_states(name: str) -> None:
    """transformers finds what to capture by the class; here it has not run before it is slim."""
    model, inputs = TINY_MODELS[name]()
    twin = copy.deepcopy(model)
    with slimdiff.record(twin) as statistics:
        for call in inputs:
            twin(**call)
    plan = slimdiff.allocate(model, statistics, slimdiff.Budget(params=0.9), allocation="uniform")
    slimdiff.rewrite(model, statistics, plan)
    states = model(**inputs[0] | {"output_hidden_states": True}).hidden_states
    assert states is not None and len(states) == 4
