"""The whole evaluation, its parts, and its command."""

import base64
import copy
import io
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import slimdiff
from slimdiff import costs
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate import Settings, Timing, evaluate, generate, interleaved, psnr
from slimdiff.evaluate.distances import features_of, frechet, kernel
from slimdiff.evaluate.features import ClipScore, ImageModel, LatentFeatures, prepared
from slimdiff.evaluate.memory import activation_peak, weight_bytes
from slimdiff.evaluate.sampling import first_call, one_row_of
from slimdiff.results import merged, read, write
from tiny_pipeline import tiny_pipeline

PROMPTS = ["a red circle", "a blue ring", "a green square"]
QUICK = Settings(num_inference_steps=2, batch_size=2, runs=2, pipeline_runs=1, shown=2)


@pytest.fixture(scope="module")
def dense():
    return tiny_pipeline(seed=0)


@pytest.fixture(scope="module")
def slim(dense):
    pipe = copy.deepcopy(dense)
    config = slimdiff.CalibrationConfig(num_inference_steps=2, num_probes=2)
    slimdiff.compress(pipe, PROMPTS[:2], slimdiff.Budget(params=0.93), config=config)
    return pipe


@pytest.fixture(scope="module")
def results(dense, slim):
    return evaluate(dense, slim, PROMPTS, QUICK)


def test_fidelity_is_that_of_the_parts(dense, slim, results):
    drawn = [generate(p, PROMPTS, range(3), num_inference_steps=2) for p in (dense, slim)]
    fidelity = results["fidelity"]
    assert fidelity["images"]["psnr"] == pytest.approx(psnr(drawn[1], drawn[0]), rel=1e-3)
    assert fidelity["images"]["count"] == 3
    assert 0 < fidelity["velocity"]["relative"] < 1
    assert len(fidelity["velocity"]["by_timestep"]) == 2
    assert fidelity["frechet"]["value"] >= -1e-6
    assert fidelity["frechet"]["features"] == "AutoencoderKL latents"
    assert fidelity["frechet"]["dimensions"] == 64 and fidelity["frechet"]["count"] == 3
    assert "give the folder of one with --clip" in fidelity["clip"]["unavailable"]
    assert "no judge" in fidelity["scenes"]["unavailable"]


def test_cost_is_counted_and_timed(dense, slim, results):
    cost, plan = results["cost"], slim.unet.slim_record.plan
    assert cost["params"] == {"dense": costs.parameters(dense.unet), "slim": plan.figures["params"]}
    assert cost["macs"]["slim"] == plan.figures["macs"]
    assert cost["bytes"]["slim"] == 4 * plan.figures["params"]
    assert cost["peak_memory"]["dense"] > cost["bytes"]["dense"]
    latency = cost["latency"]["denoiser"]
    assert latency["runs"] == 2 and latency["of"] == "one denoiser call, batch 2"
    assert cost["share_reached"] == pytest.approx(latency["speedup"] / cost["macs_allow"])
    assert cost["latency"]["pipeline"]["dense"] > latency["dense"]


def test_groups_add_up_to_the_whole(dense, slim, results):
    for metric in ("params", "macs"):
        for suffix, label in (("_dense", "dense"), ("", "slim")):
            parts = sum(row[metric + suffix] for row in results["groups"])
            assert parts + results["rest"][metric] == results["cost"][metric][label]
    assert any(row["width"] < row["dense_width"] for row in results["groups"])


def test_pictures_are_those_that_were_drawn(dense, results):
    shown = results["images"]
    assert [row["prompt"] for row in shown] == PROMPTS[:2]
    image = Image.open(io.BytesIO(base64.b64decode(shown[1]["dense"])))
    again = generate(dense, PROMPTS[:2], [0, 1], num_inference_steps=2, batch_size=2)[1]
    np.testing.assert_array_equal(np.asarray(image), np.asarray(again))


def test_results_survive_the_file(results, tmp_path):
    back = read(write(tmp_path / "r.json", results))
    assert back == json.loads(json.dumps(results))
    assert merged([back, {"made": {"command": "x"}, "prompt_counts": []}])["made"][1] == {
        "command": "x"
    }


