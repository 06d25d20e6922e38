"""The page's HTML, CSS and JavaScript: each is parsed strictly, and each check is seen to fail."""

import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import html5lib
import pytest
import quickjs
import tinycss2
from conftest import ROOT

from mlkit.api.page import page
from mlkit.kaggle.wheels import build_wheel

STYLE, SCRIPT = ((ROOT / f"mlkit/api/page.{kind}").read_text("utf-8") for kind in ("css", "js"))


def html_errors(text: str) -> list[str]:
    parser = html5lib.HTMLParser()
    parser.parse(text)
    return [f"line {place[0]}: {name} {data}" for place, name, data in parser.errors]


def css_errors(text: str) -> list[str]:
    def walk(nodes: Iterable[Any]) -> Iterator[str]:
        for node in nodes:
            if node.type == "error":
                yield f"line {node.source_line}: {node.message}"
            for name in ("prelude", "content", "value", "arguments"):
                inside = getattr(node, name, None)
                if node.type == "qualified-rule" and name == "content":
                    inside = tinycss2.parse_declaration_list(inside, True, True)
                yield from walk(inside if isinstance(inside, list) else ())

    return list(walk(tinycss2.parse_stylesheet(text, True, True)))


def js_errors(text: str) -> list[str]:
    context = quickjs.Context()
    context.set("source", text)
    try:
        context.eval("void new Function(source)")  # compiled, not run
    except quickjs.JSException as e:
        return [str(e)]
    return []


BROKEN = {
    "an element that is not closed": (html_errors, page(32), "</form>", ""),
    "another one closed": (html_errors, page(32), "</h1>", "</h2>"),
    "an attribute twice": (html_errors, page(32), 'id="key"', 'id="key" id="name"'),
    "a template that is not closed": (html_errors, page(32), "</article>", ""),
    "no colon": (css_errors, STYLE, "margin: 0 auto;", "margin 0 auto;"),
    "a parenthesis too many": (css_errors, STYLE, "#fff", "#fff)"),
    "a rule that is not closed": (css_errors, STYLE, "cursor: pointer }", "cursor: pointer"),
    "await where nothing waits": (js_errors, SCRIPT, "async function ask", "function ask"),
    "a name twice": (js_errors, SCRIPT, "const current", "const limit"),
    "half an operator": (js_errors, SCRIPT, "?.input.kind ??", "?.input.kind ?"),
    "a brace too few": (js_errors, SCRIPT, "\n}\n", "\n"),
    "what strict mode forbids": (js_errors, SCRIPT, "let models", "with (document) {} let models"),
}


def test_the_page_is_without_errors() -> None:
    assert html_errors(page(32)) == css_errors(STYLE) == js_errors(SCRIPT) == []


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_copy_is_found(what: str) -> None:
    errors, text, good, bad = BROKEN[what]
    assert good in text
    assert errors(text.replace(good, bad, 1))


def test_the_document_holds_the_files() -> None:
    document = page(7)
    assert f"<style>{STYLE}</style>" in document and f"<script>{SCRIPT}</script>" in document
    assert '<body data-limit="7">' in document
    assert not re.search("</style|</script|<!--", STYLE + SCRIPT)


@pytest.mark.parametrize("kind", ["html", "css", "js"])
def test_the_files_travel_with_the_wheel(kind: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        name = f"mlkit/api/page.{kind}"
        assert wheel.read(name) == (ROOT / name).read_bytes()
