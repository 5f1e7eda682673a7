"""A headless Chromium, driven through a pair of pipes (the DevTools protocol)."""

import fcntl
import json
import os
import shutil
import subprocess
import time

BINARIES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --remote-debugging-pipe"
).split()
PATIENCE = 60  # seconds for one answer


def chromium():
    """The browser's path, or None."""
    return next(filter(None, map(shutil.which, BINARIES)), None)


class Browser:
    """One page of a browser; `said` is what it wrote to the console, `asked` what it loaded."""

    def __init__(self, profile):
        self.said, self.asked, self._events, self._session = [], [], [], None
        self._buffer, self._last = b"", 0
        self._start([chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"])
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _start(self, command):
        """The browser reads commands from descriptor 3 and writes answers to descriptor 4."""
        (self._read, answers), (commands, self._write) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (commands, answers)]
        self._process = subprocess.Popen(
            command,
            close_fds=False,  # 3 and 4 stay open; all others of Python close themselves
            preexec_fn=lambda: [os.dup2(fd, number) for number, fd in enumerate(theirs, start=3)],
            stderr=subprocess.DEVNULL,
        )
        for fd in (commands, answers, *theirs):
            os.close(fd)
        os.set_blocking(self._read, False)

    def call(self, method, **params):
        """The result of one protocol call."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda received: received.get("id") == self._last)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path):
        """Load a file, and wait until it is there."""
        self.said.clear()
        self.asked.clear()
        self._events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        if "Page.loadEventFired" not in self._events:
            self._until(lambda received: received.get("method") == "Page.loadEventFired")

    def evaluate(self, expression):
        """The value of a JavaScript expression on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def middle(self, element):
        """Where an element's middle is, after it was scrolled into view."""
        box = f"(e => {{ e.scrollIntoView({{block: 'center'}}); {self._BOX} }})({element})"
        return self.evaluate(box)

    _BOX = "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]"

    def drag(self, start, end):
        """Press the mouse at one point and let it go at another."""
        button = {"button": "left", "clickCount": 1}
        for kind, (x, y) in (("Pressed", start), ("Moved", end), ("Released", end)):
            self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **button)

    def press(self, key):
        """One key, such as ArrowRight."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("rawKeyDown", "keyUp"):
            event = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
            self.call("Input.dispatchKeyEvent", **event)

    def quit(self):
        """End the browser."""
        self._session = None
        self.call("Browser.close")
        self._process.wait(PATIENCE)
        os.close(self._read)
        os.close(self._write)

    def _until(self, wanted):
        deadline = time.monotonic() + PATIENCE
        while True:
            message = self._next(deadline)
            self._note(message)
            if wanted(message):
                return message

    def _next(self, deadline):
        while b"\0" not in self._buffer:
            assert time.monotonic() < deadline, "the browser does not answer"
            assert self._process.poll() is None, "the browser has ended"
            try:
                self._buffer += os.read(self._read, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, message):
        method, params = message.get("method"), message.get("params", {})
        self._events += [method] if method else []
        if method == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(a.get("value")) for a in params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.said.append(params["exceptionDetails"]["text"])
        elif method == "Log.entryAdded":
            self.said.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
