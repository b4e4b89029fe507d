"""Runs of several processes: the losses of one process, one line for every failure, and nothing overwritten."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anymamba.base.schema import config_to_dict
from anymamba.cli.app import main
from anymamba.data.batches import Batch
from anymamba.data.dna import DnaTokenizer
from anymamba.models.language_model import LanguageModel
from anymamba.training.checkpoint import checkpoints, load_checkpoint
from anymamba.training.config import ParallelConfig, TrainConfig
from anymamba.training.masking import Masking
from anymamba.training.metrics import read_metrics
from anymamba.training.parallel.rows import rows_of_batch
from anymamba.training.trainer import resume, train
from tests.training.parallel import cases
from tests.training.parallel.ranks import Job, Pool, free_port

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, batch_size=4, accumulation=2, steps=6, checkpoint_every=3, log=())


@pytest.fixture
def one(config: TrainConfig, tmp_path: Path) -> Path:
    """The run of one process."""
    train(config, tmp_path / "one")
    return tmp_path / "one"


@pytest.fixture
def config_file(config: TrainConfig, tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_to_dict(dataclasses.replace(config, sample_tokens=0))))
    return path


def losses(run: Path) -> dict[str, float]:
    """The numbers of metrics.jsonl that must not depend on the processes, by step, kind and name."""
    return {
        f"{line['step']} {line['kind']} {name}": line[name]
        for line in read_metrics(run)
        for name in ("nats_per_token", "gradient_norm", "learning_rate")
        if name in line
    }


@pytest.mark.parametrize(
    "sizes",
    [{"dp_shard": 2}, {"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "cp": 2}],
    ids=["dp 2", "dp 2 x 2", "dp 2 x cp 2"],
)
def test_losses_are_those_of_one_process(
    pool: Pool, config: TrainConfig, tmp_path: Path, one: Path, sizes: dict[str, int]
) -> None:
    """Training and held-out losses and gradient norms, with states that are carried from batch to batch."""
    config, several = dataclasses.replace(config, parallel=ParallelConfig(**sizes)), tmp_path / "several"
    pool.run(torch.Size(sizes.values()).numel(), cases.run_training, config, several)
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    values = [load_checkpoint(checkpoints(run)[-1])[1] for run in (one, several)]
    assert values[0]["position"] == values[1]["position"]
    saved = [LanguageModel.from_pretrained(run).state_dict() for run in (one, several)]
    torch.testing.assert_close(saved[1], saved[0], rtol=1e-3, atol=1e-5)


def test_one_process_goes_on_with_what_two_began_and_back(
    pool: Pool, config: TrainConfig, tmp_path: Path, one: Path
) -> None:
    run = tmp_path / "several"
    pool.run(2, cases.run_training, dataclasses.replace(config, checkpoint_every=2, eval_every=2), run)
    for path in checkpoints(run)[-1:]:
        shutil.rmtree(path)
    resume(run)
    assert {k: v for k, v in losses(run).items() if "train" in k} == pytest.approx(
        {k: v for k, v in losses(one).items() if "train" in k}, rel=1e-4
    )
    pool.run(2, cases.resume_training, run, 8)
    assert load_checkpoint(checkpoints(run)[-1])[1]["step"] == 8


# --------------------------------------------------------------------------------------------------- one line each


def start(tmp_path: Path, size: int, *words: object, **options: object) -> Job:
    return Job(tmp_path / f"job-{size}", size, functools.partial(cases.command, **options), "train", *map(str, words))


def only_error(job: Job, limit: float = 60.0) -> str:
    """The line of a job that must end by itself on all ranks and say one line, on rank 0."""
    codes = job.codes(limit)
    assert None not in codes and 0 not in codes, f"exit codes {codes}: {job.text(0)}"
    said = job.errors()
    assert [rank for rank, _ in said] == [0], f"{said}\n{job.text(0)}"
    return said[0][1]


def test_degrees_that_do_not_fit_the_processes(config_file: Path, tmp_path: Path) -> None:
    line = only_error(start(tmp_path, 2, "--config", config_file, "--out", tmp_path / "run", "--dp-shard", 3))
    assert line == (
        "error: dp_replicate 1 x dp_shard 3 x cp 1 must give the number of processes, got 2; change --dp-replicate, "
        "--dp-shard (-1: what is left) and --cp, or start another number with torchrun"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["--batch-size", 3],
            "batch_size must be a multiple of dp_replicate x dp_shard, got 3 and 1 x 2; change --batch-size or the "
            "number of processes",
        ),
        (
            ["--cp", 2, "--context", 1],
            "context must be at least cp, so that each rank has a token, got 1 and 2; change --context or --cp",
        ),
        (
            ["--cp", 2, "--model.mixers", "hyena", "--no-carry-state"],
            "--cp splits sequences for Mamba, S6, attention and MLPs, and the model has Hyena; use --dp-shard for more "
            "processes",
        ),
        (
            ["--cp", 2, "--model.mixers", "attention", "--model.attention.window", 4],
            "attention on parts of sequences (--cp) does not carry its state from batch to batch; set carry_state to "
            "false (--no-carry-state)",
        ),
    ],
    ids=["rows", "tokens", "layers", "state"],
)
def test_rows_and_tokens_that_cannot_be_split(config_file: Path, tmp_path: Path, words: list, line: str) -> None:
    job = start(tmp_path, 2, "--config", config_file, "--out", tmp_path / "run", *words)
    assert only_error(job) == f"error: {line}"
    assert not (tmp_path / "run").exists()


def test_an_error_that_is_sent_right_after_the_ranks_have_met(config_file: Path, tmp_path: Path) -> None:
    """Rank 0 reads it from the stream of bytes that begins with the rank's secret, after a stranger's bytes."""
    patches = {"anymamba.training.parallel.watch._received": "late", "socket.create_connection": "after_a_stranger"}
    words = ("--config", config_file, "--out", tmp_path / "run", "--batch-size", 3)
    line = only_error(start(tmp_path, 2, *words, patches=patches))
    assert line.startswith("error: batch_size must be a multiple of dp_replicate x dp_shard, got 3 and 1 x 2")


def test_a_machine_with_too_few_gpus(config_file: Path, tmp_path: Path) -> None:
    words = ("train", "--config", str(config_file), "--out", str(tmp_path / "run"))
    line = only_error(Job(tmp_path / "job", 2, cases.one_gpu_on_machine_1, *words))
    assert line == (
        "error: rank 1: this machine has 1 GPUs for 2 processes; start as many as it has GPUs (torchrun "
        "--nproc-per-node)"
    )
    assert not (tmp_path / "run").exists()


def test_degrees_for_one_process(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--config", str(config_file), "--out", str(tmp_path / "run"), "--cp", "2"]) == 2
    assert (
        "error: dp_replicate 1 x dp_shard -1 x cp 2 must give the number of processes, got 1;"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("data", ["different_rows", "other_text_on_rank_1"])
def test_ranks_with_different_data(config_file: Path, tmp_path: Path, data: str) -> None:
    patches = {"anymamba.training.trainer.open_data": data}
    line = only_error(start(tmp_path, 2, "--config", config_file, "--out", tmp_path / "run", patches=patches))
    assert line.startswith("error: the ranks have different data: training digest is ")
    assert line.endswith(" on rank 1; start all of them with the same command and files")
    assert not (tmp_path / "run").exists()


def test_ranks_with_different_configs(config_file: Path, tmp_path: Path) -> None:
    line = only_error(
        Job(
            tmp_path / "job",
            2,
            cases.other_seed_on_rank_1,
            "train",
            "--config",
            str(config_file),
            "--out",
            str(tmp_path / "run"),
        )
    )
    assert line == (
        "error: the ranks have different configs: seed is 0 on rank 0 and 1 on rank 1; start all of them with the same "
        "command and files"
    )
    assert not (tmp_path / "run").exists()


def test_ranks_that_are_told_to_do_different_things(config_file: Path, config: TrainConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "old")
    line = only_error(Job(tmp_path / "job", 2, cases.resume_on_rank_1, str(config_file), str(tmp_path)))
    assert line.startswith("error: the ranks have different commands: command is train on rank 0 and resume on rank 1;")
    assert not (tmp_path / "run").exists()


def test_an_error_before_the_ranks_have_met_is_said_by_its_rank(config_file: Path, tmp_path: Path) -> None:
    job = Job(tmp_path / "job", 2, cases.no_config_on_rank_1, str(config_file), str(tmp_path / "run"))
    codes = job.codes(60)
    assert codes[1] and job.text(1).startswith("rank 1: error: ") and "absent.json" in job.text(1), job.text(1)


def test_a_rank_that_does_not_see_the_folder_of_the_run(config_file: Path, tmp_path: Path) -> None:
    patches = {"anymamba.training.parallel.writer.Writer._told": "elsewhere"}
    line = only_error(start(tmp_path, 2, "--config", config_file, "--out", tmp_path / "run", patches=patches))
    assert "rank 1 does not see" in line and "on a disk that all machines share (--out)" in line
    assert not (tmp_path / "run").exists() or not checkpoints(tmp_path / "run")


def test_a_folder_that_exists(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine.txt").write_text("mine")
    line = only_error(start(tmp_path, 2, "--config", config_file, "--out", run))
    assert line == f"error: {run} exists; resume it (--resume {run}) or choose another folder (--out)"
    assert [path.name for path in run.iterdir()] == ["mine.txt"]


def test_a_checkpoint_of_another_model(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config, run)
    values = json.loads((run / "train_config.json").read_text())
    values["model"]["d_model"] = 24
    (run / "train_config.json").write_text(json.dumps(values))
    before = files(run)
    line = only_error(start(tmp_path, 2, "--resume", run, "--steps", 9))
    folder = checkpoints(run)[-1]
    assert line.startswith(f"error: {folder} does not fit the model in train_config.json: ")
    assert re.search(
        r"\S+ is \(.*16.*\) in the checkpoint and \(.*24.*\) in the model|\S+ is .* in the checkpoint", line
    )
    assert files(run) == before


@pytest.mark.parametrize("reports", [0, 1])
def test_a_full_disk_on_one_rank(config_file: Path, tmp_path: Path, reports: int) -> None:
    """All ranks are told by the one that could not write; the first that has time for it reports it."""
    run = tmp_path / "run"
    patches = {"anymamba.training.parallel.writer.Writer._write": "full_disk"}
    if reports == 1:
        patches["anymamba.training.parallel.writer.Writer.poll"] = "poll_on_rank_1"
    line = only_error(start(tmp_path, 2, "--config", config_file, "--out", run, patches=patches))
    reason = (
        f"{run}: the checkpoint could not be written (No space left on device); the earlier ones are complete: "
        "make room, then resume"
    )
    assert line in ([f"error: {reason}"] if reports == 0 else []) + [f"error: rank 1: {reason}"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000000"]
    resume(run)


# --------------------------------------------------------------------------------------------------- deaths and signals


@pytest.mark.parametrize("dead", [0, 1])
def test_the_death_of_a_rank_ends_the_others(config_file: Path, tmp_path: Path, dead: int) -> None:
    run = tmp_path / "run"
    job = start(tmp_path, 2, "--config", config_file, "--out", run, "--steps", 100000)
    job.wait_for(run / "checkpoints" / "step-00000003")
    os.kill(job.processes[dead].pid, signal.SIGKILL)
    died = time.monotonic()
    codes = job.codes(30)
    took = time.monotonic() - died
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == 1 and took < 15, f"{codes} after {took:.1f} s"
    way_out = f"resume the run with the same torchrun command and --resume {run}"
    assert job.errors() == [(1 - dead, f"error: rank {dead} has died; {way_out}")]


def test_sigterm_to_one_rank_saves_and_ends_all(config_file: Path, tmp_path: Path) -> None:
    """Slurm sends it to torchrun, too, which sends it once more; no rank ends before the checkpoint."""
    run = tmp_path / "run"
    words = ("--config", config_file, "--out", run, "--steps", 100000, "--checkpoint-every", 100000)
    patches = {"anymamba.training.parallel.several.SeveralProcesses.clip": "clip_and_get_sigterm"}
    job = start(tmp_path, 2, *words, patches=patches)
    assert job.codes(60) == [143, 130]
    assert f"terminated; resume with: anymamba train --resume {run}" in job.text(0)
    assert load_checkpoint(checkpoints(run)[-1])[1]["step"] == 1


def test_training_goes_on_while_a_checkpoint_is_written(pool: Pool, config: TrainConfig, tmp_path: Path) -> None:
    """The disk takes 1.5 s, and as long for each model; two steps after the checkpoint do not wait for it."""
    config = dataclasses.replace(config, checkpoint_every=2, eval_every=2, steps=4)
    [written, stepped] = pool.run(2, cases.train_on_a_slow_disk, config, tmp_path / "run")[0]
    assert stepped < 1.2 < written, f"the steps took {stepped:.2f} s, the checkpoint {written:.2f} s"


def test_the_best_model_is_that_of_its_step(pool: Pool, config: TrainConfig, tmp_path: Path) -> None:
    """Also where later steps are done before it is written."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.5, warmup_steps=1)
    config = dataclasses.replace(config, optimizer=optimizer, eval_every=2, checkpoint_every=100, steps=6)
    pool.run(2, cases.run_training, config, tmp_path / "fast")
    pool.run(2, cases.train_with_slow_models, config, tmp_path / "slow")
    best = [LanguageModel.from_pretrained(tmp_path / name / "best").state_dict() for name in ("fast", "slow")]
    torch.testing.assert_close(best[1], best[0], rtol=0, atol=0)


