"""The page in real headless Chromium: loads without errors, sorts, shows values on hover, tables are saved, no harm."""

import json
import shutil

import pytest
import report_material as material

from dual_lora.lab.report.report import report

selenium = pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")
BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver on the PATH"),
]

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = material.write(tmp_path_factory.mktemp("report") / "work", material.HOSTILE)
    out = folder.parent / "report.html"
    report([folder], out)
    return out


def opened(browser, file):
    """The browser with the page, when its charts can be drawn; those in view are."""
    browser.get(file if isinstance(file, str) else file.as_uri())
    ready = "return document.documentElement.dataset.ready === 'yes'"
    wait(browser, lambda browser: browser.execute_script(ready))
    return browser


def wait(browser, until):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20).until(until)


def drawn(browser, *, unfold=True):
    """All charts, as for printing."""
    if unfold:
        browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    return browser


@pytest.fixture
def page(browser, page_file):
    browser.get(page_file.as_uri())
    browser.execute_script("sessionStorage.clear()")  # a page remembers how its tables were sorted
    browser.get_log("browser")  # what an earlier test may have left
    return opened(browser, page_file)


def texts(page, selector):
    return page.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)


def column(page, table, index):
    rows = (
        "return [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].map(r => r.cells[arguments[1]].textContent)"
    )
    return page.execute_script(rows, table, index)


def a_table(page, ending):
    ids = page.execute_script("return [...document.querySelectorAll('table[id]')].map(t => t.id)")
    return next(name for name in ids if name.endswith(ending))


def test_loads_without_a_message_on_the_console(page):
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_what_is_no_number_is_not_drawn_as_zero(page, tmp_path):
    study = material.study()
    study["methods"][2]["score"] = float("nan")
    study["methods"][1]["seeds"][0]["score"] = float("nan")
    study["methods"][3]["cost"]["merge_seconds"] = float("inf")
    study["comparisons"][0] |= dict.fromkeys(("difference", "low", "high"))
    (tmp_path / "results.json").write_text(json.dumps(study))
    report([tmp_path / "results.json"], tmp_path / "r.html")
    drawn(opened(page, tmp_path / "r.html"))
    assert page.get_log("browser") == []
    script = """
        const figures = [...document.querySelectorAll('figure')];
        const figure = figures.find((f) => f.querySelector('h3').textContent === arguments[0]);
        return [[...figure.querySelectorAll('.role-axis-label text')].map((t) => t.textContent),
                figure.querySelectorAll('svg .mark-symbol path[fill=transparent]').length];
    """
    names, dots = page.execute_script(script, "Scores")
    assert {"dual_lora", "lora", "lora|x"} <= set(names)
    assert "dora" not in names
    assert dots == 8, "three methods with three seeds, one of which has no score"
    names, _ = page.execute_script(script, "Differences in choice")
    assert sum(name.startswith("dual_lora") for name in names) == 1
    bad = "[...document.querySelectorAll('svg *')].filter(e => [...e.attributes].some(a => a.value.includes('NaN')))"
    assert page.execute_script(f"return {bad}.length") == 0
    table = a_table(page, "-cost")
    heads = texts(page, f"#{table} thead th")
    at = next(i for i, head in enumerate(heads) if "merge" in head)
    page.execute_script(f"document.querySelectorAll('#{table} thead button')[{at}].click()")
    assert column(page, table, at)[0] == "∞", "sorted as the largest"


def test_every_chart_is_drawn(page):
    marks = (
        "return [...document.querySelectorAll('.plot')].map(p => [p.id, p.querySelectorAll('.spot_marks > *').length])"
    )
    counts = drawn(page).execute_script(marks)
    assert len(counts) >= 9
    assert all(count for _, count in counts), counts


def test_no_value_is_drawn_as_nan(page):
    markup = drawn(page).execute_script(
        "return [...document.querySelectorAll('.plot svg')].map(s => s.outerHTML).join()"
    )
    assert "NaN" not in markup
    assert "Infinity" not in markup
    assert "undefined" not in markup


def test_hostile_names_are_text(page):
    assert page.execute_script("return window.pwned") is None
    assert page.execute_script("return document.querySelectorAll('img').length") == 0
    assert any(material.HOSTILE in text for text in texts(page, "td"))
    assert any(material.HOSTILE in text for text in texts(page, "h2"))


def test_injected_script_would_not_run(page):
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.pwned=3'; document.body.append(s)"
    )
    assert page.execute_script("return window.pwned") is None
    assert "Content Security Policy" in page.get_log("browser")[0]["message"]


