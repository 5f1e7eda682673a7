"""One tiny random denoiser for every shape of model that slimdiff knows. The contract suite runs
on each; a new family adds one function here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Inputs = list[dict[str, Any]]


def _unet(**changes: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**(config | changes)).eval()


def _inputs(channels: int = 24, **added: Any) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def call(step: int) -> dict[str, Any]:
        return {
            "sample": torch.randn(2, 4, 8, 8, generator=generator),
            "timestep": torch.tensor(900 - 200 * step),
            "encoder_hidden_states": torch.randn(2, 7, channels, generator=generator),
        } | {name: make(generator) for name, make in added.items()}

    return [call(step) for step in range(4)]


def sd1() -> tuple[nn.Module, Inputs]:
    """Convolutional projections around the blocks, two heads."""
    return _unet(), _inputs()


def sd2() -> tuple[nn.Module, Inputs]:
    """Linear projections, heads of equal width, attention computed in float32."""
    heads = {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}
    return _unet(**heads), _inputs()


def sdxl() -> tuple[nn.Module, Inputs]:
    """Several transformer blocks in a row and added text and time conditioning."""
    model = _unet(
        use_linear_projection=True,
        transformer_layers_per_block=(2, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )

    def added(generator: torch.Generator) -> dict[str, Any]:
        return {
            "text_embeds": torch.randn(2, 16, generator=generator),
            "time_ids": torch.rand(2, 6, generator=generator),
        }

    return model, _inputs(added_cond_kwargs=added)


def cross_only() -> tuple[nn.Module, Inputs]:
    """Both attention layers of a block look at the text."""
    return _unet(only_cross_attention=True), _inputs()


def plain_gelu() -> tuple[nn.Module, Inputs]:
    """Feed-forward layers without gates."""
    from diffusers.models.attention import FeedForward

    model = _unet()
    for module in list(model.modules()):
        if hasattr(module, "attn1"):
            module.ff = FeedForward(module.ff.net[2].out_features, activation_fn="gelu")
    return model.eval(), _inputs()


def _latents(generator: torch.Generator, channels: int = 4) -> torch.Tensor:
    return torch.randn(2, channels, 8, 8, generator=generator)


def _calls(call: Callable[[torch.Generator, int], dict[str, Any]]) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return [call(generator, step) for step in range(4)]


def _joint(**changes: Any) -> tuple[nn.Module, Inputs]:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 8,
    }

    def call(generator: torch.Generator, step: int) -> dict[str, Any]:
        return {
            "hidden_states": _latents(generator),
            "encoder_hidden_states": torch.randn(2, 7, 24, generator=generator),
            "pooled_projections": torch.randn(2, 20, generator=generator),
            "timestep": torch.full((2,), 900.0 - 200 * step),
        }

    return SD3Transformer2DModel(**(config | changes)).eval(), _calls(call)


def sd3() -> tuple[nn.Module, Inputs]:
    """Joint attention of image and text; the last block puts out no text."""
    return _joint()


def sd35() -> tuple[nn.Module, Inputs]:
    """Normalised queries and keys, and a second attention layer in the first block."""
    return _joint(qk_norm="rms_norm", dual_attention_layers=(0,))


def pixart() -> tuple[nn.Module, Inputs]:
    """Self- and cross-attention under adaLN-single."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=24,
        use_additional_conditions=False,
    )

    def call(generator: torch.Generator, step: int) -> dict[str, Any]:
        return {
            "hidden_states": _latents(generator),
            "encoder_hidden_states": torch.randn(2, 7, 24, generator=generator),
            "timestep": torch.full((2,), 900.0 - 200 * step),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    return model.eval(), _calls(call)


def dit() -> tuple[nn.Module, Inputs]:
    """Self-attention alone, conditioned on a class."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, in_channels=4
    )

    def call(generator: torch.Generator, step: int) -> dict[str, Any]:
        return {
            "hidden_states": _latents(generator),
            "timestep": torch.full((2,), 900 - 200 * step),
            "class_labels": torch.randint(1000, (2,), generator=generator),
        }

    return model.eval(), _calls(call)


def flux() -> tuple[nn.Module, Inputs]:
    """Rotary positions, and single blocks whose output projection two layers share."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    positions = torch.stack(torch.meshgrid(*map(torch.arange, (1, 4, 4)), indexing="ij"), -1)

    def call(generator: torch.Generator, step: int) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 16, 16, generator=generator),
            "encoder_hidden_states": torch.randn(2, 7, 24, generator=generator),
            "pooled_projections": torch.randn(2, 20, generator=generator),
            "timestep": torch.full((2,), 0.9 - 0.2 * step),
            "img_ids": positions.view(16, 3).float(),
            "txt_ids": torch.zeros(7, 3),
            "guidance": torch.full((2,), 3.5),
        }

    return model.eval(), _calls(call)


