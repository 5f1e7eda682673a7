import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import slimdiff
from slimdiff.checkpoint import load_pipeline
from slimdiff.cli import main
from tiny_pipeline import tiny_pipeline

COMMANDS = [
    "compress",
    "inspect",
    "generate",
    "compare",
    "evaluate",
    "report",
    "frontier",
    "profile",
    "select-prompts",
    "statistics",
    "statistics merge",
    "statistics show",
]
QUICK = ["--steps", "2", "--batch-size", "2", "--device", "cpu"]


def shell(*arguments, cwd=None):
    """The command line in a process of its own."""
    settings = {"COLUMNS": "120", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "slimdiff", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | settings, cwd=cwd
    )


@pytest.fixture
def run(capsys, monkeypatch):
    """The command line in this process: what it printed, and its exit code."""
    monkeypatch.setenv("COLUMNS", "120")
    level = logging.getLogger("slimdiff").level

    def call(*arguments):
        with warnings.catch_warnings(), pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(code=exit.value.code or 0, out=printed.out, err=printed.err)

    yield call
    logging.getLogger("slimdiff").setLevel(level)


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    tiny_pipeline(seed=0).save_pretrained(folder)
    (folder.parent / "prompts.txt").write_text("# four\na cat\na dog\nthe sea\na tram\n")
    return folder


@pytest.fixture(scope="session")
def slim(dense):
    """The main job, from a shell, with the default output folder."""
    done = shell(
        *("compress", dense, "--prompts", "prompts.txt", "--params", "0.9", "--num-probes", "4"),
        *QUICK,
        cwd=dense.parent,
    )
    return SimpleNamespace(done=done, path=dense.parent / "tiny-slim", dense=dense)


def test_compress_writes_a_pipeline_and_says_so(slim):
    assert slim.done.returncode == 0, slim.done.stderr
    for words in (
        "parameters",
        "MACs",
        "error on held-out prompts",
        "seconds to calibrate",
        "tiny-slim",
    ):
        assert words in slim.done.stdout
    load = re.search(r'DiffusionPipeline\.from_pretrained\("(.+?)"', slim.done.stdout)
    assert load and load[1] == "tiny-slim"
    assert (slim.path / "model_index.json").is_file()
    assert "Warning" not in slim.done.stderr and "Traceback" not in slim.done.stderr
    pipe = load_pipeline(slim.path)
    dense = tiny_pipeline(seed=0)
    left = sum(p.numel() for p in pipe.unet.parameters())
    assert left <= 0.9 * sum(p.numel() for p in dense.unet.parameters())


def test_compress_writes_results_and_a_report(slim, run, tmp_path):
    results = json.loads(slim.path.with_name("tiny-slim.results.json").read_text())
    assert results["model"] == {
        "dense": "tiny",
        "slim": "tiny-slim",
        "class": "UNet2DConditionModel",
    }
    assert [row["prompt"] for row in results["images"]] == ["a cat", "a dog", "the sea", "a tram"]
    page = slim.path.with_name("tiny-slim.report.html").read_text()
    assert "tiny-slim" in page and "the sea" in page and "tiny-slim.report.html" in slim.done.stdout
    done = run(
        *("compress", slim.dense, "-o", tmp_path / "s", "--prompts"),
        *(slim.dense.parent / "prompts.txt", "--no-report", "--recipe", "magnitude", *QUICK),
    )
    assert done.code == 0, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "s.statistics"]


def test_evaluate_writes_results_and_shows_a_table(slim, run, tmp_path):
    prompts, out = slim.dense.parent / "prompts.txt", tmp_path / "evaluation.json"
    how = ("--prompts", prompts, "--runs", "2", "--pipeline-runs", "1", *QUICK)
    done = run("evaluate", slim.dense, slim.path, "-o", out, *how)
    assert done.code == 0, done.err
    for words in ("parameters", "velocity error", "PSNR", "CLIP score", "not measured", "faster"):
        assert words in done.out
    results = json.loads(out.read_text())
    assert results["fidelity"]["images"]["count"] == 4
    assert results["cost"]["bytes"]["slim"] > 1000 < results["cost"]["bytes"]["dense"]
    page = tmp_path / "page.html"
    both = [slim.path.with_name("tiny-slim.results.json"), out]
    assert run("report", *both, "-o", page).code == 0
    assert f"{results['fidelity']['images']['psnr']:.1f}" in page.read_text()
    lost = run("evaluate", slim.dense, tmp_path / "nowhere", "-o", out, *how)
    assert lost.code == 2 and "nowhere" in lost.err


