import copy
import inspect
import pickle

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import nn

from slimdiff import slim_denoiser
from slimdiff.slim_denoiser import (
    SlimAttnProcessor,
    SlimConfigError,
    become_slim_,
    reshape_,
    slim_class,
)
from tiny_pipeline import FEED_FORWARD, TIED, UNTIED, slim_by_hand, slim_config, tiny_pipeline

ATOL = 1e-5


@pytest.fixture(scope="module")
def dense():
    return tiny_pipeline().unet


def call(unet):
    generator = torch.Generator().manual_seed(3)
    sample, text = (torch.randn(s, generator=generator) for s in ((2, 4, 16, 16), (2, 7, 24)))
    with torch.no_grad():
        return unet(sample, torch.tensor(500), encoder_hidden_states=text).sample


def test_reshape_sets_shapes_and_derived_attributes(dense):
    unet = copy.deepcopy(dense)
    kept = unet.get_submodule(TIED).to_out[0].bias
    unet.get_submodule(f"{TIED}.to_q").weight.requires_grad_(False)
    assert reshape_(unet, slim_config()) is unet
    for path, (inputs, outputs) in slim_config()["linears"].items():
        linear = unet.get_submodule(path)
        assert linear.weight.shape == (outputs, inputs)
        assert (linear.in_features, linear.out_features) == (inputs, outputs)
        assert torch.isfinite(linear.weight).all()
    attn = unet.get_submodule(TIED)
    assert (attn.heads, attn.inner_dim, attn.inner_kv_dim) == (2, 16, 16)
    assert attn.scale == 8**-0.5 and attn.sliceable_head_dim == 2
    assert not attn.to_q.weight.requires_grad and attn.to_k.weight.requires_grad
    assert attn.to_out[0].bias.shape == kept.shape
    assert type(attn.processor) is AttnProcessor2_0
    assert type(unet.get_submodule(UNTIED).processor) is SlimAttnProcessor


def test_reshape_leaves_what_fits_and_can_be_repeated(dense):
    unet = reshape_(copy.deepcopy(dense), slim_config())
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    reshape_(unet, slim_config())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_become_slim_touches_no_weight(dense):
    unet = reshape_(copy.deepcopy(dense), slim_config())
    weights, expected = dict(unet.named_parameters()), call(unet)
    assert become_slim_(unet, slim_config()) is unet
    assert all(weights[name] is value for name, value in unet.named_parameters())
    assert type(unet).__name__ == "SlimUNet2DConditionModel"
    assert isinstance(unet, diffusers.UNet2DConditionModel)
    assert unet.config["slimdiff"] == slim_config() == unet.config.slimdiff
    assert unet.config.cross_attention_dim == 24
    assert torch.equal(call(unet), expected)


def test_config_survives_a_round_trip(dense):
    unet = slim_by_hand(tiny_pipeline()).unet
    again = type(unet).from_config(unet.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in unet.state_dict().items()
    }
    again.load_state_dict(unet.state_dict())
    assert torch.equal(call(again.eval()), call(unet))


def test_meta_initialisation_makes_no_weights(dense):
    unet = slim_by_hand(tiny_pipeline()).unet
    with init_empty_weights():
        empty = type(unet).from_config(unet.config)
    assert all(p.is_meta for p in empty.parameters())
    assert empty.get_submodule(f"{FEED_FORWARD}.net.2").weight.shape == (32, 50)


@pytest.mark.parametrize("untied", [False, True])
def test_sliced_attention_equals_fused(untied):
    unet = slim_by_hand(tiny_pipeline(), untied).unet
    expected = call(unet)
    unet.set_attention_slice(1)
    assert type(unet.get_submodule(TIED).processor) is SlicedAttnProcessor
    torch.testing.assert_close(call(unet), expected, rtol=0, atol=ATOL)
    if untied:
        assert type(unet.get_submodule(UNTIED).processor) is SlimAttnProcessor


def test_fused_projections_equal_separate_ones_when_tied():
    unet = slim_by_hand(tiny_pipeline(), untied=False).unet
    expected = call(unet)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(call(unet), expected, rtol=0, atol=ATOL)


def test_untied_layers_refuse_processors_that_would_mix_tokens():
    unet = slim_by_hand(tiny_pipeline()).unet
    with pytest.raises(ValueError, match="FusedAttnProcessor2_0 needs equal"):
        unet.get_submodule(UNTIED).set_processor(FusedAttnProcessor2_0())


