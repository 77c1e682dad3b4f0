"""Panels without a browser: what their buttons do, what they find again, what they leave behind."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from widgets import RunList, TrainPanel
from widgets.follow import Follower
from widgets.job import Job
from workbench import events
from workbench.cluster import CLUSTERS
from workbench.errors import RunError
from workbench.launcher import Process
from workbench.run import Run
from workbench.training.config import TrainConfig

EVIL = "<img src=x onerror=alert(1)>"


def test_importing_widgets_imports_no_framework() -> None:
    code = "import sys, widgets; assert not {'torch', 'pandas', 'plotly', 'ipywidgets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestFollower:
    def test_hands_over_everything_once(self, fake_run: Any, until: Any) -> None:
        fake = fake_run().start().steps(1, 10)
        seen: list[int] = []
        statuses: list[str] = []
        follower = Follower(fake.run, lambda fresh, anew: seen.extend(e.step for e in fresh), statuses.append).start()
        until(lambda: len(seen) == 3)
        fake.steps(11, 20)
        until(lambda: len(seen) == 5)
        fake.end("finished")
        until(lambda: not follower.alive)
        assert seen == [0, 10, 10, 20, 20, 100]
        assert statuses[-1] == "finished"

    def test_starts_over_when_a_restart_takes_steps_back(self, fake_run: Any, until: Any) -> None:
        fake = fake_run().start().steps(1, 10).steps(11, 20)
        calls: list[tuple[int, bool]] = []
        follower = Follower(fake.run, lambda fresh, anew: calls.append((len(fresh), anew)), lambda status: None).start()
        until(lambda: calls)
        fake.start(step=10)
        fake.steps(11, 12)
        until(lambda: any(anew for _, anew in calls))
        follower.close()
        until(lambda: not follower.alive)

    def test_goes_on_with_a_run_that_is_resumed(self, fake_run: Any, until: Any) -> None:
        fake = fake_run().start().steps(1, 10)
        statuses: list[str] = []
        steps: list[int] = []
        follower = Follower(fake.run, lambda fresh, anew: steps.extend(e.step for e in fresh), statuses.append).start()
        fake.end("stopped")
        until(lambda: "stopped" in statuses)
        fake.start(step=10)
        fake.steps(11, 20)
        until(lambda: 20 in steps)
        follower.close()
        until(lambda: not follower.alive)


class TestTrainPanel:
    def test_shows_the_code_that_start_runs(self, live: None, runs: Path) -> None:
        panel = TrainPanel(TrainConfig(epochs=7))
        panel.form.type("optim.lr", "0.25")
        assert "epochs=7" in panel.code
        assert "'lr': 0.25" in panel.code
        assert panel._code_view is not None
        assert panel._code_view.code == panel.code
        names: dict[str, Any] = {}
        exec(panel.code.partition("run = ")[0], names)
        assert names["config"] == panel.config
        panel.close()

    def test_a_wrong_setting_disables_start_and_says_why(self, live: None, runs: Path) -> None:
        panel = TrainPanel()
        panel.form.type("epochs", "many")
        assert "disabled" in panel._launcher.html
        assert "not a whole number" in panel._launcher.html
        panel.form.type("epochs", "3")
        assert "disabled" not in panel._launcher.html
        for name, wrong, right in (("nproc", "zero", "2"), ("restarts", "-1", "3")):
            panel._launcher.act(name, wrong)
            assert "whole number" in panel._launcher.html
            panel._launcher.act(name, right)
            assert "whole number" not in panel._launcher.html
        assert "launch(config, nproc=2, restarts=3)" in panel.code
        panel.close()

    @pytest.mark.parametrize("kind", CLUSTERS)
    def test_writes_what_starts_the_run_on_several_machines(self, kind: str, live: None, runs: Path, until: Any) -> None:
        panel = TrainPanel(TrainConfig(data={"batch_size": 64}))
        _ = panel.view
        for name, value in (("nproc", "8"), ("hosts", "2"), ("restarts", "3")):
            panel._launcher.act(name, value)
        panel._launcher.act("elsewhere", kind)
        assert panel._code_view is not None
        until(lambda: "workbench.worker" in panel._code_view.code)
        assert f"{CLUSTERS.factory(kind).__name__}(nproc=8, restarts=3, hosts=2)" in panel._code_view.title
        panel._launcher.act("nproc", "7")
        panel._launcher.act("elsewhere", kind)
        until(lambda: "does not divide into 14 ranks" in panel._launcher.html)
        panel.close()

    def test_start_returns_at_once_and_runs_that_very_code(self, live: None, runs: Path, until: Any) -> None:
        panel = TrainPanel(TrainConfig(model={"name": "mlp"}, epochs=1, device="cpu"))
        _ = panel.view
        code, started = panel.code, time.monotonic()
        panel._launcher.act("start")
        assert time.monotonic() - started < 0.5
        until(lambda: panel.run is not None and panel.run.status == "finished", timeout=60)
        assert panel.run is not None
        assert panel.run.config == panel.config
        assert panel._code_view is not None
        until(lambda: panel._code_view.code == code)
        until(lambda: "finished" in panel._header.html)
        assert len(panel._loss.arrays("loss")[0]) == len(panel.run.history)
        panel.close()

    def test_attaches_by_itself_to_the_newest_live_run(self, live: None, fake_run: Any, until: Any) -> None:
        fake_run(TrainConfig(epochs=2)).start().steps(1, 10).end()
        going = fake_run(TrainConfig(epochs=3)).start().steps(1, 30)
        panel = TrainPanel(TrainConfig(epochs=9))
        _ = panel.view
        assert panel.run is not None
        assert panel.run.id == going.run.id
        until(lambda: len(panel._loss.arrays("loss")[0]) == 30)
        assert panel._loss.arrays("loss")[0][0] == 1
        until(lambda: panel._metric is not None)
        assert panel.config.epochs == 9
        panel.close()

    def test_without_a_live_run_it_finds_the_one_of_its_config(self, live: None, fake_run: Any) -> None:
        wanted = fake_run(TrainConfig(epochs=2)).start().steps(1, 10).end()
        fake_run(TrainConfig(epochs=3)).start().steps(1, 10).end()
        panel = TrainPanel(TrainConfig(epochs=2))
        assert panel.run is not None
        assert panel.run.id == wanted.id
        assert TrainPanel().config.epochs == 3
        assert TrainPanel(TrainConfig(epochs=50)).run is None

    def test_buttons_post_commands(self, live: None, fake_run: Any, until: Any) -> None:
        fake = fake_run().start().steps(1, 10)
        panel = TrainPanel(run=fake.run)
        _ = panel.view
        panel._header.act("pause")
        panel._header.act("rate", rate="0.003")
        panel._header.act("rate", rate="nonsense")
        panel._header.act("stop")
        posted = fake.run.path / "commands"
        until(lambda: len(list(posted.glob("*.json"))) == 3)
        assert [p.read_text().count('"lr": 0.003') for p in sorted(posted.glob("*.json"))] == [0, 1, 0]
        panel.close()

    def test_a_failed_run_says_why_with_the_details_folded(self, live: None, fake_run: Any, until: Any) -> None:
        run = fake_run().start().end("failed")
        panel = TrainPanel(run=run)
        _ = panel.view
        until(lambda: "became NaN" in panel._header.html)
        assert panel._header.html.index("<details") < panel._header.html.index("Traceback")
        panel.close()

    def test_a_command_that_cannot_be_obeyed_is_one_message(self, live: None, fake_run: Any, until: Any) -> None:
        run = fake_run().start().end("finished")
        panel = TrainPanel(run=run)
        _ = panel.view
        panel._header.act("pause")
        until(lambda: "cannot pause" in panel._launcher.html)
        assert "Traceback" not in panel._launcher.html
        panel.close()

    def test_close_ends_its_threads(self, live: None, fake_run: Any, until: Any) -> None:
        before = set(threading.enumerate())
        panel = TrainPanel(run=fake_run().start().steps(1, 10).run)
        _ = panel.view
        panel._header.act("save")
        until(lambda: len(set(threading.enumerate()) - before) >= 1)
        panel.close()
        until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith(("follow", "TrainPanel"))])


class TestWithoutAPage:
    def test_a_panel_is_a_small_summary_and_no_widget(self, fake_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from ipywidgets.widgets.widget import _instances

        monkeypatch.setenv("WORKBENCH_STATIC", "1")
        fake_run(TrainConfig(label=EVIL)).start().steps(1, 10).end()
        before = len(_instances)
        for panel in (TrainPanel(), RunList()):
            data, _ = panel._repr_mimebundle_()
            assert len(data["text/html"]) < 20_000
            assert "finished" in data["text/html"]
            assert EVIL not in data["text/html"]
        assert len(_instances) == before


class TestRunList:
    def test_lists_filters_and_escapes(self, live: None, fake_run: Any) -> None:
        fake_run(TrainConfig(label=EVIL, model={"name": "mlp"})).start().steps(1, 10).end()
        fake_run(TrainConfig(model={"name": "convnet"})).start().end("failed")
        runs = RunList()
        _ = runs.view
        assert EVIL not in runs._surface.html
        assert {row.model for row in runs.rows()} == {"mlp", "convnet"}
        runs._surface.act("words", "CONV digits")
        assert [row.model for row in runs.rows()] == ["convnet"]
        runs._surface.act("words", "")
        runs._surface.act("status", "finished")
        assert [row.model for row in runs.rows()] == ["mlp"]
        assert "accuracy" in runs.rows()[0].metric
        runs.close()

    def test_a_click_reopens_a_run(self, live: None, fake_run: Any, until: Any) -> None:
        run = fake_run().start().steps(1, 10).end()
        opened: list[Run] = []
        runs = RunList(on_open=opened.append)
        _ = runs.view
        runs._surface.act("open", run.id)
        until(lambda: opened)
        assert opened[0].id == run.id
        assert run.id in runs.code
        runs._surface.act("open", "../../etc")
        assert len(opened) == 1
        runs.close()

    def test_a_broken_folder_does_not_hide_the_others(self, live: None, fake_run: Any, runs: Path) -> None:
        fake_run().start().end()
        (runs / "broken").mkdir()
        (runs / "broken" / "config.yaml").write_text("{")
        (runs / "broken" / "attempts").mkdir()
        assert sorted(row.status for row in RunList().rows()) == ["finished", "unreadable"]


class TestJob:
    def test_what_a_job_made_is_read_from_its_folder(self, tmp_path: Path) -> None:
        job = Job.start(tmp_path / "job", "print('hello')\nx = 1\n")
        assert job.wait(30)["status"] == "finished"
        assert Job(tmp_path / "job").status == "finished"
        assert "hello" in job.tail()
        assert job.code.startswith("print")

    def test_a_failure_is_told_in_words(self, tmp_path: Path) -> None:
        code = "from workbench.errors import RunError\nraise RunError('It is gone.', 'Look elsewhere.')\n"
        job = Job.start(tmp_path / "job", code)
        job.wait(30)
        assert job.status == "failed"
        assert "It is gone." in job.problem()
        assert "Look elsewhere." in job.problem()
        assert "Traceback" not in job.problem()
        other = Job.start(tmp_path / "other", "1 / 0")
        other.wait(30)
        assert "division by zero" in other.problem()
        assert "<details" in other.problem()

    def test_a_job_over_before_its_process_is_known_has_its_result(
        self, tmp_path: Path, until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def late(pid: int) -> Process:
            until(lambda: (tmp_path / "job" / "result.json").exists() and psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
            return Process(socket.gethostname(), pid, psutil.Process(pid).create_time())

        monkeypatch.setattr(Process, "of", late)
        assert Job.start(tmp_path / "job", "x = 1").status == "finished"

    def test_a_killed_job_is_lost(self, tmp_path: Path, until: Callable[..., Any]) -> None:
        job = Job.start(tmp_path / "job", "import time\ntime.sleep(60)")
        assert job.status == "running"
        job.cancel()
        until(lambda: job.status == "lost")
        assert "without a word" in job.problem()


def test_commands_need_a_run(runs: Path) -> None:
    from widgets import ComparePanel, PrunePanel

    for panel in (PrunePanel(), ComparePanel()):
        with pytest.raises(RunError, match="no trained run"):
            panel.act()
        assert "Train a model first" in panel.code


def test_events_are_what_the_fake_says(fake_run: Any) -> None:
    assert isinstance(fake_run().start().run.events[0], events.AttemptStarted)
