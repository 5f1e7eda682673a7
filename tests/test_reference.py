"""The reference pipeline's world: renderer, captions, tokenizer and judge."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimdiff.reference import REFERENCES, bundled_path
from slimdiff.reference.captions import HELD_OUT, SPLITS, caption, parse, prompts, scenes, split_of
from slimdiff.reference.judge import UNKNOWN, compare, judge, scene_accuracy
from slimdiff.reference.scenes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIDE,
    SIZES,
    Object,
    Scene,
    render,
    render_batch,
)
from slimdiff.reference.tokenizer import LENGTH, tokenizer, words

OBJECTS = st.builds(
    Object,
    size=st.sampled_from(sorted(SIZES)),
    colour=st.sampled_from(sorted(COLOURS)),
    shape=st.sampled_from(SHAPES),
    position=st.sampled_from(sorted(POSITIONS)),
)
SCENES = st.builds(
    Scene,
    objects=st.lists(OBJECTS, min_size=1, max_size=2, unique_by=lambda o: o.position).map(tuple),
    background=st.sampled_from(sorted(BACKGROUNDS)),
)


def rendered(split: str, n: int, seed: int) -> tuple[np.ndarray, list[str]]:
    batch = scenes(split, n, seed)
    return render_batch(batch, np.random.default_rng(seed)), [caption(s) for s in batch]


@given(SCENES)
def test_a_caption_parses_to_its_scene(scene: Scene) -> None:
    assert parse(caption(scene)) == scene


@given(SCENES)
def test_the_split_does_not_depend_on_the_order_of_objects(scene: Scene) -> None:
    swapped = Scene(scene.objects[::-1], scene.background)
    assert split_of(scene) == split_of(swapped) in SPLITS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a large red circle top left on pink background",
        "a large red circle top left and a small blue ring top left on navy background",
    ],
)
def test_what_is_not_a_caption_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse(text)


def test_splits_are_disjoint_and_prompts_are_repeatable() -> None:
    owned = {s: {caption(parse(p).canonical()) for p in prompts(s, 600)} for s in SPLITS}
    for a in SPLITS:
        assert prompts(a, 20, seed=3) == prompts(a, 20, seed=3) != prompts(a, 20, seed=4)
        assert all(not owned[a] & owned[b] for b in SPLITS if b != a)
    assert set(HELD_OUT) == {"calibration", "selection", "test"}


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split"):
        prompts("validation", 1)


def test_render_is_repeatable_and_jittered() -> None:
    scene = parse("a large red circle top left and a small blue ring top right on navy background")
    image = render(scene, 0)
    assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
    assert np.array_equal(image, render(scene, 0))
    assert not np.array_equal(image, render(scene, 1))


def test_the_renderer_is_fast() -> None:
    batch = scenes("train", 256)
    started = time.process_time()
    render_batch(batch, np.random.default_rng(0))
    assert time.process_time() - started < 5


def test_every_word_is_one_token() -> None:
    tokens = tokenizer()
    assert all(len(tokens.tokenize(word)) == 1 for word in words())
    for text in prompts("train", 20):
        assert len(tokens(text)["input_ids"]) == len(text.split()) + 2 <= LENGTH


def test_the_tokenizer_survives_saving(tmp_path) -> None:
    from transformers import CLIPTokenizer

    tokens = tokenizer()
    tokens.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    texts = [*prompts("test", 20), "", "something else, entirely!"]
    options = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
    assert again(texts, **options)["input_ids"] == tokens(texts, **options)["input_ids"]
    assert again.model_max_length == LENGTH


def test_the_judge_reads_ground_truth() -> None:
    images, captions = rendered("test", 300, seed=11)
    accuracy = scene_accuracy(images, captions)
    assert accuracy.whole >= 0.98, str(accuracy)
    assert accuracy.n == 300
    low, high = accuracy.interval
    assert 0.95 < low <= accuracy.whole <= high + 1e-9


def test_the_judge_forgives_a_little_blur() -> None:
    images, captions = rendered("test", 100, seed=12)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = sum(padded[:, i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)) / 9
    assert scene_accuracy(blurred, captions).whole >= 0.98


def test_the_judge_forgives_no_wrong_word() -> None:
    right = parse("a large red circle top left on navy background")
    wrong = {
        "background": "a large red circle top left on maroon background",
        "colour": "a large orange circle top left on navy background",
        "shape": "a large red square top left on navy background",
        "size": "a small red circle top left on navy background",
        "position": "a large red circle top right on navy background",
    }
    for attribute, text in wrong.items():
        verdict = compare(judge(render(parse(text), 5)), right)
        assert not verdict[attribute] and not verdict["whole"], attribute


def test_an_object_too_many_or_missing_is_wrong() -> None:
    one = "a large red circle top left on navy background"
    two = "a large red circle top left and a small white bar bottom left on navy background"
    images = np.stack([render(parse(two), 0), render(parse(one), 0)])
    accuracy = scene_accuracy(images, [one, two])
    assert accuracy.shares["background"] == 1
    assert accuracy.shares["position"] == accuracy.whole == 0


def test_a_smear_is_no_known_shape() -> None:
    image = render(parse("a large red circle top left on navy background"), 0)
    image[2:30, 2:30:3] = (225, 35, 40)
    assert judge(image).objects[0].shape == UNKNOWN


def test_the_judge_refuses_other_sizes_and_counts() -> None:
    with pytest.raises(ValueError, match="expected"):
        judge(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="captions"):
        scene_accuracy(np.zeros((2, SIDE, SIDE, 3)), prompts("test", 1))


def test_an_unknown_reference_is_refused() -> None:
    with pytest.raises(KeyError, match="scenes-unet"):
        bundled_path("scenes-vit")


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, slimdiff.reference;"
        "print([m for m in ('diffusers', 'transformers', 'PIL') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("name", REFERENCES)
def test_the_bundled_pipeline_generates(name: str) -> None:
    if not (bundled_path(name) / "model_index.json").exists():
        pytest.skip(f"the bundled pipeline {name} is not in this checkout")
    from slimdiff.reference import load_reference
    from slimdiff.reference.export import generate
    from slimdiff.reference.references import reference, sampling_of

    pipe, world = load_reference(name), reference(name).world
    captions = world.prompts("test", 4)
    images = generate(pipe, captions, steps=8, **sampling_of(name))
    assert images.shape == (4, SIDE, SIDE, 3)
    assert world.judge(images, captions).shares["background"] >= 0.5
