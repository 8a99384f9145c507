"""Files of a saved recipe: written whole or not at all, and uploaded to a Hub that is spoken to over HTTP."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import tiny
from huggingface_hub.errors import HfHubHTTPError

import dittocache
from dittocache import Plan, Recipe, recipe, saved
from dittocache.when import Every, Table

PLANNED = Recipe(when=Table(Plan(np.eye(4), ("transformer_blocks.0.ff", "a", "b", "c"))))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- safe writing ---------------------------------------------------------------------------------------------------
LIMITED = """
import resource, signal, sys
from pathlib import Path
import dittocache, numpy as np
folder = Path(sys.argv[1])
contents = lambda: {path.name: path.read_bytes() for path in folder.iterdir()}
before = contents()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with EFBIG
for limit, wide in ((0, 1), (700, 1), (20_000, 2000)):  # nothing fits; half of the card; all but the arrays
    new = dittocache.recipe("icc", factor_tensors={"a/A": np.ones((wide, 2)), "a/B": np.ones((2, wide))})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        new.save_pretrained(folder)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error.errno, contents() == before, error)
"""


def test_a_file_that_cannot_be_written_leaves_the_old_recipe(tmp_path):
    """The kernel refuses to let files grow, as a full disk does; at three places."""
    old = recipe("icc", **tiny.data_for("icc"))
    old.save_pretrained(tmp_path)
    assert {saved.FILE, saved.ARRAYS, saved.CARD} <= set(contents(tmp_path))
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    assert all(line.startswith("27 True ") and "was not saved in" in line for line in lines), done.stdout
    assert Recipe.from_pretrained(tmp_path) == old


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """A file system of 64 KiB, where it may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["unshare", "--mount", "--map-root-user", "bash", "-c"]
    script = f'mount -t tmpfs -o size=64k none "{disk}" && "{sys.executable}" -c "$0"'
    code = f"""
import dittocache, numpy as np
from pathlib import Path
old = dittocache.recipe("fora", interval=2)
old.save_pretrained({str(disk)!r})
before = {{p.name: p.read_bytes() for p in Path({str(disk)!r}).iterdir()}}
new = dittocache.recipe("icc", factor_tensors={{"a/A": np.ones((9000, 2)), "a/B": np.ones((2, 9000))}})
try:
    new.save_pretrained({str(disk)!r})
except OSError as error:
    print(error.errno, {{p.name: p.read_bytes() for p in Path({str(disk)!r}).iterdir()}} == before)
"""
    try:
        allowed = subprocess.run([*mounted, f'mount -t tmpfs none "{disk}"'], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("file systems cannot be mounted here")
    done = subprocess.run([*mounted, script, code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "28 True\n", done.stdout + done.stderr


def test_files_of_the_recipe_before_are_gone(tmp_path):
    recipe("icc", **tiny.data_for("icc")).save_pretrained(tmp_path, grid=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("mine")
    assert {saved.ARRAYS, saved.GRID} < set(contents(tmp_path))
    recipe("fora").save_pretrained(tmp_path, card=False)
    assert set(contents(tmp_path)) == {saved.FILE, "notes.txt"}
    assert Recipe.from_pretrained(tmp_path) == recipe("fora")


def test_a_readme_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    for card in (True, False):
        recipe("fora").save_pretrained(tmp_path, card=card)
        assert (tmp_path / "README.md").read_text() == "# My project\n"
    (tmp_path / "README.md").unlink()
    recipe("fora").save_pretrained(tmp_path)
    written = (tmp_path / "README.md").read_text()
    recipe("toca").save_pretrained(tmp_path)
    assert "toca" in (tmp_path / "README.md").read_text() != written
    (tmp_path / "README.md").write_text(written.replace(saved.MARK, "") + "more")  # as the mark says
    recipe("toca").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().endswith("more")


def test_saving_in_place_of_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="was not saved in") as e:
        recipe("fora").save_pretrained(tmp_path / "file")
    assert "\n" not in str(e.value) and (tmp_path / "file").read_text() == "x"


def test_bad_arguments_change_nothing(tmp_path):
    for error, wrong, words in (
        (TypeError, {"gird": 1}, "'gird' is none of its arguments"),
        (TypeError, {"private": True}, "'private' .* push_to_hub=True only"),
        (ValueError, {"card": "yes"}, "card must be True or False; got 'yes'"),
        (ValueError, {"card": False, "grid": np.zeros((2, 4, 4, 3), np.uint8)}, "goes with card=True"),
        (ValueError, {"grid": np.zeros((3, 4, 4, 3), np.uint8)}, r"pairs of pictures.* uint8 \[3, 4, 4, 3\]"),
        (ValueError, {"grid": np.zeros((2, 4, 4, 3))}, r"pairs of pictures.* float64 \[2, 4, 4, 3\]"),
        (ValueError, {"grid": np.zeros((2, 4, 4, 2), np.uint8)}, "pairs of pictures"),
        (ValueError, {"grid": np.zeros((0, 4, 4, 3), np.uint8)}, "pairs of pictures"),
        (ValueError, {"grid": tmp_path / "none.png"}, "none.png' cannot be read"),
        (ValueError, {"grid": __file__}, "test_saved.py' cannot be read"),
    ):
        with pytest.raises(error, match=words) as e:
            recipe("fora").save_pretrained(tmp_path, **wrong)
        assert "\n" not in str(e.value)
        assert not contents(tmp_path)


# ---- the Hub --------------------------------------------------------------------------------------------------------
class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as an upload of small files needs; `server.repos` has what was committed."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.append(self.headers.get("authorization"))
        if self.server.refuses:
            return self.send_error(403)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.server.created.append(asked)
            self.server.repos.setdefault(repo, {})
            return self.answer({"url": f"{self.server.url}/{repo}", "id": repo, "name": repo})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            asked = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": path, **mode} for path in asked]})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del self.server.repos[repo][value["path"]]
            url = f"{self.server.url}/{repo}/commit/{'0' * 40}"
            return self.answer({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        return self.answer({}) if self.path.startswith("/api/") else self.send_error(404)

    def do_GET(self):
        repo = "/".join(self.path.split("/")[3:5])
        if repo not in self.server.repos or "/tree/" not in self.path:
            return self.send_error(404)
        found = self.server.repos[repo].items()
        return self.answer([{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in found])

    def answer(self, data):
        text = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A server on this machine that huggingface_hub takes for the Hub."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.created, server.tokens, server.refuses = {}, [], [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_uploads_the_recipe_and_its_card(hub, tmp_path):
    made = recipe("icc", **tiny.data_for("icc"))
    made.push_to_hub("me/fast", token="hf_secret", private=True, grid=np.zeros((2, 4, 4, 3), np.uint8))
    found = hub.repos["me/fast"]
    assert set(found) == {saved.FILE, saved.ARRAYS, saved.CARD, saved.GRID}
    asked = hub.created[0]
    assert asked.get("private") is True or asked.get("visibility") == "private"  # older clients, and newer ones
    assert set(hub.tokens) == {"Bearer hf_secret"}
    assert b"Recipe.from_pretrained('me/fast')" in found[saved.CARD]
    for name, content in found.items():
        (tmp_path / name).write_bytes(content)
    assert Recipe.from_pretrained(tmp_path) == made
    recipe("fora").push_to_hub("me/fast", token="hf_secret")
    assert set(hub.repos["me/fast"]) == {saved.FILE, saved.CARD}


def test_uploads_a_folder_under_its_own_name(hub, tmp_path):
    """The card names the repository with its owner, and nothing else in the folder is uploaded."""
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "private.txt").write_text("x")
    recipe("fora").save_pretrained(tmp_path / "plan", push_to_hub=True, token="hf_secret")
    assert set(hub.repos["someone/plan"]) == {saved.FILE, saved.CARD}
    assert b"from_pretrained('someone/plan')" in hub.repos["someone/plan"][saved.CARD]
    assert (tmp_path / "plan" / "README.md").read_bytes() == hub.repos["someone/plan"][saved.CARD]


def test_an_upload_that_fails_leaves_the_saved_folder(hub, tmp_path):
    hub.refuses = True
    with pytest.raises(HfHubHTTPError):
        Recipe(when=Every(2)).save_pretrained(tmp_path / "kept", push_to_hub=True, token="hf_secret")
    assert Recipe.from_pretrained(tmp_path / "kept") == Recipe(when=Every(2))


def test_versions_stay_those_it_was_made_with(tmp_path):
    made = Recipe(when=Every(2), provenance={"torch": "1.0"})
    made.save_pretrained(tmp_path)
    again = Recipe.from_pretrained(tmp_path)
    assert again.provenance["torch"] == "1.0" and again.provenance["dittocache"] == dittocache.__version__
    assert os.listdir(tmp_path) and made.provenance == {"torch": "1.0"}
