"""Pages as people use them: by keyboard and screen reader, in light and dark, on a phone, on paper."""

import re
import shutil

import pytest
from fabricate import AUDIT, make_explanation, make_run

from dermnb.core import write_json
from dermnb.report.pages import build_notebook_page
from dermnb.report.build import build_report

api = pytest.importorskip("playwright.sync_api")
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine")
PHONE, DESK = {"width": 400, "height": 800}, {"width": 1400, "height": 900}
DRAW_ALL = """async () => {
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  for (const box of document.querySelectorAll("[data-figure]")) {
    for (let i = 0; i < 100 && !box.dataset.drawn; i++) {
      box.scrollIntoView();
      await new Promise(requestAnimationFrame);
    }
  }
  scrollTo(0, 0);
}"""


@pytest.fixture(scope="module")
def visit():
    "Open a page with everything unfolded and drawn; whatever it asks of others is a failure."
    asked = []

    def ask(route):
        asked.append(route.request.url)
        route.abort()

    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])

        def open_page(path, size, unfold=True, part=""):
            page = browser.new_page(viewport=size)
            page.route(re.compile(r"^(?!file:|data:)"), ask)
            page.goto(path.as_uri() + part)
            if unfold:
                page.evaluate(DRAW_ALL)
            return page

        yield open_page
        browser.close()
    assert not asked


@pytest.fixture(scope="module")
def pages(visit, tmp_path_factory):
    "The page of a suite and of a run, each opened once."
    folder = tmp_path_factory.mktemp("reports") / "demo"
    common = {"lesions": 300, "resamples": 50}
    names = ("cnn", "xception_focal_image_split")
    for i, name in enumerate(names):
        more = {"stages": ("head", "top"), "notebook": i, "facts": True, "record": {"audit": AUDIT}}
        run = make_run(folder / name, 1 + i, i, **more, **common)
    make_explanation(run)
    states = [{"run": name, "status": "done"} for name in names]
    states.append({"run": "b7", "status": "missing"})
    far = {"classes": 6, "image_size": 224, "images": 35_000, "epochs": 400, "note": "as far as known"}
    claim = {"metric": "accuracy", "value": 0.93, "conditions": far, "source": "README of a system"}
    claims = [claim | {"run": name} for name in (*names, "b7")]
    suite = {"title": "Two networks", "runs": states, "compare": [names[::-1]], "claims": claims}
    write_json(folder / "suite.json", suite)
    index = build_report(folder)
    return {"suite": visit(index, DESK), "run": visit(run / "report.html", DESK), "index": index}


@pytest.fixture
def page(pages, request):
    "One of the pages, in light on a desk."
    page = pages[getattr(request, "param", "suite")]
    page.set_viewport_size(DESK)
    page.emulate_media(color_scheme="light", media="screen")
    return page


both = pytest.mark.parametrize("page", ["suite", "run"], indirect=True)


@both
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page, scheme, size):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.set_viewport_size(size)
    page.emulate_media(color_scheme=scheme)
    assert page.locator("[data-drawn]").count() == page.locator("[data-figure]").count() > 4
    found = axe.run(page).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    assert not serious, [(v["id"], [n["html"][:200] for n in v["nodes"][:3]]) for v in serious]


@both
def test_a_narrow_page_never_scrolls_sideways(page):
    # 400 px is a phone; at 200 % zoom a window of 1,280 px has 640. Charts follow with a delay.
    for width in (640, 400):
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_function(f"document.documentElement.scrollWidth === {width}", timeout=20_000)


# Tables that reach out of a box that scrolls, and words that end on another line than they began.
ILL_SET = r"""() => {
  const said = [], range = document.createRange();
  for (const table of document.querySelectorAll("table")) {
    const box = table.closest(".scroll"), name = table.innerText.slice(0, 60);
    if (!box) { said.push("in no box: " + name); continue; }
    const edge = box.getBoundingClientRect();
    if (edge.left < 0 || edge.right > innerWidth) said.push("wider than the page: " + name);
    if (box.scrollWidth > box.clientWidth && getComputedStyle(box).overflowX !== "auto")
      said.push("cannot be scrolled: " + name);
  }
  const places = "section:not(#notebook) :is(th, td, dt, h2, h3, summary, strong), h1, nav a";
  for (const place of document.querySelectorAll(places)) {
    const texts = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
    for (let text; (text = texts.nextNode()); )
      for (const word of text.data.matchAll(/[^\s\-\/\u2013\u2212]+/g)) {
        range.setStart(text, word.index);
        range.setEnd(text, word.index + word[0].length);
        const lines = new Set([...range.getClientRects()].map(r => Math.round(r.top)));
        if (lines.size > 1) said.push("broken: " + word[0] + " in " + place.outerHTML.slice(0, 60));
      }
  }
  return [...new Set(said)];
}"""


