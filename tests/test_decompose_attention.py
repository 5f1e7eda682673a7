import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from slimdiff import decompose
from slimdiff.decompose.mixing import even_mix

HEADS, E, INNER, OUT, TOKENS = 3, 5, 15, 7, 60
EXACT = 1e-13  # damping too small to see
WIDTHS = [0, 1, 2, 4, 5]


def samples(seed: int, tokens: int = TOKENS, channels: int = INNER) -> Tensor:
    """Correlated activations (tokens, channels) of falling energy, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix_ii = torch.randn(channels, channels, generator=generator).double()
    x_ni = torch.randn(tokens, channels, generator=generator).double()
    scale_i = torch.logspace(0, -1.5, channels).double()
    return (x_ni * scale_i) @ mix_ii + 0.3 * torch.randn(channels, generator=generator).double()


def weight(seed: int, out: int = OUT) -> Tensor:
    return torch.randn(out, INNER, generator=torch.Generator().manual_seed(seed)).double()


def split(x_ni: Tensor, heads: int = HEADS) -> Tensor:
    """(heads, tokens, e) of (tokens, heads * e)."""
    return x_ni.view(len(x_ni), heads, -1).transpose(0, 1)


def head_moments(x_ni: Tensor) -> Tensor:
    x_hne = split(x_ni)
    return x_hne.mT @ x_hne / len(x_ni)


def full_moment(x_ni: Tensor) -> Tensor:
    return x_ni.mT @ x_ni / len(x_ni)


def slim_values(z_ni: Tensor, maps: dict[str, Tensor]) -> Tensor:
    """z' (tokens, heads * r), head-major."""
    return (split(z_ni) @ maps["v"]).transpose(0, 1).flatten(1)


def pair_error(q_ni: Tensor, k_ni: Tensor, maps: dict[str, Tensor]) -> Tensor:
    """Mean squared logit error over all pairs of a query and a key, summed over heads."""
    q_hne, k_hne = split(q_ni), split(k_ni)
    slim_hnn = (q_hne @ maps["q"]) @ (k_hne @ maps["k"]).mT
    return (q_hne @ k_hne.mT - slim_hnn).square().mean((1, 2)).sum()


@pytest.mark.parametrize("width", WIDTHS)
def test_query_key_error_is_the_measured_one(width):
    q_ni, k_ni = samples(0), samples(1, tokens=40)
    found = decompose.query_key(head_moments(q_ni), head_moments(k_ni))
    assert_close(
        found.errors[width], pair_error(q_ni, k_ni, found.maps(width)), rtol=1e-6, atol=1e-12
    )


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), width=st.integers(0, E))
def test_query_key_error_is_the_discarded_singular_values_of_the_logits(seed, width):
    q_ni, k_ni = samples(seed), samples(seed + 1, tokens=40)
    found = decompose.query_key(head_moments(q_ni), head_moments(k_ni))
    sigma_he = torch.linalg.svdvals(split(q_ni) @ split(k_ni).mT)[:, :E]
    expected = sigma_he[:, width:].square().sum() / (TOKENS * 40)
    assert_close(found.errors[width], expected, rtol=1e-6, atol=1e-12)


def test_query_key_equals_the_papers_long_way():
    """SVD of Cx^1/2 Wq^T Wk Cc^1/2, channels by channels, for one head."""
    d, e, r = 12, 5, 3
    x_nd, c_nd = samples(0, 80, d), samples(1, 90, d)
    generator = torch.Generator().manual_seed(2)
    wq_ed, wk_ed = torch.randn(2, e, d, generator=generator).double()
    roots = []
    for samples_nd in (x_nd, c_nd):
        values_d, vectors_dd = torch.linalg.eigh(full_moment(samples_nd))
        roots.append((vectors_dd * values_d.sqrt() @ vectors_dd.mT, values_d, vectors_dd))
    (x_root, x_values, x_vectors), (c_root, c_values, c_vectors) = roots
    u, sigma, vt = torch.linalg.svd(x_root @ wq_ed.mT @ wk_ed @ c_root)
    x_inverse = x_vectors / x_values.sqrt() @ x_vectors.mT
    c_inverse = c_vectors / c_values.sqrt() @ c_vectors.mT
    paper_dd = x_inverse @ (u[:, :r] * sigma[:r]) @ vt[:r] @ c_inverse

    q_moment = full_moment(x_nd @ wq_ed.mT).unsqueeze(0)
    k_moment = full_moment(c_nd @ wk_ed.mT).unsqueeze(0)
    found = decompose.query_key(q_moment, k_moment)
    maps = found.maps(r)
    ours_dd = (maps["q"][0].mT @ wq_ed).mT @ (maps["k"][0].mT @ wk_ed)
    assert_close(ours_dd, paper_dd, rtol=1e-6, atol=1e-8)
    assert_close(found.errors[:-1] - found.errors[1:], sigma[:e].square(), rtol=1e-6, atol=1e-10)


