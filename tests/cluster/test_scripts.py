"""What starts a run elsewhere: each kind checked by its own tool or schema, and run as far as that can be done here."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from workbench import Run, TrainConfig, train
from workbench.cli import main
from workbench.cluster import CLUSTERS, Kubernetes, Slurm, Torchrun, launch_script
from workbench.cluster.kubernetes import job_name
from workbench.errors import ConfigError, RunError

NET = Path(__file__).parents[1] / "training" / "net.py"
CONFIG = TrainConfig(
    data={"name": "digits", "limit": 256, "batch_size": 32},
    model={"name": f"{NET}:net", "args": {"dropout": 0.0}},
    epochs=3,
    device="cpu",
    log_every=1,
    checkpoint={"every_steps": 2},
)


def bash(script: str) -> None:
    """Fail unless bash can parse it."""
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


# -- torchrun ------------------------------------------------------------------------------------------------------------


def test_torchruns_own_parser_takes_the_command_of_every_host() -> None:
    from torch.distributed.run import config_from_args, parse_args

    given = {"nproc": 4, "hosts": 2, "min_hosts": 1, "addresses": ("alpha", "10.0.0.7"), "restarts": 5}
    made = launch_script(CONFIG, Torchrun(**given, directory="/a b", environment={"NCCL_DEBUG": "INFO 'x'"}))
    bash(made.text)
    first, second = made.text.replace("\\\n", " ").split("\n\n")
    assert first.startswith("# on alpha") and second.startswith("# on 10.0.0.7")
    for text in (first, second):
        place, *exports, command = text.splitlines()[1].split(" && ")
        assert shlex.split(place) == ["cd", "/a b"]
        assert ["export", "NCCL_DEBUG=INFO 'x'"] in [shlex.split(line) for line in exports]
        config, _, worker = config_from_args(parse_args(shlex.split(command)[1:]))
        assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (1, 2, 4, 5)
        assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", "alpha:29400", Run.open(made.folder).id)
        assert worker[-3:] == ["-m", "workbench.worker", made.folder]


# -- Slurm ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """What sbatch says of a script: it parses every option before it asks the controller, of which there is none here."""
    if shutil.which("sbatch") is None:
        pytest.skip("there is no sbatch (Debian: slurm-client)")
    conf = "ClusterName=none\nSlurmctldHost=localhost\nGresTypes=gpu\nAuthType=auth/none\nCredType=cred/none\nMessageTimeout=1\n"
    (tmp_path / "slurm.conf").write_text(conf)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))

    def say(script: str) -> str:
        return subprocess.run(["sbatch", "--test-only"], input=script, text=True, capture_output=True, timeout=60).stderr

    return say


FULL = {
    "partition": "gpu,long",
    "account": "lab",
    "qos": "high",
    "gpu": "h100",
    "memory_gib": 900,
    "hours": 30.5,
    "directory": "/home/a b",
    "setup": ("module load cuda",),
}


@pytest.mark.parametrize("settings", [{}, FULL, {"requeue": False}])
def test_sbatch_takes_every_option(settings: dict[str, Any], sbatch: Callable[[str], str]) -> None:
    config = CONFIG.override({"device": "auto"})
    script = launch_script(config, Slurm(nproc=8, hosts=2, **settings)).text
    bash(script)
    said = sbatch(script)
    assert "Unable to contact slurm controller" in said and len(said.splitlines()) == 1, said
    assert "unrecognized option" in sbatch(script.replace("#SBATCH --mem", "#SBATCH --memory"))
    assert "Invalid" in sbatch(script.replace("#SBATCH --time=", "#SBATCH --time=x"))


def test_a_batch_script_asks_for_what_its_config_says() -> None:
    config = CONFIG.override({"device": "auto"})
    made = launch_script(config, Slurm(nproc=8, hosts=2, **FULL))
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in made.text.splitlines() if "#SBATCH" in line)
    expected = {"nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "h100:8", "cpus-per-task": "64", "mem": "900G"}
    assert expected.items() <= asked.items()
    assert asked["time"] == "1-06:30:00" and asked["partition"] == "gpu,long" and asked["chdir"] == "'/home/a b'"
    assert asked["output"] == f"{made.folder}/logs/slurm-%j.log" and asked["signal"] == "B:USR1@300"
    on_cpus = launch_script(CONFIG, Slurm(requeue=False)).text
    assert "gpus" not in on_cpus and "scontrol requeue" not in on_cpus and "--no-requeue" in on_cpus


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of a batch script on two hosts that are both this machine."""
    tools = {
        "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi',
        "srun": 'shift; for host in 1 2; do "$@" & done; wait %1; one=$?; wait %2 && exit $one',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run --local-addr=localhost "$@"',
        "workbench": f'exec {sys.executable} -m workbench.cli "$@"',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o700)
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[2])}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2", "REQUEUED": str(tmp_path / "requeued")}
    before = psutil.Process().children(recursive=True)
    yield os.environ | here | job
    for process in psutil.Process().children(recursive=True):
        if process not in before:
            process.kill()


