"""Slim denoisers of every family load in plain diffusers: a process that never sees slimdiff."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import slimdiff
from test_contract import NOT_OF_ITS_CONFIG, Case, outputs
from tiny_models import TINY_MODELS

PLAIN = """
import sys
from pathlib import Path
import torch
from diffusers import AutoModel
from safetensors.torch import save_file
from tiny_models import TINY_MODELS

def flat(output):
    if isinstance(output, torch.Tensor):
        return [output.flatten()]
    return [tensor for part in output for tensor in flat(part)]

for folder in sorted(Path(sys.argv[1]).iterdir()):
    call = TINY_MODELS[folder.name]()[1][0]
    slim = AutoModel.from_pretrained(str(folder), trust_remote_code=True)
    with torch.no_grad():
        output = torch.cat(flat(slim(**call, return_dict=False)))
    save_file({"output": output}, Path(sys.argv[1]) / f"{folder.name}.safetensors")
assert "slimdiff" not in sys.modules
"""


def assert_plain_diffusers_gives(expected: dict[str, torch.Tensor], folder: Path) -> None:
    """Models saved in `folder` put this out in a process without slimdiff, but for rounding."""
    command = [sys.executable, "-c", PLAIN, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, output in expected.items():
        got = load_file(folder / f"{name}.safetensors")["output"]
        torch.testing.assert_close(got, output, rtol=1e-4, atol=1e-5)


def test_every_family_loads_in_plain_diffusers(tmp_path: Path) -> None:
    expected = {}
    for name in sorted(set(TINY_MODELS) - NOT_OF_ITS_CONFIG):
        case = Case(name)
        plan = slimdiff.allocate(
            case.model, case.statistics, slimdiff.Budget(params=0.85), allocation="uniform"
        )
        slim = slimdiff.rewrite(case.model, case.statistics, plan)
        slimdiff.save(slim, tmp_path / name)
        expected[name] = outputs(slim, case.inputs[:1])[0].flatten()
    assert_plain_diffusers_gives(expected, tmp_path)
