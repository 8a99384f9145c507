"""Files of a saved recipe: JSON for people, its tensors and tables beside it as safetensors, and what a Hub keeps.

Files are replaced when all of the new ones are complete: a full disk leaves the recipe that was there as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from . import atomic
from .parts import Part, jsonable, show
from .tensors import Tensors

FILE, ARRAYS, CARD, PLAN, GRID = "recipe.json", "recipe.safetensors", "README.md", "recipe-plan.png", "recipe-grid.png"
FILES = (CARD, PLAN, GRID, ARRAYS, FILE)  # in the order in which they are replaced: the recipe itself last
MARK = "<!-- Written by dittocache, and again whenever the recipe is saved: delete this line to keep your changes. -->"

Write = Callable[[str, Part], Any]  # an entry of the JSON file, from the name of a part and the part


def encoded(lay_out: Callable[[Write], dict[str, Any]]) -> dict[str, bytes]:
    """Contents of a recipe's files by name; `lay_out(write)` gives the entries, each part as `write(name, part)`."""
    arrays: dict[str, torch.Tensor] = {}
    data = lay_out(lambda name, part: _set_aside(part.fields(), name, arrays))
    found = {FILE: (json.dumps(data, indent=2) + "\n").encode()}
    return found | {ARRAYS: save(arrays)} if arrays else found


def replace(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a recipe's files into a folder (created if missing), and removes those that it does not have.

    A README.md that was not written here, or was changed by hand, is left alone.

    Raises:
        OSError: a file could not be written; then none was changed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {CARD} if (folder / CARD).exists() and MARK.encode() not in (folder / CARD).read_bytes() else set()
        # those that this recipe does not have are of one that was here before
        atomic.write_all(folder, {name: files.get(name) for name in FILES if name not in kept})
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: the recipe was not saved in {str(folder)!r}") from None


def read(name: str | Path, parts: Iterable[str], **kwargs: Any) -> Any:
    """The entries of a saved recipe, in a folder or on the Hub, the arrays of its parts put back into their places.

    Keyword arguments go to `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: nothing there, or damaged files.
    """
    folder = Path(name)
    if not (folder / FILE).is_file():
        if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
            raise ValueError(f"no saved recipe at {str(name)!r}: {FILE} is missing")
        folder = _download(str(name), **kwargs)
    try:
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
        arrays = load_file(folder / ARRAYS) if (folder / ARRAYS).is_file() else {}
        if isinstance(data, dict):
            data |= {part: _put_back(data[part], arrays) for part in parts if part in data}
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, SafetensorError, OSError) as error:
        raise ValueError(f"damaged recipe in {str(name)!r}: {show(error)}") from None
    return data


def _download(name: str, **kwargs: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[FILE, ARRAYS], **kwargs))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"no saved recipe at {name!r}, neither a folder nor on the Hub: {reason}") from None


def repository(repo_id: str, **kwargs: Any) -> str:
    """The full id of a repository of the Hub, created if missing; keyword arguments go to `create_repo`."""
    from huggingface_hub import HfApi

    return str(HfApi().create_repo(repo_id, exist_ok=True, **kwargs).repo_id)


def upload(folder: Path, repo_id: str, token: Any = None) -> None:
    """Uploads a recipe's files, and nothing else that is in the folder."""
    from huggingface_hub import HfApi

    HfApi(token=token).upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=list(FILES),
        delete_patterns=[ARRAYS, PLAN, GRID],  # those of a recipe that was there before
        commit_message="Add dittocache recipe",
    )


def _set_aside(value: Any, path: str, arrays: dict[str, torch.Tensor]) -> Any:
    """JSON data without its tensors and tables of numbers: those go into `arrays`, under their dotted path."""
    if isinstance(value, Tensors):
        held = set(map(id, arrays.values()))  # of another fill: safetensors refuses shared memory
        arrays |= {f"{path}:{name}": t.clone() if id(t) in held else t for name, t in value.items()}
        return {"tensors": path, "count": len(value)}
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        return {k: _set_aside(v, f"{path}.{k}" if path else k, arrays) for k, v in value.items()}
    if isinstance(value, (tuple, list)) and value and all(isinstance(one, Part) for one in value):
        return [_set_aside(one.fields(), f"{path}.{n}", arrays) for n, one in enumerate(value)]
    value = jsonable(value)
    if isinstance(value, list) and value and all(isinstance(row, list) and row for row in value):
        arrays[path] = torch.tensor(value, dtype=torch.float64)
        return {"array": path}
    return value


def _put_back(value: Any, arrays: Mapping[str, torch.Tensor]) -> Any:
    """Inverse of `_set_aside`."""
    if isinstance(value, dict):
        if set(value) == {"tensors", "count"}:
            mine = f"{value['tensors']}:"
            found = {name.removeprefix(mine): t for name, t in arrays.items() if name.startswith(mine)}
            if len(found) != value["count"]:
                raise ValueError(f"damaged recipe: tensors {show(value['tensors'])} are missing from {ARRAYS}")
            return Tensors(found)
        if set(value) == {"array"}:
            if not isinstance(value["array"], str) or value["array"] not in arrays:
                raise ValueError(f"damaged recipe: array {show(value['array'])} is missing from {ARRAYS}")
            return arrays[value["array"]].tolist()
        return {k: _put_back(v, arrays) for k, v in value.items()}
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return [_put_back(one, arrays) for one in value]
    return value
