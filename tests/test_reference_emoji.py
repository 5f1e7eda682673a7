"""The world of emoji: captions, atlases, renderer and judge."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from slimdiff.cli import models
from slimdiff.cli.evaluate import _judge_of
from slimdiff.errors import SlimdiffError
from slimdiff.metrics import wilson
from slimdiff.reference import load_reference
from slimdiff.reference.accuracy import Accuracy, mean_interval
from slimdiff.reference.emoji import judge, packages, render
from slimdiff.reference.emoji.captions import (
    caption,
    pairs,
    parse,
    prompts,
    split_pairs,
    words,
)
from slimdiff.reference.emoji.glyphs import (
    LIST,
    SIDE,
    STYLES,
    from_atlas,
    glyph_names,
    glyph_pictures,
    to_atlas,
)
from slimdiff.reference.emoji.judge import emoji_accuracy
from slimdiff.reference.emoji.likeness import SCALES, likeness
from slimdiff.reference.worlds import EMOJI, SCENES
from slimdiff.report.rows import fidelity

GLYPHS = 7151


def drawn(n: int, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    batch = pairs("test", n, seed)
    images = render.render_batch(batch, np.random.default_rng(seed))
    return images, [caption(pair) for pair in batch]


def nchw(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# --- captions ----------------------------------------------------------------------------------


@settings(deadline=None)  # the first call reads the names
@given(st.integers(0, GLYPHS - 1), st.integers(0, 7))
def test_a_caption_parses_to_its_pair(glyph: int, background: int) -> None:
    assert parse(caption((glyph, background))) == (glyph, background)


def test_what_is_not_a_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse("fluent red apple on orange background")


def test_held_out_prompts_are_disjoint_and_tests_were_never_trained_on() -> None:
    owned = {s: set(prompts(s, len(split_pairs(s)))) for s in ("calibration", "selection", "test")}
    train = set(prompts("train", len(split_pairs("train"))))
    assert not owned["calibration"] & owned["selection"]
    assert owned["calibration"] | owned["selection"] <= train
    assert not owned["test"] & train and len(owned["test"] | train) == 8 * GLYPHS
    assert all(len(texts) == GLYPHS for texts in owned.values())
    assert all((5 * g + b) % 8 == 7 for g, b in pairs("test", 50))


def test_prompts_are_repeatable_and_more_begin_with_fewer() -> None:
    assert prompts("test", 9) == prompts("test", 30)[:9] != prompts("test", 9, seed=1)
    with pytest.raises(SlimdiffError, match="at most 7151"):
        prompts("test", GLYPHS + 1)
    with pytest.raises(ValueError, match="unknown split"):
        prompts("validation", 1)


def test_every_word_is_one_token_of_the_bundled_tokenizer() -> None:
    from transformers import CLIPTokenizer

    from slimdiff.reference import bundled_path

    folder = bundled_path("emoji-unet") / "tokenizer"
    texts = [*prompts("train", 50), "", "something else entirely"]
    made = EMOJI.tokenize(texts)
    how = {"padding": "max_length", "max_length": EMOJI.length, "truncation": True}
    bundled = CLIPTokenizer.from_pretrained(folder)(texts, **how)["input_ids"]
    assert made.tolist() == bundled
    ends = EMOJI.tokenizer().eos_token_id
    assert [row.index(ends) for row in bundled[:50]] == [len(t.split()) + 1 for t in texts[:50]]
    assert {word for text in texts[:50] for word in text.split()} <= set(words())


# --- glyphs ------------------------------------------------------------------------------------


def test_an_atlas_holds_its_tiles() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (70, SIDE, SIDE, 4), np.uint8)
    atlas = to_atlas(tiles)
    assert atlas.shape == (2 * SIDE, 64 * SIDE, 4)
    assert np.array_equal(atlas[:SIDE, SIDE : 2 * SIDE], tiles[1])
    assert np.array_equal(from_atlas(atlas, 70), tiles)


def test_the_bundled_glyphs_are_all_there_and_none_is_empty() -> None:
    names, pictures = glyph_names(), glyph_pictures()
    assert len(names) == len(set(names)) == len(pictures) == GLYPHS
    assert {style for style, _ in names} == set(STYLES)
    assert (pictures[..., 3] > 77).any((1, 2)).all()


def colour(value: tuple[int, int, int], side: int) -> Image.Image:
    image = np.zeros((side, side, 4), np.uint8)
    image[side // 4 : -side // 4, side // 4 : -side // 4] = (*value, 255)
    return Image.fromarray(image)


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """Packages of two emoji; Fluent has one of them, and that in one skin tone besides."""
    tones = {"1F3FB": {"unified": "AA-1F3FB"}, "1F3FB-1F3FC": {"unified": "AA-1F3FB-1F3FC"}}
    table = [
        {"name": "WAVING HAND", "unified": "AA-FE0F", "non_qualified": "AA", "image": "aa.png"},
        {"name": None, "short_name": "Piñata_#1", "unified": "BB", "image": "bb.png"},
    ]
    table[0]["skin_variations"] = tones
    for package in ("google", "twitter"):
        folder = tmp_path / package / "package"
        pictures = folder / "img" / package / "64"
        pictures.mkdir(parents=True)
        (folder / "emoji.json").write_text(json.dumps(table))
        for name, red in (("aa", 250), ("bb", 120)):
            colour((red, 40, 40), 64).save(pictures / f"{name}.png")
    assets = tmp_path / "fluent" / "package" / "assets"
    assets.mkdir(parents=True)
    for name, blue in (("aa", 250), ("aa-1f3fb", 120), ("aa-1f3fb-1f3fc", 60)):
        colour((40, 40, blue), 128).save(assets / f"{name}.webp", lossless=True)
    return tmp_path


def test_atlases_are_made_from_packages(unpacked: Path, tmp_path: Path) -> None:
    assert packages.make_atlases(unpacked, tmp_path / "out", 90, 100) == 6
    names = glyph_names(tmp_path / "out")
    assert names[:4] == tuple(
        (style, name) for name in ("waving hand", "pinata 1") for style in ("noto", "twemoji")
    )
    assert names[4:] == (("fluent", "waving hand"), ("fluent", "waving hand light skin tone"))
    pictures = glyph_pictures(tmp_path / "out").astype(int)
    assert pictures[0, 32, 32] == pytest.approx([250, 40, 40, 255], abs=12)
    assert pictures[5, 32, 32] == pytest.approx([40, 40, 120, 255], abs=12)
    assert (pictures[:, 2, 2, 3] == 0).all()


def test_a_folder_without_glyphs_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{LIST}.*slimdiff.reference.emoji.packages"):
        glyph_names(tmp_path)


# --- renderer ----------------------------------------------------------------------------------


def test_a_glyph_as_large_as_the_image_lies_over_its_background() -> None:
    glyphs = render.weighed(glyph_pictures()[[5, 700]])
    colours, none = render.background_colours()[[2, 6]], torch.zeros(2, 2)
    images = render.compose(glyphs, colours, torch.ones(2), none, none)
    over = glyphs[:, :3] + (1 - glyphs[:, 3:]) * colours[:, :, None, None]
    torch.testing.assert_close(images, over.clamp(0, 1), atol=1e-5, rtol=0)


def test_shift_and_light_are_where_they_are_said_to_be() -> None:
    blank, one = torch.zeros(1, 4, SIDE, SIDE), torch.ones(1)
    blank[:, :, 30:34, 30:34] = 1.0
    grey, none = torch.full((1, 3), 0.5), torch.zeros(1, 2)
    moved = render.compose(blank, grey, one, torch.tensor([[0.25, -0.5]]), none)[0, 0] > 0.9
    assert moved.nonzero().float().mean(0).tolist() == [31.5 - 16, 31.5 + 8]
    lit = render.compose(0 * blank, grey, one, none, torch.tensor([[1.0, 0.0]]))[0, 0]
    assert lit[0].tolist() == pytest.approx([0.5 * 0.88] * SIDE)
    assert lit[-1].tolist() == pytest.approx([0.5 * 1.12] * SIDE)


def test_renders_are_repeatable_and_jittered() -> None:
    one, two, other = (drawn(3, seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(one, two) and not np.array_equal(one, other)
    assert one.shape == (3, SIDE, SIDE, 3) and 0 <= one.min() < one.max() <= 1


def test_the_world_draws_the_pairs_of_its_prompts() -> None:
    made = EMOJI.draw("test", 16, 3)
    assert made.captions == EMOJI.prompts("test", 16, 3) and made.occupied.all()
    images = (made.pixels.permute(0, 2, 3, 1) + 1) / 2
    assert EMOJI.judge(images.numpy(), made.captions).shares["background"] == 1
    assert SCENES.drawn_from is None and EMOJI.drawn_from is not None
    with pytest.raises(FileNotFoundError, match="missing"):
        EMOJI.drawn_from(Path("missing"))("test", 1, 0)


# --- judge -------------------------------------------------------------------------------------


def test_the_judge_reads_ground_truth() -> None:
    accuracy = emoji_accuracy(*drawn(200))
    assert accuracy.shares["background"] >= 0.99, str(accuracy)
    assert accuracy.whole >= 0.97, str(accuracy)
    assert accuracy.means["likeness"] > 0.97 and accuracy.means["margin"] > 0.5
    assert f"n = {accuracy.n}" in str(accuracy) and accuracy.n == 200


def test_another_glyph_or_background_is_wrong() -> None:
    images, texts = drawn(24)
    rightly = emoji_accuracy(images, texts)
    glyphs, backgrounds = zip(*map(parse, texts))
    other = [caption(p) for p in zip(glyphs[1:] + glyphs[:1], backgrounds)]
    wrongly = emoji_accuracy(images, other)
    assert wrongly.shares == {"background": 1.0, "emoji": 0.0, "whole": 0.0}
    assert max(wrongly.graded["margin"]) < 0 < min(rightly.graded["margin"])
    assert wrongly.means["likeness"] < 0.7 * rightly.means["likeness"]
    moved = [caption((g, (b + 1) % 8)) for g, b in zip(glyphs, backgrounds)]
    assert emoji_accuracy(images, moved).shares == {"background": 0.0, "emoji": 1.0, "whole": 0.0}


def test_measures_fall_as_the_drawing_fades_and_nothing_drawn_is_0() -> None:
    images, texts = drawn(32)
    ground = judge.fit_ground(nchw(images)).permute(0, 2, 3, 1).numpy()
    found = [emoji_accuracy(ground + s * (images - ground), texts) for s in (1, 0.8, 0.6, 0.4, 0)]
    means = [accuracy.means["likeness"] for accuracy in found]
    assert means == sorted(means, reverse=True) and min(-np.diff(means)) > 0.02
    assert means[-1] == pytest.approx(0, abs=1e-3)
    assert found[0].means["margin"] > found[1].means["margin"] > found[3].means["margin"] > -1
    assert found[-1].means["margin"] == -1 and found[-1].shares["emoji"] == 0


def test_distances_are_those_of_composed_images() -> None:
    generator = torch.Generator().manual_seed(0)
    crops, grounds = (torch.rand(2, 3, 24, 24, generator=generator) for _ in range(2))
    glyphs = judge._templates()[::500]
    composed = glyphs[:, :3] + (1 - glyphs[:, 3:]) * grounds[:, None]
    direct = (composed - crops[:, None]).square().mean((2, 3, 4))
    torch.testing.assert_close(judge.distances(crops, grounds)[:, ::500], direct)


def test_a_crop_averages_pixels_by_area() -> None:
    image = torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[8.0, 56.0, 0.0, 24.0]])
    expected = image[:, :, 8:56, :24].unflatten(2, (24, 2)).mean(3)
    torch.testing.assert_close(judge.crop(image, box), expected)


def test_likeness_is_the_best_over_all_places() -> None:
    """Against every shift of one size, composed one after the other."""
    glyph = render.weighed(glyph_pictures()[[1234]])
    scale = float(torch.linspace(*render.SCALE, SCALES)[2])
    one, none = torch.ones(1), torch.zeros(1, 2)
    where = torch.tensor([[4 / 32, -3 / 32]])  # whole pixels
    image = render.compose(glyph, 0.3 * torch.ones(1, 3), scale * one, where, none)
    image = image + 0.1 * torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    ground = judge.fit_ground(image)
    best = -1.0
    for right in range(-5, 6):
        for down in range(-5, 6):
            shift = torch.tensor([[right / 32, down / 32]])
            layers = [
                render.compose(part, torch.zeros(1, 3), scale * one, shift, none)
                for part in (glyph[:, [0, 1, 2, 3]], glyph[:, [3, 3, 3, 3]])
            ]
            should = layers[0] - layers[1] * ground
            d = image - ground
            total = d.square().sum() + should.square().sum()
            best = max(best, float(2 * (d * should).sum() / total))
    found = float(likeness(image, ground, glyph))
    assert best <= found + 1e-4 and found == pytest.approx(best, abs=0.02)


def test_the_ground_is_fitted_though_a_glyph_reaches_the_border() -> None:
    images = nchw(drawn(8)[0]).clone()
    clean = judge.fit_ground(images)
    images[:, :, :1, 10:40] = 0.5
    torch.testing.assert_close(judge.fit_ground(images), clean, atol=0.02, rtol=0)


def test_the_judge_refuses_other_counts_and_captions() -> None:
    images, texts = drawn(2)
    with pytest.raises(ValueError, match="captions"):
        emoji_accuracy(images, texts[:1])
    with pytest.raises(ValueError, match="not a caption"):
        emoji_accuracy(images[:1], ["a large red circle top left on navy background"])


# --- accuracy ----------------------------------------------------------------------------------


def test_intervals_are_wilson_s_and_normal() -> None:
    values = (0.1, 0.4, 0.9, 0.2)
    accuracy = Accuracy(4, {"emoji": 0.75, "whole": 0.5}, {"likeness": values})
    assert accuracy.interval == wilson(2, 4) and accuracy.interval_of("emoji") == wilson(3, 4)
    half = 1.96 * statistics.stdev(values) / 2
    assert accuracy.interval_of("likeness") == pytest.approx((0.4 - half, 0.4 + half))
    assert mean_interval([0.3]) == (0.3, 0.3)
    record = json.loads(json.dumps(accuracy.record()))
    assert record["attributes"]["likeness"]["share"] == pytest.approx(0.4)
    assert (record["whole"], record["count"]) == (0.5, 4)


def test_a_change_is_measured_image_by_image() -> None:
    dense = Accuracy(3, {"whole": 1.0}, {"likeness": (0.2, 0.5, 0.9)})
    slim = Accuracy(3, {"whole": 1.0}, {"likeness": (0.1, 0.4, 0.8)})
    change, (low, high) = slim.change_from(dense, "likeness")
    assert change == pytest.approx(-0.1) and low == pytest.approx(high) == pytest.approx(-0.1)
    assert slim.interval_of("likeness")[1] > dense.interval_of("likeness")[0]
    with pytest.raises(ValueError):
        slim.change_from(Accuracy(1, {"whole": 1.0}, {"likeness": (0.2,)}), "likeness")


# --- the commands ------------------------------------------------------------------------------


def test_the_commands_know_its_prompts_guidance_and_judge() -> None:
    where = models.source("emoji-unet")
    assert models.sampling(where, None, None) == {
        "guidance_scale": 2.0,
        "max_sequence_length": None,
    }
    assert models.prompts(where, None, 4, "calibration") == prompts("calibration", 4)
    assert models.source(None).guidance == 3.0
    assert models.source("scenes-dit").text_tokens == 1
    images, texts = drawn(4)
    record = _judge_of("emoji-unet")(list((255 * images).astype(np.uint8)), texts)
    assert record["attributes"].keys() == {"background", "emoji", "whole", "likeness", "margin"}
    rows = list(fidelity({"scenes": {"dense": record, "slim": record}}))
    assert [row.name for row in rows if row.detail] == ["background", "emoji", "likeness", "margin"]


def test_its_text_encoder_is_saved_in_the_dtype_that_it_is_loaded_in() -> None:
    where = models.source("emoji-unet")
    pipe = load_reference("emoji-unet")
    kept = load_file(Path(where.path) / "text_encoder" / "model.safetensors")
    assert {weight.dtype for weight in kept.values()} == {torch.float16}
    assert pipe.text_encoder.dtype == torch.float32
    assert models.stored_dtypes(where, pipe, None) == dict.fromkeys(("unet", "vae"), torch.float16)