@both
@pytest.mark.parametrize("width", [400, 1400])
def test_tables_scroll_in_their_boxes_and_no_name_is_broken(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.locator("table").count() > 10
    assert page.locator("th", has_text="xception_focal_image_split").count()
    assert page.evaluate(ILL_SET) == []


def test_a_broken_name_would_be_found(page):
    page.set_viewport_size(PHONE)
    page.evaluate("document.querySelectorAll('#leaderboard wbr').forEach(e => e.remove())")
    assert any("xception_focal_image_split" in said for said in page.evaluate(ILL_SET))
    page.reload()
    page.evaluate(DRAW_ALL)


def test_hostile_names_neither_run_nor_widen_the_page(tmp_path, visit):
    names = ["<script>document.title = 1</script>", "x" * 200, "\u202e\u0645\u0631\u0636 .."]
    classes = dict.fromkeys(["</script><b>", "y" * 300, "\u05d0\u05d1\u202e", "../../etc"], "<i>")
    for i, name in enumerate(names):
        run = make_run(
            tmp_path / "s" / name.replace("/", "\N{DIVISION SLASH}"),
            seed=i, classes=classes, lesions=80, resamples=20, notebook=False,
        )  # fmt: skip
    make_explanation(run)
    page = visit(build_report(tmp_path / "s"), PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert page.title() == "s" and page.locator("b, i").count() == 0
    assert page.locator("bdi", has_text="x" * 200).count() > 3
    # In charts too, where plotly would read tags.
    assert page.locator("svg b, svg i, svg script").count() == 0
    assert page.locator("svg text", has_text="</script><b>").count() > 0


def test_a_notebook_by_itself_has_the_width_of_the_page(tmp_path, visit):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    run = make_run(tmp_path / "s" / "a", lesions=80, resamples=20)
    page = visit(build_notebook_page(run / "notebook.ipynb"), DESK)
    assert page.locator("main").bounding_box()["width"] > 1000
    assert page.locator("h1").count() == 1
    assert page.locator("[data-drawn]").count() == page.locator("[data-figure]").count()
    found = axe.run(page).response["violations"]
    assert not [v["id"] for v in found if v["impact"] in ("serious", "critical")]
    page.set_viewport_size(PHONE)
    page.wait_for_function("document.documentElement.scrollWidth === 400", timeout=20_000)


def test_tables_are_sorted_by_keyboard(page):
    table = page.locator("#leaderboard table").first
    head = table.locator("th", has_text="Macro AUC")
    place = table.locator("thead th").all_inner_texts().index(head.inner_text()) + 1

    def column():
        cells = table.locator(f"tbody tr td:nth-child({place})").all_inner_texts()
        return [float(c.split()[0]) for c in cells]

    head.locator("button").focus()
    for order, way in (("descending", True), ("ascending", False)):
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == order
        assert column() == sorted(column(), reverse=way)
    assert table.locator("[aria-sort]").count() == 1
    # Runs without results stay last whichever way.
    assert "missing" in table.locator("tbody tr").last.inner_text()


@both
def test_contents_lead_to_headings(page):
    for link in page.locator("nav.contents a").all():
        target = page.locator(link.get_attribute("href"))
        assert target.locator("h2").inner_text().strip() == link.inner_text()
        # What is folded has its title in the summary, where no other link may stand.
        folded = target.locator("> details.part > summary > h2").count()
        assert target.locator("h2 a.anchor").count() == 1 - folded


def test_contents_open_what_they_lead_to(pages, visit):
    page = visit(pages["index"], DESK, unfold=False)
    folded = page.locator("section:has(> details.part)")
    ids = [s.get_attribute("id") for s in folded.all()]
    assert {"confusion", "calibration", "subgroups", "data", "limits"} <= set(ids)
    assert page.locator("details.part[open]").count() == 0
    assert page.locator("#answer").is_visible() and page.locator("#leaderboard table").first.is_visible()
    for id in ids:
        page.locator(f"nav.contents a[href='#{id}']").press("Enter")
        page.wait_for_function(f"document.querySelector('#{id} > details.part').open")
        box = page.locator(f"#{id} h2").bounding_box()
        assert 0 <= box["y"] < DESK["height"], id
    # Charts are drawn when they can be seen, in the width of the page.
    chart = page.locator("#confusion [data-figure]").first
    chart.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('#confusion .main-svg') !== null")
    assert page.locator("#confusion .main-svg").first.bounding_box()["width"] > 600
    # So does an address that names a section.
    page = visit(pages["index"], DESK, unfold=False, part="#limits")
    page.wait_for_function("document.querySelector('#limits > details.part').open")
    assert page.locator("details.part[open]").count() == 1


COLORED = """color => [...document.querySelectorAll("[data-figure=leaderboard-plot] path.point")]
  .some(e => [getComputedStyle(e).fill, getComputedStyle(e).stroke].includes(color))"""
WIDTHS = "[...document.querySelectorAll('.main-svg')].map(e => e.getBoundingClientRect().width)"


def test_figures_follow_the_scheme_and_paper_is_light(page):
    light, dark = "rgb(0, 90, 143)", "rgb(61, 143, 209)"
    for scheme, media, color, other in (
        ("light", "screen", light, dark),
        ("dark", "screen", dark, light),
        ("dark", "print", light, dark),
        ("dark", "screen", dark, light),
    ):
        page.emulate_media(color_scheme=scheme, media=media)
        page.wait_for_function(COLORED, arg=color, timeout=20_000)
        assert not page.evaluate(COLORED, other)
        if media == "print":
            white = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert white == "rgb(255, 255, 255)"
            assert not page.locator("nav.contents").is_visible()
            page.wait_for_function(f"Math.max(...{WIDTHS}) <= 660", timeout=20_000)


@both
def test_each_figure_says_what_it_shows(page):
    for box in page.locator("section:not(#notebook) [data-figure]").all():
        image = box.locator("svg[role=img]")
        assert image.count() == 1 and len(image.get_attribute("aria-label")) > 30
        # Its numbers are in a table of its own, or in one beside it.
        own = box.locator("xpath=ancestor::figure//table").count()
        assert own == 1 or box.locator("xpath=ancestor::section[1]//table[not(ancestor::figure)]").count()
