"""The page in real headless Chromium: loads without errors, sorts, filters, saves, leads to its parts, no harm."""

import pytest
import report_material as material
from report_in_browser import a_table, column, drawn, opened, texts, wait

from dual_lora.lab.report.report import report

pytestmark = pytest.mark.slow


def test_loads_without_a_message_on_the_console(page):
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0


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
    menu = browser.find_element(By.XPATH, "//nav//details[.//a[starts-with(@href, '#verdicts')]]")
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
        drawn(browser)
        names_over_bands = """
            return [...document.querySelectorAll("svg")].flatMap((svg) => {
                const band = svg.querySelector(".mark-rule") && svg.querySelector(".mark-rect path");
                const texts = [...svg.querySelectorAll(".role-axis-label text")];
                const name = texts.find((text) => /[a-z]/i.test(text.textContent));
                return band && name ? [!!(band.compareDocumentPosition(name) & Node.DOCUMENT_POSITION_FOLLOWING)] : [];
            });
        """
        seen = browser.execute_script(names_over_bands)
        assert seen, "there are charts with a band"
        assert all(seen), "names stand in the chart on a narrow page, and a band drawn later would hide them"
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
