"""The hub: a folder goes up as it is written and comes back as it was; nothing that it names is imported by itself."""

from __future__ import annotations

import shutil
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import rvconvert
from rvconvert import hub
from rvconvert.errors import CheckpointError, ConversionError
from tests.test_checkpoint import VAE, assert_equal_states


@pytest.fixture
def rv() -> nn.Module:
    torch.manual_seed(0)
    return rvconvert.convert(VAE(latent_dim=3), penalty=7.5)


def test_a_local_folder_comes_back(rv: nn.Module, tmp_path: Path) -> None:
    folder = hub.save_pretrained(rv, tmp_path / "rv-vae", kwargs={"latent_dim": 3})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]
    assert "library_name: rvconvert" in (folder / "README.md").read_text()
    back = hub.from_pretrained(folder)
    assert_equal_states(rv, back)
    assert back._rvconvert.options.penalty == 7.5
    with pytest.raises(CheckpointError, match="--force"):
        hub.save_pretrained(rv, folder)


def test_what_a_repository_names_is_not_imported(rv: nn.Module, tmp_path: Path) -> None:
    folder = hub.save_pretrained(rv, tmp_path / "rv-vae", model="some.strange.package:VAE", kwargs={"latent_dim": 3})
    with pytest.raises(CheckpointError, match="a file may not decide what to import"):
        hub.from_pretrained(folder)
    assert_equal_states(rv, hub.from_pretrained(folder, model=VAE))
    with pytest.raises(ConversionError, match="nothing to unpickle"):
        hub.from_pretrained(folder, allow_pickle=True)


class Hub:
    """A hub on the disk, with the calls that are made of the real one."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def HfApi(self, token: str | None = None) -> Hub:
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> types.SimpleNamespace:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return types.SimpleNamespace(repo_url=f"hub/{repo_id}")

    def hf_hub_download(self, repo_id: str, filename: str, **options: object) -> str:
        if not (self.root / repo_id).is_dir():
            raise OSError(f"no repository {repo_id}")
        return str(self.root / repo_id / filename)


def test_pushed_and_pulled(rv: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_hub", lambda: Hub(tmp_path))
    assert hub.push_to_hub(rv, "somebody/digits", kwargs={"latent_dim": 3}) == "hub/somebody/digits"
    assert 'from_pretrained("somebody/digits"' in (tmp_path / "somebody" / "digits" / "README.md").read_text()
    assert_equal_states(rv, hub.from_pretrained("somebody/digits"))
    with pytest.raises(CheckpointError, match="cannot be had: no repository somebody/else"):
        hub.from_pretrained("somebody/else")


def test_the_real_hub_takes_these_calls() -> None:
    """Every argument that is given to it is one that it has."""
    import inspect

    real = pytest.importorskip("huggingface_hub")
    for ours, theirs in ((Hub.create_repo, real.HfApi.create_repo), (Hub.upload_folder, real.HfApi.upload_folder)):
        named = [p.name for p in inspect.signature(ours).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert set(named) <= set(inspect.signature(theirs).parameters)
    assert {"revision", "token", "local_files_only"} <= set(inspect.signature(real.hf_hub_download).parameters)
