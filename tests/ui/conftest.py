"""A real JupyterLab, driven by a real Chromium.

* :class:`Lab` — the server, on a temporary folder: ``url``, ``root``, :meth:`Lab.notebook` writes one, :meth:`Lab.open` opens it.
* :class:`Notebook` — an open notebook whose kernel is ready: run its cells, restart it, ask its kernel, switch the theme,
  take a screenshot.

Without a Chromium the tests are skipped. ``WORKBENCH_SCREENSHOTS`` names the folder of the screenshots.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from workbench.run import Run

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ui)


def find_chromium() -> str | None:
    """A browser on the PATH, else the one that ``playwright install chromium`` fetched."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="The browser tests need playwright: pip install 'workbench[test]'")
    executable = find_chromium()
    if executable is None:
        pytest.skip("The browser tests need Chromium: install it, or run 'playwright install chromium'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    server = Lab(tmp_path_factory.mktemp("lab"), browser)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _no_window_outlives_its_test(request: pytest.FixtureRequest) -> Iterator[None]:
    """Else it would go on drawing beside those of the tests that follow."""
    yield
    if "lab" in request.fixturenames:
        request.getfixturevalue("lab").close_windows()


class Lab:
    """A JupyterLab server of its own: settings, workspaces and runs lie under ``home``, notebooks under ``root``."""

    def __init__(self, home: Path, browser: Any) -> None:
        self.home, self.root = home, home / "notebooks"
        self.root.mkdir()
        self._browser, self._contexts, self._opened = browser, [], 0
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._write_settings()
        self._log = (home / "jupyter.log").open("wb")
        self._server = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"),
                *(f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token="),
                *(f"--ServerApp.root_dir={self.root}", "--expose-app-in-browser", "--LabApp.news_url="),
            ],
            cwd=self.root,
            env=self._environment(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._wait_until_up()

    @property
    def runs(self) -> Path:
        return self.home / "runs"

    def notebook(self, name: str, *cells: str) -> Path:
        """Write a notebook of code cells."""
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        path = self.root / name
        nbformat.write(book, path)
        return path

    def open(self, path: str | Path, *, width: int = 1280, height: int = 800) -> Notebook:
        """Open a notebook in a window of its own and wait until its kernel is idle."""
        context = self._browser.new_context(viewport={"width": width, "height": height})
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=self.url)
        self._contexts.append(context)
        self._opened += 1
        page = context.new_page()
        relative = Path(path).name if Path(path).is_absolute() else str(path)
        book = Notebook(page, self)
        page.goto(f"{self.url}/lab/workspaces/ui-{self._opened}/tree/{relative}?reset")
        book.wait_for_kernel()
        return book

    def close_windows(self) -> None:
        while self._contexts:
            self._contexts.pop().close()

    def close(self) -> None:
        """Close the windows, the server and whatever still trains."""
        self.close_windows()
        self._server.terminate()
        try:
            self._server.wait(20)
        except subprocess.TimeoutExpired:
            self._server.kill()
        self._log.close()
        for run in Run.all(self.runs):
            run.kill()

    def _environment(self) -> dict[str, str]:
        folders = {
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "IPYTHONDIR": "ipython",
        }
        environment = os.environ | {name: str(self.home / folder) for name, folder in folders.items()}
        environment |= {
            "JUPYTERLAB_SETTINGS_DIR": str(self.home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(self.home / "workspaces"),
        }
        environment |= {"WORKBENCH_RUNS": str(self.runs), "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "default"}
        return environment

    def _write_settings(self) -> None:
        folder = self.home / "settings" / "@jupyterlab" / "apputils-extension"
        folder.mkdir(parents=True)
        (folder / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')

    def _wait_until_up(self, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/api/status", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                if self._server.poll() is not None:
                    break
                time.sleep(0.2)
        pytest.fail(f"JupyterLab did not start:\n{(self.home / 'jupyter.log').read_text()[-2000:]}")


class Notebook:
    """An open notebook. ``page`` is the Playwright page, ``errors`` what its scripts raised or complained of."""

    def __init__(self, page: Any, lab: Lab) -> None:
        self.page, self.lab = page, lab
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_default_timeout(30_000)

    def wait_for_kernel(self, timeout: float = 90) -> None:
        self.page.wait_for_function(
            f"() => {_KERNEL}?.connectionStatus === 'connected' && {_KERNEL}?.status === 'idle'", timeout=timeout * 1000
        )

    def run_all(self, timeout: float = 90) -> None:
        """Run every cell and wait for the last."""
        self.command("notebook:run-all-cells", timeout=timeout)

    def restart(self) -> None:
        """Restart the kernel, and wait until it answers."""
        self.page.evaluate(f"() => {_KERNEL}.restart()")
        self.wait_for_kernel()
        self.ask("1")

    def ask(self, code: str) -> float:
        """Seconds until the kernel's main shell has executed ``code``."""
        script = (
            f"async (code) => {{ const start = performance.now(); await {_KERNEL}.requestExecute({{code}}).done;"
            " return (performance.now() - start) / 1000 }"
        )
        return float(self.page.evaluate(script, code))

    def result(self, expression: str) -> str:
        """``repr`` of an expression in the kernel."""
        script = f"""async (code) => {{
            const reply = await {_KERNEL}.requestExecute({{code: '', user_expressions: {{value: code}}}}).done;
            const value = reply.content.user_expressions.value;
            return value.status === 'ok' ? value.data['text/plain'] : 'error: ' + value.evalue }}"""
        return str(self.page.evaluate(script, expression))

    def theme(self, name: str) -> None:
        """``"light"`` or ``"dark"``, switched live."""
        self.command("apputils:change-theme", {"theme": f"JupyterLab {name.capitalize()}"})
        self.page.wait_for_function("(light) => document.body.dataset.jpThemeLight === light", arg=str(name == "light").lower())
        self.page.wait_for_timeout(400)

    def command(self, name: str, arguments: dict[str, Any] | None = None, timeout: float = 30) -> None:
        script = """([name, args]) => {
            window.__done = false;
            jupyterapp.commands.execute(name, args).finally(() => { window.__done = true }) }"""
        self.page.evaluate(script, [name, arguments or {}])
        self.page.wait_for_function("() => window.__done", timeout=timeout * 1000)

    def screenshot(self, name: str) -> Path:
        folder = Path(os.environ.get("WORKBENCH_SCREENSHOTS") or self.lab.home / "screenshots")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        self.page.screenshot(path=str(path))
        return path


_KERNEL = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
