"""The report page: its structure, and how real headless Chromium sees it (where a Chromium is installed)."""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import io
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
from PIL import Image

from dittocache.evaluate import Comparison, Result, charts, findings, page, sheet, write_page
from dittocache.evaluate.comparison import FEWER_STEPS, UNCACHED, Score, side_by_side
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


def score(value: float, half: float | None = None) -> Score:
    return Score(value=value, low=None if half is None else value - half, high=None if half is None else value + half)


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
        scores={"psnr": score(decibels, 1.5), "latent error": score(0.5**decibels)} if interval else {},
        deltas={"psnr": score(decibels - 40, 1.5), "frechet": score(0.1, 0.2)} if interval else {},
        step_errors=tuple(0.01 * n * speedup / 50 for n in range(50)) if interval else None,
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
        "baseline": "25 steps",
        "tried": [{"x": 1.5 + n / 10, "y": 42 - n, "label": f"plan {n} <"} for n in range(5)],
        "judge": "a small classifier",
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
    order = [a["id"] for a in outline.find("section")]
    assert order == ["pareto", "pictures", "steps", "plans", "memory", "numbers", "recipes", "made"]
    assert [a["id"] for a in outline.find("h2")] == [f"h-{name}" for name in order]
    assert [a["href"] for a in outline.find("a")] == [f"#{name}" for name in order]
    assert len(outline.find("h1")) == 1


def test_every_row_has_its_pictures_differences_point_and_line(outline, comparison):
    rows = len(comparison.results)
    tiles = [a for a in outline.find("img") if a.get("src")]
    assert sum("picture" in a["class"] for a in tiles) == rows
    assert sum("difference" in a["class"] for a in tiles) == rows - 1
    assert all(a["alt"] for a in outline.find("img"))
    points = [a for a in outline.find("g") if a["class"].startswith("point")]
    # once in the wide chart, once in the narrow one: PSNR has no value for the reference, the latent error only six
    assert len(points) == 2 * (rows - 1 + rows + rows + rows + 6)
    assert all(a["tabindex"] == "0" and "×" in a["aria-label"] for a in points)
    assert sum("heat" in (a.get("class") or "") for a in outline.find("svg")) == 6
    assert sum(a["class"].startswith("line") for a in outline.find("g")) == 2 * 6
    assert sum(a["class"] == "tried" for a in outline.find("g")) == 2 * 5
    # the table of all rows, that of the paired differences, that of what was tried
    assert sum(a.get("scope") == "row" for a in outline.find("th")) == rows + 6 + 5
    assert len(outline.find("details")) == 6 + 1


def test_a_row_has_its_intervals_and_paired_differences(file):
    text = file.read_text(encoding="utf-8")
    assert "<td>46.0<small>44.5 to 47.5</small></td>" in text
    assert "better</span> +6.0<small>4.5 to 7.5</small>" in text  # fora mild, 46 dB against 40
    assert "worse</span> −4.0<small>−5.5 to −2.5</small>" in text
    assert "even</span> +0.10<small>−0.10 to 0.30</small>" in text
    assert "Paired differences from 25 steps" in text


def test_less_is_better_turns_the_verdict_round():
    frechet = next(m for m in findings.MEASURES if m.name == "frechet")
    assert page._delta(frechet, score(0.3, 0.1))["verdict"] == "worse"
    assert page._delta(frechet, score(-0.3, 0.1))["verdict"] == "better"


def test_provenance_is_told(file):
    text = file.read_text(encoding="utf-8")
    assert "<code>dittocache demo</code>" in text
    assert "<dt>Judge</dt><dd>a small classifier</dd>" in text


def test_a_recipe_is_one_line_with_its_json_behind(file):
    text = file.read_text(encoding="utf-8")
    assert "<details><summary><code>fora(interval=2)</code></summary><pre" in text
    assert "&#34;interval&#34;: 2" in text


def pictures_of(file: Path, kind: str) -> list[np.ndarray]:
    """What the page's images of a class show, decoded."""
    sources = [a["src"] for a in Outline(file.read_text(encoding="utf-8")).find("img") if kind in a["class"].split()]
    data = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources]
    return [np.asarray(Image.open(io.BytesIO(png))) for png in data]


