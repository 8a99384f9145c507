"""The report page: its structure, and how real headless Chromium sees it (where a Chromium is installed)."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dittocache.evaluate import Comparison, Result, charts, page, write_page
from dittocache.evaluate.comparison import FEWER_STEPS, UNCACHED
from dittocache.plan import Plan

BROWSER = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)


class Browser:
    """Headless Chromium, spoken to over a pipe in its DevTools protocol: JSON messages that end with a NUL."""

    def __init__(self, profile: Path):
        to_read, self.out = os.pipe()
        self.into, to_write = os.pipe()
        flags = """--headless --no-sandbox --disable-gpu --hide-scrollbars --disable-background-networking
            --disable-component-update --disable-sync --no-first-run --disable-dev-shm-usage --remote-debugging-pipe"""

        def connect() -> None:  # Chromium reads messages from descriptor 3 and writes them to descriptor 4
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)]
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [str(BROWSER), *flags.split(), f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=connect,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.count, self.events = b"", 0, []
        self.session = None
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def read(self, seconds: float = 60) -> dict:
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.into], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium said nothing for {seconds} s")
            data = os.read(self.into, 1 << 20)
            if not data:
                raise EOFError("Chromium has ended")
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, **params) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, width: int, scheme: str = "light", media: str = "screen") -> None:
        """Loads a file at a width in CSS pixels and waits until it is there."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def ask(self, expression: str):
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self.out)
        os.close(self.into)


# ---- a comparison to draw -------------------------------------------------------------------------------------------
def plan(interval: int) -> Plan:
    table = np.zeros((50, 5))
    table[::interval] = 1
    table[1::interval, 2:4] = 0.07
    kinds = ("attention", "attention", "feed-forward", "feed-forward", "stack")
    return Plan(table, ("0.attn", "1.attn", "0.ff", "1.ff", "blocks"), kinds=kinds)


def row(label: str, method: str, speedup: float, decibels: float | None, interval: int | None = None) -> Result:
    recipe = None if interval is None else {"params": {"interval": interval, "name": "<&\"'"}}
    return Result(
        label=label,
        method=method,
        steps=50,
        recipe=recipe,
        summary=f"{method}(interval={interval})" if interval else "50 steps",
        seconds=(3.0 / speedup, 3.1 / speedup),
        compute_fraction=0.9 / speedup,
        speedup=speedup,
        speedup_low=speedup * 0.96,
        speedup_high=speedup * 1.03,
        psnr=decibels,
        ssim=0.9,
        frechet=0.25,
        accuracy=0.97,
        bytes_peak=(interval and 3 << 20) or 0,
        plan=plan(interval).to_dict() if interval else None,
        warnings=("less than </script> half was skipped",) if interval else (),
    )


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    rows = [row("uncached", UNCACHED, 1.0, None)]
    rows += [row(f"{n} steps", FEWER_STEPS, 50 / n, 60 - 8 * 50 / n) for n in (33, 25, 17, 13, 10)]
    for j, method in enumerate(("fora", "toca", "duca")):
        rows += [
            row(f"{method} mild", method, 1.9 + 0.1 * j, 46 - j, 2),
            row(f"{method} strong", method, 3.2 - j / 9, 36 + j, 4),
        ]
    generator = np.random.default_rng(0)
    pictures = {r.label: generator.integers(0, 256, (36, 32, 32, 1), dtype=np.uint8) for r in rows}
    made = {
        "command": "dittocache demo",
        "date": "2026-01-01 00:00 UTC",
        "model": "glyphs",
        "network": "DiT",
        "scheduler": "DDIMScheduler",
        "steps": 50,
        "guidance_scale": 1.5,
        "chunk": 12,
        "machine": "a machine <with brackets>",
        "threads": 2,
        "cores": 2,
        "load": 3.4,
        "versions": {"torch": "2.13.0"},
    }
    labels = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
    return Comparison(tuple(rows), pictures, labels, tuple(range(36)), made)


