"""The logic of benchmarks/peer_suite.py; diffusers' tests are not needed."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from peer_outcomes import (
    REASONS,
    Reason,
    compare,
    counts,
    failures,
    page,
    reason_of,
    slim_only,
    table,
    unexplained,
    worst,
)
from peer_suite import by_class, fetched, keep, located

NAMES = [f"f.py::T::{letter}" for letter in "abcd"]
DENSE = dict(zip(NAMES, ["passed", "passed", "failed", "skipped"]))
SLIM = dict(zip(NAMES, ["passed", "failed", "failed", "skipped"]))
REASON = Reason("*::b", "narrow", "it is narrow")


def rows(says: str = "narrow layers"):
    return compare(DENSE, SLIM, {"f.py::T::b": says, "f.py::T::c": "both"})


def test_phases_of_a_test_add_up_to_its_worst_outcome():
    assert worst(None, "passed") == "passed"
    assert worst("passed", "failed") == "failed" == worst("failed", "passed")
    assert worst("skipped", "passed") == "skipped"


def test_outcomes_are_compared_test_by_test():
    found = rows()
    assert found["f.py::T::b"] == {"dense": "passed", "slim": "failed", "says": "narrow layers"}
    assert "says" not in found["f.py::T::c"]
    assert slim_only(found) == ["f.py::T::b"]
    assert counts(found) == {
        "both": 1,
        "dense alone": 1,
        "slim alone": 0,
        "neither": 1,
        "skipped": 1,
    }


def test_what_did_not_run_slim_has_not_passed():
    for slim in ({}, {"t": "skipped"}):
        assert slim_only(compare({"t": "passed"}, slim, {})) == ["t"]
    assert counts(compare({}, {"t": "passed"}, {}))["slim alone"] == 1


def test_a_reason_holds_for_its_own_failure_alone():
    assert reason_of("f.py::T::b", rows()["f.py::T::b"], [REASON]) == "it is narrow"
    assert unexplained({"family": rows()}, [REASON]) == []
    assert unexplained({"family": rows("out of memory")}, [REASON]) == ["f.py::T::b"]
    assert unexplained({"family": rows()}, []) == ["f.py::T::b"]


def test_tables():
    assert table({"family": rows()}).splitlines() == [
        "| family | both | dense alone | slim alone | neither | skipped |",
        "|---|---|---|---|---|---|",
        "| family | 1 | 1 | 0 | 1 | 1 |",
    ]
    several = {"one": rows(), "two": rows()}
    assert "| `b` | one, two | it is narrow |" in failures(several, [REASON])
    assert table(several) in page({"diffusers": "1", "tests": "v1", "families": several})
    assert "**not explained**" in failures({"family": rows()}, [])
    assert failures({"family": compare(DENSE, DENSE, {})}) == (
        "Every test that passes dense passes slim."
    )


def test_mixins_on_tiny_models_are_told_apart_by_model():
    names = ["Test_sd1__One::a", "Test_qwen_image__One::a", "Test_qwen_image__Two::a"]
    found = by_class({f"peer_generic.py::{name}": {} for name in names})
    assert [(name, len(rows)) for name, rows in found.items()] == [
        ("tiny sd1", 1),
        ("tiny qwen_image", 2),
    ]


def test_tests_are_found_in_a_checkout(tmp_path):
    (tmp_path / "tests" / "models" / "testing_utils").mkdir(parents=True)
    assert located(tmp_path) == located(tmp_path / "tests") == tmp_path.resolve() / "tests"
    with pytest.raises(SystemExit, match="expected the tests of diffusers"):
        located(tmp_path / "tests" / "models")


def test_the_tests_alone_are_taken_from_an_archive(tmp_path, monkeypatch):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name in ("tests/models/a.py", "src/diffusers/b.py"):
            archive.addfile(tarfile.TarInfo(f"diffusers-1.2.3/{name}"))
    monkeypatch.setattr("urllib.request.urlopen", lambda url: io.BytesIO(data.getvalue()))
    tests = fetched("v1.2.3", tmp_path / "cache")
    assert tests == tmp_path / "cache" / "diffusers-1.2.3" / "tests"
    assert [path.name for path in (tmp_path / "cache").rglob("*.py")] == ["a.py"]
    monkeypatch.delattr("urllib.request.urlopen")
    assert fetched("v1.2.3", tmp_path / "cache") == tests


def test_rows_of_other_families_stay_if_they_are_of_the_same_versions(tmp_path):
    path = tmp_path / "peer-suite.json"
    keep({"one": rows()}, "v1", path)
    keep({"two": rows()}, "v1", path)
    assert set(json.loads(path.read_text())["families"]) == {"one", "two"}
    keep({"three": rows()}, "v2", path)
    assert set(json.loads(path.read_text())["families"]) == {"three"}


def test_every_reason_is_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "diffusers-tests.md").read_text(encoding="utf-8")
    assert [reason.why for reason in REASONS if reason.why not in page] == []
