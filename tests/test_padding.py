"""Padding of the text enters a statistic exactly where an output depends on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimdiff
from slimdiff.padding import Counting
from slimdiff.signatures import _sketched
from tiny_models import TINY_MODELS, Inputs

LENGTHS = (3, 6)
TOKENS = 9
WHICH = {
    "pixart": "encoder_attention_mask",
    "sana": "encoder_attention_mask",
    "sd1": "encoder_attention_mask",
    "sd2": "encoder_attention_mask",
    "cross_only": "encoder_attention_mask",
    "qwen_image": "encoder_hidden_states_mask",
}


def padded(name: str, scale: float = 1.0, kind: str = "mask") -> tuple[nn.Module, Inputs]:
    """Prompts of two lengths in a batch; the padding is `scale` times as large as the text."""
    model, calls = TINY_MODELS[name]()
    generator = torch.Generator().manual_seed(3)
    real_bt = torch.arange(TOKENS) < torch.tensor(LENGTHS)[:, None]
    found = []
    for call in calls:
        text = torch.randn(2, TOKENS, 24, generator=generator)
        text = torch.where(real_bt[..., None], text, scale * text)
        mask = {
            "mask": real_bt,
            "numbers": real_bt.float(),
            "bias": (~real_bt[:, None]).float() * -10000.0,
        }[kind]
        found.append(call | {"encoder_hidden_states": text, WHICH.get(name, "unknown"): mask})
    return model, found


def alone(call: dict[str, Any], row: int) -> dict[str, Any]:
    """One row of a call, cut to its real tokens, without a mask."""
    found = {}
    for key, value in call.items():
        if key in WHICH.values():
            continue
        whole = isinstance(value, Tensor) and value.ndim > 0
        found[key] = value[row : row + 1] if whole or isinstance(value, list) else value
    found["encoder_hidden_states"] = found["encoder_hidden_states"][:, : LENGTHS[row]]
    return found


def recorded(model: nn.Module, calls: Inputs) -> slimdiff.Statistics:
    with slimdiff.record(model, num_probes=0, tokens_per_sample=4096) as statistics:
        for call in calls:
            model(**call)
    return statistics


def means(statistics: slimdiff.Statistics) -> dict[str, Tensor]:
    """Without what is not of all rows: `lags` are of some images."""
    return {name: statistics.mean(name) for name in statistics.sums if "lags" not in name}


@pytest.mark.parametrize("name", [name for name in WHICH if name != "cross_only"])
def test_a_mixed_batch_is_recorded_as_its_prompts_alone(name: str) -> None:
    model, calls = padded(name)
    batch = recorded(model, calls)
    singly = recorded(model, [alone(call, row) for call in calls for row in range(2)])
    expected = means(singly)
    for key, value in means(batch).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)
        assert batch.weights[key] == pytest.approx(singly.weights[key]), key


@pytest.mark.parametrize("kind", ["mask", "numbers", "bias"])
@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_every_kind_of_mask_is_read(name: str, kind: str) -> None:
    model, calls = padded(name, kind=kind)
    _, others = padded(name, scale=-5.0, kind=kind)
    expected = means(recorded(model, calls))
    for key, value in means(recorded(model, others)).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)


def test_layers_that_look_at_padding_keep_it() -> None:
    """Self-attention over the text, as in `only_cross_attention`, is not given the mask."""
    model, calls = padded("cross_only")
    assert depends(model, calls, padded("cross_only", scale=-5.0)[1])
    statistics = recorded(model, calls)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0"
    rows = {name: statistics.weights[f"{layer}.{name}/k"] for name in ("attn1", "attn2")}
    assert rows == {"attn1": 4 * 2 * TOKENS, "attn2": 4 * sum(LENGTHS)}


class Ignoring:
    """A processor that takes a mask, and does not keep to it."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Any:
        return self.own(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, **more)


@pytest.mark.parametrize("name", ["pixart", "sd1"])
def test_processors_that_look_at_padding_keep_it(name: str) -> None:
    model, calls = padded(name)
    for module in model.modules():
        if hasattr(module, "attn2"):
            module.attn2.processor = Ignoring(module.attn2.processor)
    assert depends(model, calls, padded(name, scale=-5.0)[1])
    statistics = recorded(model, calls)
    keys = [key for key in statistics.weights if key.endswith("attn2/k")]
    assert keys
    assert all(statistics.weights[key] == 4 * 2 * TOKENS for key in keys)