@pytest.fixture(scope="module")
def file(comparison, tmp_path_factory) -> Path:
    return write_page(comparison, tmp_path_factory.mktemp("page") / "index.html")


# ---- structure ------------------------------------------------------------------------------------------------------
class Outline(HTMLParser):
    """Tags with their attributes, and what scripts hold."""

    VOID = frozenset({"meta", "link", "input", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    def find(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def outline(file) -> Outline:
    return Outline(file.read_text(encoding="utf-8"))


def test_every_tag_is_closed(outline):
    assert outline.open == []


def test_nothing_is_loaded_from_elsewhere(file, outline):
    for tag, attributes in outline.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), f"{tag} loads {attributes[name]}"
    text = file.read_text(encoding="utf-8")
    assert not any(word in text for word in ("http:", "https:", "@import", "url(", "fetch(", "XMLHttpRequest"))


def test_sections_stand_in_order(outline):
    order = [a["id"] for tag, a in outline.tags if tag == "h2"]
    assert order == ["pictures", "pareto", "plans", "numbers", "made"]
    assert len(outline.find("h1")) == 1


def test_every_row_has_its_pictures_differences_point_and_line(outline, comparison):
    rows = len(comparison.results)
    assert sum("picture" in (a["class"] or "") for a in outline.find("img")) == rows
    assert sum("difference" in (a["class"] or "") for a in outline.find("img")) == rows
    assert all(a["alt"] for a in outline.find("img"))
    points = [a for a in outline.find("g") if "point" in (a.get("class") or "")]
    assert len(points) == 2 * (rows - 1)  # once in the wide chart, once in the narrow one
    assert all(a["tabindex"] == "0" and "dB" in a["aria-label"] for a in points)
    assert sum("heat" in (a.get("class") or "") for a in outline.find("svg")) == 6
    assert sum(a.get("scope") == "row" for a in outline.find("th")) == rows


def test_numbers_are_in_the_page_as_json(outline, comparison):
    assert json.loads(outline.scripts[0]) == json.loads(json.dumps(comparison.to_dict()))


def test_a_comparison_of_unknown_origin_is_refused(comparison, tmp_path):
    unknown = dataclasses.replace(comparison, provenance={"model": "glyphs"})
    with pytest.raises(ValueError, match="its provenance is incomplete"):
        write_page(unknown, tmp_path / "index.html")
    assert not (tmp_path / "index.html").exists()


def test_a_busy_machine_is_admitted(file):
    assert "The machine was busy (load 3.4 on 2 cores)" in file.read_text(encoding="utf-8")


def test_text_of_others_is_escaped(file):
    text = file.read_text(encoding="utf-8")
    assert "&lt;with brackets&gt;" in text and "<with" not in text
    assert text.count("</script>") == 2


# ---- parts ----------------------------------------------------------------------------------------------------------
def test_a_difference_map_is_white_where_equal_and_has_a_colour_for_each_direction():
    reference = np.full((1, 2, 2, 1), 128, dtype=np.uint8)
    picture = reference.copy()
    picture[0, 0, 0], picture[0, 0, 1] = 255, 0
    colours = page.difference_map(picture, reference)
    assert tuple(colours[0, 1, 1]) == (255, 255, 255)
    assert tuple(colours[0, 0, 0]) == page.LIGHTER and tuple(colours[0, 0, 1]) == page.DARKER


def test_a_sheet_sets_pictures_side_by_side():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), dtype=np.uint8)
    drawn = page.sheet(pictures, columns=4)
    assert drawn.shape == (4, 12, 1)
    assert drawn[0, ::3, 0].tolist() == [0, 1, 2, 3] and drawn[2, ::3, 0].tolist() == [4, 255, 255, 255]