def test_merging_keeps_the_curves_of_a_compression(results):
    groups = [row | {"curve": {"widths": [1], "errors": [0.5]}} for row in results["groups"]]
    for parts in ([{"groups": groups}, results], [results, {"groups": groups}]):
        whole = merged(parts)
        assert [row["curve"]["errors"] for row in whole["groups"]] == [[0.5]] * len(groups)
        assert [row["name"] for row in whole["groups"]] == [row["name"] for row in groups]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not results of slimdiff"),
        ('{"schema": "slimdiff.results", "version": 99}', "version 99"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(SlimdiffError, match=message):
        read(path)
    with pytest.raises(SlimdiffError, match="no such file"):
        read(tmp_path / "none.json")


def test_results_of_different_models_do_not_merge(results):
    other = {"model": results["model"] | {"class": "OtherModel"}}
    with pytest.raises(SlimdiffError, match="OtherModel and UNet2DConditionModel"):
        merged([results, other])


def test_results_of_other_widths_do_not_merge(results):
    groups = [row | {"width": row["width"] - 1} for row in results["groups"]]
    with pytest.raises(SlimdiffError, match="widths differ"):
        merged([results, {"groups": groups}])


def test_prompts_are_a_list(dense, slim):
    with pytest.raises(SlimdiffError, match="expected a list"):
        evaluate(dense, slim, "a red circle", QUICK)


def test_first_call_is_not_made_and_leaves_no_hook(dense):
    calls = []
    handle = dense.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    call = first_call(dense, "a red circle", num_inference_steps=3)
    handle.remove()
    assert not calls and not dense.unet._forward_pre_hooks
    assert call["sample"].shape == (2, 4, 16, 16)
    assert one_row_of(call)["encoder_hidden_states"].shape[0] == 1


def test_a_judge_is_asked_for_both(dense, slim):
    seen = []

    def judge(images, prompts):
        seen.append((len(images), tuple(prompts)))
        return {"whole": 0.5, "interval": [0.1, 0.9], "attributes": {}, "count": len(images)}

    found = evaluate(dense, slim, PROMPTS[:1], QUICK, judge=judge)
    assert seen == [(1, ("a red circle",))] * 2
    assert found["fidelity"]["scenes"]["slim"]["whole"] == 0.5
    assert "at least two images" in found["fidelity"]["frechet"]["unavailable"]
    with pytest.raises(SlimdiffError, match="no prompts"):
        evaluate(dense, slim, [], QUICK)


def test_interleaved_takes_turns_and_compares_within_rounds():
    order = []
    calls = {
        "a": lambda: order.append("a") or time.sleep(0.02),
        "b": lambda: order.append("b") or time.sleep(0.01),
    }
    found = interleaved(calls, runs=4, warmup=1)
    assert "".join(order) == "ba" + "abba" * 2
    assert len(found["a"].seconds) == 4
    assert Timing((2.0, 9.0, 4.0)).speedup_of(Timing((1.0, 3.0, 2.0))) == 2.0
    with pytest.raises(SlimdiffError, match="runs must be at least 1"):
        interleaved(calls, runs=0)


def test_activation_peak_is_what_lives_at_once():
    net = nn.Sequential(nn.Linear(100, 400), nn.GELU(), nn.Linear(400, 100))
    x = torch.randn(64, 100)

    def call():
        with torch.inference_mode():
            net(x)

    # the hidden layer before and after the nonlinearity; views and weights do not count
    assert activation_peak(call, torch.device("cpu")) == 2 * 64 * 400 * 4
    assert weight_bytes(net) == 4 * (100 * 400 + 400 + 400 * 100 + 100)


def test_distances_of_gaussians_are_known():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=generator).double()
    b = torch.randn(4000, 3, generator=generator).double()
    # |mean difference|^2 + trace((1 - 2)^2 I)
    assert frechet(a, 2 * b + 1) == pytest.approx(3 + 3, rel=0.05)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert abs(kernel(a, b)) < 0.02 < kernel(a, b + 1)
    with pytest.raises(SlimdiffError, match="two equal sets"):
        kernel(a, b[:5])
    # a pair that differs by next to nothing is next to no distance, even in a small set
    assert abs(kernel(a[:8], a[:8] + 1e-6)) < 1e-4


def test_kernel_distance_of_independent_sets_is_that_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, 4, generator=generator).double() + torch.tensor([[[0]], [[0.5]]])
    assert kernel(a, b) == pytest.approx(float(poly_mmd(a, b)), rel=0.02)


def test_latent_features_do_not_depend_on_the_batch(dense):
    images = torch.rand(35, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = LatentFeatures(dense.vae)
    found = features_of(images, features)
    assert found.shape == (35, features.num_features)
    torch.testing.assert_close(found[34:], features_of(images[34:], features), rtol=1e-4, atol=1e-4)


def clip_folder(folder, pipe):
    from transformers import CLIPConfig, CLIPModel

    text = pipe.text_encoder.config.to_dict() | {"projection_dim": 12}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
        "projection_dim": 12,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    model.save_pretrained(folder)
    pipe.tokenizer.save_pretrained(folder)
    return model.eval()


def test_clip_score_and_features_of_a_local_folder(dense, slim, tmp_path):
    model = clip_folder(tmp_path, dense)
    score, features = ClipScore(tmp_path), ImageModel(tmp_path)
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    pixels = prepared(images, 24, score.mean, score.std)
    assert pixels.shape == (2, 3, 24, 24)
    tokens = dense.tokenizer(PROMPTS[:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        a = model.get_image_features(pixel_values=pixels).pooler_output
        b = model.get_text_features(**tokens).pooler_output
    expected = 100 * torch.cosine_similarity(a, b).clamp_min(0).mean()
    assert score(images, PROMPTS[:2]) == pytest.approx(float(expected), rel=1e-4)
    assert features(images).shape == (2, features.num_features) == (2, 16)
    found = evaluate(dense, slim, PROMPTS[:2], QUICK, features=features, clip=score)["fidelity"]
    assert found["clip"]["model"] == tmp_path.name and found["clip"]["dense"] >= 0
    assert found["kernel"]["features"].startswith("CLIPVision")
    with pytest.raises(SlimdiffError, match="no such folder"):
        ClipScore(tmp_path / "none")
