"""The report in real headless Chromium: what its tests share. The fixtures are known through conftest.py."""

import shutil

import pytest
import report_material as material

from dual_lora.lab.report.report import report

BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason="selenium is not installed (pip install selenium)")
    if not (BROWSER and DRIVER):
        pytest.skip("needs chromium and chromedriver on the PATH")
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


def wait_for_marks(page):
    wait(page, lambda page: texts(page, ".plot .spot_marks > *"))
