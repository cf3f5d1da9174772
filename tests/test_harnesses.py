"""Evaluation harnesses through their own commands, against the project's own evaluation."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from glimpseprune.baselines.method import Method, OwnPruning
from glimpseprune.commands.evaluate import read_samples
from glimpseprune.evaluation import evaluate
from glimpseprune.loading import REPOSITORY, TINY_MODEL, load_model
from glimpseprune.tiny_world.dataset import write_pages

TASKS = REPOSITORY / "glimpseprune" / "harness"
PAGES, CAP = 8, 0.111

pytestmark = pytest.mark.slow
needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where harnesses are started: `runs/pages` lies in it."""
    folder = tmp_path_factory.mktemp("harness")
    write_pages(folder / "runs" / "pages", "test", range(PAGES))
    return folder


@pytest.fixture(scope="module")
def own(folder):
    """Answers of the project's own evaluation by question number, all tokens and capped."""
    samples = read_samples(folder / "runs" / "pages" / "test.jsonl", None, 1000, 0)
    methods = [Method(), OwnPruning("capped", CAP)]
    evaluation = evaluate(*load_model(TINY_MODEL), samples, methods, batch_size=8)
    by_number = [
        {answer.sample.number: answer for answer in answers} for answers in evaluation.answers
    ]
    return dict(zip(("all tokens", "capped"), by_number, strict=True))


def run(command: list[str], folder: Path, **variables: str) -> str:
    environment = (
        os.environ
        | variables
        | {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
    )
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def logged_samples(output: Path) -> dict[int, dict]:
    (path,) = output.rglob("*samples_tiny_world*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({sample["doc_id"] for sample in samples}) == len(samples)
    return {sample["doc_id"]: sample for sample in samples}


def results(output: Path) -> dict:
    (path,) = output.rglob("*results*.json")
    return json.loads(path.read_text())


@needs_lmms_eval
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("setting", ["all tokens", "capped"])
def test_lmms_eval_equals_our_evaluation(folder, own, processes, setting):
    output = folder / f"lmms-{setting}-{processes}"
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    settings = {"all tokens": "prune=False", "capped": f"max_keep_ratio={CAP}"}[setting]
    run(
        [
            *launcher, "lmms_eval", "--model", "glimpseprune",
            "--model_args", f"pretrained={TINY_MODEL},{settings}",
            "--include_path", str(TASKS / "lmms_eval_tasks"), "--tasks", "tiny_world",
            "--batch_size", "5", "--log_samples", "--output_path", str(output),
        ],
        folder,
    )  # fmt: skip
    samples = logged_samples(output)
    assert sorted(samples) == sorted(own[setting])
    for number, answer in own[setting].items():
        sample = samples[number]
        assert sample["filtered_resps"] == answer.text
        assert sample["exact_match"] == answer.score
        counts = sample["token_counts"][0]
        assert counts["visual_tokens"] == answer.visual
        assert counts["kept_visual_tokens"] == answer.by_layer[-1]
        assert counts["retention"] == pytest.approx(answer.kept)
        assert counts["seconds_to_first_token"] > 0 and counts["tokens_per_second"] > 0
    answers = own[setting].values()
    content = results(output)
    accuracy = sum(answer.score for answer in answers) / len(answers)
    assert content["results"]["tiny_world"]["exact_match,none"] == pytest.approx(accuracy)
    throughput = content["throughput"]
    assert throughput["avg_samples"] == len(answers)
    retention = sum(answer.kept for answer in answers) / len(answers)
    assert throughput["avg_retention"] == pytest.approx(retention)
    assert throughput["avg_seconds_to_first_token"] > 0
    assert throughput["avg_decoded_tokens_per_second"] > 0


@needs_lmms_eval
def test_visual_cot_is_judged(folder, tmp_path):
    """Pages in the form of Visual-CoT's benchmark; the judge on loopback says one half to each."""
    lines = (folder / "runs" / "pages" / "test.jsonl").read_text().splitlines()[:3]
    entries = [conversation(json.loads(line)) for line in lines]
    benchmark = tmp_path / "viscot_benchmark" / "benchmark" / "docvqa.json"
    benchmark.parent.mkdir(parents=True)
    benchmark.write_text(json.dumps(entries))
    (tmp_path / "viscot_images").symlink_to(folder / "runs" / "pages")
    with judge_on_loopback() as (url, asked):
        run(
            [
                sys.executable, "-m", "lmms_eval", "--model", "glimpseprune",
                "--model_args", f"pretrained={TINY_MODEL}",
                "--include_path", str(TASKS / "lmms_eval_tasks"), "--tasks", "visual_cot_docvqa",
                "--batch_size", "3", "--log_samples", "--output_path", str(tmp_path / "out"),
            ],
            tmp_path,
            GLIMPSEPRUNE_JUDGE_URL=url,
            GLIMPSEPRUNE_JUDGE_MODEL="judge",
        )  # fmt: skip
    scores = results(tmp_path / "out")["results"]["visual_cot_docvqa"]
    assert scores["judge,none"] == 0.5 and scores["judge_unread,none"] == 0.0
    assert len(asked) == 3
    for entry in entries:
        question, answer = entry["conversations"][0]["value"], entry["conversations"][-1]["value"]
        question = question.removeprefix("<image>\n").split(" Please")[0]
        assert any(question in prompt and answer in prompt for prompt in asked)


def conversation(row: dict) -> dict:
    values = [
        f"<image>\n{row['question']} Please provide the bounding box coordinate of the region.",
        "[0, 0, 1, 1]",
        "<image>",
        row["answer"],
    ]
    roles = ("human", "gpt", "human", "gpt")
    turns = [{"from": r, "value": value} for r, value in zip(roles, values, strict=True)]
    image = [row["image"], f"{row['image']}###{row['bboxs'][0]}"]
    return {"dataset": "docvqa", "split": "val", "image": image, "conversations": turns}


@contextmanager
def judge_on_loopback():
    """Address of a judge that says 0.5, and the prompts it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][0]["content"])
            reply = json.dumps({"choices": [{"message": {"content": "0.5"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()


@needs_lm_eval
def test_lm_eval_equals_our_evaluation(folder, own):
    output = folder / "lm-eval"
    run(
        [
            sys.executable, "-m", "lm_eval", "--model", "hf-multimodal",
            "--model_args",
            f"pretrained={TINY_MODEL},dtype=float32,trust_remote_code=True,max_images=1",
            "--include_path", str(TASKS / "lm_eval_tasks"), "--tasks", "tiny_world",
            "--apply_chat_template", "--batch_size", "5", "--device", "cpu",
            "--gen_kwargs", f"max_keep_ratio={CAP}",
            "--log_samples", "--output_path", str(output),
        ],
        folder,
    )  # fmt: skip
    samples = logged_samples(output)
    assert sorted(samples) == sorted(own["capped"])
    for number, answer in own["capped"].items():
        assert samples[number]["filtered_resps"][0].strip() == answer.text
        assert samples[number]["exact_match"] == answer.score
