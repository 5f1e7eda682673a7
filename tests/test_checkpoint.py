import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimdiff import checkpoint, folders
from slimdiff.checkpoint import load, load_pipeline, save, save_pipeline
from slimdiff.denoiser import denoiser_of
from slimdiff.errors import SlimdiffError
from slimdiff.plan import SlimRecord
from slimdiff.slim_denoiser import MODULE
from tiny_pipeline import FEED_FORWARD, TIED, UNTIED, image, slim_by_hand, tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pipe():
    return slim_by_hand(tiny_pipeline())


@pytest.fixture
def folder(pipe, tmp_path):
    return save(pipe.unet, tmp_path / "slim")


def assert_same_weights(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert value.dtype == other.state_dict()[name].dtype
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loaded_equals_saved(pipe, tmp_path, dtype):
    unet = pipe.unet.to(dtype)
    assert save(unet, tmp_path / "slim") == tmp_path / "slim"
    loaded = load(tmp_path / "slim", torch_dtype=dtype)
    assert type(loaded) is type(unet) and not loaded.training
    assert_same_weights(loaded, unet)
    assert loaded.slim_record.plan == unet.slim_record.plan
    assert type(loaded.get_submodule(UNTIED).processor).__name__ == "SlimAttnProcessor"
    assert loaded.get_submodule(TIED).scale == 8**-0.5


def test_maps_are_kept_as_small_as_accuracy_allows(pipe, folder):
    maps, loaded = pipe.unet.slim_record.maps, load(folder).slim_record.maps
    kinds = [torch.float16, torch.float32, torch.int64]  # in range, beyond float16, integers
    assert [loaded[name].dtype for name in maps] == kinds
    for name, value in maps.items():
        torch.testing.assert_close(loaded[name].to(value.dtype), value, rtol=1e-3, atol=1e-4)


def test_a_second_save_writes_the_same_files(folder, tmp_path):
    save(load(folder), tmp_path / "again")
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir())
    for name in names:
        if name not in ("config.json", "slimdiff_manifest.json"):  # the config notes its origin
            assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_variants_and_shards(pipe, tmp_path):
    unet = pipe.unet.half()
    save(unet, tmp_path / "slim", variant="fp16", max_shard_size="200KB")
    assert len(list((tmp_path / "slim").glob("diffusion_pytorch_model.fp16-0*"))) > 2
    options = {"variant": "fp16", "torch_dtype": torch.float16}
    assert_same_weights(load(tmp_path / "slim", **options), unet)
    assert_same_weights(load(tmp_path / "slim", **options, device_map="cpu"), unet)
    with pytest.raises(SlimdiffError, match="no such file .*fp16.*give the variant"):
        load(tmp_path / "slim")


def test_dense_denoisers_are_saved_and_loaded(tmp_path):
    unet = tiny_pipeline().unet
    save(unet, tmp_path / "dense")
    loaded = load(tmp_path / "dense")
    assert type(loaded) is type(unet)
    assert_same_weights(loaded, unet)


def test_a_slim_model_without_record_loads_without_one(pipe, tmp_path):
    del pipe.unet.slim_record
    save(pipe.unet, tmp_path / "slim")
    assert not hasattr(load(tmp_path / "slim"), "slim_record")


def test_pipelines_give_the_same_images(pipe, tmp_path):
    expected = image(pipe)
    save_pipeline(pipe, tmp_path / "pipe")
    loaded = load_pipeline(tmp_path / "pipe")
    assert loaded.unet.slim_record.plan == pipe.unet.slim_record.plan
    assert (image(loaded) == expected).all()
    save_pipeline(loaded, tmp_path / "pipe")
    assert (image(load_pipeline(tmp_path / "pipe", device_map="cpu")) == expected).all()


def test_pipelines_load_in_other_dtypes_and_with_components_of_ones_own(pipe, tmp_path):
    save_pipeline(pipe.to(torch.bfloat16), tmp_path / "pipe", variant="bf16")
    mixed = {"unet": torch.bfloat16, "default": torch.float32}
    loaded = load_pipeline(tmp_path / "pipe", variant="bf16", torch_dtype=mixed)
    assert (loaded.unet.dtype, loaded.vae.dtype) == (torch.bfloat16, torch.float32)
    assert_same_weights(loaded.unet, pipe.unet)
    own = tiny_pipeline().unet
    assert load_pipeline(tmp_path / "pipe", variant="bf16", unet=own).unet is own


