"""The viewer in a real headless browser: search, sort, pick, orbit, mix, and not one request that leaves the machine.

It needs Debian's packages chromium and chromium-driver (or others of those names on the PATH).
"""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium: apt-get install chromium-driver"),
]


@pytest.fixture(scope="module")
def address(server) -> str:
    return server[0]


class Page:
    """The page as a user has it: what is looked for is waited for."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements("css selector", css)

    def texts(self, css: str) -> list[str]:
        """What is read at one moment: a list that changes meanwhile would lose its elements."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", css
        )

    def sources(self, css: str) -> list[str]:
        """Of those images that have one."""
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.getAttribute('src')).filter(s => s)"
        return self.driver.execute_script(script, css)

    def wait(self, what: Callable[[], Any]) -> Any:
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, 60, poll_frequency=0.05).until(lambda _: what())

    def picture(self, name: str) -> str:
        return self.wait(lambda: self.sources(f".{name} img"))[0]

    def changed(self, name: str, before: str) -> str:
        """The picture's address once it is another one."""
        self.wait(lambda: self.picture(name) != before)
        return self.picture(name)

    def settled(self) -> str:
        """The full picture, which follows the drafts."""
        self.wait(lambda: not any("draft" in text for text in self.texts(".caption")))
        return self.picture("render")

    def mouse(self) -> Any:
        from selenium.webdriver.common.action_chains import ActionChains

        return ActionChains(self.driver, duration=50)

    def slide(self, css: str, part: float) -> None:
        """Presses a slider at a part of its length, from −0.5 to 0.5."""
        slider = self.wait(lambda: [s for s in self.all(css) if s.is_displayed()])[0]
        self.mouse().move_to_element_with_offset(slider, int(slider.size["width"] * part), 0).click().perform()

    def type(self, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.all(".search input")[0].send_keys(Keys.CONTROL + "a", Keys.NULL, text)

    def addresses(self) -> list[str]:
        """Everything that the browser asked for since it was last asked this."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return requests + [e["params"]["url"] for e in events if e["method"] == "Network.webSocketCreated"]


@pytest.fixture(scope="module")
def page(address) -> Iterator[Page]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,800"):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-background-networking")  # of the browser itself: no look for updates
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get(address)
    yield Page(driver)
    driver.quit()


def test_browse_orbit_compare_and_mix(page, address, tmp_path):
    # the gallery: one page of 5,000, drawn for what is shown
    page.wait(lambda: page.texts(".found") == ["1-24 of 5,000"])
    page.wait(lambda: len(page.sources(".thumbnail")) == 24)
    page.type("car-0123")
    page.wait(lambda: page.texts(".scene-card .name") == [f"car-0123{n}" for n in range(10)])
    page.type("no such")
    page.wait(lambda: page.texts(".found") == ["no scene matches"])
    page.type("onerror")
    page.wait(lambda: page.texts(".scene-card .name") == ["car-00003"])
    page.type("car-0")
    page.wait(lambda: page.texts(".found") == ["1-24 of 5,000"])
    page.all(".sort")[0].click()
    page.wait(lambda: [item for item in page.all(".q-menu .q-item") if item.text == "test PSNR"])[0].click()
    page.wait(lambda: page.texts(".scene-card .name")[2:4] == ["car-05001", "car-05000"])  # after the fitted two

    # a scene, from its first test view, truth beside it
    card = page.wait(lambda: [c for c in page.all(".scene-card") if "car-00003" in c.text])[0]
    card.click()
    page.wait(lambda: page.texts(".title") == ["car-00003"])
    page.wait(lambda: page.texts(".scene-card.chosen .name") == ["car-00003"])
    page.wait(lambda: any("dB on this view" in text for text in page.texts(".caption")))
    assert "<img src=x onerror=alert(1)>" in page.texts(".metric .value") and not page.all(".metrics img"), (
        "text, not markup"
    )
    truth = page.picture("truth")
    render = page.settled()

    # orbit and zoom
    image = page.all(".render")[0]
    page.mouse().click_and_hold(image).move_by_offset(90, 20).move_by_offset(60, 10).release().perform()
    turned = page.changed("render", render)
    page.wait(lambda: any("nearest" in text and "away" in text for text in page.texts(".caption")))
    turned = page.settled()
    page.driver.execute_script(
        "arguments[0].dispatchEvent(new WheelEvent('wheel', {deltaY: -300, bubbles: true, cancelable: true}))", image
    )
    page.changed("render", turned)
    zoomed = page.settled()
    scale = "return getComputedStyle(document.querySelector('.truth img')).transform"
    assert page.driver.execute_script(scale).startswith(f"matrix({1.0015**300:.4f}"[:12]), "the truth is as large"

    # depth and latents
    for mode in ("Depth", "Latents", "Colour"):
        next(button for button in page.all(".modes button") if button.text == mode).click()
        zoomed = page.changed("render", zoomed)

    # back to one of the truth's views
    page.slide(".views", 0.45)
    page.wait(lambda: any("view 5 of 5 (train), from the same camera" in text for text in page.texts(".caption")))
    assert page.changed("truth", truth)

    # mix
    render = page.settled()
    other = page.wait(lambda: [c for c in page.all(".scene-card") if "car-00003" not in c.text])[0]
    page.mouse().move_to_element(other).perform()
    other.find_element("css selector", ".mix").click()
    half = page.changed("render", render)
    half = page.settled()
    page.slide(".mix-micro", -0.4)
    assert page.changed("render", half)
    page.slide(".mix-coefs", -0.4)
    page.settled()

    assert page.driver.save_screenshot(str(tmp_path / "viewer.png"))
    wrong = [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not wrong
    asked = page.addresses()
    assert any(url.startswith("ws://127.0.0.1") for url in asked) and f"{address}/" in asked
    away = [url for url in asked if urlsplit(url).hostname not in ("127.0.0.1", "localhost") and url[:5] != "data:"]
    assert not away, "a request left the machine"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Origin": "http://elsewhere.example"}, 403),
    ],
)
def test_other_names_and_other_sites_are_refused(address, headers, status):
    connection = http.client.HTTPConnection(urlsplit(address).netloc)
    connection.request("GET", "/", headers=headers)
    answer = connection.getresponse()
    assert answer.status == status and ("default-src 'self'" in answer.headers.get("content-security-policy", "")) == (
        status == 200
    )
    connection.close()


def test_nothing_but_the_page_is_served(address):
    for path in ("/docs", "/openapi.json", "/redoc", "/../../etc/passwd"):
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        connection.request("GET", path)
        assert connection.getresponse().status == 404
        connection.close()