def files(run: Path) -> dict[str, bytes]:
    """The contents of all files."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


# --------------------------------------------------------------------------------------------------- kills


def run_with_kills(config_file: Path, tmp_path: Path, steps: int, kills: int, seed: int) -> tuple[Path, int]:
    """A run of two ranks that loses a random one, at a random moment, as often as said; and how many kills hit it."""
    draw, run, hit = random.Random(seed), tmp_path / f"killed-{seed}", 0
    for attempt in range(kills + 1):
        started = (run / "train_config.json").exists()
        words = (
            ("--resume", run)
            if started
            else ("--config", config_file, "--out", run, "--steps", steps, "--eval-every", 40)
        )
        job = start(tmp_path / f"attempt-{seed}-{attempt}", 2, *words)
        if attempt < kills:
            newest = checkpoints(run)[-1] if checkpoints(run) else None
            if newest is not None or draw.random() < 0.7:  # otherwise at any moment of the start
                wait_for_newer(job, run, newest)
            time.sleep(draw.uniform(0, 0.3))
            os.kill(draw.choice(job.processes).pid, signal.SIGKILL)
        codes = job.codes(300)
        assert None not in codes, job.text(0)
        hit += -signal.SIGKILL in codes
        if attempt == kills:
            assert codes == [0, 0], job.text(0)
    return run, hit


def wait_for_newer(job: Job, run: Path, newest: Path | None) -> None:
    end = time.monotonic() + 60
    while all(p.is_alive() for p in job.processes) and time.monotonic() < end:
        if checkpoints(run) and checkpoints(run)[-1] != newest:
            return
        time.sleep(0.01)


def straight(config_file: Path, tmp_path: Path, steps: int) -> Path:
    words = ("--config", config_file, "--out", tmp_path / "straight", "--steps", steps, "--eval-every", 40)
    job = start(tmp_path / "straight-job", 2, *words)
    assert job.codes(300) == [0, 0], job.text(0)
    return tmp_path / "straight"


def test_a_run_that_lost_a_rank_goes_on_bit_for_bit(config_file: Path, tmp_path: Path) -> None:
    want = straight(config_file, tmp_path, 24)
    run, hit = run_with_kills(config_file, tmp_path, 24, 1, seed=1)
    assert hit == 1
    assert_same_several(want, run, 24)


@pytest.mark.slow
def test_twenty_kills_of_a_rank_and_equal_bits(config_file: Path, tmp_path: Path) -> None:
    want = straight(config_file, tmp_path, 200)
    run, hit = run_with_kills(config_file, tmp_path, 200, 20, seed=0)
    assert hit == 20, "each kill must hit the run"
    assert_same_several(want, run, 200)


def assert_same_several(want: Path, got: Path, steps: int) -> None:
    """All tensors and the position of the last checkpoint, and all recorded losses, are the same bits."""
    tensors, values = load_checkpoint(checkpoints(got)[-1])
    want_tensors, want_values = load_checkpoint(checkpoints(want)[-1])
    assert values["step"] == want_values["step"] == steps
    assert values["position"] == want_values["position"]
    assert tensors.keys() == want_tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], want_tensors[name])] == []
    assert losses(got) == losses(want)
    assert (got / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()
    assert not list((got / "checkpoints").glob(".*"))


def test_a_run_that_was_done_before_a_rank_died_is_done(config: TrainConfig, tmp_path: Path, monkeypatch) -> None:
    """torchrun starts `--resume RUN --steps 6` again, and nothing is left to do."""
    train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="has done 6 steps; give more than that"):
        resume(tmp_path / "run", steps=6)
    monkeypatch.setattr("anymamba.training.trainer.is_restarted", lambda run, launch: True)
    assert resume(tmp_path / "run", steps=6).steps == 6


@pytest.mark.slow
def test_torchrun_starts_a_run_again(config_file: Path, tmp_path: Path) -> None:
    """A rank that kills itself at step 4 of the first attempt: torchrun goes on from step 3."""
    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"),
        *("-m", "tests.training.parallel.dies_once", "train", "--config", str(config_file), "--out", str(run)),
        *("--steps", "6", "--eval-every", "40"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == [f"error: rank 1 has died; resume the run with the same torchrun command and --resume {run}"]
    want = straight(config_file, tmp_path, 6)
    assert_same_several(want, run, 6)
    again = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert again.returncode != 0
    assert again.stderr.count(f"error: {run} exists; resume it (--resume {run}) or choose another folder") == 2


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_a_run_again_on_two_machines(config_file: Path, tmp_path: Path, victim: int) -> None:
    """Two agents, whose counts of restarts differ afterwards; the rank dies at step 4."""
    run, port = tmp_path / "run", free_port()
    root = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "VICTIM": str(victim)}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=1"),
        *("--rdzv-backend=c10d", "--rdzv-id=one", f"--rdzv-endpoint=localhost:{port}"),
        *("-m", "tests.training.parallel.dies_once", "train", "--config", str(config_file), "--out", str(run)),
        *("--steps", "6", "--eval-every", "40"),
    ]
    agents = []
    for i in range(2):
        with (tmp_path / f"agent-{i}.txt").open("w") as output:
            agents.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        time.sleep(1)
    try:
        codes = [agent.wait(120) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    said = "".join((tmp_path / f"agent-{i}.txt").read_text() for i in range(2))
    assert codes == [0, 0], said
    assert_same_several(straight(config_file, tmp_path, 6), run, 6)


# --------------------------------------------------------------------------------------------------- rows of a rank


def test_masks_of_all_ranks_are_those_of_one_process() -> None:
    tokenizer = DnaTokenizer("fold")
    ids = torch.tensor([list(tokenizer.encode("ACGTTGCA" * 8)) for _ in range(4)])
    offsets = torch.arange(5, dtype=torch.int32) * ids.shape[1]
    batch = Batch(ids, ids, offsets, torch.zeros(4, dtype=torch.bool), {})
    masking = Masking.of(tokenizer, seed=3)
    want = masking.apply(batch, 7)
    for size in (1, 2, 4):
        parts = [masking.apply(rows_of_batch(batch, rank, size), 7, rows=(rank, size)) for rank in range(size)]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), want.input_ids)
        assert torch.equal(torch.cat([part.labels for part in parts]), want.labels)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_rows_of_a_rank_have_their_documents(size: int) -> None:
    """Three rows of five tokens, with documents that begin inside rows; missing rows have no labels."""
    ids = torch.arange(15).view(3, 5)
    batch = Batch(
        ids, ids + 1, torch.tensor([0, 2, 5, 10, 13, 15], dtype=torch.int32), torch.tensor([True, False, True]), {}
    )
    parts = [rows_of_batch(batch, rank, size) for rank in range(size)]
    assert {tuple(part.input_ids.shape) for part in parts} == {(-(-3 // size), 5)}
    labels = torch.cat([part.labels for part in parts])
    assert torch.equal(labels[:3], batch.labels) and bool((labels[3:] == -100).all())
    assert torch.equal(torch.cat([part.carried for part in parts])[:3], batch.carried)
    starts = [
        offset + 5 * rank * -(-3 // size) for rank, part in enumerate(parts) for offset in part.cu_seqlens.tolist()
    ]
    assert {start for start in starts if start <= 15} == set(batch.cu_seqlens.tolist())


def test_adapters_and_a_time_limit_on_several_ranks(pool: Pool, config: TrainConfig, tmp_path: Path, one: Path) -> None:
    """LoRA trains alike on two ranks; its model is written merged; the clock of rank 0 ends the run on all."""
    pytest.importorskip("peft")
    tuned = dataclasses.replace(config, start_from=str(one), lora=2, steps=2)
    train(tuned, tmp_path / "alone")
    pool.run(2, cases.run_training, tuned, tmp_path / "tuned")
    assert losses(tmp_path / "tuned") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    assert (tmp_path / "tuned" / "adapter" / "adapter_model.safetensors").exists()
    endless = dataclasses.replace(config, steps=10**6, max_minutes=0.01)
    pool.run(2, cases.run_training, endless, tmp_path / "short")
    assert load_checkpoint(checkpoints(tmp_path / "short")[-1])[1]["step"] < 10**6
