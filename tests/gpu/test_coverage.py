"""Every place of rlinf/ that does something else on a GPU has a test that runs on one, or, where a setting says so and no device is
touched, a test that runs both ways on any machine."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BY_FILE = {  # file of rlinf/ -> function -> test
    "checks/acceptance_parts.py": {"kind": "toolkits/gpu_acceptance.sh"},
    "checks/doctor.py": {"collectives": "test_the_collectives_library_sums", "examine": "toolkits/gpu_acceptance.sh"},
    "cluster/host.py": {"seat_environment": "test_a_ray_worker_sees_its_own_gpu_alone"},
    "cluster/ray_session.py": {"RaySession.start": "test_a_ray_worker_sees_its_own_gpu_alone"},
    "cluster/local_cluster.py": {"LocalCluster.__init__": "test_one_process_takes_the_device_that_is_there"},
    "cluster/machines.py": dict.fromkeys(("", "wait_for_machines"), "test_a_ray_worker_sees_its_own_gpu_alone"),
    "cluster/ray_cluster.py": dict.fromkeys(
        ("RayCluster._actor", "RayCluster._connect", "RayCluster._reserve"), "test_a_ray_worker_sees_its_own_gpu_alone"
    ),
    "config/schema.py": {"ClusterConfig": "test_one_process_takes_the_device_that_is_there"},
    "device.py": {
        "choose": "test_auto_is_the_device_of_this_machine",
        "usable": "test_auto_is_the_device_of_this_machine",
        "synchronize": "test_memory_of_a_tensor_is_seen_and_given_back",
        "give_back_free_memory": "test_memory_of_a_tensor_is_seen_and_given_back",
        "memory_in_use": "test_memory_of_a_tensor_is_seen_and_given_back",
        "peak_memory": "test_memory_of_a_tensor_is_seen_and_given_back",
        "forget_peak": "test_memory_of_a_tensor_is_seen_and_given_back",
        "host_copy": "test_a_host_copy_is_complete_and_pinned_where_a_gpu_writes_it",
        "limit_memory": "test_beyond_its_share_a_process_fails",
        "gpu_count": "test_the_gpu_says_who_it_is",
        "gpu_memory": "test_the_gpu_says_who_it_is",
        "gpu_name": "test_the_gpu_says_who_it_is",
        "free_gpu_memory": "test_the_gpu_says_who_it_is",
        "nccl_version": "test_the_gpu_says_who_it_is",
        "_uuid": "test_another_process_sees_the_buckets_of_this_one",
        "open_shared": "test_another_process_sees_the_buckets_of_this_one",
        "recorder": "test_a_profile_has_the_kernels_of_the_device",
    },
    "hardware.py": {"fast_precision": "test_auto_is_the_device_of_this_machine"},
    "kernels/cpu.py": {"kernels_for": "test_a_step_in_16_bits_is_close_to_the_one_in_fp32"},
    "rollout/linear.py": dict.fromkeys(
        ("head", "linear", "grouped", "uses_weight_in_place"), "test_an_engine_on_the_same_device_runs_the_actors_weights"
    ),
    "rollout/sglang_engine.py": {
        "SGLangEngine.__init__": "test_a_sleeping_server_gives_its_memory_back_and_wakes_the_same",
        "SGLangEngine.join": "test_a_server_joins_the_group_of_a_publisher_on_another_gpu",
        "SGLangEngine.start_trace": "test_a_trace_of_a_server_has_the_kernels_of_the_device",
    },
    "launch/train.py": {"launch_workers": "toolkits/gpu_acceptance.sh"},
    "training/attention.py": {
        "PackedAttention._attend": "test_a_shared_prompt_gives_what_copies_give",
        "_takes_groups": "test_the_plan_of_a_ranks_memory_is_its_peak",
    },
    "scheduling/memory.py": dict.fromkeys(
        ("rank_memory", "layer_activations", "stage_activations", "head_memory", "logits_chunk"),
        "test_the_plan_of_a_ranks_memory_is_its_peak",
    ),
    "training/gradients.py": {"add_to": "test_a_step_in_16_bits_is_close_to_the_one_in_fp32"},
    "training/logprobs.py": dict.fromkeys(("_TargetLogprobs.forward", "_fused", "_blocks"), "test_chunks_of_logits_do_not_change_the_head"),
    "training/model.py": {"layer_implementation": "test_transformer_engines_layers_give_what_the_local_ones_give"},
    "training/offload.py": {"Offloader.__init__": "test_offloading_frees_the_device_and_training_does_not_notice"},
    "weights/broadcast.py": {"make_process_group": "test_a_publisher_broadcasts_from_its_device"},
    "weights/device_ipc.py": {"DeviceBuckets._allocate": "test_another_process_sees_the_buckets_of_this_one"},
    "weights/finite.py": {"finite": "test_another_process_sees_the_buckets_of_this_one"},
    "weights/scan.py": {
        "fill_and_scan": "test_an_engine_on_the_same_device_runs_the_actors_weights",
        "checksums": "test_a_checksum_makes_no_copy_of_the_bucket",
    },
    "workers/token_reward.py": {"TokenRewardWorker.hand_over": "test_a_token_reward_model_is_parked_while_it_does_not_score"},
    "workers/device.py": {"peak_flops": "test_peak_operations_are_those_of_the_data_sheet"},
    "training/parallel.py": {
        "initialize": "test_a_step_in_16_bits_is_close_to_the_one_in_fp32",
        "wait_for_all": "test_a_checkpoint_is_saved_and_loaded",
    },
}

BY_SETTING = {  # the same, of what a setting or an argument decides: test files stand beside the code
    "checks/doctor.py": {
        "devices": "doctor_test.py::test_devices",
        "sglang": "doctor_test.py::test_sglang_that_is_not_there_is_installed_in_the_way_of_the_device",
    },
    "checks/plan.py": {"choose_device": "plan_test.py::test_a_plan_is_for_the_device_of_the_configuration_unless_one_is_named"},
    "checks/preflight.py": {"check_engine": "preflight_test.py::test_a_run_on_one_machine_needs_its_engine_before_it_starts"},
    "checks/toolchain.py": {"python": "toolchain_test.py::test_a_python_without_wheels_is_found"},
    "cluster/ray_check.py": {"counted": "ray_check_test.py::test_slots_do_not_pass_for_gpus"},
    "config/validate.py": {"_layout": "validate_test.py::test_transformer_engine_is_refused_for_the_cpu_alone"},
    "rollout/sglang_engine.py": {
        "small_cache": "sglang_engine_test.py::test_a_cache_too_small_for_a_sample_is_named_with_the_key_of_its_size"
    },
    "rollout/sglang_environment.py": {
        "server_environment": "sglang_environment_test.py::test_an_engine_starts_on_gpus_of_which_an_actor_holds_unequal_parts"
    },
    "rollout/sglang_options.py": {
        "ServerSettings.options": "sglang_options_test.py::test_every_step_of_a_full_engine_on_a_gpu_has_a_graph_and_no_prefill_has",
        "check": "sglang_options_test.py::test_fp32_on_a_gpu_wants_an_attention_that_takes_it",
    },
    "rollout/sglang_server.py": {"find_interpreter": "/tests/test_sglang.py::test_a_missing_environment_is_named_with_its_remedy"},
    "scheduling/memory.py": {"engine_memory": "memory_test.py::test_the_kv_cache_of_an_engine"},
    "scheduling/placement.py": {"build_plan": "placement_test.py::test_what_components_that_share_a_gpu_cannot_do_is_refused"},
    "workers/actor.py": {
        "ActorWorker.train_step": "actor_test.py::test_what_engines_read_is_freed_while_the_actor_trains_where_that_is_the_memory_to_save"
    },
}


def places(file: Path) -> set[str]:
    """Functions and classes that name CUDA, NCCL or Ray's GPU resource, compare with "cpu", or ask whether there is a GPU."""
    found: set[str] = set()

    def walk(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            here = f"{name}.{child.name}".lstrip(".") if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else name
            if names_a_gpu(child):
                found.add(here)
            walk(child, here)

    walk(ast.parse(file.read_text()), "")
    return found


def names_a_gpu(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return node.value in ("cuda", "nccl", "GPU")
    if isinstance(node, ast.Attribute):
        return node.attr in ("cuda", "is_cuda", "is_cpu", "CUDA")
    if isinstance(node, ast.Compare):
        return any(isinstance(side, ast.Constant) and side.value == "cpu" for side in (node.left, *node.comparators))
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).rpartition(".")[2] in ("has_gpu", "gpu_count")
    return isinstance(node, ast.Name) and node.id in ("cuda", "gpu") and isinstance(node.ctx, ast.Load)


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ('x.device.type == "cuda"', True), ('x.device.type != "cpu"', True), ('"cpu" == kind', True), ("x.is_cuda", True),
        ("not x.is_cpu", True), ("torch.cuda.empty_cache()", True), ("setup.cuda", True), ("hardware.has_gpu()", True),
        ("1 if gpu else 2", True), ('x.to("cpu")', False), ("kinds.cudas", False), ('device == "disk"', False), ("gpu = 3", False),
    ],
)  # fmt: skip
def test_the_finder_sees_every_way_to_ask(tmp_path: Path, code: str, seen: bool) -> None:
    (tmp_path / "file.py").write_text(f"class Some:\n    def method(self):\n        {code}\n")
    assert places(tmp_path / "file.py") == ({"Some.method"} if seen else set())


def test_every_place_that_names_cuda_has_a_test_on_a_gpu() -> None:
    files = [f for f in (ROOT / "rlinf").rglob("*.py") if not f.name.endswith("_test.py")]
    here = {(str(f.relative_to(ROOT / "rlinf")), place) for f in files for place in places(f)}
    on_gpu, by_setting = ({(file, place) for file, tests in table.items() for place in tests} for table in (BY_FILE, BY_SETTING))
    assert on_gpu | by_setting == here and not on_gpu & by_setting
    tests = "".join(f.read_text() for f in Path(__file__).parent.glob("test_*.py"))
    for name in {test for tests in BY_FILE.values() for test in tests.values()}:
        assert (ROOT / name).is_file() if "/" in name else f"def {name}(" in tests, f"no test {name}"
    for code, named in BY_SETTING.items():
        for where, _, name in (test.partition("::") for test in named.values()):
            file = ROOT / where[1:] if where.startswith("/") else (ROOT / "rlinf" / code).parent / where
            assert f"def {name}(" in file.read_text(), f"no test {name} in {file}"
