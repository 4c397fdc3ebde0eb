"""What a browser is given: only inert elements, whatever the graph is called, and no more than a page can hold."""

from __future__ import annotations

import base64
import functools
import http.server
import re
import shutil
import subprocess
import threading
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from benchmarks.diff import transformer
from qpass.capture.export import capture
from qpass.inspect.diff import GraphDiff
from qpass.inspect.render.page import page
from qpass.ir.record import NodeRecord, graph_record, set_record

TAGS = {
    "html", "head", "meta", "title", "body", "div", "p", "b", "span", "small", "code", "pre", "br", "img",
    "table", "tbody", "tr", "th", "td", "details", "summary",
}  # fmt: skip
ATTRIBUTES = {"style", "src", "alt", "open", "lang", "charset"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Inert(HTMLParser):
    """Reads a page and keeps what is not on the lists above, its pictures and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.pictures: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in TAGS:
            self.faults.append(f"<{tag}>")
        for name, value in attrs:
            if name not in ATTRIBUTES:
                self.faults.append(f"{name} of <{tag}>")
            if name == "src":
                kind, _, data = (value or "").partition("base64,")
                if kind != "data:image/svg+xml;":
                    self.faults.append(f"src {value}")
                self.pictures.append(base64.b64decode(data).decode())
            if name == "style" and re.search(r"url|expression|import|[<>\\]", value or ""):
                self.faults.append(f"style {value}")

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_inert(page: str) -> Inert:
    found = Inert(page)
    assert found.faults == []
    for svg in found.pictures:
        elements = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(svg).iter()}
        assert elements <= {"svg", "g", "rect", "path", "text"}
        assert not re.search(r"\bon\w+=|href|javascript:", re.sub(r">[^<]*<", "><", svg))
    return found


class Layer(nn.Module):
    """A transformer's layer, as small as it may be."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


def diff_of(layers: int) -> GraphDiff:
    x = torch.randn(2, 4, 8)
    program = torch.export.export(nn.Sequential(*(Layer() for _ in range(layers))).eval(), (x,))
    prepared = qpass.prepare(program)
    with torch.no_grad():
        prepared(x)
    return qpass.diff(prepared, qpass.convert(prepared))


@pytest.mark.slow  # exporting, calibrating and converting a hundred layers; the diff itself takes half a second
def test_a_hundred_layers_are_six_edits_on_one_page(tmp_path: Path) -> None:
    found = diff_of(100)
    assert [edit.pattern for edit in found.edits] == [
        "{0..99}.qkv", "{0..99}", "{0..99}", "{0..99}.proj", "{0..99}.up", "{0..99}.down",
    ]  # fmt: skip
    assert_fits(found, tmp_path)


def test_a_hundred_layers_fit_into_a_page(tmp_path: Path) -> None:
    """Blocks put together by hand, without a trace in common: seven linears each, in front of which q/dq came."""
    found = qpass.diff(transformer(3000, pairs=False), transformer(3000, pairs=True, prefix="other_"))
    names = ("query", "key", "value", "out", "up", "gate", "down")
    assert [edit.pattern for edit in found.edits] == [f"layers.{{0..99}}.{name}" for name in names]
    assert_fits(found, tmp_path)


def assert_fits(found: GraphDiff, folder: Path) -> None:
    found.save_html(folder / "diff.html")
    written = (folder / "diff.html").read_text()
    parsed = assert_inert(written)
    assert len(written.encode()) <= 64 * 1024
    assert len(parsed.pictures) == len(found.edits)
    assert {len(edit.instances) for edit in found.edits} == {100}
    for number in range(100):
        assert re.search(rf"\b{number}\.up  \w*linear", parsed.text)


HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"><svg onload=alert(1)>", "' onmouseover='alert(1)",
    "</pre></details><iframe src=//evil.test>", "javascript:alert(1)", "]]><!--", "&lt;script&gt;alert(1)",
    "<style>@import url(//evil.test)</style>", "\x1b[31mred\x07\x00", "\u202egnp.exe", "{{7*7}}", "`id`", "$(id)",
    "<a href='//evil.test'>x</a>", "<base href=//evil.test>", "<meta http-equiv=refresh content=0;//evil.test>",
    "' style='background:url(//evil.test)", "<math><mtext></mtext></math>", "\u2028</script>",
]  # fmt: skip


