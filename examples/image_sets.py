"""The image sets of the examples, as uint8 tensors of shape (N, channels, size, size).

`load(name, folder, size)` takes either the standard downloads, laid out as torchvision leaves them
(`MNIST/raw/*-ubyte[.gz]`, `cifar-10-batches-py/`, `celeba/img_align_celeba/`, or any folder of face images),
or NumPy archives:

* `mnist.npz`, `cifar10.npz`: arrays `x_train` and `x_test`, uint8, (N, H, W[, 3]);
* `cifar10_jpeg.npz`, `celeba_half_jpeg.npz`, `celeba_full_jpeg.npz`: JPEG files that share their header,
  image i being `head + body[off[i]:off[i + 1]]`.

Without a folder there is always `digits`, the 8x8 digits that scikit-learn ships, enlarged.
"""

from __future__ import annotations

import gzip
import io
import pickle
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SIZES = {"digits": 32, "mnist": 32, "cifar10": 32, "celeba": 64, "faces": 128}
FACE_CROP = 148 / 178  # the usual centre crop of aligned CelebA: 148 of its 178 columns, square


def load(name: str, folder: Path | None = None, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Training and test images of one set. Raises FileNotFoundError where `folder` does not hold it."""
    size = size or SIZES[name]
    if name == "digits":
        train, test = _digits()
    elif folder is None:
        raise FileNotFoundError(f"the images of {name} are not shipped: give their folder with --data DIR")
    elif name in ("celeba", "faces"):
        train, test = _faces(folder, size)
    else:
        train, test = (_mnist if name == "mnist" else _cifar10)(folder)
    return _resized(train, size), _resized(test, size)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images = (load_digits().images * (255 / 16)).astype(np.uint8)
    return images[:1500], images[1500:]


def _mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    if (archive := folder / "mnist.npz").exists():
        return _arrays(archive)
    for raw in (folder / "MNIST" / "raw", folder):
        splits = [_first(raw, f"{split}-images-idx3-ubyte*") for split in ("train", "t10k")]
        if all(splits):
            return _idx_images(splits[0]), _idx_images(splits[1])
    raise FileNotFoundError(f"{folder} holds neither mnist.npz nor MNIST/raw/train-images-idx3-ubyte")


def _cifar10(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    if (archive := folder / "cifar10.npz").exists():
        return _arrays(archive)
    if (archive := folder / "cifar10_jpeg.npz").exists():
        with np.load(archive) as packed:
            train, test = (list(_jpegs(packed, prefix)) for prefix in ("train_", "test_"))
            return np.stack(list(map(np.asarray, train))), np.stack(list(map(np.asarray, test)))
    for batches in (folder / "cifar-10-batches-py", folder):
        if (batches / "test_batch").exists():
            train = [_cifar_batch(batches / f"data_batch_{i}") for i in range(1, 6)]
            return np.concatenate(train), _cifar_batch(batches / "test_batch")
    raise FileNotFoundError(f"{folder} holds neither cifar10.npz, cifar10_jpeg.npz nor cifar-10-batches-py")


def _faces(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Faces cropped and resized to `size`; the test set is CelebA's own partition, else the last tenth."""
    archive = folder / ("celeba_half_jpeg.npz" if size <= 64 else "celeba_full_jpeg.npz")
    if archive.exists():
        with np.load(archive) as packed:
            faces = _cropped(_jpegs(packed), size)[np.argsort(packed["ids"])]
        return np.split(faces, [len(faces) * 9 // 10])
    for images in (folder / "celeba" / "img_align_celeba", folder / "img_align_celeba", folder):
        files = sorted(f for f in images.glob("*") if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if files:
            break
    else:
        raise FileNotFoundError(f"{folder} holds neither celeba/img_align_celeba, {archive.name} nor images")
    partition = images.parent / "list_eval_partition.txt"
    if partition.exists():  # lines of "000001.jpg 0": 0 train, 1 validation, 2 test
        part = dict(line.split() for line in partition.read_text().splitlines() if line.strip())
        train = [f for f in files if part.get(f.name) == "0"]
        test = [f for f in files if part.get(f.name) == "2"]
    else:
        cut = len(files) * 9 // 10
        train, test = files[:cut], files[cut:]
    return _cropped(map(Image.open, train), size), _cropped(map(Image.open, test), size)


def _first(folder: Path, pattern: str) -> Path | None:
    return min(folder.glob(pattern), default=None)


def _arrays(archive: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(archive) as arrays:
        return arrays["x_train"], arrays["x_test"]


def _idx_images(file: Path) -> np.ndarray:
    """MNIST's idx format: a magic number whose last byte counts the axes, their lengths, then the bytes."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    axes = content[3]
    shape = np.frombuffer(content, ">u4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(tuple(shape))


class _ArraysOnly(pickle.Unpickler):
    """CIFAR-10 comes as pickles: allow what rebuilds the NumPy arrays in them and no other code."""

    def find_class(self, module: str, name: str):
        array = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if array or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a CIFAR-10 batch holds no {module}.{name}")


def _cifar_batch(file: Path) -> np.ndarray:
    with open(file, "rb") as stream:
        rows = _ArraysOnly(stream, encoding="bytes").load()[b"data"]
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _jpegs(packed: np.lib.npyio.NpzFile, prefix: str = "") -> Iterator[Image.Image]:
    head, body, offsets = packed[f"{prefix}head"].tobytes(), packed[f"{prefix}body"], packed[f"{prefix}off"]
    for start, stop in pairwise(offsets):
        yield Image.open(io.BytesIO(head + body[start:stop].tobytes())).convert("RGB")


def _cropped(faces: Iterable[Image.Image], size: int) -> np.ndarray:
    def crop(face: Image.Image) -> np.ndarray:
        with face:
            width, height = face.size
            side = width if width == height else width * FACE_CROP  # square pictures are already cropped
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            return np.asarray(face.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box))

    with ThreadPoolExecutor() as threads:  # Pillow decodes outside the interpreter lock
        return np.stack(list(threads.map(crop, faces)))


def _resized(images: np.ndarray, size: int) -> Tensor:
    """uint8 (N, H, W[, C]) to uint8 (N, C, size, size): 28 is padded to 32, all else is interpolated."""
    tensor = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    tensor = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()
    if tensor.shape[-1] == size:
        return tensor
    if (tensor.shape[-1], size) == (28, 32):
        return F.pad(tensor, (2, 2, 2, 2))
    chunks = tensor.split(4096)  # float copies of a whole set would be large
    resized = [F.interpolate(c.float(), size=size, mode="bilinear", antialias=True) for c in chunks]
    return torch.cat([r.round().clamp(0, 255).to(torch.uint8) for r in resized])