def test_dense_pipelines_are_saved_and_loaded(tmp_path):
    dense = tiny_pipeline()
    save_pipeline(dense, tmp_path / "dense")
    assert (image(load_pipeline(tmp_path / "dense")) == image(dense)).all()
    assert not (tmp_path / "dense" / "README.md").exists()


def test_no_code_from_the_folder_runs(pipe, tmp_path):
    save_pipeline(pipe, tmp_path / "pipe")
    for name in (f"unet/{MODULE}.py", "vae/evil.py", "evil.py"):
        (tmp_path / "pipe" / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(SlimdiffError, match=f"{MODULE}.py"):
        load_pipeline(tmp_path / "pipe")
    assert type(load_pipeline(tmp_path / "pipe", verify=False).unet) is type(pipe.unet)
    index = tmp_path / "pipe" / "model_index.json"
    text = index.read_text()
    hostile = {"vae": ["evil", "AutoencoderKL"], "_class_name": ["evil", "Evil"]}
    for key, value in hostile.items():
        index.write_text(json.dumps(json.loads(text) | {key: value}))
        with pytest.raises(
            SlimdiffError, match=r"cannot be loaded: .* is code, .*evil\.py"
        ) as error:
            load_pipeline(tmp_path / "pipe", verify=False)
        assert "from_pretrained(..., trust_remote_code=True)" in str(error.value)
    assert not (tmp_path / "ran").exists()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def alter(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-5] ^= 1
    (folder / name).write_bytes(data)


def future_config(folder):
    slim = json.loads((folder / "config.json").read_text())["slimdiff"]
    edit(folder / "config.json", slimdiff=slim | {"version": 99})


DAMAGE = {
    "truncated weights": (lambda f: truncate(f, WEIGHTS), rf"{WEIGHTS}: .*truncated"),
    "altered weights": (lambda f: alter(f, WEIGHTS), rf"{WEIGHTS}: was altered.*verify=False"),
    "altered maps": (lambda f: alter(f, "slimdiff_maps.safetensors"), "maps.*: was altered"),
    "altered plan": (lambda f: alter(f, "slimdiff.json"), r"slimdiff\.json: was altered"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), rf"{WEIGHTS}: no such file"),
    "no maps": (lambda f: (f / "slimdiff_maps.safetensors").unlink(), "maps.*: no such file"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    "no manifest": (lambda f: (f / "slimdiff_manifest.json").unlink(), "manifest.*: no such file"),
    "future manifest": (
        lambda f: edit(f / "slimdiff_manifest.json", version=99),
        "manifest version 99, this slimdiff reads 1",
    ),
    "future config": (future_config, r"slim: .*version 99, this code reads version 1"),
    "unlisted weights": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        r"model\.safetensors: is not in slimdiff_manifest\.json",
    ),
    "unknown class": (
        lambda f: edit(f / "config.json", _class_name="SlimNoSuchModel"),
        "'SlimNoSuchModel', which is no slim model class",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_are_refused(folder, name):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(SlimdiffError, match=message):
        load(folder)


def other_plan(folder, **changes):
    plan = folder / "slimdiff.json"
    entries = json.loads(plan.read_text())["entries"]
    for name, change in changes.items():
        entries[name.replace("__", ".")] = entries[f"{TIED}.qk"] | change
    edit(plan, entries=entries)


UNVERIFIED = {
    "future plan": (lambda f: edit(f / "slimdiff.json", version=99), "plan version 99"),
    "not a plan": (lambda f: (f / "slimdiff.json").write_text("[]"), "not a slimdiff plan"),
    "plan of another class": (
        lambda f: edit(f / "slimdiff.json", denoiser="SD3Transformer2DModel"),
        r"slimdiff\.json: does not fit config\.json \(SD3Transformer2DModel",
    ),
    "plan of other widths": (
        lambda f: other_plan(f, **{f"{TIED}__qk": {"width": 7}}),
        rf"does not fit config\.json \({TIED}\.qk",
    ),
    "plan of other layers": (
        lambda f: other_plan(f, strange__qk={"width": 8}),
        r"does not fit config\.json \(strange\.qk",
    ),
    "plan that fuses nothing": (
        lambda f: edit(f / "slimdiff.json", fused=[]),
        r"does not fit config\.json \(up_blocks\.0\.upsamplers\.0",
    ),
    "maps without plan": (lambda f: (f / "slimdiff.json").unlink(), "no such plan file"),
    "plan without maps": (
        lambda f: (f / "slimdiff_maps.safetensors").unlink(),
        "maps.*: no such file, but there is a slimdiff.json",
    ),
    "truncated weights": (lambda f: truncate(f, WEIGHTS), "slim: cannot be loaded"),
    "weights of another model": (
        lambda f: save_file(tiny_pipeline().unet.state_dict(), f / WEIGHTS),
        "slim: cannot be loaded .*shape",
    ),
    "a weight too few": (
        lambda f: save_file(dict(list(load_file(f / WEIGHTS).items())[1:]), f / WEIGHTS),
        "do not fit config.json .missing_keys",
    ),
}


@pytest.mark.parametrize("name", UNVERIFIED)
def test_contradictory_folders_are_refused_even_unverified(folder, name):
    damage, message = UNVERIFIED[name]
    damage(folder)
    with pytest.raises(SlimdiffError, match=message) as caught:
        load(folder, verify=False)
    assert "ignore_mismatched_sizes" not in str(caught.value)
    with pytest.raises(SlimdiffError):
        load(folder)


def test_altered_weights_load_when_the_user_says_so(folder):
    alter(folder, WEIGHTS)
    assert load(folder, verify=False).slim_record.plan.entries[FEED_FORWARD].width == 50


def test_pickled_weights_are_not_loaded(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "slim", safe_serialization=False)
    with pytest.raises(SlimdiffError, match=r"safetensors: no such file \(found: .*\.bin\)"):
        load(tmp_path / "slim")


def test_wrong_places_are_named(pipe, folder, tmp_path):
    save_pipeline(pipe, tmp_path / "pipe")
    places = {
        "no such folder": lambda: load(tmp_path / "nowhere"),
        "use load_pipeline": lambda: load(tmp_path / "pipe"),
        "has no model_index.json": lambda: load_pipeline(folder),
        "nowhere/at/all: no such folder": lambda: load_pipeline("nowhere/at/all"),
        "'balanced' is not possible": lambda: load_pipeline(
            tmp_path / "pipe", device_map="balanced"
        ),
    }
    for message, call in places.items():
        with pytest.raises(SlimdiffError, match=message):
            call()
    (tmp_path / "pipe" / "unet" / "config.json").unlink()
    with pytest.raises(SlimdiffError, match=r"unet/config\.json: no such file"):
        load_pipeline(tmp_path / "pipe")


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("where", ["model card", "component", "first rename", "second rename"])
def test_a_failed_save_leaves_the_old_folder_as_it_was(pipe, tmp_path, monkeypatch, where):
    out = save_pipeline(pipe, tmp_path / "pipe")
    before = snapshot(out)
    calls = []
    rename, failing = os.rename, {"first rename": 1, "second rename": 2}.get(where)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    def fail_at(old, new):
        calls.append(new)
        return fail() if len(calls) == failing else rename(old, new)

    if where == "model card":
        monkeypatch.setattr("slimdiff.model_card.model_card", fail)
    elif where == "component":
        monkeypatch.setattr(type(pipe.vae), "save_pretrained", fail)
    else:
        monkeypatch.setattr(folders.os, "rename", fail_at)
    with pytest.raises(OSError, match="disk full"):
        save_pipeline(pipe, out)
    assert snapshot(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_failed_first_save_leaves_nothing(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("slimdiff.model_card.model_card", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pipeline(pipe, tmp_path / "deep" / "pipe")
    assert list((tmp_path / "deep").iterdir()) == []


def test_foreign_folders_are_not_replaced(pipe, tmp_path):
    def refused(call, out, message):
        before = snapshot(out) if out.is_dir() else out.read_bytes()
        with pytest.raises(SlimdiffError, match=message):
            call(out)
        assert before == (snapshot(out) if out.is_dir() else out.read_bytes())

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    (tmp_path / "photos" / "config.json").write_text("{}")
    (tmp_path / "file").write_bytes(b"text")
    slim = save(pipe.unet, tmp_path / "slim")
    whole = save_pipeline(pipe, tmp_path / "whole")
    refused(lambda out: save(pipe.unet, out), tmp_path / "photos", "not empty, and has no config")
    refused(lambda out: save(pipe.unet, out), tmp_path / "file", "is a file")
    refused(lambda out: save(pipe.unet, out), whole, "has no config.json")
    refused(lambda out: save_pipeline(pipe, out), slim, "has no model_index.json")
    (whole / ".git").mkdir()
    refused(lambda out: save_pipeline(pipe, out), whole, "is a git repository")


def test_links_and_empty_folders_are_saved_into(pipe, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(pipe.unet, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / WEIGHTS).is_file()


def test_weights_that_would_not_load_again_are_not_saved(pipe, tmp_path):
    tied = slim_by_hand(tiny_pipeline(), untied=False)
    tied.fuse_qkv_projections()
    with pytest.raises(SlimdiffError, match="unfuse_qkv_projections"):
        save_pipeline(tied, tmp_path / "out")
    adapted = slim_by_hand(tiny_pipeline()).unet
    linear = adapted.get_submodule(f"{TIED}.to_q")
    linear.lora_A = torch.nn.Linear(2, 2)
    with pytest.raises(SlimdiffError, match=r"to_q\.lora_A.*unload_lora_weights"):
        save(adapted, tmp_path / "out")
    with pytest.raises(SlimdiffError, match="offloaded"):
        save(slim_by_hand(tiny_pipeline()).unet.to("meta"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_hub_ids_are_fetched_without_running_their_code(pipe, tmp_path, monkeypatch):
    save_pipeline(pipe, tmp_path / "pipe")
    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path / "pipe")

    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", lambda repo, **_: index)
    assert checkpoint._download("owner/slim", options := {"revision": "main", "vae": None}) == (
        tmp_path / "pipe"
    )
    assert asked["repo"] == "owner/slim" and asked["revision"] == "main"
    assert "*.bin" in asked["ignore_patterns"] and options == {"vae": None}
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    assert checkpoint._download("owner/dense", {}) is None


def test_denoiser_of_names_what_it_found(pipe):
    assert denoiser_of(pipe) == ("unet", pipe.unet)
    pipe.unet = None
    with pytest.raises(SlimdiffError, match="no unet or transformer .found: .*text_encoder"):
        denoiser_of(pipe)


def test_the_model_card_tells_what_was_done(pipe, tmp_path):
    out = save_pipeline(pipe, tmp_path / "my-slim")
    card = (out / "README.md").read_text()
    params = sum(p.numel() for p in pipe.unet.parameters())
    for text in (
        "library_name: diffusers",
        "- slimdiff",
        "# my-slim",
        f"359,844 to {params:,} ({params / 359_844:.1%})",
        "2,000 to 1,500 (75.0%)",
        "| 1.00e-05 |",
        "trust_remote_code=True",
        'slimdiff.load_pipeline("my-slim")',
        f"| `{FEED_FORWARD}` | feed-forward |  | 128 to 50 |",
        f"diffusers {__import__('diffusers').__version__}",
    ):
        assert text in card
    assert "predicted" not in card.lower()  # no figure that the plan does not have


def test_the_model_card_takes_over_licence_and_origin(tmp_path):
    base = save_pipeline(tiny_pipeline(), tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: openrail++\nbase_model: a/b\n---\n# Base\n")
    (base / "LICENSE.md").write_text("the licence")
    save_pipeline(slim_by_hand(load_pipeline(base)), tmp_path / "slim")
    card = (tmp_path / "slim" / "README.md").read_text()
    assert "license: openrail++" in card and "The unet of `base`" in card
    assert "base_model" not in card  # a/b is what base was made from
    assert (tmp_path / "slim" / "LICENSE.md").read_text() == "the licence"
    save_pipeline(load_pipeline(tmp_path / "slim"), tmp_path / "slim")
    card = (tmp_path / "slim" / "README.md").read_text()
    assert "license: openrail++" in card and "The unet (" in card  # not made of itself
    hub = slim_by_hand(tiny_pipeline())
    hub.register_to_config(_name_or_path="owner/model")
    save_pipeline(hub, tmp_path / "hub")
    save_pipeline(load_pipeline(tmp_path / "hub"), tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "base_model: owner/model" in card and "The unet of `owner/model`" in card


def test_a_model_card_without_record_claims_no_figures(pipe, tmp_path):
    del pipe.unet.slim_record
    card = (save_pipeline(pipe, tmp_path / "slim") / "README.md").read_text()
    params = sum(p.numel() for p in pipe.unet.parameters())
    assert f"| Parameters of the denoiser | {params:,} |" in card
    assert "%" not in card and "<details>" not in card and "maps" not in card


def test_records_can_be_replaced(pipe, folder):
    unet = load(folder)
    unet.slim_record = SlimRecord(replace(unet.slim_record.plan, budget="mine"), {})
    save(unet, folder)
    assert load(folder).slim_record == SlimRecord(unet.slim_record.plan, {})