def test_two_hosts_train_one_run_and_stop_at_the_time_limit(
    node: dict[str, str], until: Callable[..., Any], tmp_path: Path, free_port: int
) -> None:
    """The batch script itself, under bash, with torchrun's own agents: the losses are those of one process."""
    alone = train(CONFIG).run
    config = CONFIG.override({"model.args": {"dropout": 0.0, "pause": 0.2}})
    made = launch_script(config, Slurm(hosts=2, restarts=3, port=free_port))
    run = Run.open(made.folder)
    (tmp_path / "job.sh").write_text(made.text)
    with (tmp_path / "job.log").open("wb") as log:
        job = subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=node, stdout=log, stderr=log, cwd=tmp_path)
    try:
        until(lambda: (run.progress.step > 4 and run.checkpoints) or job.poll() is not None, 120)
        hosts = [p for p in psutil.Process(job.pid).children(recursive=True) if "torch.distributed.run" in p.cmdline()]
        assert len(hosts) == 2 and [len(host.children()) for host in hosts] == [1, 1]
        psutil.Process(job.pid).send_signal(10)  # the time limit is near
        job.wait(timeout=120)
    finally:
        job.kill()
        job.wait()
        print((tmp_path / "job.log").read_text())
    assert run.status == "stopped" and (tmp_path / "requeued").read_text() == "requeue 7\n"
    done = len(run.history)
    assert 4 < done < len(alone.history) and run.history["step"].tolist() == list(range(1, done + 1))
    assert abs(run.history["loss"] - alone.history["loss"][:done]).max() < 1e-5


# -- Kubernetes ----------------------------------------------------------------------------------------------------------


