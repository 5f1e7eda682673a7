import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

import sample_results
from browser import Browser, chromium
from slimdiff import results
from slimdiff.cli import main
from slimdiff.errors import SlimdiffError
from slimdiff.report import numbers, render, write_report
from slimdiff.report.gallery import AMPLIFICATION
from slimdiff.report.html import VOID, Html, tag
from slimdiff.report.made import to_repeat
from slimdiff.report.names import KINDS


class Page(HTMLParser):
    """Elements with their attributes, the text, and whether every tag is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.html, self.open, self.elements, self.texts = html, [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> out of place"

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)

    @property
    def titles(self):
        """What the page is made of, by the links at its top."""
        return re.findall(r'<a href="#\w+">(.*?)</a>', self.html)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts))

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.elements if name in attrs]


@pytest.fixture(scope="module")
def html():
    return render(sample_results.complete())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_sentence_at_the_top_says_what_is_gone_and_what_it_cost(page):
    figures = sample_results.compressed()["plan"]["figures"]
    params, macs = (1 - figures[m] / figures[f"{m}_dense"] for m in ("params", "macs"))
    assert (
        f"scenes-unet-slim is scenes-unet with {100 * params:.1f} % of the parameters and "
        f"{100 * macs:.1f} % of the MACs of its UNet2DConditionModel gone; "
        f"one call is 1.16 × faster (its MACs allow 1.21 ×); its velocity error on test prompts is "
        f"2.0e-7 and images of the same seeds agree to 64.7 dB PSNR; 98.2 % of the scenes are "
        f"drawn right (dense: 99.4 %)."
    ) in page.text


def test_the_sentence_says_no_more_than_is_known():
    compressed = results.merged([sample_results.compressed()])
    assert "12.7 % of the MACs of its UNet2DConditionModel gone." in Page(render(compressed)).text
    only = {"model": {"slim": "a"}, "fidelity": {"images": {"psnr": 40.0, "ssim": 1, "count": 1}}}
    assert "a: images of the same seeds agree to 40.0 dB PSNR." in Page(render(only)).text


@pytest.mark.parametrize(
    "figure",
    [
        *("10.6 M → 9.62 M", "729 M → 636 M", "41.7 ms → 36.1 ms", "99.4 % → 98.2 %"),
        *("10,629,444", "9,621,844", "39.3 MB", "1.71 s", "1.49 s", "11 runs", "95 % reached"),
        *("2.0e-7", "64.7 dB", "0.9998", "0.0123", "0.00045", "98.2 % (96.7 to 99.1 %)"),
        *("no CLIP folder at clip-vit; give --clip FOLDER", "no counter on this platform"),
        *("background", "position", "512 images", "budget 80 % of the parameters"),
        *("velocity error, predicted 2.1e-7", "guidance scale 3.0", "calibrate 150 s", "a1b2c3"),
        *("A CPU of 2 cores", "2026-01-02T03:04:05+00:00", "torch 2.13.0", "float32"),
    ],
)
def test_every_figure_is_on_the_page(page, figure):
    assert figure in page.text


def test_commands_are_there_to_be_repeated_with_their_versions():
    parts = sample_results.complete()["made"]
    commands = [part["command"] for part in parts]
    versions = "# slimdiff 0.1.0, torch 2.13.0, diffusers 0.40.0, python 3.11.2"
    lines = "".join(Page(to_repeat(parts)).texts).splitlines()
    assert lines == [versions, *commands]
    parts[1]["python"] = "3.13.0"
    lines = "".join(Page(to_repeat(parts)).texts).splitlines()
    assert lines == [versions, commands[0], versions.replace("3.11.2", "3.13.0"), commands[1]]


def test_every_group_is_in_the_plan_and_in_the_table(html, page):
    plan = html[html.index('<svg viewBox="0 0 1040') :]
    plan = plan[: plan.index("</svg>")].replace("\xa0", " ")
    found = sample_results.compressed()["groups"]
    assert len(found) == 30
    for group in found:
        dense, slim = group["dense_width"], group["width"]
        if group["dense_heads"] > 1:
            dense, slim = (f"{width} × {group['heads']}" for width in (dense, slim))
        assert f"<title>{group['name']}: {slim} of {dense} (" in plan
        assert numbers.change(dense, slim) in page.text
        assert numbers.error(group["gain"]) in page.text


def test_blocks_come_in_the_order_of_the_network(html):
    plan = html[html.index('id="plan"') :]
    places = [plan.index(f">{place}</text>") for place in sorted(sample_results.PLACES)]
    assert places == sorted(places), "down, mid, up"


def test_shares_by_kind_and_block_add_up(page):
    groups = sample_results.compressed()["groups"]
    kinds = {group["kind"] for group in groups}
    assert len(kinds) == 4
    for key in kinds:
        kind, mine = KINDS[key], [group for group in groups if group["kind"] == key]
        dense, slim = (sum(g[key] for g in mine) for key in ("params_dense", "params"))
        change = f"{numbers.count(dense)} → {numbers.count(slim)}".replace("\xa0", " ")
        assert f"{kind}{change}{numbers.percent(slim / dense)}".replace("\xa0", " ") in page.text


def test_nothing_is_loaded(html, page):
    for name in ("src", "href", "xlink:href", "data", "action"):
        for target in page.attributes(name):
            assert target.startswith(("data:", "#")), target
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    policy = page.attributes("content")[0]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_ids_are_unique_and_references_resolve(html, page):
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)", html)
    used += [href[1:] for href in page.attributes("href") if len(href) > 1 and href[0] == "#"]
    used += page.attributes("for") + page.attributes("aria-labelledby")
    assert used and set(used) <= set(ids)


def test_text_from_results_is_escaped(html, page):
    assert "<script>alert" not in html
    assert sample_results.HOSTILE in page.text
    assert f"slim: {sample_results.HOSTILE} (seed 12)" in page.attributes("alt")
    assert [name for name, _ in page.elements].count("script") == 1
    hostile = sample_results.compressed()
    hostile["model"] = dict.fromkeys(("dense", "slim", "class"), "<script>1</script>")
    hostile["groups"][3]["name"] = hostile["groups"][3]["block"] = "<img src=x onerror=alert(1)>"
    elements = Page(render(results.merged([hostile]))).elements
    assert "onerror" not in {key for _, attrs in elements for key in attrs}


def test_images_have_words_sizes_and_stay_sharp(page):
    images = [attrs for name, attrs in page.elements if name == "img"]
    assert len(images) == 12
    for image in images:
        assert image["alt"] and (image["width"], image["height"]) == ("64", "64")
        assert image["class"] == "pixels"
    sliders = [attrs for _, attrs in page.elements if attrs.get("type") == "range"]
    assert len(sliders) == 6 and all(s["aria-label"] for s in sliders)


def test_plots_have_words_and_the_colours_of_the_page(html, page):
    plots = [attrs for name, attrs in page.elements if name == "svg"]
    assert len(plots) == 9
    assert all(plot["aria-label"] and plot["role"] == "img" for plot in plots)
    assert not re.search(r"(fill|stroke): #", html), "a colour that no theme can change"
    assert f"brightness({AMPLIFICATION})" in html


def test_same_results_give_the_same_bytes(html, tmp_path):
    file = results.write(tmp_path / "r.json", sample_results.compressed())
    other = results.write(tmp_path / "s.json", sample_results.evaluated())
    page = write_report(results.merged(map(results.read, (file, other))), tmp_path / "r.html")
    assert page.read_text(encoding="utf-8") == html
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.json", "s.json"]


def test_settings_of_matplotlib_do_not_reach_the_page(html):
    import matplotlib

    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert render(sample_results.complete()) == html
        assert matplotlib.rcParams["font.size"] == 40


@pytest.mark.parametrize(
    "section, left, told",
    [
        ("images", "Images", ""),
        ("groups", "All groups", ""),
        ("made", "How it was made", "Without results of slimdiff compress, this page lacks: how"),
        ("model", "", "slim model"),
        ("rest", "", "all groups"),
        ("prompt_counts", "", "By timestep"),
    ],
)
def test_what_is_missing_is_left_out(section, left, told):
    found = sample_results.complete()
    del found[section]
    page = Page(render(found))
    assert told in page.text
    assert not left or left not in page.titles
    assert "None" not in page.text


def test_results_of_one_command_have_no_empty_sections():
    compressed = Page(render(results.merged([sample_results.compressed()])))
    assert (
        "Without results of slimdiff evaluate, this page lacks: images, all fig" in compressed.text
    )
    assert "What each width would cost" in compressed.titles
    assert not {"Images", "All figures"} & set(compressed.titles)
    assert "velocity error on held-out prompts2.4e-7" in compressed.text
    evaluated = Page(render(results.merged([sample_results.evaluated()])))
    assert "Without results of slimdiff compress, this page lacks: where" in evaluated.text
    assert evaluated.titles == ["Images", "Velocity error", "All figures", "How it was made"]
    assert "lacks" not in Page(render(sample_results.complete())).text


def test_empty_results_make_a_page():
    page = Page(render({}))
    assert "slim model: nothing was measured." in page.text
    assert page.titles == [] and page.text.count("this page lacks") == 2


def test_what_was_not_measurable_says_why():
    found = sample_results.complete()
    for name in found["fidelity"]:
        found["fidelity"][name] = {"unavailable": f"no {name} here"}
    found["cost"]["macs"] = found["cost"]["latency"] = {"unavailable": "no clock"}
    page = Page(render(found))
    for name in found["fidelity"]:
        assert f"no {name} here" in page.text
    assert "no clock" in page.text


def test_groups_without_curves_or_gains():
    found = sample_results.complete()
    for group in found["groups"]:
        group["gain"] = None
    assert "Error of the group's own output, predicted, by" in Page(render(found)).text
    for group in found["groups"]:
        group["curve"] = None
    assert "What each width would cost" not in Page(render(found)).titles


def test_an_unchanged_model_has_no_error_to_draw():
    found = sample_results.complete() | {"prompt_counts": []}
    found["fidelity"]["velocity"] = {"relative": 0.0, "by_timestep": [[999, 0.0]], "prompts": 1}
    for group in found["groups"]:
        group["width"] = group["dense_width"]
        group["curve"]["errors"] = [0.0] * len(group["curve"]["widths"])
    page = Page(render(found))
    assert "None: every prediction is as it was." in page.text
    assert "What each width would cost" not in page.titles


@pytest.mark.parametrize("spread", [1.0, 1.2, 3.5, 4.2, 40, 90, 1e3, 1e11])
def test_log_axes_have_labels(spread):
    rows = [{"prompts": 2**n, "velocity_error": 3e-3 * spread ** (-n / 3)} for n in range(4)]
    html = render({"prompt_counts": rows})
    assert 2 <= len(re.findall(r">\de-?\d+</text>", html)) <= 9


def test_a_network_of_many_blocks_is_told_by_its_parts():
    found = sample_results.compressed()
    groups = []
    for number in range(40):
        for group in found["groups"][:5]:
            block = f"transformer_blocks.{number}"
            groups.append(group | {"block": block, "name": f"{block}.{group['layer']}"})
    html = render(results.merged([found | {"groups": groups}]))
    assert ">transformer_blocks</text>" in html and ">transformer_blocks.0</text>" not in html


@pytest.mark.parametrize(
    "break_, message",
    [
        (lambda r: r["groups"][2].pop("dense_width"), r"group .*attn2.qk .* 'dense_width'"),
        (lambda r: r["images"][1].update(slim="bm8="), "slim image 1 of the results"),
        (lambda r: r["images"][0].update(dense='"><b>'), "dense image 0 of the results"),
    ],
)
def test_results_that_are_broken_are_refused(break_, message):
    found = sample_results.complete()
    break_(found)
    with pytest.raises(SlimdiffError, match=message):
        render(found)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SlimdiffError, match=r"slimdiff\[plot\]"):
        render(sample_results.complete())


def test_numbers():
    told = {
        numbers.count(9_850_000): "9.85 M",
        numbers.count(999_960): "1000 k",
        numbers.count(12): "12",
        numbers.size(39_344_400): "39.3 MB",
        numbers.duration(0.0417): "41.7 ms",
        numbers.duration(2e-7): "0.2 µs",
        numbers.percent(0.4123): "41.2 %",
        numbers.percent(1): "100 %",
        numbers.percent(float("nan")): "nan",
        numbers.error(1.95e-7): "2.0e-7",
        numbers.error(0): "0",
        numbers.error(float("inf")): "inf",
        numbers.interval([0.943, 1]): "94.3 to 100 %",
    }
    assert {key.replace("\xa0", " "): value for key, value in told.items()} == {
        value: value for value in told.values()
    }


def test_tag_escapes_what_is_not_markup():
    inner = tag("b", "<&>", title='"')
    assert tag("p", inner, "<", None, hidden=True, lang=None) == Html(
        '<p hidden><b title="&quot;">&lt;&amp;&gt;</b>&lt;</p>'
    )


def run(*arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code or 0


def test_report_command(tmp_path, capsys, html):
    compressed = results.write(tmp_path / "c.json", sample_results.compressed())
    evaluated = results.write(tmp_path / "e.json", sample_results.evaluated())
    out = tmp_path / "new folder" / "page.html"
    assert run("report", compressed, evaluated, "-o", out) == 0
    assert out.read_text(encoding="utf-8") == html
    assert re.search(r"page.html: \d+ kB from c.json, e.json", capsys.readouterr().out)


def test_report_command_refuses_in_one_line(tmp_path, capsys):
    good = results.write(tmp_path / "good.json", sample_results.compressed())
    other = sample_results.compressed()
    other["model"]["class"] = "FluxTransformer2DModel"
    mixed = results.write(tmp_path / "mixed.json", other)
    (text := tmp_path / "text.json").write_text("no JSON")
    (strange := tmp_path / "strange.json").write_text(json.dumps({"a": 1}))
    for arguments, message in (
        ([tmp_path / "missing.json"], "no such file"),
        ([text], "not JSON"),
        ([strange], "not results of slimdiff"),
        ([good, mixed], "different models do not add up"),
        ([good, "-o", tmp_path], "is a folder"),
        ([], "Missing argument"),
    ):
        assert run("report", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_the_report_imports_no_matplotlib_until_it_draws():
    code = "import sys, slimdiff.report, slimdiff.cli; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium() is None:
        pytest.skip("no Chromium on PATH")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


def test_browser_hears_what_goes_wrong(browser, tmp_path):
    (page := tmp_path / "bad.html").write_text(
        '<script>console.warn("beware"); undefined_name</script><img src="missing.png">'
    )
    browser.open(page)
    said = " ".join(browser.said)
    assert "beware" in said and "Uncaught" in said and "ERR_FILE_NOT_FOUND" in said
    assert any(url.endswith("missing.png") for url in browser.asked)


def test_page_works_in_a_browser(browser, tmp_path, html):
    (file := tmp_path / "report.html").write_text(html, encoding="utf-8")
    browser.open(file)
    assert [url for url in browser.asked if not url.startswith("data:")] == [file.as_uri()]

    point = browser.middle("document.querySelector('label[for=view-slider]')")
    browser.drag(point, point)
    assert browser.evaluate("document.getElementById('view-slider').checked")

    frame = "document.querySelector('.frame')"
    shown = f"getComputedStyle({frame}.querySelector('.slim')).clipPath"
    assert browser.evaluate(shown) == "inset(0px 0px 0px 50%)"
    x, y = browser.middle(frame)
    width = browser.evaluate(f"{frame}.clientWidth")
    browser.drag((x, y), (x + width / 4, y))
    assert browser.evaluate(shown) == "inset(0px 0px 0px 75%)", "dragged with the mouse"
    browser.press("ArrowLeft")
    assert browser.evaluate(shown) == "inset(0px 0px 0px 74%)", "moved with the keyboard"

    ground = "getComputedStyle(document.body).backgroundColor"
    before = browser.evaluate(ground)
    point = browser.middle("document.getElementById('theme')")
    browser.drag(point, point)
    assert browser.evaluate(ground) != before, "light and dark"
    assert not browser.said


def test_page_fits_a_phone(browser, tmp_path, html):
    (file := tmp_path / "report.html").write_text(html, encoding="utf-8")
    size = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.call("Emulation.setDeviceMetricsOverride", **size)
    browser.open(file)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    browser.call("Emulation.clearDeviceMetricsOverride")
