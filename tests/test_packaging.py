"""What is installed: wheel, source archive and editable install, each used from an empty folder."""

import email
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parent.parent
CARRIED = ["cgrpo_jax", "configs", "launch_tpu", "notebooks", "tests", "pyproject.toml", "README.md", "LICENSE"]
BUILD = "import sys; from hatchling import build as b; out = sys.argv[1]; b.build_wheel(out); b.build_sdist(out)"


def own_environment():
    """Without what would make this checkout the one imported."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def call(*command, cwd):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=own_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(source, out):
    """Wheel and source archive of a source tree, by the build backend itself: no network."""
    call(sys.executable, "-c", BUILD, out, cwd=source)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_visible_top_level():
    """As the project wants it, of what is under version control."""
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("no checkout of git")
    names = {name.partition("/")[0] for name in listed.stdout.splitlines()}
    visible = {name for name in names if not name.startswith(".")}
    assert visible == {
        "LICENSE",
        "README.md",
        "cgrpo_jax",
        "configs",
        "launch_tpu",
        "notebooks",
        "pyproject.toml",
        "tests",
    }


def is_source(path):
    return path.is_file() and "__pycache__" not in path.parts


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the packages are built from: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in CARRIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    return build(checkout, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def from_archive(built, tmp_path_factory):
    """The wheel of the unpacked source archive."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built[1]) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build(source, tmp_path_factory.mktemp("rebuilt"))[0]


def test_the_archive_holds_the_tests(built, checkout):
    with tarfile.open(built[1]) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert found - {"PKG-INFO"} >= {str(path.relative_to(checkout)) for path in checkout.rglob("*") if is_source(path)}


def test_the_wheel_holds_every_file(built, from_archive):
    """With the marker that its types are for others to use."""
    assert (ROOT / "cgrpo_jax" / "py.typed").is_file()
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cgrpo_jax").rglob("*") if is_source(path)}
    wanted |= {f"cgrpo_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.*")}
    for wheel in (built[0], from_archive):
        found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
        assert found == wanted, wheel


def test_the_wheel_names_the_accelerators(built):
    """The extras of jax that make them work; jax itself knows both names."""
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(wheel.read(name))
    assert set(metadata.get_all("Provides-Extra")) == {"gym", "tpu", "api", "cuda", "wandb", "trackio", "test"}
    needs = {str(Requirement(need)) for need in metadata.get_all("Requires-Dist")}
    assert needs >= {'jax[tpu]==0.10.*; extra == "tpu"', 'jax[cuda12]; extra == "cuda"'}
    from importlib.metadata import metadata as installed

    assert {"tpu", "cuda12"} <= set(installed("jax").get_all("Provides-Extra"))


def install(venv, what):
    """A fresh environment with `what` in it, and the dependencies of the running one behind it."""
    call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    place = next(venv.glob("lib/python*/site-packages"))
    (place / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
    call(sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", *options, *what, cwd=venv.parent)
    return venv / "bin/python"


CODE = """
import sys, pathlib, cgrpo_jax
plain, other = cgrpo_jax.get_config("quickstart"), cgrpo_jax.get_config("quickstart:dr_grpo")
assert plain != other and plain.train.steps == 50
assert not [name for name in ("jax", "transformers", "pandas") if name in sys.modules]
from cgrpo_jax.config import files as config_files
print(pathlib.Path(cgrpo_jax.__file__).parent, config_files.folder(), *config_files.names())
"""


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["wheel", "archive", "editable"])
def test_installed_it_works_from_an_empty_folder(built, from_archive, checkout, tmp_path, how):
    what = {"wheel": [built[0]], "archive": [from_archive], "editable": ["-e", checkout]}[how]
    python, empty = install(tmp_path / "venv", what), tmp_path / "empty"
    empty.mkdir()
    package, configs, *names = call(python, "-c", CODE, cwd=empty).split()
    assert names == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    if how == "editable":
        assert (package, configs) == (f"{checkout}/cgrpo_jax", f"{checkout}/configs")
    else:
        assert pathlib.Path(package).is_relative_to(tmp_path / "venv") and configs == f"{package}/configs"
    sizes = {"steps": 1, "prompts": 2, "samples": 2, "micro_batch": 1}
    changes = [f"--config.train.{name}={value}" for name, value in sizes.items()]
    changes += ["--config.sampler.kv_cache_mb=8.0", "--config.eval.every=0"]
    command = [python, "-m", "cgrpo_jax.main", "--config=quickstart:dr_grpo", "--workdir=w", *changes]
    if how != "wheel":  # one real step is enough; the others end where the model and its folder have been read
        command += ["--config.mesh.data=3"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=empty, env=own_environment())
        assert done.returncode == 1 and "\nerror: mesh.data = 3" in f"\n{done.stderr}", done.stderr
    else:
        call(*command, cwd=empty)
        assert (empty / "w/metrics.jsonl").read_text().count("\n") == 1
