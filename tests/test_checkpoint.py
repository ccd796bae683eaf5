"""Files: what is written comes back bit for bit, everybody's checkpoints are read, and no file runs code."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import stat
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rvconvert
from rvconvert.errors import CheckpointError, ConversionError, TransferError
from rvconvert.files import checkpoint
from rvconvert.files.checkpoint import fit_keys, load, read, save, write
from rvconvert.files.recipe import Recipe, class_spec, import_class

FORMATS = (".pt", ".pth", ".safetensors")


class VAE(nn.Module):
    def __init__(self, size: int = 6, latent_dim: int = 2) -> None:
        super().__init__()
        self.encoder = nn.Linear(size, 2 * latent_dim)
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, size))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)), mu, logvar


class Runs:
    """Unpickling it makes a file: what a hostile checkpoint would do."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.fixture
def rv() -> nn.Module:
    torch.manual_seed(0)
    model = rvconvert.convert(VAE(latent_dim=3), penalty=7.5, seed=4, variance_dtype=torch.float32)
    model(torch.rand(4, 6))  # the batch norm's statistics are no longer those of a new model
    return model


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key


# --- round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_convert_save_load_to_plain_is_bit_exact(rv: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = save(rv, tmp_path / f"rv{suffix}", kwargs={"latent_dim": 3})
    back = load(path)
    assert isinstance(back, VAE) and back._rvconvert.options == rv._rvconvert.options
    assert_equal_states(rv, back)
    plain = rvconvert.to_plain(back)
    assert type(plain) is VAE
    assert_equal_states(rv, plain)
    x = torch.rand(4, 6)
    for a, b in zip(rv.eval()(x), back.eval()(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("suffix", FORMATS)
def test_dtypes_survive(tmp_path: Path, suffix: str) -> None:
    rv = rvconvert.convert(VAE().double())
    assert_equal_states(rv, load(save(rv, tmp_path / f"rv{suffix}")))


def test_tied_weights_survive_safetensors(tmp_path: Path) -> None:
    vae = VAE()
    vae.again = vae.encoder
    rv = rvconvert.convert(vae)
    target = VAE()
    target.again = target.encoder
    back = load(save(rv, tmp_path / "rv.safetensors"), model=target)
    assert_equal_states(rv, back)
    assert back.again is back.encoder


def test_load_onto_an_instance_leaves_it_alone(rv: nn.Module, tmp_path: Path) -> None:
    path = save(rv, tmp_path / "rv.pt")
    target = VAE(latent_dim=3)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    assert_equal_states(load(path, model=target), rv)
    assert type(target) is VAE
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
    assert_equal_states(load(path, model=rvconvert.convert(target)), rv)
    assert_equal_states(load(path, model=VAE, kwargs={"latent_dim": 3}), rv)
    assert_equal_states(load(path, model=f"{__file__}:VAE", kwargs={"latent_dim": 3}), rv)


def test_unknown_constructor_arguments_are_asked_for(rv: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"(?s)rv\.pt: weights do not fit VAE.*encoder\.weight.*give its kwargs"):
        load(save(rv, tmp_path / "rv.pt"))


def test_rules_of_its_own_are_asked_for(tmp_path: Path) -> None:
    rules = rvconvert.REGISTRY.overlay()
    path = save(rvconvert.convert(VAE(), rules=rules), tmp_path / "rv.pt")
    with pytest.raises(CheckpointError, match=r"rules=\.\.\."):
        load(path)
    assert load(path, rules=rules)._rvconvert.settings.registry is rules


def test_save_takes_converted_models_and_json_arguments_only(rv: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="a plain VAE"):
        save(VAE(), tmp_path / "rv.pt")
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        save(rv, tmp_path / "rv.pt", kwargs={"activation": nn.ReLU})
    assert not list(tmp_path.iterdir())


# --- writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMATS)
def test_nothing_is_overwritten_without_force(rv: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rv{suffix}"
    path.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="--force"):
        save(rv, path)
    assert path.read_bytes() == b"precious"
    save(rv, path, force=True)
    assert read(path).recipe is not None
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "a temporary file was left"


def test_a_failed_write_leaves_the_old_file(rv: nn.Module, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "rv.pt"
    path.write_bytes(b"precious")

    def full_disk(content, file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        save(rv, path, force=True)
    assert path.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["rv.pt"]


def test_a_file_that_appears_while_writing_is_kept(rv: nn.Module, tmp_path: Path, monkeypatch) -> None:
    path, torch_save = tmp_path / "rv.pt", torch.save

    def meanwhile(content, file) -> None:
        torch_save(content, file)
        path.write_bytes(b"precious")

    monkeypatch.setattr(torch, "save", meanwhile)
    with pytest.raises(CheckpointError, match="someone else"):
        save(rv, path)
    assert path.read_bytes() == b"precious"


def test_files_have_the_usual_permissions(rv: nn.Module, tmp_path: Path) -> None:
    path = save(rv, tmp_path / "rv.pt")
    (tmp_path / "other").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rv.onnx", r"must end in \.pt or \.pth or \.safetensors"),
        ("rv", "must end in"),
        ("missing/rv.pt", "there is no folder"),
        ("", "is a folder"),
    ],
)
def test_destinations_that_cannot_be(rv: nn.Module, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(rv, tmp_path / name)


# --- plain checkpoints --------------------------------------------------------------------------------


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "state_dict": lambda s: s,
    "ordered": lambda s: OrderedDict(s),
    "under state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "under model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
    "under model": lambda s: {"model": s, "args": argparse.Namespace(lr=1e-3)},
    "beside numpy numbers": lambda s: {"model": s, "best": np.float64(0.5), "step": np.int64(3)},
    "DataParallel": lambda s: prefixed(s, "module."),
    "torch.compile": lambda s: prefixed(s, "_orig_mod."),
    "compiled DataParallel": lambda s: {"state_dict": prefixed(s, "module._orig_mod.")},
    "Lightning": lambda s: {
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"latent_dim": 3, "lr": 1e-3},
        "state_dict": prefixed(s, "model.") | {"perceptual.weight": torch.zeros(2)},
    },
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_every_usual_wrapper(kind: str, tmp_path: Path) -> None:
    vae = VAE(latent_dim=3)
    path = tmp_path / "plain.ckpt"
    torch.save(WRAPPED[kind](vae.state_dict()), path)
    found = read(path)
    assert found.recipe is None
    target = VAE(latent_dim=3)
    target.load_state_dict(fit_keys(found, target)[0], strict=True)
    assert_equal_states(vae, target)
    if kind == "Lightning":
        assert found.hyper_parameters["latent_dim"] == 3


def test_plain_safetensors(tmp_path: Path) -> None:
    vae, target = VAE(), VAE()
    path = write(vae.state_dict(), tmp_path / "plain.safetensors")
    found = read(path)
    assert found.recipe is None
    target.load_state_dict(fit_keys(found, target)[0], strict=True)
    assert_equal_states(vae, target)


def test_written_plain_weights_are_a_bare_state_dict(tmp_path: Path) -> None:
    vae = VAE()
    write(vae.state_dict(), tmp_path / "plain.pt")
    VAE().load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True), strict=True)