def layer(qk, vo, heads=2, **options):
    """An attention layer with random weights, slimmed to these widths, and its holder."""
    torch.manual_seed(5)
    options = {"query_dim": 16, "heads": 4, "dim_head": 8, "bias": True} | options
    attn = Attention(**options)
    dim = options["query_dim"]
    context = options.get("cross_attention_dim") or dim
    shapes = {"to_q": (dim, qk), "to_k": (context, qk), "to_v": (context, vo)}
    linears = {f"attn.{name}": [i, heads * width] for name, (i, width) in shapes.items()}
    linears["attn.to_out.0"] = [heads * vo, dim]
    slim = {"version": 1, "linears": linears}
    slim["attentions"] = {"attn": {"heads": heads, "qk": qk, "vo": vo}}
    reshape_(nn.ModuleDict({"attn": attn}), slim)
    return attn.requires_grad_(False)


def by_hand(attn, states, context, bias=None):
    """softmax(q k^T scale + bias) v, head by head, then the output projection."""
    heads = []
    for h in range(attn.heads):
        q, k, v = (
            linear(x).chunk(attn.heads, dim=-1)[h]
            for linear, x in ((attn.to_q, states), (attn.to_k, context), (attn.to_v, context))
        )
        scores = q @ k.mT * attn.scale
        heads.append((scores if bias is None else scores + bias).softmax(-1) @ v)
    return attn.to_out[0](torch.cat(heads, dim=-1))


