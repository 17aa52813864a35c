"""flame's data plane and loss in Lightning, on one process. Call it twice.

python examples/lightning_module.py "data/*.jsonl" data/tokenizer gla.json 20 lightning/last.ckpt
"""

import sys
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader, IterableDataset

import flame

files, tokenizer, model_config, steps, saved = sys.argv[1:]
data = flame.DataConfig(sources=[flame.SourceConfig("text", [files])], sequence_length=128)
plan = flame.DataPlan.of(data, tokens_per_step=1024, seed=42)
catalog = flame.open_catalog(data, flame.TokenizerConfig(tokenizer), plan, Path())
seal, config = flame.fingerprint(catalog, plan), flame.load_config(model_config)


class Rows(IterableDataset):
    state, saved = None, None  # to begin from, a flame.DataState; and after the newest step, as JSON

    def __iter__(self):
        with flame.Loader(catalog, plan, rank=0, world=1, micro_batch_rows=8, state=self.state) as loader:
            for step in iter(loader.next_step, None):  # without end
                state = flame.DataState(step.step + 1, step.state, loader.columns, seal)
                yield step.micro_batches[0], state.to_json()


class Guest(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        family, model = flame.family_of(config), flame.build_on_meta(config)
        flame.initialize(model, config, seed=42, device="cpu")
        self.loss = flame.LossModule(model, family.hidden, family.head(model))

    def training_step(self, taken, index):
        batch, rows.saved = taken
        loss = self.loss(batch) / (batch.labels != flame.IGNORED).sum()  # documents are kept apart
        print(f"step {self.global_step}: loss {loss.item():.6f}")
        return loss

    def on_save_checkpoint(self, checkpoint):
        checkpoint["data"] = rows.saved

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


rows, last = Rows(), saved if Path(saved).exists() else None
if last is not None:
    rows.state = flame.DataState.from_json(torch.load(last, weights_only=True)["data"])
    assert flame.fingerprint_difference(rows.state.fingerprint, seal) is None, "other data"
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = lightning.Trainer(max_steps=int(steps), devices=1, **quiet)
trainer.fit(Guest(), DataLoader(rows, batch_size=None), ckpt_path=last, weights_only=True)
trainer.save_checkpoint(saved)
