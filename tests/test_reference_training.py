"""The reference pipeline's training, at a tiny size."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimdiff.checkpoint import load_pipeline
from slimdiff.reference import REFERENCES
from slimdiff.reference.accuracy import Accuracy
from slimdiff.reference.attention import PlainJointAttention
from slimdiff.reference.card import Figures, card
from slimdiff.reference.contract import Reference
from slimdiff.reference.data import make_shard
from slimdiff.reference.dit import EMPTY_TOKENS, DitReference, build_scheduler
from slimdiff.reference.export import generate, load_average, save, trained_pipeline
from slimdiff.reference.judge import ATTRIBUTES
from slimdiff.reference.objective import draw_timesteps, loss_weights
from slimdiff.reference.optim import orthogonalise
from slimdiff.reference.parallel import agree, average_gradients, leave_group
from slimdiff.reference.references import TRAINABLE, reference, sampling_of, with_pictures
from slimdiff.reference.stages import start_from
from slimdiff.reference.state import averages
from slimdiff.reference.train import TrainConfig, Trainer, parse_config
from slimdiff.reference.unet import UnetReference
from slimdiff.reference.unet import build_scheduler as build_ddim
from slimdiff.reference.worlds import EMOJI, SCENES

SMALL_PARTS = {"vae_channels": (8, 8, 8), "text_width": 16, "text_heads": 2, "norm_groups": 4}
SMALL_DIT = {"second_width": 8, "second_layers": 1, "heads": 2, "head_width": 8, "layers": 2}
TINY: dict[str, Reference] = {
    "unet": UnetReference(
        **SMALL_PARTS, text_layers=1, unet_channels=(8, 16, 16), unet_heads=(1, 2, 2)
    ),
    "emoji": UnetReference(
        **SMALL_PARTS,
        world=EMOJI,
        latent_channels=8,
        text_layers=1,
        unet_channels=(8, 8, 16),
        unet_heads=(1, 1, 2),
        attention_levels=3,
    ),
    "dit": DitReference(**SMALL_PARTS, **SMALL_DIT, text_layers=2),
    "dit-qknorm": DitReference(**SMALL_PARTS, **SMALL_DIT, text_layers=2, qk_norm="rms_norm"),
}


def tiny(out: Path) -> TrainConfig:
    return TrainConfig(
        out=out,
        steps=4,
        batch=4,
        vae_steps=2,
        text_steps=2,
        shard=8,
        first_shards=1,
        shard_every=2,
        most_shards=2,
        bfloat16=False,
    )


@dataclass(frozen=True)
class Runs:
    """A reference, and folders of its training: without a break, and with one."""

    kind: Reference
    whole: Path
    broken: Path


@pytest.fixture(scope="module", params=TINY)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One run without a break and one that stopped after two steps and was continued."""
    kind = TINY[request.param]
    whole, broken = (tmp_path_factory.mktemp(name) for name in ("whole", "broken"))
    Trainer(tiny(whole), kind).run()
    Trainer(tiny(broken), kind).run(stop=2)
    continued = Trainer(tiny(broken), kind)
    assert continued.progress.step == 2
    continued.run()
    return Runs(kind, whole, broken)


def test_a_continued_run_equals_an_unbroken_one(runs: Runs) -> None:
    whole, broken = (load_file(run / "state.safetensors") for run in (runs.whole, runs.broken))
    assert whole.keys() == broken.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, broken[key]), key


# The last joint block drops its context, so what only makes the context's queries never learns.
NEVER_USED = ("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.norm_added_q")


def test_training_moves_every_part(runs: Runs) -> None:
    state = load_file(runs.whole / "state.safetensors")
    names = [k.removeprefix("first/") for k in state if k.startswith("first/")]
    unused = [n for n in names if any(part in n for part in NEVER_USED)]
    still = [n for n in names if not state[f"first/{n}"].any() and "position_ids" not in n]
    assert still == unused


