"""A tiny random StableDiffusionPipeline, made from nothing, for tests."""

from __future__ import annotations

import string
from typing import Any

import torch

START, END = "<|startoftext|>", "<|endoftext|>"


def tiny_pipeline(seed: int = 0) -> Any:
    """16 by 16 latents, 32 by 32 images, four transformer blocks of two 16-wide heads."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(),
        tokenizer=_tokenizer(),
        unet=_unet(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3_pipeline(seed: int = 0) -> Any:
    """StableDiffusion3Pipeline: two CLIP encoders and a T5, each with a tokenizer of letters."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    )
    t5, letters = _t5()
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(shift_factor=0.0),
        text_encoder=_text_encoder(CLIPTextModelWithProjection, 3),
        tokenizer=_tokenizer(),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, 3),
        tokenizer_2=_tokenizer(),
        text_encoder_3=t5,
        tokenizer_3=letters,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase]
    vocabulary = [(piece, 0.0 if place < 3 else -1.0) for place, piece in enumerate(pieces)]
    config = T5Config(
        vocab_size=len(pieces),
        d_model=48,
        d_kv=16,
        d_ff=64,
        num_layers=3,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=32)
    return T5EncoderModel(config).eval(), tokenizer


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
    ).eval()


def _vae(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        **more,
    ).eval()


def _text_encoder(kind: Any = None, layers: int = 1) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(_vocabulary()),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=layers,
        projection_dim=16,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=_vocabulary()[START],
        eos_token_id=_vocabulary()[END],
        pad_token_id=_vocabulary()[END],
    )
    return (kind or CLIPTextModel)(config).eval()


def _tokenizer() -> Any:
    """One token per letter; prompts beyond 14 letters are cut."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        vocab=_vocabulary(),
        merges=[],
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=16,
    )


def _vocabulary() -> dict[str, int]:
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    return {token: i for i, token in enumerate(tokens)}


TIED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
UNTIED = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
FEWER_HEADS = "mid_block.attentions.0.transformer_blocks.0.attn1"
FEED_FORWARD = "mid_block.attentions.0.transformer_blocks.0.ff"
REMOVED = {
    "up_blocks.1.attentions.1.transformer_blocks.0.attn1": "attention",
    "up_blocks.1.attentions.1.transformer_blocks.0.ff": "feed_forward",
    "up_blocks.0.resnets.0": "resnet",
    "mid_block.resnets.1": "resnet",
}


def slim_config(untied: bool = True) -> dict[str, Any]:
    """Narrow shapes for the denoiser of `tiny_pipeline`, in the slim config's format."""
    from slimdiff.slim_denoiser import VERSION

    attentions = {TIED: (2, 8, 8), FEWER_HEADS: (1, 16, 16)}
    if untied:
        attentions[UNTIED] = (2, 12, 5)
    linears = {f"{FEED_FORWARD}.net.0.proj": [32, 100], f"{FEED_FORWARD}.net.2": [50, 32]}
    for path, (heads, qk, vo) in attentions.items():
        context = 24 if path.endswith("attn2") else 32
        linears[f"{path}.to_q"] = [32, heads * qk]
        linears[f"{path}.to_k"] = [context, heads * qk]
        linears[f"{path}.to_v"] = [context, heads * vo]
        linears[f"{path}.to_out.0"] = [heads * vo, 32]
    sizes = {p: {"heads": h, "qk": qk, "vo": vo} for p, (h, qk, vo) in attentions.items()}
    slim = {"version": VERSION, "linears": linears, "attentions": sizes}
    slim["fused_upsamplers"] = {"up_blocks.0.upsamplers.0": 2}
    return slim | {"constants": dict.fromkeys(REMOVED, 32)}


def slim_by_hand(pipe: Any, untied: bool = True, seed: int = 1) -> Any:
    """Give the denoiser of `tiny_pipeline` narrow random layers, a plan and maps."""
    from slimdiff.plan import Entry, Plan, SlimRecord
    from slimdiff.slim_denoiser import become_slim_, reshape_

    torch.manual_seed(seed)
    slim = slim_config(untied)
    become_slim_(reshape_(pipe.unet, slim), slim)
    for path in REMOVED:
        torch.nn.init.normal_(pipe.unet.get_submodule(path).constant, std=0.1)
    entries = {FEED_FORWARD: Entry("feed_forward", 50, 128)}
    for path, sizes in slim["attentions"].items():
        entries[f"{path}.qk"] = Entry("query_key", sizes["qk"], 16, sizes["heads"], 2)
        entries[f"{path}.vo"] = Entry("value_output", sizes["vo"], 16, sizes["heads"], 2)
    for path, kind in REMOVED.items():
        halves = {".qk": "query_key", ".vo": "value_output"} if kind == "attention" else {"": kind}
        entries |= {path + end: Entry(half, 0, 32) for end, half in halves.items()}
    figures = {"params_dense": 359_844, "macs_dense": 2_000, "macs": 1_500, "error_on_probes": 1e-5}
    fused = list(slim["fused_upsamplers"])
    plan = Plan("UNet2DConditionModel", "slimdiff", entries, "probed", "80 %", figures, fused)
    maps = {
        f"{TIED}.qk/q": torch.randn(2, 16, 8, dtype=torch.float64),
        f"{TIED}.vo/out": 1e9 * torch.randn(32, 16, dtype=torch.float64),
        f"{FEED_FORWARD}/units": torch.arange(50),
    }
    pipe.unet.slim_record = SlimRecord(plan, maps)
    return pipe


def image(pipe: Any, **more: Any) -> Any:
    """Two steps from a fixed seed, as an array."""
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "output_type": "np"} | more
    return pipe("a red circle", generator=generator, **settings).images


def velocity(unet: Any) -> list[float]:
    """What the denoiser of `tiny_pipeline` makes of fixed inputs, in a process of any kind."""
    generator = torch.Generator().manual_seed(3)
    sample, text = (torch.randn(s, generator=generator) for s in ((2, 4, 16, 16), (2, 7, 24)))
    with torch.no_grad():
        output: list[float] = unet(sample, 500, encoder_hidden_states=text)[0].flatten().tolist()
    return output
