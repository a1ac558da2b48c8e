"""Every place of rlinf/ that does something else on a GPU has a test here."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BY_FILE = {  # file of rlinf/ -> function -> test
    "checks/acceptance_parts.py": {"kind": "toolkits/gpu_acceptance.sh"},
    "checks/doctor.py": {"collectives": "test_the_collectives_library_sums", "examine": "toolkits/gpu_acceptance.sh"},
    "cluster/local_cluster.py": {"LocalCluster.__init__": "test_one_process_takes_the_device_that_is_there"},
    "cluster/machines.py": dict.fromkeys(("", "wait_for_machines"), "test_a_ray_worker_sees_its_own_gpu_alone"),
    "cluster/ray_check.py": {"gpus_or_slots": "test_devices_are_gpus_where_a_node_has_any"},
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
        "recorder": "test_a_profile_has_the_kernels_of_the_device",
    },
    "hardware.py": {"fast_precision": "test_auto_is_the_device_of_this_machine"},
    "rollout/linear.py": {"head": "test_an_engine_on_the_same_device_runs_the_actors_weights"},
    "rollout/sglang_engine.py": {
        "SGLangEngine.join": "test_a_server_joins_the_group_of_a_publisher_on_another_gpu",
        "SGLangEngine.start_trace": "test_a_trace_of_a_server_has_the_kernels_of_the_device",
    },
    "launch/train.py": {"launch_workers": "toolkits/gpu_acceptance.sh"},
    "training/attention.py": {
        "PackedAttention._attend": "test_a_shared_prompt_gives_what_copies_give",
        "_takes_groups": "test_the_plan_of_a_ranks_memory_is_its_peak",
    },
    "training/logprobs.py": dict.fromkeys(("_TargetLogprobs.forward", "_fused"), "test_chunks_of_logits_do_not_change_the_head"),
    "training/model.py": {"layer_implementation": "test_transformer_engines_layers_give_what_the_local_ones_give"},
    "training/offload.py": {"Offloader.__init__": "test_offloading_frees_the_device_and_training_does_not_notice"},
    "weights/broadcast.py": {"make_process_group": "test_a_publisher_broadcasts_from_its_device"},
    "workers/token_reward.py": {"TokenRewardWorker.hand_over": "test_a_token_reward_model_is_parked_while_it_does_not_score"},
    "workers/device.py": {"peak_flops": "test_peak_operations_are_those_of_the_data_sheet"},
    "training/parallel.py": {
        "initialize": "test_a_step_in_16_bits_is_close_to_the_one_in_fp32",
        "wait_for_all": "test_a_checkpoint_is_saved_and_loaded",
    },
}


def places(file: Path) -> set[str]:
    """Functions and classes that name CUDA, NCCL or Ray's GPU resource."""
    found: set[str] = set()

    def walk(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            here = f"{name}.{child.name}".lstrip(".") if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else name
            word = isinstance(child, ast.Constant) and child.value in ("cuda", "nccl", "GPU")
            if word or (isinstance(child, ast.Attribute) and (child.attr in ("is_cuda", "CUDA") or ast.unparse(child) == "torch.cuda")):
                found.add(here)
            walk(child, here)

    walk(ast.parse(file.read_text()), "")
    return found


def test_every_place_that_names_cuda_has_a_test_on_a_gpu() -> None:
    files = [f for f in (ROOT / "rlinf").rglob("*.py") if not f.name.endswith("_test.py")]
    here = {str(f.relative_to(ROOT / "rlinf")): found for f in files if (found := places(f))}
    assert {file: set(tests) for file, tests in BY_FILE.items()} == here
    tests = "".join(f.read_text() for f in Path(__file__).parent.glob("test_*.py"))
    for name in {test for tests in BY_FILE.values() for test in tests.values()}:
        assert (ROOT / name).is_file() if "/" in name else f"def {name}(" in tests, f"no test {name}"