def test_query_key_maps_are_balanced_to_the_ratio_that_there_was():
    q_hee, k_hee = head_moments(samples(0)), head_moments(samples(1))
    maps = decompose.query_key(q_hee, k_hee).maps(3)
    q_slim, k_slim = maps["q"].mT @ q_hee @ maps["q"], maps["k"].mT @ k_hee @ maps["k"]
    energies = (m.diagonal(dim1=1, dim2=2).sum(1) for m in (q_hee, k_hee))
    ratio_h = torch.div(*energies)
    assert_close(q_slim, k_slim * ratio_h.view(-1, 1, 1), rtol=1e-6, atol=1e-9)
    unmixed = even_mix(3, q_slim) @ q_slim @ even_mix(3, q_slim).mT
    diagonal = torch.diag_embed(unmixed.diagonal(dim1=1, dim2=2))
    assert_close(unmixed, diagonal, rtol=0, atol=1e-8 * float(q_slim.max()) + 1e-8)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), width=st.integers(0, E), out=st.sampled_from([2, 7, 20]))
def test_value_output_refit_is_the_least_squares_solution(seed, width, out):
    z_ni, w_oi = samples(seed), weight(seed, out)
    found = decompose.value_output(w_oi, full_moment(z_ni), HEADS, refit=True, damping=EXACT)
    maps = found.maps(width)
    z_slim, y_no = slim_values(z_ni, maps), z_ni @ w_oi.mT
    measured = (y_no - z_slim @ (w_oi @ maps["out"]).mT).square().sum() / TOKENS
    oracle = torch.linalg.lstsq(z_slim, y_no).solution if width else y_no[:0]
    expected = (y_no - z_slim @ oracle).square().sum() / TOKENS
    scale = float(found.errors[0])
    assert_close(measured, expected, rtol=1e-6, atol=1e-11 * scale)
    assert_close(found.errors[width], measured, rtol=1e-6, atol=1e-11 * scale)


@pytest.mark.parametrize("out", [2, OUT])
@pytest.mark.parametrize("width", WIDTHS)
def test_value_output_without_refit_is_optimal_in_every_head(width, out):
    z_ni, w_oi = samples(0), weight(1, out)
    found = decompose.value_output(w_oi, head_moments(z_ni), HEADS, refit=False, damping=EXACT)
    maps = found.maps(width)
    slim_hor = (w_oi @ maps["out"]).view(out, HEADS, width).transpose(0, 1)
    y_hno = split(z_ni) @ w_oi.view(out, HEADS, E).permute(1, 2, 0)
    y_slim = (split(z_ni) @ maps["v"]) @ slim_hor.mT
    measured = (y_hno - y_slim).square().sum() / TOKENS
    discarded = torch.linalg.svdvals(y_hno)[:, width:].square().sum() / TOKENS
    assert_close(measured, discarded, rtol=1e-6, atol=1e-11)
    assert_close(found.errors[width], measured, rtol=1e-6, atol=1e-11)


def test_value_output_without_refit_reads_only_the_heads_own_blocks():
    z_ni, w_oi = samples(0), weight(1)
    full = decompose.value_output(w_oi, full_moment(z_ni), HEADS, refit=False)
    heads = decompose.value_output(w_oi, head_moments(z_ni), HEADS, refit=False)
    assert_close(full.errors, heads.errors)
    assert_close(full.maps(2)["out"], heads.maps(2)["out"])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), width=st.integers(1, E - 1))
def test_refit_is_never_worse(seed, width):
    z_ni, w_oi = samples(seed), weight(seed)
    errors = []
    for refit in (True, False):
        found = decompose.value_output(w_oi, full_moment(z_ni), HEADS, refit=refit, damping=EXACT)
        effective_oi = decompose.effective_output(w_oi, found.maps(width))
        errors.append(float((z_ni @ (w_oi - effective_oi).mT).square().sum()))
    assert errors[0] <= errors[1] * (1 + 1e-9)


def test_value_maps_are_orthonormal_on_channels_of_unit_energy_and_span_nested_spaces():
    moment_ii = full_moment(samples(0))
    found = decompose.value_output(weight(0), moment_ii, HEADS, refit=True)
    scale_he1 = moment_ii.diagonal().sqrt().view(HEADS, E, 1)
    v_her, narrower_her = (scale_he1 * found.maps(width)["v"] for width in (3, 2))
    gram_hrr = v_her.mT @ v_her
    level_h = gram_hrr[:, 0, 0]
    assert_close(gram_hrr, level_h.view(-1, 1, 1) * torch.eye(3).double())
    assert_close(level_h.sqrt().log2(), level_h.sqrt().log2().round())  # powers of two
    assert_close(v_her @ (v_her.mT @ narrower_her), level_h.view(-1, 1, 1) * narrower_her)


