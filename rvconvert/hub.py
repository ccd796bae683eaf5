"""Converted models on the Hugging Face hub: safetensors with the recipe in its metadata, and a card. No code runs.

Needs ``huggingface_hub``: pip install 'rvconvert[hub]'.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvconvert.errors import CheckpointError, ConversionError
from rvconvert.files.checkpoint import load, save
from rvconvert.files.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]

WEIGHTS = "model.safetensors"
CARD = """---
library_name: rvconvert
tags: [variational-autoencoder, uncertainty, pytorch]
---

# {name}

An RV-VAE of the class `{model}`: its decoder propagates means and variances.

```python
import rvconvert.hub

rv_vae = rvconvert.hub.from_pretrained("{repository}", model=...)  # its class, or an instance
```

The file holds tensors and a recipe in JSON; loading it runs no code from here. Conversion options: `{options}`.
"""


def save_pretrained(
    rv_model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
    model: str | None = None,
    kwargs: dict[str, Any] | None = None,
) -> Path:
    """Write a folder as ``push_to_hub`` uploads it and ``from_pretrained`` reads it; arguments as of ``rvconvert.save``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save(rv_model, folder / WEIGHTS, force=force, model=model, kwargs=kwargs)
    card = folder / "README.md"
    if not card.exists():
        recipe = Recipe.of(rv_model, model, kwargs)
        name = recipe.model.rpartition(":")[2]
        card.write_text(CARD.format(name=name, model=recipe.model, options=recipe.options, repository=folder.name))
    return folder


def push_to_hub(
    rv_model: nn.Module,
    repository: str,
    *,
    model: str | None = None,
    kwargs: dict[str, Any] | None = None,
    private: bool = False,
    message: str = "Upload an RV-VAE",
    token: str | None = None,
) -> str:
    """Upload a converted model.

    Args:
        rv_model: what ``convert`` returned.
        repository: ``"owner/name"``; it is made if it is not there.
        model: how to name its class, and ``kwargs``: how it was constructed, as of ``rvconvert.save``.
        private: of a repository that is made.
        message: of the commit.
        token: of the hub; default: what ``hf auth login`` stored.

    Returns:
        Where it lies.
    """
    hub = _hub()
    api = hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        staged = save_pretrained(rv_model, Path(folder) / repository.rpartition("/")[2], model=model, kwargs=kwargs)
        card = staged / "README.md"
        name = staged.name
        card.write_text(card.read_text().replace(f'from_pretrained("{name}"', f'from_pretrained("{repository}"'))
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=str(staged), commit_message=message)
    return str(commit.repo_url)


def from_pretrained(
    repository: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    **loading: Any,
) -> nn.Module:
    """A converted model from the hub or from a folder.

    Args:
        repository: ``"owner/name"``, or a folder that ``save_pretrained`` wrote.
        revision: a branch, tag or commit of it.
        token: of the hub.
        local_files_only: ask the cache alone.
        loading: ``model``, ``kwargs``, ``rules`` and ``trust_recipe``, as of ``rvconvert.load``: what the repository names
            is not imported by itself.

    Raises:
        CheckpointError: there is no such repository or no converted model in it; see ``rvconvert.load``.
    """
    if loading.get("allow_pickle"):
        raise ConversionError("from_pretrained reads safetensors alone; there is nothing to unpickle")
    if Path(repository).is_dir():
        path = Path(repository) / WEIGHTS
    else:
        hub = _hub()
        try:
            found = hub.hf_hub_download(
                os.fspath(repository), WEIGHTS, revision=revision, token=token, local_files_only=local_files_only
            )
        except Exception as error:  # of the network, the hub, the name: all of them say what they are
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{WEIGHTS} of {repository} cannot be had: {reason}") from error
        path = Path(found)
    return load(path, **loading)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ConversionError("the hub needs huggingface_hub: pip install 'rvconvert[hub]'") from None
    return huggingface_hub