def test_an_exported_pipeline_generates(runs: Runs, tmp_path: Path) -> None:
    pipe, progress = trained_pipeline(runs.whole, runs.kind)
    assert progress.step == 4 and progress.samples == 16
    texts = runs.kind.world.prompts("test", 1)
    made = generate(pipe, texts, steps=8)
    save(pipe, tmp_path / "pipeline")
    for file in (tmp_path / "pipeline").rglob("*.safetensors"):
        kinds = {t.dtype for t in load_file(file).values() if t.is_floating_point()}
        assert kinds == {torch.float16}, file
    again = load_pipeline(tmp_path / "pipeline")
    again.set_progress_bar_config(disable=True)
    modules = [part for part in again.components.values() if isinstance(part, torch.nn.Module)]
    assert {module.dtype for module in modules} == {torch.float32}
    close = generate(again, texts, steps=8)
    assert type(again) is type(pipe)
    assert made.shape == close.shape == (1, 64, 64, 3)
    assert abs(made - close).mean() < 0.02  # float16 weights


def test_parts_undo_assemble(runs: Runs) -> None:
    pipe, _ = trained_pipeline(runs.whole, runs.kind)
    state = load_file(runs.whole / "state.safetensors")
    for name, part in runs.kind.parts(pipe).items():
        own = averages(state, name)
        found = dict(part.named_parameters())
        assert found.keys() == own.keys()
        assert all(torch.equal(weight, own[path]) for path, weight in found.items())


def test_an_average_that_lacks_a_weight_is_refused(runs: Runs) -> None:
    state = load_file(runs.whole / "state.safetensors")
    name = runs.kind.denoiser
    lost = next(k for k in state if k.startswith(f"average/{name}."))
    with pytest.raises(RuntimeError, match="Missing key"):
        load_average(runs.kind.networks()[name], {k: state[k] for k in state if k != lost}, name)


def test_the_autoencoder_can_be_taken_over(tmp_path: Path) -> None:
    from slimdiff.reference import load_reference

    config = replace(tiny(tmp_path), vae_from="scenes-unet")
    trainer = Trainer(config, replace(TINY["dit"], vae_channels=(32, 64, 64), norm_groups=32))
    bundled = load_reference("scenes-unet").vae.state_dict()
    assert all(torch.equal(bundled[k], t) for k, t in trainer.vae.state_dict().items())


def test_a_bundled_reference_is_trained_on(tmp_path: Path) -> None:
    from slimdiff.reference import load_reference

    kind, pipe = reference("scenes-unet"), load_reference("scenes-unet")
    trainer = Trainer(replace(tiny(tmp_path), steps=1, start_from="scenes-unet"), kind)
    loss, _ = trainer._step(trainer._prepare(), trainer._pool(), 0.0)
    assert float(loss) < 0.5  # of an untrained one it is about 1
    for name, part in kind.parts(pipe).items():
        own = averages(trainer.optimizer.state(), name)
        assert own.keys() == dict(part.named_parameters()).keys()
    assert all(
        torch.equal(weight, trainer.vae.state_dict()[path])
        for path, weight in pipe.vae.state_dict().items()
    )