def decompositions(q_ni: Tensor, z_ni: Tensor, w_oi: Tensor) -> list[decompose.Decomposition]:
    return [
        decompose.query_key(head_moments(q_ni), head_moments(z_ni)),
        decompose.value_output(w_oi, full_moment(z_ni), HEADS, refit=True),
        decompose.value_output(w_oi, head_moments(z_ni), HEADS, refit=False),
    ]


def test_full_width_is_an_exact_identity():
    query_key, *values = decompositions(samples(0), samples(1), weight(2))
    eye_hee = torch.eye(E).double().expand(HEADS, E, E)
    assert torch.equal(query_key.maps(E)["q"], eye_hee)
    assert torch.equal(query_key.maps(E)["k"], eye_hee)
    for found in values:
        assert torch.equal(found.maps(E)["v"], eye_hee)
        assert torch.equal(found.maps(E)["out"], torch.eye(INNER).double())


def test_curves_fall_to_zero_and_regular_moments_miss_nothing():
    for found in decompositions(samples(0), samples(1), weight(2)):
        assert found.errors.dtype == torch.float64
        assert found.errors.shape == (E + 1,) and found.width == E
        assert (found.errors[:-1] > found.errors[1:]).all() and found.errors[-1] == 0
        assert not found.singular


def degenerate(kind: str) -> Tensor:
    z_ni = samples(5)
    if kind == "zero":
        return torch.zeros_like(z_ni)
    if kind == "few tokens":
        return z_ni[:3]
    if kind == "dead head":
        return torch.cat([torch.zeros_like(z_ni[:, :E]), z_ni[:, E:]], 1)
    if kind == "equal heads":
        return z_ni[:, :E].repeat(1, HEADS)
    z_ni[:, 1] = z_ni[:, 0]
    return z_ni


@pytest.mark.parametrize("out", [2, OUT, 20])
@pytest.mark.parametrize(
    "kind", ["zero", "few tokens", "dead head", "equal heads", "equal channels"]
)
def test_degenerate_moments_give_finite_maps(kind, out):
    z_ni, w_oi = degenerate(kind), weight(0, out)
    found = decompositions(samples(6), z_ni, w_oi)
    for each in found:
        for width in range(E + 1):
            for name, value in each.maps(width).items():
                assert value.isfinite().all(), name
                assert value.abs().max() < 1e6 if value.numel() else True
    assert found[1].singular
    assert found[0].singular == found[2].singular == (kind != "equal heads")


@pytest.mark.parametrize("kind", ["few tokens", "dead head", "equal heads", "equal channels"])
def test_degenerate_moments_still_predict_the_error(kind):
    z_ni, q_ni, w_oi = degenerate(kind), samples(6), weight(0)
    query_key, value_output, _ = decompositions(q_ni, z_ni, w_oi)
    for width in range(E + 1):
        measured = pair_error(q_ni, z_ni, query_key.maps(width))
        assert_close(query_key.errors[width], measured, rtol=1e-5, atol=1e-12)
        effective_oi = decompose.effective_output(w_oi, value_output.maps(width))
        measured = (z_ni @ (w_oi - effective_oi).mT).square().sum() / len(z_ni)
        # The curve bounds it: it also counts the ridge, 1e-6 of the energy.
        assert measured <= value_output.errors[width] * (1 + 1e-6) + 1e-12
        assert value_output.errors[width] <= measured + 1e-4 * value_output.errors[0]


def test_effective_key_reproduces_the_slim_logits():
    q_ni, k_ni = samples(0), samples(1)
    maps = decompose.query_key(head_moments(q_ni), head_moments(k_ni)).maps(2)
    w_id, bias_i = torch.randn(INNER, 4).double(), torch.randn(INNER).double()
    c_nd = torch.randn(9, 4).double()
    slim_hnr = split(c_nd @ w_id.mT + bias_i) @ maps["k"]
    expected_hnn = (split(q_ni) @ maps["q"]) @ slim_hnr.mT
    w_eff, bias_eff = (decompose.effective_key(x, maps) for x in (w_id, bias_i))
    assert w_eff.shape == w_id.shape and bias_eff.shape == bias_i.shape
    k_eff = c_nd @ w_eff.mT + bias_eff
    assert_close(split(q_ni) @ split(k_eff).mT, expected_hnn)


