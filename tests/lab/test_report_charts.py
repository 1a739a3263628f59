"""The charts in real headless Chromium: all are drawn, say their values to pointer and keyboard, and fit a phone."""

import json

import pytest
import report_material as material
from report_in_browser import a_table, column, drawn, opened, texts, wait_for_marks

from dual_lora.lab.report.report import report

pytestmark = pytest.mark.slow


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
    cells = column(page, table, at)
    assert cells[0] == "0.100"
    assert cells[-1] == "", "no number: left out, and last whichever way it is sorted"


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


def test_tables_of_values_have_headings(page):
    """What a screen reader says before each cell."""
    page.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.execute_async_script("setTimeout(arguments[0], 300)")
    heads = texts(page, "details.values th")
    assert len(heads) > 20
    assert all(head.strip() for head in heads)


def test_hover_shows_values_and_leaves(page):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    plot = page.find_element(By.CSS_SELECTOR, ".plot[id$=differences-in-choice]")
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
