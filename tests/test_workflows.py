"""What GitHub runs of this repository exists here, asks for no more rights than it needs, and
ends."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FILES = [*WORKFLOWS, *sorted((GITHUB / "actions").rglob("*.yml"))]
HOOKS = ROOT / ".pre-commit-config.yaml"
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE))
MAY_WRITE = {
    ("docs.yml", "deploy"): {"pages": "write", "id-token": "write"},
    ("release.yml", "publish"): {"id-token": "write"},
}
"""Jobs with more rights than to read the code. Neither of them runs any of it."""


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def read(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text("utf-8"))


def steps(path: Path) -> list[dict[str, Any]]:
    content = read(path)
    jobs = content["jobs"].values() if "jobs" in content else [content["runs"]]
    return [step for job in jobs for step in job["steps"]]


def targets(path: Path) -> Iterator[str]:
    for step in steps(path):
        yield from re.findall(r"^\s*make ([\w-]+)", step.get("run", ""), flags=re.MULTILINE)
        if target := step.get("with", {}).get("target"):
            yield target


@named(FILES)
def test_every_make_target_exists(path: Path) -> None:
    assert set(targets(path)) <= TARGETS


def test_each_lane_of_the_tests_is_run_somewhere() -> None:
    run = {target for path in WORKFLOWS for target in targets(path)}
    wanted = {"check", "test", "test-touched", "test-all", "docs", "dist", "try-wheel"}
    assert wanted | {"install-lowest", "install-newest"} <= run


@named(FILES)
def test_every_file_and_local_action_exists(path: Path) -> None:
    text = path.read_text("utf-8")
    for file in re.findall(r"(?<![\w./*-])[\w.][\w./-]*\.(?:py|toml|txt|cff|md|yml)\b", text):
        assert (ROOT / file).is_file(), file
    for action in re.findall(r"uses: \./(\S+)", text):
        assert (ROOT / action / "action.yml").is_file(), action


@named(FILES)
def test_every_action_from_elsewhere_has_its_major_version(path: Path) -> None:
    for step in steps(path):
        if (action := step.get("uses", "./")).startswith("./"):
            continue
        assert re.fullmatch(r"(actions/[\w-]+@v\d+|pypa/[\w-]+@release/v\d+)", action), action


@named(WORKFLOWS)
def test_a_job_may_read_and_no_more_but_for_those_that_publish(path: Path) -> None:
    content = read(path)
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert job.get("permissions", {}) == MAY_WRITE.get((path.name, name), {}), name
        if (path.name, name) in MAY_WRITE:
            assert not [step for step in job["steps"] if "run" in step]


@named(WORKFLOWS)
def test_a_job_has_a_time_limit_below_githubs_and_a_newer_run_takes_its_place(path: Path) -> None:
    content = read(path)
    assert {"group", "cancel-in-progress"} == set(content["concurrency"])
    assert all(job["timeout-minutes"] < 360 for job in content["jobs"].values())


def test_the_fast_tests_run_on_every_python_that_the_package_names() -> None:
    matrix = read(GITHUB / "workflows" / "tests.yml")["jobs"]["fast"]["strategy"]["matrix"]
    listed = re.findall(r":: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text("utf-8"))
    assert matrix["python"] == listed


def test_the_flags_of_the_nightly_run_are_those_of_the_tests() -> None:
    (flags,) = re.findall(r'ARGS="(.*)"', (GITHUB / "workflows" / "nightly.yml").read_text())
    defined = set(re.findall(r'"(--[\w-]+)"', (ROOT / "tests" / "conftest.py").read_text()))
    assert set(re.findall(r"--[\w-]+", flags)) <= {*defined, "--durations"}


def release_step(name: str) -> str:
    path = GITHUB / "workflows" / "release.yml"
    (step,) = (step for step in steps(path) if step.get("name") == name)
    return step["run"]


@pytest.mark.parametrize(("tag", "is_released"), [("v{}", True), ("v{}.1", False), ("v9", False)])
def test_only_a_tag_that_is_the_version_is_released(tag: str, is_released: bool) -> None:
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    command = ["bash", "-e", "-c", release_step("The tag is the version")]
    env = {**os.environ, "GITHUB_REF_NAME": tag.format(version)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=False)
    assert (done.returncode == 0) == is_released


def test_the_hooks_of_git_use_the_versions_of_the_checks() -> None:
    pinned = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    hooks = [hook for repo in read(HOOKS)["repos"] for hook in repo["hooks"]]
    needed = {package for hook in hooks for package in hook["additional_dependencies"]}
    assert needed <= set(pinned)
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "notebooks"}
