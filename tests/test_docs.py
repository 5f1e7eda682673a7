"""The worked example of the documentation, run as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_a_model_is_added_as_the_documentation_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoModel, LTXVideoTransformer3DModel

    text = (ROOT / "docs" / "add-your-model.md").read_text(encoding="utf-8")
    family, use = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LTXVideoTransformer3DModel, "slimdiff_family", None, raising=False)
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(family + use, "add-your-model.md", "exec"), names)
    slim = names["denoiser"]
    assert isinstance(slim, LTXVideoTransformer3DModel)
    loaded = AutoModel.from_pretrained("ltx-slim", trust_remote_code=True)
    assert loaded.num_parameters() == slim.num_parameters() == names["plan"].figures["params"]  # type: ignore[attr-defined]  # a Plan
    dense = names["plan"].figures["params_dense"]  # type: ignore[attr-defined]  # a Plan
    assert slim.num_parameters() <= 0.8 * dense
    words = [line for line in family.splitlines() if re.search(r"\w", line)]
    assert len(words) <= 15
