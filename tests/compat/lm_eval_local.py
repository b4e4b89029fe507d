"""lm-eval's tasks on local files, and a small model that both `hf` and ours load."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import torch

TASKS = ("local_lambada", "local_hellaswag", "local_piqa", "local_arc_easy", "local_winogrande")
FILES = {
    "lambada": "lambada_openai_test.jsonl",
    "hellaswag": "hellaswag_val_1000.jsonl",
    "piqa": "piqa_valid.jsonl",
    "arc_easy": "arc_easy_validation.jsonl",
    "winogrande": "winogrande_xl_validation.jsonl",
}


def write_tasks(folder: Path, evaluation_sets: Path, n_documents: int) -> Path:
    """The tasks of lm_eval_tasks with the first documents of each set."""
    import lm_eval

    folder.mkdir(exist_ok=True)
    for name, file in FILES.items():
        with open(evaluation_sets / file, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in islice(lines, n_documents)]
        if name == "piqa":
            labels = (evaluation_sets / "piqa_valid_labels.lst").read_text().split()
            rows = [row | {"label": int(label)} for row, label in zip(rows, labels, strict=False)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
        task = (Path(__file__).with_name("lm_eval_tasks") / f"{name}.yaml").read_text(encoding="utf-8")
        task = task.replace("LM_EVAL", str(Path(lm_eval.__file__).parent)).replace("DATA", str(folder))
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    return folder


def write_model(folder: Path, tokenizer: Path) -> Path:
    """A Mamba of transformers, moved away from its initialisation, with the GPT-NeoX tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=50280, hidden_size=32, num_hidden_layers=2)
    model = transformers.MambaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
