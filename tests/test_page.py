"""The page, in a real browser: Chromium without a window."""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from conftest import SOFTMAX, Server, make_bundle, picture
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from mlkit.bundle.manifest import ImageInput
from mlkit.bundle.registry import Registry

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ["--disable-quic", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
DROP = """async ([name, bytes]) => {
  const data = new DataTransfer()
  data.items.add(new File([new Uint8Array(bytes)], name))
  for (const kind of ["dragover", "drop"])
    document.getElementById("drop").dispatchEvent(
      new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true}))
}"""
COPY = """async bytes => {
  const picture = new Blob([new Uint8Array(bytes)], {type: "image/png"})
  await navigator.clipboard.write([new ClipboardItem({"image/png": picture})])
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    if not program:
        pytest.skip("no Chromium here, and `make test` may not install one: the page is not tested")
    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield one
        one.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    "Open the page of a server; nothing may be asked of anybody else, and nothing may go wrong unseen."
    opened = []

    def open_it(server: Server, **options) -> Page:
        context = browser.new_context(**options)
        page = context.new_page()
        page.set_default_timeout(20_000)
        elsewhere, wrong = [], []
        opened.append((context, elsewhere, wrong))
        here = (server.url, "blob:", "data:")
        page.on("request", lambda r: r.url.startswith(here) or elsewhere.append(r.url))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: "Policy" in m.text and wrong.append(m.text))
        page.goto(server.url)
        return page

    yield open_it
    for context, elsewhere, wrong in opened:
        context.close()
        assert elsewhere == [] and wrong == []


def png(path: Path, color: str = "red", size: tuple[int, int] = (60, 40)) -> Path:
    Image.new("RGB", size, color).save(path, "PNG")
    return path


def drop(page: Page, path: Path, name: str = "") -> None:
    page.evaluate(DROP, [name or path.name, list(path.read_bytes())])


def bars(page: Page) -> list[float]:
    "How long the bars are, percent."
    of = "li => 100 * parseFloat(getComputedStyle(li, '::after').width) / li.clientWidth"
    found = page.locator("article").first.locator("li").all()
    return [round(row.evaluate(of), 1) for row in found]


def test_a_dropped_picture_is_answered(server: Server, open_page: Callable, tmp_path: Path) -> None:
    page = open_page(server)
    expect(page.locator("#about")).to_contain_text("version 1 · mean · 3 labels · accuracy 1")
    drop(page, png(tmp_path / "a.png", "blue"), name='it\'s "blue" <b>.png')
    card = page.locator("article")
    expect(card.locator("h2")).to_contain_text("blue, 57.6 %")
    assert [row.split()[0] for row in card.locator("li").all_inner_texts()] == [
        "blue",
        "red",
        "green",
    ]
    expect(card.locator(".ask")).to_contain_text('it\'s "blue" <b>.png, answered by color@1')
    assert bars(page) == pytest.approx([57.6, 21.2, 21.2], abs=0.2)
    said = shlex.split(card.locator("code").inner_text())
    url = f"{server.url}/v1/models/color/predict"
    assert said == ["curl", "-F", r'file=@"it' + r"'s \"blue\" <b>.png" + '"', url]


def test_a_pasted_picture_is_answered(server: Server, open_page: Callable, tmp_path: Path) -> None:
    page = open_page(server, permissions=["clipboard-read", "clipboard-write"])
    page.evaluate(COPY, list(png(tmp_path / "a.png", "lime").read_bytes()))
    page.keyboard.press("Control+V")
    expect(page.locator("article h2")).to_contain_text("green, 57.6 %")


def test_a_chosen_picture_by_keyboard_alone(
    server: Server, open_page: Callable, tmp_path: Path
) -> None:
    page = open_page(server)
    expect(
        page.locator("#drop")
    ).to_be_visible()  # until the models are known there is nothing to choose for
    for _ in range(9):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "files":
            break
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files([png(tmp_path / "a.png"), png(tmp_path / "b.png", "blue")])
    expect(page.locator("article h2")).to_have_text(["blue, 57.6 %", "red, 57.6 %"])


def test_what_is_refused_says_why(server: Server, open_page: Callable, tmp_path: Path) -> None:
    page = open_page(server)
    wrong = tmp_path / "wrong.pdf"
    wrong.write_bytes(b"%PDF-1.7 <script>alert(1)</script>")
    drop(page, wrong, name="<img src=x onerror=alert(1)>.pdf")
    told = page.get_by_role("alert").filter(has_text="Unsupported Media Type")
    expect(told).to_contain_text("JPEG, PNG")
    expect(told).to_contain_text("request ")
    drop(page, png(tmp_path / "a.png"))
    expect(page.locator("article h2").first).to_have_text("red, 57.6 %")


def test_a_drop_may_come_before_the_models(
    server: Server, open_page: Callable, tmp_path: Path
) -> None:
    page = open_page(server)
    asked: list[Route] = []

    def hold(route: Route) -> None:
        asked.append(route)
        if len(asked) > 1:
            for one in asked:
                one.continue_()

    page.route("**/v1/models", hold)
    page.reload()
    drop(page, png(tmp_path / "a.png"))
    expect(page.locator("article h2")).to_have_text("red, 57.6 %")


def test_what_mattered_is_where_it_is(server: Server, open_page: Callable, tmp_path: Path) -> None:
    picture = Image.new("RGB", (140, 140))
    picture.paste("blue", (90, 90, 130, 130))
    picture.save(tmp_path / "corner.png")
    page = open_page(server)
    drop(page, tmp_path / "corner.png")
    page.get_by_role("button", name="What mattered?").click()
    expect(page.locator("article .ask")).to_contain_text("Red: covering it costs blue up to")
    pixel = "(c, [x, y]) => [...c.getContext('2d').getImageData(x, y, 1, 1).data]"
    canvas = page.locator("canvas")
    assert canvas.evaluate(pixel, [110, 110])[0] > 100
    assert canvas.evaluate(pixel, [25, 25])[:3] == [0, 0, 0]


# what `ImageOps.exif_transpose` undoes
STORED = [None, None, *(Image.Transpose[name] for name in (
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"
))]  # fmt: skip
QUARTERS = """c => [[0, 0], [1, 0], [0, 1], [1, 1]].map(([x, y]) => {
  const d = c.getContext("2d").getImageData((c.width - 1) * (0.1 + 0.8 * x), (c.height - 1) * (0.1 + 0.8 * y), 1, 1).data
  return `${[...d.slice(0, 3)].map(v => v > 128 ? 1 : 0).join("")}`
})"""


def quarters(image: Image.Image) -> list[str]:
    at = [
        (int(x * (image.width - 1)), int(y * (image.height - 1)))
        for y in (0.1, 0.9)
        for x in (0.1, 0.9)
    ]
    return ["".join(str(int(v > 128)) for v in image.getpixel(xy)) for xy in at]


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_the_picture_is_drawn_as_the_model_saw_it(
    exif: str, start: Callable, open_page: Callable, tmp_path: Path
) -> None:
    spec = ImageInput(size=(8, 8), resize="squish", exif=exif)
    registry = Registry(tmp_path / "models")
    registry.promote(registry.add(make_bundle(tmp_path / "one", input=spec), name="color").ref)
    image = Image.new("RGB", (600, 400), "red")
    for box, color in (((300, 0), "lime"), ((0, 200), "blue"), ((300, 200), "yellow")):
        image.paste(color, (*box, box[0] + 300, box[1] + 200))
    formats = {"JPEG": {}, "PNG": {}, "WEBP": {"lossless": True}, "AVIF": {}, "late": {}}
    with start(root=registry.root) as server:
        page = open_page(server)
        expect(page.locator("#about")).to_contain_text("version 1")
        count = 0
        for format, save in formats.items():
            for tag in range(1, 9):
                tags, path, count = Image.Exif(), tmp_path / f"{tag}.{format}", count + 1
                tags[274] = tag
                stored = image if tag == 1 else image.transpose(STORED[tag])
                stored.save(path, "PNG" if format == "late" else format, exif=tags, **save)
                if format == "late":  # a chunk that comes after the pixels
                    data = path.read_bytes()
                    at = data.index(b"eXIf") - 4
                    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
                    path.write_bytes(data[:at] + data[end:-12] + data[at:end] + data[-12:])
                drop(page, path)
                card = page.locator("article").first
                expect(page.locator("article .ask:not([hidden])")).to_have_count(count)
                seen = image if exif == "apply" else stored
                where = format, tag
                assert card.locator("canvas").evaluate(QUARTERS) == quarters(seen), where
                size = card.locator("canvas").evaluate("c => [c.width, c.height]")
                assert (size[0] > size[1]) == (seen.width > seen.height), where
                said = card.locator(".tag")
                if tag == 1:
                    assert said.is_hidden()
                else:
                    expect(said).to_contain_text(f"EXIF orientation {tag}")
                    expect(said).to_contain_text("turned" if exif == "apply" else "ignored")


def test_a_swap_of_version_is_seen(
    start: Callable, open_page: Callable, model_of: Callable, tmp_path: Path
) -> None:
    registry = model_of(SOFTMAX)
    upside_down = (
        "p_ = Softmax<axis = 1>(mean)  one = Constant<value_float = 1.0>()  p = Sub(one, p_)"
    )
    second = registry.add(make_bundle(tmp_path / "two", upside_down), name="color")
    with start("api.watch_seconds=0.2", root=registry.root) as server:
        page = open_page(server)
        expect(page.locator("#about")).to_contain_text("version 1")
        registry.promote(second.ref)
        expect(page.locator("#about")).to_contain_text("version 2", timeout=30_000)
        drop(page, png(tmp_path / "a.png"))
        expect(page.locator("article .ask")).to_contain_text("answered by color@2")


def test_a_key_is_asked_for(start: Callable, open_page: Callable, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a-key-of-this-test\n")
    with start(f"api.keys_file={tmp_path / 'keys'}") as server:
        page = open_page(server)
        expect(page.locator("#trouble")).to_contain_text("a key is needed")
        page.get_by_label("Key").fill("a-key-of-this-test")
        page.keyboard.press("Tab")
        expect(page.locator("#about")).to_contain_text("version 1")
        drop(page, png(tmp_path / "a.png"))
        expect(page.locator("article h2")).to_have_text("red, 57.6 %")
        assert "a-key-of-this-test" not in page.locator("code").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_light_and_dark(
    scheme: str, server: Server, open_page: Callable, tmp_path: Path
) -> None:
    page = open_page(server, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    drop(page, png(tmp_path / "a.png", size=(900, 400)), name="x" * 200 + ".png")
    expect(page.locator("article h2")).to_have_text("red, 57.6 %")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


# ---------------------------------------------------------------- other inputs, other answers


@pytest.fixture
def page_of(all_kinds: Server, open_page: Callable) -> Callable[[str], Page]:
    "`page_of('table-label')`: the page with that model chosen."

    def open_it(name: str, **options) -> Page:
        page = open_page(all_kinds, **options)
        page.get_by_label("Model").select_option(name)
        return page

    return open_it


def test_a_row_is_a_form_filled_with_an_example(page_of: Callable, all_kinds: Server) -> None:
    page = page_of("table-label")
    assert page.locator("#drop").is_hidden()
    fields = [page.get_by_label(name, exact=True) for name in ("carat", "cut", "round")]
    assert [one.input_value() for one in fields] == ["0.5", "Ideal", "true"]
    assert fields[1].locator("option").all_inner_texts() == ["", "Fair", "Ideal"]
    fields[0].fill("1.25")
    fields[0].press("Enter")
    card = page.locator("article")
    expect(card.locator("h2")).to_have_text("bright, 98.9 %")  # of 2 + 2 × 1.25 against 0
    expect(card.locator(".ask")).to_contain_text("carat 1.25, cut Ideal, round true, answered by")
    said = shlex.split(card.locator("code").inner_text())
    sent = {"instances": [{"carat": 1.25, "cut": "Ideal", "round": True}]}
    assert json.loads(said[said.index("-d") + 1]) == sent
    asked = httpx.post(said[-1], json=sent).json()["predictions"][0]
    assert round(100 * asked["confidence"], 1) == 98.9
    assert card.get_by_role("button", name="What mattered?").is_hidden()


def test_what_is_left_empty_is_left_out_and_what_is_no_number_is_not_sent(
    page_of: Callable,
) -> None:
    page = page_of("table-numbers")
    page.get_by_label("carat").fill("")
    page.get_by_label("cut").select_option("")
    page.get_by_role("button", name="Ask").click()
    card = page.locator("article")
    expect(card.locator("h2")).to_have_text("price 45 USD, mass 0.25")  # 0 + 20 + 25
    assert json.loads(shlex.split(card.locator("code").inner_text())[4]) == {
        "instances": [{"round": True}]
    }
    assert card.get_by_role("list", name="numbers").locator("li").all_inner_texts()
    page.get_by_label("carat").press_sequentially("1e")
    page.get_by_role("button", name="Ask").click()
    assert page.locator("article").count() == 1


def test_a_row_that_is_refused_says_why(page_of: Callable) -> None:
    page = page_of("table-numbers")
    page.get_by_label("carat").fill("1e300")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert").filter(has_text="carat")).to_contain_text("request ")


def test_a_form_stays_as_it_was_filled(page_of: Callable) -> None:
    page = page_of("table-label")
    page.get_by_label("carat").fill("7")
    page.evaluate("look()")
    page.wait_for_timeout(300)
    assert page.get_by_label("carat").input_value() == "7"
    page.get_by_label("Model").select_option("image-label")
    assert page.locator("#form").is_hidden() and page.locator("#drop").is_visible()


def test_labels_over_their_thresholds_are_marked(page_of: Callable, tmp_path: Path) -> None:
    page = page_of("image-labels")
    drop(page, png(tmp_path / "a.png", "red"))
    card = page.locator("article")
    expect(card.locator("h2")).to_have_text("red, green")
    rows = {row.split("\n")[0]: row for row in card.locator("li").all_inner_texts()}
    assert "73.1 %, given from 70.0 %" in rows["red"]
    assert card.locator("li.over span:first-child").all_inner_texts() == ["red", "green"]
    mark = "e => getComputedStyle(e, '::before').content"
    assert [page.locator("li span:first-child").nth(i).evaluate(mark) for i in (0, 2)] == [
        '"✓ "',
        "none",
    ]


def test_a_mask_covers_the_picture(page_of: Callable, tmp_path: Path) -> None:
    both = Image.new("RGB", (400, 200), "red")
    both.paste("blue", (0, 0, 100, 200))
    both.save(tmp_path / "both.png")
    page = page_of("image-mask")
    expect(page.locator("#about")).to_contain_text("3 classes")
    drop(page, tmp_path / "both.png")
    card = page.locator("article")
    expect(card.locator("h2")).to_have_text("red 75.0 %, blue 25.0 %")
    legend = card.get_by_role("list", name="share of each class").locator("li")
    assert [row.split("\n") for row in legend.all_inner_texts()] == [
        ["red", "75.0 %"],
        ["blue", "25.0 %"],
        ["green", "0.0 %"],
    ]
    color = "e => getComputedStyle(e, '::before').backgroundColor"
    assert legend.locator("span:first-child").first.evaluate(color) == "rgb(255, 255, 0)"
    pixel = "(c, [x, y]) => [...c.getContext('2d').getImageData(x, y, 1, 1).data]"
    canvas = card.locator("canvas")
    page.wait_for_function(
        "c => c.getContext('2d').getImageData(300, 50, 1, 1).data[1] > 0",
        arg=canvas.element_handle(),
    )
    assert canvas.evaluate(pixel, [300, 50])[:3] == pytest.approx([255, 127, 0], abs=2)
    assert canvas.evaluate(pixel, [50, 50])[:3] == pytest.approx([127, 127, 255], abs=2)
    assert bars(page) == pytest.approx([75, 25, 0.3], abs=0.2)  # a pixel at least
    assert "75.0 %" in canvas.get_attribute("aria-label")
    assert card.get_by_role("button", name="What mattered?").is_hidden()


def test_a_text_is_typed(page_of: Callable, tmp_path: Path) -> None:
    page = page_of("text-label")
    field = page.get_by_role("textbox", name="Text")
    page.get_by_role("button", name="Ask").click()  # nothing was typed: the browser says so
    assert page.locator("article").count() == 0
    field.fill("good <b>good</b>\nit's 🎉")
    field.press("Tab")
    page.keyboard.press("Enter")
    card = page.locator("article")
    expect(card.locator("h2")).to_have_text("good, 88.1 %")
    assert bars(page) == pytest.approx([88.1, 11.9], abs=0.2)
    expect(card.locator(".ask")).to_contain_text("good <b>good</b>")
    said = shlex.split(card.locator("code").inner_text())
    assert json.loads(said[4])["instances"] == [{"text": "good <b>good</b>\nit's 🎉"}]
    expect(card.locator(".cut")).to_be_visible()  # more than six tokens
    field.fill("bad")
    page.get_by_role("button", name="Ask").click()
    expect(card.first.locator("h2")).to_have_text("bad, 73.1 %")
    expect(card.first.locator(".cut")).to_be_hidden()
    field.fill("   ")
    page.get_by_role("button", name="Ask").click()
    expect(page.get_by_role("alert").filter(has_text="empty")).to_be_visible()


def test_what_the_model_does_not_take_is_not_sent(page_of: Callable, tmp_path: Path) -> None:
    page = page_of("text-label")
    page.evaluate(DROP.replace('"drop")', '"answers")'), ["a.png", list(picture())])
    expect(page.locator("article .wrong")).to_have_text("text-label takes no picture")
