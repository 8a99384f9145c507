"""Pictures for the page: a few of them on a sheet, and where they differ from their references."""

from __future__ import annotations

import base64
import io

import numpy as np

ROOM = 512  # pixels in a line of a sheet: 4 x 3 small pictures, 2 x 2 of 256 pixels, one of 512
DIFFERENCE_RANGE = 0.25  # difference at which the colours of a difference map end
DARKER, LIGHTER = (84, 39, 136), (217, 119, 6)  # ends of the diverging colours; white is no difference


def layout(side: int) -> tuple[int, int]:
    """Columns and rows of a sheet of pictures whose longer side has so many pixels."""
    columns = max(1, min(4, ROOM // side))
    return columns, min(3, columns)


def chosen(count: int, room: int) -> list[int]:
    """Indices of the pictures on a sheet: evenly spaced, none chosen by hand."""
    return list(range(count)) if count <= room else [j * count // room for j in range(room)]


def sheet(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Pictures uint8 [n, h, w, c] in rows of so many: one picture [rows * h, columns * w, c], white where empty."""
    n, h, w, c = pictures.shape
    rows = -(-n // columns)
    full = np.full((rows * columns, h, w, c), 255, dtype=np.uint8)
    full[:n] = pictures
    return full.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)


def difference_map(pictures: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Where pictures differ from their references: uint8 [n, h, w, c] twice -> colours [n, h, w, 3].

    The strength of the colour is the root mean square over the channels, so that a change of hue shows, too; which of
    the two colours it is, says whether the pixel is darker or lighter on the whole.
    """
    difference = (pictures.astype(np.float64) - references) / 255
    strength = np.sqrt(np.square(difference).mean(-1, keepdims=True)) / DIFFERENCE_RANGE
    ends = np.where(difference.mean(-1, keepdims=True) < 0, np.array(DARKER), np.array(LIGHTER))
    return np.rint(255 + strength.clip(0, 1) * (ends - 255)).astype(np.uint8)


def data_uri(picture: np.ndarray) -> str:
    """A PNG of a uint8 array [h, w, 1 or 3], as text that an `<img>` shows; shrunk if it is wider than a sheet."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
    image.reduce(-(-max(image.size) // ROOM)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
