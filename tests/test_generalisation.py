"""The benchmark of defaults across models, on a tiny pipeline: rows, what they say, and tables."""

import copy
import json
import math

import pytest
import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import slimdiff
from generalisation.running import Judging, Runner
from generalisation.specs import SPECS, ModelSpec
from generalisation.subjects import Subject
from generalisation.summary import by_model, geometric_mean, overall, verdict
from generalisation.variants import VARIANTS, split
from generalisation.worlds import ONE_IN, SPLITS, distinct, take, world_named
from slimdiff.evaluate import velocity_error
from slimdiff.reference.emoji.captions import parse
from tiny_pipeline import tiny_pipeline

PROMPTS = [
    "a red circle",
    "two blue squares",
    "night",
    "a green cat",
    "sea",
    "a hat",
    "tin",
    "moon",
]
SAMPLING = {"num_inference_steps": 2, "guidance_scale": 2.0}
SHORT = {"prompts": 4, "batch_size": 4, "num_inference_steps": 2, "num_probes": 4}
SHORT |= {"layers": ["feed_forward"]}
CHANGES = {"defaults": SHORT, "uniform": SHORT | {"allocation": "uniform"}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A trained model's folder, as training leaves it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder / "pipeline")
    (folder / "model.json").write_text(json.dumps({"sampling": SAMPLING}))
    (folder / "calibration.txt").write_text("\n".join(PROMPTS[:4]) + "\n")
    (folder / "test.txt").write_text("\n".join(PROMPTS[4:]) + "\n")
    return folder


@pytest.fixture(scope="module")
def ran(tiny):
    """A runner that measured two variants under one budget, and the models it had to load."""
    loaded = []

    def load():
        loaded.append(Subject.read(tiny))
        return loaded[-1]

    judging = Judging(prompts=3, steps=2, batch=2)
    runner = Runner(
        judging,
        tiny.parent,
        tiny.parent,
        variants=CHANGES,
        budgets={"params 0.95": {"params": 0.95}},
    )
    runner.run("tiny", load)
    return runner, load, loaded


def test_a_row_holds_the_error_on_unseen_prompts(ran, tiny):
    runner, _, (subject, *_) = ran
    row = runner.rows.rows["tiny | params 0.95 | defaults"]
    slim, config = subject.copy_of_pipe(), dict(SHORT)
    count, layers = config.pop("prompts"), config.pop("layers")
    plan = slimdiff.compress(
        slim,
        subject.calibration[:count],
        slimdiff.Budget(params=0.95),
        config=slimdiff.CalibrationConfig(**SAMPLING | config),
        layers=layers,
    )
    expected = velocity_error(subject.pipe, slim, subject.test[:3], batch_size=2, **SAMPLING)
    assert row["error"] == pytest.approx(expected.relative, rel=1e-3)
    assert row["error"] == pytest.approx(sum(row["by_prompt"]), rel=1e-3)
    assert row["error_on_probes"] == pytest.approx(plan.figures["error_on_probes"], rel=1e-3)
    assert row["params"] <= 0.95 * row["params_dense"]
    assert 0 < row["standard_error"] < row["error"]


def test_the_dense_model_errs_nowhere_and_the_guided_error_weighs_both_halves(ran):
    runner, _, (subject, *_) = ran
    calls = subject.calls(3, 2, 2)
    dense = copy.deepcopy(subject.pipe.unet)
    same = subject.errors(dense, calls, 3, 2)
    assert float(same.squared.max()) <= 1e-9 * float(same.energy.min())

    class Doubled:
        def __call__(self, **call):
            return (2 * dense(**call)[0],)

    doubled = subject.errors(Doubled(), calls, 3, 2)
    record = doubled.record()
    assert record["error"] == pytest.approx(1.0)
    assert record["guided_error"] == pytest.approx(1.0)
    assert record["standard_error"] < 1e-6


def test_finished_rows_are_not_measured_again(ran):
    runner, load, loaded = ran
    before, text = len(loaded), runner.rows.path.read_text()
    runner.run("tiny", load)
    assert (len(loaded), runner.rows.path.read_text()) == (before, text)


def test_a_variant_that_changed_is_refused(ran):
    runner, load, _ = ran
    changed = Runner(runner.judging, runner.work, runner.results, budgets=runner.budgets)
    changed.variants = CHANGES | {"uniform": SHORT}
    with pytest.raises(ValueError, match=r"uniform.*name it otherwise"):
        changed.run("tiny", load)


def test_an_impossible_row_says_why(ran):
    runner, load, _ = ran
    variants = {"too many prompts": SHORT | {"prompts": 400}}
    other = Runner(runner.judging, runner.work, runner.results, "x", variants, runner.budgets)
    other.run("tiny", load)
    row = other.rows.rows["tiny | params 0.95 | too many prompts @ x"]
    assert "4 calibration prompts" in row["unavailable"]
    assert "| -" in by_model(list(other.rows.rows.values()), "params 0.95")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_can_be_made(name):
    count, calibration, how = split(VARIANTS[name])
    slimdiff.CalibrationConfig(**calibration)
    assert count > 0
    assert not set(how) & {"prompts", "config", "checkpoint"}


def test_an_unknown_argument_is_named():
    with pytest.raises(KeyError, match="colour"):
        split({"colour": "red"})


def test_small_emoji_are_some_of_all_and_tests_are_never_trained_on():
    world = world_named("emoji").world
    numbers = {split: [parse(text) for text in world.prompts(split, 64)] for split in SPLITS}
    assert all(glyph % ONE_IN == 0 for pairs in numbers.values() for glyph, _ in pairs)
    assert all((5 * g + b) % 8 == 7 for g, b in numbers["test"])
    assert all((5 * g + b) % 8 != 7 for g, b in numbers["train"] + numbers["calibration"])
    assert len(set(distinct(world, "calibration", 64))) == 64


def test_a_trained_encoder_is_taken_whole_and_a_lacking_projection_passes_on():
    kinds = [CLIPTextModel, CLIPTextModelWithProjection]
    config = tiny_pipeline().text_encoder.config
    config.projection_dim = config.hidden_size
    trained, other = (kind(config) for kind in kinds)
    take(other, trained.state_dict())
    tokens = torch.tensor([[1, 5, 3, config.eos_token_id]])
    mine, theirs = other(tokens), trained(tokens)
    torch.testing.assert_close(mine.last_hidden_state, theirs.last_hidden_state)
    torch.testing.assert_close(mine.text_embeds, theirs.pooler_output)
    with pytest.raises(KeyError):
        take(other, {})


def row(variant, model, error, spread):
    parts = [error / 4 * (1 + spread * sign) for sign in (1, -1, 1, -1)]
    return {
        "variant": variant,
        "model": model,
        "budget": "b",
        "error": error,
        "error_on_probes": error / 2,
        "by_prompt": parts,
    }


def test_tables_count_clear_wins_and_take_geometric_means():
    rows = [
        row("defaults", "x", 4.0, 0),
        row("defaults", "y", 1.0, 0),
        row("defaults", "z", 1.0, 0),
    ]
    rows += [row("new", "x", 1.0, 0), row("new", "y", 4.0, 0.01), row("new", "z", 0.9, 9.0)]
    assert [verdict(new, old) for new, old in zip(rows[3:], rows[:3])] == [1, -1, 0]
    cells = overall(rows).splitlines()[-1].split(" | ")
    mean = (1 / 4 * 4 * 0.9) ** (1 / 3)
    assert cells[1:4] == [f"{mean:.2f}", "1 : 1", "4.00"]
    assert cells[4] == "2.00"
    line = by_model(rows, "b").splitlines()[-1]
    assert line == f"| new | 1.00e+00 | 4.00e+00 | 9.00e-01 | {mean:.2f} | 1 : 1 |"


def test_geometric_means():
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert math.isnan(geometric_mean([]))


def test_specifications_have_names_and_seeds_of_their_own():
    assert all(spec.name == name for name, spec in SPECS.items())
    seeds = [spec.seed for spec in SPECS.values() if isinstance(spec, ModelSpec)]
    assert len(set(seeds)) == len(seeds)
    assert 0 not in seeds  # the bundled references'