@pytest.mark.parametrize("refit", [True, False])
def test_effective_output_reproduces_the_slim_output_in_the_weights_dtype(refit):
    z_ni, w_oi = samples(0), weight(1)
    maps = decompose.value_output(w_oi, full_moment(z_ni), HEADS, refit=refit).maps(2)
    expected = slim_values(z_ni, maps) @ (w_oi @ maps["out"]).mT
    assert_close(z_ni @ decompose.effective_output(w_oi, maps).mT, expected)
    assert decompose.effective_output(w_oi.bfloat16(), maps).dtype == torch.bfloat16


def test_whole_heads_keeps_the_most_important_in_their_old_order():
    selection = decompose.whole_heads(torch.tensor([0.2, 0.9, 0.1, 0.9]))
    assert selection.maps(3)["heads"].tolist() == [0, 1, 3]
    assert selection.maps(1)["heads"].tolist() == [1]
    assert selection.maps(4)["heads"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="0 .. 4, got 5"):
        selection.maps(5)


def test_effective_heads_zeroes_the_columns_of_the_others():
    w_oi = weight(0)
    result_oi = decompose.effective_heads(w_oi, {"heads": torch.tensor([0, 2])}, HEADS)
    assert torch.equal(result_oi[:, E : 2 * E], torch.zeros(OUT, E).double())
    assert torch.equal(result_oi[:, :E], w_oi[:, :E])
    assert torch.equal(result_oi[:, 2 * E :], w_oi[:, 2 * E :])


def test_inputs_stay_and_results_are_float64():
    moment_ii, w_oi = full_moment(samples(0)).float(), weight(0).float()
    heads_hee = head_moments(samples(0)).float()
    before = [x.clone() for x in (moment_ii, w_oi, heads_hee)]
    results = [
        decompose.query_key(heads_hee, heads_hee),
        decompose.value_output(w_oi, moment_ii, HEADS, refit=True),
        decompose.value_output(w_oi, moment_ii, HEADS, refit=False),
    ]
    assert all(x.dtype == torch.float64 for each in results for x in each.maps(3).values())
    assert all(torch.equal(x, y) for x, y in zip((moment_ii, w_oi, heads_hee), before, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, f, w: decompose.query_key(f, m), r"q_moment_hee must be .* \(15, 15\)"),
        (lambda m, f, w: decompose.query_key(m, m[:2]), r"k_moment_hee is \(2, 5, 5\), exp"),
        (lambda m, f, w: decompose.value_output(w, m, HEADS, refit=True), "refit needs"),
        (lambda m, f, w: decompose.value_output(w, f, 4, refit=True), "heads = 4"),
        (lambda m, f, w: decompose.value_output(w[:, :12], f, 3, refit=True), r"\(12, 12\)"),
        (lambda m, f, w: decompose.query_key(m, m).maps(6), "0 .. 5, got 6"),
        (lambda m, f, w: decompose.whole_heads(m), "importance_h must be"),
        (lambda m, f, w: decompose.effective_heads(w, {}, 4), "do not split into 4"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    z_ni = samples(0)
    with pytest.raises(ValueError, match=message):
        call(head_moments(z_ni), full_moment(z_ni), weight(0))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_queries_and_keys_keep_their_range(scale):
    """Keys a thousand times as large as queries, or as small: neither outgrows itself."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, 8, generator=generator, dtype=torch.float64)
    q, k = x, scale * x.roll(1, 1) @ torch.randn(8, 8, generator=generator, dtype=torch.float64)
    moments = [y.mT @ y / y.shape[1] for y in (q, k)]
    for width in (2, 5, 7):
        maps = decompose.query_key(*moments).maps(width)
        for y, map_ in ((q, maps["q"]), (k, maps["k"])):
            assert (y @ map_).square().sum() <= 1.0001 * y.square().sum()


@pytest.mark.parametrize("width", [1, 2, 3, 8, 40])
def test_even_mix_is_orthogonal_and_no_direction_stands_out(width: int) -> None:
    mix_rr = even_mix(width, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(mix_rr.mT @ mix_rr, torch.eye(width, dtype=torch.float64))
    assert mix_rr.abs().max() <= (2 / width) ** 0.5 + 1e-12


def test_slim_channels_of_a_head_are_about_equally_strong() -> None:
    strengths = torch.tensor([1e3, 10.0, 1.0, 0.1], dtype=torch.float64)
    moment_hee = torch.diag(strengths)[None]
    maps = decompose.query_key(moment_hee, moment_hee).maps(3)
    for role in ("q", "k"):
        energy_r = (maps[role].mT @ moment_hee @ maps[role]).diagonal(dim1=-2, dim2=-1)
        assert energy_r.max() <= 2 * strengths.sum() / 3