def test_a_model_whose_own_child_is_called_model_keeps_its_prefix(tmp_path: Path) -> None:
    outer = nn.Module()
    outer.model = VAE()
    path = write(outer.state_dict(), tmp_path / "plain.pt")
    state, prefix = fit_keys(read(path), outer)
    assert prefix == "" and set(state) == set(outer.state_dict())


def test_two_sets_of_weights_are_asked_about(tmp_path: Path) -> None:
    first, second = VAE(), VAE()
    both = prefixed(first.state_dict(), "model.") | prefixed(second.state_dict(), "ema_model.")
    found = read(write(both, tmp_path / "plain.pt"))
    with pytest.raises(CheckpointError, match=r"'ema_model\.', 'model\.'.*--prefix"):
        fit_keys(found, VAE())
    chosen, _ = fit_keys(found, VAE(), prefix="ema_model.")
    assert torch.equal(chosen["encoder.weight"], second.encoder.weight)


def test_one_state_dict_of_several_is_taken_by_its_key(tmp_path: Path) -> None:
    raw, averaged = VAE(), VAE()
    path = tmp_path / "both.ckpt"
    content = {"generator": raw.state_dict(), "ema": {"decay": 0.999, "shadow": averaged.state_dict()}, "step": 3}
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"several state_dicts: generator \(\d+ entries\), ema\.shadow .*--key generator"):
        rvconvert.load_weights(VAE(), path)
    with pytest.raises(CheckpointError, match=r"no state_dict at 'ema'; there is generator .*, ema\.shadow"):
        read(path, key="ema")
    target = VAE()
    assert rvconvert.load_weights(target, path, key="ema.shadow") == []
    assert_equal_states(target, averaged)
    torch.save({"ema": {"shadow": averaged.state_dict()}}, path)
    assert set(read(path).state) == set(averaged.state_dict()), "the only one is found by itself"


