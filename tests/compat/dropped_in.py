"""Run by test_drop_in in a process of its own: transformers' models before and after activate(), and what differs.

python tests/compat/dropped_in.py MODEL DTYPE [lora] prints one JSON object.
"""

from __future__ import annotations

import copy
import json
import logging
import sys

import torch
import transformers

from anymamba.compat import activate
from anymamba.ops import dispatch

logging.getLogger("transformers").setLevel(logging.ERROR)
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
CONFIGS = {
    "mamba": lambda: transformers.MambaConfig(**SIZES, state_size=8, conv_kernel=3),
    "falcon_mamba": lambda: transformers.FalconMambaConfig(**SIZES, mixer_rms_eps=1e-3),
    "mamba gelu": lambda: transformers.MambaConfig(**SIZES, state_size=8, conv_kernel=3, hidden_act="gelu"),
    "zamba relu2": lambda: transformers.ZambaConfig(
        **SIZES,
        hidden_mamba_act="relu2",
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_mamba_heads=2,
        mamba_d_state=8,
        layers_block_type=["hybrid", "hybrid"],
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        **SIZES, num_heads=8, head_dim=8, n_groups=2, state_size=8, chunk_size=8
    ),
    "jamba": lambda: transformers.JambaConfig(
        **SIZES,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        num_experts=2,
    ),
}


def measure(model: torch.nn.Module) -> dict:
    """Loss and gradients of a left-padded batch in training, its logits, those of steps after it, and greedy tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 50, (2, 19), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model.train().zero_grad()
    loss = model(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        tokens = model.generate(
            ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0
        )
        steps = steps_after(model, ids, mask)
    return {"loss": loss.detach(), "grads": grads, "logits": logits, "steps": steps, "tokens": tokens}


def steps_after(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, count: int = 6) -> torch.Tensor:
    """Logits of given tokens, one at a time after the cache of a left-padded batch."""
    found = []
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given = torch.randint(1, 50, (count, len(ids)), generator=torch.Generator().manual_seed(3))

    def teacher(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found.append(scores.float().clone())
        return torch.full_like(scores, -torch.inf).scatter(1, given[len(found) - 1][:, None], 0)

    model.generate(ids, attention_mask=mask, logits_processor=[teacher], **options)
    return torch.stack(found, dim=1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)).item()


def adapters(model: torch.nn.Module) -> dict[str, float]:
    """The norm of the gradient of each LoRA's B in training without a cache."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["in_proj", "x_proj"], r=2)).train()
    ids = torch.arange(1, 20)[None]
    model(ids, labels=ids).loss.backward()
    return {n: p.grad.norm().item() for n, p in model.named_parameters() if "lora_B" in n and p.grad is not None}


def main(name: str, dtype: torch.dtype, lora: bool) -> dict:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    exact = measure(copy.deepcopy(model))
    model = model.to(dtype)
    before = measure(model)
    dispatch.calls.clear()
    activate()
    after = measure(model)
    kernels = {" ".join(key): count for key, count in dispatch.calls.items()}
    result = {
        "kernels": kernels,
        "tokens": torch.equal(before["tokens"], after["tokens"]),
        "lora": adapters(model) if lora else {},
    }
    for key in ("loss", "logits", "steps"):
        result[key] = difference(after[key], before[key])
        result[f"{key} error"] = difference(after[key], exact[key])
        result[f"{key} error before"] = difference(before[key], exact[key])
    assert after["grads"].keys() == before["grads"].keys()
    result["grads"] = max(difference(after["grads"][n], g) for n, g in before["grads"].items())
    result["grads error"], result["grads error before"] = (
        max(difference(side["grads"][n], g) for n, g in exact["grads"].items()) for side in (after, before)
    )
    return result


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3:] == ["lora"])))