def test_compress_goes_on_from_its_statistics(slim, run, tmp_path):
    again = ["--prompts", slim.dense.parent / "prompts.txt", "--num-probes", "4", *QUICK]
    statistics = slim.path.with_name("tiny-slim.statistics")
    before = (statistics / "statistics.safetensors").stat().st_mtime_ns
    done = run(
        *("compress", slim.dense, "-o", tmp_path / "less", "--remove", "0.05"),
        *("--recipe", "paper", "--allocation", "uniform", "--statistics", statistics),
        *again,
    )
    assert done.code == 0, done.err
    assert (statistics / "statistics.safetensors").stat().st_mtime_ns == before
    plan = next((tmp_path / "less").glob("*/slimdiff.json"))
    edited = run(
        *("compress", slim.dense, "-o", tmp_path / "edited", "--plan", plan),
        *("--statistics", statistics),
        *again,
    )
    assert edited.code == 0, edited.err


def test_a_slim_folder_is_slimmed_again(slim, run, tmp_path):
    again = ["--prompts", slim.dense.parent / "prompts.txt", "--num-probes", "4", *QUICK]
    out, first = tmp_path / "less", slimdiff.Plan.read(slim.path / "unet" / "slimdiff.json")
    done = run("compress", slim.path, "-o", out, "--params", "0.9", "--no-report", *again)
    assert done.code == 0, done.err
    pipe = load_pipeline(out)
    assert sum(p.numel() for p in pipe.unet.parameters()) <= 0.9 * first.figures["params"]
    both = pipe.unet.slim_record.plan
    assert both.figures["params_dense"] == first.figures["params_dense"]
    assert "slim model that this was made from" in (out / "README.md").read_text()


def test_a_16_bit_folder_is_saved_in_16_bits(slim, run, tmp_path):
    tiny_pipeline(seed=0).to(torch.float16).save_pretrained(tmp_path / "half")
    done = run(
        *("compress", tmp_path / "half", "-o", tmp_path / "out", "--params", "0.9"),
        *("--allocation", "uniform", "--prompts", slim.dense.parent / "prompts.txt", *QUICK),
    )
    assert done.code == 0, done.err
    for name in ("unet", "vae", "text_encoder"):
        file = next((tmp_path / "out" / name).glob("*model*.safetensors"))
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


def test_inspect_table_and_json(slim, run):
    table = run("inspect", slim.dense)
    assert table.code == 0 and "feed-forward" in table.out and "whole denoiser" in table.out
    before, after = (json.loads(run("inspect", p, "--json").out) for p in (slim.dense, slim.path))
    assert before["denoiser"] == "UNet2DConditionModel"
    left = {g["name"] for g in after["groups"]}
    assert left <= {g["name"] for g in before["groups"]}, "layers may go wholly"
    assert after["params"] <= 0.9 * before["params"] and after["macs"] < before["macs"]


def test_generate_depends_on_the_seed_alone(slim, run, tmp_path):
    def pixels(*arguments):
        file = tmp_path / "new" / "image.png"
        done = run("generate", slim.path, "--prompt", "a cat", *arguments, "-o", file, *QUICK)
        assert done.code == 0, done.err
        return Image.open(file).tobytes()

    assert pixels("--seed", 3) == pixels("--seed", 3) != pixels("--seed", 4)


def test_generate_numbers_several_images(slim, run, tmp_path):
    done = run(
        *("generate", slim.path, "--prompt", "a cat", "--prompt", "a dog", "-o"),
        *(tmp_path / "image.png", *QUICK),
    )
    assert done.code == 0, done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image-1.png", "image-2.png"]


def test_compare_draws_a_grid(slim, run, tmp_path):
    grid = tmp_path / "grid.png"
    done = run("compare", slim.dense, slim.path, "--prompt", "a cat", "-o", grid, *QUICK)
    assert done.code == 0, done.err
    assert "PSNR" in done.out
    assert Image.open(grid).height > 2 * 160


def test_select_prompts_takes_copies_once(dense, run, tmp_path):
    pool, chosen = tmp_path / "pool.txt", tmp_path / "chosen.txt"
    pool.write_text("a cat\na cat\na dog\na cat\nthe sea\n")
    done = run(*("select-prompts", pool, "-n", 3, "-o", chosen, "--model", dense), *QUICK)
    assert done.code == 0, done.err
    assert sorted(chosen.read_text().splitlines()) == ["a cat", "a dog", "the sea"]
    done = run(*("select-prompts", pool, "-n", 4, "-o", chosen, "--model", dense), *QUICK)
    assert done.code == 2 and "3 distinct prompts" in done.err


def test_statistics_show_and_merge(slim, run, tmp_path):
    one = slim.path.with_name("tiny-slim.statistics")
    for _ in range(2):  # the sum of sums still counts its runs
        done = run("statistics", "merge", tmp_path / "sum", one, one)
        assert done.code == 0, done.err
        facts = json.loads(run("statistics", "show", tmp_path / "sum", "--json").out)
        assert facts["prompts"] == 8 and facts["parts"] == 2
    assert "denoiser calls" in run("statistics", "show", one).out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_reads_like_documentation(command, run):
    done = run(*command.split(), "--help")
    assert done.code == 0 and not done.err
    if command != "statistics":
        assert "Example" in done.out and f"slimdiff {command}" in done.out