@pytest.mark.parametrize("ending", ["", "_state_dict"])
def test_the_state_dicts_of_a_models_parts_are_put_together(ending: str, tmp_path: Path) -> None:
    vae, target = VAE(), VAE()
    parts = {f"{name}{ending}": part.state_dict() for name, part in vae.named_children() if len(part.state_dict())}
    torch.save({**parts, "discriminator": nn.Linear(2, 1).state_dict(), "epoch": 3}, tmp_path / "parts.pt")
    (note,) = rvconvert.load_weights(target, tmp_path / "parts.pt")
    assert note.startswith(f"put together of encoder{ending} (2 entries), ") and note.endswith("left out 2 entries")
    assert_equal_states(target, vae)


def test_parts_are_put_together_wherever_they_lie_and_are_chosen_where_they_are_two(tmp_path: Path) -> None:
    vae, path = VAE(), tmp_path / "parts.pt"
    parts = {name: part.state_dict() for name, part in vae.named_children() if len(part.state_dict())}
    wrapped = {name: {f"module.{k}": v for k, v in state.items()} for name, state in parts.items()}
    for content in (wrapped, {"model": parts, "step": 1}, {"state_dict": parts}):
        target = VAE()
        torch.save(content, path)
        rvconvert.load_weights(target, path)
        assert_equal_states(target, vae)
    torch.save({**parts, "encoder_state_dict": VAE().encoder.state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"holds encoder\.\w+ more than once.*--key encoder_state_dict"):
        rvconvert.load_weights(VAE(), path)
    torch.save({**parts, "vae": VAE().state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"several state_dicts.*--key vae"):
        rvconvert.load_weights(VAE(), path)
    decoder = VAE().decoder
    torch.save(parts, path)
    rvconvert.load_weights(decoder, path, prefix="decoder.")
    assert_equal_states(decoder, vae.decoder)


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_loaded_in_one_line_whatever_they_are_wrapped_in(kind: str, tmp_path: Path) -> None:
    vae, target = VAE(latent_dim=3), VAE(latent_dim=3)
    torch.save(WRAPPED[kind](vae.state_dict()), tmp_path / "plain.ckpt")
    notes = rvconvert.load_weights(target, tmp_path / "plain.ckpt")
    assert_equal_states(vae, target)
    assert bool(notes) == (kind in ("DataParallel", "torch.compile", "compiled DataParallel", "Lightning"))
    with pytest.raises(TransferError, match=r"plain\.ckpt: weights do not fit VAE"):
        rvconvert.load_weights(VAE(latent_dim=5), tmp_path / "plain.ckpt")


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    vae = VAE()
    with torch.no_grad():
        vae.encoder.weight[0, 0], vae.decoder[3].bias[1] = float("nan"), float("inf")
    (note,) = rvconvert.load_weights(VAE(), write(vae.state_dict(), tmp_path / "plain.pt"))
    assert note.startswith("NaN or infinite: encoder.weight, decoder.3.bias;")


def test_a_plain_checkpoint_is_no_converted_model(tmp_path: Path) -> None:
    path = write(VAE().state_dict(), tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="rvconvert convert MODEL"):
        load(path, model=VAE)


# --- hostile and broken files -------------------------------------------------------------------------


def assert_one_line(error: pytest.ExceptionInfo[CheckpointError], path: Path) -> None:
    text = str(error.value)
    assert "\n" not in text and len(text) < 450 and path.name in text
    assert error.value.__suppress_context__ or error.value.__cause__ is None


def hostile_pickles(trace: Path) -> dict[str, bytes]:
    """Files that run code when they are unpickled, in every shape a checkpoint has."""
    files = {"bare pickle": pickle.dumps(Runs(trace)), "protocol 0": pickle.dumps(Runs(trace), protocol=0)}
    for name, content in (
        ("torch.save", Runs(trace)),
        ("a value", {"state_dict": {"w": torch.zeros(1)}, "callback": Runs(trace)}),
        ("beside a recipe", {"rvconvert": "{}", "state_dict": {"w": Runs(trace)}}),
    ):
        for new in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=new)
            files[f"{name}, {'zip' if new else 'legacy'}"] = file.getvalue()
    return files


@pytest.mark.parametrize("kind", hostile_pickles(Path("unused")))
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_hostile_file_runs_nothing(kind: str, suffix: str, tmp_path: Path) -> None:
    path, trace = tmp_path / f"evil{suffix}", tmp_path / "trace"
    path.write_bytes(hostile_pickles(trace)[kind])
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert_one_line(error, path)
    assert not trace.exists()


def test_pickle_is_allowed_only_when_asked(tmp_path: Path) -> None:
    path, vae = tmp_path / "whole.pt", VAE()
    torch.save(vae, path)
    with pytest.raises(CheckpointError, match=r"VAE, more than tensors.*--allow-pickle") as error:
        read(path)
    assert_one_line(error, path)
    assert torch.equal(read(path, allow_pickle=True).state["encoder.weight"], vae.encoder.weight)
    torch.save({"model": vae, "epoch": 3}, path)
    assert set(read(path, allow_pickle=True).state) == set(vae.state_dict())


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kept", [0, 4, 40, 0.5, 0.99])
def test_truncated(rv: nn.Module, tmp_path: Path, suffix: str, kept: float) -> None:
    path = save(rv, tmp_path / f"rv{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match=r"cut off|empty|damaged") as error:
        load(path)
    assert_one_line(error, path)


def test_truncated_legacy_file(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save(VAE().state_dict(), file, _use_new_zipfile_serialization=False)
    for kept in (20, 200, len(file.getvalue()) - 10):
        path = tmp_path / "old.pt"
        path.write_bytes(file.getvalue()[:kept])
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert_one_line(error, path)


def test_a_flipped_byte_never_gets_past_as_another_error(rv: nn.Module, tmp_path: Path) -> None:
    """Damage is either found, as a CheckpointError or TransferError, or it hit a number: nothing else is raised."""
    rng = np.random.default_rng(0)
    for suffix in (".pt", ".safetensors"):
        content = save(rv, tmp_path / f"rv{suffix}", kwargs={"latent_dim": 3}).read_bytes()
        for position in rng.integers(0, len(content), 60):
            damaged = bytearray(content)
            damaged[position] ^= 0xFF
            path = tmp_path / f"damaged{suffix}"
            path.write_bytes(damaged)
            try:
                load(path)
            except ConversionError as error:
                assert "damaged" in str(error)


FOREIGN = {
    "json": (b'{"weights": [1, 2, 3]}', "JSON"),
    "a web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "text": (b"epoch 1, loss 0.5\n", "not written by torch.save|not a safetensors"),
    "zeros": (bytes(64), "not written by torch.save|not a safetensors"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(32), "not written by torch.save|not a safetensors"),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_content(kind: str, suffix: str, tmp_path: Path) -> None:
    content, message = FOREIGN[kind]
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read(path)
    assert_one_line(error, path)


def test_foreign_zip(tmp_path: Path) -> None:
    path = tmp_path / "archive.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(CheckpointError, match=r"zip file that torch\.save did not write.*notes\.txt"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor, not a state_dict"),
        ([1, 2], "holds a list"),
        ({}, "holds nothing"),
        ({"epoch": 3, "loss": torch.zeros(1)}, "no state_dict.*'epoch', 'loss'"),
        ({0: torch.zeros(1)}, "no state_dict"),
    ],
)
def test_files_without_weights(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        read(path)
    assert_one_line(error, path)


def test_names_that_cannot_be(rv: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    for name, message in (
        ("missing.pt", "no such file"),
        ("", "is a folder"),
        ("model.onnx", "ends in .pt, .pth, .ckpt, .bin, .tar or .safetensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / name)
    save(rv, tmp_path / "rv.safetensors")
    os.rename(tmp_path / "rv.safetensors", tmp_path / "rv.pt")
    with pytest.raises(CheckpointError, match=r"is a safetensors file; rename it to rv\.safetensors"):
        read(tmp_path / "rv.pt")
    save(rv, tmp_path / "other.pt")
    os.rename(tmp_path / "other.pt", tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"rename it to \.pt"):
        read(tmp_path / "other.safetensors")


def test_torchscript_is_named(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read(tmp_path / "script.pt")


# --- a recipe may not choose what is imported -----------------------------------------------------------


def write_with_recipe(path: Path, **changes: object) -> Path:
    recipe = json.loads(Recipe.of(rvconvert.convert(VAE()), kwargs={}).to_json()) | changes
    torch.save({"rvconvert": json.dumps(recipe), "state_dict": VAE().state_dict()}, path)
    return path


@pytest.mark.parametrize("kind", ["file", "module"])
def test_a_recipe_imports_nothing_unless_trusted(kind: str, tmp_path: Path, monkeypatch) -> None:
    trace, module = tmp_path / "trace", f"unseen_{kind}"
    source = f"import pathlib; pathlib.Path({str(trace)!r}).touch()\nfrom {__name__} import VAE as Base\nclass VAE(Base): pass\n"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = f"{module}.py:VAE" if kind == "file" else f"{module}:VAE"
    path = write_with_recipe(tmp_path / "rv.pt", model=spec)
    with pytest.raises(CheckpointError, match=rf"not imported.*--model {spec}.*--trust-recipe") as error:
        load(path)
    assert_one_line(error, path)
    assert not trace.exists()
    assert type(rvconvert.to_plain(load(path, trust_recipe=True))).__module__ == module
    assert trace.exists()
    load(path)  # imported by now


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "os:system", "kwargs": {"command": "touch trace"}},
        {"model": "subprocess:Popen", "kwargs": {"args": ["touch", "trace"]}},
        {"model": "rvconvert.files.recipe:import_class", "kwargs": {"spec": "antigravity:x"}},
        {"model": "torch.nn:modules.no.Such"},
        {"model": "rvconvert.no_such_module:VAE"},
        {"model": "../../x:y"},
        {"model": ""},
        {"model": 3},
        {"kwargs": [1]},
        {"options": {"penalty": "a lot"}},
        {"options": {"methods": "forward"}},
        {"options": {"covariance": "quantum"}},
        {"options": {"variance_dtype": "load"}},
        {"options": {"from_the_future": 1}},
        {"options": None},
        {"format": 99},
        {"extra": 1},
    ],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items())[:40],
)
def test_hostile_recipes_are_refused(changes: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_with_recipe(tmp_path / "rv.pt", **changes)
    with pytest.raises(ConversionError):
        load(path)
    assert not (tmp_path / "trace").exists()


def test_a_recipe_that_is_not_json(tmp_path: Path) -> None:
    torch.save({"rvconvert": "{" * 5000, "state_dict": VAE().state_dict()}, tmp_path / "rv.pt")
    with pytest.raises(CheckpointError, match="not one that rvconvert writes"):
        load(tmp_path / "rv.pt")


def test_classes_are_named_as_they_can_be_found(tmp_path: Path) -> None:
    assert class_spec(nn.Linear) == "torch.nn.modules.linear:Linear"
    (tmp_path / "lonely.py").write_text("import torch\nclass Net(torch.nn.Module): pass\n")
    spec = f"{tmp_path}/lonely.py:Net"
    cls = import_class(spec)
    assert import_class(spec) is cls
    assert checkpoint.imported_class(spec) is cls


class _ClosesOverItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.decode = lambda z: self.decoder(z)

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.decode(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar))


def test_a_function_on_a_loaded_model_is_of_the_loaded_model(tmp_path):
    rv, fresh, x = rvconvert.convert(_ClosesOverItself()), _ClosesOverItself(), torch.randn(3, 6)
    rvconvert.save(rv, tmp_path / "vae.pt")
    loaded = rvconvert.load(tmp_path / "vae.pt", model=fresh)
    torch.testing.assert_close(loaded.eval()(x), rv.eval()(x))
    loaded.train()(x).sum().backward()
    assert loaded.decoder.weight.grad is not None
    assert fresh.decoder.weight.grad is None
