"""What a compression writes down about itself: enough to repeat it."""

import sys

import pytest

import slimdiff
from slimdiff.evaluate import Settings, evaluate
from slimdiff.results import made_by, read
from tiny_pipeline import tiny_pipeline

PROMPTS = ["a cat", "a dog"]
CONFIG = slimdiff.CalibrationConfig(num_inference_steps=2, num_probes=2, seed=5)


def repeat(call, **names):
    """Type again what was written down."""
    exec(compile(call, "call", "exec"), names)


@pytest.fixture
def compressed(tmp_path):
    budget = slimdiff.Budget(params=0.93)
    file = tmp_path / "slim.results.json"
    how = {"recipe": "paper", "allocation": "uniform", "config": CONFIG, "results": file}
    plan = slimdiff.compress(tiny_pipeline(seed=0), PROMPTS, budget, **how, pictures=1)
    return plan, read(file)["made"]


def test_a_python_call_can_be_repeated_from_the_results(compressed, tmp_path, monkeypatch):
    plan, made = compressed
    assert "command" not in made and made["prompts"] == 2
    for told in ("seed=5", "num_inference_steps=2", "'paper'", "'uniform'", "Budget(params=0.93)"):
        assert told in made["call"]
    monkeypatch.chdir(tmp_path)
    pipe = tiny_pipeline(seed=0)
    repeat(made["call"], pipe=pipe, prompts=PROMPTS)
    assert pipe.unet.slim_record.plan.entries == plan.entries
    assert read("slim.results.json")["made"]["call"] == made["call"]


def test_a_call_with_a_plan_names_it(compressed, tmp_path):
    plan, _ = compressed
    file, pipe = tmp_path / "edited.json", tiny_pipeline(seed=0)
    slimdiff.compress(pipe, PROMPTS, plan=plan, config=CONFIG, results=file, pictures=0)
    call = read(file)["made"]["call"]
    assert "    plan=plan,\n" in call and "budget" not in call and "recipe" not in call
    compile(call, "call", "exec")


def test_an_evaluation_from_python_can_be_repeated():
    pipe, same = tiny_pipeline(seed=0), tiny_pipeline(seed=0)
    settings = Settings(num_inference_steps=1, runs=1, pipeline_runs=0, shown=0, first_seed=3)
    judged = {"whole": 1.0, "interval": [0.5, 1.0], "attributes": {}, "count": 1}
    found = evaluate(pipe, same, PROMPTS[:1], settings, judge=lambda *_: judged)
    call = found["made"]["call"]
    assert "first_seed=3" in call and "judge=judge" in call and "features" not in call
    names = {"dense": pipe, "slim": same, "prompts": PROMPTS[:1], "judge": lambda *_: judged}
    repeat(call, **names)


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/usr/bin/slimdiff", "compress", "a b"], "slimdiff compress 'a b'"),
        (["/lib/slimdiff/__main__.py", "compress"], "python -m slimdiff compress"),
    ],
)
def test_a_command_of_a_shell_is_kept(monkeypatch, argv, command):
    monkeypatch.setattr(sys, "argv", argv)
    assert made_by("call()")["command"] == command and "call" not in made_by("call()")


def test_a_script_without_a_call_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/make.py", "--fast"])
    assert made_by()["command"] == "python make.py --fast"
    assert made_by("call()")["call"] == "call()"


def test_what_was_there_already_is_recorded(tmp_path):
    def compress(share):
        how = {"config": CONFIG, "checkpoint": tmp_path / "statistics"}
        return slimdiff.compress(tiny_pipeline(seed=0), PROMPTS, slimdiff.Budget(share), **how)

    assert compress(0.95).figures["reused"] == []
    assert compress(0.9).figures["reused"] == ["calibrate", "allocate"]
