"""A GPT training and sampling script as it is written for torch: `python gpt_script.py FOLDER`.

`test_gpt_script.py` runs it as it stands and with its import changed. It writes losses.json.
"""

import inspect
import json
import math
import os
import sys

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

FOLDER = sys.argv[1]
BLOCK, BATCH, STEPS, ACCUMULATE = 16, 4, 24, 2
device = "cuda" if torch.cuda.is_available() else "cpu"
device_type = "cuda" if "cuda" in device else "cpu"
dtype = os.environ.get("DTYPE", "float32")
torch.manual_seed(1337)
torch.set_num_threads(1)
torch.backends.cuda.matmul.allow_tf32 = True
torch.backends.cudnn.allow_tf32 = True
amp_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
autocast = torch.amp.autocast(device_type=device_type, dtype=amp_dtype, enabled=dtype != "float32")


def get_batch(split):
    data = np.memmap(os.path.join(FOLDER, f"{split}.bin"), dtype=np.uint16, mode="r")
    starts = RANDOM.integers(0, len(data) - BLOCK, BATCH)
    x = torch.stack([torch.from_numpy(data[i : i + BLOCK].astype(np.int64)) for i in starts])
    y = torch.stack(
        [torch.from_numpy(data[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in starts]
    )
    if device_type == "cuda" or os.environ.get("PIN"):  # torch refuses to pin without a device
        x = x.pin_memory().to(device, non_blocking=True)
        y = y.pin_memory().to(device, non_blocking=True)
    else:
        x, y = x.to(device), y.to(device)
    return x, y


class LayerNorm(nn.Module):
    """With an optional bias."""

    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, width, heads, flash):
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.heads = heads
        self.flash = flash and hasattr(F, "scaled_dot_product_attention")
        if not self.flash:
            mask = torch.tril(torch.ones(BLOCK, BLOCK)).view(1, 1, BLOCK, BLOCK)
            self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        k = k.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        v = v.view(B, T, self.heads, C // self.heads).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
            y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, width, heads, flash):
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(width, bias=True), LayerNorm(width, bias=False)
        self.attn = Attention(width, heads, flash)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(width, 4 * width),
                "gelu": nn.GELU(approximate="tanh"),
                "c_proj": nn.Linear(4 * width, width),
            }
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        m = self.mlp
        return x + m["c_proj"](m["gelu"](m["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, vocab, width=32, heads=4, layers=2):
        super().__init__()
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(vocab, width),
                wpe=nn.Embedding(BLOCK, width),
                drop=nn.Dropout(0.0),
                h=nn.ModuleList([Block(width, heads, flash=i == 0) for i in range(layers)]),
                ln_f=LayerNorm(width, bias=True),
            )
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                torch.nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * layers))

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, idx, targets=None):
        b, t = idx.size()
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss

    def configure_optimizers(self, weight_decay, lr, betas, device_type):
        params = {n: p for n, p in self.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for p in params.values() if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        assert sum(p.numel() for g in groups for p in g["params"]) == self.size()
        fused = "fused" in inspect.signature(torch.optim.AdamW).parameters
        return torch.optim.AdamW(groups, lr=lr, betas=betas, **(dict(fused=True) if fused else {}))

    def size(self):
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def generate(self, idx, count, temperature=1.0, top_k=None):
        for _ in range(count):
            logits, _ = self(idx if idx.size(1) <= BLOCK else idx[:, -BLOCK:])
            logits = logits[:, -1, :] / temperature
            if top_k is not None:
                v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
                logits[logits < v[:, [-1]]] = -float("Inf")
            probs = F.softmax(logits, dim=-1)
            idx = torch.cat((idx, torch.multinomial(probs, num_samples=1)), dim=1)
        return idx


def learning_rate(step):
    if step < 4:
        return 3e-3 * (step + 1) / 4
    return 3e-4 + 0.5 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 4))) * 2.7e-3


@torch.no_grad()
def estimate_loss():
    model.eval()
    losses = torch.zeros(3)
    for k in range(3):
        with autocast:
            _, loss = model(*get_batch("val"))
        losses[k] = loss.item()
    model.train()
    return losses.mean().item()


def start_weights(model):
    """The same on every library: written by the first run, read by the next."""
    path = os.path.join(FOLDER, "start.npz")
    if not os.path.exists(path):
        np.savez(path, **{k: v.cpu().numpy() for k, v in model.state_dict().items()})
    with np.load(path) as arrays:
        model.load_state_dict({k: torch.from_numpy(arrays[k]) for k in arrays.files})


RANDOM = np.random.default_rng(0)
raw = GPT(vocab=17).to(device)
start_weights(raw)
assert raw.transformer.wte.weight is raw.lm_head.weight
optimizer = raw.configure_optimizers(0.1, 3e-3, (0.9, 0.95), device_type)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
model = torch.compile(raw) if os.environ.get("COMPILE") else raw
losses = []


def train(steps):
    x, y = get_batch("train")
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        for _ in range(ACCUMULATE):
            with autocast:
                _, loss = model(x, y)
                loss = loss / ACCUMULATE
            x, y = get_batch("train")
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() * ACCUMULATE)


train(range(STEPS // 2))
checkpoint = {
    "model": raw.state_dict(),
    "optimizer": optimizer.state_dict(),
    "scaler": scaler.state_dict(),
    "step": STEPS // 2,
    "config": {"vocab": 17, "betas": (0.9, 0.95)},
}
torch.save(checkpoint, os.path.join(FOLDER, "ckpt.pt"))
with torch.no_grad():
    for p in raw.parameters():
        p.zero_()
loaded = torch.load(os.path.join(FOLDER, "ckpt.pt"), map_location=device)
raw.load_state_dict(loaded["model"])
optimizer.load_state_dict(loaded["optimizer"])
scaler.load_state_dict(loaded["scaler"])
train(range(loaded["step"], STEPS))
validation = estimate_loss()

start = torch.zeros((2, 1), dtype=torch.long, device=device)
sampled = raw.eval().generate(start, 2 * BLOCK, temperature=0.8, top_k=5)
greedy = raw.generate(start, 8, top_k=1)
with open(os.path.join(FOLDER, f"losses-{torch.__name__}-{dtype}.json"), "w") as file:
    json.dump(
        {
            "losses": losses,
            "validation": validation,
            "greedy": greedy.tolist(),
            "sampled": sampled.tolist(),
        },
        file,
    )