def test_difference_maps_have_the_right_values(file, comparison):
    maps, drawn = pictures_of(file, "difference"), pictures_of(file, "picture")
    chosen = list(range(0, 36, 3))  # 12 of 36, evenly spaced, the same for all rows
    for result, shown, colours in zip(comparison.results[1:], drawn[1:], maps, strict=True):
        for place, j in enumerate(chosen):
            at = np.s_[32 * (place // 4) : 32 * (place // 4 + 1), 32 * (place % 4) : 32 * (place % 4 + 1)]
            picture, reference = comparison.pictures[result.label][j], comparison.pictures["uncached"][j]
            assert np.array_equal(shown[at], picture[..., 0])
            # the distance from white says how large the difference is, in 64 of 255 steps of grey
            strength = np.clip(abs(picture.astype(float) - reference) / 255 / 0.25, 0, 1)
            darker = picture < reference
            wanted = 255 - strength * (255 - np.where(darker, np.array([84, 39, 136]), np.array([217, 119, 6])))
            assert np.abs(colours[at] - wanted).max() <= 0.5


def plain(comparison: Comparison) -> Comparison:
    """The same without anything optional: as of a version before there were scores, and without fewer steps."""
    bare = [
        dataclasses.replace(
            r, scores={}, deltas={}, step_errors=None, ssim=None, frechet=None, accuracy=None, plan=None
        )
        for r in comparison.results
        if r.method != FEWER_STEPS
    ]
    optional = ("command", "baseline", "tried", "judge")
    made = {name: value for name, value in comparison.provenance.items() if name not in optional}
    return dataclasses.replace(comparison, results=tuple(bare), provenance=made)


def test_a_comparison_without_optional_data_is_a_page(comparison, tmp_path):
    outline = Outline(write_page(plain(comparison), tmp_path / "index.html").read_text(encoding="utf-8"))
    order = [a["id"] for a in outline.find("section")]
    assert order == ["pareto", "pictures", "memory", "numbers", "recipes", "made"]
    assert outline.open == []


def test_a_comparison_without_any_quality_is_a_page(comparison, tmp_path):
    rows = [dataclasses.replace(r, psnr=None) for r in plain(comparison).results]
    bare = dataclasses.replace(plain(comparison), results=tuple(rows))
    outline = Outline(write_page(bare, tmp_path / "index.html").read_text(encoding="utf-8"))
    assert outline.find("section")[0]["id"] == "pictures"


def test_rows_of_two_comparisons_share_a_page(comparison, tmp_path):
    other = dataclasses.replace(
        comparison,
        results=(comparison.results[0], comparison.results[-1]),
        provenance=comparison.provenance | {"command": "dittocache tune"},
    )
    both = side_by_side([comparison, other], ["demo", "tuned"])
    text = write_page(both, tmp_path / "index.html").read_text(encoding="utf-8")
    assert "duca strong (tuned)" in text
    assert text.index("<h3>demo</h3>") < text.index("<h3>tuned</h3>") < text.index("dittocache tune</code>")
    assert len([a for a in Outline(text).find("g") if a["class"] == "tried"]) == 2 * 10


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
    colours = sheet.difference_map(picture, reference)
    assert tuple(colours[0, 1, 1]) == (255, 255, 255)
    assert tuple(colours[0, 0, 0]) == sheet.LIGHTER and tuple(colours[0, 0, 1]) == sheet.DARKER


def test_a_change_of_hue_is_a_difference():
    reference = np.full((1, 1, 1, 3), 128, dtype=np.uint8)
    picture = reference + np.array([30, 256 - 30, 0], dtype=np.uint8)  # as bright as before
    strength = (30 / 255) * (2 / 3) ** 0.5 / 0.25
    wanted = 255 - strength * (255 - np.array(sheet.LIGHTER))
    assert np.abs(sheet.difference_map(picture, reference)[0, 0, 0] - wanted).max() <= 0.5


@pytest.mark.parametrize(("side", "found"), [(16, (4, 3)), (128, (4, 3)), (256, (2, 2)), (512, (1, 1)), (1024, (1, 1))])
def test_large_pictures_get_fewer_on_a_sheet(side, found):
    assert sheet.layout(side) == found


def test_a_sheet_is_never_larger_than_its_room():
    uri = sheet.data_uri(np.zeros((1100, 700, 3), dtype=np.uint8))
    assert max(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size) <= sheet.ROOM


def test_a_sheet_sets_pictures_side_by_side():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), dtype=np.uint8)
    drawn = sheet.sheet(pictures, columns=4)
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

    def errors(browser):
        complaints = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [e for e in browser.events if e.get("method") in complaints]

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [1366, 390])
    def test_the_browser_shows_it_without_errors_or_requests(browser, file, width, scheme):
        browser.open(file, width, scheme)
        requests = [
            e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"
        ]
        assert [url for url in requests if not url.startswith("data:")] == [file.resolve().as_uri()]
        assert errors(browser) == []

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

    def test_both_pictures_or_differences_are_shown(browser, file):
        browser.open(file, 1366)
        shown = """["img.picture", "img.difference"].map(name => [...document.querySelectorAll(".cards " + name)]
            .filter(e => getComputedStyle(e).display !== "none").length)"""
        assert browser.ask(shown) == [12, 11]
        browser.ask('document.getElementById("see-differences").click()')
        assert browser.ask(shown) == [0, 11]
        assert browser.ask('getComputedStyle(document.querySelector(".scale")).visibility') == "visible"
        browser.ask('document.getElementById("see-pictures").click()')
        assert browser.ask(shown) == [12, 0]

    def test_a_point_tells_its_recipe_and_numbers(browser, file):
        browser.open(file, 1366)
        browser.ask('document.querySelector(".wide .point.m1").focus()')
        text = browser.ask('document.querySelector("#pareto .readout").textContent')
        assert "toca(interval=2)" in text and "dB" in text and "×" in text and "95 %: 43.5 to 46.5" in text

    def hover(browser, selector):
        """Moves the mouse onto an element."""
        at = browser.ask(f"""(() => {{
            const e = document.querySelector({selector!r});
            e.scrollIntoView({{block: "center"}});
            const box = e.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }})()""")
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])

    def test_the_mouse_on_a_mark_tells_its_recipe(browser, file):
        browser.open(file, 1366)
        hover(browser, "#pareto .by-1 .wide .point.m2 .halo")
        assert "duca(interval=" in browser.ask('document.querySelector("#pareto .readout").textContent')
        hover(browser, "#pareto .by-1 .wide .tried circle")
        assert "tried by the search" in browser.ask('document.querySelector("#pareto .readout").textContent')

    def test_a_line_tells_its_recipe(browser, file):
        browser.open(file, 1366)
        hover(browser, "#steps .wide .line.m2 text")
        text = browser.ask('document.querySelector("#steps .readout").textContent')
        assert "duca(interval=" in text and "after the last step" in text

    def test_the_measure_can_be_switched_by_keyboard(browser, file):
        browser.open(file, 1366)
        shown = """[...document.querySelectorAll("#pareto .measure")]
            .filter(e => getComputedStyle(e).display !== "none")
            .map(e => e.querySelector(".chart").getAttribute("aria-label"))"""
        assert "PSNR, dB" in browser.ask(shown)[0]
        browser.ask('document.getElementById("by-1").focus()')
        for kind in ("keyDown", "keyUp"):
            browser.send(
                "Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39
            )
        labels = browser.ask(shown)
        assert len(labels) == 1 and "SSIM" in labels[0]

    def test_a_card_opens_large_beside_the_reference(browser, file):
        browser.open(file, 1366)
        browser.ask("document.querySelectorAll('.tiles')[6].click()")
        assert browser.ask("document.querySelector('dialog').open") is True
        title = "document.getElementById('h-large').textContent"
        assert browser.ask(title) == "fora mild"
        shown = "[...document.querySelectorAll('dialog img')].map(e => e.complete && e.naturalWidth)"
        assert browser.ask(shown) == [128, 128, 128]
        browser.send(
            "Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39
        )
        assert browser.ask(title) == "fora strong"
        browser.ask("document.querySelector('[data-go=\"0\"]').click()")
        assert browser.ask("document.querySelector('dialog').open") is False
        assert errors(browser) == []

    def test_print_shows_pictures_and_differences_and_nothing_to_click(browser, file):
        browser.open(file, 1100)
        browser.ask('document.getElementById("see-pictures").click()')
        browser.send("Emulation.setEmulatedMedia", media="print")
        displayed = "e => getComputedStyle(e).display !== 'none'"
        assert browser.ask(f"[...document.querySelectorAll('.card img')].every({displayed})") is True
        assert browser.ask(f"[...document.querySelectorAll('.switch, .readout, nav')].some({displayed})") is False
        assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"

    def test_rows_differ_without_colour(browser, file):
        browser.open(file, 1366, media="print")
        dashes = """[...document.querySelectorAll("#steps .wide .line.m0 .stroke")]
            .map(e => getComputedStyle(e).strokeDasharray)"""
        assert len(set(browser.ask(dashes))) == 2
        marks = """[...document.querySelectorAll("#pareto .by-1 .wide .point")].map(e => [e.classList[1],
            e.querySelectorAll("path, circle:not(.halo)")[0].outerHTML.replace(/[0-9. -]+/g, "").length])"""
        assert len({tuple(mark) for mark in browser.ask(marks)}) == 4

    def test_a_page_without_optional_data_has_no_errors(browser, comparison, tmp_path):
        browser.open(write_page(plain(comparison), tmp_path / "plain.html"), 1366)
        browser.ask('document.querySelector(".wide .point").focus()')
        assert "×" in browser.ask('document.querySelector(".readout").textContent')
        assert errors(browser) == []