def hostile_graph(quantized: bool) -> fx.GraphModule:
    """Ten copies of each hostile text, as names, module paths, stack traces, constants, targets and reasons."""
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    for number, text in enumerate(HOSTILE * 10):
        root.register_buffer(f"c{number}", torch.zeros(1))
        weight = graph.get_attr(f"c{number}")
        node = graph.call_function(torch.ops.aten.mul.Tensor if quantized else torch.ops.aten.add.Tensor, (x, weight))
        node.name = f"{text}{number}"
        node.meta = {
            "stack_trace": f'  File "{text}.py", line {number}, in forward\n    {text}',
            "nn_module_stack": {text: (f"{text}.{number}", text)},
        }
        set_record(node, NodeRecord(text, "float", reason=text, module=text, asked=True))
        if quantized:

            def strange(value: Any) -> Any:
                return value

            strange.__name__ = strange.__qualname__ = text
            node = graph.call_function(strange, (node,))
            node.name = f"{text}{number}'"
        x = node
    graph.output(x)
    gm = fx.GraphModule(root, fx.Graph())
    gm._graph = graph  # no code is generated: fx would put these names into it
    for number, node in enumerate(graph.find_nodes(op="get_attr")):
        node.target = f"{HOSTILE[number % len(HOSTILE)]}{number}".replace(".", "_")
        gm._buffers[node.target] = torch.zeros(1)
    graph_record(gm).stage = "prepared"
    graph_record(gm).notes = list(HOSTILE)
    return gm


@functools.cache
def hostile_page() -> str:
    found = qpass.diff(hostile_graph(False), hostile_graph(True)).with_metric(HOSTILE[0], {})
    report = qpass.report(hostile_graph(True))._repr_mimebundle_()["text/html"]
    return page(HOSTILE[0], found._repr_mimebundle_()["text/html"] + report)


def test_hostile_names_stay_text() -> None:
    parsed = assert_inert(hostile_page())
    assert "<script>alert(1)</script>" in parsed.text
    assert "<img src=x onerror=alert(1)>" in parsed.text
    assert "\x1b" not in hostile_page()
    assert "\u202e" not in hostile_page()
    text = str(qpass.diff(hostile_graph(False), hostile_graph(True)))
    assert text.isascii()
    assert all(c == "\n" or c.isprintable() for c in text)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed here")
def test_hostile_names_stay_text_in_a_browser(tmp_path: Path) -> None:
    """No dialog opens, the page's title stays its own, and the server is asked for nothing but the page."""
    asked = []
    content = hostile_page().encode()

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = f"http://127.0.0.1:{server.server_port}"
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", f"--proxy-server={proxy}",
        "--proxy-bypass-list=<-loopback>", "--disable-background-networking", "--disable-component-update",
        "--no-first-run", "--virtual-time-budget=3000", "--dump-dom",
    ]  # fmt: skip
    assert CHROMIUM is not None
    ran = subprocess.run([CHROMIUM, *options, "http://page.test/"], capture_output=True, text=True, timeout=120)
    server.shutdown()
    dom = ran.stdout
    assert "qpass diff" in dom
    assert {path for path in asked if "page.test" in path or "evil" in path} <= {
        "http://page.test/",
        "http://page.test/favicon.ico",
    }
    assert not [path for path in asked if "evil" in path]
    after = Inert(dom)
    assert [fault for fault in after.faults if fault not in ("style of <html>",)] == []


def test_a_report_in_a_notebook() -> None:
    x = torch.randn(2, 4, 8)
    prepared = qpass.prepare(capture(nn.Sequential(Layer(), Layer()).eval(), (x,)))
    with torch.no_grad():
        prepared(x)
    report = qpass.report(qpass.convert(prepared))
    bundle = report._repr_mimebundle_()
    assert bundle["text/plain"] == str(report)
    parsed = assert_inert(bundle["text/html"])
    for word in ("operations", "constants", "{0,1}.qkv x2", "quantized", "left in float", "[1]"):
        assert word in parsed.text
    assert all(row.reason in parsed.text for row in report.rows if row.outcome == "float" and not row.fused)


@pytest.mark.parametrize("installed", [True, False])
def test_a_picture_shows_every_node_once_above_its_readers(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fast-sugiyama and, where that is not installed, by networkx."""
    if installed:
        pytest.importorskip("fast_sugiyama", reason="fast-sugiyama, of the extra viz, is not installed")
    else:
        import sys

        monkeypatch.setitem(sys.modules, "fast_sugiyama", None)
    from qpass.inspect.render.layout import layered

    edges = [(0, 2), (1, 2), (2, 3), (2, 4), (3, 5), (4, 5), (0, 5)]
    places = layered(7, edges, 10, 20)
    assert len(set(places.values())) == 7
    assert all(places[a][1] < places[b][1] for a, b in edges)
    assert places == layered(7, edges, 10, 20)
    found = qpass.diff(transformer(30, pairs=False), transformer(30, pairs=True))
    svg = assert_inert(found._repr_mimebundle_()["text/html"]).pictures[0]
    assert re.findall(r">([^<]+)</text>", svg) == [
        "layer_norm", "query", "linear", "&#8594;", "layer_norm", "query", "q", "dq", "linear",
    ]  # fmt: skip