def test_help_and_version_from_a_shell():
    done = shell("--help")
    assert done.returncode == 0 and not done.stderr
    assert all(command.split()[0] in done.stdout for command in COMMANDS)


def test_version(run):
    assert run("--version").out.strip() == slimdiff.__version__


def test_missing_model_from_a_shell():
    done = shell("generate", "no/such/folder", "--prompt", "x")
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"slimdiff: error: no/such/folder: .+\n", done.stderr)
    assert "Traceback" not in done.stderr


BAD = {
    "no such folder": (["inspect", "./nowhere"], "no such folder"),
    "no pipeline": (["inspect", "{folder}"], "model_index.json"),
    "empty prompts": (["compress", "{dense}", "--prompts", "{empty}"], "holds no prompt"),
    "missing prompts": (["compress", "{dense}", "--prompts", "none.txt"], "cannot be read"),
    "no prompts": (["compress", "{dense}"], "give --prompts FILE"),
    "two budgets": (["{job}", "--params", "0.8", "--macs", "0.7"], "exactly one of"),
    "budget and plan": (["{job}", "--params", "0.8", "--plan", "p"], "either --plan or a budget"),
    "missing plan": (["{job}", "--plan", "nowhere.json"], "no such plan file"),
    "not a budget": (["{job}", "--params", "most"], "expected a share such as 0.8"),
    "negative steps": (["{job}", "--steps", "-1"], "at least 1, got -1"),
    "not a number": (["{job}", "--steps", "many"], "--steps"),
    "unknown recipe": (["{job}", "--recipe", "best"], "known: slimdiff, paper, magnitude"),
    "unknown allocation": (["{job}", "--allocation", "best"], "known: probed, entropic"),
    "no layers": (["{job}", "--layers", ""], "--layers is empty"),
    "unknown dtype": (["{job}", "--dtype", "int3"], "expected auto, float32"),
    "unknown device": (["{job}", "--device", "abacus"], "--device abacus"),
    "out is the model": (["{job}", "-o", "{dense}"], "is the model itself"),
    "out is no pipeline": (["{job}", "-o", "{folder}"], "name another folder"),
    "slim again, in low memory": (
        ["compress", "{slim}", "--low-memory", "--statistics", "{statistics}", "--params", "0.9"],
        "slim already, and in low memory",
    ),
    "healing for no time": (["{job}", "--heal", "0"], "must be positive, got 0.0"),
    "healing, in low memory": (
        ["compress", "{dense}", "--low-memory", "--statistics", "{statistics}", "--heal", "1"],
        "leave out --heal",
    ),
    "unknown option": (["compress", "--parms", "0.8"], "No such option: --parms"),
    "unknown command": (["squeeze"], "No such command 'squeeze'"),
    "nothing to draw": (["generate", "{dense}"], "give --prompt"),
    "out below a file": (
        ["generate", "{dense}", "--prompt", "x", "-o", "{empty}/a/b.png"],
        "empty",
    ),
    "no statistics": (["statistics", "show", "{folder}"], "no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_code_2(case, slim, run, tmp_path):
    arguments, message = BAD[case]
    places = {
        "dense": slim.dense,
        "slim": slim.path,
        "folder": tmp_path,
        "prompts": slim.dense.parent / "prompts.txt",
        "statistics": slim.path.with_name("tiny-slim.statistics"),
        "plan": slim.path / "unet" / "slimdiff.json",
        "empty": tmp_path / "empty.txt",
    }
    (tmp_path / "empty.txt").write_text("# nothing\n")
    job = ["compress", str(slim.dense), "--prompts", str(places["prompts"])]
    filled = [a.format(**places) for arg in arguments for a in (job if arg == "{job}" else [arg])]
    if arguments[0] in ("{job}", "compress") and "-o" not in filled:
        filled += ["-o", str(tmp_path / "out")]
    done = run(*filled)
    assert done.code == 2 and not done.out
    assert message in done.err
    assert re.fullmatch(r"slimdiff: error: .+\n", done.err), done.err


def test_impossible_budget_says_what_is_possible(slim, run, tmp_path):
    done = run(
        *("compress", slim.dense, "--params", "0.01", "-o", tmp_path / "out", "--num-probes", 4),
        *("--allocation", "uniform"),
        *("--prompts", slim.dense.parent / "prompts.txt", *QUICK),
        *("--statistics", slim.path.with_name("tiny-slim.statistics")),
    )
    assert done.code == 2
    assert re.search(r"slimdiff: error: .*the smallest possible is [\d,]+ of [\d,]+", done.err)
    assert "Traceback" not in done.err and not Path(tmp_path / "out").exists()
