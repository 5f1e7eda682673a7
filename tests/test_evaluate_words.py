"""What the commands around an evaluation say: names of figures, warnings, options at fault."""

import json

import pytest
from transformers import BertConfig, BertModel

import sample_results
from slimdiff import Statistics
from slimdiff.cli import evaluate as command
from slimdiff.cli import main
from slimdiff.cli.outcome import show
from slimdiff.errors import SlimdiffError
from slimdiff.evaluate.features import ClipScore, ImageModel
from slimdiff.plan import Plan
from slimdiff.probes import Probes
from slimdiff.report.names import COUNTS, ERRORS, FIGURES, figure_name
from tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two pipelines, the second with fewer parameters, and prompts."""
    folder = tmp_path_factory.mktemp("words")
    tiny_pipeline(seed=0).save_pretrained(folder / "large")
    small = tiny_pipeline(seed=0)
    small.unet = type(small.unet).from_config(small.unet.config, mid_block_type=None)
    small.save_pretrained(folder / "small")
    (folder / "prompts.txt").write_text("a cat\n")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return exit.value.code or 0, printed.out, printed.err

    return call


def test_the_table_names_figures_as_the_page_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command.show(sample_results.evaluated())
    printed = capsys.readouterr().out
    for key, name in FIGURES.items():
        of_a_plan = (*ERRORS, "refit", "healed", *COUNTS)
        assert (name in printed) == (key not in of_a_plan), name
    assert "CLIP score not measured: no CLIP folder" in printed and "\xa0" not in printed


@pytest.mark.parametrize(("reused", "words"), [([], ["150.0"]), (["calibrate"], ["reused"])])
def test_a_compression_says_what_it_reused(reused, words, capsys, tmp_path):
    figures = sample_results.compressed()["plan"]["figures"] | {"reused": reused}
    plan = Plan("UNet2DConditionModel", "slimdiff", {}, "probed", "--params 0.8", figures)
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "model_index.json").write_text("{}")
    show(plan, tmp_path / "slim", tmp_path / "slim.statistics", None)
    lines = capsys.readouterr().out.splitlines()
    told = next(line for line in lines if "seconds to calibrate" in line)
    assert told.split()[3:] == words
    for key in ("params", "macs", "predicted_error", "error_on_probes"):
        assert any(figure_name(key, figures) in line for line in lines)


@pytest.mark.parametrize("option", ["--features", "--clip"])
def test_a_folder_that_is_none_is_told_with_its_option(option, folders, run):
    pipes = (folders / "large", folders / "large")
    how = ("--prompts", folders / "prompts.txt", "--device", "cpu", option, folders / "nowhere")
    code, printed, error = run("evaluate", *pipes, *how)
    assert (code, printed) == (2, "") and error.count("\n") == 1
    assert f"{option} {folders / 'nowhere'}: no such folder" in error


def test_models_of_another_kind_are_refused(tmp_path):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=9, intermediate_size=8, **small)).save_pretrained(tmp_path)
    with pytest.raises(SlimdiffError, match="BertModel, which does not see images"):
        ImageModel(tmp_path)
    with pytest.raises(SlimdiffError, match="is no CLIPModel .* weights are not there"):
        ClipScore(tmp_path)


def test_swapped_models_are_warned_of_at_once(folders, run, caplog, monkeypatch):
    def stop(*_, **__):
        raise SlimdiffError("here it would take minutes")

    monkeypatch.setattr("slimdiff.evaluate.evaluate", stop)
    large, small = folders / "large", folders / "small"
    how = ("--prompts", folders / "prompts.txt", "--device", "cpu")
    for pipes in ((large, small), (small, large)):
        assert not caplog.messages
        assert "here it would take minutes" in run("evaluate", *pipes, *how)[2]
    assert caplog.messages == [
        f"warning: DENSE ({small}) is smaller than SLIM ({large}); were they swapped? "
        f"Then it is `slimdiff evaluate {large} {small}`"
    ]


def test_statistics_show_how_they_were_sampled(tmp_path, run):
    config = {"num_inference_steps": 20, "guidance_scale": 3.0, "batch_size": 4, "seed": 7}
    one = {"prompts": 8, "config": config}
    statistics = Statistics("UNet2DConditionModel", Probes(1), source=one)
    statistics.save(tmp_path / "one")
    facts = json.loads(run("statistics", "show", tmp_path / "one", "--json")[1])
    shown = {name: facts[name] for name in ("steps", "guidance", "batch size", "seed")}
    assert shown == {"steps": "20", "guidance": "3.0", "batch size": "4", "seed": "7"}
    statistics.source = {"merged": [one, one | {"config": config | {"seed": 8}}]}
    statistics.save(tmp_path / "two")
    assert json.loads(run("statistics", "show", tmp_path / "two", "--json")[1])["seed"] == "7, 8"