def described(module: Any) -> dict[str, Any]:
    """Its configuration without what saving and loading add."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else dict(module.config)
    added = ("dtype", "architectures", "transformers_version", "_name_or_path")
    kept = {key: value for key, value in config.items() if key not in added}
    return dict(json.loads(json.dumps(kept, default=str)))


def test_the_bundled_emoji_model_is_what_its_reference_describes() -> None:
    from slimdiff.reference import load_reference

    kind, pipe = reference("emoji-unet"), load_reference("emoji-unet")
    with torch.device("meta"):
        networks = kind.networks() | {"vae": kind.vae()}
    for name, part in {**kind.parts(pipe), "vae": pipe.vae}.items():
        own = {path: weight.shape for path, weight in networks[name].named_parameters()}
        assert own == {path: weight.shape for path, weight in part.named_parameters()}
        wanted, found = (described(module) for module in (networks[name], part))
        assert wanted == found
    assert dict(build_ddim().config).items() <= dict(pipe.scheduler.config).items()


def test_the_bundled_emoji_model_predicts_what_it_was_trained_to() -> None:
    from slimdiff.reference import load_reference

    kind, pipe = reference("emoji-unet"), load_reference("emoji-unet")
    shard = make_shard(pipe.vae, pipe.vae.config.scaling_factor, 8, 0, kind.world)
    denoising = kind.denoising(kind.parts(pipe))
    with torch.no_grad():
        loss = denoising.loss(shard, torch.Generator().manual_seed(0))
    assert float(loss) < 0.25  # of an untrained one it is about 1
    assert float(shard.latents.float().std()) == pytest.approx(1, abs=0.15)


def test_pictures_of_a_folder_can_be_trained_on(tmp_path: Path) -> None:
    kind = with_pictures(TINY["emoji"], str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="none"):
        kind.world.draw("train", 1, 0)
    assert with_pictures(TINY["emoji"], "") is TINY["emoji"]
    with pytest.raises(ValueError, match="without pictures"):
        with_pictures(TINY["unet"], str(tmp_path))


def test_the_denoiser_is_compiled_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    trainer = Trainer(replace(tiny(tmp_path), compile=True), TINY["unet"])
    trainer._prepare()
    assert compiled == [trainer.networks["unet"]]


def test_a_reference_can_start_from_one_without_norms(tmp_path: Path) -> None:
    plain, normed = TINY["dit"], TINY["dit-qknorm"]
    Trainer(tiny(tmp_path / "plain"), plain).run()
    config = replace(tiny(tmp_path / "normed"), start_from=str(tmp_path / "plain"))
    trainer = Trainer(config, normed)
    average = averages(load_file(tmp_path / "plain" / "state.safetensors"), "transformer")
    weights = dict(trainer.networks["transformer"].named_parameters())
    assert all(torch.equal(weights[k], t) for k, t in average.items())
    norms = {k: w for k, w in weights.items() if k not in average}
    assert len(norms) == 4 * 2
    assert all((w > 0).all() and (w == w[0]).all() and w[0] != 1 for w in norms.values())
    with pytest.raises(KeyError, match="text.first"):
        start_from({}, dict(trainer.networks.items()), lambda: None)


@pytest.mark.parametrize("copies", EMPTY_TOKENS)
@pytest.mark.parametrize("name", ["dit", "dit-qknorm"])
def test_one_empty_token_stands_for_several(name: str, copies: int) -> None:
    kind = TINY[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = kind.networks()
        for weight in networks["transformer"].parameters():
            torch.nn.init.normal_(weight, std=0.3)
    states, pooled = networks["text"](
        SCENES.tokenize(["a small red bar top left on navy background"])
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        "pooled_projections": pooled,
        "timestep": torch.tensor([300.0]),
        "return_dict": False,
    }
    transformer, empty = networks["transformer"], states.new_zeros(1, copies, states.shape[2])
    stock = transformer(encoder_hidden_states=torch.cat([states, empty], 1), **inputs)[0]
    transformer.set_attn_processor(PlainJointAttention())
    short = {**inputs, "encoder_hidden_states": torch.cat([states, empty[:, :1]], 1)}
    several = {"joint_attention_kwargs": {"copies": torch.tensor([copies])}}
    torch.testing.assert_close(transformer(**short, **several)[0], stock, rtol=1e-3, atol=1e-4)
    if copies > 1:
        assert not torch.allclose(transformer(**short)[0], stock, rtol=1e-3, atol=1e-4)


def test_training_and_pipeline_read_captions_alike(runs: Runs) -> None:
    if runs.kind.denoiser != "transformer":
        pytest.skip("StableDiffusionPipeline's reading is one call of its text encoder")
    text = "a small red bar top left on navy background"
    pipe, _ = trained_pipeline(runs.whole, runs.kind)
    embeddings, _, pooled, _ = pipe.encode_prompt(text, None, None, max_sequence_length=3)
    networks = runs.kind.networks()
    load_average(networks["text"], load_file(runs.whole / "state.safetensors"), "text")
    states, own_pooled = networks["text"](SCENES.tokenize([text]))
    torch.testing.assert_close(embeddings[:, :-3], states)
    torch.testing.assert_close(pooled, own_pooled)
    assert not embeddings[:, -3:].any()


@pytest.mark.parametrize("step", [0, 499, 999])
def test_the_flow_is_the_schedulers(step: int) -> None:
    kind = TINY["dit"]
    generator = torch.Generator().manual_seed(step)
    clean, noise = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
    steps = torch.tensor([step, step])
    noisy, velocity = kind.denoising(kind.networks()).corrupt(clean, noise, steps)
    scheduler = build_scheduler()
    at = scheduler.timesteps[scheduler.timesteps.round() == step + 1]
    torch.testing.assert_close(scheduler.scale_noise(clean, at.repeat(2), noise), noisy)
    sigma = (step + 1) / 1000
    torch.testing.assert_close(noisy - sigma * velocity, clean, rtol=1e-4, atol=1e-5)


def test_the_card_tells_what_was_measured(runs: Runs) -> None:
    pipe, progress = trained_pipeline(runs.whole, runs.kind)
    graded = {"likeness": (0.25, 0.5) * 4} if runs.kind.world is EMOJI else {}
    half = Accuracy(8, dict.fromkeys(ATTRIBUTES, 0.5), graded)
    figures = Figures(progress, half, half, dict.fromkeys(runs.kind.sampling, half))
    text = card("scenes-tiny", runs.kind, pipe, figures, "a machine", "A remark.")
    assert "# scenes-tiny" in text and "A remark." in text
    assert "16 samples in 4 steps" in " ".join(text.split())
    without_t5 = "from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)"
    assert (without_t5 in text) == (runs.kind.denoiser == "transformer")
    for label in runs.kind.sampling:
        assert f"| {label} | 50.0 % |" in text
    assert "50.0 % (21.5 to 78.5) |" in text
    assert ("0.375 | 8 |" in text) == ("## Credits" in text) == (runs.kind.world is EMOJI)
    for part in (runs.kind.denoiser, "text_encoder", "vae", "scheduler"):
        assert f"| `{part}` |" in text
    assert json.loads(json.dumps(figures.record()))["test"] == half.shares | half.means


def test_references_go_by_name() -> None:
    assert set(REFERENCES) <= set(TRAINABLE)
    assert reference("scenes-dit").denoiser == "transformer"
    assert sampling_of("emoji-unet") == {"guidance_scale": 2.0}
    assert sampling_of("scenes-dit") == {"guidance_scale": 3.0, "max_sequence_length": 1}
    with pytest.raises(KeyError, match="scenes-dit"):
        reference("scenes-vit")


def _average_in_a_group(number: int, address: str, expected: float) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{address}", rank=number, world_size=2
    )
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = torch.full((3,), 2.0 + number)
    average_gradients([weight])
    assert torch.equal(weight.grad, torch.full((3,), expected))
    assert agree(10.0 + number) == 10.0
    leave_group()


def test_processes_average_their_gradients(tmp_path: Path) -> None:
    address = str(tmp_path / "address")
    torch.multiprocessing.spawn(_average_in_a_group, args=(address, 2.5), nprocs=2)


def test_newton_schulz_pushes_singular_values_towards_one() -> None:
    matrices = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.5 and values.max() < 1.4


def test_timesteps_cover_the_range_and_prefer_its_middle() -> None:
    steps = draw_timesteps(4000, torch.Generator().manual_seed(0))
    assert 0 <= steps.min() < 50 and 950 < steps.max() <= 999
    assert ((steps > 300) & (steps < 850)).float().mean() > 0.6


def test_loss_weights_average_to_one_and_prefer_objects() -> None:
    weights = loss_weights(torch.tensor([[True, False, False, False], [False] * 4]))
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(2))
    assert weights[0, 0, 0, 0] == 3 * weights[0, 0, 0, 15] == 3 * weights[0, 0, 15, 0]


def test_the_command_line_has_every_option() -> None:
    arguments = ["--steps", "7", "--out", "x", "--no-bfloat16", "--reference", "scenes-dit"]
    config = parse_config(arguments)
    assert (config.steps, config.out, config.bfloat16) == (7, Path("x"), False)
    assert config.reference == "scenes-dit"
    assert parse_config(["--reference", "scenes-dit"]).out == Path("runs/scenes-dit")
    with pytest.raises(ValueError, match="at least 1"):
        parse_config(["--steps", "0"])
