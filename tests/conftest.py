"""Shared fixtures. Silent broadcasting is an error in every test."""

import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Most of the time of these tests is XLA compiling tiny programs: generate code quickly rather than quick code. And take
# the products of Eigen, whose rounding is that of torch: the faster kernels that XLA's CPU backend prefers differ from
# float64 by up to 1e-3 in single logits of SmolLM2 (mean 1.6e-5), these by 1e-4 (6e-6).
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_backend_optimization_level=0", "--xla_cpu_experimental_ynn_fusion_type="]
)

# One folder of compiled programs for the whole session: many tests need the same ones. Worker processes inherit it.
OWN_CACHE = "" if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="cgrpo_jax_tests_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", OWN_CACHE)

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

from cgrpo_jax.config import options
from cgrpo_jax.model import sharding
from cgrpo_jax.model.decoder import ModelConfig
from cgrpo_jax.model.hf_config import FAMILIES
from cgrpo_jax.report_page import page as report_page
from cgrpo_jax.run.folders import model_folder
from cgrpo_jax.sampling.engine import Engine, weights_of
from cgrpo_jax.text.tokenizer import Tokenizer
from cgrpo_jax.workdir import compilation

compilation.keep_on_disk()
QUICKSTART = model_folder("package://quickstart")
SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


def pytest_unconfigure(config):
    if OWN_CACHE:  # the process that made the folder outlives the others
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With SKIPPED=FILE what an earlier run left out has the mark `skipped`: `.ci/run` makes up for it by that."""
    record = pathlib.Path(os.environ.get("SKIPPED") or os.devnull)
    left_out = set(record.read_text(encoding="utf-8").splitlines()) if record.exists() else set()
    for item in items:
        if item.nodeid in left_out:
            item.add_marker("skipped")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """With REQUIRE_ALL set (continuous integration) a test that skips has failed; NO_BROWSER excuses what opens one.

    Without it SKIPPED=FILE is told which tests did.
    """
    report = (yield).get_result()
    excused = os.environ.get("NO_BROWSER") and "browser" in item.fixturenames
    if not report.skipped or hasattr(report, "wasxfail") or excused:
        return
    if os.environ.get("REQUIRE_ALL"):
        report.outcome, report.longrepr = "failed", f"skipped although REQUIRE_ALL is set: {report.longrepr}"
    elif os.environ.get("SKIPPED"):
        with open(os.environ["SKIPPED"], "a", encoding="utf-8") as record:
            record.write(f"{item.nodeid}\n")


def engine_of(setup, params, step, sampling):
    """The engine of these parameters at this step."""
    return Engine(setup, weights_of(setup, params), step, sampling)


def tiny_config(family: str = "qwen3", **changes) -> ModelConfig:
    """Two layers with every dimension different, grouped queries, a free head_dim."""
    values = {
        "family": family, "vocab": 211, "width": 48, "mlp_width": 80, "layers": 2, "heads": 6, "kv_heads": 2,
        "head_dim": 8 if family != "qwen3" else 12, "rope_theta": 10_000.0, "max_positions": 1024,
    } | FAMILIES[family] | changes  # fmt: skip
    return ModelConfig(**values)


@pytest.fixture(scope="session")
def mesh():
    return sharding.make_mesh(options.MeshConfig(), jax.devices())


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The embedded model's: spells any text, has a chat template."""
    return Tokenizer(QUICKSTART)


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """A real 135 M-parameter checkpoint; SMOLLM2 names its folder."""
    folder = os.environ.get("SMOLLM2")
    if not folder:
        pytest.skip("SMOLLM2 is not set (a Hugging Face folder of SmolLM2-135M-Instruct)")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Public data sets beside the checkout."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"{SHARED}/data is not there")
    return SHARED / "data"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def browser():
    """Chromium, headless: `pip install playwright` and Debian's `chromium`, or CHROMIUM names another."""
    sync_api = pytest.importorskip("playwright.sync_api")
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium here")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


WATCH = (
    "window.refused = []; addEventListener('securitypolicyviolation', (e) => refused.push(e.blockedURI + e.sourceFile))"
)


class Seen:
    """What a page did beside showing itself."""

    def __init__(self, page):
        self.requests, self.dialogs, self.errors = [], [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)


@pytest.fixture
def opened(browser, tmp_path):
    """Writes a report of workdirs and opens it; whatever went wrong in a page fails its test."""
    pages = []

    def open_report(*workdirs, **options):
        page = browser.new_page(**{"viewport": {"width": 1300, "height": 900}} | options)
        seen = Seen(page)
        page.add_init_script(WATCH)
        report_page.write(workdirs, tmp_path / "report.html")
        page.goto(f"file://{tmp_path}/report.html")
        page.wait_for_selector("html[data-ready]", timeout=20_000)
        pages.append((page, seen))
        return page

    yield open_report
    for page, seen in pages:
        assert len(seen.requests) == 1 and not seen.dialogs and not seen.errors, vars(seen)
        assert page.evaluate("refused") == []
        page.close()
