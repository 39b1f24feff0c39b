"""What `pytest` leaves out, and that `.ci/run` leaves nothing out: its two parts, on a file of five tests."""

import types

import conftest
import pytest

TESTS = """
import os, pytest

def test_quick(): pass

@pytest.mark.thorough
def test_marked(): pass

@pytest.mark.skipif("'MODEL' not in os.environ", reason="no model")
def test_of_a_model(): pass

@pytest.fixture
def program():
    if "PROGRAM" not in os.environ:
        pytest.skip("no program")

@pytest.mark.parametrize("name", ["a b", "c::d"])
def test_of_a_program(program, name): pass

@pytest.mark.xfail(strict=True)
def test_that_fails(): assert False
"""


class Ran:
    """The hooks of conftest, and what became of each test."""

    pytest_collection_modifyitems = staticmethod(conftest.pytest_collection_modifyitems)
    pytest_runtest_makereport = staticmethod(conftest.pytest_runtest_makereport)

    def __init__(self):
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid.partition("::")[2]] = report.outcome


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  thorough: x\n  skipped: x\n")
    for name in ("REQUIRE_ALL", "NO_BROWSER", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SKIPPED", str(tmp_path / "skipped"))

    def run(marks, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        ran = Ran()
        arguments = [
            str(tmp_path),
            "-q",
            "-m",
            marks,
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            f"--rootdir={tmp_path}",
        ]
        code = pytest.main([*arguments, "--capture=no", "--no-summary", "--import-mode=importlib"], plugins=[ran])
        return types.SimpleNamespace(code=int(code), outcomes=ran.outcomes)

    return run


def test_the_two_parts_run_each_test_once_and_a_skip_in_the_second_fails(run):
    first = run("not slow and not thorough")
    skipped = {"test_of_a_model", "test_of_a_program[a b]", "test_of_a_program[c::d]"}
    assert first.code == 0 and {name for name, outcome in first.outcomes.items() if outcome == "passed"} == {
        "test_quick"
    }
    second = run("thorough or skipped", REQUIRE_ALL="1", MODEL="there")
    assert second.code == 1 and second.outcomes == {
        "test_marked": "passed", "test_of_a_model": "passed",
        "test_of_a_program[a b]": "failed", "test_of_a_program[c::d]": "failed",
    }  # fmt: skip
    third = run("thorough or skipped", PROGRAM="there")
    assert third.code == 0 and set(third.outcomes) == skipped | {"test_marked"}
