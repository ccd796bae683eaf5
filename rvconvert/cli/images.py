"""Images in and out: arrays and folders as batches, and labelled rows as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rvconvert.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

__all__ = ["heat", "labelled_rows", "read_images"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def read_images(path: str | Path, *, count: int | None = None, size: int | None = None) -> torch.Tensor:
    """A batch of images, float (N, C, H, W): bytes become [0, 1], floating point stays as it is.

    Args:
        path: ``.npy``, ``.npz`` (its first array), ``.pt`` (a tensor) or a folder of pictures, in name order.
        count: read at most so many. size: crop pictures of a folder to a square and scale it to this side.

    Raises:
        ConversionError: there are no images, or they differ in size.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, count, size)
    if size is not None:
        raise ConversionError(f"{path}: only pictures in a folder are scaled; leave out the size for an array")
    array = torch.as_tensor(_read_array(path))
    if array.ndim == 3:
        array = array.unsqueeze(1)
    if array.ndim != 4:
        raise ConversionError(f"{path} holds an array of shape {tuple(array.shape)}, not images (N, C, H, W) or (N, H, W)")
    if array.shape[-1] in (1, 3) and array.shape[1] not in (1, 3):
        array = array.movedim(-1, 1)  # channels last, as NumPy has them
    array = array[:count]
    return array.float() / 255 if array.dtype == torch.uint8 else array.float()


def _read_array(path: Path) -> Any:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return file[file.files[0]]
        if path.suffix in (".pt", ".pth"):
            value = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(value, torch.Tensor):
                return value
            raise ConversionError(f"{path} holds a {type(value).__name__}, not a tensor of images")
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file or folder") from None
    except ConversionError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged or foreign file may fail in any way
        raise ConversionError(f"{path} cannot be read as an array: {str(error).splitlines()[0][:150]}") from None
    raise ConversionError(f"{path}: images come as .npy, .npz, .pt or a folder of pictures")


def _read_folder(path: Path, count: int | None, size: int | None) -> torch.Tensor:
    from PIL import Image, ImageOps

    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)[:count]
    if not files:
        raise ConversionError(f"{path} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as opened:
                picture: Any = opened.convert("L" if opened.mode in ("1", "L", "I;16") else "RGB")
        except OSError as error:
            raise ConversionError(f"{file} cannot be read as a picture: {error}") from None
        if size is not None:
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(picture, dtype=np.uint8)
        pictures.append(pixels[..., None] if pixels.ndim == 2 else pixels)
    shapes = {p.shape for p in pictures}
    if len(shapes) > 1:
        found = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes)[:3])
        raise ConversionError(f"{path}: pictures differ in size or channels ({found}); scale them: --size 64")
    return torch.as_tensor(np.stack(pictures)).movedim(-1, 1).float() / 255


def heat(values: torch.Tensor) -> torch.Tensor:
    """Values (N, 1, H, W) in [0, 1] as colours (N, 3, H, W): black, violet, red, orange, pale yellow."""
    anchors = torch.tensor([(0, 0, 0), (0.34, 0.06, 0.43), (0.73, 0.21, 0.33), (0.98, 0.56, 0.04), (0.99, 1, 0.64)])
    position = values.clamp(0, 1) * (len(anchors) - 1)
    below = position.floor().long().clamp(max=len(anchors) - 2)
    colours = torch.lerp(anchors[below], anchors[below + 1], (position - below).unsqueeze(-1))
    return colours.squeeze(1).movedim(-1, 1)


def labelled_rows(rows: Sequence[tuple[str, torch.Tensor]], *, tile: int = 72, title: str = "") -> Image:
    """One picture, a labelled row for each entry.

    Args:
        rows: label and images (N, 1 or 3, H, W) in [0, 1]; a label may have two lines.
        tile: the least side of an image in the picture, in pixels; images are enlarged by a whole factor.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, gap = ImageFont.load_default(size=15), 6
    height, width = rows[0][1].shape[-2:]
    zoom = max(1, -(-tile // max(height, width)))
    step_x, step_y = width * zoom + gap, height * zoom + gap
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    margin = int(max(measure.multiline_textbbox((0, 0), label, font=font)[2] for label, _ in rows)) + 3 * gap
    top = gap + (2 * gap + 20 if title else 0)
    columns = max(len(images) for _, images in rows)
    picture = Image.new("RGB", (margin + columns * step_x, top + len(rows) * step_y), "white")
    draw = ImageDraw.Draw(picture)
    if title:
        draw.text((margin, gap + 2), title, "black", font)
    for row, (label, images) in enumerate(rows):
        y = top + row * step_y
        draw.multiline_text((2 * gap, y + (step_y - gap) / 2), label, "black", font, anchor="lm", spacing=4)
        for column, image in enumerate(images):
            pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().movedim(0, -1)
            tile_image = Image.fromarray(pixels.expand(-1, -1, 3).contiguous().numpy())
            picture.paste(
                tile_image.resize((width * zoom, height * zoom), Image.Resampling.NEAREST),
                (margin + column * step_x, y),
            )
    return picture
