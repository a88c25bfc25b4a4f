"""Who asks a process to join others: a coordinator or a launcher; what merely looks like several hosts does not."""

from __future__ import annotations

import pytest

from stages.core.common.errors import ParamsError, StageError
from stages.core.processes.asked import LAUNCHED, Asked, asked, must_be_joined

NAMED = {"COORDINATOR_ADDRESS": "host:1234", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}
KAGGLE = {
    "KAGGLE_KERNEL_RUN_TYPE": "Interactive",
    "TPU_PROCESS_ADDRESSES": "local",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "CLOUD_TPU_TASK_ID": "0",
}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        (NAMED, Asked("COORDINATOR_ADDRESS", "host:1234", 4, 3)),
        (SLURM, Asked("Slurm")),
        ({**SLURM, "COORDINATOR_ADDRESS": "node1:99"}, Asked("COORDINATOR_ADDRESS", "node1:99", 16, 3)),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, Asked("Open MPI")),
        ({**OPEN_MPI, "COORDINATOR_ADDRESS": "a:1"}, Asked("COORDINATOR_ADDRESS", "a:1", 4, 1)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, Asked("Kubernetes")),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}, Asked("TPU")),
    ],
)
def test_a_coordinator_or_a_launcher_of_several_asks(environment, found):
    assert asked(environment) == found


@pytest.mark.parametrize(
    "environment",
    [
        {},
        KAGGLE,
        {**KAGGLE, "TPU_WORKER_HOSTNAMES": "a,b"},
        {key: value for key, value in KAGGLE.items() if not key.startswith("KAGGLE_")},
        {**SLURM, "SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
        {**NAMED, "NUM_PROCESSES": "1", "PROCESS_ID": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
    ids=["nothing", "Kaggle", "Kaggle 2", "one TPU host", "one task", "sbatch", "one rank", "one process", "a pod"],
)
def test_a_machine_of_its_own_stays_alone(environment):
    assert asked(environment) is None


def test_a_tpu_vm_is_asked_for_its_slice_only_where_no_variable_says_it():
    assert asked({}, lambda: 8) == Asked("TPU")
    assert asked(KAGGLE, lambda: pytest.fail("asked")) is None


@pytest.mark.parametrize("changed", [{"PROCESS_ID": "4"}, {"COORDINATOR_ADDRESS": "host"}, {"NUM_PROCESSES": "four"}])
def test_numbers_that_do_not_fit_are_an_error_that_shows_them(changed):
    with pytest.raises(ParamsError, match=next(iter(changed.values()))):
        asked({**NAMED, **changed})


def test_open_mpi_without_an_address_says_what_to_add():
    with pytest.raises(ParamsError, match="mpirun -x COORDINATOR_ADDRESS"):
        asked(OPEN_MPI)


def test_what_the_launcher_started_must_find_the_others():
    with pytest.raises(StageError, match=r"mesh\.launcher"):
        must_be_joined({LAUNCHED: "1"})
    must_be_joined({LAUNCHED: "1", "SLURM_NTASKS": "1"})
    must_be_joined({})
