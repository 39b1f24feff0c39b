"""What a person sees of a run: on a narrow terminal, in a file, and of the time that is left."""

import io
import re

import pytest

from cgrpo_jax.workdir import progress
from cgrpo_jax.workdir.progress import Progress

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
NOTES = {"reward": 0.12345, "refined": 0.5, "fixed": 0.25, "tok/s": 187.3, "s": 30.5}


class Screen(io.StringIO):
    """A terminal that keeps what it is shown."""

    def isatty(self):
        return True


class Clock:
    """Stands still unless it is told."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", made)
    return made


def shown(monkeypatch, screen, width, steps=3):
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm-256color")
    with Progress(0, 50) as bar:
        for step in range(1, steps + 1):
            with bar.phase("sample"):
                pass
            with bar.phase("update"):
                pass
            bar.step_done(step, NOTES)
            bar.bar.refresh()
        bar.log("a line above it")
    return screen.getvalue()


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 120, 200])
def test_the_bar_keeps_to_one_line(monkeypatch, width):
    text = shown(monkeypatch, Screen(), width)
    frames = [ANSI.sub("", part) for part in re.split(r"\r|\n", text)]
    assert max(map(len, frames)) <= width
    drawn = [frame for frame in frames if "/50" in frame]
    assert drawn and all("3/50" in frame for frame in drawn[-1:])
    assert not [frame for frame in frames if frame.strip() and "/50" not in frame and "a line above it" not in frame]


def test_what_others_named_is_shown_as_it_is(monkeypatch, capsys):
    """A log line, a phase (of a task's name) and a note: neither markup nor names of emojis mean anything."""
    wild = "[red]x[/] :warning: [bold"
    with Progress(0, 3) as told:
        told.log(wild)
    assert capsys.readouterr().err == f"{wild}\n"
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "200")
    with Progress(0, 3) as told, told.phase(wild):
        told.step_done(1, {wild: 1.0})
        told.bar.refresh()
    assert ANSI.sub("", screen.getvalue()).count(wild) >= 2


@pytest.mark.parametrize("variable", ["", "FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_file_gets_a_line_a_step(monkeypatch, variable):
    """No control characters, whatever a variable says of colours, and no line is folded."""
    if variable:
        monkeypatch.setenv(variable, "1")
    text = shown(monkeypatch, io.StringIO(), 40)
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/50", "step 2/50", "step 3/50", "a line above it"]
    assert all("tok/s 187.3" in line for line in lines[:3])


def test_what_is_left_leaves_the_first_step_out(monkeypatch, clock, capsys):
    """It compiles: 49 steps after one of 60 s are not 49 minutes."""
    bar = Progress(0, 50)
    for step, seconds in ((1, 60), (2, 2), (3, 2)):
        clock.now += seconds
        bar.step_done(step, {})
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == [
        "step 1/50", "step 2/50    left 96 s".replace("96 s", "1.6 min"), "step 3/50    left 1.6 min",
    ]  # fmt: skip


def test_what_is_left_after_a_resume(clock, capsys):
    bar = Progress(0, 50)
    bar.resume_at(40)
    for step, seconds in ((41, 60), (42, 3), (43, 3)):
        clock.now += seconds
        bar.step_done(step, {})
    lines = capsys.readouterr().err.splitlines()
    assert "left" not in lines[0] and lines[1].endswith("left 24 s") and lines[2].endswith("left 21 s")


def test_answers_that_were_stored_do_not_count(clock, capsys):
    """They come all at once; the pace is that of the last ones."""
    bar = Progress(0, 0, "answer")
    bar.expect(1000)
    for number in range(1000):
        clock.now += 0.0 if number < 500 else 1.0
        bar.answered()
    lines = capsys.readouterr().err.splitlines()
    assert lines[5] == "answer 600/1000  100 s  left 6.7 min".replace("100 s", "1.7 min")
    assert lines[-1] == "answer 1000/1000  8.3 min  left 0 s"


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (89, "89 s"), (90, "1.5 min"), (5400, "1.5 h")])
def test_durations(seconds, words):
    assert progress.duration(seconds) == words
