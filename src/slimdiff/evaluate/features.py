"""Feature modules for distances between sets of images, none of which is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from slimdiff.errors import SlimdiffError

POOLED = 4
"""Side to which latents are pooled: few enough dimensions for a covariance of 100 images."""

CLIP_MEAN, CLIP_STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


class Features(nn.Module):
    """Images (n, 3, h, w) from 0 to 1 -> features (n, num_features).

    Attributes:
        label: where the features come from, for the results.
        num_features: their number.
    """

    label: str
    num_features: int


class LatentFeatures(Features):
    """The VAE encoder's mean latents, pooled to 4 by 4: any latent pipeline has one."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae
        config: Any = vae.config
        self.label = f"{type(vae).__name__} latents"
        self.num_features = int(config.latent_channels) * POOLED**2

    @torch.inference_mode()
    def forward(self, images_nchw: Tensor) -> Tensor:
        """Features (n, latent channels * 16) in float32."""
        weight = next(self.vae.parameters())
        scaled_nchw = images_nchw.to(weight.device, weight.dtype) * 2 - 1
        latents_nchw = self.vae.encode(scaled_nchw).latent_dist.mean  # type: ignore[operator]  # a method of any VAE
        return adaptive_avg_pool2d(latents_nchw, POOLED).flatten(1).float().cpu()


class ImageModel(Features):
    """A vision model of transformers from a local folder, such as CLIP's or DINOv2's."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        from transformers import AutoModel

        self.model = load_local(AutoModel, folder).eval()
        vision = getattr(self.model, "vision_model", None)
        if vision is not None:
            self.model = vision
        if self.model.main_input_name != "pixel_values":
            raise SlimdiffError(
                f"{folder}: holds a {type(self.model).__name__}, which does not see images; "
                f"expected a vision model such as CLIP's or DINOv2's"
            )
        self.size, self.mean, self.std = _preprocessing(Path(folder), self.model.config)
        self.label = f"{type(self.model).__name__} of {Path(folder).resolve().name}"
        self.num_features = int(self.model.config.hidden_size)

    @torch.inference_mode()
    def forward(self, images_nchw: Tensor) -> Tensor:
        """Pooled features (n, hidden size) in float32."""
        pixels_nchw = prepared(images_nchw, self.size, self.mean, self.std)
        return self.model(pixels_nchw).pooler_output.flatten(1).float()


def prepared(images_nchw: Tensor, size: int, mean: Any, std: Any) -> Tensor:
    """Images resized to `size` on the shorter side, cropped to a square in the middle, and
    normalised, as vision models expect them; (n, 3, size, size)."""
    height, width = images_nchw.shape[-2:]
    scale = size / min(height, width)
    larger = max(size, round(height * scale)), max(size, round(width * scale))
    resized_nchw = interpolate(
        images_nchw.float(), larger, mode="bicubic", antialias=True, align_corners=False
    )
    top, left = (larger[0] - size) // 2, (larger[1] - size) // 2
    cropped_nchw = resized_nchw[..., top : top + size, left : left + size].clamp(0, 1)
    mean_c, std_c = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (cropped_nchw - mean_c) / std_c


class ClipScore:
    """Mean over pairs of 100 max(cos(image, text), 0) under a local CLIP (Hessel et al., 2021)."""

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.model = load_local(CLIPModel, folder).eval()
        self.tokenizer = load_local(AutoTokenizer, folder)
        self.size, self.mean, self.std = _preprocessing(
            Path(folder), self.model.config.vision_config
        )
        self.label = Path(folder).resolve().name

    @torch.inference_mode()
    def __call__(self, images_nchw: Tensor, prompts: list[str]) -> float:
        """The score of images (n, 3, h, w) from 0 to 1 with their n prompts."""
        length = int(self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        pixels_nchw = prepared(images_nchw, self.size, self.mean, self.std)
        output = self.model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=pixels_nchw,
        )
        cosine_n = torch.cosine_similarity(output.image_embeds, output.text_embeds)
        return float(100 * cosine_n.clamp_min(0).mean())


def load_local(kind: Any, folder: str | Path) -> Any:
    """`kind.from_pretrained` of a local folder; safetensors only.

    Raises:
        SlimdiffError: no such folder, it cannot be loaded, or weights are not there.
    """
    path = Path(folder)
    if not path.is_dir():
        raise SlimdiffError(f"{path}: no such folder; expected a model of transformers on disk")
    is_model = "Tokenizer" not in kind.__name__
    more = {"use_safetensors": True, "output_loading_info": True} if is_model else {}
    try:
        loaded = kind.from_pretrained(str(path), local_files_only=True, **more)
    except (OSError, ValueError, RuntimeError) as error:
        raise SlimdiffError(f"{path}: cannot be loaded ({error})") from error
    if not is_model:
        return loaded
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise SlimdiffError(
            f"{path}: is no {type(model).__name__} ({len(missing)} of its weights are not there, "
            f"such as {missing[0]}); name the folder of such a model"
        )
    return model


def _preprocessing(folder: Path, config: Any) -> tuple[int, Any, Any]:
    """Image size, mean and standard deviation that a vision model expects."""
    file = folder / "preprocessor_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    size = getattr(config, "image_size", None) or 224
    return int(size), found.get("image_mean", CLIP_MEAN), found.get("image_std", CLIP_STD)
