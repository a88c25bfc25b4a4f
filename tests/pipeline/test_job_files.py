"""The job files of docs/jobs, read by the tools that they are written for, where these are installed.

SkyPilot wants other packages than the pipeline does, so it is in an environment of its own:
`python -m venv jobs && jobs/bin/pip install pytest skypilot kubernetes-validate`, then
`jobs/bin/python -m pytest --noconftest tests/pipeline/test_job_files.py`.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

JOBS = Path(__file__).parents[2] / "docs/jobs"


def scripts() -> dict[str, str]:
    """What each job file has a shell run."""
    jobset = yaml.safe_load((JOBS / "gke-tpu-v5e-64.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    sky = yaml.safe_load((JOBS / "skypilot-two-nodes.yaml").read_text())
    return {
        "Slurm": (JOBS / "slurm-two-nodes.sh").read_text(),
        "GKE": pod["containers"][0]["args"][0],
        "SkyPilot": sky["setup"] + sky["run"],
    }


@pytest.mark.parametrize("name", ["Slurm", "GKE", "SkyPilot"])
def test_a_job_is_a_shell_script_that_runs_stages_of_this_project(name: str):
    script = scripts()[name]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    listed = re.findall(r"stages\.([a-z]\w*)", script)
    for names in re.findall(r"for stage in ([^;]+);", script):
        listed += re.findall(r"[a-z]\w+", re.sub(r'"(\w+)[^"]*"', r"\1", names))
    assert listed and all((JOBS.parents[1] / f"stages/{each}.py").is_file() for each in listed), listed


def test_the_jobset_is_one_process_on_each_host_of_the_slice():
    jobset = yaml.safe_load((JOBS / "gke-tpu-v5e-64.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips


def test_kubernetes_takes_the_job():
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    jobset = yaml.safe_load((JOBS / "gke-tpu-v5e-64.yaml").read_text())
    spec = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    validate.validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}, "1.30", strict=True
    )


def test_skypilot_takes_the_task():
    sky = pytest.importorskip("sky", reason="needs skypilot")
    config = yaml.safe_load((JOBS / "skypilot-two-nodes.yaml").read_text())
    task = sky.Task.from_yaml_config(config, env_overrides=[("KAGGLE_USERNAME", "name"), ("KAGGLE_KEY", "key")])
    assert task.num_nodes == 2
    assert [resources.accelerators for resources in task.resources] == [{"H100": 8}]
