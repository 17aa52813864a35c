"""flame's data plane and loss in transformers' Trainer (needs accelerate), on one process. Call it twice.

python examples/huggingface_trainer.py "data/*.jsonl" data/tokenizer gla.json 20 trainer
"""

import json
import sys
from pathlib import Path

from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import flame

files, tokenizer, model_config, steps, output = sys.argv[1:]
data = flame.DataConfig(sources=[flame.SourceConfig("text", [files])], sequence_length=128)
plan = flame.DataPlan.of(data, tokens_per_step=1024, seed=42)
catalog = flame.open_catalog(data, flame.TokenizerConfig(tokenizer), plan, Path())
seal, config = flame.fingerprint(catalog, plan), flame.load_config(model_config)
family, model = flame.family_of(config), flame.build_on_meta(config)
flame.initialize(model, config, seed=42, device="cpu")
loss_of = flame.LossModule(model, family.hidden, family.head(model))  # documents in a row are kept apart


class Rows(IterableDataset):
    state = None  # the flame.DataState after the newest step

    def __iter__(self):
        with flame.Loader(catalog, plan, rank=0, world=1, micro_batch_rows=8, state=self.state) as loader:
            while True:
                step = loader.next_step()
                self.state = flame.DataState(step.step + 1, step.state, loader.columns, seal)
                yield {"batch": step.micro_batches[0]}


class FlameTrainer(Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=None)  # batches as they come

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = inputs["batch"].to(self.args.device)
        return loss_of(batch) / (batch.labels != flame.IGNORED).sum()


class SaveRows(TrainerCallback):
    def on_save(self, args, state, control, **others):
        file = Path(output, f"checkpoint-{state.global_step}", "data.json")
        file.write_text(json.dumps(rows.state.to_json()))


rows, last = Rows(), get_last_checkpoint(output) if Path(output).is_dir() else None
if last is not None:
    rows.state = flame.DataState.from_json(json.loads(Path(last, "data.json").read_text()))
    assert flame.fingerprint_difference(rows.state.fingerprint, seal) is None, "other data"
options = {"save_steps": 4, "logging_steps": 1, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
options |= {"max_steps": int(steps), "ignore_data_skip": True, "report_to": []}  # rows.state has the place
arguments = TrainingArguments(output, **options)
FlameTrainer(model, arguments, train_dataset=rows, callbacks=[SaveRows()]).train(resume_from_checkpoint=last)
