"""How the stages find out who started them."""

import pytest

from pipeline.processes import started


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, None),  # Fabric's own launcher: machine.devices says how many
        ({"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, (4, 2)),
        ({"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "3"}, (2, 3)),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}, (1, 1)),
        ({"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "interactive"}, None),
        ({"TORCHELASTIC_RUN_ID": "7", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "SLURM_NTASKS": "1"}, (2, 1)),
    ],
)
def test_processes_per_machine_and_machines(environment, expected):
    assert started(environment) == expected