def test_parts_of_a_kind_unfold_in_the_bar(tmp_path, browser):
    """Two studies: one answer each at the top, and a menu that a choice closes."""
    from selenium.webdriver.common.by import By

    for name in ("one", "two"):
        material.write(tmp_path / name, name)
    report([tmp_path / "one", tmp_path / "two"], tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    assert texts(browser, "h2")[0] == "Questions and answers"
    assert [text.partition(": ")[2] for text in texts(browser, ".answers .about")] == [
        "against lora, 3 seeds; not complete"
    ] * 2
    menu = browser.find_element(By.CSS_SELECTOR, "nav details")
    menu.find_element(By.TAG_NAME, "summary").click()
    choice = menu.find_elements(By.TAG_NAME, "a")[1]
    assert choice.is_displayed()
    choice.click()
    assert not choice.is_displayed()
    assert browser.execute_script("return location.hash").startswith("#verdicts")
    figures = menu.find_elements(By.XPATH, "//nav//a[starts-with(@href, '#figures')]")[1]
    fold = browser.find_elements(By.CSS_SELECTOR, "details.fold")[1]
    assert fold.get_attribute("open") is None, "with several studies the details are folded"
    browser.execute_script("arguments[0].click()", figures)
    paths = "return arguments[0].querySelectorAll('.plot svg path').length"
    wait(browser, lambda browser: browser.execute_script(paths, fold) > 4)
    assert fold.get_attribute("open") is not None, "a link into them unfolds them, and they are drawn"
    top = "return arguments[0].getBoundingClientRect().top"
    wait(
        browser, lambda browser: 0 < browser.execute_script(top, fold) < 100
    )  # though charts above were drawn meanwhile


def test_sorting_by_mouse_and_by_keyboard(page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    table = a_table(page, "-verdicts")
    head = page.find_element(By.CSS_SELECTOR, f"#{table} th:nth-child(6)")

    def figures():
        return [float(t.replace("−", "-")) for t in column(page, table, 5)]

    before = figures()
    button = head.find_element(By.TAG_NAME, "button")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    button.click()
    assert figures() == sorted(before, reverse=True) != before
    assert head.get_attribute("aria-sort") == "descending"
    button.send_keys(Keys.ENTER)
    assert figures() == sorted(before)
    assert head.get_attribute("aria-sort") == "ascending"
    first = page.find_element(By.CSS_SELECTOR, f"#{table} th:first-child button")
    first.send_keys(Keys.SPACE)
    names = column(page, table, 0)
    assert names[0] == names[1]  # each method twice, side by side
    assert head.get_attribute("aria-sort") is None


def test_tables_of_values_have_headings(page):
    """What a screen reader says before each cell."""
    page.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.execute_async_script("setTimeout(arguments[0], 300)")
    heads = texts(page, "details.values th")
    assert len(heads) > 20
    assert all(head.strip() for head in heads)


def test_missing_values_sort_last(page):
    table = a_table(page, "-at-a-glance")
    heads = texts(page, f"#{table} th")
    index = heads.index("Sign flipped")
    for _ in range(2):
        page.execute_script(f"document.querySelector('#{table} th:nth-child({index + 1}) button').click()")
        assert column(page, table, index)[-1] == ""


def test_filter(page):
    table = a_table(page, "-scores-table")
    page.execute_script(
        f"const i = document.getElementById('{table}').closest('.card').querySelector('input');"
        "i.value = 'dora'; i.dispatchEvent(new Event('input'))"
    )
    hidden = page.execute_script(f"return [...document.querySelectorAll('#{table} tbody tr')].map(r => r.hidden)")
    assert hidden.count(False) == 2


def wait_for_marks(page):
    wait(page, lambda page: texts(page, ".plot .spot_marks > *"))


def test_hover_shows_values_and_leaves(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    plot = page.find_element(By.CSS_SELECTOR, ".plot")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    wait_for_marks(page)
    mark = plot.find_element(By.CSS_SELECTOR, ".spot_marks path")
    ActionChains(page).move_to_element(mark).perform()
    tip = plot.find_element(By.CSS_SELECTOR, ".tip")
    assert tip.is_displayed()
    assert "difference in choice" in tip.text
    assert "from: " in tip.text, "the interval"
    ActionChains(page).move_to_element(page.find_element(By.TAG_NAME, "h1")).perform()
    assert not tip.is_displayed()


def test_keyboard_goes_from_point_to_point_and_says_them(page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    plot = page.find_element(By.CSS_SELECTOR, ".plot")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    wait_for_marks(page)
    said = []
    for _ in range(2):
        plot.send_keys(Keys.ARROW_RIGHT)
        said.append(page.execute_script("return document.querySelector('.plot [aria-live]').textContent"))
    assert said[0] != said[1]
    plot.send_keys(Keys.ESCAPE)
    assert not plot.find_element(By.CSS_SELECTOR, ".tip").is_displayed()


def test_choice_of_measure_and_values_as_a_table(page):
    script = """
        const named = (f) => f.querySelector('h3').textContent === 'Over training';
        const figure = [...document.querySelectorAll('figure')].find(named);
        const values = figure.querySelector('details.values');
        values.open = true;
        const select = figure.querySelector('select');
        const done = arguments[0];
        setTimeout(() => {
            const before = figure.querySelector('.scroll').textContent;
            select.value = [...select.options].find(o => o.textContent === '‖ΔW‖ / ‖W₀‖').value;
            select.dispatchEvent(new Event('change'));
            setTimeout(() => done([before, figure.querySelector('.scroll').textContent]), 50);
        }, 100);
    """
    before, after = page.execute_async_script(script)
    assert "51.33 %" in before
    assert "20.00 %" in after
    assert "51.33 %" not in after


def test_a_series_can_be_switched_off(page):
    script = """
        const named = (f) => f.querySelector('h3').textContent === 'Over training';
        const figure = [...document.querySelectorAll('figure')].find(named), done = arguments[0];
        const count = () => figure.querySelectorAll('.plot .mark-line path').length, before = count();
        figure.querySelector('.legend button').click();
        setTimeout(() => done([before, count(), figure.querySelector('.legend button').ariaPressed]), 300);
    """
    assert drawn(page).execute_async_script(script) == [2, 1, "false"]


def test_saved_tables_are_what_the_command_exports(page):
    table = a_table(page, "-verdicts")

    def saved(kind):
        script = f"document.getElementById('{table}').closest('.card').querySelector('[data-export={kind}]').click();"
        return page.execute_script(script + "return window.lastExport")

    rows = saved("csv").splitlines()
    assert rows[0].startswith('"method","against","task","metric","verdict","difference"')
    assert len(rows) == 7
    exact = material.study(material.HOSTILE)["comparisons"][0]["difference"]
    assert any(str(exact) in row for row in rows)
    assert saved("md").splitlines()[1].startswith("|---|---|---|---|---|---:|")
    assert "\\textbackslash{}\\$" in saved("tex")


def test_dark_mode_by_system_and_by_button(page):
    from selenium.webdriver.common.by import By

    def colours():
        paper = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        return [int(n) for n in paper[4:-1].split(",")]

    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    assert max(colours()) < 60
    button = page.find_element(By.ID, "theme")
    button.click()
    assert "light" in button.text
    assert min(colours()) > 200
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    button.click()
    assert max(colours()) < 60
    button.click()


def test_contrast_is_enough_in_both_themes(page):
    """WCAG AA for text: 4.5 to 1."""
    script = """
        const light = (name) => {
            document.body.style.color = `var(${name})`;
            const [r, g, b] = getComputedStyle(document.body).color.match(/[0-9]+/g).slice(0, 3).map(n => n / 255)
                .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        return arguments[0].map(([a, b]) => {
            const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
            return [a, b, (x + 0.05) / (y + 0.05)];
        });
    """
    text = [[ink, paper] for ink in ("--ink", "--soft", "--accent") for paper in ("--paper", "--card")]
    text += [[f"--{mood}", f"--{mood}-soft"] for mood in ("good", "bad", "same", "open")]
    marks = [[f"--s{i}", "--card"] for i in range(8)]
    for theme in ("light", "dark"):
        page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        for pairs, least in ((text, 4.5), (marks, 3.0)):
            for a, b, ratio in page.execute_script(script, pairs):
                assert ratio >= least, (theme, a, b, ratio)
    page.execute_script("document.documentElement.dataset.theme = 'auto'; document.body.style.color = ''")


def test_everything_that_can_be_used_has_a_name(page):
    nameless = page.execute_script(
        """return [...document.querySelectorAll('button, select, input, [role=group], [role=region]')]
            .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    assert page.execute_script("return document.documentElement.lang") == "en"


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_a_phone(page, width):
    phone = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        drawn(opened(page, page.current_url))
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert page.execute_script("return [...document.querySelectorAll('.plot svg')].every(s => s.clientWidth > 200)")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_bar_is_one_line_on_a_phone_and_its_menus_open_over_the_page(browser, tmp_path):
    for name in ("one", "two"):
        material.write(tmp_path / name, name)
    report([tmp_path / "one", tmp_path / "two"], tmp_path / "r.html")
    phone = {"width": 360, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        opened(browser, tmp_path / "r.html")
        assert browser.execute_script("return document.querySelector('nav.bar').offsetHeight") < 64
        script = """
            document.querySelector('nav details').open = true;
            const link = document.querySelectorAll('nav details a')[1], box = link.getBoundingClientRect();
            return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) === link;
        """
        assert browser.execute_script(script)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_live_page_keeps_its_place(browser, page_file):
    import time

    from dual_lora.lab.report import report as module

    out = page_file.parent / "live.html"
    module.report([page_file.parent / "work"], out, live=1)
    opened(browser, out)
    table = a_table(browser, "-verdicts")
    click = f"document.querySelector('#{table} th:nth-child(6) button').click();"
    browser.execute_script(click + "scrollTo({top: 700, behavior: 'instant'})")
    browser.execute_script("window.old = true")
    for _ in range(50):
        time.sleep(0.1)
        if not browser.execute_script("return window.old") and browser.execute_script("return scrollY") > 0:
            break
    assert browser.execute_script("return window.old") is None
    assert browser.execute_script("return scrollY") == pytest.approx(700, abs=3)
    head = f"return document.querySelector('#{table} th:nth-child(6)').getAttribute('aria-sort')"
    assert browser.execute_script(head) == "descending"
    browser.get("about:blank")