def test_labels_of_a_crowded_chart_do_not_cover_each_other():
    points = [(200.0 + 6 * j, 150.0 + 5 * j) for j in range(6)]
    texts = [f"method {j}" for j in range(6)]
    placed = charts.place_labels(texts, points, [], (0, 0, 600, 400))
    boxes = []
    for (x, y, anchor), text in zip(placed, texts, strict=True):
        width = 0.6 * 13 * len(text)
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, y - 9, left + width, y + 2))
    for j, a in enumerate(boxes):
        assert all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for b in boxes[j + 1 :])


def test_step_kinds_are_counted():
    assert charts.step_kinds(plan(4)) == "13 full · 13 partial · 24 reused steps"


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (float("inf"), "∞"), (1.234, "1.23")])
def test_numbers(value, text):
    assert page.number(value) == text


@pytest.mark.parametrize(("count", "text"), [(0, "–"), (100, "100 B"), (3 << 20, "3.0 MiB"), (5 << 29, "2.5 GiB")])
def test_sizes(count, text):
    assert page.size(count) == text


# ---- in a real browser ----------------------------------------------------------------------------------------------
if BROWSER is None:
    warnings.warn("no Chromium was found: of the report page only the structure is tested", stacklevel=1)
else:

    @pytest.fixture(scope="module")
    def browser(tmp_path_factory):
        started = Browser(tmp_path_factory.mktemp("profile"))
        yield started
        started.close()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [1366, 390])
    def test_the_browser_shows_it_without_errors_or_requests(browser, file, width, scheme):
        browser.open(file, width, scheme)
        requests = [
            e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"
        ]
        assert [url for url in requests if not url.startswith("data:")] == [file.resolve().as_uri()]
        complaints = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        assert [e for e in browser.events if e.get("method") in complaints] == []

    @pytest.mark.parametrize("width", [1366, 1280, 390, 320])
    def test_nothing_sticks_out(browser, file, width):
        browser.open(file, width)
        assert browser.ask("document.documentElement.scrollWidth") == width
        # texts of charts stay inside their own picture
        outside = """[...document.querySelectorAll(".chart text, .heat text")].filter(text => {
            const a = text.getBoundingClientRect(), b = text.ownerSVGElement.getBoundingClientRect();
            const sides = [b.left - a.left, a.right - b.right, b.top - a.top, a.bottom - b.bottom];
            return a.width && Math.max(...sides) > 1;
        }).map(text => text.textContent)"""
        assert browser.ask(outside) == []

    @pytest.mark.parametrize("width", [1366, 390])
    def test_labels_do_not_cover_each_other(browser, file, width):
        browser.open(file, width)
        clashes = """[...document.querySelectorAll(".chart")].flatMap(chart => {
            const texts = [...chart.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
            return texts.flatMap(([name, a], j) => texts.slice(j + 1).filter(([, b]) => a.width && b.width
                && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3).map(([other]) => name + " / " + other));
        })"""
        assert browser.ask(clashes) == []

    def test_pictures_and_differences_change_places(browser, file):
        browser.open(file, 1366)
        shown = """["picture", "difference"].map(name => [...document.querySelectorAll(".cards ." + name)]
            .filter(e => getComputedStyle(e).display !== "none").length)"""
        assert browser.ask(shown) == [12, 0]
        browser.ask('document.querySelector("[for=see-differences]").click()')
        assert browser.ask(shown) == [0, 12]
        assert browser.ask('getComputedStyle(document.querySelector(".scale")).visibility') == "visible"

    def test_a_point_tells_its_recipe_and_numbers(browser, file):
        browser.open(file, 1366)
        browser.ask('document.querySelector(".wide .point.m1").focus()')
        text = browser.ask('document.getElementById("readout").textContent')
        assert "toca(interval=2)" in text and "dB" in text and "×" in text

    def test_print_shows_pictures_and_differences(browser, file):
        browser.open(file, 1100, media="print")
        shown = """[...document.querySelectorAll(".card img")].every(e => getComputedStyle(e).display !== "none")"""
        assert browser.ask(shown) is True
