"""A headless Chromium that is driven by keys, drops and questions, over the pipe of its DevTools protocol.

The protocol (https://chromedevtools.github.io/devtools-protocol/) is JSON, each message ended by a zero byte: no
package is needed for it.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
from pathlib import Path

from tests.helpers.waiting import PATIENCE, wait_until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# As Chromium's `Input.dispatchKeyEvent` names them: key, code, virtual key code, text.
_KEYS = {
    "Tab": ("Tab", "Tab", 9, ""),
    "Enter": ("Enter", "Enter", 13, "\r"),
    "Space": (" ", "Space", 32, " "),
}
_CONTROL, _SHIFT = 2, 8


class Browser:
    """One tab of a browser of its own.

    Attributes:
        asked: the addresses that were asked for since the tab was opened.
        faults: exceptions and errors of the console, in words.
    """

    def __init__(self, folder: Path):
        (commands, self._to), (self._from, answers) = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4; ours may be these, so they make way.
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (commands, answers)]
        arguments = [
            CHROMIUM, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-background-networking",
            "--disable-component-update", f"--user-data-dir={folder}", "about:blank",
        ]  # fmt: skip
        script = f'exec "$@" 3<&{high[0]} 4>&{high[1]}'
        with (folder / "chromium.log").open("w") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", script, "chromium", *arguments], pass_fds=high, stdout=log, stderr=log
            )
        for descriptor in (commands, answers, *high):
            os.close(descriptor)
        self._unread, self._numbers, self._session = b"", itertools.count(1), None
        self.asked: list[str] = []
        self.faults: list[str] = []
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{part}.enable")

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters) -> dict:
        """Return what a method of the protocol returns."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        _write_all(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._unread:
            assert select.select([self._from], [], [], PATIENCE)[0], "the browser says nothing"
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._unread += data
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict) -> None:
        method, about = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.faults.append(str(about["exceptionDetails"]))
        elif method == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.faults.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        """Load a page and wait until its scripts have run."""
        self.asked.clear()
        self.faults.clear()
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def evaluate(self, expression: str):
        """Return the value of an expression of JavaScript; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a condition, in JavaScript, holds."""
        wait_until(lambda: self.evaluate(f"Boolean({condition})"))

    def press(self, name: str, control: bool = False, shift: bool = False) -> None:
        """Press and release Tab, Enter or Space."""
        key, code, number, text = _KEYS[name]
        held = _CONTROL * control + _SHIFT * shift
        event = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": held}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **event, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Type text into what has the focus, character by character."""
        for character in text:
            if character == "\n":
                self.press("Enter")
            else:
                self.call("Input.dispatchKeyEvent", type="keyDown", text=character, key=character)
                self.call("Input.dispatchKeyEvent", type="keyUp", key=character)

    def drop(self, file: Path, selector: str) -> None:
        """Drag a file onto the middle of an element and let it go."""
        middle = f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({_element(selector)})"
        self.evaluate(f"document.querySelector({json.dumps(selector)}).scrollIntoView()")
        x, y = self.evaluate(middle)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def resize(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Give the page a size in CSS pixels, and a reader who likes a light or a dark ground."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])

    def picture(self) -> bytes:
        """Return the whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(answer["data"])


def _element(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
