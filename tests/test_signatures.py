import copy

import pytest
import torch

from slimdiff.errors import SlimdiffError
from slimdiff.signatures import select_prompts, signatures, sketch
from tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(seed=0)


def test_sketch_keeps_inner_products():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 300, generator=generator, dtype=torch.float64)
    sketches = [sketch(x, 64, f"seed {i}") for i in range(400)]
    mean = torch.stack([s @ s.mT for s in sketches]).mean(0)
    torch.testing.assert_close(mean / 300, x @ x.mT / 300, atol=0.03, rtol=0)
    assert torch.equal(sketch(x, 64, "a"), sketch(x, 64, "a"))


def test_a_signature_belongs_to_its_prompt_alone(pipe):
    seen = []
    rows = signatures(
        pipe, ["a cat", "a dog", "a cat"], batch_size=2, progress=lambda *args: seen.append(args)
    )
    assert rows.shape == (3, 512) and rows.dtype == torch.float64
    torch.testing.assert_close(rows[0], rows[2], atol=1e-4, rtol=0)
    assert (rows[0] - rows[1]).norm() > 10 * (rows[0] - rows[2]).norm()
    assert seen == [("signatures", 2, 3), ("signatures", 3, 3)]
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_the_model_is_not_changed(pipe):
    before = copy.deepcopy(pipe.unet.state_dict())
    select_prompts(pipe, ["a cat", "a dog"], 1)
    after = pipe.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_selection_counts_distinct_prompts(pipe):
    pool = ["a cat", "a dog", "a cat", "the sea"]
    prompts, chosen = select_prompts(pipe, pool, 3)
    assert sorted(prompts) == ["a cat", "a dog", "the sea"]
    assert len(chosen.scores) == 3
    with pytest.raises(SlimdiffError, match="n is 4, but the pool has 3 distinct prompts"):
        select_prompts(pipe, pool, 4)
