"""The reference pipeline's training, at a tiny size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimdiff.reference.build import Architecture
from slimdiff.reference.export import generate, save, trained_pipeline
from slimdiff.reference.objective import draw_timesteps, loss_weights
from slimdiff.reference.optim import orthogonalise
from slimdiff.reference.parallel import agree, average_gradients, leave_group
from slimdiff.reference.train import TrainConfig, Trainer, parse_config

TINY = Architecture(
    vae_channels=(8, 8, 8),
    text_width=16,
    text_layers=1,
    text_heads=2,
    unet_channels=(8, 16, 16),
    unet_heads=(1, 2, 2),
    norm_groups=4,
)


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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One run without a break and one that stopped after two steps and was continued."""
    whole, broken = (tmp_path_factory.mktemp(name) for name in ("whole", "broken"))
    Trainer(tiny(whole), TINY).run()
    Trainer(tiny(broken), TINY).run(stop=2)
    continued = Trainer(tiny(broken), TINY)
    assert continued.progress.step == 2
    continued.run()
    return whole, broken


def test_a_continued_run_equals_an_unbroken_one(folders: tuple[Path, Path]) -> None:
    whole, broken = (load_file(folder / "state.safetensors") for folder in folders)
    assert whole.keys() == broken.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, broken[key]), key


def test_training_moves_every_part(folders: tuple[Path, Path]) -> None:
    state = load_file(folders[0] / "state.safetensors")
    names = [k.removeprefix("first/") for k in state if k.startswith("first/")]
    still = [n for n in names if not state[f"first/{n}"].any() and "position_ids" not in n]
    assert not still


def test_an_exported_pipeline_generates(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe, progress = trained_pipeline(folders[0], TINY)
    assert progress.step == 4 and progress.samples == 16
    made = generate(pipe, ["a small red bar top left on navy background"])
    save(pipe, tmp_path / "pipeline")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    again.set_progress_bar_config(disable=True)
    close = generate(again, ["a small red bar top left on navy background"])
    assert made.shape == close.shape == (1, 64, 64, 3)
    assert abs(made - close).mean() < 0.02  # float16 weights


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
    config = parse_config(["--steps", "7", "--out", "x", "--no-bfloat16"])
    assert (config.steps, config.out, config.bfloat16) == (7, Path("x"), False)
    with pytest.raises(ValueError, match="at least 1"):
        parse_config(["--steps", "0"])