def test_joint_attention_keeps_padding_that_any_layer_looks_at() -> None:
    """What a text stream puts out for padding goes on to the layers after it."""
    model, calls = padded("qwen_image")
    plain = recorded(model, calls)
    last = model.transformer_blocks[1].attn
    own = last.processor

    def ignoring(
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        rotary = {"image_rotary_emb": image_rotary_emb}
        return own(attn, hidden_states, encoder_hidden_states, **rotary)

    last.processor = ignoring
    assert depends(model, calls, padded("qwen_image", scale=-5.0)[1])
    kept = recorded(model, calls)
    for name in ("transformer_blocks.0.txt_mlp/h", "transformer_blocks.0.attn/v"):
        assert kept.weights[name] == plain.weights[name] + 4 * (2 * TOKENS - sum(LENGTHS))


def test_hunyuan_dit_looks_at_what_stands_for_padding() -> None:
    """Its masks put a learned vector there; all tokens are keys."""
    model, calls = TINY_MODELS["hunyuan_dit"]()
    mask = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).float()
    calls = [call | {"text_embedding_mask": mask} for call in calls]
    with torch.no_grad():
        before = model(**calls[0], return_dict=False)[0]
        model.text_embedding_padding.mul_(3)
        assert not torch.allclose(model(**calls[0], return_dict=False)[0], before)
    assert recorded(model, calls).weights["blocks.0.attn2/v"] == 4 * 2 * (7 + 5)


def depends(model: nn.Module, calls: Inputs, others: Inputs) -> bool:
    with torch.no_grad():
        one, two = (model(**c[0], return_dict=False)[0] for c in (calls, others))
    return not torch.allclose(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["pixart", "sana", "sd1", "qwen_image"])
def test_padding_that_is_left_out_is_none_that_an_output_depends_on(name: str) -> None:
    model, calls = padded(name)
    assert not depends(model, calls, padded(name, scale=-5.0)[1])


def test_the_mean_of_a_text_encoder_is_without_padding() -> None:
    model, calls = TINY_MODELS["t5"]()
    statistics = recorded(model, calls)
    real = sum(int(call["attention_mask"].sum()) for call in calls)
    means_ = [key for key in statistics.weights if key.endswith("output_mean")]
    assert all(statistics.weights[key] == real for key in means_)


def test_a_sample_without_any_token_counts_wholly() -> None:
    """The unconditional half may be masked wholly; attention is then over all tokens alike."""
    counting = Counting.of(torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert counting is not None
    assert counting.mask_bt.tolist() == [[True, True, False], [True, True, True]]
    model, calls = padded("pixart")
    for call in calls:
        call["encoder_attention_mask"][0] = False
    assert all(value.isfinite().all() for value in means(recorded(model, calls)).values())


def test_a_mask_of_ones_changes_nothing() -> None:
    assert Counting.of(torch.ones(2, 3)) is None
    model, calls = padded("pixart")
    ones = [call | {"encoder_attention_mask": torch.ones(2, TOKENS)} for call in calls]
    none = [call | {"encoder_attention_mask": None} for call in calls]
    expected = means(recorded(model, none))
    for key, value in means(recorded(model, ones)).items():
        torch.testing.assert_close(value, expected[key], msg=key)


def test_masks_of_every_shape() -> None:
    real = torch.tensor([[True, False], [True, True]])
    bias = torch.where(real, 0.0, -10000.0)
    for mask in (
        real,
        real.long(),
        real.half(),
        real[:, None],
        bias[:, None],
        bias[:, None].half(),
    ):
        counting = Counting.of(mask)
        assert counting is not None and torch.equal(counting.mask_bt, real)
    assert Counting.of(real[:, None, None]) is None, "of queries and keys: not known"
    assert Counting.of(torch.ones(2, 3, 3)) is None


def test_a_call_that_breaks_off_leaves_nothing_for_the_next() -> None:
    """Streams are joined when all have run; half of a call must not be joined to the next."""
    model, calls = padded("qwen_image")
    expected = means(recorded(model, calls))

    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    with slimdiff.record(model, num_probes=0, tokens_per_sample=4096) as statistics:
        handle = model.transformer_blocks[1].attn.add_v_proj.register_forward_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            model(**calls[0])
        handle.remove()
        for name in list(statistics.sums):  # what the half of a call added
            del statistics.sums[name], statistics.weights[name]
        for call in calls:
            model(**call)
    for key, value in means(statistics).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)


def test_a_signature_of_a_prompt_does_not_depend_on_those_beside_it() -> None:
    model, calls = padded("qwen_image")
    groups = slimdiff.groups_of(model)
    with torch.no_grad(), _sketched(model, groups, 64, 0) as batch:
        model(**calls[0])
    for row in range(2):
        with torch.no_grad(), _sketched(model, groups, 64, 0) as single:
            model(**alone(calls[0], row))
        for whole, own in zip(batch, single, strict=True):
            torch.testing.assert_close(whole[row : row + 1], own, rtol=1e-4, atol=1e-5)