def manifests(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    config_map, job = yaml.safe_load_all(text)
    return config_map, job


WIDE = {
    "namespace": "team",
    "claim": "disk",
    "queue": "gpus",
    "account": "trainer",
    "pull_secret": "registry",
    "node_selector": {"gpu": "h100"},
    "hours": 12,
    "min_hosts": 1,
    "environment": {"NCCL_DEBUG": "INFO"},
}


@pytest.mark.parametrize("settings", [{}, WIDE])
def test_manifests_fit_the_schemas_of_their_kinds(settings: dict[str, Any]) -> None:
    """The PyTorchJob its custom resource's schema, pods and ConfigMap those of Kubernetes."""
    import jsonschema

    kubernetes = pytest.importorskip("kubernetes_validate")
    config = CONFIG.override({"device": "auto"})
    config_map, job = manifests(launch_script(config, Kubernetes(nproc=8, hosts=2, **settings)).text)
    schema = json.loads((Path(__file__).parent / "pytorchjob.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(job, schema)
    kubernetes.validate(config_map, "1.31", strict=True)
    template = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    metadata = {"name": "worker", **template["metadata"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {**template["spec"], "restartPolicy": "OnFailure"}}
    kubernetes.validate(pod, "1.31", strict=True)

    wrong = json.loads(json.dumps(job))
    wrong["spec"]["elasticPolicy"]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)
    pod["spec"]["containers"][0]["ports"] = [{"containerPort": "x"}]
    with pytest.raises(kubernetes.ValidationError):
        kubernetes.validate(pod, "1.31", strict=True)


def test_a_job_asks_for_what_its_config_says() -> None:
    config = CONFIG.override({"device": "auto"})
    made = launch_script(config, Kubernetes(nproc=8, hosts=2, cpus=4, memory_gib=500, **WIDE))
    config_map, job = manifests(made.text)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus" and job["metadata"]["namespace"] == "team"
    assert (job["spec"]["elasticPolicy"]["minReplicas"], job["spec"]["elasticPolicy"]["maxReplicas"]) == (1, 2)
    assert job["spec"]["runPolicy"]["activeDeadlineSeconds"] == 12 * 3600
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"cpu": 32, "memory": "500Gi", "nvidia.com/gpu": 8}
    assert container["command"] == ["torchrun", "-m", "workbench.worker", made.folder, "--given", "/etc/workbench"]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    assert {item["key"] for item in pod["volumes"][1]["configMap"]["items"]} == set(config_map["data"])
    assert not Path(made.folder).exists() and not list(Path(os.environ["WORKBENCH_RUNS"]).glob("*"))


def test_pods_make_the_run_folder_of_what_they_are_given(tmp_path: Path) -> None:
    """The container's command, without its torchrun, where the ConfigMap is mounted as Kubernetes does."""
    made = launch_script(CONFIG.override({"max_steps": 3}), Kubernetes(mount=str(tmp_path / "volume")))
    config_map, job = manifests(made.text)
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    for item in pod["volumes"][1]["configMap"]["items"]:
        hidden, shown = tmp_path / "given" / "..data" / item["path"], tmp_path / "given" / item["path"]
        for path in (hidden, shown):
            path.parent.mkdir(parents=True, exist_ok=True)
        hidden.write_text(config_map["data"][item["key"]])
        shown.symlink_to(hidden)
    (tmp_path / "volume").mkdir()
    command = [sys.executable, *pod["containers"][0]["command"][1:-1], str(tmp_path / "given")]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, check=True, timeout=120)
    run = Run.open(made.folder)
    assert run.status == "finished" and run.config.model.name.endswith(":net") and not list(run.path.rglob("..*"))
    assert not any(path.is_symlink() for path in run.path.rglob("*"))


def test_names_of_jobs_are_names_of_services(tmp_path: Path) -> None:
    run = Run.create(CONFIG, label="A_very.long-" + "label" * 12, root=tmp_path)
    assert len(f"{job_name(run)}-worker-99999") <= 63 and job_name(run).startswith("wb-20")
    assert set(job_name(run)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_run_too_large_for_its_manifest_is_refused() -> None:
    import torch

    with pytest.raises(RunError, match=r"a ConfigMap holds 1,000,000; the largest file is source/.*volume"):
        launch_script(CONFIG, Kubernetes(), model=torch.nn.Linear(1000, 1000))


# -- all -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLUSTERS)
def test_the_command_line_prints_it(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIG.to_yaml(tmp_path / "config.yaml")
    arguments = ["launch", str(tmp_path / "config.yaml"), "--nproc", "2", "--hosts", "2", "--print", kind]
    assert main([*arguments, "--cluster", "port=23456", "--set", "epochs=5"]) == 0
    said = capsys.readouterr()
    folder = said.err.removeprefix("The run folder: ").strip()
    assert folder in said.out and "workbench.worker" in said.out and "23456" in said.out
    if kind != "kubernetes":
        assert Run.open(folder).config.epochs == 5 and Run.open(folder).status == "created"
    assert main([*arguments, "--cluster", "partitoin=gpu"]) == 2
    assert f"not a setting of {CLUSTERS.factory(kind).__name__}" in capsys.readouterr().err
    assert main([*arguments[:-1], "slrm"]) == 2
    assert "slurm" in capsys.readouterr().err


def test_settings_that_cannot_be_are_refused() -> None:
    for kind, settings, words in (
        (Torchrun, {"hosts": 2, "addresses": ("one",)}, "hosts=2 but there are 1 addresses"),
        (Torchrun, {"min_hosts": 3, "hosts": 2}, "min_hosts=3 must be at most"),
        (Torchrun, {"environment": {"A B": "1"}}, "'A B' is no name of an environment variable"),
        (Slurm, {"partition": "gpu; rm -rf ~"}, "partition"),
        (Slurm, {"setup": ("two\nlines",)}, "setup"),
        (Kubernetes, {"shared_gib": 65}, "shared_gib=65 must be at most memory_gib=64"),
        (Kubernetes, {"namespace": "Team"}, "namespace"),
    ):
        with pytest.raises(ConfigError, match=words):
            kind(**settings)
    with pytest.raises(ConfigError, match="batch_size=32 does not divide into 3 ranks"):
        launch_script(CONFIG, Torchrun(nproc=3))
    with pytest.raises(ConfigError, match="mesh"):
        launch_script(CONFIG.override({"mesh.replicate": 2, "mesh.shard": 1}), Torchrun(nproc=4))