@pytest.mark.parametrize("qk, vo", [(6, 3), (3, 6), (8, 4), (5, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_untied_attention_equals_the_definition(qk, vo, masked):
    attn = layer(qk, vo, cross_attention_dim=12)
    attn.set_processor(SlimAttnProcessor())
    states, context = torch.randn(3, 10, 16), torch.randn(3, 7, 12)
    bias = torch.zeros(3, 1, 7)
    if masked:
        bias[:, :, 4:] = -1e4
    got = attn(states, encoder_hidden_states=context, attention_mask=bias if masked else None)
    torch.testing.assert_close(got, by_hand(attn, states, context, bias), rtol=0, atol=ATOL)


OPTIONS = {
    "plain": {},
    "group norm": {"norm_num_groups": 4},
    "residual, rescaled": {"residual_connection": True, "rescale_output_factor": 2.0},
    "layer-normed text": {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
    "group-normed text": {
        "cross_attention_dim": 12,
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 3,
    },
    "query-key norm": {"qk_norm": "layer_norm"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("image", [False, True])
def test_equals_the_stock_processor_at_equal_widths(name, image):
    attn = layer(8, 8, **OPTIONS[name])
    states = torch.randn(2, 16, 3, 5) if image else torch.randn(2, 15, 16)
    length, channels = (7, 12) if attn.is_cross_attention else (15, 16)
    context = torch.randn(2, length, channels) if attn.is_cross_attention else None
    mask = torch.randn(2, 1, length)
    expected = AttnProcessor2_0()(attn, states, context, mask)
    got = SlimAttnProcessor()(attn, states, context, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=ATOL)


def test_spatial_norm_is_applied():
    attn = layer(8, 8, query_dim=32, spatial_norm_dim=4)
    states, latents = torch.randn(2, 32, 4, 4), torch.randn(2, 4, 4, 4)
    expected = AttnProcessor2_0()(attn, states, temb=latents)
    torch.testing.assert_close(SlimAttnProcessor()(attn, states, temb=latents), expected)


def test_different_numbers_of_keys_and_values_are_refused():
    attn = layer(6, 3)
    attn.to_v.register_forward_hook(lambda _m, _i, out: out[:, :-1])
    with pytest.raises(ValueError, match="10 keys but 9 values"):
        attn(torch.randn(1, 10, 16))


def broken(change):
    slim = slim_config()
    change(slim)
    return slim


BROKEN = {
    "version 99": (lambda s: s.update(version=99), "version 99.*reads version 1"),
    "no linears": (lambda s: s.pop("linears"), "no slimdiff entry"),
    "another model": (lambda s: s["linears"].update({"no.such": [1, 2]}), "no.such: .*another"),
    "not a linear": (lambda s: s["linears"].update({"conv_in": [4, 4]}), "conv_in: .*Linear"),
    "contradiction": (lambda s: s["attentions"][TIED].update(qk=7), "to_q: has 16 .* 2 heads of 7"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_slim_configs_are_refused(dense, name):
    change, message = BROKEN[name]
    with pytest.raises(SlimConfigError, match=message):
        reshape_(copy.deepcopy(dense), broken(change))


def test_become_slim_refuses_dense_weights(dense):
    with pytest.raises(SlimConfigError, match="expected .* put the narrow weights in"):
        become_slim_(copy.deepcopy(dense), slim_config())


def test_a_slim_model_takes_on_another_slim_config():
    unet = slim_by_hand(tiny_pipeline(), untied=False).unet
    kind, slim = type(unet), slim_config()
    before = unet.config["slimdiff"]
    become_slim_(reshape_(unet, slim), slim)
    assert type(unet) is kind and unet.config["slimdiff"] != before
    assert unet.config["slimdiff"]["attentions"].keys() == slim["attentions"].keys()


def test_processors_of_their_own_cannot_be_untied(dense):
    unet = copy.deepcopy(dense)
    unet.fuse_qkv_projections()
    with pytest.raises(SlimConfigError, match="FusedAttnProcessor2_0.*keep the widths tied"):
        reshape_(unet, slim_config())


def test_one_class_for_each_base():
    base = diffusers.UNet2DConditionModel
    slim = slim_class(base)
    assert slim is slim_class(base) is slim_class(slim) is slim_denoiser.SlimUNet2DConditionModel
    assert slim.__module__ == slim_denoiser.MODULE
    with pytest.raises(TypeError, match="Linear is not a diffusers model class"):
        slim_class(nn.Linear)
    for name in ("SlimNoSuchModel", "SlimDDIMScheduler", "UNet2DConditionModel"):
        with pytest.raises(AttributeError, match=name):
            getattr(slim_denoiser, name)


@pytest.mark.parametrize(
    "name", ["PixArtTransformer2DModel", "DiTTransformer2DModel", "SD3Transformer2DModel"]
)
def test_config_keys_of_every_class_are_kept(name):
    base = getattr(diffusers, name)
    keys = set(inspect.signature(base.__init__).parameters)
    assert set(inspect.signature(slim_class(base).__init__).parameters) == keys | {"slimdiff"}


def test_saving_has_the_signature_that_pipelines_look_at():
    signature = inspect.signature(slim_class(diffusers.UNet2DConditionModel).save_pretrained)
    assert {"variant", "safe_serialization", "max_shard_size"} <= set(signature.parameters)


def test_slim_models_can_be_copied_and_pickled():
    unet = slim_by_hand(tiny_pipeline()).unet
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert type(other) is type(unet)
        assert torch.equal(call(other), call(unet))


def adapters(unet, width=32):
    """Processors for all layers; those of cross-attention are an IP-Adapter's."""
    return {
        name: IPAdapterAttnProcessor2_0(hidden_size=width, cross_attention_dim=24)
        if "attn2" in name
        else AttnProcessor2_0()
        for name in unet.attn_processors
    }


def test_adapters_made_for_wider_layers_are_refused(dense):
    unet = slim_by_hand(tiny_pipeline()).unet
    before = unet.attn_processors
    with pytest.raises(ValueError, match=f"{UNTIED}: was slimmed to other widths, and IPAdapter"):
        unet.set_attn_processor(adapters(unet))
    assert unet.attn_processors == before


def test_adapters_are_refused_where_a_layer_that_they_count_was_removed(dense):
    path = next(n for n in dense.attn_processors if "attn2" in n).removesuffix(".processor")
    slim = {"version": 1, "linears": {}, "attentions": {}, "constants": {path: 32}}
    unet = copy.deepcopy(dense)
    become_slim_(reshape_(unet, slim), slim)
    with pytest.raises(ValueError, match=f"{path}: was removed"):
        unet.set_attn_processor(adapters(unet))


def test_adapters_fit_where_attention_is_as_wide_as_it_was(dense):
    unet, slim = copy.deepcopy(dense), {"version": 1, "attentions": {}}
    slim["linears"] = {f"{FEED_FORWARD}.net.0.proj": [32, 100], f"{FEED_FORWARD}.net.2": [50, 32]}
    become_slim_(reshape_(unet, slim), slim)
    unet.set_attn_processor(adapters(unet))
    assert {type(p).__name__ for n, p in unet.attn_processors.items() if "attn2" in n} == {
        "IPAdapterAttnProcessor2_0"
    }
