"""Every check of the doctor with its fault planted: what it says, and whether it is fatal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from rlinf.checks import doctor
from rlinf.checks.doctor import FAIL, GIB, OK, WARN, Finding
from rlinf.cli import main
from rlinf.cluster.node_probe import NodeView, SilentNode
from rlinf.config.load import load


def told(findings: Iterable[Finding] | Finding) -> list[tuple[str, str]]:
    found = [findings] if isinstance(findings, Finding) else list(findings)
    assert all(bool(f.remedy) == (f.status != OK) for f in found)  # whatever is not well comes with a remedy
    return [(f.check, f.status) for f in found]


def test_pins_are_those_of_the_requirements() -> None:
    base, gpu = doctor.pins("base"), doctor.pins("gpu")
    assert base["megatron-core"] == "0.16.1" and base["ray"] == "2.60.0" and base["numpy"].startswith("2.")
    assert set(gpu) == {"sglang", "transformer-engine", "ray"} and gpu["ray"] == base["ray"]


def test_packages_off_their_pins_are_named_and_some_are_fatal() -> None:
    wanted = {"ray": "2.60.0", "rich": "15.0.0", "torch": "2.13.0", "sglang": "0.5.21", "omegaconf": "2.3.0"}
    there = {"ray": "2.59.0", "rich": "14.0.0", "torch": "2.13.0+cpu"}
    found = list(doctor.packages(wanted, there.get))
    assert told(found) == [("ray", FAIL), ("rich", WARN), ("sglang", WARN), ("omegaconf", FAIL), ("packages", OK)]
    assert found[0].text.startswith("2.59.0 is installed, the pin is 2.60.0") and "pip install 'ray==2.60.0'" in found[0].remedy
    assert found[-1].text == "1 of 5 at their pins"


@pytest.mark.parametrize(
    ("wanted", "present", "usable", "cuda", "driver", "expected"),
    [
        (False, False, False, None, None, ("gpu", OK)),
        (True, False, False, "13.0", None, ("gpu", FAIL)),
        (True, True, False, None, "580.65.06", ("gpu", FAIL)),
        (True, True, False, "13.0", "570.86.15", ("driver", FAIL)),
        (True, True, False, "13.0", "580.65.06", ("gpu", FAIL)),
    ],
    ids=["cpu", "no gpu", "cpu torch", "old driver", "hidden"],
)
def test_devices(wanted: bool, present: bool, usable: bool, cuda: str | None, driver: str | None, expected: tuple[str, str]) -> None:
    assert told(doctor.devices(wanted, present, usable, cuda, driver)) == [expected]


@pytest.mark.parametrize(
    ("finding", "status"),
    [
        (doctor.enough_gpus(4, 8), FAIL),
        (doctor.enough_gpus(8, 8), OK),
        (doctor.shared_memory(64 << 20, 0), FAIL),  # Docker's default
        (doctor.shared_memory(4 * GIB, 3 * GIB), FAIL),
        (doctor.shared_memory(8 * GIB, 3 * GIB), OK),
        (doctor.disk(Path("/x"), 100 << 20, 0), FAIL),
        (doctor.disk(Path("/x"), 50 * GIB, 60 * GIB), FAIL),
        (doctor.disk(Path("/x"), 5 * GIB, 0), WARN),
        (doctor.disk(Path("/x"), 500 * GIB, 60 * GIB), OK),
        (doctor.open_files(256, 1), FAIL),
        (doctor.open_files(4096, 16), WARN),
        (doctor.open_files(4096, 1), OK),
        (doctor.open_files(1 << 20, 16), OK),
        (doctor.open_files(-1, 16), OK),  # unlimited
        (doctor.locked_memory(65536), WARN),
        (doctor.ephemeral_ports("1024 65535\n"), WARN),
        (doctor.ephemeral_ports("32768\t60999\n"), OK),
    ],
)
def test_limits_of_the_machine(finding: Finding, status: str) -> None:
    assert told(finding) == [(finding.check, status)]


def test_code_that_was_not_compiled_is_found_where_it_could_run() -> None:
    avx2, avx512 = {"avx2", "fma"}, {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
    assert doctor.compiled_code(avx512, "avx512").text == "for avx512" and doctor.compiled_code(avx2, "avx2").text == "for avx2"
    missing, older = doctor.compiled_code(avx2, None), doctor.compiled_code(avx512, "avx2")
    assert missing.status == WARN and "C compiler" in missing.remedy
    assert older.status == WARN and "for avx2, while this CPU could have avx512" in older.text
    assert doctor.compiled_code({"asimd"}, None).status == OK


def test_a_folder_that_cannot_be_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(doctor.writable(tmp_path / "not" / "yet")) == [("output folder", OK)]
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    assert told(doctor.writable(tmp_path / "not" / "yet")) == [("output folder", FAIL)]


def test_a_dead_cluster_and_a_taken_port_are_found(tmp_path: Path) -> None:
    assert told(doctor.ray_node(tmp_path, lambda _: False)) == [("ray", OK)]
    assert told(doctor.ray_node(tmp_path, lambda address: address.startswith("127."))) == [("ray", WARN)]
    (tmp_path / "address").write_text("10.0.0.9:6379")
    (tmp_path / "rank").write_text("2")
    assert told(doctor.ray_node(tmp_path, lambda _: True)) == [("ray", OK)]
    dead = doctor.ray_node(tmp_path, lambda _: False)
    assert told(dead) == [("ray", FAIL)] and "node 2 of a cluster at 10.0.0.9:6379" in dead.text


def test_clocks_and_the_shared_folder_of_every_node() -> None:
    views = [
        NodeView("0", "10.0.0.1", 0.0, 0.01, True),
        NodeView("1", "10.0.0.2", -5.0, 0.2, True),
        NodeView("2", "10.0.0.3", 3600.0, 0.2, False),
        SilentNode("3", "10.0.0.4", "did not answer within 60 s"),
    ]
    found = list(doctor.cluster(views))
    assert told(found) == [
        ("clock", OK),
        ("shared folder", OK),
        ("clock", WARN),
        ("shared folder", OK),
        ("clock", FAIL),
        ("shared folder", FAIL),
        ("node", FAIL),
    ]
    assert found[-1].text == "node 3 (10.0.0.4) did not answer within 60 s"
    assert "node 1 (10.0.0.2) is off by -5.0 s" in found[2].text


def test_missing_files_of_a_configuration_are_found() -> None:
    config = load(
        "smollm2-135m-grpo-cpu", ["rollout.model_dir=/nowhere", "data.train_data_paths=[/nowhere/a.jsonl]", "data.val_data_paths=[]"]
    ).config
    found = list(doctor.files(config))
    assert told(found) == [("files", FAIL), ("files", FAIL)]
    assert "/nowhere/a.jsonl" in found[1].text


def test_a_model_that_does_not_fit_the_configuration_is_found_although_it_is_elsewhere() -> None:
    config = load("qwen2.5-1.5b-grpo-megatron", ["rollout.model_dir=/nowhere/DeepSeek-R1-Distill-Qwen-1.5B"]).config
    config.actor.model.tensor_model_parallel_size = 8
    found = next(f for f in doctor.files(config))
    assert told(found) == [("model", FAIL)] and "does not divide the model's 12 attention heads" in found.text


def test_a_configuration_that_cannot_be_run_is_found(tmp_path: Path) -> None:
    assert told(doctor.configuration(load("smollm2-135m-grpo-cpu", []))) == [("configuration", OK)]
    assert told(doctor.configuration(load("smollm2-135m-sft-cpu", []))) == [("configuration", OK)]
    found = doctor.configuration(load("smollm2-135m-grpo-cpu", ["algorithm.group_size=1"]))
    assert told(found) == [("configuration", FAIL)] and "algorithm.group_size" in found.text
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    strange = load("smollm2-135m-grpo-cpu", [f"rollout.model_dir={tmp_path}"]).config
    assert doctor._parameters(strange) == 0
    assert any(f"{tmp_path}/config.json: unknown architecture" in f.text for f in doctor.files(strange))
    (tmp_path / "config.json").write_text("{oops")
    assert doctor._parameters(strange) == 0 and any(f"{tmp_path}/config.json:1: not valid JSON" in f.text for f in doctor.files(strange))


def test_a_recipe_for_gpus_where_none_is_seen_and_sglang_that_is_not_there_are_found(tmp_path: Path) -> None:
    recipe = load("qwen2.5-1.5b-grpo-megatron", []).config
    assert told(doctor.unseen_gpus(recipe, present=False)) == [("gpu", WARN)] and told(doctor.unseen_gpus(recipe, present=True)) == []
    laptop = load("smollm2-135m-grpo-cpu", []).config
    assert told(doctor.unseen_gpus(laptop, present=False)) == told(doctor.sglang(laptop, False)) == []
    assert told(doctor.sglang(load("smollm2-135m-sft-cpu").config, False)) == []  # has no engine
    named = load("smollm2-135m-grpo-cpu", ["rollout.rollout_backend=sglang", f"rollout.sglang_python={tmp_path}/nope"]).config
    (found,) = doctor.sglang(named, False)
    assert told([found]) == [("sglang", FAIL)] and "rollout.sglang_python" in found.text


@pytest.mark.parametrize(("cuda", "remedy"), [(False, "toolkits/setup/sglang_cpu.sh"), (True, "requirements/gpu.txt")])
def test_sglang_that_is_not_there_is_installed_in_the_way_of_the_device(
    cuda: bool, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("RLINF_CACHE", str(tmp_path))
    (found,) = doctor.sglang(load("smollm2-135m-grpo-cpu", ["rollout.rollout_backend=sglang"]).config, cuda)
    assert told([found]) == [("sglang", FAIL)] and remedy in found.text


def test_gloo_works_here() -> None:
    assert told(doctor.collectives(False)) == [("gloo", OK)]


def test_the_exit_code_says_whether_something_failed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda _: iter([Finding("a", OK, "well"), Finding("b", WARN, "so so", "fix it")]))
    assert main(["doctor"]) == 0
    assert "WARN  b              so so" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda _: iter([Finding("c", FAIL, "broken", "replace it")]))
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == [{"check": "c", "status": "FAIL", "text": "broken", "remedy": "replace it"}]


def test_this_machine_is_examined_from_end_to_end(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLINF_RAY_STATE", str(tmp_path / "none"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    main(["doctor", "smollm2-135m-grpo-cpu", "--json", f"runner.output_dir={tmp_path}"])
    found = {f["check"]: f["status"] for f in json.loads(capsys.readouterr().out)}
    assert {
        "python",
        "packages",
        "gpu",
        "gloo",
        "/dev/shm",
        "disk",
        "output folder",
        "file locks",
        "proxy",
        "ulimit",
        "ports",
        "ray",
        "files",
    } <= set(found)
    assert found["gloo"] == found["output folder"] == found["ray"] == OK
