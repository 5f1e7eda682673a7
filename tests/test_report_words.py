"""What the page says beside its figures: names, warnings, kinds, and how to repeat it."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import sample_results
from slimdiff import results
from slimdiff.report import facts, names, numbers, render, rows
from slimdiff.report.plots import cover
from test_report import Page

CALL = "from slimdiff import compress\n\ncompress(\n    pipe,\n    prompts,\n)"


def text_of(found):
    return Page(render(found)).text


def compressed(**figures):
    """Results of a compression with other figures of its plan."""
    found = results.merged([sample_results.compressed()])
    found["plan"]["figures"] |= figures
    return found


def test_figures_have_one_name():
    found = sample_results.complete()
    figures = found["plan"]["figures"]
    figures |= {"layers_removed": 1, "heads_removed": 2, "upsamplers_fused": 3}
    figures |= {"error_guided": 1e-6, "error_on_seen": 1e-7, "healed": {"before": 1, "after": 0.5}}
    figures |= {"refit": {"before": 2.0, "layers": 3}}
    told = [*rows.cost(found["cost"]), *rows.fidelity(found["fidelity"])]
    assert {row.name for row in told if not row.detail} == set(names.FIGURES.values()) - {
        *(names.FIGURES[key] for key in (*names.ERRORS, "refit", "healed")),
        "layers removed wholly",
        "attention heads removed elsewhere",
        "upsamplers fused, at no loss",
    }
    text = text_of(found)
    for key, name in names.FIGURES.items():
        assert (names.figure_name(key, figures) if key in names.ERRORS else name) in text


def test_detail_rows_are_the_attributes_without_the_whole():
    scenes = sample_results.evaluated()["fidelity"]["scenes"]
    for model in scenes.values():
        model["attributes"]["whole"] = model["attributes"]["shape"]
    told = [row.name for row in rows.fidelity({"scenes": scenes})]
    assert told == [names.FIGURES["scenes"], "background", "colour", "shape", "size", "position"]


def test_a_call_of_python_is_shown_instead_of_a_command():
    found = compressed()
    versions = {"slimdiff": "0.1.0"}
    evaluation = {"command": "slimdiff evaluate a b", "versions": versions}
    found["made"] = [{"call": CALL, "prompts": 128, "versions": versions}, evaluation]
    page = render(found)
    told = f"# slimdiff 0.1.0\n# in Python, with a list of 128 prompts\n{CALL}\n\n"
    assert f"{told}# in a shell\nslimdiff evaluate a b</code>" in page
    assert page.count("from slimdiff import compress") == 1


@pytest.mark.parametrize(
    ("reused", "told"),
    [
        ([], "calibrate 150 s, allocate 12.5 s, rewrite"),
        (["calibrate"], "calibrate reused, allocate 12.5 s, rewrite"),
        (["calibrate", "allocate"], "calibrate reused, allocate 12.5 s and error curves reused"),
    ],
)
def test_what_was_reused_took_no_time(reused, told):
    assert f"took{told}" in text_of(compressed(reused=reused))


def test_results_of_before_there_was_reuse():
    found = compressed()
    del found["plan"]["figures"]["reused"]
    assert "calibrate 150 s" in text_of(found)


def test_swapped_models_are_warned_of_before_all_figures():
    found = sample_results.complete()
    assert "swapped" not in text_of(found)
    found["cost"]["params"] = {"dense": 90, "slim": 100}
    text = text_of(found)
    at = text.index("The second model (scenes-unet-slim) is larger than the first (scenes-unet)")
    assert at < text.index("one call is") and "11.1 % more" in text
    assert "of the parameters" not in facts.summary(found)


@pytest.mark.parametrize(("count", "doubted"), [(63, True), (64, False), (512, False)])
def test_a_frechet_distance_of_few_images_is_doubted(count, doubted):
    found = sample_results.complete()
    for key in ("frechet", "kernel"):
        found["fidelity"][key] |= {"count": count, "dimensions": 64}
    told = f"{count} images, features: the judge's; unreliable: fewer images than features (64)"
    assert text_of(found).count(told) == doubted


def test_a_slower_model_is_called_slower():
    found = sample_results.complete()
    found["cost"]["latency"]["denoiser"]["speedup"] = 0.8
    assert "one call is 1.25 × slower" in text_of(found)


def test_time_that_a_search_measured_is_shown_without_an_evaluation():
    found = compressed(latency={"dense": 0.05, "slim": 0.04, "speedup": 1.25})
    assert "time of one call50 ms → 40 ms1.25 × faster" in text_of(found)


def test_kinds_have_colours_of_their_own_and_new_ones_the_next():
    found = compressed()
    page = render(found)
    assert "ResNet channels" in page and "var(--kind-3)" in page
    assert "var(--kind-6)" not in page.split("</style>")[1]
    for group in found["groups"]:
        if group["kind"] == "resnet":
            group["kind"] = "state_space"
    page = render(found)
    assert "state-space" in page and "var(--kind-6)" in page.split("</style>")[1]
    assert "ResNet channels" not in page and "var(--kind-3)" not in page.split("</style>")[1]


def test_resnets_stand_under_their_part_of_the_network():
    page = render(compressed())
    groups = page[page.index('<section id="groups"') :]
    assert groups.count("<code>resnets.0</code>") == len(sample_results.PLACES)
    assert groups.count("<code>down_blocks.0</code>") == 1


def test_heads_that_went_are_told():
    group = {"dense_width": 40, "width": 40, "dense_heads": 8, "heads": 1}
    dense, slim = (told.replace("\xa0", " ") for told in facts.widths_told(group))
    assert (dense, slim) == ("40 × 8", "40 × 1")


def test_layers_that_went_are_told():
    found = compressed()
    kinds = ("query_key", "feed_forward")
    gone = [next(g for g in found["groups"] if g["kind"] == kind) for kind in kinds]
    for group in gone:
        group |= {"width": 0, "params": 0, "macs": 0}
    told = [tuple(t.replace("\xa0", " ") for t in facts.widths_told(group)) for group in gone]
    assert told == [("48 × 2", "removed"), (f"{gone[1]['dense_width']}", "removed")]
    assert render(found).count("\N{RIGHTWARDS ARROW} removed") >= len(gone)


@example(longest=0.0010000000000000002, nbins=2)
@given(longest=st.floats(1e-3, 1e12), nbins=st.integers(2, 8))
def test_an_axis_covers_its_last_tick_and_the_longest_bar(longest, nbins):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.barh([0], [longest])
    cover(axes.xaxis, nbins)
    ticks = axes.get_xticks()
    assert ticks[0] == axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] == ticks[-1] >= longest > ticks[-2]


def test_an_axis_of_nothing():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    cover(axes.yaxis, 3)
    assert axes.get_ylim()[0] == 0 and 1 <= axes.get_ylim()[1] < 2


@pytest.mark.parametrize("kinds", [1, 2, 3, 4])
def test_curves_of_few_kinds_fill_their_rows(kinds):
    found = compressed()
    shown = list(names.KINDS)[:kinds]
    found["groups"] = [group for group in found["groups"] if group["kind"] in shown]
    assert ('class="charts thirds"' in render(found)) == (kinds == 3)


def test_a_frontier_alone_tells_its_knee():
    sizes = ((0.9, 1e-5), (0.7, 1e-4), (0.5, 1e-2))
    points = [
        {"params": 1000 * s, "macs": 500 * s, "predicted": e, "measured": None} for s, e in sizes
    ]
    section = {"dense": {"params": 1000, "macs": 1000}, "points": points, "knee": 1}
    text = text_of({"model": {"dense": "sd15"}, "frontier": section})
    assert "sd15: frontier" in text and "lacks" not in text
    told = "At the knee 70 % of the parameters and 35 % of the MACs stay, with a velocity error of"
    assert f"{told} 1.0e-4, predicted." in text
    both = compressed() | {"frontier": section}
    assert "gone" in text_of(both) and "At the knee" not in text_of(both)


def test_numbers_in_words():
    assert numbers.short(6.03e-7) == "6.03e-7" and numbers.short(0.0123) == "0.0123"
    assert numbers.removed(100, 80).replace("\xa0", " ") == "20 % removed"
    assert numbers.removed(80, 100).replace("\xa0", " ") == "25 % more"