def _text(generator: torch.Generator, tokens: int = 7) -> torch.Tensor:
    return torch.randn(2, tokens, 24, generator=generator)


def qwen_image() -> tuple[nn.Module, Inputs]:
    """Joint attention with rotary positions that the shape of the image gives."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )

    def call(generator: torch.Generator, step: int) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 16, 16, generator=generator),
            "encoder_hidden_states": _text(generator),
            "timestep": torch.full((2,), 0.9 - 0.2 * step),
            "img_shapes": [[(1, 4, 4)]] * 2,
        }

    return model.eval(), _calls(call)


def cogvideox() -> tuple[nn.Module, Inputs]:
    """Text and video in one sequence, rotary positions given from outside."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )
    angles = torch.rand(32, 16, generator=torch.Generator().manual_seed(2))

    def call(generator: torch.Generator, step: int) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 2, 4, 8, 8, generator=generator),
            "encoder_hidden_states": _text(generator),
            "timestep": torch.full((2,), 900 - 200 * step),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }

    return model.eval(), _calls(call)


def _wan(**changes: Any) -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**(config | changes)).eval()


def wan() -> tuple[nn.Module, Inputs]:
    """Video; queries and keys normalised over all heads."""

    def call(generator: torch.Generator, step: int) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2, 8, 8, generator=generator),
            "timestep": torch.full((2,), 900 - 200 * step),
            "encoder_hidden_states": _text(generator),
        }

    return _wan(), _calls(call)


def wan_image() -> tuple[nn.Module, Inputs]:
    """Image to video: cross-attention has a second set of keys and values."""

    def call(generator: torch.Generator, step: int) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2, 8, 8, generator=generator),
            "timestep": torch.full((2,), 900 - 200 * step),
            "encoder_hidden_states": _text(generator, 512),
            "encoder_hidden_states_image": torch.randn(2, 5, 20, generator=generator),
        }

    return _wan(image_dim=20, added_kv_proj_dim=24), _calls(call)


def hunyuan_dit() -> tuple[nn.Module, Inputs]:
    """Long skips between blocks, two texts, rotary positions."""
    from diffusers import HunyuanDiT2DModel

    torch.manual_seed(0)
    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=4,
        cross_attention_dim=24,
        cross_attention_dim_t5=24,
        pooled_projection_dim=8,
        text_len=7,
        text_len_t5=5,
        use_style_cond_and_image_meta_size=False,
    )
    angles = torch.rand(16, 16, generator=torch.Generator().manual_seed(2))

    def call(generator: torch.Generator, step: int) -> dict[str, Any]:
        return {
            "hidden_states": _latents(generator),
            "timestep": torch.full((2,), 900.0 - 200 * step),
            "encoder_hidden_states": _text(generator),
            "text_embedding_mask": torch.ones(2, 7),
            "encoder_hidden_states_t5": _text(generator, 5),
            "text_embedding_mask_t5": torch.ones(2, 5),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }

    return model.eval(), _calls(call)


def sana() -> tuple[nn.Module, Inputs]:
    """Linear attention, and feed-forward layers that convolve."""
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
    )

    def call(generator: torch.Generator, step: int) -> dict[str, Any]:
        return {
            "hidden_states": _latents(generator),
            "encoder_hidden_states": _text(generator),
            "timestep": torch.full((2,), 900.0 - 200 * step),
        }

    return model.eval(), _calls(call)


def controlnet() -> tuple[nn.Module, Inputs]:
    """A UNet's encoder, which puts out a tensor for each of its levels."""
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    model = ControlNetModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(8, 16),
    )
    with torch.no_grad():  # they begin at zero, so that an untrained one puts out nothing
        for convolution in (*model.controlnet_down_blocks, model.controlnet_mid_block):
            convolution.weight.normal_(std=0.1)
        model.controlnet_cond_embedding.conv_out.weight.normal_(std=0.1)
    control = {"controlnet_cond": lambda g: torch.randn(2, 3, 16, 16, generator=g)}
    return model.eval(), _inputs(**control)


TINY_MODELS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "sd1": sd1,
    "sd2": sd2,
    "sdxl": sdxl,
    "cross_only": cross_only,
    "plain_gelu": plain_gelu,
    "sd3": sd3,
    "sd35": sd35,
    "pixart": pixart,
    "dit": dit,
    "flux": flux,
    "qwen_image": qwen_image,
    "cogvideox": cogvideox,
    "wan": wan,
    "wan_image": wan_image,
    "hunyuan_dit": hunyuan_dit,
    "sana": sana,
    "controlnet": controlnet,
}
