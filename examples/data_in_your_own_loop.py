"""flame's data plane in a plain PyTorch loop: raw text in, full rows out, resumed exactly. Call it twice.

python examples/data_in_your_own_loop.py "data/*.jsonl" data/tokenizer 20 state.pt
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import flame

files, tokenizer, steps, saved = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])

# the data: which rows come in which order is a function of these lines alone
config = flame.DataConfig(sources=[flame.SourceConfig("text", [files])], sequence_length=128)
plan = flame.DataPlan.of(config, tokens_per_step=1024, seed=42)
catalog = flame.open_catalog(config, flame.TokenizerConfig(tokenizer), plan, Path())
seal = flame.fingerprint(catalog, plan)

# a model of your own: one layer of causal attention
torch.manual_seed(0)
embedding, attend, head = nn.Embedding(catalog.vocab_size, 64), nn.Linear(64, 192), nn.Linear(64, 64)
nn.init.normal_(embedding.weight, std=0.02)
model = nn.ModuleList([embedding, attend, head])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

data = None
if saved.exists():
    state = torch.load(saved, weights_only=True)
    data = flame.DataState.from_json(state["data"])
    assert flame.fingerprint_difference(data.fingerprint, seal) is None, "other data than the run began with"
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])

with flame.Loader(catalog, plan, rank=0, world=1, micro_batch_rows=8, state=data) as loader:
    for _ in range(steps):
        step = loader.next_step()
        (batch,) = step.micro_batches
        document = torch.repeat_interleave(batch.cu_seqlens.diff()).view_as(batch.tokens)  # [b, L]
        seen = (document[:, :, None] == document[:, None, :]).tril()  # its own document, up to itself
        states = embedding(batch.tokens)
        q, k, v = attend(states).chunk(3, dim=-1)
        states = states + head(F.scaled_dot_product_attention(q, k, v, attn_mask=seen))
        loss = F.cross_entropy(F.linear(states, embedding.weight).flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step.step}: {step.counts.predicted} tokens predicted, loss {loss.item():.6f}")

    data = flame.DataState(step.step + 1, step.state, loader.columns, seal)
torch.save({"data": data.to_json(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
