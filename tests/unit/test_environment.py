"""The environment of a run: set in one place, never over what the user set, and told in one line."""

from comet_megatron.backend.environment import QUIET, RUN, describe_environment, set_environment, set_quiet


def test_what_the_user_has_set_stays_and_the_rest_is_set():
    environment = {"NCCL_DEBUG": "INFO", "TRANSFORMERS_VERBOSITY": "info"}
    set_environment(environment)
    set_quiet(environment)
    assert environment == {**RUN, **QUIET, "NCCL_DEBUG": "INFO", "TRANSFORMERS_VERBOSITY": "info"}


def test_a_run_on_gpus_tells_every_variable_that_counts_and_whose_it_is():
    environment = {"NCCL_SOCKET_IFNAME": "eth0", "HOME": "/home/me", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    set_environment(environment)
    assert describe_environment(environment, on_gpu=True) == (
        "CUDA_DEVICE_MAX_CONNECTIONS=8 (yours), NCCL_DEBUG=WARN, NCCL_SOCKET_IFNAME=eth0 (yours)"
    )


def test_a_run_on_cpu_tells_its_threads_and_nothing_of_cuda():
    environment = {"OMP_NUM_THREADS": "1", **RUN}
    assert describe_environment(environment, on_gpu=False) == "OMP_NUM_THREADS=1"
    assert describe_environment(RUN, on_gpu=False) == ""
